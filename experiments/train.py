r"""Train CoTRR-lite on a dataset; all ensemble members are lanes of one compiled program.

    python -m experiments.train --data=data/cotrr --workdir=checkpoints/cotrr_lite_v1 \
        --flagfile=experiments/recipes/cotrr_lite.flags

--quick trains few members for few epochs, to see that everything works; --members, --folds and --epochs
beside it hold.
"""

import pathlib

from absl import flags

from cotrr import devices
from cotrr.config import launch
from cotrr.ranker import artifact, fitting, training
from cotrr.ranker.lanes import make_lanes
from experiments import training_folder
from experiments.loop import Loop
from experiments.terminal import done, say

FLAGS = flags.FLAGS
QUICK = {"members": 1, "folds": 3, "epochs": 10}


def define_flags() -> None:
    """Flags of this launcher."""
    training_folder.define_flags("One member, few folds, few epochs.")


def main() -> None:
    """Reads, trains, calibrates, saves."""
    workdir = pathlib.Path(FLAGS.workdir)
    with training_folder.opened("train", training_folder.config_from_flags(QUICK)) as (setup, passport):
        model = train(setup, workdir, passport)
    if not model:
        return
    facts = model.provenance
    say(f"lowest validation loss {facts['validation_loss']:.4f}, epoch {facts['best_epoch']} kept")
    done(
        {"model": f"{workdir}  ({model.version})", "curves": workdir / "epochs.jsonl",
         "tensorboard": f"tensorboard --logdir={workdir / 'tensorboard'}"},
        [f"python -m experiments.evaluate --model={workdir} --data={FLAGS.data} "
         f"--output=reports/{workdir.name}"],
    )  # fmt: skip


def train(setup: fitting.Setup, workdir: pathlib.Path, passport: dict) -> artifact.Model | None:
    """The model whose members are lanes; none where another process saves it."""
    rows = setup.views.train.sum(axis=(1, 2))
    say(f"{setup.config.members} lanes of {len(rows)} views, learning from {rows.min():,} to {rows.max():,} "
        f"of {setup.development.lists.labelled.sum():,} labelled rows")  # fmt: skip
    lanes = make_lanes([setup.config])
    with Loop(workdir, [setup.config], FLAGS.checkpoint_every) as epochs:
        state, first = epochs.begin(training.init_lanes(setup.train, lanes))
        state = epochs.run(setup, lanes, state, first, setup.config.epochs)
        return devices.first_alone(
            lambda: training_folder.save_model(setup, state, setup.config, passport, epochs.writer)
        )


if __name__ == "__main__":
    launch(main, define_flags)
