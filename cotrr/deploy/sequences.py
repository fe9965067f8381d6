"""Inference that may be looked at every day: confidence sequences, and a sequential sample-ratio check.

Arrays hold one observation per unit along their last axis, in order of time, NaN where a unit has none;
leading axes are experiments of their own.  Whatever is known before a unit came (means, slopes) may steer
how its observation is used: that keeps the expectation of each term, and yesterday's sequence as it was.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import gammaln, lambertw

BURN_IN = 100  # observations before an asymptotic sequence says anything
# One observation may make up that much of the standard deviation of the sum: of rare events, it takes
# ten before the sum is near to normal.
WEIGHT = 10**-0.5
LEARNING = 20  # units of each arm that only teach what to expect of the next one
CONCENTRATION = 1000.0  # the sample-ratio check expects wrong shares to be off by 1/√1000 / 2 or so
SAME = 1e-12  # relative: differences that small are rounding


class Band(NamedTuple):
    """An estimate and its interval, after each observation; infinite ends: nothing is known yet."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


class Arms(NamedTuple):
    """Terms [..., T] whose expectations are the means under baseline and under candidate."""

    baseline: np.ndarray
    candidate: np.ndarray
    surprise: np.ndarray  # how far each unit was off what was expected in its arm
    share: float  # of the candidate


def reach(count: np.ndarray, level: float, planned: int) -> np.ndarray:
    """Half-width in standard deviations after `count` [...] ≥ 1 observations.

    The normal mixture of Waudby-Smith et al. (arXiv 2103.06476), with ρ in closed form by Lambert's W.
    Holds at all times together with probability `level`, and is narrowest at `planned` observations.
    """
    alpha = 1 - level
    tuned = (-lambertw(-(alpha**2) / np.e, -1).real - 1) / planned * count  # ρ² t
    return np.sqrt(2 * (1 + 1 / tuned) / count * np.log(np.sqrt(1 + tuned) / alpha))


def interval(
    count: np.ndarray, mean: np.ndarray, variance: np.ndarray, largest: np.ndarray, level: float, planned: int
) -> Band:
    """The sequence at times with `count` observations of this mean and variance, each [...].

    `largest` is the largest deviation from the mean.  The ends are infinite before BURN_IN
    observations, while all of them are equal, and while one has more than its WEIGHT.
    """
    known = _known(count, variance, largest) & (variance > (SAME * mean) ** 2)
    half = np.where(known, reach(np.maximum(count, 1), level, planned) * np.sqrt(variance), np.inf)
    return Band(mean, mean - half, mean + half)


def confidence_sequence(values: np.ndarray, level: float = 0.95, planned: int = 10_000) -> Band:
    """Of the running mean of `values` [..., T]: asymptotic, valid at all times from BURN_IN on."""
    there = np.isfinite(values)
    count, (mean,), (variance,) = _moments(there, [values], [(0, 0)])
    top, bottom = (
        np.maximum.accumulate(np.where(there, sign * values, -np.inf), axis=-1) for sign in (1, -1)
    )
    return interval(count, mean, variance, np.maximum(top - mean, bottom + mean), level, planned)


def difference(arms: Arms, level: float = 0.95, planned: int = 10_000) -> Band:
    """Candidate minus baseline, over [..., T]."""
    count, (old, new), (oo, on, nn), largest = _contrast(arms)
    return interval(count, new - old, oo - 2 * on + nn, largest, level, planned)


def relative_change(arms: Arms, level: float = 0.95, planned: int = 10_000) -> Band:
    """Candidate / baseline − 1, over [..., T]; the ends are infinite while the baseline may be 0.

    They hold the changes r for which candidate − (1 + r) · baseline may be 0 (Fieller 1954), so that a
    claim of r is decided by a mean, without dividing by one.
    """
    count, (old, new), (oo, on, nn), largest = _contrast(arms)
    square = reach(np.maximum(count, 1), level, planned) ** 2
    a, b, c = old**2 - square * oo, old * new - square * on, new**2 - square * nn
    known = _known(count, oo - 2 * on + nn, largest) & (a > 0) & (old > 0)
    root = np.sqrt(np.maximum(b**2 - a * c, 0))
    ends = [np.where(known, (b + sign * root) / np.where(known, a, 1) - 1, sign * np.inf) for sign in (-1, 1)]
    return Band(np.where(old > 0, new / np.where(old > 0, old, 1) - 1, np.nan), *ends)


def arm_outcomes(
    values: np.ndarray, candidate: np.ndarray, share: float, covariate: np.ndarray | None = None
) -> Arms:
    """One term per unit and arm, from `values` [..., T] and who had the candidate [..., T] bool.

    What is expected of a unit, plus how far it was off where it was in that arm, divided by the arm's
    probability (augmented inverse propensity weighting, Robins et al. 1994).  The expectation is the
    mean of the arm's earlier units, moved along their slope on a `covariate` from before the
    experiment (CUPED, Deng et al. 2013).  NaN while an arm has fewer than LEARNING earlier units.
    """
    values = np.asarray(values, float)
    start = np.nan_to_num(values[..., :1])  # sums of deviations lose no digits
    y = values - start
    x = np.zeros_like(y) if covariate is None else _centred(covariate)
    terms, surprise = [], np.zeros_like(y)
    for inside, probability in ((~candidate, 1 - share), (candidate, share)):
        there = inside & np.isfinite(y)
        n, sy, sx, sxx, sxy = (
            earlier(np.where(there, part, 0.0)) for part in (np.ones_like(y), y, x, x * x, x * y)
        )
        n, ready = np.maximum(n, 1), n >= LEARNING
        spread = sxx - sx * sx / n
        slope = (sxy - sx * sy / n) / np.where(spread > SAME * sxx, spread, np.inf)
        expected = sy / n + slope * (x - sx / n)
        off = np.where(inside, y - expected, 0)
        terms.append(np.where(ready, expected + off / probability + start, np.nan))
        surprise += off
    baseline, treated = terms
    return Arms(baseline, treated, surprise, share)


def linearised(numerator: np.ndarray, denominator: np.ndarray, candidate: np.ndarray) -> np.ndarray:
    """[..., T] one value per unit whose mean in an arm is Σ numerator / Σ denominator there.

    The delta method (Deng et al. 2018) around the ratio of the arm's earlier units: R + (N − R·D) / D̄;
    NaN while these are fewer than LEARNING, or have no denominator.
    """
    values = np.full(np.shape(numerator), np.nan)
    for inside in (~candidate, candidate):
        count, n, d = (earlier(np.where(inside, part, 0.0)) for part in (1.0, numerator, denominator))
        ready = inside & (count >= LEARNING) & (d > 0)
        safe = np.where(ready, d, 1.0)
        ratio = n / safe
        unit = ratio + (numerator - ratio * denominator) * count / safe
        values = np.where(ready, unit, values)
    return values


def sample_ratio(counts: np.ndarray, shares: Sequence[float]) -> np.ndarray:
    """[..., L] p-values that hold at all looks together, from units per arm so far [..., L, A].

    The Dirichlet-multinomial martingale of Lindon & Malek (arXiv 2011.03567) against the planned
    `shares` [A]: below α at any look with probability α at most, and never up again.
    """
    expected = np.asarray(shares, float)
    prior = CONCENTRATION * expected
    marginal = (gammaln(prior + counts) - gammaln(prior)).sum(axis=-1)
    marginal -= gammaln(CONCENTRATION + counts.sum(axis=-1)) - gammaln(CONCENTRATION)
    log_factor = marginal - (counts * np.log(expected)).sum(axis=-1)
    return np.exp(-np.maximum.accumulate(np.maximum(log_factor, 0.0), axis=-1))


def earlier(values: np.ndarray) -> np.ndarray:
    """[..., T] the sum of all values before each one."""
    total = np.cumsum(values, axis=-1)
    return np.concatenate([np.zeros_like(total[..., :1]), total[..., :-1]], axis=-1)


def _known(count: np.ndarray, variance: np.ndarray, largest: np.ndarray) -> np.ndarray:
    """Whether the mean of so many observations is near enough to normal."""
    return (count >= BURN_IN) & (variance > 0) & (largest <= WEIGHT * np.sqrt(variance * count))


def _moments(
    there: np.ndarray, arrays: list[np.ndarray], pairs: list[tuple[int, int]]
) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
    """Running count, means of arrays [..., T] where they are `there`, and covariances of pairs of them."""
    count = np.cumsum(there, axis=-1)
    mean = lambda v: np.cumsum(v, axis=-1) / np.maximum(count, 1)
    first = there.argmax(axis=-1, keepdims=True) if there.shape[-1] else np.zeros(there.shape, int)
    starts = [
        np.where(there.any(axis=-1, keepdims=True), np.take_along_axis(v, first, -1), 0) for v in arrays
    ]
    off = [np.where(there, v - start, 0.0) for v, start in zip(arrays, starts, strict=True)]
    off_mean = [mean(v) for v in off]
    covariances = [mean(off[i] * off[j]) - off_mean[i] * off_mean[j] for i, j in pairs]
    return count, [start + m for start, m in zip(starts, off_mean, strict=True)], covariances


def _contrast(arms: Arms) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray], np.ndarray]:
    """Running count, means and covariances of both arms' terms, and the largest deviation.

    A small arm that has not seen its rare events yet looks as if it had no spread.  So covariances are
    at least what they are if all surprises are alike, and each might have come in the smaller arm.
    """
    there = np.isfinite(arms.baseline) & np.isfinite(arms.candidate)
    count, means, covariances = _moments(there, [arms.baseline, arms.candidate], [(0, 0), (0, 1), (1, 1)])
    variance = covariances[0] - 2 * covariances[1] + covariances[2]
    surprise = np.where(there, arms.surprise, 0.0)
    alike = np.cumsum(surprise**2, axis=-1) / np.maximum(count, 1) / (arms.share * (1 - arms.share))
    spread = variance > (SAME * np.abs(means).max(axis=0)) ** 2
    inflation = np.where(spread, np.maximum(alike / np.where(spread, variance, 1), 1), 0)
    largest = np.maximum.accumulate(np.abs(surprise), axis=-1) / min(arms.share, 1 - arms.share)
    return count, means, [part * inflation for part in covariances], largest


def _centred(covariate: np.ndarray) -> np.ndarray:
    """Deviations from the mean; 0 for a unit without a value.

    Later units may count here: assignment has no part in what was there before it.
    """
    there = np.isfinite(covariate)
    count = np.maximum(there.sum(axis=-1, keepdims=True), 1)
    mean = np.where(there, covariate, 0.0).sum(axis=-1, keepdims=True) / count
    return np.where(there, covariate - mean, 0.0)
