"""Engines that score one query, each measured in a process of its own: `benchmarks.latency` starts them.

Nothing is imported here but what an engine needs: the time to its first answer counts.
"""

import json
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

SIZES = (20, 100, 1000)
FEATURES, TREES = 120, 300
Call = Callable[[int], object]  # scores query q
Made = Callable[[list], Call]  # of the queries of one size


def measure(engine: str, folder: pathlib.Path, calls: int) -> dict[str, Any]:
    """Seconds from the start of this process to the first answer, memory, and microseconds by size."""
    prepared = {n: _queries(folder, n) for n in SIZES}
    made = ENGINES[engine](folder)
    made(prepared[100])(0)
    row: dict[str, Any] = {"first_s": _age(), "memory_mb": _resident()}
    for n, queries in prepared.items():
        call = made(queries)
        for q in range(20):
            call(q % 20)
        times = []
        for q in range(calls if n < 1000 else max(calls // 5, 20)):
            start = time.perf_counter()
            call(q % 20)
            times.append(1e6 * (time.perf_counter() - start))
        row[str(n)] = dict(zip(("p50", "p95", "p99"), np.quantile(times, (0.5, 0.95, 0.99)), strict=True))
    return row


def _age() -> float:
    """Seconds since this process was started; Linux only."""
    started = int(pathlib.Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    uptime = float(pathlib.Path("/proc/uptime").read_text().split()[0])
    return uptime - started / os.sysconf("SC_CLK_TCK")


def _resident() -> float:
    """Megabytes (10^6 bytes) of memory at the peak so far; Linux only."""
    # Not getrusage: there a process begins with the peak of the one that started it.
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6


def _queries(folder: pathlib.Path, n: int) -> list[tuple[Any, np.ndarray, np.ndarray]]:
    from cotrr.deploy.scorer import Query

    arrays, (domains, constraints) = (
        np.load(folder / f"{n}.npz"),
        json.loads((folder / f"{n}.json").read_text()),
    )
    text, image, attributes = (arrays[name] for name in ("text", "image", "attributes"))
    return [(Query(text[q], domains[q], constraints[q]), image[q], attributes[q]) for q in range(20)]


def _contents(folder: pathlib.Path) -> Any:
    from cotrr.ranker import model_files

    return model_files.parse(model_files.read_files(folder), folder)


def numpy_scorer(folder: pathlib.Path) -> Made:
    """Ours."""
    from cotrr.deploy.scorer import Scorer

    scorer = Scorer(_contents(folder))
    return lambda queries: lambda q: scorer.score(*queries[q])


def onnx(folder: pathlib.Path) -> Made:
    """The same model as an ONNX graph."""
    from cotrr.deploy import onnx_model

    return _by_name(_contents(folder), onnx_model.runner((folder / "model.onnx").read_bytes()))


def jax_export(folder: pathlib.Path) -> Made:
    """The same model, compiled ahead of time for each length."""
    from cotrr.deploy import jax_export as exported

    return _by_name(_contents(folder), exported.runner((folder / "model.jaxexport").read_bytes()))


def _by_name(contents: Any, run: Callable) -> Made:
    from experiments.export import inputs_of

    return lambda queries: lambda q: run(inputs_of(contents, *queries[q]))


def torch(folder: pathlib.Path) -> Made:
    """A plain network on the concatenated embeddings and attributes."""
    import torch

    torch.set_num_threads(1)
    layers = [torch.nn.Linear(2 * 512 + 36, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32), torch.nn.ReLU(),
              torch.nn.Linear(32, 1)]  # fmt: skip
    network = torch.nn.Sequential(*layers).eval()

    def call(query: Any, image: np.ndarray, attributes: np.ndarray) -> Any:
        text = np.broadcast_to(query.text, image.shape)
        inputs = np.concatenate([text, image, np.nan_to_num(attributes), np.isnan(attributes)], axis=1)
        with torch.inference_mode():
            return network(torch.from_numpy(inputs.astype(np.float32))).numpy()

    return lambda queries: lambda q: call(*queries[q])


def _rows(queries: list) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.normal(size=(len(image), FEATURES)).astype(np.float32) for _, image, _ in queries]


def lightgbm(folder: pathlib.Path) -> Made:
    """Boosted trees."""
    import lightgbm

    model = lightgbm.Booster(model_file=folder / "lightgbm.txt")

    def made(queries: list) -> Call:
        rows = _rows(queries)
        return lambda q: model.predict(rows[q], num_threads=1)

    return made


def xgboost(folder: pathlib.Path) -> Made:
    """Boosted trees."""
    import xgboost

    model = xgboost.Booster({"nthread": 1}, model_file=folder / "xgboost.json")

    def made(queries: list) -> Call:
        rows = _rows(queries)
        return lambda q: model.inplace_predict(rows[q])

    return made


ENGINES: dict[str, Callable[[pathlib.Path], Made]] = {
    "NumPy": lambda folder: numpy_scorer(folder / "single"),
    "NumPy (8 members)": lambda folder: numpy_scorer(folder / "ensemble"),
    "onnxruntime": lambda folder: onnx(folder / "single"),
    "onnxruntime (8 members)": lambda folder: onnx(folder / "ensemble"),
    "JAX ahead of time": lambda folder: jax_export(folder / "single"),
    "JAX ahead of time (8 members)": lambda folder: jax_export(folder / "ensemble"),
    "PyTorch network": torch,
    "LightGBM": lightgbm,
    "XGBoost": xgboost,
}


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], pathlib.Path(sys.argv[2]), int(sys.argv[3]))))
