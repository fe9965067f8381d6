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


def cross_fitted(logits: np.ndarray, targets: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """[N] calibrated values, each by a Platt scaling fitted on the other folds' rows."""
    values = np.empty(len(logits))
    for k in np.unique(fold):
        inside = fold == k
        rest = ~inside if (~inside).any() else inside
        values[inside] = fit_platt(logits[rest], targets[rest])(logits[inside])
    return values


def interval_radius(query: np.ndarray, residual: np.ndarray, coverage: float = 0.95) -> float:
    """Half-width of an interval meant to hold the label of a new query's candidate.

    The quantile of split conformal prediction with queries as the exchangeable units: each of Q
    queries spreads the weight 1/(Q+1) over its rows, the new one holds the rest at infinity (Dunn
    et al. 2022).  `query` [N], `residual` [N] ≥ 0.  Labels lie in [0, 1], so infinity is 1.  Where
    residuals come from cross-validation the coverage is approximate: a report measures it.
    """
    _, group, count = np.unique(query, return_inverse=True, return_counts=True)
    weight = 1 / (count[group] * (len(count) + 1))
    order = np.argsort(residual)
    reached = np.searchsorted(np.cumsum(weight[order]), coverage - 1e-12)
    return float(residual[order[reached]]) if reached < len(order) else 1.0


def fit(
    rank: np.ndarray,
    conflict: np.ndarray,
    y: np.ndarray,
    is_conflict: np.ndarray,
    query: np.ndarray,
    fold: np.ndarray,
) -> Calibration:
    """Calibration from N held-out rows: logits of both heads, labels, each row's query and fold.

    Residuals are those of a calibration that has not seen the row's fold.
    """
    known = ~np.isnan(is_conflict)
    residual = np.abs(y - cross_fitted(rank, y, fold))
    return Calibration(
        rank=fit_platt(rank, y),
        conflict=fit_platt(conflict[known], is_conflict[known]),
        radius=interval_radius(query, residual),
        queries=len(np.unique(query)),
    )
