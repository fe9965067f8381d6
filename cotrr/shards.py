"""Work on many inputs: one pure function for each, run here, by child processes, or on a Ray cluster."""

import collections
import contextlib
import functools
import hashlib
import itertools
import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import msgspec

from cotrr.errors import InputError

if TYPE_CHECKING:
    from cotrr.store import Store

Task = TypeVar("Task")
Result = TypeVar("Result")
_SERVE = (
    "import sys, pickle; sys.path[:] = pickle.load(sys.stdin.buffer); import cotrr.shards as s; s.serve()"
)


AHEAD = 2  # calls that a child is sent at once, so that it never waits for the next
LARGEST = 2**34  # bytes of a file
_ELSEWHERE = "Name another --output, or remove what is there"


class Record(msgspec.Struct, frozen=True):
    """What is known of work that is done."""

    key: str
    files: dict[str, str]  # SHA-256 by name
    result: Any


class Runner(Protocol):
    """Applies a function that can be pickled to each task; the results come in the order of the tasks.

    A few tasks for each worker are under way at once, so memory does not grow with their number.
    """

    def __call__(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]: ...


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))


@contextlib.contextmanager
def local(workers: int) -> Iterator[Runner]:
    """A runner on `workers` processes: this one, and children that end with the context.

    While children start, and while the next result is not there, this one works.
    """
    children = [_Child() for _ in range(workers - 1)]
    try:
        yield functools.partial(_share, children)
    finally:
        for child in children:
            child.end()


def _share(children: list["_Child"], function: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[Any]:
    """The results in order; who works ahead of the next one stops at four tasks a worker."""
    tasks, underway, most = iter(tasks), collections.deque[_Call](), 4 * (len(children) + 1)
    for child in children:
        child.prepare(function)

    def take() -> _Call | None:
        for task in itertools.islice(tasks, most - len(underway) and 1):
            underway.append(_Call(function, task))
            return underway[-1]

    while True:
        for child in children:
            child.collect()
            while len(child.calls) < AHEAD and (call := take()):
                child.start(call)
        if not (underway or take()):
            return
        first = underway[0]
        holder = next((child for child in children if first in child.calls), None)
        if first.outcome:
            yield underway.popleft().result()
        elif holder is None:
            first.run_here()
        elif call := take():
            call.run_here()
        else:
            holder.collect(wait=True)


@contextlib.contextmanager
def on_ray(workers: int) -> Iterator[Runner]:
    """A runner on the Ray cluster that RAY_ADDRESS names, else on one started here with `workers` cores."""
    try:
        import ray
    except ImportError:
        raise InputError("--runner=ray: Ray is not installed", remedy="pip install cotrr[ray]") from None
    address = os.environ.get("RAY_ADDRESS")
    mine = not ray.is_initialized()
    if mine:
        ray.init(**({} if address else {"num_cpus": workers}), include_dashboard=False, log_to_driver=False)
    remote = ray.remote(lambda function, task: function(task))

    def run(function: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[Any]:
        tasks = iter(tasks)
        underway = collections.deque(
            remote.remote(function, task) for task in itertools.islice(tasks, 2 * workers)
        )
        while underway:
            try:
                yield ray.get(underway.popleft())
            except ray.exceptions.RayTaskError as error:  # tells the error as a traceback
                raise error.cause from None
            underway.extend(remote.remote(function, task) for task in itertools.islice(tasks, 1))

    try:
        yield run
    finally:
        if mine:
            ray.shutdown()


RUNNERS: dict[str, Callable[[int], contextlib.AbstractContextManager[Runner]]] = {
    "local": local,
    "ray": on_ray,
}


class _Call:
    """A function and its argument, and in the end what came of it."""

    def __init__(self, function: Callable[[Any], Any], task: Any):
        self.function, self.task = function, task
        self.outcome: tuple[bool, Any] | None = None  # whether it went well, and the result or error

    def run_here(self) -> None:
        """Does it in this process."""
        self.outcome = _outcome(self.function, self.task)

    def result(self) -> Any:
        """The result; raises what the function raised."""
        assert self.outcome
        fine, result = self.outcome
        if fine:
            return result
        raise result


def _outcome(function: Callable[[Any], Any], task: Any) -> tuple[bool, Any]:
    try:
        return True, function(task)
    except Exception as error:
        return False, error


class _Child:
    """A process that runs functions sent to it.

    Of `multiprocessing`, forking breaks the threads of JAX, and spawning imports the main module again,
    which costs seconds and, in a script without a guard, runs it.  Results come in files without a name,
    one for each call that is ahead: through a pipe, one of the two would wait for the other.
    """

    def __init__(self) -> None:
        self.calls: collections.deque[_Call] = collections.deque()  # sent, and not yet answered
        self._files = itertools.cycle([tempfile.TemporaryFile() for _ in range(AHEAD)])  # noqa: SIM115
        files = [next(self._files).fileno() for _ in range(AHEAD)]
        one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self._process = subprocess.Popen([sys.executable, "-c", _SERVE, *map(str, files)], pass_fds=files,
                                         env=os.environ | one, stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE)  # fmt: skip
        self._send(sys.path)

    def prepare(self, function: Callable[[Any], Any]) -> None:
        """Has it import what a function needs: until that is done, it holds all the calls that it may."""
        while len(self.calls) < AHEAD:
            self.start(_Call(callable, function))

    def start(self, call: _Call) -> None:
        """Sends a call."""
        self.calls.append(call)
        self._send((call.function, call.task))

    def collect(self, wait: bool = False) -> None:
        """Takes the outcomes that are there, after waiting for the first if asked to."""
        assert self._process.stdout
        while self.calls and (wait or select.select([self._process.stdout], [], [], 0)[0]):
            call, wait = self.calls.popleft(), False
            if os.read(self._process.stdout.fileno(), 1):
                file = next(self._files)
                file.seek(0)
                call.outcome = pickle.load(file)
            else:
                died = f"a worker process died (exit status {self._process.wait()}) at {call.task}"
                call.outcome = False, RuntimeError(died)

    def end(self) -> None:
        """Ends the process, whatever it is doing."""
        self._process.kill()
        self._process.wait()
        for file in (self._process.stdin, self._process.stdout, *(next(self._files) for _ in range(AHEAD))):
            with contextlib.suppress(OSError):
                file and file.close()

    def _send(self, value: Any) -> None:
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # `collect` tells that it died
            self._process.stdin.write(pickle.dumps(value, protocol=5))
            self._process.stdin.flush()


def serve() -> None:
    """The life of a child: runs what it is sent, until the other end is closed or gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; whoever asked ends this one
    answer = os.dup(1)
    os.dup2(2, 1)  # what a function prints is no answer
    with contextlib.suppress(EOFError, BrokenPipeError):
        for file in itertools.cycle([os.fdopen(int(number), "r+b") for number in sys.argv[1:]]):
            outcome = _outcome(*pickle.load(sys.stdin.buffer))
            file.seek(0)
            file.truncate()
            pickle.dump(outcome, file, protocol=5)
            file.flush()
            os.write(answer, b".")


def once(store: "Store", name: str, key: str, work: Callable[[], tuple[dict[str, bytes], Any]]) -> Record:
    """What `work` makes, files by name and a result, or the record that a store has of it already.

    `key` tells everything that `work` depends on.  The record is put last, and nothing is ever put
    twice, so whoever is killed anywhere and starts again, or works beside another, ends with the same
    bytes.  Raises InputError where the store has something else under these names.
    """
    place = f"records/{name}.json"
    with contextlib.suppress(KeyError):
        return _recorded(store, place, key)
    made, result = work()
    for file, data in made.items():
        put_same(store, file, data)
    record = Record(key, {file: hashlib.sha256(data).hexdigest() for file, data in made.items()}, result)
    store.put(place, msgspec.json.encode(record))
    return _recorded(store, place, key)  # another's, where that was quicker


def _recorded(store: "Store", place: str, key: str) -> Record:
    """A record; raises KeyError where there is none."""
    record = msgspec.json.decode(store.get(place, LARGEST), type=Record)
    if record.key != key:
        raise InputError("made from other input or with other settings", file=place, remedy=_ELSEWHERE)
    return record


def put_same(store: "Store", name: str, data: bytes) -> None:
    """Puts a file, unless it is there; raises InputError where it is there with other content."""
    if not store.put(name, data) and store.get(name, LARGEST) != data:
        raise InputError("is there already, with other content", file=name, remedy=_ELSEWHERE)
