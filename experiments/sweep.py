r"""Tune CoTRR-lite: configurations of a Sobol sequence are lanes of one program, halved as they train.

    python -m experiments.sweep --data=data/cotrr --workdir=checkpoints/cotrr_lite_tuned \
        --flagfile=experiments/recipes/cotrr_lite.flags

Configurations are judged by nDCG@10 of y on validation queries: the folds of train and validation
(--folds=5, and the model learns from both in the end), or the validation split alone (--folds=0).  In the
end stands the centre of their best quarter: with few queries the best one is so by luck.  One of the
best is taken instead where it beats the centre by more than chance would.  The test split is not read.
Writes the model, recipe.flags (the one that was taken) and sweep.json: by stage (rung-1, …, finalists) every
configuration with its number, settings and figures, the mean of its members; which was `taken`, and `why`.
The centre has the number after the last.
"""

import dataclasses
import pathlib
from functools import partial
from typing import Any

import numpy as np
from absl import flags

from cotrr import devices, files
from cotrr.config import launch
from cotrr.ranker import artifact, fitting, search
from cotrr.ranker.lanes import make_lanes
from cotrr.ranker.search import Found, Stage
from cotrr.ranker.training import State
from cotrr.summaries import SummaryWriter
from experiments import training_folder
from experiments.loop import Loop
from experiments.terminal import done, say

FLAGS = flags.FLAGS
QUICK = {"folds": 3, "epochs": 8}


def define_flags() -> None:
    """Flags of this launcher."""
    training_folder.define_flags("Eight configurations, few epochs.")
    flags.DEFINE_integer("configurations", 64, "How many to look at, the given one first.", lower_bound=2)
    flags.DEFINE_integer("rungs", 3, "Stages; each keeps half of the lanes.", lower_bound=1,
                         upper_bound=len(search.STAGES) - 1)  # fmt: skip
    flags.DEFINE_integer("finalists", 3, "How many are trained anew with --members seeds: the centre of the "
                         "best quarter, then the best.", lower_bound=2)  # fmt: skip


def main() -> None:
    """Draws, halves, trains the finalists, saves the one that is taken."""
    workdir, config = pathlib.Path(FLAGS.workdir), training_folder.config_from_flags(QUICK)
    count = training_folder.unless_quick("configurations", 8)
    more = {"configurations": count, "rungs": FLAGS.rungs, "finalists": FLAGS.finalists}
    with training_folder.opened("sweep", config, **more) as (setup, passport):
        say(f"{count} configurations of {', '.join(search.space(config))}, as lanes of "
            f"{len(setup.views.train)} views")  # fmt: skip
        found = search.tune(
            setup.train, search.draw(config, count), partial(train, setup, workdir), rungs=FLAGS.rungs,
            finalists=FLAGS.finalists, members=config.members,
        )  # fmt: skip
        model = devices.first_alone(lambda: save(setup, found, workdir, passport))
    if not model:
        return
    say(f"of {found.config.looked_at} configurations {found.why}: "
        f"nDCG@10 of y on validation {found.metric:.4f}")  # fmt: skip
    done(
        {"model": f"{workdir}  ({model.version})", "recipe": workdir / "recipe.flags",
         "configurations": workdir / "sweep.json",
         "tensorboard": f"tensorboard --logdir={workdir}"},
        [f"python -m experiments.evaluate --model={workdir} --data={FLAGS.data} "
         f"--output=reports/{workdir.name}"],
    )  # fmt: skip


def train(setup: fitting.Setup, workdir: pathlib.Path, stage: Stage, state: State, first: int) -> State:
    """Trains a stage's lanes in a folder of its own: a search that was killed goes on where it was."""
    lanes, names = make_lanes(stage.configs), [f"{number:03d}" for number in stage.numbers]
    say(f"{stage.name}: {len(lanes.key)} lanes to epoch {stage.last}")
    with Loop(workdir / stage.name, stage.configs, FLAGS.checkpoint_every, names, strict=False) as epochs:
        state, reached = epochs.begin(state, first)
        return epochs.run(setup, lanes, state, reached, stage.last)


def save(setup: fitting.Setup, found: Found, workdir: pathlib.Path, passport: dict) -> artifact.Model:
    """Writes what was found of every configuration, the recipe that was taken, and its model."""
    stages = {stage.name: _judged(stage, state) for stage, state in found.trained}
    files.write_json(workdir / "sweep.json", stages | {"taken": found.number, "why": found.why})
    with SummaryWriter(workdir / "tensorboard") as writer:
        model = training_folder.save_model(setup, found.state, found.config, passport, writer)
    with files.replacing(workdir / "recipe.flags") as temporary:
        temporary.write_text(_recipe(found))
    return model


def _judged(stage: Stage, state: State) -> list[dict[str, Any]]:
    """What a stage found of each of its configurations: the mean of their members."""
    mean = lambda values: np.asarray(values, np.float64).reshape(len(stage.configs), -1).mean(axis=1)
    found = map(mean, (state.best_metric, state.best, state.best_epoch))
    return [
        {"configuration": number, "validation_metric": metric, "validation_loss": loss, "best_epoch": epoch}
        | {name: getattr(config, name) for name in search.space(config)}
        for number, config, metric, loss, epoch in zip(stage.numbers, stage.configs, *found, strict=True)
    ]


def _recipe(found: Found) -> str:
    head = f"# Of {found.config.looked_at} configurations {found.why}."
    settings = dataclasses.asdict(found.config)
    return "\n".join([head, *(f"--{name}={value}" for name, value in settings.items() if value != "")]) + "\n"


if __name__ == "__main__":
    launch(main, define_flags)
