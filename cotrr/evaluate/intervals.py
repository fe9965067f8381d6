"""Confidence intervals of R statistics from their B resampled values, as arrays; NaN is undefined."""

from typing import NamedTuple

import numpy as np
from scipy.special import ndtr, ndtri
from scipy.stats import beta

SAME = 1e-9  # of the largest deviation: resampled values that close to the estimate are equal to it


class Sorted(NamedTuple):
    """Resampled values in ascending order, the undefined ones last."""

    values: np.ndarray  # [R, B]
    defined: np.ndarray  # [R] how many there are


def ascending(values: np.ndarray) -> Sorted:
    """Sorts [R, B] values along the resamples."""
    return Sorted(np.sort(values, axis=1), np.count_nonzero(~np.isnan(values), axis=1))


def quantile(drawn: Sorted, level: np.ndarray | float) -> np.ndarray:
    """[R] linearly interpolated quantiles of the defined values; `level` [R] or a number."""
    last = np.maximum(drawn.defined - 1, 0)
    level = np.broadcast_to(np.asarray(level, float), last.shape)
    at = np.clip(np.nan_to_num(level), 0, 1) * last
    low = np.floor(at).astype(int)
    pick = lambda index: np.take_along_axis(drawn.values, index[:, None], axis=1)[:, 0]
    below, above = pick(low), pick(np.minimum(low + 1, last))
    share = at - low
    # Where both are infinite their difference is none.
    with np.errstate(invalid="ignore"):
        value = np.where(share > 0, below + share * (above - below), below)
    return np.where((drawn.defined > 0) & np.isfinite(level), value, np.nan)


def percentile(drawn: Sorted, level: float = 0.95) -> np.ndarray:
    """[2, R] quantiles of the resampled values (Efron 1979)."""
    tail = (1 - level) / 2
    return np.stack([quantile(drawn, tail), quantile(drawn, 1 - tail)])


def basic(drawn: Sorted, estimate: np.ndarray, level: float = 0.95) -> np.ndarray:
    """[2, R] the percentile interval reflected at the estimate [R] (Davison & Hinkley 1997, 5.2)."""
    return 2 * estimate - percentile(drawn, level)[::-1]


def centred(drawn: Sorted, estimate: np.ndarray, level: float = 0.95) -> np.ndarray:
    """[2, R] the percentile interval moved by what resampling adds on average (bias correction).

    For statistics such as calibration errors, whose resampled values lie above the estimate.
    """
    defined = np.maximum(drawn.defined, 1)
    shift = np.where(np.isnan(drawn.values), 0.0, drawn.values).sum(axis=1) / defined - estimate
    return percentile(drawn, level) - shift


def bca(drawn: Sorted, estimate: np.ndarray, acceleration: np.ndarray, level: float = 0.95) -> np.ndarray:
    """[2, R] bias-corrected and accelerated intervals (Efron 1987); `acceleration` [R]."""
    spread = np.nanmax(np.abs(drawn.values - estimate[:, None]), axis=1, initial=0.0)
    close = SAME * spread
    under = (drawn.values < (estimate - close)[:, None]).sum(axis=1)
    equal = (np.abs(drawn.values - estimate[:, None]) <= close[:, None]).sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        bias = ndtri((under + equal / 2) / np.maximum(drawn.defined, 1))
        ends = []
        for z in ndtri([(1 - level) / 2, (1 + level) / 2]):
            shifted = bias + (bias + z) / (1 - acceleration * (bias + z))
            ends.append(quantile(drawn, np.where(np.isfinite(bias), ndtr(shifted), np.nan)))
    return np.stack(ends)


def acceleration(deviations: np.ndarray, there: np.ndarray) -> np.ndarray:
    """[R] BCa's acceleration from jackknife values minus the estimate [R, U], of units `there`."""
    count = np.maximum(there.sum(axis=1), 1)
    centred = np.where(
        there, np.where(there, deviations, 0).sum(axis=1)[:, None] / count[:, None] - deviations, 0
    )
    square = centred * centred
    size = square.sum(axis=1)
    return (square * centred).sum(axis=1) / np.where(size > 0, 6 * size**1.5, 1.0)


def studentised(pivots: Sorted, estimate: np.ndarray, error: np.ndarray, level: float = 0.95) -> np.ndarray:
    """[2, R] bootstrap-t intervals (Efron 1981) from pivots (value − estimate) / its own error."""
    return estimate - error * percentile(pivots, level)[::-1]


def wilson(successes: np.ndarray, trials: np.ndarray, level: float = 0.95) -> np.ndarray:
    """[2, ...] interval of a share (Wilson 1927); `trials` may be an effective number."""
    z = ndtri((1 + level) / 2)
    share, shrunk = successes / trials, 1 + z**2 / trials
    middle = (share + z**2 / (2 * trials)) / shrunk
    half = z / shrunk * np.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    return np.stack([np.maximum(middle - half, 0), np.minimum(middle + half, 1)])


def jeffreys(successes: np.ndarray, trials: np.ndarray, level: float = 0.95) -> np.ndarray:
    """[2, ...] Jeffreys interval of a share (Brown, Cai & DasGupta 2001): 0 and 1 where all agree."""
    tail = (1 - level) / 2
    a, b = successes + 0.5, trials - successes + 0.5
    low = np.where(successes > 0, beta.ppf(tail, a, b), 0.0)
    return np.stack([low, np.where(successes < trials, beta.ppf(1 - tail, a, b), 1.0)])
