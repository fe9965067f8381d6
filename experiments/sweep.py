r"""Tune CoTRR-lite: configurations of a Sobol sequence are lanes of one program, halved as they train.

    python -m experiments.sweep --data=data/cotrr --workdir=checkpoints/cotrr_lite_tuned \
        --flagfile=experiments/recipes/cotrr_lite.flags

Configurations are judged by nDCG@10 of y on validation queries: the folds of train and validation
(--folds=5, and the model learns from both in the end), or the validation split alone (--folds=0).  With
--members the last few are trained anew with as many seeds, and judged by their mean.  The test split is not
read.
Writes the model, sweep.json (all configurations) and recipe.flags (the chosen one).
"""

import dataclasses
import pathlib

import numpy as np
from absl import flags

from cotrr import files
from cotrr.config import launch
from cotrr.ranker import artifact, fitting, search, training
from cotrr.ranker.lanes import TrainConfig, make_lanes
from cotrr.ranker.training import State
from cotrr.summaries import SummaryWriter
from experiments import loop
from experiments.loop import Loop
from experiments.terminal import done, say

FLAGS = flags.FLAGS
QUICK = {"folds": 3, "epochs": 8}


def define_flags() -> None:
    """Flags of this launcher."""
    loop.define_flags("Eight configurations, few epochs.")
    flags.DEFINE_integer("configurations", 64, "How many to look at, the given one first.", lower_bound=2)
    flags.DEFINE_integer("rungs", 3, "Stages; each keeps a third of the lanes.", lower_bound=1,
                         upper_bound=9)  # fmt: skip
    flags.DEFINE_integer("finalists", 3, "Configurations that are trained anew with --members seeds, where "
                         "there are several.", lower_bound=1)  # fmt: skip


def main() -> None:
    """Draws, halves, trains the finalists, saves the best."""
    workdir, config = pathlib.Path(FLAGS.workdir), loop.config_from_flags(QUICK)
    count = 8 if FLAGS.quick else FLAGS.configurations
    more = {"configurations": count, "rungs": FLAGS.rungs, "finalists": FLAGS.finalists}
    with loop.opened("sweep", config, **more) as (setup, passport):
        configs = search.draw(config, count)
        say(f"{count} configurations of {', '.join(search.space(config))}, as lanes of "
            f"{len(setup.views.train)} views")  # fmt: skip
        model = crown(setup, *halve(setup, configs, workdir), workdir, passport)
    done(
        {"model": f"{workdir}  ({model.version})", "recipe": workdir / "recipe.flags",
         "configurations": workdir / "sweep.json",
         "tensorboard": f"tensorboard --logdir={workdir}"},
        [f"python -m experiments.evaluate --model={workdir} --data={FLAGS.data} "
         f"--output=reports/{workdir.name}"],
    )  # fmt: skip


def halve(
    setup: fitting.Setup, configs: list[TrainConfig], workdir: pathlib.Path
) -> tuple[list[TrainConfig], State]:
    """Trains all configurations, ever fewer of them ever longer; returns the last ones, best first.

    Each rung has a folder with its own checkpoints, so a search that was killed goes on where it was.
    """
    everyone = make_lanes(configs)
    alive, state, first = list(range(len(configs))), training.init_lanes(setup.train, everyone), 0
    stages, looked_at = search.rungs(len(configs), setup.config.epochs, FLAGS.rungs), []
    for stage, rung in enumerate(stages):
        say(f"rung {stage + 1} of {len(stages)}: {len(alive)} lanes to epoch {rung.last}")
        folder, lanes = workdir / f"rung-{stage + 1}", search.take(everyone, alive)
        chosen = [configs[lane] for lane in alive]
        with Loop(folder, chosen, FLAGS.checkpoint_every, alive, strict=False) as epochs:
            state, reached = epochs.begin(state, first)
            state = epochs.run(setup, lanes, state, reached, rung.last)
        looked_at.append(_judged(configs, alive, state))
        order = search.survivors(state, stages[min(stage + 1, len(stages) - 1)].lanes)
        alive, state, first = [alive[k] for k in order], search.take(state, order), rung.last
    files.write_json(workdir / "sweep.json", {"rungs": looked_at, "best": alive})
    return [configs[lane] for lane in alive], state


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
    setup: fitting.Setup,
    configs: list[TrainConfig],
    state: State,
    workdir: pathlib.Path,
    passport: dict,
) -> artifact.Model:
    """Saves the best configuration as the model: with several members, by the mean of their seeds."""
    members, best = setup.config.members, 0
    if members > 1:
        configs = [dataclasses.replace(config, members=members) for config in configs[: FLAGS.finalists]]
        say(f"{len(configs)} finalists with {members} seeds each")
        lanes = make_lanes(configs)
        with Loop(workdir, configs, FLAGS.checkpoint_every, strict=False) as epochs:
            state, first = epochs.begin(training.init_lanes(setup.train, lanes))
            state = epochs.run(setup, lanes, state, first, setup.config.epochs)
        best = search.survivors(state, 1, members)[0]
    state = search.take(state, range(best * members, (best + 1) * members))
    config = configs[best]
    model = fitting.finish(setup, state, config, workdir.name, loop.provenance(state, passport))
    artifact.save(model, workdir)
    with SummaryWriter(workdir / "tensorboard") as writer:
        loop.describe(writer, setup, model)
    with files.replacing(workdir / "recipe.flags") as temporary:
        temporary.write_text(_recipe(config))
    metric = float(np.mean(np.asarray(state.best_metric)))
    say(f"best of {config.looked_at} configurations: mean validation nDCG@10 of y {metric:.4f}")
    return artifact.load(workdir)


def _recipe(config: TrainConfig) -> str:
    lines = [f"--{name}={value}" for name, value in dataclasses.asdict(config).items() if value != ""]
    return (
        "\n".join([f"# The best of {config.looked_at} configurations on validation queries.", *lines]) + "\n"
    )


if __name__ == "__main__":
    launch(main, define_flags)
