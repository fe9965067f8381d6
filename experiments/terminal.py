"""What launchers say on the terminal: progress while they work, and what to do next."""

import getpass
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

from cotrr.data import runs


def say(text: str = "") -> None:
    """Prints a line at once."""
    print(text, flush=True)


def warn(text: str) -> None:
    """Prints a line that must not be overlooked."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def actor(given: str | None) -> str:
    """Who does it: as given, else the user's name, or number where it has none, as in a container."""
    try:
        return given or getpass.getuser()
    except (KeyError, OSError):
        return f"unknown uid {os.getuid()}"


def done(wrote: dict[str, object], next_steps: list[str]) -> None:
    """The end of a launcher: what it wrote, and what to do next."""
    say()
    width = max((len(name) for name in wrote), default=0)
    for name, place in wrote.items():
        say(f"{name:<{width}}  {place}")
    for step in next_steps:
        say(f"next: {step}")


def tell_reading(summary: dict[str, Any]) -> None:
    """What was noticed while a run was read."""
    if summary["manifest"] is None:
        warn("a bare file without a manifest: nothing says whether it is complete")
    if summary["quarantined"]:
        warn(f"{summary['quarantined']} bad lines are in {summary['quarantine']}")
    for field, count in summary["unknown_fields"].items():
        warn(f"unknown field `{field}` on {count} lines: not used")
    if summary["absent_fields"]:
        say(f"missing everywhere: {', '.join(summary['absent_fields'])}")


def progress(total: float, unit: str, done_before: float = 0) -> Callable[[float], None]:
    """A callback for what was done now: once a second at most, tells how much is done and the time left."""
    start, done, shown = time.monotonic(), done_before, 0.0

    def advance(count: float) -> None:
        nonlocal done, shown
        done += count
        now = time.monotonic()
        if not done_before < done < total or now - shown < 1 or now - start < 2:
            return
        shown = now
        left = (now - start) * (total - done) / (done - done_before)
        say(f"  {done:,.0f} of {total:,.0f} {unit}, {left:.0f} s left")

    return advance


def reading_progress(path: str | pathlib.Path) -> Callable[[int], None]:
    """A callback for `read_run`, which tells it the bytes that it has read of the files as they are."""
    total = sum(shard.stat().st_size for shard in runs.find_run(path).shards)
    advance = progress(total / 1e6, "MB read")
    return lambda count: advance(count / 1e6)
