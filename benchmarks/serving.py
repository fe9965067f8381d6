r"""The HTTP service under load on the loopback interface: latencies, errors, memory, swaps in the middle.

    python -m benchmarks.serving --output=serving.json

A model of realistic size (random weights, 512-d embeddings, 6 lanes) is registered twice and served by
`experiments.serve`; clients keep their connections.  Each body is sent as fast as answers come, then at a
fixed rate; there latency counts from the moment when a request was due, so waiting behind a slow one
counts.  In the middle of each phase another version goes live.  Clients and service share the machine.
"""

import concurrent.futures
import contextlib
import http.client
import json
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from cotrr import files
from cotrr.config import launch
from cotrr.deploy import candidates as requests
from cotrr.deploy.messages import ARRAYS, JSON
from cotrr.deploy.registry import Draft, Registry
from cotrr.ranker import artifact, calibrators, model_files
from cotrr.ranker.encoding import Vocabulary
from cotrr.ranker.features import Statistics
from cotrr.store import LocalStore
from experiments.terminal import say

FLAGS = flags.FLAGS
DIM, LANES, DOMAINS, ATTRIBUTES = 512, 6, 4, len(requests.NAMES)
COLORS = ("amber", "blue", "clear", "green", "pink", "red", "white", "yellow")
KEYS = ("color", "garnish", "glass", "ice")


def define_flags() -> None:
    """Flags of this benchmark."""
    flags.DEFINE_float("seconds", 60, "How long all phases take together.", lower_bound=2)
    flags.DEFINE_bool("quick", False, "5 seconds.")
    flags.DEFINE_integer("clients", 4, "Connections.", lower_bound=1)
    flags.DEFINE_integer("candidates", 100, "Candidates of a request.", lower_bound=1)
    flags.DEFINE_float("arrays_rate", 60, "Requests a second with arrays, where the rate is fixed.")
    flags.DEFINE_float("json_rate", 15, "Requests a second in JSON, where the rate is fixed.")
    flags.DEFINE_string("output", None, "JSON file for the figures.")


def main() -> None:
    """Serves, loads, prints a line per phase."""
    seconds = 5 if FLAGS.quick else FLAGS.seconds
    bodies = make_bodies(np.random.default_rng(0), FLAGS.candidates)
    say(
        f"{FLAGS.candidates} candidates: "
        + ", ".join(f"{kind} {len(b):,} bytes" for kind, b in bodies.items())
    )
    phases = [(kind, rate, share) for kind, fixed in ((ARRAYS, FLAGS.arrays_rate), (JSON, FLAGS.json_rate))
              for rate, share in ((0.0, 1 / 6), (fixed, 1 / 3))]  # fmt: skip
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        registry = make_registry(pathlib.Path(folder))
        with serving(f"{folder}/registry") as port:
            for kind, body in bodies.items():  # the first requests and swaps are slower, and take up memory
                load(port, kind, body, 0.0, 0.5)
                swap(registry)
                time.sleep(0.5)
            for kind, rate, share in phases:
                rows.append(phase(registry, port, kind, bodies[kind], rate, share * seconds))
    if FLAGS.output:
        files.write_json(FLAGS.output, {"phases": rows})
        say(f"wrote {FLAGS.output}")


def phase(
    registry: Registry, port: int, kind: str, body: bytes, rate: float, seconds: float
) -> dict[str, Any]:
    """Loads the service, lets another version go live in the middle, and says how it went."""
    before = resident(port)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        loading = pool.submit(load, port, kind, body, rate, seconds)
        time.sleep(seconds / 2)
        swap(registry)
        answers = loading.result()
    times = 1e3 * np.array([answer.seconds for answer in answers])
    p50, p95, p99 = np.percentile(times, [50, 95, 99]).tolist()
    row = {"body": kind, "rate": rate or None, "requests": len(answers), "per_second": len(answers) / seconds,
           "p50_ms": p50, "p95_ms": p95, "p99_ms": p99, "longest_ms": float(times.max()),
           "errors": sum(answer.label == "" for answer in answers),
           "versions": sorted({answer.label for answer in answers} - {""}),
           "resident_mb": [before / 1e6, resident(port) / 1e6]}  # fmt: skip
    say(f"{kind:<29} {f'{rate:g}/s' if rate else 'as fast as it goes':<19}{row['per_second']:>6.0f}/s   "
        f"p50 {p50:.2f}  p95 {p95:.2f}  p99 {p99:.2f}  max {times.max():.1f} ms   {row['errors']} errors   "
        f"{' → '.join(row['versions'])}   {before / 1e6:.1f} → {row['resident_mb'][1]:.1f} MB")  # fmt: skip
    return row


def swap(registry: Registry) -> None:
    """Makes the other version the challenger, which is what is served: a champion would need evidence."""
    other = lambda state: "v1" if state.aliases.get("challenger") == "v2" else "v2"
    registry.append(lambda state: _challenger(other(state)))


def _challenger(version: str) -> Draft:
    return Draft(kind="alias", actor="benchmark", version=version, facts={"alias": "challenger"})


class Answered(NamedTuple):
    """How long an answer took, and the label of the version that gave it; "" of an error."""

    seconds: float
    label: str


def load(port: int, kind: str, body: bytes, rate: float, seconds: float) -> list[Answered]:
    """Requests from several connections at once; `rate` a second in all, 0: as fast as answers come."""
    with concurrent.futures.ThreadPoolExecutor(FLAGS.clients) as pool:
        start = time.perf_counter()
        work = [pool.submit(ask, port, kind, body, rate and FLAGS.clients / rate,
                            start + (client / rate if rate else 0), start + seconds)
                for client in range(FLAGS.clients)]  # fmt: skip
        return [answer for one in work for answer in one.result()]


def ask(port: int, kind: str, body: bytes, every: float, due: float, end: float) -> list[Answered]:
    """One connection's requests, the first at `due`, `every` so many seconds (0: at once) until `end`."""
    answers = []
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as client:
        while (due := max(due, time.perf_counter()) if not every else due) < end:
            time.sleep(max(due - time.perf_counter(), 0))
            try:
                client.request("POST", "/rerank", body, {"content-type": kind})
                response = client.getresponse()
                content = response.read()
                good = response.status == 200 and b'"fallback":""' in content[:200]
            except (OSError, http.client.HTTPException):
                client.close()
                good, content = False, b""
            label = json.loads(content)["label"] if good else ""
            answers.append(Answered(time.perf_counter() - due, label))
            due += every
    return answers


@contextlib.contextmanager
def serving(registry: str) -> Iterator[int]:
    """The port of a service that follows a registry; it must end with status 0."""
    command = [sys.executable, "-m", "experiments.serve", f"--registry={registry}", "--version=challenger",
               "--port=0", "--refresh_seconds=0.2"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        said = process.stdout.readline()
        found = re.search(r":(\d+) ", said)
        assert found, said
        yield int(found[1])
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0, "the service did not end well"
    finally:
        process.kill()
        process.wait()


def resident(port: int) -> float:
    """Bytes that the service says it has in memory."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as client:
        client.request("GET", "/metrics")
        text = client.getresponse().read().decode()
    (line,) = re.findall(r"^cotrr_resident_bytes (\d+)$", text, re.MULTILINE)
    return float(line)


def make_bodies(rng: np.random.Generator, count: int) -> dict[str, bytes]:
    """The same request in both forms."""
    image, text = rng.normal(size=(count, DIM)).astype(np.float32), rng.normal(size=DIM).astype(np.float32)
    values = rng.uniform(size=(count, ATTRIBUTES)).astype(np.float32)
    values[:, -len(requests.COUNTED) :] = 0
    query = {"domain": "d1", "constraints": {key: COLORS[i] for i, key in enumerate(KEYS)}}
    stated = [dict(zip(requests.STATED, row, strict=False)) for row in values.tolist()]
    said = [row | {"id": f"p{i}", "image_embedding": image[i].tolist(), "conflicts": []}
            for i, row in enumerate(stated)]  # fmt: skip
    full = {"query": query | {"text_embedding": text.tolist()}, "candidates": said}
    return {
        ARRAYS: requests.pack(query | {"text_embedding": text}, image, values),
        JSON: json.dumps(full).encode(),
    }


def make_registry(folder: pathlib.Path) -> Registry:
    """A registry with two versions, the first of them the challenger."""
    registry = Registry(LocalStore(folder / "registry"))
    for number in (1, 2):
        artifact.save(make_model(np.random.default_rng(number)), folder / f"model{number}")
        registry.register(model_files.read_files(folder / f"model{number}"), {}, "benchmark")
    registry.append(lambda _: _challenger("v1"))
    return registry


def make_model(rng: np.random.Generator) -> artifact.Model:
    """A model with the shapes of the default recipe and random weights."""
    drawn = lambda size, *shape: (size * rng.normal(size=(LANES, *shape))).astype(np.float32)
    filled = lambda value, *shape: np.full((LANES, *shape), value, np.float32)
    words = tuple(sorted([*KEYS, *(f"{key}={color}" for key in KEYS for color in COLORS)]))
    word_key = np.array([[word.startswith(f"{key}=") for word in words] for key in KEYS], np.float32)
    places, image, text = len(words), 64, 16
    statistics = Statistics(
        mean=filled(0.5, DOMAINS + 1, ATTRIBUTES), scale=filled(1, DOMAINS + 1, ATTRIBUTES),
        missing=filled(0.5, ATTRIBUTES), label_scale=filled(1, DOMAINS + 1),
        image_mean=drawn(0.1, DIM), image_axes=drawn(0.05, DIM, image),
        text_mean=drawn(0.1, DIM), text_axes=drawn(0.05, DIM, text),
        rule_mean=drawn(1), rule_scale=filled(1), word_axes=drawn(0.05, places, DIM),
        word_key=np.broadcast_to(word_key, (LANES, *word_key.shape)), match_scale=filled(1, 2 * len(KEYS)),
    )  # fmt: skip
    query, candidate = 1 + places + text, 2 * ATTRIBUTES + image + 2 * len(KEYS)
    params = {"query_weights": drawn(0.02, query, candidate, 2), "query_offset": drawn(0.1, query, 2),
              "bias": drawn(1, 2), "base_scale": filled(1, 2)}  # fmt: skip
    config = {"groups": "clip,so,conflict", "without": "", "hidden": 0}
    seen = {key: artifact.hashes(key, np.array(["none"], object)) for key in ("query_id", "canonical_id")}
    vocabulary, final = (
        Vocabulary(tuple(f"d{i}" for i in range(DOMAINS)), words),
        np.arange(LANES) == LANES - 1,
    )
    return artifact.Model("benchmark", config, vocabulary, statistics, {"params": params}, final,
                          calibrators.NONE, {}, seen)  # fmt: skip


if __name__ == "__main__":
    launch(main, define_flags)
