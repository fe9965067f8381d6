"""Tests of paired differences between systems: sign flips with max-T, Holm, McNemar, and power."""

import numpy as np
from scipy.special import ndtri
from scipy.stats import binom

from cotrr.evaluate.bootstrap import Draw, flipped_sums

SAME = 1e-5  # deviations of the sum: sums of float32 metrics that are as close are equal


def sign_flip(draw: Draw, differences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two-sided p-values [K] of differences [U, K] (NaN: no difference), single and by max-T.

    Under the null hypothesis a unit's differences keep their law when all change sign together
    (Fisher 1935).  The max-T values hold for the whole family of K (Westfall & Young 1993).  The
    least possible p is 1 / (B + 1); without any difference p is 1.
    """
    values = np.nan_to_num(differences)
    length = np.sqrt((values**2).sum(axis=0))
    scale = np.where(length > 0, length, 1.0)[:, None]
    drawn = np.abs(flipped_sums(draw, values)) / scale
    reached = np.abs(values.sum(axis=0))[:, None] / scale - SAME
    p = lambda null: (1 + (null >= reached).sum(axis=1)) / (draw.resamples + 1)
    return p(drawn), p(drawn.max(axis=0, keepdims=True, initial=0.0))


def holm(p: np.ndarray) -> np.ndarray:
    """[K] p-values adjusted for K tests (Holm 1979)."""
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1)
    return adjusted


def mcnemar(differences: np.ndarray) -> dict[str, float]:
    """Exact two-sided test of differences [U] of a 0/1 metric: how many are better, how many worse.

    >>> mcnemar(np.array([1, 1, 1, 1, 1, 1, 0, -1]))
    {'better': 6, 'worse': 1, 'p': 0.125}
    """
    better, worse = int((differences > 0).sum()), int((differences < 0).sum())
    p = 2 * binom.cdf(min(better, worse), better + worse, 0.5)
    return {"better": better, "worse": worse, "p": float(min(p, 1.0))}


def detectable(error: float, level: float = 0.95, power: float = 0.8) -> float:
    """The smallest true difference that a two-sided test with this standard error shows with `power`."""
    return (ndtri((1 + level) / 2) + ndtri(power)) * error


def simultaneous(pivots: np.ndarray, level: float = 0.95) -> float:
    """How many standard errors all of K intervals need to hold together, from pivots [K, B].

    The quantile of the largest absolute pivot of each resample (max-T; Romano & Wolf 2005).  A row that
    some resample leaves without spread rests on a few units: it is left out, and gets no such interval.
    """
    rows = pivots[~np.isinf(pivots).any(axis=1)]
    largest = np.where(np.isnan(rows), 0.0, np.abs(rows)).max(axis=0, initial=0.0)
    return float(np.quantile(largest, level, method="higher"))
