r"""A million queries scored, measured and bootstrapped on this machine's device, beside its limits.

    python -m benchmarks.device --output=device.json
    python -m benchmarks.device --quick

The same file runs on a CPU and on an accelerator; no stage asks which.  Lists are random and made before
any clock starts: a pool of batches that is gone through over and over, so what is resampled repeats and
memory holds the pool and never all lists.  Each stage is shown beside what nothing like it can beat, measured
in the same run: the copy of its embeddings to the device, the one matrix product that scoring cannot do
without, a sort of the scores, and the random words that as many counts need.
"""

import resource
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks import models
from benchmarks.timing import first_ms, median_ms
from cotrr import files
from cotrr.compilation import WIDE
from cotrr.config import launch
from cotrr.data.lists import Lists
from cotrr.evaluate import bootstrap, figures, ranking
from cotrr.ranker import artifact
from experiments.terminal import say

FLAGS = flags.FLAGS
WORDS = 2**22  # random words, or one resample's, that are made by one call
TOGETHER = 16  # calls that are timed together


def define_flags() -> None:
    """Flags of this benchmark."""
    flags.DEFINE_integer("queries", 1_000_000, "Queries, rounded up to whole batches.", lower_bound=1)
    flags.DEFINE_integer("candidates", 20, "Candidates of a query.", lower_bound=1)
    flags.DEFINE_integer("dim", 64, "Length of the embeddings.", lower_bound=1)
    flags.DEFINE_integer("folds", 5, "Lanes of the model beside its one final member.", lower_bound=1)
    flags.DEFINE_integer("resamples", 1000, "Bootstrap resamples.", lower_bound=1)
    flags.DEFINE_integer("batch", 10_000, "Queries of one call.", lower_bound=1)
    flags.DEFINE_integer("pool", 4, "Batches that are made, and gone through in turn.", lower_bound=1)
    flags.DEFINE_string("output", None, "JSON file for the figures.")
    flags.DEFINE_bool("quick", False, "4,000 queries in batches of 1,000.")


def main() -> None:
    """Runs the stages one after the other and prints a line for each."""
    queries, batch = (4_000, 1_000) if FLAGS.quick else (FLAGS.queries, FLAGS.batch)
    batches, devices = -(-queries // batch), jax.local_devices()
    model = models.random_model(FLAGS.dim, folds=FLAGS.folds)
    device = f"{len(devices)} × {devices[0].device_kind}"
    say(f"{batches * batch:,} queries × {FLAGS.candidates} candidates × {FLAGS.dim} numbers, "
        f"{FLAGS.folds + 1} lanes, {FLAGS.resamples:,} resamples, on {device}")  # fmt: skip
    pool = [models.random_lists(batch, FLAGS.candidates, FLAGS.dim, seed) for seed in range(FLAGS.pool)]
    stages, values = score_and_measure(model, pool, batches)
    stages += resample(values, FLAGS.resamples)
    if FLAGS.output:
        facts = {"device": device, "queries": batches * batch, "candidates": FLAGS.candidates,
                 "dim": FLAGS.dim, "lanes": FLAGS.folds + 1, "resamples": FLAGS.resamples}  # fmt: skip
        files.write_json(FLAGS.output, facts | {"stages": stages})
        say(f"wrote {FLAGS.output}")


def score_and_measure(
    model: artifact.Model, pool: list[Lists], batches: int
) -> tuple[list[dict[str, Any]], np.ndarray]:
    """What scoring and measuring take, and [Q, 8] the metrics of every query."""
    score = lambda lists: artifact.score(model, lists).logit
    first = first_ms(lambda: score(pool[0])) / 1e3
    ranking.per_query(score(pool[0]), pool[0])  # compiled for before the clock starts
    values, scoring, measuring = [], 0.0, 0.0
    for number in range(batches):
        lists = pool[number % len(pool)]
        start = time.perf_counter()
        logit = score(lists)
        scored = time.perf_counter()
        values.append(np.stack(list(ranking.per_query(logit, lists).values()), axis=1))
        scoring, measuring = scoring + scored - start, measuring + time.perf_counter() - scored
    queries, candidates = batches * len(pool[0].where), batches * pool[0].where.size
    moved = batches * (pool[0].image.nbytes + pool[0].text.nbytes)
    peak = peak_mb()  # before the limits take memory of their own
    rate = lambda seconds: {"queries/s": queries / seconds, "candidates/s": candidates / seconds} | peak
    limits = {"copy of the embeddings": batches * copy_s(pool[0]),
              "one product": candidates * product_s(model, pool[0])}  # fmt: skip
    return [
        stage("score", scoring, limits, rate(scoring) | {"GB/s": moved / scoring / 1e9, "first_s": first}),
        stage("measure", measuring, {"one sort": batches * sort_s(pool[0])}, rate(measuring)),
    ], np.concatenate(values)


def resample(values: np.ndarray, resamples: int) -> list[dict[str, Any]]:
    """What the sums alone of all metrics take, and what their figures with every kind of interval take."""
    engine = figures.engine(len(values), 0, resamples)
    ratios = [figures.mean(column, (0, 1)) for column in values.T]
    limits = {"random words": words_s(len(values), resamples)}
    tasks: dict[str, Callable[[], object]] = {
        "sums": lambda: bootstrap.weighted_sums(engine.draw, values),
        "figures": lambda: engine.figures(ratios),
    }
    stages = []
    for name, work in tasks.items():
        first, seconds = first_ms(work) / 1e3, first_ms(work) / 1e3
        more = {"resamples/s": resamples / seconds, "G counts/s": resamples * len(values) / seconds / 1e9,
                "first_s": first}  # fmt: skip
        stages.append(stage(name, seconds, limits, more | peak_mb()))
    return stages


def copy_s(lists: Lists) -> float:
    """Seconds in which a batch's embeddings are copied to the device."""
    copy = partial(jax.device_put, device=jax.local_devices()[0], may_alias=False)
    return median_ms(lambda: jax.block_until_ready(copy((lists.image, lists.text)))) / 1e3


def product_s(model: artifact.Model, lists: Lists) -> float:
    """Seconds a candidate of the product of images with all axes and words of every lane, in batches."""
    images = lists.image.reshape(-1, lists.image.shape[-1])[: artifact.pace().candidates]
    parts = model.statistics.image_axes, model.statistics.word_axes.transpose(0, 2, 1)
    axes = np.concatenate([lane for part in parts for lane in part], axis=1)
    images, axes = jax.device_put((images, axes))
    product = jax.jit(partial(jnp.matmul, precision="highest"))
    again = lambda: jax.block_until_ready([product(images, axes) for _ in range(TOGETHER)])
    return median_ms(again) / 1e3 / TOGETHER / len(images)


def sort_s(lists: Lists) -> float:
    """Seconds in which as many scores as a batch has are sorted by query."""
    scores, order = jax.device_put(lists.y), jax.jit(partial(jnp.sort, axis=1))
    return median_ms(lambda: order(scores).block_until_ready()) / 1e3


def words_s(units: int, resamples: int) -> float:
    """Seconds in which all devices, or cores of a CPU, make a word for each count; measured on some."""
    rows = max(1, WORDS // units)

    @partial(jax.jit, compiler_options=WIDE)
    def largest(start: jax.Array) -> jax.Array:  # so that no word need be kept
        row = (start + jnp.arange(rows, dtype=jnp.uint32))[:, None]
        pair = jnp.arange(-(-units // 2), dtype=jnp.uint32)[None]
        key = (jnp.zeros((1, 1), jnp.uint32),) * 2
        first, second = bootstrap.threefry(jnp, key, pair + jnp.zeros_like(row), row + jnp.zeros_like(pair))
        return jnp.maximum(first, second).max(axis=1)

    made = median_ms(lambda: bootstrap.over_devices(largest, TOGETHER * rows, rows, ()), 3) / 1e3
    return made * resamples / (TOGETHER * rows)


def peak_mb() -> dict[str, float]:
    """The most memory so far: of this process and, where the backend tells, of its first device."""
    found = {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6}
    if statistics := jax.local_devices()[0].memory_stats():
        found["device_peak_mb"] = statistics["peak_bytes_in_use"] / 1e6
    return found


def stage(name: str, seconds: float, limits: dict[str, float], more: dict[str, float]) -> dict[str, Any]:
    """The figures of a stage, told in a line; its limits are in seconds."""
    told = [f"{value:,.{2 if value < 100 else 0}f} {unit}" for unit, value in more.items() if "/" in unit]
    told += [f"first call {more['first_s']:.1f} s"] if "first_s" in more else []
    told += [f"{limit} alone {least:.2f} s ({least / seconds:.0%})" for limit, least in limits.items()]
    told += [f"{key.removesuffix('_mb').replace('_', ' ')} {value:,.0f} MB"
             for key, value in more.items() if key.endswith("_mb")]  # fmt: skip
    say(f"{name:<8} {seconds:8.2f} s  " + "  ".join(told))
    return {"stage": name, "seconds": seconds, "limits_s": limits} | more


if __name__ == "__main__":
    launch(main, define_flags)
