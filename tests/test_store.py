"""Both stores: what is put stays, the first wins, and nothing but plain files of strict names is read."""

import contextlib
import errno
import os
import pathlib
import socket
import tempfile
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotrr.errors import InputError
from cotrr.store import ASIDE, CONDITIONAL, DEPTH, FsspecStore, LocalStore, check_key, open_store

LIMIT = 100


@pytest.fixture(params=["local", "memory"])
def place(request, tmp_path):
    """A folder, or a URL of fsspec's emulation of an object store."""
    if request.param == "local":
        yield str(tmp_path / "registry")
        return
    url = f"memory://bucket{tmp_path}"
    yield url
    fsspec = pytest.importorskip("fsspec")
    with contextlib.suppress(FileNotFoundError):
        fsspec.filesystem("memory").rm(url, recursive=True)


@pytest.fixture
def store(place):
    return open_store(place)


@pytest.fixture
def local(tmp_path):
    return LocalStore(tmp_path / "registry")


def test_what_is_put_is_got_and_sized(store):
    assert store.put("n/events/1.json", b"one") is True
    assert store.get("n/events/1.json", LIMIT) == b"one"
    assert store.size("n/events/1.json") == 3


def test_a_key_that_is_taken_stays_as_it_is(store):
    assert store.put("n/x", b"first") is True
    assert store.put("n/x", b"second, longer") is False
    assert store.put("n/x", b"first") is False
    assert store.get("n/x", LIMIT) == b"first"


def test_another_opening_of_the_same_place_sees_it(place, store):
    store.put("n/x", b"here")
    other = open_store(place)
    assert other.get("n/x", LIMIT) == b"here"
    assert other.put("n/x", b"there") is False
    assert other.put("n/y", b"new") is True
    assert store.keys("n") == ["n/x", "n/y"]


@pytest.mark.parametrize("data", [b"", b"\0\xff" * 50_000])
def test_any_bytes_come_back(store, data):
    store.put("n/x", data)
    assert store.get("n/x", 10**6) == data
    assert store.size("n/x") == len(data)


def test_an_absent_key_is_a_key_error(store):
    for key in ("n/x", "n/deep/er/x"):
        with pytest.raises(KeyError):
            store.get(key, LIMIT)
        with pytest.raises(KeyError):
            store.size(key)
    store.put("n/other", b"")
    with pytest.raises(KeyError):
        store.get("n/x", LIMIT)


def test_a_folder_is_no_key(store):
    store.put("n/folder/x", b"1")
    for ask in (lambda: store.get("n/folder", LIMIT), lambda: store.size("n/folder")):
        with pytest.raises(InputError, match="not a plain file"):
            ask()


def test_more_than_the_limit_is_refused_and_the_limit_is_not(store):
    store.put("n/x", b"x" * LIMIT)
    assert len(store.get("n/x", LIMIT)) == LIMIT
    with pytest.raises(InputError, match="larger than 99 bytes"):
        store.get("n/x", LIMIT - 1)


def test_keys_are_those_below_a_prefix_in_order(store):
    for key in ("n/b", "n/a/2", "n/a/10", "n/a/deep/er", "other/x", "nn/x"):
        store.put(key, b"")
    assert store.keys("n") == ["n/a/10", "n/a/2", "n/a/deep/er", "n/b"]
    assert store.keys("n/a") == ["n/a/10", "n/a/2", "n/a/deep/er"]


def test_a_prefix_that_is_not_there_has_no_keys(store):
    assert store.keys("n") == []
    store.put("n/events1", b"")
    assert store.keys("n/events") == []


@pytest.mark.parametrize("key", [
    "", "/", "a/", "/a", "a//b", "..", "a/..", "a/../b", ".", "./a", ".aside/x", "a/.hidden", "-a", "_a",
    "a b",
    "a\n", "a\nb", "a\0", "a\\b", "ä", "a/b\u2044c", "a:b", "~", "a*", "x" * 101, "/".join("a" * (DEPTH + 1)),
    "\ud800", "memory://a",
])  # fmt: skip
def test_a_name_that_is_not_strict_is_refused_everywhere(store, key):
    for ask in (check_key, store.keys, store.size, lambda k: store.put(k, b""), lambda k: store.get(k, 1)):
        with pytest.raises(InputError, match="no name for the registry"):
            ask(key)


@given(st.text(max_size=40))
def test_a_key_that_passes_stays_inside_the_folder(key):
    try:
        check_key(key)
    except InputError:
        return
    assert os.path.normpath(f"registry/{key}") == f"registry/{key}"
    assert key.isascii() and key.isprintable()


def test_of_many_that_put_at_once_one_wins(store):
    wins, start = [], threading.Barrier(8)

    def writer(number):
        start.wait()
        for turn in range(20):
            if store.put(f"n/{turn}", str(number).encode()):
                wins.append((turn, number))

    threads = [threading.Thread(target=writer, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # The emulation checks, then writes, without a lock: only a real store can be held to one winner.
    if isinstance(store, LocalStore):
        assert sorted(turn for turn, _ in wins) == list(range(20))
        assert all(store.get(f"n/{turn}", LIMIT) == str(number).encode() for turn, number in wins)
    assert len(store.keys("n")) == 20


# The folder.


def test_a_folder_is_made_with_its_parents(tmp_path):
    store = open_store(str(tmp_path / "a" / "b" / "registry"))
    assert store.put("n/x", b"1")
    assert (tmp_path / "a/b/registry/n/x").read_bytes() == b"1"


def test_a_relative_folder_is_still_meant_after_the_working_directory_changes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = open_store("registry")
    monkeypatch.chdir("/")
    store.put("n/x", b"1")
    assert (tmp_path / "registry/n/x").read_bytes() == b"1"


def test_nothing_stays_aside(local, tmp_path):
    local.put("n/x", b"1")
    local.put("n/x", b"2")
    assert list((tmp_path / "registry" / ASIDE).iterdir()) == []


def test_what_a_killed_process_left_aside_is_ignored(local, tmp_path):
    local.put("n/x", b"1")
    (tmp_path / "registry" / ASIDE / "0123").write_bytes(b"half")
    assert local.keys("n") == ["n/x"]
    assert local.put("n/y", b"2") and local.get("n/y", LIMIT) == b"2"


def test_the_folder_itself_may_be_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert LocalStore(tmp_path / "link").put("n/x", b"1")
    assert (tmp_path / "real/n/x").read_bytes() == b"1"


def replace_by_link(path: pathlib.Path, elsewhere: pathlib.Path) -> None:
    """Moves a file or folder elsewhere, and links to it from where it was."""
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


@pytest.mark.parametrize("linked", ["n", "n/events", "n/events/1"])
def test_no_link_is_read_through(local, tmp_path, linked):
    local.put("n/events/1", b"1")
    replace_by_link(tmp_path / "registry" / linked, tmp_path / "elsewhere")
    with pytest.raises(InputError):
        local.get("n/events/1", LIMIT)
    with pytest.raises(InputError):
        local.size("n/events/1")
    for prefix in ("n", "n/events"):
        with pytest.raises(InputError):
            local.keys(prefix)


@pytest.mark.parametrize("linked", ["n", "n/events", ASIDE])
def test_no_link_is_written_through(local, tmp_path, linked):
    local.put("n/events/1", b"1")
    replace_by_link(tmp_path / "registry" / linked, tmp_path / "elsewhere")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OSError, match="Not a directory"):
        local.put("n/events/2", b"2")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dangling_link_holds_its_name(local, tmp_path):
    local.put("n/x", b"1")
    (tmp_path / "registry/n/y").symlink_to(tmp_path / "nowhere")
    assert local.put("n/y", b"2") is False
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(InputError, match="symbolic links"):
        local.get("n/y", LIMIT)


def test_a_pipe_or_socket_is_refused_and_does_not_block(local, tmp_path, monkeypatch):
    local.put("n/x", b"1")
    os.mkfifo(tmp_path / "registry/n/pipe")
    monkeypatch.chdir(tmp_path / "registry/n")  # a socket's path must be short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        for name in ("pipe", "socket"):
            with pytest.raises(InputError):
                local.get(f"n/{name}", LIMIT)
    with pytest.raises(InputError, match="neither a file nor a folder"):
        local.keys("n")


def test_odd_names_on_the_disk_are_listed_so_that_they_are_no_keys(local, tmp_path):
    local.put("n/x", b"1")
    odd = [b".hidden", b"a b", b"\xff\xfe", b"new\nline", b"esc\x1b[2J", "ä".encode()]
    for name in odd:
        (tmp_path / "registry" / "n" / os.fsdecode(name)).write_bytes(b"")
    (tmp_path / "registry/n/.git").mkdir()
    found = local.keys("n")
    assert len(found) == len(odd) + 2 and "n/x" in found
    assert all(key.isascii() and key.isprintable() for key in found)
    for key in found:
        if key != "n/x":
            with pytest.raises(InputError):
                check_key(key)


def test_folders_that_are_too_deep_are_refused(local, tmp_path):
    local.put("n/x", b"1")
    (tmp_path / "registry/n" / "/".join("d" * 50)).mkdir(parents=True)
    with pytest.raises(InputError, match="no name for the registry"):
        local.keys("n")


def test_a_file_where_a_folder_should_be_is_named(local, tmp_path):
    local.put("n/x", b"1")
    with pytest.raises(NotADirectoryError) as error:
        local.put("n/x/y", b"2")
    assert error.value.filename == str(tmp_path / "registry/n/x/y")
    for ask in (lambda: local.get("n/x/y", LIMIT), lambda: local.keys("n/x")):
        with pytest.raises(InputError, match=r"registry/n/x.*not a directory"):
            ask()


def test_a_file_where_the_registry_should_be_is_named(tmp_path):
    (tmp_path / "registry").write_text("")
    store = open_store(str(tmp_path / "registry"))
    with pytest.raises(FileExistsError) as error:
        store.put("n/x", b"")
    assert error.value.filename.startswith(str(tmp_path / "registry"))
    for ask in (lambda: store.get("n/x", LIMIT), lambda: store.keys("n")):
        with pytest.raises(InputError, match=r"registry/n.*not a directory"):
            ask()


def test_an_object_where_a_folder_should_be_is_no_endless_false():
    pytest.importorskip("fsspec")
    store = open_store("memory://blocked")
    store.put("n/x", b"1")
    with pytest.raises(FileExistsError):
        store.put("n/x/y", b"2")
    assert store.keys("n/x") == []


@pytest.fixture
def powerless():
    """A folder below which all may look, and a user to whom permissions apply."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            yield pathlib.Path(folder)
        finally:
            if root:
                os.seteuid(0)


def test_a_folder_that_may_not_be_written_is_named(powerless):
    store = LocalStore(powerless / "registry")
    if os.access(powerless, os.W_OK, effective_ids=True):
        powerless.chmod(0o555)
    with pytest.raises(PermissionError) as error:
        store.put("n/x", b"")
    assert error.value.filename == str(powerless / "registry/n/x")
    assert store.keys("n") == []


def test_a_file_that_may_not_be_read_is_named(powerless):
    folder = pathlib.Path(tempfile.mkdtemp())
    store = LocalStore(folder)
    try:
        store.put("n/x", b"1")
        (folder / "n" / "x").chmod(0)
        with pytest.raises(InputError, match="n/x: permission denied"):
            store.get("n/x", LIMIT)
    finally:
        (folder / "n").chmod(0o755)


def test_a_parent_that_may_not_be_read_does_not_stop_a_writer(powerless):
    parent = pathlib.Path(tempfile.mkdtemp())
    (parent / "registry").mkdir()
    parent.chmod(0o311)
    try:
        assert LocalStore(parent / "registry").put("n/x", b"1")
        assert (parent / "registry/n/x").read_bytes() == b"1"
    finally:
        parent.chmod(0o755)


def test_a_full_disk_leaves_nothing_and_names_the_key(local, tmp_path, monkeypatch):
    local.put("n/x", b"1")
    write = os.write

    def full(descriptor, data):
        if len(data) < 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data[:7])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left") as error:
        local.put("n/y", b"y" * 20)
    assert error.value.filename == str(tmp_path / "registry/n/y")
    monkeypatch.undo()
    assert local.keys("n") == ["n/x"]
    assert list((tmp_path / "registry" / ASIDE).iterdir()) == []
    assert local.put("n/y", b"y" * 20)


def test_a_write_that_takes_only_part_goes_on(local, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:3]))
    local.put("n/x", b"0123456789")
    assert local.get("n/x", LIMIT) == b"0123456789"


def test_no_descriptor_stays_open(local):
    local.put("n/x", b"1")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        local.put("n/x", b"1")
        local.put("n/events/y", b"1")
        local.get("n/x", LIMIT)
        local.keys("n")
        with contextlib.suppress(KeyError):
            local.get("n/absent", LIMIT)
        with contextlib.suppress(InputError):
            local.get("n/events", LIMIT)
        with contextlib.suppress(OSError):
            local.put("n/x/y", b"1")
    assert len(os.listdir("/proc/self/fd")) == before


# fsspec.


@pytest.mark.parametrize("scheme", ["file", "local"])
def test_a_file_url_is_the_folder(tmp_path, scheme):
    pytest.importorskip("fsspec")
    # fsspec's own way looks first and writes then, so of two writers both could win.
    store = open_store(f"{scheme}://{tmp_path}/registry")
    assert isinstance(store, LocalStore)
    store.put("n/x", b"1")
    assert (tmp_path / "registry/n/x").read_bytes() == b"1"


@pytest.mark.parametrize(
    "url", ["ftp://host/x", "http://host/x", "zip://x::memory://y.zip", "dir::memory://x"]
)
def test_a_store_that_is_not_known_to_hold_its_word_is_refused(url):
    pytest.importorskip("fsspec")
    with pytest.raises((InputError, OSError)):
        open_store(url).put("n/x", b"")


def test_a_file_system_that_looks_before_it_writes_is_refused(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    with pytest.raises(InputError, match=r"LocalFileSystem is not known.*abfs, gs, memory, s3"):
        FsspecStore(fsspec.filesystem("file"), str(tmp_path))
    assert CONDITIONAL.isdisjoint({"file", "sftp", "ftp", "http"})


def test_an_unknown_scheme_is_named():
    pytest.importorskip("fsspec")
    with pytest.raises(InputError, match=r"nowhere://x"):
        open_store("nowhere://x")


def test_the_emulation_creates_and_never_overwrites():
    """What FsspecStore rests on: `pipe_file(mode="create")` of fsspec."""
    memory = pytest.importorskip("fsspec").filesystem("memory")
    memory.pipe_file("/create/x", b"first", mode="create")
    with pytest.raises(FileExistsError):
        memory.pipe_file("/create/x", b"second", mode="create")
    assert memory.cat_file("/create/x") == b"first"


@pytest.mark.parametrize("root", ["memory://", "memory:///", "memory://odd root/ä/"])
def test_any_root_of_a_bucket_serves(root):
    memory = pytest.importorskip("fsspec").filesystem("memory")
    store = open_store(root)
    try:
        assert store.put("anyroot/events/1", b"1") and not store.put("anyroot/events/1", b"2")
        assert store.get("anyroot/events/1", LIMIT) == b"1"
        assert store.keys("anyroot") == ["anyroot/events/1"]
    finally:
        memory.rm(f"{root.rstrip('/')}/anyroot" if root.endswith("ä/") else "/anyroot", recursive=True)


def test_odd_names_of_objects_are_listed_so_that_they_are_no_keys():
    memory = pytest.importorskip("fsspec").filesystem("memory")
    store = open_store("memory://oddly")
    store.put("n/x", b"")
    memory.pipe_file("/oddly/n/a b\n/c", b"")
    memory.pipe_file("/oddly/n/1/2/3/4/5", b"")
    assert store.keys("n") == ["n/'a b\\n'/c", "n/1/2/3/4/5", "n/x"]


class Late:
    """An object store in front of which another writer is faster than every first look."""

    protocol = "s3"

    def __init__(self, memory, error):
        self.memory, self.error, self.looked = memory, error, False

    def exists(self, path):
        looked, self.looked = self.looked, True
        return looked and self.memory.exists(path)

    def pipe_file(self, path, data, mode):
        assert mode == "create"
        if ASIDE in path:
            return self.memory.pipe_file(path, data, mode)
        raise self.error

    def __getattr__(self, name):
        return getattr(self.memory, name)


@pytest.mark.parametrize("error", [FileExistsError(), OSError(errno.EINVAL, "PreconditionFailed")])
def test_who_loses_the_race_is_told_so(error):
    memory = pytest.importorskip("fsspec").filesystem("memory")
    memory.pipe_file("/late/n/x", b"theirs")
    assert FsspecStore(Late(memory, error), "/late").put("n/x", b"ours") is False


def test_any_other_failure_of_a_conditional_put_is_told():
    memory = pytest.importorskip("fsspec").filesystem("memory")
    with pytest.raises(OSError, match="Forbidden"):
        FsspecStore(Late(memory, OSError("Forbidden")), "/late").put("n/never", b"ours")


class Overwriting:
    """An object store that speaks a protocol with conditions, and does not heed them."""

    def __init__(self, memory):
        self.memory = memory

    def pipe_file(self, path, data, mode):
        self.memory.pipe_file(path, data)

    def __getattr__(self, name):
        return getattr(self.memory, name)


def test_a_store_that_overwrites_is_refused_before_anything_is_put():
    memory = pytest.importorskip("fsspec").filesystem("memory")
    store = FsspecStore(Overwriting(memory), "/overwriting")
    assert store.keys("n") == []
    for _ in range(2):
        with pytest.raises(InputError, match="overwrites what is to be created only"):
            store.put("n/x", b"ours")
    assert store.keys("n") == []


def test_the_test_of_a_store_is_made_once_and_is_no_key():
    memory, calls = pytest.importorskip("fsspec").filesystem("memory"), []
    counted = Overwriting(memory)
    counted.pipe_file = lambda path, data, mode: (calls.append(path), memory.pipe_file(path, data, mode))
    for _ in range(2):  # the second finds what the first has left
        store = FsspecStore(counted, "/tested")
        for number in range(3):
            store.put(f"n/{len(calls)}{number}", b"")
    assert len(calls) == 2 * (2 + 3) and all(ASIDE not in key for key in store.keys("n"))


def test_without_fsspec_a_url_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "fsspec", None)
    with pytest.raises(InputError, match=r"s3://b/x: fsspec is not installed. pip install"):
        open_store("s3://b/x")
