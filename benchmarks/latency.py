r"""How long one query takes, in one thread: the scorer that serves, and what else one could serve with.

    python -m benchmarks.latency --output=latency.json        # peers: benchmarks/requirements.txt

Each engine has a process of its own, which says how long it takes from its start to its first answer, what
memory it then holds, and the quantiles of further calls.  NumPy, onnxruntime and JAX score the very same
model (random weights; folds and members as trained); the network in PyTorch (2 · 512 + 36 → 64 → 32 → 1) and
the trees (300 of depth 6, 120 features that cost them nothing here) are what people have instead.
Microseconds are p50 / p95.
"""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np
from absl import flags

from benchmarks import models
from benchmarks.engines import ENGINES, FEATURES, SIZES, TREES
from cotrr import files
from cotrr.config import launch
from cotrr.deploy import jax_export, onnx_model
from experiments.terminal import say

FLAGS = flags.FLAGS
ONE_THREAD = {name: "1" for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")} | {
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    "JAX_CPU_ENABLE_ASYNC_DISPATCH": "false", "JAX_PLATFORMS": "cpu",
}  # fmt: skip


def define_flags() -> None:
    """Flags of this benchmark."""
    flags.DEFINE_integer("calls", 2000, "Calls of each engine and size.", lower_bound=20)
    flags.DEFINE_string("output", None, "JSON file for the figures.")
    flags.DEFINE_bool("quick", False, "200 calls.")
    flags.DEFINE_list("engines", list(ENGINES), "Which of them.")


def main() -> None:
    """Measures each engine in a process of its own."""
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        prepare(pathlib.Path(folder))
        say(f"{'':<34} {'first answer':>12} {'memory':>8}" + "".join(f"{n:>9} candidates" for n in SIZES))
        for engine in FLAGS.engines:
            rows[engine] = _in_a_process(engine, folder)
            say(_line(engine, rows[engine]))
    if FLAGS.output:
        files.write_json(FLAGS.output, rows)
        say(f"wrote {FLAGS.output}")


def prepare(folder: pathlib.Path) -> None:
    """Writes the models and the queries that all engines get."""
    for name, members in (("single", 1), ("ensemble", 8)):
        model = models.random_model(members=members)
        contents = models.save(model, folder / name)
        (folder / name / "model.onnx").write_bytes(onnx_model.build(contents))
        (folder / name / "model.jaxexport").write_bytes(jax_export.build(model))
    for n in SIZES:
        lists = models.random_lists(20, n, seed=n)
        np.savez(folder / f"{n}.npz", text=lists.text, image=lists.image, attributes=lists.attributes)
        (folder / f"{n}.json").write_text(json.dumps([list(lists.domain), lists.constraints]))
    _train_trees(folder)


def _train_trees(folder: pathlib.Path) -> None:
    """Trees that regress a sum of five of the features; what is not installed is left out."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(20_000, FEATURES)).astype(np.float32)
    y = x[:, :5].sum(axis=1) + rng.normal(size=len(x))
    with contextlib.suppress(ImportError):
        import lightgbm

        settings = {"num_leaves": 63, "max_depth": 6, "verbose": -1}
        lightgbm.train(settings, lightgbm.Dataset(x, y), TREES).save_model(folder / "lightgbm.txt")
    with contextlib.suppress(ImportError):
        import xgboost

        xgboost.train({"max_depth": 6}, xgboost.DMatrix(x, y), TREES).save_model(folder / "xgboost.json")


def _in_a_process(engine: str, folder: str) -> dict[str, Any]:
    calls = 200 if FLAGS.quick else FLAGS.calls
    command = [sys.executable, "-m", "benchmarks.engines", engine, folder, str(calls)]
    done = subprocess.run(command, env=os.environ | ONE_THREAD, capture_output=True, text=True)
    if done.returncode:
        return {"why": (done.stderr.strip().splitlines() or ["failed"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def _line(engine: str, row: dict[str, Any]) -> str:
    if "why" in row:
        return f"{engine:<34} {row['why'][:80]}"
    cells = "".join(f"{row[str(n)]['p50']:>10,.0f} /{row[str(n)]['p95']:>8,.0f}" for n in SIZES)
    return f"{engine:<34} {row['first_s']:>10.2f} s {row['memory_mb']:>5.0f} MB{cells}"


if __name__ == "__main__":
    launch(main, define_flags)
