r"""Train CoTRR-lite on a dataset; all ensemble members are lanes of one compiled program.

    python -m experiments.train --data=data/cotrr --workdir=checkpoints/cotrr_lite_v1 \
        --flagfile=experiments/recipes/cotrr_lite.flags

--quick trains few members for few epochs, to see that everything works.
"""

import dataclasses
import json
import pathlib
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from absl import flags

from cotrr import files
from cotrr.checkpoints import Checkpoints
from cotrr.config import dataclass_from_flags, flags_from_dataclass, launch
from cotrr.data import certificate, dataset
from cotrr.data.lists import to_lists
from cotrr.errors import InputError
from cotrr.evaluate.metrics import ndcg
from cotrr.ranker import artifact, fitting
from cotrr.ranker.model import Params
from cotrr.ranker.training import TrainConfig
from cotrr.summaries import SummaryWriter
from experiments.terminal import done, say, warn

FLAGS = flags.FLAGS
QUICK = {"members": 1, "folds": 3, "epochs": 10}


def define_flags() -> None:
    """Flags of this launcher."""
    flags.DEFINE_string("data", None, "Dataset folder, from generate_training_data.")
    flags.DEFINE_string("workdir", None, "Folder for the model, its checkpoints and its logs.")
    flags.DEFINE_bool("quick", False, "Few members, few epochs.")
    flags.DEFINE_bool("overwrite", False, "Replace the training run that is in the workdir.")
    flags.DEFINE_bool("resume", False, "Go on from the latest checkpoint in the workdir.")
    flags.DEFINE_integer("checkpoint_every", 20, "Epochs between checkpoints.", lower_bound=1)
    flags_from_dataclass(TrainConfig)
    flags.mark_flags_as_required(["data", "workdir"])


def main() -> None:
    """Reads, trains, calibrates, saves."""
    workdir = pathlib.Path(FLAGS.workdir)
    config = dataclass_from_flags(TrainConfig)
    if FLAGS.quick:
        config = dataclasses.replace(config, **QUICK)
    passport = dataset.read_certificate(FLAGS.data)
    for breach in certificate.breaches(passport):
        warn(breach)
    settings = dataclasses.asdict(config) | {"data": FLAGS.data, "certificate": files.digest(passport)}
    with files.locked(workdir / ".lock"):
        setup = fitting.set_up(read_development(FLAGS.data), config, partial(ndcg, k=10))
        _prepare_workdir(workdir, settings)
        _train_and_save(setup, workdir, passport)
    done(
        {"model": f"{workdir}  ({artifact.load(workdir).version})", "curves": workdir / "epochs.jsonl",
         "tensorboard": f"tensorboard --logdir={workdir / 'tensorboard'}"},
        [f"python -m experiments.evaluate --model={workdir} --data={FLAGS.data} "
         f"--output=reports/{workdir.name}"],
    )  # fmt: skip


def _train_and_save(setup: fitting.Setup, workdir: pathlib.Path, passport: dict) -> None:
    rows = setup.lanes.train.sum(axis=(1, 2))
    say(f"{len(rows)} lanes, {setup.lanes.final.sum()} of them final, learning from {rows.min():,} to "
        f"{rows.max():,} of {setup.development.lists.labelled.sum():,} labelled rows")  # fmt: skip
    with SummaryWriter(workdir / "tensorboard") as writer, Checkpoints(workdir / "checkpoints") as kept:
        writer.hparams(dataclasses.asdict(setup.config), ("validation/loss", "validation/metric"))
        state = train(setup, workdir, writer, kept)
        provenance = _provenance(state, passport)
        model = fitting.finish(setup, state, workdir.name, provenance)
        artifact.save(model, workdir)
        _describe(writer, model, state)
        writer.end_session()


def read_development(folder: str) -> fitting.Development:
    """The train and validation splits of a dataset as lists."""
    tables = [dataset.read(folder, name) for name in ("train", "validation")]
    lists = to_lists(pa.concat_tables(tables))
    ids = pa.concat_tables(tables)["canonical_id"].to_numpy(zero_copy_only=False)
    if not lists.labelled.any():
        raise InputError("no labelled rows to learn from", file=folder, field="review")
    validation = set(tables[1]["query_id"].to_pylist())
    canonical_id = np.where(lists.where, ids[lists.row], "")
    return fitting.Development(lists, canonical_id, np.array([q in validation for q in lists.query_id]))


OURS = ("model.json", "weights.npz", "trained_on.npz", "epochs.jsonl", "checkpoints", "tensorboard")


def _prepare_workdir(workdir: pathlib.Path, settings: dict) -> None:
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
        if json.loads(path.read_text()) != files.finite(settings):
            raise InputError(
                "this run had other settings or data", file=path, remedy="Resume with the same flags and data"
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


def train(setup: fitting.Setup, workdir: pathlib.Path, writer: SummaryWriter, kept: Checkpoints):
    """Runs epochs until all lanes have stopped; logs each, checkpoints at intervals."""
    config, trainer = setup.config, setup.trainer
    key, init_key = jax.random.split(jax.random.key(config.seed))
    state, first = trainer.init(init_key), 0
    if (latest := kept.latest()) is not None:
        state, first = kept.load(latest, state), latest
        say(f"resuming after epoch {latest}")
        writer.restart(latest + 1)
    _keep_epochs(workdir / "epochs.jsonl", first)
    start, shown = time.monotonic(), 0.0
    with open(workdir / "epochs.jsonl", "a") as log:
        for number in range(first, config.epochs):
            state, metrics = trainer.epoch(state, key, jnp.asarray(number))
            metrics = {name: np.asarray(values, np.float64) for name, values in metrics.items()}
            _check_finite(metrics, setup.lanes.held_out.any(axis=(1, 2)), number)
            _log(log, writer, metrics, number + 1)
            now = time.monotonic()
            if number == first:
                start = now  # the first epoch waits for the compiler, so it says nothing of the others
            elif now - shown > 2 or number + 1 == config.epochs:
                shown = now
                left = (now - start) / (number - first) * (config.epochs - number - 1)
                say(f"  epoch {number + 1:>4}/{config.epochs}  loss {metrics['total'].mean():.4f}, on "
                    f"validation {np.nanmean(metrics['validation_loss']):.4f}, nDCG@10 "
                    f"{np.nanmean(metrics['validation_metric']):.4f}  {left:.0f} s left")  # fmt: skip
            if (number + 1) % FLAGS.checkpoint_every == 0 or number + 1 == config.epochs:
                kept.save(number + 1, state)
                _log_parameters(writer, state.params, number + 1)
            if number + 1 - int(state.best_epoch) >= config.patience:
                say(f"  no epoch to keep since {int(state.best_epoch)}: stopping")
                break
    return state


def _keep_epochs(path: pathlib.Path, last: int) -> None:
    """Drops what a killed run logged after its last checkpoint: those epochs come again."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    with files.replacing(path) as temporary:
        temporary.write_bytes(b"".join(lines[:last]))


def _check_finite(metrics: dict[str, np.ndarray], validated: np.ndarray, number: int) -> None:
    fine = np.isfinite(metrics["total"]) & (np.isfinite(metrics["validation_loss"]) | ~validated)
    if not fine.all():
        lane = int(np.argmin(fine))
        raise InputError(
            f"the loss of lane {lane} is {metrics['total'][lane]} in training and "
            f"{metrics['validation_loss'][lane]} in validation in epoch {number + 1}",
            field="--learning_rate",
            remedy=f"{FLAGS.learning_rate} may be too high",
        )


def _log(log, writer: SummaryWriter, metrics: dict[str, np.ndarray], epoch: int) -> None:
    record = {"epoch": epoch} | {name: values.round(6).tolist() for name, values in metrics.items()}
    log.write(json.dumps(files.finite(record)) + "\n")
    log.flush()
    tag = lambda name: name.replace("_", "/", 1) if name.startswith("validation_") else f"train/{name}"
    writer.scalars({tag(name): np.nanmean(values) for name, values in metrics.items()}, epoch)


def _provenance(state, passport: dict) -> dict:
    labels = passport["labels"]
    return {
        "certificate": files.digest(passport),
        "settings": passport["settings"],
        "labels": labels,
        "best_epoch": int(state.best_epoch),
        "validation_loss": float(state.best),
    }


def _log_parameters(writer: SummaryWriter, params: Params, epoch: int) -> None:
    for path, value in jax.tree_util.tree_leaves_with_path(params):
        if value.size:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            writer.histogram(f"parameters/{name}", value, epoch)


def _describe(writer: SummaryWriter, model: artifact.Model, state) -> None:
    writer.text("config", "\n".join(f"    {k}: {v}" for k, v in model.config.items()))
    calibration = model.calibration
    writer.text("calibration", f"    {calibration}")
    say(f"lowest validation loss {float(state.best):.4f}, epoch {int(state.best_epoch)} kept; "
        f"95 % interval of y is ± {calibration.radius:.2f}")  # fmt: skip


if __name__ == "__main__":
    launch(main, define_flags)
