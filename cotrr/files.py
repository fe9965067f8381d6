"""Reading files here or far away, and writing them so that a reader never sees half of one."""

import contextlib
import fcntl
import hashlib
import io
import json
import math
import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator
from typing import Any, cast

from cotrr.errors import InputError


def place(name: str | os.PathLike[str]) -> pathlib.Path:
    """The path of a name; of a URL such as s3://bucket/path, what has a path's methods (extra `remote`)."""
    if "://" not in str(name):
        return pathlib.Path(name)
    try:
        from upath import UPath

        return UPath(name)
    except ImportError as error:  # of upath, or of what reads this kind of URL
        remedy = "pip install cotrr[remote], and the package that fsspec names for this kind of URL"
        raise InputError(f"cannot be read: {error}", file=name, remedy=remedy) from None


def reading(name: str | os.PathLike[str]) -> io.BufferedReader:
    """The bytes of a file at a path or URL."""
    found = place(name)
    # What is far away has blocks of a size of its own.
    size = 2**17 if isinstance(found, pathlib.Path) else -1
    return cast(io.BufferedReader, found.open("rb", buffering=size))


@contextlib.contextmanager
def replacing(path: str | pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary name beside `path` to write to; it takes `path`'s place when all went well."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | pathlib.Path, value: Any) -> None:
    """Writes JSON; an undefined number (NaN, infinity) becomes null."""
    with replacing(path) as temporary:
        text = json.dumps(finite(value), indent=1, ensure_ascii=False, allow_nan=False)
        temporary.write_text(text + "\n")


def flush(*places: pathlib.Path) -> None:
    """Has what these files hold, and which files these folders hold, outlast a power cut."""
    for place in places:
        descriptor = os.open(place, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def finite(value: Any) -> Any:
    """The value with NumPy scalars as Python's and non-finite numbers as None, for JSON."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if hasattr(value, "tolist"):
        return finite(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def sha256(path: str | pathlib.Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with reading(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest(value: Any) -> str:
    """SHA-256 of a value's canonical JSON."""
    text = json.dumps(finite(value), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def remove(folder: str | pathlib.Path, names: Iterable[str]) -> None:
    """Removes files and folders of these names, where they are."""
    for name in names:
        path = pathlib.Path(folder) / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: str | pathlib.Path) -> Iterator[None]:
    """Holds a lock file alone; raises InputError where another process holds it."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError("another process writes here", file=path.parent) from None
        yield


def append(path: pathlib.Path, data: bytes) -> None:
    """Adds to the end of a file; where that fails (OSError), the file is as it was."""
    before = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "ab", buffering=0) as stream:
            while data:  # a disk that is almost full takes a part
                data = data[stream.write(data) :]
    except OSError:
        with contextlib.suppress(OSError):
            os.truncate(path, before)
        raise
