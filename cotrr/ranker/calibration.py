"""Fitting of calibrators and intervals, on rows that no member learned from."""

from collections.abc import Callable

import numpy as np
from scipy.optimize import isotonic_regression, minimize

from cotrr.ranker.calibrators import (
    Beta,
    Calibration,
    Calibrator,
    Choice,
    Intervals,
    Isotonic,
    Platt,
    expit,
    log_odds_terms,
)

SIMPLER = 1e-4  # a kind must beat a simpler one by more than this log-loss
BINS, ROWS = 10, 50  # of an interval's curves: at most so many bins, of at least so many rows


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


def fit_beta(logits: np.ndarray, targets: np.ndarray) -> Beta:
    """Maximum likelihood of [N] targets in [0, 1] (Kull et al. 2017), the targets used as they are."""
    terms = np.stack([*log_odds_terms(logits), np.ones(len(logits))])

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        z = parameters @ terms
        return float(np.mean(np.logaddexp(0, z) - targets * z)), terms @ (expit(z) - targets) / len(z)

    # It starts at the identity.  The two terms go together, so the valley is flat: go on to its floor.
    bounds, options = [(0, 150), (0, 150), (-20, 20)], {"ftol": 1e-12, "gtol": 1e-7}
    a, b, c = minimize(loss, np.array([1.0, 1, 0]), jac=True, bounds=bounds, options=options).x
    return Beta(float(a), float(b), float(c))


def fit_isotonic(logits: np.ndarray, targets: np.ndarray) -> Isotonic:
    """Least squares among rising functions of [N] targets in [0, 1] (Zadrozny & Elkan 2002)."""
    knots, group, count = np.unique(logits, return_inverse=True, return_counts=True)
    fitted = isotonic_regression(np.bincount(group, targets) / count, weights=count)
    ends = np.unique(np.concatenate([fitted.blocks[:-1], fitted.blocks[1:] - 1]))
    eps = 1 / (2 * len(logits) + 2)  # no outcome is ruled out, so a log-loss stays finite
    return Isotonic(tuple(knots[ends].tolist()), tuple(np.clip(fitted.x[ends], eps, 1 - eps).tolist()))


Fit = Callable[[np.ndarray, np.ndarray], Calibrator]
CALIBRATORS: dict[str, Fit] = {"platt": fit_platt, "beta": fit_beta, "isotonic": fit_isotonic}


def cross_fitted(
    logits: np.ndarray, targets: np.ndarray, fold: np.ndarray, fit: Fit = fit_platt
) -> np.ndarray:
    """[N] calibrated values, each by a calibrator fitted on the other folds' rows."""
    values = np.empty(len(logits))
    for inside, rest in _folds(fold):
        values[inside] = fit(logits[rest], targets[rest])(logits[inside])
    return values


def _folds(fold: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Masks [N] of each fold and of all others; a single fold has no other, and stands for both."""
    masks = [fold == k for k in np.unique(fold)]
    return [(inside, inside if inside.all() else ~inside) for inside in masks]


def _log_loss(values: np.ndarray, targets: np.ndarray) -> float:
    """Mean cross-entropy of [N] targets in [0, 1]; finite where a sigmoid rounds to 0 or 1."""
    values = np.clip(values, 1e-15, 1 - 1e-15)
    return float(-np.mean(targets * np.log(values) + (1 - targets) * np.log1p(-values)))


def choose(logits: np.ndarray, targets: np.ndarray, fold: np.ndarray) -> tuple[Calibrator, Choice]:
    """The kind with the lowest cross-validated log-loss over N rows, fitted on all of them.

    Near-ties go to the simpler kind.  A single fold cannot tell a good fit from a tight one: Platt.
    """
    kinds = CALIBRATORS if len(np.unique(fold)) > 1 else {"platt": fit_platt}
    losses = {
        kind: _log_loss(cross_fitted(logits, targets, fold, fit), targets) for kind, fit in kinds.items()
    }
    kind = next(kind for kind, loss in losses.items() if loss <= min(losses.values()) + SIMPLER)
    return kinds[kind](logits, targets), Choice(kind, losses)


def query_quantile(query: np.ndarray, score: np.ndarray, coverage: float = 0.95) -> float:
    """The margin that the score of a new query's row is meant to stay within.

    The quantile of split conformal prediction with queries as the exchangeable units: each of Q
    queries spreads the weight 1/(Q+1) over its rows, the new one holds the rest at infinity (Dunn
    et al. 2022).  `query` [N], `score` [N] of either sign.  Labels lie in [0, 1], so infinity is 1.
    """
    _, group, count = np.unique(query, return_inverse=True, return_counts=True)
    weight = 1 / (count[group] * (len(count) + 1))
    order = np.argsort(score, kind="stable")
    reached = np.searchsorted(np.cumsum(weight[order]), coverage - 1e-12)
    return float(score[order[reached]]) if reached < len(order) else 1.0


def _bins(label: np.ndarray) -> list[slice]:
    """Slices of N sorted labels of about equal mass; equal labels share a bin."""
    size = len(label) // int(np.clip(len(label) // ROWS, 1, BINS))
    slices, start = [], 0
    while start < len(label):
        end = int(np.searchsorted(label, label[start + size - 1], side="right"))
        end = end if len(label) - end >= size else len(label)
        slices.append(slice(start, end))
        start = end
    return slices


def _curves(label: np.ndarray, y: np.ndarray, coverage: float, margin: float = 0.0) -> Intervals:
    """Conditional quantiles of y [N] in bins of the expected label [N], made to rise with it."""
    order = np.argsort(label, kind="stable")
    label, y = label[order], y[order]
    bins = _bins(label)
    levels = [(1 - coverage) / 2, (1 + coverage) / 2]
    quantiles = np.array([np.quantile(y[part], levels) for part in bins])
    weights = [part.stop - part.start for part in bins]
    low, high = (isotonic_regression(curve, weights=weights).x for curve in quantiles.T)
    # A mean of equal labels may be off by rounding; the knots rise all the same.
    knots = np.maximum.accumulate([label[part].mean() for part in bins])
    return Intervals(tuple(knots.tolist()), tuple(low.tolist()), tuple(high.tolist()), margin)


def fit_intervals(
    label: np.ndarray, y: np.ndarray, query: np.ndarray, fold: np.ndarray, coverage: float = 0.95
) -> Intervals:
    """Intervals meant to hold the label of a new query's candidate, from N held-out rows.

    Conformalised quantile regression (Romano et al. 2019) over queries.  A row's score comes from
    curves fitted on the other folds, the curves in use from all rows: that is cross-conformal, so
    the coverage is approximate and a report measures it.  A single fold is halved by query.
    """
    if len(np.unique(fold)) == 1:
        fold = np.unique(query, return_inverse=True)[1] % 2
    score = np.empty(len(y))
    for inside, rest in _folds(fold):
        curves = _curves(label[rest], y[rest], coverage)
        low, high = (np.interp(label[inside], curves.knots, ends) for ends in (curves.low, curves.high))
        score[inside] = np.maximum(low - y[inside], y[inside] - high)
    return _curves(label, y, coverage, query_quantile(query, score, coverage))


def fit(
    rank: np.ndarray,
    conflict: np.ndarray,
    y: np.ndarray,
    is_conflict: np.ndarray,
    query: np.ndarray,
    fold: np.ndarray,
) -> Calibration:
    """Calibration from N held-out rows: logits of both heads, labels, each row's query and fold.

    Intervals are those around a label that has not seen the row's fold.  Rows whose `is_conflict`
    is NaN teach the conflict head nothing; without any other it keeps its own probabilities.
    """
    label, label_choice = choose(rank, y, fold)
    crossed = cross_fitted(rank, y, fold, CALIBRATORS[label_choice.kind])
    known = ~np.isnan(is_conflict)
    clash, clash_choice = Platt(1.0, 0.0), Choice("platt", {})
    if known.any():
        clash, clash_choice = choose(conflict[known], is_conflict[known], fold[known])
    return Calibration(
        rank=label,
        conflict=clash,
        intervals=fit_intervals(crossed, y, query, fold),
        queries=len(np.unique(query)),
        choices={"rank": label_choice, "conflict": clash_choice},
    )
