r"""Whether a run may grow: rows a second and memory of each job in parts at 1, 10 and 100 times the rows.

    python -m benchmarks.scale --output=scale.json

A simulated run is written over and over with other queries and pictures, so nothing about its lines
changes as it grows.  Each size is made into a dataset, half of which is evaluated, and the run is
reranked, by launchers of their own; memory is the largest sum of what is resident in one and its workers.
The line through seconds and rows is fitted to all sizes; what it says of 10^9 rows is arithmetic, printed
with what it leaves out.  Near duplicates are looked for where --near_duplicates says so: that alone grows
with the square of the pictures.
"""

import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np
from absl import flags

from benchmarks import models
from cotrr import files, shards
from cotrr.config import launch
from cotrr.data.simulator import Simulation, write_run
from experiments.terminal import say

FLAGS = flags.FLAGS
ROOT = pathlib.Path(__file__).resolve().parents[1]
BILLION = 10**9


def define_flags() -> None:
    """Flags of this benchmark."""
    flags.DEFINE_integer("queries", 40, "Queries of the smallest run.", lower_bound=1)
    flags.DEFINE_integer("candidates", 50, "Candidates of a query.", lower_bound=1)
    flags.DEFINE_integer("dim", 128, "Length of the embeddings.", lower_bound=1)
    flags.DEFINE_list(
        "jobs", ["generate", "evaluate", "rerank"], "What is measured; evaluate needs generate."
    )
    flags.DEFINE_list("times", ["1", "10", "100"], "Two sizes or more, as multiples of the smallest.")
    flags.DEFINE_enum("runner", "local", sorted(shards.RUNNERS), "What works on the parts.")
    flags.DEFINE_float("part_mb", 4, "Megabytes of the run in a part.", lower_bound=0.001)
    flags.DEFINE_bool("near_duplicates", True, "Have generate look for them.")
    flags.DEFINE_string("output", None, "JSON file for the figures.")


def main() -> None:
    """Measures each job at each size and prints the line through them."""
    with tempfile.TemporaryDirectory() as name:
        work = pathlib.Path(name)
        models.save(models.random_model(FLAGS.dim), work / "model")
        simulation = Simulation(queries=FLAGS.queries, candidates=FLAGS.candidates, embedding_dim=FLAGS.dim)
        write_run(simulation, work / "one")
        facts = {job: [] for job in FLAGS.jobs}
        for times in map(int, FLAGS.times):
            place = work / str(times)
            size = repeat(work / "one", place / "run", times)
            rows = times * FLAGS.queries * FLAGS.candidates
            for job in FLAGS.jobs:
                facts[job].append({"rows": rows, "mb": size / 1e6} | measure(JOBS[job](work, place)))
                say(_line(job, facts[job][-1]))
            shutil.rmtree(place)
    lines = {job: line(job, sizes) for job, sizes in facts.items()}
    if FLAGS.output:
        files.write_json(FLAGS.output, {"cores": shards.cores(), "sizes": facts, "lines": lines})


def _line(job: str, fact: dict[str, float]) -> str:
    return (f"  {job:<9}{fact['rows']:>10,} rows {fact['mb']:8,.0f} MB {fact['seconds']:7.1f} s "
            f"{fact['rows'] / fact['seconds']:9,.0f} rows/s  peak {fact['peak_mb']:6,.0f} MB")  # fmt: skip


def line(job: str, sizes: list[dict[str, float]]) -> dict[str, float]:
    """Tells how seconds and memory grow with rows, and what that says of a billion."""
    rows, seconds, peak, mb = (
        np.array([fact[name] for fact in sizes]) for name in ("rows", "seconds", "peak_mb", "mb")
    )
    slope, start = np.polyfit(rows, seconds, 1)
    # Small runs do not fill the memory that a job may take, so growth is told from the two largest.
    grows = 1e6 * (peak[-1] - peak[-2]) / (rows[-1] - rows[-2])
    away = np.abs(seconds - (start + slope * rows)).max()
    hours, cores = slope * BILLION / 3600, shards.cores()
    say(
        f"{job}: {start:.1f} s and {1e6 * slope:.1f} µs a row, no size more than {away:.1f} s off that line; "
        f"memory grows by {grows:.0f} bytes a row, the largest run is {mb[-1] / peak[-1]:.1f} times it"
    )
    total, rate = hours * cores, mb[-1] / rows[-1] / slope / cores
    say(f"  10^9 rows: {total:.0f} core-hours, {hours:.0f} hours on these {cores} cores; on 100 of a Ray "
        f"cluster {total / 100:.1f} hours, where storage gives them {100 * rate:,.0f} MB/s")  # fmt: skip
    say(f"  and {grows:.0f} GB where parts are handed out, so rather in run folders of 10^8 rows")
    return {"start_s": start, "row_us": 1e6 * slope, "bytes_a_row": grows}


def _generate(work: pathlib.Path, place: pathlib.Path) -> list[str]:
    return ["generate_training_data", f"--input={place / 'run'}", f"--output={place / 'data'}",
            "--fractions=0.4,0.1,0.5", "--split_method=strict", f"--part_mb={FLAGS.part_mb}",
            f"--near_duplicates={str(FLAGS.near_duplicates).lower()}"]  # fmt: skip


def _evaluate(work: pathlib.Path, place: pathlib.Path) -> list[str]:
    return ["evaluate", f"--model={work / 'model'}", f"--data={place / 'data'}",
            f"--output={place / 'report'}", "--quick"]  # fmt: skip


def _rerank(work: pathlib.Path, place: pathlib.Path) -> list[str]:
    return ["rerank", f"--model={work / 'model'}", f"--input={place / 'run'}",
            f"--output={place / 'reranked'}", f"--part_mb={FLAGS.part_mb}"]  # fmt: skip


JOBS: dict[str, Callable[[pathlib.Path, pathlib.Path], list[str]]] = {
    "generate": _generate, "evaluate": _evaluate, "rerank": _rerank,
}  # fmt: skip


def measure(call: list[str]) -> dict[str, float]:
    """Seconds and the most memory of a launcher, which must not fail."""
    command = [sys.executable, "-m", f"experiments.{call[0]}", *call[1:], f"--runner={FLAGS.runner}"]
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, resident(process.pid))
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{call[0]} ended with {process.returncode}")
    return {"seconds": time.perf_counter() - start, "peak_mb": peak / 1e6}


def repeat(one: pathlib.Path, run: pathlib.Path, times: int) -> int:
    """Writes a run that holds the lines of one so many times, with new queries and pictures; its bytes."""
    run.mkdir(parents=True)
    manifest = json.loads((one / "manifest.json").read_text())
    items = manifest["items_by_stage"]["scored"]
    again = lambda item, copy: "/".join(f"{copy}-{part}" for part in item.split("/"))
    manifest["items_by_stage"] = {"scored": [again(item, copy) for copy in range(times) for item in items]}
    (run / "manifest.json").write_text(json.dumps(manifest))
    lines = (one / "scored.jsonl").read_bytes().splitlines(keepends=True)
    with open(run / "scored.jsonl", "wb") as out:
        for copy in range(times):
            out.writelines(_anew(line, copy) for line in lines)
        return out.tell()


def _anew(line: bytes, copy: int) -> bytes:
    """A line of another query and picture, whose embedding is turned by as many numbers."""
    for key in (b"query_id", b"canonical_id", b"id"):
        line = line.replace(b'"%s":"' % key, b'"%s":"%d-' % (key, copy))
    start = line.index(b"[", line.index(b'"image_embedding"')) + 1
    stop = line.index(b"]", start)
    numbers = line[start:stop].split(b",")
    turn = copy % len(numbers)
    return line[:start] + b",".join(numbers[turn:] + numbers[:turn]) + line[stop:]


def resident(process: int) -> int:
    """Bytes that a process and those below it hold; 0 where it has gone."""
    try:
        pages = int(pathlib.Path(f"/proc/{process}/statm").read_text().split()[1])
        below = pathlib.Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 4096 * pages + sum(resident(int(child)) for child in below)


if __name__ == "__main__":
    launch(main, define_flags)
