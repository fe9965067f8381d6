"""Work on many inputs: one pure function for each, run here, by child processes, or on a Ray cluster."""

import collections
import contextlib
import functools
import hashlib
import itertools
import multiprocessing
import os
import queue
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import msgspec

from cotrr.errors import InputError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from cotrr.store import Store

Task = TypeVar("Task")
Result = TypeVar("Result")
_SERVE = (
    "import sys; from multiprocessing.connection import Connection; pipe = Connection(int(sys.argv[1]));"
    "sys.path[:] = pipe.recv(); from cotrr import shards; shards.serve(pipe)"
)
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
    if workers <= 1:
        yield lambda function, tasks: map(function, tasks)
        return
    children = [_Child() for _ in range(workers - 1)]
    with ThreadPoolExecutor(len(children)) as threads:  # one waits for each child
        try:
            yield functools.partial(_share, _Idle(children), threads)
        finally:
            for child in children:
                child.end()


def _share(
    idle: "_Idle", threads: ThreadPoolExecutor, function: Callable[[Any], Any], tasks: Iterable[Any]
) -> Iterator[Any]:
    """The results in order; who works ahead of the next one stops at four tasks a worker."""
    for _ in range(idle.children):  # children first import what the function needs
        threads.submit(idle.call, callable, function)
    tasks, most = iter(tasks), 4 * (idle.children + 1)
    underway: collections.deque[tuple[Any, Future]] = collections.deque()
    try:
        while True:
            for task in itertools.islice(tasks, most - len(underway)):
                underway.append((task, threads.submit(idle.call, function, task)))
            if not underway:
                return
            done = underway[0][1].done()
            # A call that no child has begun can be cancelled, and is this process's then.
            mine = next((i for i, (_, call) in enumerate(underway) if not done and call.cancel()), None)
            if mine is None:
                yield underway.popleft()[1].result()
            else:
                underway[mine] = underway[mine][0], _here(function, underway[mine][0])
    finally:
        for _, call in underway:
            call.cancel()


def _here(function: Callable[[Any], Any], task: Any) -> Future:
    """A call that this process has done."""
    call: Future = Future()
    try:
        call.set_result(function(task))
    except Exception as error:
        call.set_exception(error)
    return call


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


class _Child:
    """A process that runs functions sent to it.

    Of `multiprocessing` itself, forking breaks the threads of JAX, and spawning imports the main module
    again, which costs seconds and, in a script without a guard, runs it.
    """

    def __init__(self) -> None:
        self._pipe, theirs = multiprocessing.Pipe()
        one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _SERVE, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=os.environ | one,
                stdin=subprocess.DEVNULL,
                stdout=2,  # what a function prints is no output of ours
            )
        with contextlib.suppress(OSError):  # the first call tells that it died
            self._pipe.send(sys.path)

    def __call__(self, function: Callable[[Any], Any], task: Any) -> Any:
        """The result; raises what the function raised, or RuntimeError where the process died."""
        try:
            self._pipe.send((function, task))
            fine, result = self._pipe.recv()
        except (EOFError, OSError):
            died = f"a worker process died (exit status {self._process.wait()}) at {task}"
            raise RuntimeError(died) from None
        if fine:
            return result
        raise result

    def end(self) -> None:
        """Ends the process, whatever it is doing; who waits for it is told that it died."""
        self._process.kill()
        self._process.wait()


class _Idle:
    """The children that nobody is waiting for."""

    def __init__(self, children: list[_Child]):
        self.children = len(children)
        self._queue: queue.SimpleQueue[_Child] = queue.SimpleQueue()
        for child in children:
            self._queue.put(child)

    def call(self, function: Callable[[Any], Any], task: Any) -> Any:
        """What the next idle child makes of a task."""
        child = self._queue.get()
        try:
            return child(function, task)
        finally:
            self._queue.put(child)


def serve(pipe: "Connection") -> None:
    """The life of a child: runs what it is sent, until the other end is closed or gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; whoever asked ends this one
    with contextlib.suppress(EOFError, OSError):
        while True:
            function, task = pipe.recv()
            try:
                outcome = True, function(task)
            except Exception as error:
                outcome = False, error
            pipe.send(outcome)


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
