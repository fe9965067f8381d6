"""Epochs as training launchers run them: with a log, checkpoints, TensorBoard, and a way to stop."""

import contextlib
import dataclasses
import json
import pathlib
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cotrr import devices, files
from cotrr.checkpoints import Checkpoints
from cotrr.errors import InputError
from cotrr.ranker import training
from cotrr.ranker.fitting import Setup
from cotrr.ranker.lanes import Hyperparameters, Lanes, TrainConfig
from cotrr.ranker.training import State
from cotrr.summaries import SummaryWriter
from experiments.terminal import say, warn

JUDGED = ("validation/loss", "validation/metric")  # what TensorBoard's HParams table shows of a lane


class Loop:
    """Epochs of V lanes; use it as a context manager.

    Writes a line an epoch to epochs.jsonl and checkpoints, at intervals and when the process is told
    to end (SIGTERM) in an epoch, into `folder`; and a TensorBoard run for each lane.  `names` are the
    configs' where they are not 000, 001, …; members are numbered behind them.  A lane whose loss is not
    finite ends the run, or, where it is not `strict`, keeps its best epoch before.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        configs: Sequence[TrainConfig],
        checkpoint_every: int,
        names: Sequence[str] | None = None,
        strict: bool = True,
    ):
        self._folder, self._every = folder, checkpoint_every
        self._lanes = [(config, k) for config in configs for k in range(config.members)]
        names = names or [f"{k:03d}" for k in range(len(configs))]
        self._names = [name if config.members == 1 else f"{name}-{member}"
                       for name, config in zip(names, configs, strict=True)
                       for member in range(config.members)]  # fmt: skip
        self._strict, self._lost = strict, set[int]()
        self._told_to_end, self._way_on = False, "go on with --resume"
        self._writers: list[SummaryWriter] = []  # of the first process alone

    def __enter__(self) -> "Loop":
        with contextlib.ExitStack() as stack:
            self._kept = stack.enter_context(Checkpoints(self._folder / "checkpoints"))
            enter = lambda name: stack.enter_context(SummaryWriter(self._folder / "tensorboard" / name))
            names = ["", *(f"lane-{name}" for name in self._names)]
            if writers := devices.first_alone(lambda: list(map(enter, names))):
                self.writer, *self._writers = writers
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: Any, *exception: Any) -> None:
        if kind is None:
            for writer in self._writers:
                writer.end_session()
        self._stack.__exit__(kind, *exception)

    def _end(self) -> None:
        self._told_to_end = True

    def begin(self, fresh: State, first: int = 0) -> tuple[State, int]:
        """The newest state that can be read, or `fresh`, and the epochs that it has behind it.

        `first` are those of `fresh`.  What a killed run logged after that is dropped: it comes again.
        """
        state, reached = self._kept.load_latest(fresh) or (fresh, first)
        if reached > first:
            say(f"resuming after epoch {reached}")
        devices.first_alone(lambda: self._begin_logs(reached))
        return state, reached

    def _begin_logs(self, reached: int) -> None:
        path = self._folder / "epochs.jsonl"
        there = path.read_bytes().splitlines() if path.exists() else []
        with files.replacing(path) as temporary:
            temporary.write_bytes(b"".join(line + b"\n" for line in there if _epoch_of(line) <= reached))
        for name, shown, writer in zip(self._names, _shown(self._lanes), self._writers, strict=True):
            if there:
                writer.restart(reached + 1)
            else:
                writer.hparams(name, shown, JUDGED)

    def run(self, setup: Setup, lanes: Lanes, state: State, first: int, last: int) -> State:
        """Epochs first + 1, …, last, or fewer where every lane has stopped.

        Raises InputError where a loss is not finite; ends the process where it was told to end meanwhile.
        """
        with _on_sigterm(self._end):
            state = self._epochs(setup, lanes, state, first, last)
        if devices.agree(self._told_to_end):
            say(f"told to end: {self._way_on}")
            sys.exit(128 + signal.SIGTERM)
        return state

    def _epochs(self, setup: Setup, lanes: Lanes, state: State, first: int, last: int) -> State:
        config, clock = setup.config, _Clock(first, last)
        for number in range(first, last):
            before = np.asarray(training.stopped(state, number, config))
            if before.all():
                say(f"  every lane has stopped after epoch {number}")
                break
            state, found = training.run_epoch(setup.train, state, jnp.asarray(number), lanes)
            metrics = {str(name): np.asarray(values, np.float64) for name, values in found.items()}
            self._check_finite(setup, metrics, before, number)
            over = number + 1 == last or bool(training.stopped(state, number + 1, config).all())
            if left := clock.left(number + 1, over):
                say(f"  epoch {number + 1:>4}/{last}  loss {_mean(metrics['total']):.4f}, on validation "
                    f"{np.min(np.asarray(state.best)):.4f}, nDCG@10 of y "
                    f"{_mean(metrics['validation_metric']):.4f}  {left}")  # fmt: skip
            try:
                self._log(metrics, number + 1)
            except OSError as error:  # a full disk costs a line of the log, not the run
                warn(f"epoch {number + 1} is not logged: {error}")
            if self._keep(state, number + 1, over):
                break
        return state

    def _check_finite(
        self, setup: Setup, metrics: dict[str, np.ndarray], stopped: np.ndarray, number: int
    ) -> None:
        validated = setup.views.held_out.any(axis=(1, 2))
        fine = np.isfinite(metrics["total"]) & (np.isfinite(metrics["validation_loss"]) | ~validated)
        fine |= stopped[:, None]
        if fine.all():
            return
        for lane, view in np.argwhere(~fine):
            told = self._broken(metrics, lane, view, number)
            if self._strict and number == 0 and metrics["broken_step"][lane, view] == 0:
                # Nothing has been learned yet, at whatever rate.
                raise InputError(told, remedy="Labels or weights of the loss may be too large")
            if self._strict:
                raise InputError(told, field="--learning_rate", remedy="It may be too high")
            if lane not in self._lost:
                warn(told)
                self._lost.add(lane)

    def _broken(self, metrics: dict[str, np.ndarray], lane: int, view: int, number: int) -> str:
        step = int(metrics["broken_step"][lane, view])
        where = f"step {step + 1} of epoch {number + 1}" if step >= 0 else f"epoch {number + 1}"
        numbers = ", ".join(f"--{name}={value:g}" for name, value in _numbers(self._lanes[lane][0]).items())
        return (f"the loss of lane {self._names[lane]} (view {view}) is {metrics['total'][lane, view]} in "
                f"training and {metrics['validation_loss'][lane, view]} in validation, first in {where}, "
                f"with {numbers}")  # fmt: skip

    def _log(self, metrics: dict[str, np.ndarray], epoch: int) -> None:
        """Means over the views, by lane; NaN of a lane that has stopped becomes null."""
        if not devices.primary():
            return
        means = {name: _nanmean(values) for name, values in metrics.items() if name != "broken_step"}
        record = {"epoch": epoch, "lanes": list(self._names)}
        record |= {name: values.round(6).tolist() for name, values in means.items()}
        tag = lambda name: name.replace("_", "/", 1) if name.startswith("validation_") else f"train/{name}"
        for row, writer in enumerate(self._writers):
            writer.scalars({tag(name): values[row] for name, values in means.items()}, epoch)
        files.append(self._folder / "epochs.jsonl", f"{json.dumps(files.finite(record))}\n".encode())

    def _keep(self, state: State, epoch: int, last: bool) -> bool:
        """A checkpoint where one is due; whether the process was told to end.

        One that cannot be written costs no more than an interval.
        """
        told_to_end = devices.agree(self._told_to_end)
        if not (last or told_to_end or epoch % self._every == 0):
            return False
        try:
            self._kept.save(epoch, state)
            self._way_on = f"epoch {epoch} is kept; go on with --resume"
        except OSError as error:
            warn(f"no checkpoint after epoch {epoch}: {error}")
            self._way_on = "--resume goes on from the checkpoint before"
        if self._writers:
            _log_parameters(
                self._writers[0], jax.tree.map(lambda leaf: np.asarray(leaf)[0], state.params), epoch
            )
        return told_to_end


class _Clock:
    """When to show progress, and how long it will take."""

    def __init__(self, first: int, epochs: int):
        self._first, self._epochs = first, epochs
        self._start, self._shown = time.monotonic(), -np.inf

    def left(self, epoch: int, over: bool) -> str:
        """The time left, every two seconds and at the end; else nothing."""
        now = time.monotonic()
        if epoch == self._first + 1:
            self._start = now  # the first epoch waits for the compiler: it says nothing of the others
            return ""
        if now - self._shown < 2 and not over:
            return ""
        self._shown = now
        seconds = (now - self._start) / (epoch - self._first - 1) * (self._epochs - epoch)
        return f"{seconds:.0f} s left"


@contextlib.contextmanager
def _on_sigterm(call: Any) -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, lambda *_: call())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _epoch_of(line: bytes) -> float:
    """The epoch that a line of the log is about; infinite for the half of a line that a kill may leave."""
    try:
        return json.loads(line)["epoch"]
    except (ValueError, TypeError, KeyError):
        return np.inf


def _numbers(config: TrainConfig) -> dict[str, float]:
    return {name: getattr(config, name) for name in Hyperparameters._fields}


def _shown(lanes: Sequence[tuple[TrainConfig, int]]) -> list[dict[str, Any]]:
    """What the HParams table shows of each lane: what they differ in; of one alone, its numbers."""
    settings = [dataclasses.asdict(config) | {"member": member} for config, member in lanes]
    differ = [name for name in settings[0] if len({lane[name] for lane in settings}) > 1]
    return [{name: lane[name] for name in differ or Hyperparameters._fields} for lane in settings]


def _mean(values: np.ndarray) -> float:
    """Mean of what is defined; NaN where nothing is."""
    return float(_nanmean(values.reshape(1, -1))[0])


def _nanmean(values: np.ndarray) -> np.ndarray:
    """[V] mean of [V, F] over what is defined; NaN where nothing is."""
    defined = np.isfinite(values)
    total = np.where(defined, values, 0.0).sum(axis=1)
    return np.where(defined.any(axis=1), total / np.maximum(defined.sum(axis=1), 1), np.nan)


def _log_parameters(writer: SummaryWriter, params: Any, epoch: int) -> None:
    for path, value in jax.tree_util.tree_leaves_with_path(params):
        if value.size:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            writer.histogram(f"parameters/{name}", value, epoch)
