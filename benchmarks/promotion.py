r"""How often the gate, an A/B test and the canary cry wolf, and what they find, by simulation.

    python -m benchmarks.promotion --output=promotion.json

Every data set is new and its truth known.  A line gives a share of the data sets, ± 1.96 standard
errors of it.
"""

import tempfile
import time
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
from absl import flags
from scipy import stats
from scipy.special import ndtr

from cotrr import files
from cotrr.config import launch
from cotrr.data import runs
from cotrr.data.lists import Lists, to_lists
from cotrr.data.simulator import Simulation, write_run
from cotrr.deploy import canary, checks, sequences, sketches
from cotrr.deploy.canary import CanaryPolicy
from cotrr.evaluate import figures
from cotrr.ranker import encoding
from cotrr.ranker.calibrators import Scored
from experiments.terminal import say

FLAGS = flags.FLAGS
Shares = dict[str, list[bool]]  # by name: of each data set, whether it happened
SIZE, CORRELATION = 8, 0.5  # queries in a cluster, and how much of a difference's variance they share
SPREAD = 0.25  # standard deviation of a query's difference in Compliance@1, as on photographs


def define_flags() -> None:
    """Flags of this benchmark."""
    flags.DEFINE_integer("trials", 4000, "Data sets of each case.", lower_bound=50)
    flags.DEFINE_string("output", None, "JSON file for the figures.")
    flags.DEFINE_bool("quick", False, "200 data sets of each case.")


def main() -> None:
    """Runs every case and prints its lines."""
    trials, rows, start = 200 if FLAGS.quick else FLAGS.trials, {}, time.monotonic()
    cases = (false_promotions, power, many_looks, sample_ratio, slow_requests, drift)
    for case in cases:
        found = case(trials)
        say(f"{case.__doc__}  ({time.monotonic() - start:.0f} s)")
        for name, happened in found.items():
            share, count = float(np.mean(happened)), len(happened)
            rows[f"{case.__name__}: {name}"] = {"share": share, "trials": count}
            say(f"    {name:<58} {share:.3f} ± {1.96 * np.sqrt(share * (1 - share) / count):.3f}")
    if FLAGS.output:
        files.write_json(FLAGS.output, {"shares": rows})
        say(f"wrote {FLAGS.output}")


Draw = Callable[[np.random.Generator, int], np.ndarray]  # [clusters, SIZE] differences of mean 0, sd 1


def normal(rng: np.random.Generator, clusters: int) -> np.ndarray:
    """Differences that are normal."""
    common, own = rng.normal(size=(clusters, 1)), rng.normal(size=(clusters, SIZE))
    return np.sqrt(CORRELATION) * common + np.sqrt(1 - CORRELATION) * own


def sparse(rng: np.random.Generator, clusters: int) -> np.ndarray:
    """Differences of which a fifth are not 0: most queries show the same picture as before."""
    share = rng.random((clusters, SIZE)) < CORRELATION
    moved = np.where(share, rng.random((clusters, 1)), rng.random((clusters, SIZE))) < 0.2
    size = np.where(share, rng.normal(size=(clusters, 1)), rng.normal(size=(clusters, SIZE)))
    return moved * size / np.sqrt(0.2)


def skewed(rng: np.random.Generator, clusters: int) -> np.ndarray:
    """Differences with few large gains and many small losses (exponential)."""
    share = rng.random((clusters, SIZE)) < CORRELATION
    return np.where(share, rng.exponential(size=(clusters, 1)), rng.exponential(size=(clusters, SIZE))) - 1


def false_promotions(trials: int) -> Shares:
    """Promotions where the true difference is 0; clusters of 8 queries, correlation .5."""
    found: Shares = {}
    for draw in (normal, sparse, skewed):
        for clusters in (25, 50, 100):
            for values in _differences(draw, clusters, trials, 0.0):
                unit = np.repeat(np.arange(clusters), SIZE)
                rules = {"point estimate": values.mean() > 0, "naive bound": _passes(values),
                         "the gate": _passes(values, unit)}  # fmt: skip
                for rule, promoted in rules.items():
                    found.setdefault(f"{draw.__name__}, {clusters} clusters: {rule}", []).append(promoted)
    return found


def power(trials: int) -> Shares:
    """Promotions where the true difference is +3 points."""
    found: Shares = {}
    for clusters in (25, 50, 100, 200):
        unit = np.repeat(np.arange(clusters), SIZE)
        rng = np.random.default_rng(clusters)
        for values in _differences(normal, clusters, trials // 4, 0.03):
            found.setdefault(f"{clusters} clusters of 8 queries", []).append(_passes(values, unit))
            alone = 0.03 + SPREAD * rng.normal(size=clusters * SIZE)
            found.setdefault(f"{clusters * SIZE} queries, each its own", []).append(_passes(alone))
    return found


def _differences(draw: Draw, clusters: int, trials: int, mean: float) -> list[np.ndarray]:
    rng = np.random.default_rng([clusters, int(1000 * mean)])
    return [mean + SPREAD * draw(rng, clusters).ravel() for _ in range(trials)]


def _passes(values: np.ndarray, unit: np.ndarray | None = None) -> bool:
    engine = figures.engine(len(values), 0, 1000, unit)
    return checks.judge_gains(engine, [checks.Gain("", values, 0.0)], 0.95)[0].verdict == checks.PASS


LOOKS, DAILY = 199, 50  # units a look


def many_looks(trials: int) -> Shares:
    """A/A tests of which any of 199 looks cries wolf, at 5 %; and A/B tests of +0.05 sd found."""
    found: Shares = {}
    rng = np.random.default_rng(0)
    for effect, name in ((0.0, "A/A"), (0.05, "A/B")):
        for _ in range(trials // 4):
            total = LOOKS * DAILY
            candidate = rng.random(total) < 0.5
            before = rng.normal(size=total)
            values = 0.7 * before + np.sqrt(1 - 0.49) * rng.normal(size=total) + effect * candidate
            at = np.arange(DAILY, total + 1, DAILY) - 1
            claims = {"z-test": _z_test(values, candidate, at)}
            for kind, covariate in (("confidence sequence", None), ("confidence sequence, CUPED", before)):
                arms = sequences.arm_outcomes(values, candidate, 0.5, covariate)
                band = sequences.difference(arms)
                claims[kind] = ((band.low > 0) | (band.high < 0))[at]
            for kind, claimed in claims.items():
                found.setdefault(f"{name}: {kind}, any look", []).append(bool(claimed.any()))
    return found


def _z_test(values: np.ndarray, candidate: np.ndarray, at: np.ndarray) -> np.ndarray:
    """[L] whether a two-sided z-test at 5 % finds a difference at each look."""
    claims = []
    for last in at + 1:
        arms = [values[:last][chosen[:last]] for chosen in (~candidate, candidate)]
        error = np.sqrt(sum(arm.var() / len(arm) for arm in arms))
        claims.append(2 * ndtr(-abs(arms[1].mean() - arms[0].mean()) / error) < 0.05)
    return np.array(claims)


def sample_ratio(trials: int) -> Shares:
    """Sample-ratio checks of which any of 100 looks cries wolf, at 1 %; and a share of 52 % found."""
    found: Shares = {}
    for share, name in ((0.5, "50 % as planned"), (0.52, "52 % instead of 50 %")):
        rng = np.random.default_rng(int(100 * share))
        new = rng.binomial(100, share, size=(trials, 100)).cumsum(axis=1)
        counts = np.stack([100 * np.arange(1, 101) - new, new], axis=-1)
        excess = np.abs(counts[..., 1] / counts.sum(axis=-1) - 0.5) * 2 * np.sqrt(counts.sum(axis=-1))
        found[f"{name}: chi-square"] = _listed((2 * ndtr(-excess) < 0.01).any(axis=1))
        p = sequences.sample_ratio(counts, (0.5, 0.5))
        found[f"{name}: Dirichlet-multinomial"] = _listed((p < 0.01).any(axis=1))
    return found


def slow_requests(trials: int) -> Shares:
    """Canaries that find 2 % of the requests 8 times slower; log-normal latencies below the budget."""
    found: Shares = {}
    policy, alarms = CanaryPolicy(name="benchmark"), ("warning", "critical")
    rng = np.random.default_rng(0)
    for count in (500, 1000, 2000, 4000):
        for name, factor in ((f"{count} requests on each side: as before", 1), (f"{count}: 2 % slower", 8)):
            for _ in range(trials // 4):
                before, now = 0.1 * np.exp(0.25 * rng.normal(size=(2, count)))
                now = now * np.where(rng.random(count) < 0.02, factor, 1)
                checks = canary.latency_checks(now, before, policy)
                alarm = any(check.verdict in alarms for check in checks)
                means = stats.mannwhitneyu(now, before, alternative="greater").pvalue < 0.05
                found.setdefault(f"{name}: the canary", []).append(alarm)
                found.setdefault(f"{name}: Mann-Whitney", []).append(bool(means))
    return found


RUN: dict[str, Any] = {"queries": 100, "candidates": 30, "pictures": 600}
DRIFTS: dict[str, dict[str, Any]] = {
    "another run of the same kind": {},
    "brightness +0.1": {"brightness_shift": 0.1},
    "colour cast of 25": {"color_cast": 25.0},
    "15 % of the values lost": {"missing_rate": 0.15},
    "a detector that errs twice as often": {"detector_error": 0.2},
}


def drift(trials: int) -> Shares:
    """Canaries that raise an alarm on simulated runs of 100 queries x 30; the scores are Step 4's own."""
    found: Shares = {}
    policy = CanaryPolicy(name="benchmark")
    for number in range(trials // 40):
        lists, scored, shoots = _simulated(2 * number)
        reference = msgspec.convert(sketches.sketch(lists, scored, shoots), sketches.Reference)
        for name, change in DRIFTS.items():
            lists, scored, _ = _simulated(2 * number + 1, **change)
            checks = canary.drift_checks(reference, lists, scored, policy)
            checks += canary.ranking_checks(lists, scored, None, policy)
            alarm = any(check.verdict in ("warning", "critical") for check in checks)
            found.setdefault(name, []).append(alarm)
    return found


def _simulated(seed: int, **change: Any) -> tuple[Lists, Scored, np.ndarray]:
    """Lists of a simulated run, Step 4's scores of them, and the shoot of each row."""
    with tempfile.TemporaryDirectory() as folder:
        write_run(Simulation(seed=seed, **RUN, **change), folder)
        table = runs.read_run(folder).table
    lists = to_lists(table)
    of = lambda name: np.nan_to_num(lists.attributes[..., encoding.NAMES.index(name)])
    score, conflict = of("compliance_score"), of("conflict_prob")
    scored = Scored(score, np.zeros_like(score), score, score, conflict, np.nan_to_num(lists.dual_score))
    return lists, scored, table["canonical_id"].to_numpy(zero_copy_only=False)


def _listed(happened: Any) -> list[bool]:
    return np.asarray(happened).tolist()


if __name__ == "__main__":
    launch(main, define_flags)
