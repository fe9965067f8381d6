r"""Write a simulated Step 4 run whose truth is known, for tests, benchmarks and first steps.

    python -m experiments.simulate_run --output=runs/simulated --queries=200 --candidates=60

The model is stated in `cotrr/data/simulator.py`; `truth.json` in the run folder says what is
reachable on it.
"""

import os
import pathlib
import time
from collections.abc import Callable

from absl import flags

from cotrr.config import dataclass_from_flags, flags_from_dataclass, launch
from cotrr.data.simulator import Simulation, write_run
from cotrr.errors import InputError
from experiments.terminal import done, say

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Flags of this launcher: one per field of `Simulation`, and where to write."""
    flags.DEFINE_string("output", None, "Run folder to write.")
    flags.DEFINE_bool("overwrite", False, "Replace a simulated run that is there already.")
    flags_from_dataclass(Simulation)
    flags.mark_flag_as_required("output")


def main() -> None:
    """Simulates, points `latest` to the run, and says what is reachable."""
    output, simulation = pathlib.Path(FLAGS.output), dataclass_from_flags(Simulation)
    check_place(output, FLAGS.overwrite)
    say(f"simulating {simulation.queries} queries x {simulation.candidates} candidates")
    truth = write_run(simulation, output, show_progress(simulation.queries))
    point_latest(output)
    say("reachable by the reviewer's labels (Compliance@1, nDCG@10):")
    for ranking, metrics in truth["metrics"].items():
        first, ndcg = metrics["compliance_at_1"], metrics["ndcg_at_10"]
        say(f"  {ranking:<12}{_number(first)} {_number(ndcg)}")
    data = output.parent.parent / "data" / output.name
    done(
        {"run": output, "truth": output / "truth.json", "link": output.parent / "latest"},
        [f"python -m experiments.generate_training_data --input={output} --output={data}"],
    )


def check_place(output: pathlib.Path, overwrite: bool) -> None:
    """Raises InputError where writing would destroy something."""
    if output.name == "latest":
        raise InputError("`latest` is the link to the newest run", file=output, remedy="Name a run")
    latest = output.parent / "latest"
    if latest.exists() and not latest.is_symlink():
        raise InputError("this is in the way of the link to the newest run", file=latest)
    if output.exists() and not output.is_dir():
        raise InputError("this is a file, not a run folder", file=output)
    if not any([(output / "manifest.json").exists(), *output.glob("scored*.jsonl*")]):
        return
    if not overwrite:
        raise InputError("a run is here already", file=output, remedy="Give --overwrite to replace it")
    if not (output / "truth.json").exists() or any(output.glob("scored-*.jsonl*")):
        raise InputError("this run was not simulated and stays", file=output, remedy="Name another")


def point_latest(output: pathlib.Path) -> None:
    """Makes the link `latest` beside the run point to it, at once."""
    link = output.parent / "latest"
    temporary = link.with_name(f".latest.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(output.name)
    os.replace(temporary, link)


def show_progress(total: int) -> Callable[[int], None]:
    """A callback for `write_run` that speaks up only in runs of more than two seconds."""
    start = shown = time.monotonic()

    def progress(count: int) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown >= 2 and count < total:
            shown = now
            say(f"  {count} of {total} queries, {(now - start) * (total / count - 1):.0f} s left")

    return progress


def _number(value: float | None) -> str:
    return "   -" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    launch(main, define_flags)
