"""From logits to probabilities with intervals, fitted on rows that no member learned from."""

from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit


class Platt(NamedTuple):
    """p = expit(slope · logit + offset); the slope is positive, so no order changes."""

    slope: float
    offset: float

    def __call__(self, logits: np.ndarray) -> np.ndarray:
        """[...] calibrated values in (0, 1)."""
        return expit(self.slope * logits + self.offset)


class Calibration(NamedTuple):
    """How scores become an expected label, a conflict probability, and 95 % intervals of y."""

    rank: Platt
    conflict: Platt
    radius: float  # half-width of the interval around the expected label
    queries: int  # that it was fitted on


def fit_platt(logits: np.ndarray, targets: np.ndarray) -> Platt:
    """Maximum likelihood of [N] targets in [0, 1] (Platt 1999), the targets used as they are."""

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        slope, offset = np.exp(parameters[0]), parameters[1]
        z = slope * logits + offset
        residual = expit(z) - targets
        gradient = np.array([np.mean(residual * logits) * slope, np.mean(residual)])
        return float(np.mean(np.logaddexp(0, z) - targets * z)), gradient

    slope, offset = minimize(loss, np.zeros(2), jac=True, bounds=[(-7, 5), (-20, 20)]).x
    return Platt(float(np.exp(slope)), float(offset))


def conformal_radius(query: np.ndarray, residual: np.ndarray, coverage: float = 0.95) -> float:
    """Half-width that covers a new query's candidate with probability ≥ `coverage`.

    Split conformal prediction with queries as the exchangeable units: each of Q queries spreads
    the weight 1/(Q+1) over its rows, the new one holds the rest at infinity (Dunn et al. 2022).
    `query` [N], `residual` [N] ≥ 0.  Labels lie in [0, 1], so infinity is 1.
    """
    _, group, count = np.unique(query, return_inverse=True, return_counts=True)
    weight = 1 / (count[group] * (len(count) + 1))
    order = np.argsort(residual)
    reached = np.searchsorted(np.cumsum(weight[order]), coverage - 1e-12)
    return float(residual[order[reached]]) if reached < len(order) else 1.0


def fit(
    rank: np.ndarray, conflict: np.ndarray, y: np.ndarray, is_conflict: np.ndarray, query: np.ndarray
) -> Calibration:
    """Calibration from N held-out rows: logits of both heads, labels, and each row's query."""
    by_rank = fit_platt(rank, y)
    known = ~np.isnan(is_conflict)
    return Calibration(
        rank=by_rank,
        conflict=fit_platt(conflict[known], is_conflict[known]),
        radius=conformal_radius(query, np.abs(y - by_rank(rank))),
        queries=len(np.unique(query)),
    )
