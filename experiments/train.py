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
from experiments import loop
from experiments.loop import Loop
from experiments.terminal import done, say

FLAGS = flags.FLAGS
QUICK = {"members": 1, "folds": 3, "epochs": 10}


def define_flags() -> None:
    """Flags of this launcher."""
    loop.define_flags("One member, few folds, few epochs.")
    flags.DEFINE_bool("distributed", False, "Be one of several processes (jax.distributed.initialize) that "
                                            "share --data and --workdir.")  # fmt: skip
    flags.DEFINE_string("coordinator", None, "host:port of the first process; unset: the cluster says.")
    flags.DEFINE_integer("processes", None, "How many processes; unset: the cluster says.", lower_bound=1)
    flags.DEFINE_integer("process", None, "Number of this process; unset: the cluster says.", lower_bound=0)


def main() -> None:
    """Reads, trains, calibrates, saves."""
    if FLAGS.distributed:
        devices.join(FLAGS.coordinator, FLAGS.processes, FLAGS.process)
    workdir = pathlib.Path(FLAGS.workdir)
    with loop.opened("train", loop.config_from_flags(QUICK)) as (setup, passport):
        version = train(setup, workdir, passport)
    done(
        {"model": f"{workdir}  ({version})", "curves": workdir / "epochs.jsonl",
         "tensorboard": f"tensorboard --logdir={workdir / 'tensorboard'}"},
        [f"python -m experiments.evaluate --model={workdir} --data={FLAGS.data} "
         f"--output=reports/{workdir.name}"],
    )  # fmt: skip


def train(setup: fitting.Setup, workdir: pathlib.Path, passport: dict) -> str:
    """Trains the members as lanes, calibrates, saves; returns the model's version."""
    rows = setup.views.train.sum(axis=(1, 2))
    say(f"{setup.config.members} lanes of {len(rows)} views, learning from {rows.min():,} to {rows.max():,} "
        f"of {setup.development.lists.labelled.sum():,} labelled rows")  # fmt: skip
    lanes = make_lanes([setup.config])
    with Loop(workdir, [setup.config], FLAGS.checkpoint_every) as epochs:
        state, first = epochs.begin(training.init_lanes(setup.train, lanes))
        state = epochs.run(setup, lanes, state, first, setup.config.epochs)
        if not devices.primary():
            return ""
        facts = loop.provenance(state, passport)
        model = fitting.finish(setup, state, setup.config, workdir.name, facts)
        artifact.save(model, workdir)
        loop.describe(epochs.writer, setup, model)
    say(f"lowest validation loss {facts['validation_loss']:.4f}, epoch {facts['best_epoch']} kept")
    return artifact.load(workdir).version


if __name__ == "__main__":
    launch(main, define_flags)
