"""Fitting of calibrators and intervals, on rows that no member learned from."""

from collections.abc import Callable
from typing import NamedTuple

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
LEVELS = np.arange(81) / 200  # shares of the rows that an interval's curves leave out, before calibration
# Of an interval's curves: so many knots at most, each from √N times this of N rows around it; from fewer
# towards the ends, where as many stand on either side, but not fewer than twice the last.
KNOTS, WINDOW, LEAST = 50, 10, 25


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
    """What the score of a new query's row is meant not to exceed.

    The quantile of split conformal prediction with queries as the exchangeable units: each of Q
    queries spreads the weight 1/(Q+1) over its rows, the new one holds the rest at infinity (Dunn
    et al. 2022).  `query` [N], `score` [N]; scores end at 1, which stands for infinity.
    """
    _, group, count = np.unique(query, return_inverse=True, return_counts=True)
    weight = 1 / (count[group] * (len(count) + 1))
    order = np.argsort(score, kind="stable")
    reached = np.searchsorted(np.cumsum(weight[order]), coverage - 1e-12)
    return float(score[order[reached]]) if reached < len(order) else 1.0


class Nested(NamedTuple):
    """Intervals at every level, each inside the one before; ends are curves over the expected label."""

    knots: np.ndarray  # [K]
    low: np.ndarray  # [M + 1, K]: the whole range, then by LEVELS
    high: np.ndarray  # [M + 1, K]

    def held(self, label: np.ndarray, y: np.ndarray) -> np.ndarray:
        """[N] share of the levels whose intervals hold y [N] at the expected label [N]."""
        levels = zip(self.low[1:], self.high[1:], strict=True)
        inside = ((np.interp(label, self.knots, low) <= y) & (y <= np.interp(label, self.knots, high))
                  for low, high in levels)  # fmt: skip
        return sum(inside, start=np.zeros(len(y))) / len(LEVELS)

    def at(self, held: float) -> Intervals:
        """The intervals that hold what this share of the levels holds."""
        level = round(held * len(LEVELS))
        return Intervals(
            *(tuple(curve.tolist()) for curve in (self.knots, self.low[level], self.high[level]))
        )


def _nested(label: np.ndarray, y: np.ndarray) -> Nested:
    """Quantiles of y [N] in windows around expected labels [N], made to rise with them."""
    order = np.argsort(label, kind="stable")
    label, y = label[order], y[order]
    knots = np.unique(label[np.linspace(0, len(label) - 1, KNOTS).round().astype(int)])
    first, last = np.searchsorted(label, knots), np.searchsorted(label, knots, side="right")
    middle = (first + last) // 2
    half = np.clip(np.minimum(middle, len(label) - middle), LEAST, round(WINDOW * np.sqrt(len(label)) / 2))
    # Equal labels share a window, however many they are.
    windows = zip(
        np.minimum(np.maximum(middle - half, 0), first), np.maximum(middle + half, last), strict=True
    )
    ends = np.stack([_ends(y[a:b]) for a, b in windows], axis=2)  # [2, M, K]
    low, high = (np.stack([isotonic_regression(curve).x for curve in curves]) for curves in ends)
    # Outwards, for labels sit on a few values, and so do quantiles: rounding must not part them.
    whole = np.zeros(len(knots))
    return Nested(knots, np.vstack([whole, np.floor(low * 1e6) / 1e6]),
                  np.vstack([whole + 1, np.ceil(high * 1e6) / 1e6]))  # fmt: skip


def _ends(y: np.ndarray) -> np.ndarray:
    """[2, M] the lower and upper quantiles of y at LEVELS, each a value of y."""
    quantiles = lambda at: np.quantile(y, at, method="inverted_cdf")
    return np.stack([quantiles(LEVELS / 2), quantiles(1 - LEVELS / 2)])


def fit_intervals(
    label: np.ndarray, y: np.ndarray, query: np.ndarray, fold: np.ndarray, coverage: float = 0.95
) -> Intervals:
    """Intervals meant to hold the label of a new query's candidate, from N held-out rows.

    Nested conformal prediction (Gupta et al. 2022) over queries: quantiles of y that depend on the
    expected label, at the narrowest level that holds new queries.  It is the level that moves, since a
    label takes few values: one step away from them an interval would hold none of them.  A row's score
    comes from curves fitted on the other folds, the curves in use from all rows: that is
    cross-conformal, so the coverage is approximate and a report measures it.  A single fold is halved
    by query.
    """
    if len(np.unique(fold)) == 1:
        fold = np.unique(query, return_inverse=True)[1] % 2
    left_out = np.empty(len(y))
    for inside, rest in _folds(fold):
        left_out[inside] = 1 - _nested(label[rest], y[rest]).held(label[inside], y[inside])
    return _nested(label, y).at(1 - query_quantile(query, left_out, coverage))


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
