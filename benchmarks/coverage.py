r"""How often intervals hold the truth and tests are wrong, by simulation.

    python -m benchmarks.coverage --output=coverage.json

Every data set is new and its truth known.  A line gives the share of the data sets in which an interval
holds the truth (nominal .95) or a test cries wolf (.05), ± 1.96 standard errors of that share.
"""

import time
from collections.abc import Callable

import numpy as np
from absl import flags

from cotrr import files
from cotrr.config import launch
from cotrr.evaluate import bootstrap, calibration, comparisons, figures, intervals, probabilities
from cotrr.evaluate.probabilities import Judged
from experiments.terminal import say

FLAGS = flags.FLAGS
KINDS = ("percentile", "basic", "bca", "studentised", "wilson")
SETS = 50  # data sets that share their resamples; the next ones have another seed


def define_flags() -> None:
    """Flags of this benchmark."""
    flags.DEFINE_integer("trials", 2000, "Data sets of each case.", lower_bound=SETS)
    flags.DEFINE_integer("resamples", 1000, "Resamples of each.", lower_bound=100)
    flags.DEFINE_string("output", None, "JSON file for the figures.")
    flags.DEFINE_bool("quick", False, "200 data sets of each case.")


def main() -> None:
    """Runs every case and prints its lines."""
    trials, rows, start = 200 if FLAGS.quick else FLAGS.trials, {}, time.monotonic()
    for case in (
        skewed_mean,
        narrow_share,
        paired,
        clustered,
        pooled_auc,
        calibration_error,
        sign_flips,
        consistency,
    ):
        found = case(trials, FLAGS.resamples)
        say(f"{case.__doc__}  ({time.monotonic() - start:.0f} s)")
        for name, inside in found.items():
            share = float(np.mean(inside))
            rows[f"{case.__name__}: {name}"] = {"share": share, "trials": len(inside)}
            say(f"    {name:<44} {share:.3f} ± {1.96 * np.sqrt(share * (1 - share) / len(inside)):.3f}")
    if FLAGS.output:
        files.write_json(FLAGS.output, {"resamples": FLAGS.resamples, "shares": rows})
        say(f"wrote {FLAGS.output}")


Held = dict[str, list[bool]]  # by kind: of each data set, whether its interval holds the truth


def _of_means(
    trials: int,
    resamples: int,
    n: int,
    draw: Callable[[np.random.Generator], np.ndarray],
    truth: float,
    clusters: np.ndarray | None = None,
    bounds: tuple[float, float] = (0, 1),
) -> Held:
    """Whether the intervals of a mean hold it, over data sets `draw(rng) → [n]`."""
    held: Held = {}
    for block in range(trials // SETS):
        rng = np.random.default_rng([n, block])
        engine = figures.engine(n, block, resamples, clusters)
        for figure in engine.figures([figures.mean(draw(rng), bounds) for _ in range(SETS)]):
            nothing = [np.nan, np.nan]  # an interval of no width is not given, and holds nothing
            given = {kind: figure["intervals"].get(kind, nothing) for kind in KINDS}
            for kind, (low, high) in {**given, "as shown": figure["ci"] or nothing}.items():
                held.setdefault(kind, []).append(low <= truth <= high)
    return {kind: inside for kind, inside in held.items() if any(inside)}


def skewed_mean(trials: int, resamples: int) -> Held:
    """A skewed metric like nDCG, 50 queries: Beta(3, 0.4)"""
    return _of_means(trials, resamples, 50, lambda rng: rng.beta(3, 0.4, 50), 3 / 3.4)


def narrow_share(trials: int, resamples: int) -> Held:
    """A 0/1 metric near its edge, 50 queries, p = .97"""
    found = _of_means(trials, resamples, 50, lambda rng: (rng.random(50) < 0.97).astype(float), 0.97)
    hits = np.random.default_rng(1).binomial(50, 0.97, trials)
    low, high = intervals.jeffreys(hits, np.full(trials, 50.0))
    return found | {"jeffreys": list((low <= 0.97) & (high >= 0.97))}


def paired(trials: int, resamples: int) -> Held:
    """A paired difference of two skewed metrics, 50 queries"""

    def draw(rng: np.random.Generator) -> np.ndarray:
        hard = rng.beta(4, 1, 50)
        return hard ** rng.gamma(2, 0.5, 50) - hard

    truth = float(np.mean([draw(np.random.default_rng([9, k])).mean() for k in range(40_000)]))
    return _of_means(trials, resamples, 50, draw, truth, bounds=(-1, 1))


def clustered(trials: int, resamples: int) -> Held:
    """Queries in clusters of 8 that go together (intraclass correlation .5), 50 clusters"""
    cluster, wide = np.repeat(np.arange(50), 8), (-np.inf, np.inf)
    draw = lambda rng: rng.normal(size=50)[cluster] + rng.normal(size=400)
    held: Held = {}
    for name, unit in {"clusters": cluster, "queries": None}.items():
        found = _of_means(trials, resamples, 400, draw, 0.0, unit, wide)
        held[f"studentised over {name}"] = found["studentised"]
    return held


def _items(rng: np.random.Generator, queries: int = 100, candidates: int = 20) -> Judged:
    """Candidates whose scores and outcomes hang together inside a query."""
    query = np.repeat(np.arange(queries), candidates)
    ease = rng.normal(size=queries)[query]
    outcome = rng.random(len(query)) < 1 / (1 + np.exp(-1.5 * ease))
    logit = 1.2 * outcome + 1.0 * ease + rng.normal(size=len(query))
    return Judged(query, 1 / (1 + np.exp(-logit)), outcome.astype(float))


def pooled_auc(trials: int, resamples: int) -> Held:
    """Pooled AUC, 100 queries of 20 candidates that hang together inside a query"""
    everyone = _items(np.random.default_rng(5), 50_000)
    truth = probabilities.pooled_auc(figures.engine(50_000, 0, 1), everyone)["value"]
    held: Held = {}
    for k in range(trials // 4):
        judged = _items(np.random.default_rng([6, k]))
        found = probabilities.pooled_auc(figures.engine(100, k, resamples), judged)
        alone = judged._replace(query=np.arange(len(judged.query)))
        items = probabilities.pooled_auc(figures.engine(len(alone.query), k, resamples, backend="jax"), alone)
        for name, (low, high) in {**found["intervals"], "percentile over candidates": items["ci"]}.items():
            held.setdefault(name, []).append(low <= truth <= high)
    return held


def calibration_error(trials: int, resamples: int) -> Held:
    """ECE of p against p^1.3 (and of a calibrated model: truth 0), 100 queries of 20 candidates"""
    held: Held = {}
    for name, power in {"miscalibrated": 1.3, "calibrated": 1.0}.items():
        grid = (np.arange(1_500_000) + 0.5) / 1_500_000
        row = calibration.bin_of(grid)
        sums = calibration.bin_sums(np.zeros(len(grid), int), grid, grid**power, row, 1)[0]
        gaps = (sums[:, 1] - sums[:, 2]) / sums[:, 0]
        truths = {"debiased ECE": np.sqrt((gaps**2).mean()), "plug-in ECE": np.abs(gaps).mean()}
        for k in range(trials // 4):
            rng = np.random.default_rng([8, k])
            p = rng.random(2000)
            judged = Judged(np.repeat(np.arange(100), 20), p, (rng.random(2000) < p**power).astype(float))
            engine = figures.engine(100, k, resamples)
            bins = probabilities.resample_bins(engine, judged, calibration.bin_of(p))
            found = {"debiased ECE": probabilities.debiased_ece(engine, judged),
                     "plug-in ECE": probabilities.binned_ece(engine, judged, bins)}  # fmt: skip
            for error, figure in found.items():
                for kind, (low, high) in figure["intervals"].items():
                    inside = low - 1e-9 <= truths[error] <= high + 1e-9
                    held.setdefault(f"{name}, {error}, {kind}", []).append(inside)
    return held


def sign_flips(trials: int, resamples: int) -> Held:
    """False alarms of tests without any difference, 50 queries, 24 correlated hypotheses"""
    alarms: Held = {
        name: [] for name in ("one hypothesis", "any of 24", "any of 24, Holm", "any of 24, max-T")
    }
    for k in range(trials):
        rng = np.random.default_rng([10, k])
        apart = 0.7 * rng.normal(size=(50, 1)) + 0.7 * rng.normal(size=(50, 24))
        single, joint = comparisons.sign_flip(bootstrap.Draw(k, resamples, 50), apart)
        least = (single[0], single.min(), comparisons.holm(single).min(), joint.min())
        for name, p in zip(alarms, least, strict=True):
            alarms[name].append(p <= 0.05)
    return alarms


def consistency(trials: int, resamples: int) -> Held:
    """False alarms of "is it calibrated?", outcomes independent or hanging together by query"""
    alarms: Held = {}
    for name, own in {"independent": 1.0, "by query": 0.3}.items():
        for k in range(trials // 4):
            rng = np.random.default_rng([11, k])
            query = np.repeat(np.arange(100), 20)
            # Each outcome compares p with a uniform of its own or of its query: its share is p all the same.
            shared, alone = rng.random(100)[query], rng.random(len(query))
            drawn = np.where(rng.random(len(query)) < own, alone, shared)
            p = rng.random(len(query))
            judged = Judged(query, p, (drawn < p).astype(float))
            found = probabilities.calibrated(figures.engine(100, k, resamples), judged)["consistency"]
            for kind in ("p", "p_by_query"):
                alarms.setdefault(f"outcomes {name}, {kind}", []).append(found[kind] <= 0.05)
    return alarms


if __name__ == "__main__":
    launch(main, define_flags)
