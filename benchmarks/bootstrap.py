r"""How fast intervals are, beside what people would use instead, in one run on this machine.

    pip install -r benchmarks/requirements.txt
    python -m benchmarks.bootstrap --output=bootstrap.json

Without the peers (a GPU machine, say) `--nopeers` measures our side alone: same file, any device.
A loop over resamples costs the same each time, so scikit-learn and netcal are measured on a few and
multiplied.  Ours gives percentile, basic, BCa and studentised intervals, or max-T p-values, at once.
"""

import functools
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from scipy import stats

from benchmarks.timing import first_ms, median_ms, peak_mb
from cotrr import files
from cotrr.config import launch
from cotrr.evaluate import bootstrap, calibration, comparisons, figures, probabilities
from cotrr.evaluate.figures import Engine
from cotrr.evaluate.probabilities import Judged
from experiments.terminal import say

FLAGS = flags.FLAGS
METRICS = 8
LOOPS = 10  # resamples that a peer's loop is measured on


def define_flags() -> None:
    """Flags of this benchmark."""
    flags.DEFINE_list("queries", ["300", "3000", "30000"], "Numbers of queries.")
    flags.DEFINE_integer("candidates", 100, "Candidates of each query, for AUC and ECE.")
    flags.DEFINE_integer("resamples", 1000, "Bootstrap resamples.")
    flags.DEFINE_bool("peers", True, "Measure scipy, scikit-learn, netcal and ranx too.")
    flags.DEFINE_string("output", None, "JSON file for the figures.")
    flags.DEFINE_bool("quick", False, "300 queries of 20 candidates.")


def main() -> None:
    """Measures every task at every size and prints medians and ratios."""
    sizes, candidates = [int(q) for q in FLAGS.queries], FLAGS.candidates
    if FLAGS.quick:
        sizes, candidates = [300], 20
    device = jax.devices()[0]
    sizes_told = f"{METRICS} metrics, {candidates} candidates a query"
    say(f"{FLAGS.resamples} resamples, {sizes_told}, on {device.device_kind}")
    rows = []
    for queries in sizes:
        for task in (means, auc, ece, paired_test):
            found = task(queries, candidates, FLAGS.resamples)
            rows.append({"task": task.__name__, "queries": queries} | found)
            say(_line(rows[-1]))
        rows.append({"task": "limits", "queries": queries} | limits(queries, FLAGS.resamples))
        say(_line(rows[-1]))
    if FLAGS.output:
        facts = {"device": device.device_kind, "devices": len(jax.devices()), "resamples": FLAGS.resamples,
                 "candidates": candidates}  # fmt: skip
        files.write_json(FLAGS.output, facts | {"rows": rows})
        say(f"wrote {FLAGS.output}")


def means(queries: int, candidates: int, resamples: int) -> dict[str, float]:
    """Eight mean metrics with every kind of interval, against scipy's percentile and BCa."""
    values = np.random.default_rng(0).beta(4, 1, size=(queries, METRICS))
    engine = figures.engine(queries, 0, resamples)
    ours = lambda: engine.figures([figures.mean(column, (0, 1)) for column in values.T])
    found = {"first": first_ms(ours), "ours": median_ms(_fresh(ours)), "ours_mb": peak_mb(_fresh(ours))}
    if FLAGS.peers:
        scipy = lambda method: stats.bootstrap(
            (values,),
            np.mean,
            axis=0,
            vectorized=True,
            n_resamples=resamples,
            method=method,
            rng=0,
            batch=100,
        )
        found["scipy percentile"] = median_ms(lambda: scipy("percentile"), 3)
        found["scipy_mb"] = peak_mb(lambda: scipy("percentile"))
        if queries <= 3000:  # its jackknife needs a matrix of queries × queries for each metric
            found["scipy BCa"] = median_ms(lambda: scipy("BCa"), 3)
            kinds = ("percentile", "basic", "BCa")
            found["scipy, all three kinds"] = median_ms(lambda: [scipy(kind) for kind in kinds], 3)
    return found


def auc(queries: int, candidates: int, resamples: int) -> dict[str, float]:
    """Pooled AUC, against a loop of scikit-learn's with sample weights."""
    judged, engine = _judged(queries, candidates), figures.engine(queries, 0, resamples)
    ours = lambda: probabilities.pooled_auc(engine, judged)
    found = {"first": first_ms(ours), "ours": median_ms(_fresh(ours), 3)}
    if FLAGS.peers:
        from sklearn.metrics import roc_auc_score

        loop = lambda w: roc_auc_score(judged.outcome, judged.probability, sample_weight=w)
        found["scikit-learn loop"] = _loop(engine, lambda counts: loop(counts[judged.query]))
    return found


def ece(queries: int, candidates: int, resamples: int) -> dict[str, float]:
    """ECE of 15 bins with its interval, against a loop of netcal's over resampled rows."""
    judged, engine = _judged(queries, candidates), figures.engine(queries, 0, resamples)
    bins = lambda: probabilities.resample_bins(engine, judged, calibration.bin_of(judged.probability))
    ours = lambda: probabilities.binned_ece(engine, judged, bins())
    found = {"first": first_ms(ours), "ours": median_ms(_fresh(ours), 3)}
    if FLAGS.peers:
        from netcal.metrics import ECE

        measure = ECE(15)
        rows = lambda counts: np.repeat(np.arange(len(judged.query)), counts[judged.query].astype(int))
        one = lambda at: measure.measure(judged.probability[at], judged.outcome[at].astype(int))
        found["netcal loop"] = _loop(engine, lambda counts: one(rows(counts)))
    return found


def paired_test(queries: int, candidates: int, resamples: int) -> dict[str, float]:
    """Sign flips of four metrics with max-T, against ranx's Fisher randomisation of one."""
    draw = bootstrap.Draw(0, resamples, queries)
    apart = np.random.default_rng(1).normal(0.01, 0.2, size=(queries, 4))
    ours = lambda: comparisons.sign_flip(draw, apart)
    found = {"first": first_ms(ours), "ours": median_ms(_fresh(ours))}
    if FLAGS.peers:
        from ranx.statistical_tests import fisher_randomization_test

        control = np.random.default_rng(2).random(queries)
        treatment = control + apart[:, 0]
        fisher = lambda: fisher_randomization_test(control, treatment, resamples)
        found["ranx Fisher, one metric"] = median_ms(fisher, 3)
        found["ranx Fisher, four"] = median_ms(lambda: [fisher() for _ in range(4)], 3)
    return found


def limits(queries: int, resamples: int) -> dict[str, float]:
    """How far the sums are from the product alone: its counts given, and its rate on this device."""
    columns = 2 * METRICS * bootstrap.DIGITS
    key = jax.random.key(0)
    weights = jax.random.poisson(key, 1.0, (resamples, queries)).astype(jnp.float32)
    digits = jax.random.randint(key, (queries, columns), 0, 2048).astype(jnp.float32)
    product = jax.jit(functools.partial(jnp.matmul, precision="highest"))
    alone = median_ms(lambda: product(weights, digits).block_until_ready())
    draw = bootstrap.Draw(0, resamples, queries, "jax")
    values = np.random.default_rng(0).random((queries, 2 * METRICS))
    whole = median_ms(lambda: bootstrap.weighted_sums(draw, values))
    work = 2 * resamples * queries * columns
    return {"sums": whole, "product alone": alone, "GFLOP/s of the product": work / alone / 1e6,
            "G counts/s": resamples * queries / whole / 1e6}  # fmt: skip


def _judged(queries: int, candidates: int) -> Judged:
    rng = np.random.default_rng(3)
    query = np.repeat(np.arange(queries), candidates)
    probability = rng.random(len(query)).astype(np.float32).astype(np.float64)
    return Judged(query, probability, (rng.random(len(query)) < probability).astype(float))


def _fresh(work: Callable[[], object]) -> Callable[[], object]:
    """The work with the kept counts thrown away, so that drawing them is in every measurement."""

    def again() -> object:
        bootstrap.all_weights.cache_clear()
        return work()

    return again


def _loop(engine: Engine, one: Callable[[np.ndarray], object]) -> float:
    """Milliseconds of a loop over all resamples, from `LOOPS` of them."""
    counts = bootstrap.counts(np, 0, np.arange(LOOPS, dtype=np.uint32), engine.draw.units)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return median_ms(lambda: [one(row) for row in counts], 1) * engine.resamples / LOOPS


def _line(row: dict) -> str:
    cells = [f"{row['task']:<12} Q = {row['queries']:<6}"]
    for name, value in row.items():
        if name in ("task", "queries"):
            continue
        unit = " MB" if name.endswith("_mb") else "" if "/s" in name else " ms"
        ratio = f" ({value / row['ours']:,.0f}×)" if "ours" in row and name not in ("first", "ours") else ""
        cells.append(f"{name.removesuffix('_mb')} {value:,.1f}{unit}{'' if unit == ' MB' else ratio}")
    return "  ".join(cells)


if __name__ == "__main__":
    launch(main, define_flags)
