"""A run ten times larger than the memory that a job is allowed goes through, where it gets no more."""

import pathlib
import subprocess
import sys

import pytest

from benchmarks import models
from benchmarks.scale import repeat
from cotrr.data.simulator import Simulation, write_run

ROOT = pathlib.Path(__file__).resolve().parents[1]
ALLOWED = 24e6  # bytes, on top of what libraries take for a small run
LIMITED = """
import json, pathlib, resource, sys
from cotrr.data import generation, parts, runs
from cotrr.deploy import rerank

work, allowed = pathlib.Path(sys.argv[1]), int(float(sys.argv[2]))

def generate(run):
    job = generation.Job(str(work / f"data-{run}"), 10**6, (0.7, 0.15, 0.15), 0.7, "cotrr", "strict")
    generation.generate(runs.find_run(work / run), job, None, map, lambda _: None)

def rerank_all(run):
    version = json.loads((work / "model" / "model.json").read_text())["version"]
    job = rerank.Job(str(work / "model"), version, 20, False, str(work / f"out-{run}"), 10**6)
    rerank.rerank_run(runs.find_run(work / run), job, map, lambda _: None)

def at_once(run):
    runs.read_run(work / run, workers=1)

job = {"generate": generate, "rerank": rerank_all, "at_once": at_once}[sys.argv[3]]
job("small")
taken = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (1024 * taken + allowed,) * 2)
job("large")
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A model, a run of some megabytes, and one of ten times the allowed memory."""
    work = tmp_path_factory.mktemp("memory")
    models.save(models.random_model(folds=2), work / "model")
    write_run(Simulation(queries=16, candidates=40, embedding_dim=512), work / "one")
    size = repeat(work / "one", work / "small", 1)
    assert repeat(work / "one", work / "large", int(10 * ALLOWED / size) + 1) >= 10 * ALLOWED
    return work


def run(work: pathlib.Path, job: str) -> subprocess.CompletedProcess:
    # The stacks of threads that start late would count as taken.
    names = "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "ARROW_IO_THREADS", "MALLOC_ARENA_MAX"
    environment = dict.fromkeys(names, "1") | {"ARROW_DEFAULT_MEMORY_POOL": "system", "PATH": ""}
    return subprocess.run([sys.executable, "-c", LIMITED, work, str(ALLOWED), job], cwd=ROOT, text=True,
                          env=environment, capture_output=True)  # fmt: skip


@pytest.mark.parametrize("job", ["generate", "rerank"])
def test_ten_times_the_memory(work, job):
    done = run(work, job)
    assert done.returncode == 0, done.stderr


def test_the_limit_bites(work):
    done = run(work, "at_once")
    assert done.returncode
    assert "MemoryError" in done.stderr
