"""Where a registry, and work done in parts, keep their bytes: four functions on keys, put-if-absent to write.

A key is a path of strict names.  What is put stays as it is: nothing is overwritten, nothing is
removed.  On a file system a file is written aside, flushed, and linked to its name, which fails where
the name is taken; an object store does the same by a conditional PUT, through fsspec, and must refuse
a second one before anything is put into it.
"""

import contextlib
import os
import pathlib
import re
import stat
import uuid
from collections.abc import Iterator
from typing import Any, Protocol

from cotrr.errors import InputError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
DEPTH = 4
ASIDE = ".aside"  # files that are being written or that a killed process left; a store's self-test
FOLDER = os.O_RDONLY | os.O_DIRECTORY
# Protocols of fsspec that put with a condition which the store itself checks.  Others look first and
# write then (`file`), or are not known to do better.
CONDITIONAL = frozenset({"s3", "gs", "abfs", "memory"})


class Store(Protocol):
    """Bytes by key."""

    def put(self, key: str, data: bytes) -> bool:
        """Writes a key that is absent, durably; False, and nothing is changed, where it is there."""

    def get(self, key: str, limit: int) -> bytes:
        """What a key holds; raises KeyError where it is absent, InputError above `limit` bytes."""

    def size(self, key: str) -> int:
        """Bytes of a key; raises KeyError where it is absent."""

    def keys(self, prefix: str) -> list[str]:
        """All keys below a prefix, sorted; raises InputError for anything that is no plain file."""


def check_key(key: str) -> str:
    """The key; raises InputError unless it is a path of strict names.

    >>> check_key("cotrr/events/00000001.json")
    'cotrr/events/00000001.json'
    """
    parts = key.split("/")
    if len(parts) > DEPTH or not all(map(NAME.fullmatch, parts)):
        raise InputError(f"{key[:200]!r} is no name for the registry",
                         remedy="Use letters, digits, dots, dashes and underscores")  # fmt: skip
    return key


def open_store(place: str) -> Store:
    """The store at a folder, or at a URL such as s3://bucket/path, for which fsspec must be installed."""
    if "://" not in place:
        return LocalStore(place)
    try:
        import fsspec
    except ImportError:
        raise InputError(
            "fsspec is not installed",
            file=place,
            remedy="pip install 'cotrr[remote]' and the package of that store",
        ) from None
    try:
        system, root = fsspec.core.url_to_fs(place)
    except (ImportError, ValueError) as error:
        raise InputError(str(error), file=place) from None
    return LocalStore(root) if "file" in _protocols(system) else FsspecStore(system, root)


class LocalStore:
    """A store in a folder; no symbolic link below it is ever followed."""

    def __init__(self, folder: str | pathlib.Path):
        self._folder = pathlib.Path(os.path.realpath(folder))

    def put(self, key: str, data: bytes) -> bool:
        """Writes aside, flushes, links: no reader and no power cut sees half of it."""
        *parents, name = check_key(key).split("/")
        try:
            _make_durable(self._folder)
            with self._inside(parents, make=True) as home, self._inside([ASIDE], make=True) as aside:
                return _link_durable(name, home, data, aside)
        except OSError as error:  # which names at most the last part of the path
            raise OSError(error.errno, error.strerror, str(self._folder / key)) from None

    def get(self, key: str, limit: int) -> bytes:
        """Reads a plain file without following links."""
        with self._reading(key), open(self._open(key), "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if size > limit:
                raise InputError(f"larger than {limit:,} bytes", file=self._folder / key)
            return stream.read(size)

    def size(self, key: str) -> int:
        """Bytes of a plain file."""
        descriptor = self._open(key)
        try:
            return os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)

    def keys(self, prefix: str) -> list[str]:
        """Walks the folder of the prefix; a name that no key has is quoted, so that it is none."""
        found, folders = [], [prefix]
        while folders:
            here = check_key(folders.pop())
            with (
                contextlib.suppress(KeyError),
                self._reading(here),
                self._inside(here.split("/")) as at,
                os.scandir(at) as entries,
            ):
                for entry in entries:
                    key = f"{here}/{_readable(entry.name)}"
                    if entry.is_dir(follow_symlinks=False) and NAME.fullmatch(entry.name):
                        folders.append(key)
                    elif entry.is_symlink() or not (entry.is_file() or entry.is_dir()):
                        raise InputError("neither a file nor a folder", file=self._folder / key,
                                         remedy="A registry holds no links and nothing special")  # fmt: skip
                    else:
                        found.append(key)
        return sorted(found)

    def _open(self, key: str) -> int:
        """A descriptor of the key's plain file."""
        *parents, name = check_key(key).split("/")
        with self._reading(key), self._inside(parents) as home:
            descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=home)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise InputError("not a plain file", file=self._folder / key)
        return descriptor

    @contextlib.contextmanager
    def _inside(self, names: list[str], *, make: bool = False) -> Iterator[int]:
        """A descriptor of a folder, each step of its path a real one; `make` makes them, durably."""
        at = os.open(self._folder, FOLDER)
        try:
            for name in names:
                if make:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(name, dir_fd=at)
                    os.fsync(at)  # also an old one: who made it may have been killed before this
                inner = os.open(name, FOLDER | os.O_NOFOLLOW, dir_fd=at)
                os.close(at)
                at = inner
            yield at
        finally:
            os.close(at)

    @contextlib.contextmanager
    def _reading(self, key: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise KeyError(key) from None
        except OSError as error:  # ELOOP, ENOTDIR
            raise InputError((error.strerror or str(error)).lower(), file=self._folder / key) from None


class FsspecStore:
    """A store behind fsspec, of a kind that is known to create and never overwrite."""

    def __init__(self, system: Any, root: str):
        if not CONDITIONAL.intersection(_protocols(system)):
            raise InputError(f"{type(system).__name__} is not known to write only where nothing is there",
                             file=root, remedy=f"Known are: {', '.join(sorted(CONDITIONAL))}")  # fmt: skip
        self._system, self._root, self._tested = system, root.rstrip("/"), False

    def put(self, key: str, data: bytes) -> bool:
        """A conditional PUT (If-None-Match: *)."""
        path = f"{self._root}/{check_key(key)}"
        if self._exists(path):  # saves the upload where it is plain
            return False
        if not self._tested:
            self._test()
        try:
            self._system.pipe_file(path, data, mode="create")
            return True
        except OSError:  # FileExistsError of most; some that speak S3 say no more than "precondition"
            if self._exists(path):
                return False
            raise

    def get(self, key: str, limit: int) -> bytes:
        """Reads an object that is not too large."""
        if self.size(key) > limit:
            raise InputError(f"larger than {limit:,} bytes", file=f"{self._root}/{key}")
        return self._system.cat_file(f"{self._root}/{key}")

    def size(self, key: str) -> int:
        """Bytes of an object."""
        self._system.invalidate_cache()
        try:
            found = self._system.info(f"{self._root}/{check_key(key)}")
        except FileNotFoundError:
            raise KeyError(key) from None
        if found["type"] != "file":
            raise InputError("not a plain file", file=f"{self._root}/{key}")
        return found["size"]

    def keys(self, prefix: str) -> list[str]:
        """Lists the objects below a prefix; a name that no key has is quoted, so that it is none."""
        self._system.invalidate_cache()
        start = f"{self._root}/{check_key(prefix)}/"
        return sorted("/".join([prefix, *map(_readable, path.removeprefix(start).split("/"))])
                      for path in self._system.find(start) if path.startswith(start))  # fmt: skip

    def _test(self) -> None:
        """Creates one key twice: a server that lets the second pass (an old one, a proxy) is refused."""
        path = f"{self._root}/{ASIDE}/twice"
        with contextlib.suppress(OSError):  # an earlier test created it
            self._system.pipe_file(path, b"", mode="create")
        try:
            self._system.pipe_file(path, b"", mode="create")
        except OSError:
            if not self._exists(path):
                raise
            self._tested = True
            return
        raise InputError("this store overwrites what is to be created only", file=self._root,
                         remedy="Use one that honours If-None-Match")  # fmt: skip

    def _exists(self, path: str) -> bool:
        self._system.invalidate_cache()
        return self._system.exists(path)


def _protocols(system: Any) -> set[str]:
    return {system.protocol} if isinstance(system.protocol, str) else {*system.protocol}


def _readable(name: str) -> str:
    return name if NAME.fullmatch(name) else ascii(name)


def _link_durable(name: str, home: int, data: bytes, aside: int) -> bool:
    """Gives data a name in a folder (descriptor `home`), if it is free."""
    temporary = uuid.uuid4().hex
    try:
        if os.access(name, os.F_OK, dir_fd=home, follow_symlinks=False):  # saves the writing
            return False
        _write_durable(temporary, data, aside)
        os.link(temporary, name, src_dir_fd=aside, dst_dir_fd=home, follow_symlinks=False)
        return True
    except FileExistsError:
        return False
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=aside)
        os.fsync(home)  # also where the name was taken: who put it may have been killed before this


def _write_durable(name: str, data: bytes, folder: int) -> None:
    descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644, dir_fd=folder)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_durable(folder: pathlib.Path) -> None:
    """Makes a folder and its parents, each name flushed before anything is put inside.

    Also the name of one that is there: who made it may have been killed before this.
    """
    if not folder.is_dir():
        _make_durable(folder.parent)
        folder.mkdir(exist_ok=True)
    with contextlib.suppress(PermissionError):  # a parent that we may not read is not one that we made
        descriptor = os.open(folder.parent, FOLDER)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
