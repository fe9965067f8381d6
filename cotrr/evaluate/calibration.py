"""Measures of calibration: reliability bins, ECE in three forms, and "is it calibrated?"."""

import itertools
from typing import NamedTuple

import numpy as np
from scipy.fft import dct, idct
from scipy.optimize import brentq

BINS = 15
GRID = 4096  # cells of the smooth ECE


def bin_of(probability: np.ndarray, bins: int = BINS) -> np.ndarray:
    """[N] equal-width bin [a, b) of each probability; the last is closed, so p = 1 is kept."""
    return np.minimum((probability * bins).astype(np.int64), bins - 1)


def equal_mass_bin_of(probability: np.ndarray, bins: int = BINS) -> np.ndarray:
    """[N] bin of each probability, with about as many in each; equal probabilities stay together."""
    parts = [part for part in np.array_split(np.sort(probability), bins) if len(part)]
    edges = [(low[-1] + high[0]) / 2 for low, high in itertools.pairwise(parts)]
    return np.searchsorted(np.unique(edges), probability, side="left")


def bin_sums(
    query: np.ndarray, probability: np.ndarray, outcome: np.ndarray, row: np.ndarray, queries: int
) -> np.ndarray:
    """[Q, bins, 3] count, summed probability and summed outcome by query and by bin `row` [N]."""
    place, size = query * BINS + row, queries * BINS
    columns = (
        np.bincount(place, values, minlength=size) for values in (np.ones(len(place)), probability, outcome)
    )
    return np.stack([column.reshape(queries, BINS) for column in columns], axis=-1)


def ece(sums: np.ndarray) -> np.ndarray:
    """[...] expected calibration error (Naeini et al. 2015) of bin sums [..., bins, 3]; NaN without rows."""
    total = sums[..., 0].sum(axis=-1)
    gap = np.abs(sums[..., 1] - sums[..., 2]).sum(axis=-1)
    return np.where(total > 0, gap / np.where(total > 0, total, 1.0), np.nan)


def debiased_square(sums: np.ndarray) -> np.ndarray:
    """[...] squared L2 calibration error less what chance adds (Kumar et al. 2019, eq. 7); may be below 0.

    Of bin sums [..., bins, 3]; a bin with one row counts 0.  NaN without rows.
    """
    count, predicted, observed = np.moveaxis(sums, -1, 0)
    share = observed / np.maximum(count, 1)
    error = (predicted - observed) ** 2 / np.maximum(count, 1) - share * (1 - share) * count / np.maximum(
        count - 1, 1
    )
    total = count.sum(axis=-1)
    return np.where(
        total > 0, np.where(count > 1, error, 0).sum(axis=-1) / np.where(total > 0, total, 1), np.nan
    )


def smooth_ece(probability: np.ndarray, outcome: np.ndarray) -> float:
    """Smooth ECE of N rows (Błasiok & Nakkiran 2023): the width at which the smoothed error equals it.

    Residuals are smoothed by a Gaussian reflected at 0 and 1, which a cosine transform makes a
    product.  NaN without rows.
    """
    if not len(probability):
        return float("nan")
    cell = bin_of(probability, GRID)
    residual = np.bincount(cell, probability - outcome, minlength=GRID) / len(probability)
    spectrum, wave = dct(residual), np.pi * np.arange(GRID)

    def error(width: float) -> float:
        return float(np.abs(idct(spectrum * np.exp(-0.5 * (wave * width) ** 2))).sum())

    excess = lambda width: error(width) - width
    narrow = 1 / GRID
    return brentq(excess, narrow, 1.0, xtol=1e-6) if excess(narrow) > 0 else error(narrow)


class Consistency(NamedTuple):
    """What outcomes drawn from the probabilities themselves would show."""

    ece: np.ndarray  # [S] of each simulation
    band: np.ndarray  # [2, bins] 95 % of the observed shares; NaN where a bin is empty


def simulate(probability: np.ndarray, seed: int, simulations: int = 1000) -> Consistency:
    """Outcomes ~ Bernoulli(p), independent, S times (Bröcker & Smith 2007), in equal-width bins."""
    order = np.argsort(probability, kind="stable")
    p, row = probability[order], bin_of(probability[order])
    filled, starts, count = np.unique(row, return_index=True, return_counts=True)
    expected = np.add.reduceat(p, starts)
    rng, step = np.random.default_rng(seed), max(1, 2**20 // len(p))
    draw = lambda size: (rng.random((size, len(p))) < p).astype(np.float32)
    sizes = [min(step, simulations - start) for start in range(0, simulations, step)]
    observed = np.concatenate([np.add.reduceat(draw(size), starts, axis=1) for size in sizes])
    band = np.full((2, BINS), np.nan)
    band[:, filled] = np.quantile(observed, [0.025, 0.975], axis=0) / count
    return Consistency(np.abs(observed - expected).sum(axis=1) / len(p), band)
