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


def reading_progress(path: str | pathlib.Path) -> Callable[[int], None]:
    """A callback for `read_run` that shows the share of the bytes read and the time left."""
    sizes = [shard.stat().st_size for shard in runs.find_run(path).shards]
    plain = all(shard.suffix != ".gz" for shard in runs.find_run(path).shards)
    total, start, read, shown = sum(sizes), time.monotonic(), 0, 0.0

    def progress(count: int) -> None:
        nonlocal read, shown
        read += count
        now = time.monotonic()
        if now - shown < 1 or now - start < 2:
            return
        shown = now
        share = min(read / total, 1) if plain and total else 0
        left = f", {(now - start) * (1 - share) / share:.0f} s left" if share else ""
        say(f"  read {read / 1e6:,.0f} MB{left}")

    return progress
