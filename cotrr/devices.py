"""One code path for one device, several, and several processes that run the same program."""

import os
import sys
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from cotrr.errors import InputError

T = TypeVar("T")


def join(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Makes this process one of several; unset arguments come from the cluster's environment.

    Only the first speaks: the others' standard output is dropped.  Raises InputError where the arguments
    make no sense; JAX ends processes that have not found each other after five minutes.
    """
    try:
        jax.distributed.initialize(coordinator, processes, process)
    except (IndexError, ValueError, RuntimeError) as error:  # the first: no port
        raise InputError(
            f"--distributed: {error}",
            remedy="Give --coordinator=host:port and --processes, the same to all, and --process, from 0",
        ) from None
    agree(False)  # the first time they wait but seconds for each other: now, while they are in step
    if not primary():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)


def mesh() -> Mesh | None:
    """All devices of all processes in a row, for data parallelism over queries; None where there is one."""
    return Mesh(np.array(jax.devices()), ("queries",)) if jax.device_count() > 1 else None


def primary() -> bool:
    """Whether this process writes."""
    return jax.process_index() == 0


def agree(flag: bool) -> bool:
    """Whether any process says so; all must ask."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def first_alone(work: Callable[[], T]) -> T | None:
    """What `work` makes in the first process, while the others wait; None there.

    Where it fails all processes do: those left alone would wait for the first for ever.
    """
    made: T | None = None
    error: BaseException | None = None
    try:
        made = work() if primary() else None
    except BaseException as caught:  # an interrupt too
        error = caught
    if agree(error is not None):
        raise error or InputError("the first process failed, and says why")
    return made


def meet(name: str) -> None:
    """Waits until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
