"""Killed at every call that changes the disk, power cut at every such call, eight writers at once.

The calls are enumerated, not sampled: `Disk` counts them and the operation dies at the first, at the
second, and so on until it survives.  What a power cut leaves is rebuilt from what was flushed, in every
combination of what was not.
"""

import contextlib
import itertools
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from cotrr.deploy.registry import Registry
from cotrr.errors import InputError
from cotrr.store import ASIDE, LocalStore
from tests.deploy.small import make_registry, model_files, promotion, ticking

CHANGES = ("open", "write", "fsync", "link", "mkdir", "unlink")  # all that LocalStore does to a disk


class Killed(BaseException):
    """The process is no more: raised by the call at which it dies, and by all later ones."""


class Disk:
    """A disk below a folder: counts what changes it, knows what was flushed, kills at a call."""

    def __init__(self, top: pathlib.Path):
        self.top, self.calls, self.kill_at, self.half, self.dead = top, 0, 0, False, False
        self.die = self._raise
        self._real = {name: getattr(os, name) for name in CHANGES}
        self._data = {}  # inode → content as flushed
        self._names = {}  # folder → its names as flushed, each with its inode
        for folder, _, names in os.walk(top):
            self._flush_folder(folder)
            for path in (os.path.join(folder, name) for name in names):
                self._data[os.stat(path).st_ino] = pathlib.Path(path).read_bytes()

    @contextlib.contextmanager
    def process(self, kill_at=0, half=False, die=None):
        """A process that is killed just before its `kill_at`-th call; `half`: in the midst of a write."""
        self.calls, self.kill_at, self.half, self.dead = 0, kill_at, half, False
        self.die = die or self._raise
        with pytest.MonkeyPatch.context() as patch:
            for name in CHANGES:
                patch.setattr(os, name, lambda *args, _name=name, **kw: self._call(_name, *args, **kw))
            with contextlib.suppress(Killed):
                yield self

    def _raise(self):
        self.dead = True
        raise Killed

    def _call(self, name, *args, **kw):
        if self.dead:
            raise Killed
        real = self._real[name]
        if name == "open" and not args[1] & os.O_CREAT:
            return real(*args, **kw)
        self.calls += 1
        if self.calls == self.kill_at:
            if self.half and name == "write":
                real(args[0], args[1][: len(args[1]) // 2])
            self.die()
        if name == "fsync":  # noted, not done: the disk of this machine may take its time
            return self._flush(args[0])
        result = real(*args, **kw)
        if name == "open":
            self._data.pop(os.fstat(result).st_ino, None)  # another file had that inode
        return result

    def _flush(self, descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if os.path.isdir(path):
            self._flush_folder(path)
        else:
            self._data[os.fstat(descriptor).st_ino] = pathlib.Path(path).read_bytes()

    def _flush_folder(self, folder):
        self._names[str(folder)] = self._names_now(folder)

    def _names_now(self, folder):
        return {entry.name: entry.inode() for entry in os.scandir(folder)}

    def pending(self):
        """Names and contents that a power cut may take away; what lies aside does not matter."""
        found = []
        for folder, folders, names in os.walk(self.top):
            folders[:] = [name for name in folders if name != ASIDE]
            known = self._names.get(folder, {})
            found += [(folder, name) for name in folders + names if name not in known]
            for path in (os.path.join(folder, name) for name in names):
                if self._data.get(os.stat(path).st_ino, b"") != pathlib.Path(path).read_bytes():
                    found.append((path, "content"))
        return found

    def after_power_cut(self, target, lucky=()):
        """Builds what a power cut leaves: what was flushed, and of what is pending only `lucky`."""

        def build(folder, place):
            place.mkdir(parents=True)
            for name in os.listdir(folder):
                path = os.path.join(folder, name)
                if name == ASIDE or not (name in self._names.get(folder, {}) or (folder, name) in lucky):
                    continue
                if os.path.isdir(path):
                    build(path, place / name)
                else:
                    kept = self._data.get(os.stat(path).st_ino, b"")
                    (place / name).write_bytes(
                        pathlib.Path(path).read_bytes() if (path, "content") in lucky else kept
                    )

        build(str(self.top), target)
        return target


class Witness(LocalStore):
    """A store that notes what was acknowledged."""

    def __init__(self, folder):
        super().__init__(folder)
        self.acknowledged = {}

    def put(self, key, data):
        won = super().put(key, data)
        self.acknowledged[key] = data if won else self.get(key, 2**30)
        return won


def register(registry):
    registry.register(model_files(3), {"description": "the third"}, "tester")


def promote(registry):
    def draft(state):
        if state.champion != "v2":
            raise InputError(f"{state.champion} is live already")
        return promotion(registry, "v1", judgement={"verdict": "PROMOTE", "value": 0.5})

    registry.append(draft)


def roll_back(registry):
    registry.rollback("tester", to="v1", reason="complaints")


def open_registry(top):
    return Registry(Witness(top / "new" / "registry"), clock=ticking())


def seen(registry):
    """All of a state but the hashes and times."""
    state = registry.state()
    return len(state.events), [v.model for v in state.versions], state.aliases, state.past, state.blocked


@pytest.fixture(scope="module")
def history(tmp_path_factory):
    """Two versions, the second live after the first."""
    top = tmp_path_factory.mktemp("history")
    registry = make_registry(top / "new" / "registry", versions=2)
    for label in ("v1", "v2"):
        registry.append(lambda state, label=label: promotion(registry, label))
    return top


@pytest.fixture(scope="module")
def nothing(tmp_path_factory):
    """No registry, nor the folder that it is to be in."""
    return tmp_path_factory.mktemp("nothing")


CASES = {"first registration": (register, "nothing"), "registration": (register, "history"),
         "promotion": (promote, "history"), "rollback": (roll_back, "history")}  # fmt: skip


@pytest.fixture(params=CASES)
def case(request):
    """An operation, the folder that it starts from, and what is seen before and after it."""
    operation, start = CASES[request.param]
    return operation, request.getfixturevalue(start)


def copies(start, tmp_path):
    """Copies of a folder, one after the other, each removed when the next is asked for."""
    for number in itertools.count(1):
        top = tmp_path / str(number)
        shutil.copytree(start, top)
        yield number, top
        shutil.rmtree(top)


class Outcome:
    """What an operation makes of a folder, and whether a folder is what it may leave."""

    def __init__(self, operation, start, tmp_path):
        top = shutil.copytree(start, tmp_path / "whole")
        self.operation, self.before, self.checked = operation, seen(open_registry(top)), set()
        with Disk(top).process() as disk:
            operation(open_registry(top))
        self.after, self.calls = seen(open_registry(top)), disk.calls
        assert self.before != self.after and self.calls > 5

    def check(self, top, must_be_done):
        """What is there is whole, and either before or after; doing it again leads to after."""
        content = (must_be_done, *everything(top))
        if content in self.checked:
            return
        self.checked.add(content)
        registry = open_registry(top)
        assert registry.verify()[0] == [] or not registry.store.keys(registry.name)
        now = seen(registry)
        assert now == self.after or (now == self.before and not must_be_done)
        with Disk(top).process():  # without the time that flushing takes
            if now == self.before:
                self.operation(registry)
            else:
                with pytest.raises(InputError, match="already"):
                    self.operation(registry)
        assert seen(open_registry(top)) == self.after
        assert open_registry(top).verify()[0] == []


def everything(top):
    """Every folder and every file's bytes; what lies aside has no name worth comparing."""
    names = lambda path: (str(path.relative_to(top).parent), "" if path.parent.name == ASIDE else path.name)
    return sorted((*names(path), b"" if path.is_dir() else path.read_bytes()) for path in top.rglob("*"))


def assert_holds(top, acknowledged):
    store = open_registry(top).store
    assert {key: store.get(key, 2**30) for key in acknowledged} == acknowledged


@pytest.mark.parametrize("half", [False, True])
def test_killed_at_any_call_it_is_done_or_not_done_and_can_be_done_again(case, tmp_path, half):
    operation, start = case
    outcome = Outcome(operation, start, tmp_path)
    for number, top in copies(start, tmp_path):
        with Disk(top).process(kill_at=number, half=half):
            operation(open_registry(top))
        outcome.check(top, must_be_done=number > outcome.calls)
        if number > outcome.calls:
            break
    assert len(outcome.checked) > 3


def test_power_cut_at_any_call_takes_nothing_that_was_acknowledged(case, tmp_path):
    operation, start = case
    outcome, cuts = Outcome(operation, start, tmp_path), 0
    for number, top in copies(start, tmp_path):
        disk, registry = Disk(top), open_registry(top)
        with disk.process(kill_at=number):
            operation(registry)
        pending = disk.pending()
        assert len(pending) <= 5, "too many to try all combinations"
        for lucky in itertools.product([False, True], repeat=len(pending)):
            left = disk.after_power_cut(tmp_path / "left", set(itertools.compress(pending, lucky)))
            assert_holds(left, registry.store.acknowledged)
            outcome.check(left, must_be_done=number > outcome.calls)
            shutil.rmtree(left)
            cuts += 1
        if number > outcome.calls:
            break
    assert cuts > outcome.calls


def test_killed_at_any_call_then_done_again_then_power_cut_it_is_done(case, tmp_path):
    """Whoever goes on after a killed process must not rely on what that one did not flush."""
    operation, start = case
    outcome = Outcome(operation, start, tmp_path)
    for number, top in copies(start, tmp_path):
        disk = Disk(top)
        with disk.process(kill_at=number):
            operation(open_registry(top))
        registry = open_registry(top)
        again = seen(registry) == outcome.before
        with disk.process():
            if again:
                operation(registry)
        left = disk.after_power_cut(tmp_path / "left")
        assert_holds(left, registry.store.acknowledged)
        outcome.check(left, must_be_done=again)
        shutil.rmtree(left)
        if number > outcome.calls:
            break


def test_nothing_changes_the_disk_that_is_not_counted(history, tmp_path):
    top, heard = shutil.copytree(history, tmp_path / "copy"), []
    names = {"os.link": "link", "os.mkdir": "mkdir", "os.remove": "unlink"}
    changing = os.O_WRONLY | os.O_RDWR | os.O_CREAT
    registry, listening = open_registry(top), False

    def listen(event, args):
        if not listening:
            return
        if event == "open" and isinstance(args[2], int) and args[2] & changing:
            heard.append("open")
        elif event.startswith(("os.", "shutil.")) and event not in ("os.listdir", "os.scandir"):
            heard.append(names.get(event, event))

    sys.addaudithook(listen)  # for good; it is deaf afterwards
    counted = []
    with pytest.MonkeyPatch.context() as patch:
        for name in CHANGES:
            if name not in ("write", "fsync"):  # Python tells nobody of these
                real = getattr(os, name)
                patch.setattr(
                    os, name, lambda *a, _n=name, _r=real, **k: (note(counted, _n, a), _r(*a, **k))[1]
                )
        listening = True
        try:
            register(registry)
        finally:
            listening = False
    assert heard == counted and len(heard) > 20


def note(counted, name, args):
    if name != "open" or args[1] & os.O_CREAT:
        counted.append(name)


def kill_for_real(start, folder):
    """Promotes in a process of its own for each call at which it is to be killed, until one survives."""
    for number, top in ((n, pathlib.Path(folder) / str(n)) for n in itertools.count(1)):
        shutil.copytree(start, top)
        if not (child := os.fork()):
            with Disk(top).process(kill_at=number, half=True, die=lambda: os._exit(9)):
                promote(open_registry(top))
            os._exit(0)
        if os.waitpid(child, 0)[1] == 0:
            return


def run(call):
    """Runs a function of this module in a Python that has no threads yet, so that it may fork."""
    code = f"import warnings; warnings.simplefilter('ignore')\nimport {__name__} as here\nhere.{call}"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120,
                   cwd=pathlib.Path(__file__).parents[2])  # fmt: skip


def test_a_process_that_is_killed_for_real_leaves_the_same(history, tmp_path):
    outcome = Outcome(promote, history, tmp_path)
    (tmp_path / "real").mkdir()
    run(f"kill_for_real({str(history)!r}, {str(tmp_path / 'real')!r})")
    assert len(list((tmp_path / "real").iterdir())) == outcome.calls + 1
    for number, top in copies(history, tmp_path):
        with Disk(top).process(kill_at=number, half=True):
            promote(open_registry(top))
        assert everything(top) == everything(tmp_path / "real" / str(number))
        outcome.check(top, must_be_done=number > outcome.calls)
        if number > outcome.calls:
            break


WRITERS, TURNS = 8, 50


def write_at_once(folder):
    """Eight processes that each make the other version live, fifty times."""
    os.fsync = lambda descriptor: None  # this is about who is first, and not about power
    folder = pathlib.Path(folder)
    children = []
    for writer in range(WRITERS):
        if child := os.fork():
            children.append(child)
            continue
        registry, won = Registry(LocalStore(folder / "registry")), []
        for _ in range(TURNS):
            event = registry.append(lambda state, registry=registry, writer=writer: promotion(
                registry, "v2" if state.champion == "v1" else "v1", f"writer{writer}"))  # fmt: skip
            won.append([event.number, event.digest])
        (folder / f"won{writer}.json").write_text(json.dumps(won))
        os._exit(0)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * WRITERS


def test_of_eight_writers_at_once_each_event_has_one_and_none_is_lost(tmp_path):
    start = len(make_registry(tmp_path / "registry", versions=2).state().events)
    run(f"write_at_once({str(tmp_path)!r})")
    registry = Registry(LocalStore(tmp_path / "registry"))
    events = registry.state().events[start:]
    won = {w: json.loads((tmp_path / f"won{w}.json").read_text()) for w in range(WRITERS)}
    assert len(events) == WRITERS * TURNS
    assert sorted(number for pairs in won.values() for number, _ in pairs) == [e.number for e in events]
    for writer, pairs in won.items():
        assert pairs == [[e.number, e.digest] for e in events if e.actor == f"writer{writer}"]
    assert registry.verify() == ([], [])
    assert list((tmp_path / "registry" / ASIDE).iterdir()) == []


def promote_once(folder):
    """Eight processes that have all seen v1 live, and want their v2 or v3 instead of it."""
    folder = pathlib.Path(folder)
    (gate_read, gate_write), children = os.pipe(), []
    for writer in range(WRITERS):
        if child := os.fork():
            children.append(child)
            continue
        os.close(gate_write)
        os.read(gate_read, 1)  # returns when all are there
        registry = Registry(LocalStore(folder / "registry"))

        def draft(state, registry=registry, writer=writer):
            if state.champion != "v1":
                raise InputError("meanwhile another is live")
            return promotion(registry, f"v{2 + writer % 2}", f"writer{writer}")

        try:
            registry.append(draft)
        except InputError:
            os._exit(1)
        os._exit(0)
    os.close(gate_write)
    (folder / "codes.json").write_text(json.dumps([os.waitpid(c, 0)[1] >> 8 for c in children]))


def test_of_eight_that_saw_the_same_champion_one_promotes(tmp_path):
    registry = make_registry(tmp_path / "registry", versions=3)
    registry.append(lambda state: promotion(registry, "v1"))
    run(f"promote_once({str(tmp_path)!r})")
    codes = json.loads((tmp_path / "codes.json").read_text())
    assert sorted(codes) == [0] + [1] * (WRITERS - 1)
    assert registry.state().events[-1].actor == f"writer{codes.index(0)}"
    assert registry.state().past == ("", "v1")
