"""Medians of wall-clock time and peaks of memory, for benchmarks."""

import os
import pathlib
import statistics
import threading
import time
from collections.abc import Callable


def median_ms(work: Callable[[], object], repeat: int = 7) -> float:
    """Median milliseconds of `repeat` calls, after one that is not counted."""
    work()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        work()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def first_ms(work: Callable[[], object]) -> float:
    """Milliseconds of one call: what somebody waits who calls once, compilation included."""
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)


def peak_mb(work: Callable[[], object]) -> float:
    """Megabytes (10^6 bytes) that a second call adds to the resident memory at its peak; Linux only.

    A thread looks every half millisecond, so what lives shorter may be missed.
    """
    work()
    before, peak, over = _resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.0005):
            peak = max(peak, _resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    over.set()
    watcher.join()
    return max(peak - before, 0) / 1e6


def _resident() -> int:
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
