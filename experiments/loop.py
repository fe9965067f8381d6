"""What training launchers share: a folder of their own, epochs with a log, checkpoints, a way to stop."""

import contextlib
import dataclasses
import json
import pathlib
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from absl import flags

from cotrr import devices, files
from cotrr.checkpoints import Checkpoints
from cotrr.config import dataclass_from_flags, flags_from_dataclass
from cotrr.data import certificate, dataset
from cotrr.data.lists import Lists, to_lists
from cotrr.errors import InputError
from cotrr.evaluate import plots, scoring
from cotrr.evaluate.calibration import bin_of, bin_sums
from cotrr.evaluate.metrics import ndcg
from cotrr.ranker import artifact, calibration, fitting, training
from cotrr.ranker.fitting import Development, Setup
from cotrr.ranker.lanes import Hyperparameters, Lanes, TrainConfig
from cotrr.ranker.training import State
from cotrr.summaries import SummaryWriter
from experiments.terminal import say, warn

FLAGS = flags.FLAGS
OURS = ("model.json", "weights.npz", "trained_on.npz", "epochs.jsonl", "checkpoints", "tensorboard",
        "sweep.json", "recipe.flags", "ablation.json", "ablation.md",
        *(f"rung-{k}" for k in range(1, 10)))  # fmt: skip
JUDGED = ("validation/loss", "validation/metric")  # what TensorBoard's HParams table shows of a lane


def read_development(folder: str) -> Development:
    """The train and validation splits of a dataset as lists."""
    tables = [dataset.read(folder, name) for name in ("train", "validation")]
    lists = to_lists(pa.concat_tables(tables))
    ids = pa.concat_tables(tables)["canonical_id"].to_numpy(zero_copy_only=False)
    if not lists.labelled.any():
        raise InputError("no labelled rows to learn from", file=folder, field="review")
    validation = set(tables[1]["query_id"].to_pylist())
    canonical_id = np.where(lists.where, ids[lists.row], "")
    return Development(lists, canonical_id, np.array([q in validation for q in lists.query_id]))


def labelled_lists(table: pa.Table, folder: str, split: str) -> tuple[Lists, str]:
    """The queries with labels of one kind: gold where there is any, else silver; never both."""
    label = scoring.label_of(table["label"].unique().to_pylist())
    lists, left_out = scoring.labelled(table, label)
    check_labelled(lists, left_out, label, folder, split)
    return lists, label


def check_labelled(lists: Lists, left_out: int, label: str, folder: str, split: str) -> None:
    """Tells how many queries of a split are left out; raises InputError where no query has labels."""
    if not len(lists.query_id):
        raise InputError(
            f"the {split} split has no labelled rows",
            file=folder,
            remedy=f"Generate the dataset with a {split} fraction above 0, from a run with reviews",
        )
    if left_out:
        warn(f"{left_out} queries without {label} labels are left out")


def define_flags(quick: str) -> None:
    """The flags that training launchers share; `quick` says what --quick does."""
    flags.DEFINE_string("data", None, "Dataset folder, from generate_training_data.")
    flags.DEFINE_string("workdir", None, "Folder for what is written: results, checkpoints, logs.")
    flags.DEFINE_bool("quick", False, quick)
    flags.DEFINE_bool("overwrite", False, "Replace the training run that is in the workdir.")
    flags.DEFINE_bool("resume", False, "Go on from the latest checkpoint in the workdir.")
    flags.DEFINE_integer("checkpoint_every", 20, "Epochs between checkpoints.", lower_bound=1)
    for name in ("data", "workdir", "quick", "overwrite", "resume", "checkpoint_every"):
        FLAGS.register_key_flag_for_module(sys.argv[0], FLAGS[name])  # else --help does not show it
    flags_from_dataclass(TrainConfig)
    flags.mark_flags_as_required(["data", "workdir"])


def config_from_flags(quick: Mapping[str, Any]) -> TrainConfig:
    """The training settings of the flags; with --quick, those of `quick` that the command line leaves open.

    A flagfile's give way: a recipe names every setting.
    """
    config = dataclass_from_flags(TrainConfig)
    given = {argument.lstrip("-").partition("=")[0] for argument in sys.argv if argument.startswith("-")}
    changes = {name: value for name, value in quick.items() if name not in given}
    return dataclasses.replace(config, **changes) if FLAGS.quick else config


@contextlib.contextmanager
def opened(launcher: str, config: TrainConfig, **more: Any) -> Iterator[tuple[Setup, dict]]:
    """The setup of a launcher's run and the data's certificate, while the workdir is its own.

    `more` are settings that a resumed run must share too.
    """
    workdir, passport = pathlib.Path(FLAGS.workdir), dataset.read_certificate(FLAGS.data)
    for breach in certificate.breaches(passport):
        warn(breach)
    settings = dataclasses.asdict(config) | {"launcher": launcher, "data": FLAGS.data}
    settings |= {"certificate": files.digest(passport)} | more
    with contextlib.ExitStack() as stack:
        setup = fitting.set_up(read_development(FLAGS.data), config, partial(ndcg, k=10), devices.mesh())
        refused: InputError | None = None
        try:
            if devices.primary():
                stack.enter_context(files.locked(workdir / ".lock"))
                _prepare(workdir, settings)
        except InputError as error:
            refused = error
        if devices.agree(refused is not None):  # all processes end together, or those without hang
            raise refused or InputError("the first process was refused", file=workdir)
        yield setup, passport


def _prepare(workdir: pathlib.Path, settings: dict) -> None:
    """A fresh folder, or with --resume the one that holds a run of the same settings and data."""
    path = workdir / "config.json"
    there = [name for name in OURS if (workdir / name).exists()]
    if there and not path.exists():
        raise InputError(
            f"holds {', '.join(there)} but no config.json: not a training folder of ours",
            file=workdir,
            remedy="Name another --workdir",
        )
    if FLAGS.resume and path.exists():
        before, now = json.loads(path.read_text()), files.finite(settings)
        if before != now:
            names = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
            raise InputError(
                f"this run had other settings or data: {', '.join(names)}",
                file=path,
                remedy="Resume with the same launcher, flags and data",
            )
        return
    if there and not FLAGS.overwrite:
        raise InputError(
            f"holds a training run ({', '.join(there)})",
            file=workdir,
            remedy="Set --resume to go on with it, --overwrite to replace it, or name another --workdir",
        )
    files.remove(workdir, OURS)
    files.write_json(path, settings)


def refuse_overlap(model: artifact.Model, name: str, table: pa.Table, folder: str) -> None:
    """Raises InputError where a model has learned from queries or pictures of a table."""
    if what := artifact.learned_from(model, table):
        raise InputError(
            f"{name} has learned from {what} of this split",
            file=folder,
            remedy="Evaluate on data it has not seen, or set --allow_overlap to see optimistic figures",
        )


def provenance(state: State, passport: dict) -> dict[str, Any]:
    """What a model says of its training; the members' median epoch and mean loss."""
    return {
        "certificate": files.digest(passport),
        "settings": passport["settings"],
        "labels": passport["labels"],
        "best_epoch": int(np.median(np.asarray(state.best_epoch))),
        "validation_loss": float(np.mean(np.asarray(state.best))),
    }


def describe(writer: SummaryWriter, setup: Setup, model: artifact.Model) -> None:
    """A model's settings, and how well both heads are calibrated on held-out rows, in TensorBoard.

    What is drawn of a fold comes from a calibrator of the same kind that has not seen it.
    """
    writer.text("config", "\n".join(f"    {k}: {v}" for k, v in model.config.items()))
    held = fitting.held_out(setup, model)
    heads = {"rank": (held.rank, held.y), "conflict": (held.conflict, held.is_conflict)}
    for head, (logits, observed) in heads.items():
        choice, known = model.calibration.choices[head], ~np.isnan(observed)
        if known.any():
            fit = calibration.CALIBRATORS[choice.kind]
            predicted = calibration.cross_fitted(logits[known], observed[known], held.fold[known], fit)
            writer.image(f"calibration/{head}", plots.reliability(_bins(predicted, observed[known]), head))
        losses = "\n".join(f"| {kind} | {loss:.4f} |" for kind, loss in choice.log_loss.items())
        writer.text(f"calibrators/{head}", f"chosen: {choice.kind}\n\n| kind | cross-validated log-loss |\n"
                    f"|---|---:|\n{losses}")  # fmt: skip


def _bins(predicted: np.ndarray, observed: np.ndarray) -> list[Mapping[str, Any]]:
    """Reliability bins of equal width, without the empty ones."""
    sums = bin_sums(np.zeros(len(predicted), int), predicted, observed, bin_of(predicted), 1)[0]
    return [{"n": int(n), "predicted": p / n, "observed": y / n, "ci": None} for n, p, y in sums if n]


class Loop:
    """Epochs of V lanes; use it as a context manager.

    Writes a line an epoch to epochs.jsonl and checkpoints, at intervals and when the process is told
    to end (SIGTERM) in an epoch, into `folder`; and a TensorBoard run for each lane.  `names` are the
    lanes' numbers where they are not 0, 1, ….  A lane whose loss is not finite ends the run, or, where it is
    not `strict`, keeps its best epoch before.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        configs: Sequence[TrainConfig],
        checkpoint_every: int,
        names: Sequence[int] | None = None,
        strict: bool = True,
    ):
        self._folder, self._every = folder, checkpoint_every
        self._lanes = [(config, k) for config in configs for k in range(config.members)]
        self._names = list(range(len(self._lanes))) if names is None else names
        self._strict, self._lost = strict, set[int]()
        self._told_to_end, self._way_on = False, "go on with --resume"
        self._writers: list[SummaryWriter] = []  # of the first process alone

    def __enter__(self) -> "Loop":
        with contextlib.ExitStack() as stack:
            self._kept = stack.enter_context(Checkpoints(self._folder / "checkpoints"))
            if devices.primary():
                enter = lambda name: stack.enter_context(SummaryWriter(self._folder / "tensorboard" / name))
                self.writer = enter("")
                self._writers = [enter(f"lane-{name:03d}") for name in self._names]
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
        path, there = self._folder / "epochs.jsonl", list[bytes]()
        if devices.primary():
            there = path.read_bytes().splitlines() if path.exists() else []
            with files.replacing(path) as temporary:
                temporary.write_bytes(b"".join(line + b"\n" for line in there if _epoch_of(line) <= reached))
        for (config, member), writer in zip(self._lanes, self._writers, strict=False):
            if there:
                writer.restart(reached + 1)
            else:
                writer.hparams(_varied(config) | {"member": member}, JUDGED)
        return state, reached

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
            _log_parameters(self._writers[0], jax.tree.map(lambda leaf: leaf[0], state.params), epoch)
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


def _varied(config: TrainConfig) -> dict[str, Any]:
    """What the HParams table shows of a lane."""
    return _numbers(config) | {name: getattr(config, name) for name in ("seed", "groups", "without")}


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
