"""One code path for one device, several, and several processes that run the same program."""

import os
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh


def join(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Makes this process one of several; unset arguments come from the cluster's environment.

    Only the first speaks: the others' standard output is dropped.
    """
    jax.distributed.initialize(coordinator, processes, process)
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


def meet(name: str) -> None:
    """Waits until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
