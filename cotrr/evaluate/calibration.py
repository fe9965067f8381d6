"""Measures of calibration: reliability bins, ECE, Brier score."""

import numpy as np

BINS = 15


def bin_of(probability: np.ndarray, bins: int = BINS) -> np.ndarray:
    """[N] equal-width bin [a, b) of each probability; the last is closed, so p = 1 is kept."""
    return np.minimum((probability * bins).astype(np.int64), bins - 1)


def bin_sums(
    query: np.ndarray, probability: np.ndarray, outcome: np.ndarray, queries: int, bins: int = BINS
) -> np.ndarray:
    """[Q, bins, 3] count, summed probability and summed outcome of each query's candidates."""
    sums = np.zeros((queries, bins, 3))
    row = bin_of(probability, bins)
    for column, values in enumerate((np.ones_like(probability), probability, outcome)):
        np.add.at(sums[:, :, column], (query, row), values)
    return sums


def ece(sums: np.ndarray) -> float:
    """Expected calibration error of bin sums [bins, 3] (Naeini et al. 2015); NaN without rows."""
    total = sums[:, 0].sum()
    return float(np.abs(sums[:, 1] - sums[:, 2]).sum() / total) if total else float("nan")
