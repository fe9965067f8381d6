r"""Tune CoTRR-lite: configurations of a Sobol sequence are lanes of one program, halved as they train.

    python -m experiments.sweep --data=data/cotrr --workdir=checkpoints/cotrr_lite_tuned \
        --flagfile=experiments/recipes/cotrr_lite.flags

Configurations are judged on validation queries: the folds of train and validation (--folds=5, and the model
learns from both in the end), or the validation split alone (--folds=0).  The best few are trained anew with
several seeds; the best of them by the mean of its seeds becomes the model.  The test split is not read.
Writes the model, sweep.json (all configurations) and recipe.flags (the chosen one).
"""

import dataclasses
import pathlib
from functools import partial

import numpy as np
from absl import flags

from cotrr import devices, files
from cotrr.config import dataclass_from_flags, flags_from_dataclass, launch
from cotrr.data import certificate, dataset
from cotrr.evaluate.metrics import ndcg
from cotrr.ranker import artifact, fitting, search, training
from cotrr.ranker.training import State, TrainConfig
from experiments import loop
from experiments.loop import Loop
from experiments.terminal import done, say, warn

FLAGS = flags.FLAGS
QUICK = {"folds": 3, "epochs": 8}


def define_flags() -> None:
    """Flags of this launcher."""
    flags.DEFINE_string("data", None, "Dataset folder, from generate_training_data.")
    flags.DEFINE_string("workdir", None, "Folder for the search, the model and its logs.")
    flags.DEFINE_integer("configurations", 64, "How many to look at, the given one first.", lower_bound=2)
    flags.DEFINE_integer("rungs", 3, "Stages; each keeps a third of the lanes.", lower_bound=1,
                         upper_bound=9)  # fmt: skip
    flags.DEFINE_integer("finalists", 3, "Configurations that are trained anew with --members seeds.",
                         lower_bound=1)  # fmt: skip
    flags.DEFINE_bool("quick", False, "Eight configurations, few epochs.")
    flags.DEFINE_bool("overwrite", False, "Replace the training run that is in the workdir.")
    flags.DEFINE_bool("resume", False, "Go on from the latest checkpoint in the workdir.")
    flags.DEFINE_integer("checkpoint_every", 20, "Epochs between checkpoints.", lower_bound=1)
    flags_from_dataclass(TrainConfig)
    flags.mark_flags_as_required(["data", "workdir"])


def main() -> None:
    """Draws, halves, trains the finalists, saves the best."""
    workdir, config, count = (
        pathlib.Path(FLAGS.workdir),
        dataclass_from_flags(TrainConfig),
        FLAGS.configurations,
    )
    if FLAGS.quick:
        config, count = dataclasses.replace(config, **QUICK), 8
    passport = dataset.read_certificate(FLAGS.data)
    for breach in certificate.breaches(passport):
        warn(breach)
    settings = dataclasses.asdict(config) | {"data": FLAGS.data, "certificate": files.digest(passport),
                                             "configurations": count, "rungs": FLAGS.rungs}  # fmt: skip
    with files.locked(workdir / ".lock"):
        setup = fitting.set_up(loop.read_development(FLAGS.data), config, partial(ndcg, k=10), devices.mesh())
        loop.prepare_workdir(workdir, settings, FLAGS.resume, FLAGS.overwrite)
        configs = search.draw(config, count)
        say(f"{count} configurations of {', '.join(search.space(config))}, as lanes of "
            f"{len(setup.views.train)} views")  # fmt: skip
        finalists = [configs[lane] for lane in halve(setup, configs, workdir)[: FLAGS.finalists]]
        model = crown(setup, finalists, workdir, passport, count)
    done(
        {"model": f"{workdir}  ({model.version})", "recipe": workdir / "recipe.flags",
         "configurations": workdir / "sweep.json",
         "tensorboard": f"tensorboard --logdir={workdir}"},
        [f"python -m experiments.evaluate --model={workdir} --data={FLAGS.data} "
         f"--output=reports/{workdir.name}"],
    )  # fmt: skip


def halve(setup: fitting.Setup, configs: list[TrainConfig], workdir: pathlib.Path) -> list[int]:
    """Trains all configurations, ever fewer of them ever longer; returns the last ones, best first.

    Each rung has a folder with its own checkpoints, so a search that was killed goes on where it was.
    """
    everyone = training.make_lanes(configs)
    alive, state, first = list(range(len(configs))), training.init_lanes(setup.train, everyone), 0
    stages, looked_at = search.rungs(len(configs), setup.config.epochs, FLAGS.rungs), []
    for stage, rung in enumerate(stages):
        say(f"rung {stage + 1} of {len(stages)}: {len(alive)} lanes to epoch {rung.last}")
        folder, lanes = workdir / f"rung-{stage + 1}", search.take(everyone, alive)
        chosen = [configs[lane] for lane in alive]
        with Loop(folder, chosen, FLAGS.checkpoint_every, workdir / "tensorboard", alive) as epochs:
            state, reached = epochs.begin(state, first)
            state = epochs.run(setup, lanes, state, reached, rung.last)
        looked_at.append(_judged(configs, alive, state))
        order = search.survivors(state, stages[min(stage + 1, len(stages) - 1)].lanes)
        alive, state, first = [alive[k] for k in order], search.take(state, order), rung.last
    files.write_json(workdir / "sweep.json", {"rungs": looked_at, "best": alive})
    return alive


def _judged(configs: list[TrainConfig], alive: list[int], state: State) -> dict:
    """What a rung found of each of its lanes."""
    tried = search.space(configs[0])
    return {
        "lanes": [
            {
                "lane": lane,
                "validation_metric": float(state.best_metric[k]),
                "validation_loss": float(state.best[k]),
                "best_epoch": int(state.best_epoch[k]),
            }
            | {name: getattr(configs[lane], name) for name in tried}
            for k, lane in enumerate(alive)
        ]
    }


def crown(
    setup: fitting.Setup, finalists: list[TrainConfig], workdir: pathlib.Path, passport: dict, looked_at: int
) -> artifact.Model:
    """Trains the finalists with all their seeds and saves the one with the best mean as the model."""
    members = setup.config.members
    finalists = [dataclasses.replace(config, members=members) for config in finalists]
    say(f"{len(finalists)} finalists with {members} seeds each")
    lanes = training.make_lanes(finalists)
    with Loop(workdir, finalists, FLAGS.checkpoint_every, workdir / "tensorboard" / "finalists") as epochs:
        state, first = epochs.begin(training.init_lanes(setup.train, lanes))
        state = epochs.run(setup, lanes, state, first, setup.config.epochs)
        mean = np.asarray(state.best_metric).reshape(len(finalists), members).mean(axis=1)
        best = int(mean.argmax())
        state = search.take(state, range(best * members, (best + 1) * members))
        facts = loop.provenance(state, passport) | {"configurations": looked_at}
        model = fitting.finish(setup, state, finalists[best], workdir.name, facts)
        artifact.save(model, workdir)
        loop.describe(epochs.writer, setup, model)
    with files.replacing(workdir / "recipe.flags") as temporary:
        temporary.write_text(_recipe(finalists[best], looked_at))
    say(f"best of {looked_at} configurations: mean validation nDCG@10 {mean[best]:.4f}")
    return artifact.load(workdir)


def _recipe(config: TrainConfig, looked_at: int) -> str:
    lines = [f"--{name}={value}" for name, value in dataclasses.asdict(config).items() if value != ""]
    return "\n".join([f"# The best of {looked_at} configurations on validation queries.", *lines]) + "\n"


if __name__ == "__main__":
    launch(main, define_flags)
