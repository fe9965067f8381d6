"""Orbax checkpoints of a training state (a tree of arrays, typed keys included)."""

import contextlib
import pathlib
import shutil
import warnings
from typing import TypeVar

from orbax.checkpoint import v1 as ocp

from cotrr import devices

T = TypeVar("T")


class Checkpoints:
    """The last `keep` checkpoints in a folder; use it as a context manager."""

    def __init__(self, folder: str | pathlib.Path, keep: int = 2):
        self._folder, self._keep = pathlib.Path(folder).resolve(), keep
        self._checkpointer = self._open()

    def _open(self) -> ocp.training.Checkpointer:
        return ocp.training.Checkpointer(
            str(self._folder),
            preservation_policy=ocp.training.preservation_policies.LatestN(self._keep),
            cleanup_tmp_directories=True,
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self._checkpointer.close()

    def save(self, step: int, state: object) -> None:
        """Writes `state` under `step`; raises OSError where that fails, and older ones stay."""
        try:
            saved = self._checkpointer.save(step, state, overwrite=True)
        except (OSError, ValueError, RuntimeError) as error:  # a full disk comes in any of these
            self._reopen()
            raise OSError(f"{self._folder}: {error}") from error
        if not saved:
            raise OSError(f"{self._folder}: there is one later than step {step}")

    def _reopen(self) -> None:
        """Orbax raises the error of a save again at every later one, and as it is closed."""
        with contextlib.suppress(OSError, ValueError, RuntimeError):
            self._checkpointer.close()
        self._checkpointer = self._open()

    def load(self, step: int, like: T) -> T:
        """The state of `step`; `like` is a freshly initialised state of the same shape."""
        return self._checkpointer.load(step, like)

    def load_latest(self, like: T) -> tuple[T, int] | None:
        """The newest state that can be read, and its step; None: there is none.

        One that is damaged is put aside with a warning, or no step before it could be saved again.
        """
        for step in sorted((found.step for found in self._checkpointer.checkpoints), reverse=True):
            try:
                return self.load(step, like), step
            except (OSError, ValueError, RuntimeError, KeyError) as error:
                warnings.warn(f"the checkpoint of step {step} is damaged: {error}", stacklevel=2)
                self._put_aside(step)
        return None

    def _put_aside(self, step: int) -> None:
        self._checkpointer.close()
        devices.meet("before a damaged checkpoint is put aside")
        if devices.primary():
            aside = self._folder.parent / f"damaged-{self._folder.name}-{step}"
            shutil.rmtree(aside, ignore_errors=True)  # of an earlier time
            (self._folder / str(step)).rename(aside)
        devices.meet("after a damaged checkpoint was put aside")
        self._checkpointer = self._open()
