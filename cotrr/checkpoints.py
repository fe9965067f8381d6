"""Orbax checkpoints of a training state (a tree of arrays, typed keys included)."""

import pathlib
from typing import TypeVar

from orbax.checkpoint import v1 as ocp

T = TypeVar("T")


class Checkpoints:
    """The last `keep` checkpoints in a folder; use it as a context manager."""

    def __init__(self, folder: str | pathlib.Path, keep: int = 2):
        self._checkpointer = ocp.training.Checkpointer(
            str(pathlib.Path(folder).resolve()),
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self._checkpointer.close()

    def save(self, step: int, state: object) -> None:
        """Writes `state` under `step`."""
        self._checkpointer.save(step, state, overwrite=True)

    def latest(self) -> int | None:
        """The newest step there is, or None."""
        found = self._checkpointer.latest
        return None if found is None else found.step

    def load(self, step: int, like: T) -> T:
        """The state of `step`; `like` is a freshly initialised state of the same shape."""
        return self._checkpointer.load(step, like)
