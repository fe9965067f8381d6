"""Orbax checkpoints of a training state (a tree of arrays, typed keys included)."""

import pathlib
import warnings
from typing import TypeVar

from orbax.checkpoint import v1 as ocp

T = TypeVar("T")


class Checkpoints:
    """The last `keep` checkpoints in a folder; use it as a context manager."""

    def __init__(self, folder: str | pathlib.Path, keep: int = 2):
        self._folder = pathlib.Path(folder).resolve()
        self._checkpointer = ocp.training.Checkpointer(
            str(self._folder),
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self._checkpointer.close()

    def save(self, step: int, state: object) -> None:
        """Writes `state` under `step`; raises OSError where it cannot be written, and keeps the others."""
        try:
            self._checkpointer.save(step, state, overwrite=True)
        except (OSError, ValueError, RuntimeError) as error:  # a full disk comes in any of these
            raise OSError(f"{self._folder}: {error}") from error

    def latest(self) -> int | None:
        """The newest step there is, or None."""
        found = self._checkpointer.latest
        return None if found is None else found.step

    def load(self, step: int, like: T) -> T:
        """The state of `step`; `like` is a freshly initialised state of the same shape."""
        return self._checkpointer.load(step, like)

    def load_latest(self, like: T) -> tuple[T, int] | None:
        """The newest state that can be read, and its step; a damaged one is passed over with a warning."""
        for step in sorted((found.step for found in self._checkpointer.checkpoints), reverse=True):
            try:
                return self.load(step, like), step
            except (OSError, ValueError, RuntimeError, KeyError) as error:
                warnings.warn(f"the checkpoint of step {step} is damaged: {error}", stacklevel=2)
        return None
