"""Where a registry keeps its bytes: four functions on keys, and put-if-absent as the one way to write.

A key is a path of strict names.  What is put stays as it is: nothing is overwritten, nothing is
removed.  On a file system a file is written aside, flushed, and linked to its name, which fails where
the name is taken; an object store does the same by a conditional PUT, through fsspec.
"""

import inspect
import os
import pathlib
import re
import stat
import uuid
from typing import Any, Protocol

from cotrr.errors import InputError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
DEPTH = 4
ASIDE = ".aside"  # of a local store: files that are being written, or that a killed process left


class Store(Protocol):
    """Bytes by key."""

    def put(self, key: str, data: bytes) -> bool:
        """Writes a key that is absent, durably; False, and nothing is changed, where it is there."""
        ...

    def get(self, key: str, limit: int) -> bytes:
        """What a key holds; raises KeyError where it is absent, InputError above `limit` bytes."""
        ...

    def size(self, key: str) -> int:
        """Bytes of a key; raises KeyError where it is absent."""
        ...

    def keys(self, prefix: str) -> list[str]:
        """All keys below a prefix, sorted; raises InputError for anything that is no plain file."""
        ...


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
        return LocalStore(pathlib.Path(place))
    try:
        import fsspec
    except ImportError:
        raise InputError(
            "fsspec is not installed", file=place, remedy="pip install fsspec and the package of that store"
        ) from None
    try:
        return FsspecStore(*fsspec.core.url_to_fs(place))
    except (ImportError, ValueError) as error:
        raise InputError(str(error), file=place) from None


class LocalStore:
    """A store in a folder; no symbolic link below it is ever followed."""

    def __init__(self, folder: pathlib.Path):
        self._folder = folder

    def put(self, key: str, data: bytes) -> bool:
        """Writes aside, flushes, links: no reader and no power cut sees half of it."""
        target = self._folder / check_key(key)
        for folder in (self._folder / ASIDE, target.parent):
            _make_durable(folder)
        aside = self._folder / ASIDE / uuid.uuid4().hex
        try:
            _write_durable(aside, data)
            os.link(aside, target, follow_symlinks=False)
            return True
        except FileExistsError:
            return False
        finally:
            aside.unlink(missing_ok=True)
            # Also where the key was taken: whoever put it may have been killed before this.
            _flush_folder(target.parent)

    def get(self, key: str, limit: int) -> bytes:
        """Reads a plain file without following links."""
        with open(self._open(key), "rb") as stream:
            data = stream.read(limit + 1)
        if len(data) > limit:
            raise InputError(f"larger than {limit:,} bytes", file=self._folder / key)
        return data

    def size(self, key: str) -> int:
        """Bytes of a plain file."""
        descriptor = self._open(key)
        try:
            return os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)

    def keys(self, prefix: str) -> list[str]:
        """Walks the folder of the prefix."""
        found, folders = [], [check_key(prefix)]
        while folders:
            here = folders.pop()
            try:
                entries = list(os.scandir(self._folder / here))
            except FileNotFoundError:
                continue
            for entry in entries:
                key = f"{here}/{entry.name}"
                if entry.is_dir(follow_symlinks=False):
                    folders.append(key)
                elif entry.is_file(follow_symlinks=False):
                    found.append(key)
                else:
                    raise InputError("neither a file nor a folder", file=self._folder / key,
                                     remedy="A registry holds no links and nothing special")  # fmt: skip
        return sorted(found)

    def _open(self, key: str) -> int:
        """A descriptor of the key's file, each step of its path a real folder."""
        *parents, name = check_key(key).split("/")
        at = descriptor = -1
        try:
            at = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
            for parent in parents:
                inner = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=at)
                os.close(at)
                at = inner
            descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=at)
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                os.close(descriptor)
                raise InputError("not a plain file", file=self._folder / key)
            return descriptor
        except FileNotFoundError:
            raise KeyError(key) from None
        except OSError as error:  # ELOOP, ENOTDIR
            raise InputError((error.strerror or str(error)).lower(), file=self._folder / key) from None
        finally:
            if at >= 0:
                os.close(at)


class FsspecStore:
    """A store behind fsspec; its file system must know how to create and never overwrite."""

    def __init__(self, system: Any, root: str):
        write = getattr(system, "_pipe_file", None) or system.pipe_file
        if "mode" not in inspect.signature(write).parameters:
            raise InputError(f"{type(system).__name__} cannot write only where nothing is there", file=root)
        self._system, self._root = system, root.rstrip("/")

    def put(self, key: str, data: bytes) -> bool:
        """A conditional PUT (If-None-Match: *)."""
        path = f"{self._root}/{check_key(key)}"
        if self._system.exists(path):  # saves the upload where it is plain
            return False
        try:
            self._system.pipe_file(path, data, mode="create")
            return True
        except FileExistsError:
            return False

    def get(self, key: str, limit: int) -> bytes:
        """Reads an object that is not too large."""
        if self.size(key) > limit:
            raise InputError(f"larger than {limit:,} bytes", file=key)
        return self._system.cat_file(f"{self._root}/{key}")

    def size(self, key: str) -> int:
        """Bytes of an object."""
        self._system.invalidate_cache()
        try:
            return self._system.info(f"{self._root}/{check_key(key)}")["size"]
        except FileNotFoundError:
            raise KeyError(key) from None

    def keys(self, prefix: str) -> list[str]:
        """Lists the objects below a prefix."""
        self._system.invalidate_cache()
        root = self._system._strip_protocol(self._root).rstrip("/")
        return sorted(path.removeprefix(root).strip("/")
                      for path in self._system.find(f"{root}/{check_key(prefix)}"))  # fmt: skip


def _write_durable(path: pathlib.Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_durable(folder: pathlib.Path) -> None:
    """Makes a folder and its parents; a new one's name is flushed before anything is put inside."""
    if folder.is_dir():
        return
    _make_durable(folder.parent)
    folder.mkdir(exist_ok=True)
    _flush_folder(folder.parent)


def _flush_folder(folder: pathlib.Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
