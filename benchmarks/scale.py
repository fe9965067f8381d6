r"""Whether a run may grow: rows a second and memory of `rerank` in parts at 1, 10 and 100 times the rows.

    python -m benchmarks.scale --output=scale.json

A simulated run is written over and over with other query ids, so nothing about its lines changes as it
grows.  Each size is reranked by a launcher of its own, and memory is the largest sum of what is resident
in it and its workers.  The line through seconds and rows is fitted to all sizes; what it says of 10^9
rows is arithmetic, printed with what it leaves out.
"""

import json
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

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
    flags.DEFINE_list("times", ["1", "10", "100"], "Sizes, as multiples of the smallest.")
    flags.DEFINE_enum("runner", "local", sorted(shards.RUNNERS), "What works on the parts.")
    flags.DEFINE_float("part_mb", 4, "Megabytes of the run in a part.", lower_bound=0.001)
    flags.DEFINE_string("output", None, "JSON file for the figures.")


def main() -> None:
    """Measures each size and prints the line through them."""
    with tempfile.TemporaryDirectory() as name:
        work = pathlib.Path(name)
        models.save(models.random_model(FLAGS.dim), work / "model")
        simulation = Simulation(queries=FLAGS.queries, candidates=FLAGS.candidates, embedding_dim=FLAGS.dim)
        write_run(simulation, work / "one")
        facts = [measure(work, int(times)) for times in FLAGS.times]
    rows, seconds, peak = (
        np.array([fact[name] for fact in facts]) for name in ("rows", "seconds", "peak_mb")
    )
    slope, start = np.polyfit(rows, seconds, 1)
    grows = 1e6 * np.polyfit(rows, peak, 1)[0]
    away, hours, cores = (
        np.abs(seconds - (start + slope * rows)).max(),
        slope * BILLION / 3600,
        shards.cores(),
    )
    rate = facts[-1]["mb"] / facts[-1]["rows"] / slope / cores
    say(f"{start:.1f} s and {1e6 * slope:.1f} µs a row; no size is more than {away:.1f} s off that line")
    say(f"memory grows by {grows:.0f} bytes a row: the ids in the manifest, and 8 bytes a query")
    say(
        f"10^9 rows: {hours:.0f} hours on these {cores} cores, {hours * cores:.0f} core-hours; 100 cores "
        f"of a Ray cluster: {hours * cores / 100:.1f} hours, where storage gives them {100 * rate:,.0f} MB/s"
    )
    say(f"and {grows:.0f} GB in the process that hands out parts, so rather in run folders of 10^8 rows")
    if FLAGS.output:
        files.write_json(FLAGS.output, {"sizes": facts, "start_s": start, "row_us": 1e6 * slope})


def measure(work: pathlib.Path, times: int) -> dict[str, Any]:
    """What a run of so many times the rows takes."""
    run, output = work / f"run{times}", work / f"out{times}"
    size = repeat(work / "one", run, times)
    call = [sys.executable, "-m", "experiments.rerank", f"--model={work / 'model'}", f"--input={run}",
            f"--output={output}", f"--runner={FLAGS.runner}", f"--part_mb={FLAGS.part_mb}"]  # fmt: skip
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen(call, cwd=ROOT, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, resident(process.pid))
        time.sleep(0.02)
    seconds = time.perf_counter() - start
    made = json.loads((output / "manifest.json").read_text())
    fact = {"rows": made["rows"], "mb": size / 1e6, "parts": len(made["parts"]), "seconds": seconds,
            "peak_mb": peak / 1e6}  # fmt: skip
    say(f"  {made['rows']:>9,} rows {size / 1e6:8,.0f} MB {len(made['parts']):5,} parts {seconds:7.1f} s "
        f"{made['rows'] / seconds:9,.0f} rows/s  peak {peak / 1e6:5,.0f} MB")  # fmt: skip
    return fact


def repeat(one: pathlib.Path, run: pathlib.Path, times: int) -> int:
    """Writes a run that holds the lines of one so many times, with new query ids; returns its bytes."""
    run.mkdir()
    manifest = json.loads((one / "manifest.json").read_text())
    items = manifest["items_by_stage"]["scored"]
    manifest["items_by_stage"] = {"scored": [f"{copy}-{item}" for copy in range(times) for item in items]}
    (run / "manifest.json").write_text(json.dumps(manifest))
    content = (one / "scored.jsonl").read_bytes()
    with open(run / "scored.jsonl", "wb") as out:
        for copy in range(times):
            out.write(content.replace(b'"query_id":"', b'"query_id":"%d-' % copy))
        return out.tell()


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
