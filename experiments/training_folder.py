"""The folder of a training launcher: its flags, what it is opened for, the model that it ends with."""

import contextlib
import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from absl import flags

from cotrr import devices, files
from cotrr.config import dataclass_from_flags, flags_from_dataclass
from cotrr.data import certificate, dataset
from cotrr.data.lists import to_lists
from cotrr.errors import InputError
from cotrr.evaluate import plots
from cotrr.evaluate.calibration import bin_of, bin_sums
from cotrr.evaluate.metrics import ndcg
from cotrr.ranker import artifact, calibration, fitting, search
from cotrr.ranker.fitting import Development, Setup
from cotrr.ranker.lanes import TrainConfig
from cotrr.ranker.training import State
from cotrr.summaries import SummaryWriter
from experiments.terminal import warn

FLAGS = flags.FLAGS
SHARED = ("data", "workdir", "quick", "overwrite", "resume", "checkpoint_every",
          "distributed", "coordinator", "processes", "process")  # fmt: skip
OURS = ("model.json", "weights.npz", "trained_on.npz", "epochs.jsonl", "checkpoints", "tensorboard",
        "sweep.json", "recipe.flags", "ablation.json", "ablation.md",
        *search.STAGES)  # fmt: skip


def define_flags(quick: str) -> None:
    """The flags that training launchers share; `quick` says what --quick does."""
    flags.DEFINE_string("data", None, "Dataset folder, from generate_training_data.")
    flags.DEFINE_string("workdir", None, "Folder for what is written: results, checkpoints, logs.")
    flags.DEFINE_bool("quick", False, quick)
    flags.DEFINE_bool("overwrite", False, "Replace the training run that is in the workdir.")
    flags.DEFINE_bool("resume", False, "Go on from the latest checkpoint in the workdir.")
    flags.DEFINE_integer("checkpoint_every", 20, "Epochs between checkpoints.", lower_bound=1)
    flags.DEFINE_bool("distributed", False, "Be one of several processes (jax.distributed.initialize) that "
                                            "share --data and --workdir.")  # fmt: skip
    flags.DEFINE_string("coordinator", None, "host:port of the first process; unset: the cluster says.")
    flags.DEFINE_integer("processes", None, "How many processes; unset: the cluster says.", lower_bound=1)
    flags.DEFINE_integer("process", None, "Number of this process; unset: the cluster says.", lower_bound=0)
    for name in SHARED:
        FLAGS.register_key_flag_for_module(sys.argv[0], FLAGS[name])  # else --help does not show it
    flags_from_dataclass(TrainConfig)
    flags.mark_flags_as_required(["data", "workdir"])


def config_from_flags(quick: Mapping[str, Any]) -> TrainConfig:
    """The training settings of the flags; with --quick, those of `quick` that the command line leaves open.

    A flagfile's give way: a recipe names every setting.
    """
    config = dataclass_from_flags(TrainConfig)
    return dataclasses.replace(config, **{name: unless_quick(name, value) for name, value in quick.items()})


def unless_quick(name: str, value: Any) -> Any:
    """What a flag says; `value` with --quick, where the command line leaves the flag open."""
    given = {argument.lstrip("-").partition("=")[0] for argument in sys.argv if argument.startswith("-")}
    return value if FLAGS.quick and name not in given else FLAGS[name].value


@contextlib.contextmanager
def opened(
    launcher: str, config: TrainConfig, check: Callable[[Development], None] | None = None, **more: Any
) -> Iterator[tuple[Setup, dict]]:
    """The setup of a launcher's run and the data's certificate, while the workdir is its own.

    `check` may refuse the data; `more` are settings that a resumed run must share too.  Of several
    processes all train, one writes.
    """
    _join()
    workdir, passport = pathlib.Path(FLAGS.workdir), dataset.read_certificate(FLAGS.data)
    for breach in certificate.breaches(passport):
        warn(breach)
    settings = dataclasses.asdict(config) | {"launcher": launcher, "data": FLAGS.data}
    settings |= {"certificate": files.digest(passport)} | more
    development = read_development(FLAGS.data)
    if check:
        check(development)
    with contextlib.ExitStack() as stack:
        setup = fitting.set_up(development, config, partial(ndcg, k=10), devices.mesh())
        devices.first_alone(lambda: _prepare(stack, workdir, settings))
        yield setup, passport


def _join() -> None:
    """Makes this process one of several where flags say so."""
    given = [f"--{name}" for name in ("coordinator", "processes", "process") if FLAGS[name].present]
    if given and not FLAGS.distributed:
        raise InputError(f"{', '.join(given)}: one process has no use for it", remedy="Set --distributed too")
    if FLAGS.distributed:
        devices.join(FLAGS.coordinator, FLAGS.processes, FLAGS.process)


def _prepare(stack: contextlib.ExitStack, workdir: pathlib.Path, settings: dict) -> None:
    """Locks a fresh folder, or with --resume the one that holds a run of the same settings and data."""
    stack.enter_context(files.locked(workdir / ".lock"))
    path = workdir / "config.json"
    there = [name for name in OURS if (workdir / name).exists()]
    if there and not path.exists():
        raise InputError(
            f"holds {', '.join(there)} but no config.json: not a training folder of ours",
            file=workdir,
            remedy="Name another --workdir",
        )
    if FLAGS.resume and path.exists():
        before, now = _read_settings(path), files.finite(settings)
        # Wherever the data lie now, their certificate must be the same.
        names = sorted(
            key for key in (before.keys() | now.keys()) - {"data"} if before.get(key) != now.get(key)
        )
        if names:
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


def _read_settings(path: pathlib.Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError):
        raise InputError(
            "not the settings of a training run", file=path, remedy="Set --overwrite to begin anew"
        ) from None


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


def save_model(
    setup: Setup, state: State, config: TrainConfig, passport: dict, writer: SummaryWriter
) -> artifact.Model:
    """Calibrates a config's members [V] and saves them as the model of the workdir; TensorBoard shows it."""
    workdir = pathlib.Path(FLAGS.workdir)
    provenance = {
        "certificate": files.digest(passport),
        "settings": passport["settings"],
        "labels": passport["labels"],
        "best_epoch": int(np.median(np.asarray(state.best_epoch))),
        "validation_loss": float(np.mean(np.asarray(state.best))),
    }
    model = fitting.finish(setup, state, config, workdir.name, provenance)
    artifact.save(model, workdir)
    _describe(writer, setup, model)
    return artifact.load(workdir)


def _describe(writer: SummaryWriter, setup: Setup, model: artifact.Model) -> None:
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
