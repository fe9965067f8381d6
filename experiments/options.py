"""Flags that several launchers have, and what is refused of their values."""

import pathlib
import sys

from absl import flags

from cotrr import shards
from cotrr.errors import InputError

FLAGS = flags.FLAGS
IN_PARTS = ("part_mb", "runner", "workers")


def define_part_mb(default: float | None) -> None:
    """Defines --part_mb; None: a run is read at once."""
    flags.DEFINE_float("part_mb", default, "Megabytes of the run in a part, a worker's memory being some ten "
                       "times that; a gzip shard is one part, however large"
                       f"{'' if default else '; unset: all is read at once'}.",
                       lower_bound=0.001)  # fmt: skip
    _show("part_mb")


def define_workers(unset: str = "one a core") -> None:
    """Defines --runner and --workers; `unset` says how many workers there are without the flag."""
    flags.DEFINE_enum("runner", "local", sorted(shards.RUNNERS), "What works on the parts: processes of this "
                      "machine, or the Ray cluster at RAY_ADDRESS (unset: one of this machine).")  # fmt: skip
    flags.DEFINE_integer("workers", None, f"Parts that are worked on at once; unset: {unset}.",
                         lower_bound=1)  # fmt: skip
    _show("runner", "workers")


def _show(*names: str) -> None:
    for name in names:
        FLAGS.register_key_flag_for_module(sys.argv[0], FLAGS[name])  # else --help does not show it


def refuse_parts(reason: str, remedy: str) -> None:
    """Raises InputError where a flag was given that only work in parts has."""
    if given := [f"--{name}" for name in IN_PARTS if FLAGS[name].present]:
        raise InputError(f"{', '.join(given)}: {reason}", remedy=remedy)


def local_output(name: str) -> pathlib.Path:
    """The path that --output names; raises InputError for a URL, which as a path is a folder `s3:`."""
    if "://" in name:
        raise InputError(f"--output={name}: expected a path, not a URL",
                         remedy="Name a local one, and copy what is written there")  # fmt: skip
    return pathlib.Path(name)
