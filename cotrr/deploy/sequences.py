"""Inference that may be looked at every day: confidence sequences, and a sequential sample-ratio check.

Arrays hold one observation per unit along their last axis, in order of time; leading axes are
experiments of their own.  Whatever is known before a unit came (means, slopes) may steer how its
observation is used: that keeps the expectation of each term, and yesterday's sequence as it was.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import gammaln, lambertw

BURN_IN = 100  # observations before an asymptotic sequence says anything
LEARNING = 20  # units of each arm that only teach what to expect of the next one
CONCENTRATION = 1000.0  # the sample-ratio check expects wrong shares to be off by 1/√1000 / 2 or so
SAME = 1e-12  # relative: differences that small are rounding


class Band(NamedTuple):
    """An estimate and its interval, after each observation; infinite ends: nothing is known yet."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


def reach(count: np.ndarray, level: float, planned: int) -> np.ndarray:
    """Half-width in standard deviations after `count` [...] ≥ 1 observations (arXiv 2103.06476, Thm 2.2).

    Holds at all times together with probability `level`, and is narrowest at `planned` observations.
    """
    alpha = 1 - level
    tuned = (-lambertw(-(alpha**2) / np.e, -1).real - 1) / planned * count  # ρ² t
    return np.sqrt(2 * (1 + 1 / tuned) / count * np.log(np.sqrt(1 + tuned) / alpha))


def interval(
    count: np.ndarray, mean: np.ndarray, variance: np.ndarray, level: float, planned: int
) -> Band:
    """The sequence at the times where `count` observations have this mean and variance, each [...].

    Before BURN_IN observations, and while all of them are equal, the ends are infinite.
    """
    known = (count >= BURN_IN) & (variance > (SAME * mean) ** 2)
    half = np.where(known, reach(count, level, planned) * np.sqrt(variance), np.inf)
    return Band(mean, mean - half, mean + half)


def confidence_sequence(values: np.ndarray, level: float = 0.95, planned: int = 10_000) -> Band:
    """Of the running mean of `values` [..., T]: asymptotic, valid at all times from BURN_IN on."""
    count = np.arange(1, values.shape[-1] + 1)
    mean, (variance,) = _moments(values, [(values, values)])
    return interval(count, mean, variance, level, planned)


def difference(arms: np.ndarray, level: float = 0.95, planned: int = 10_000) -> Band:
    """Candidate minus baseline from `arm_outcomes` without NaN, [2, ..., T]."""
    change = arms[1] - arms[0]
    rounding = np.abs(change) <= SAME * np.abs(arms).max(axis=0)
    return confidence_sequence(np.where(rounding, 0.0, change), level, planned)


def relative_change(arms: np.ndarray, level: float = 0.95, planned: int = 10_000) -> Band:
    """Candidate / baseline − 1 from `arm_outcomes` without NaN, [2, ..., T]; infinite near a baseline of 0.

    The changes r for which candidate − (1 + r) · baseline may be 0 (Fieller 1954), so that a claim of r
    is decided by a mean, without dividing by one.
    """
    count = np.arange(1, arms.shape[-1] + 1)
    old, (oo, on) = _moments(arms[0], [(arms[0], arms[0]), (arms[0], arms[1])])
    new, (nn,) = _moments(arms[1], [(arms[1], arms[1])])
    square = reach(count, level, planned) ** 2
    a, b, c = old**2 - square * oo, old * new - square * on, new**2 - square * nn
    apart = difference(arms, level, planned)
    known = (a > 0) & (old > 0) & np.isfinite(apart.low)
    with np.errstate(divide="ignore", invalid="ignore"):
        root = np.sqrt(np.maximum(b**2 - a * c, 0))
        ends = [np.where(known, (b + sign * root) / a - 1, sign * np.inf) for sign in (-1, 1)]
        return Band(np.where(old > 0, new / old - 1, np.nan), *ends)


def arm_outcomes(
    values: np.ndarray, candidate: np.ndarray, share: float, covariate: np.ndarray | None = None
) -> np.ndarray:
    """[2, ..., T] terms whose expectations are the means under baseline and under candidate.

    What is expected of a unit, plus how far it was off where it was in that arm, divided by the arm's
    probability (augmented inverse propensity weighting, Robins et al. 1994).  The expectation is the
    mean of the arm's earlier units, moved along their slope on a `covariate` from before the
    experiment (CUPED, Deng et al. 2013; NaN where a unit has none).  `candidate` [..., T] bool;
    `share` its probability; NaN while an arm has fewer than LEARNING earlier units with a value.
    """
    start = np.nan_to_num(values[..., :1])  # sums of deviations lose no digits
    y = values - start
    x = np.zeros_like(y) if covariate is None else _centred(covariate)
    terms = []
    for inside, probability in ((~candidate, 1 - share), (candidate, share)):
        there = inside & np.isfinite(y)
        n, sy, sx, sxx, sxy = (
            earlier(np.where(there, part, 0.0)) for part in (np.ones_like(y), y, x, x * x, x * y)
        )
        n, ready = np.maximum(n, 1), n >= LEARNING
        spread = sxx - sx * sx / n
        slope = (sxy - sx * sy / n) / np.where(spread > SAME * sxx, spread, np.inf)
        expected = sy / n + slope * (x - sx / n)
        terms.append(np.where(ready, expected + np.where(inside, y - expected, 0) / probability, np.nan))
    return np.stack(terms) + start


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


def _moments(values: np.ndarray, pairs: list) -> tuple[np.ndarray, list[np.ndarray]]:
    """Running mean of `values` [..., T], and running covariances of pairs of such arrays."""
    count = np.arange(1, values.shape[-1] + 1)
    running = lambda v: np.cumsum(v - v[..., :1], axis=-1) / count  # sums of deviations lose no digits
    covariances = []
    for a, b in pairs:
        product = np.cumsum((a - a[..., :1]) * (b - b[..., :1]), axis=-1) / count
        covariances.append(product - running(a) * running(b))
    return values[..., :1] + running(values), covariances


def _centred(covariate: np.ndarray) -> np.ndarray:
    """Deviations from the mean; 0 for a unit without a value.

    Later units may count here: assignment has no part in what was there before it.
    """
    there = np.isfinite(covariate)
    count = np.maximum(there.sum(axis=-1, keepdims=True), 1)
    mean = np.where(there, covariate, 0.0).sum(axis=-1, keepdims=True) / count
    return np.where(there, covariate - mean, 0.0)
