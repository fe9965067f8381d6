"""Figures of a report: a number with its interval, what it rests on, and why anything is missing.

Every mean or share is a ratio of two sums over queries; one pass of the bootstrap gives all of them
all their intervals.
"""

import hashlib
from typing import Any, NamedTuple

import numpy as np

from cotrr.evaluate import bootstrap, intervals
from cotrr.evaluate.bootstrap import Draw

Figure = dict[str, Any]
FEWEST = 10  # units: at 5, a nominal 95 % percentile interval of a mean covers 84 % or less
SAME = 1e-9  # an interval that is not wider says nothing
EDGE = 10  # successes or failures: with fewer, resampling a 0/1 metric misleads


class Ratio(NamedTuple):
    """Σ numerator / Σ denominator over queries: a mean where the denominator is 1, or a share."""

    numerator: np.ndarray  # [Q], 0 where the denominator is
    denominator: np.ndarray  # [Q] ≥ 0
    bounds: tuple[float, float] = (-np.inf, np.inf)  # of the value: no interval goes beyond


def mean(values: np.ndarray, bounds: tuple[float, float] = (-np.inf, np.inf)) -> Ratio:
    """The mean of [Q] values over the queries that have one; NaN leaves a query out."""
    there = ~np.isnan(values)
    return Ratio(np.where(there, values, 0.0), there.astype(float), bounds)


class Estimates(NamedTuple):
    """R ratios and what B resamples made of them."""

    value: np.ndarray  # [R]
    error: np.ndarray  # [R] standard error, by units
    drawn: np.ndarray  # [R, B] resampled values; NaN where undefined
    pivots: np.ndarray  # [R, B] (resampled value − value) / its own standard error
    acceleration: np.ndarray  # [R]
    units: np.ndarray  # [R] with a denominator above 0
    count: np.ndarray  # [R] Σ denominator
    binary: np.ndarray  # [R] bool: a mean of zeros and ones


class Engine(NamedTuple):
    """Point values and intervals on Q queries, which are resampled alone or by cluster."""

    unit: np.ndarray  # [Q] int: the unit that a query belongs to
    seed: int = 0
    resamples: int = 10_000
    unit_name: str = "queries"
    backend: str = "auto"

    @property
    def draw(self) -> Draw:
        """The resamples that all figures share."""
        return Draw(self.seed, self.resamples, int(self.unit.max(initial=-1)) + 1, self.backend)

    @property
    def kind(self) -> str:
        """How a percentile interval is called."""
        return f"percentile bootstrap over {self.unit_name}"

    def by_unit(self, values: np.ndarray) -> np.ndarray:
        """[U, ...] sums of [Q, ...] values over the queries of each unit."""
        if np.array_equal(self.unit, np.arange(len(values))):
            return values
        total = np.zeros((self.draw.units, *values.shape[1:]))
        np.add.at(total, self.unit, values)
        return total

    def estimate(self, ratios: list[Ratio]) -> Estimates:
        """All ratios in one pass.

        What is summed are a ratio's residuals, numerator − value · denominator, so that no digits
        cancel where a metric hardly varies.
        """
        stack = lambda part: np.stack([getattr(ratio, part) for ratio in ratios], axis=1)
        top, bottom = self.by_unit(stack("numerator")), self.by_unit(stack("denominator"))
        total = bottom.sum(axis=0)
        value = np.where(total > 0, top.sum(axis=0) / np.where(total > 0, total, 1.0), np.nan)
        residual = top - np.nan_to_num(value) * bottom
        largest = np.abs(top).max(axis=0, initial=0.0)
        residual = np.where(np.abs(residual) > 1e-12 * largest, residual, 0.0)  # no noise of rounding
        there = bottom > 0
        units = there.sum(axis=0)
        factor = np.sqrt(units / np.maximum(units - 1, 1))
        defined = np.where(total > 0, total, np.nan)
        error = factor * np.sqrt((residual**2).sum(axis=0)) / defined
        # What rounding to digits may leave of a spread of none.
        noise = 2.0**-16 * np.abs(residual).max(axis=0, initial=0.0) / np.sqrt(np.maximum(units, 1))
        parts = (residual, residual**2, residual * bottom, bottom, bottom**2)
        moved, pivots = _moves_and_pivots(_distinct_sums(self.draw, parts), factor[:, None], noise[:, None])
        rest = np.where(total - bottom > 0, total - bottom, np.nan)
        jackknife = np.where(there, -residual / rest, 0.0)
        return Estimates(
            value, error, value[:, None] + moved, pivots, intervals.acceleration(jackknife.T, there.T),
            units, total, np.array([_is_binary(ratio) for ratio in ratios]),
        )  # fmt: skip

    def figures(self, ratios: list[Ratio], estimates: Estimates | None = None) -> list[Figure]:
        """The ratios as figures: studentised by default, Wilson for a 0/1 metric near its edge."""
        if not ratios:
            return []
        found = estimates or self.estimate(ratios)
        drawn, pivots = intervals.ascending(found.drawn), intervals.ascending(found.pivots)
        bounds = np.array([ratio.bounds for ratio in ratios]).T
        kinds = {
            "percentile": intervals.percentile(drawn),
            "basic": intervals.basic(drawn, found.value),
            "bca": intervals.bca(drawn, found.value, found.acceleration),
            "studentised": intervals.studentised(pivots, found.value, found.error),
            "wilson": _wilson(found),
        }
        # An infinite end is no interval, whatever the bounds.
        kinds = {
            name: np.where(np.isfinite(ends), np.clip(ends, *bounds), np.nan) for name, ends in kinds.items()
        }
        edge = np.minimum(found.value, 1 - found.value) * found.count < EDGE - 0.5  # counts are whole
        undefined = self.resamples - drawn.defined
        return [
            self._figure(
                found.value[r], int(found.count[r]), int(found.units[r]), int(undefined[r]),
                {name: ends[:, r] for name, ends in kinds.items()},
                ("wilson", "studentised", "percentile") if found.binary[r] and edge[r]
                else ("studentised", "percentile"),
                found.error[r],
            )
            for r in range(len(ratios))
        ]  # fmt: skip

    def statistic(
        self,
        value: float,
        drawn: np.ndarray,
        count: int,
        units: int,
        kind: str = "percentile",
        bounds: tuple[float, float] = (0.0, 1.0),
        acceleration: float | None = None,
    ) -> Figure:
        """The figure of any statistic with its [B] resampled values; `kind` is the interval to show."""
        ordered, point = intervals.ascending(drawn[None]), np.array([value])
        kinds = {
            "percentile": intervals.percentile(ordered),
            "basic": intervals.basic(ordered, point),
            "centred": intervals.centred(ordered, point),
        }
        if acceleration is not None:
            kinds["bca"] = intervals.bca(ordered, point, np.array([acceleration]))
        kinds = {name: np.clip(ends[:, 0], *bounds) for name, ends in kinds.items()}
        undefined = self.resamples - int(ordered.defined[0])
        return self._figure(value, count, units, undefined, kinds, (kind,))

    def _figure(
        self,
        value: float,
        count: int,
        units: int,
        undefined: int,
        kinds: dict[str, np.ndarray],
        wanted: tuple[str, ...],
        error: float = np.nan,
    ) -> Figure:
        """A figure with the first wanted interval that there is, and why where there is none."""
        if not np.isfinite(value):
            return missing(count, self.kind, "no query defines it")
        kinds, why = self._given(kinds, wanted, units, undefined)
        chosen = next((kind for kind in wanted if kind in kinds), None)
        result: Figure = {
            "value": float(value),
            "ci": kinds[chosen].tolist() if chosen else None,
            "n": count,
            "kind": self._name(chosen or wanted[0]),
            "intervals": {name: ends.tolist() for name, ends in kinds.items()},
        }
        if np.isfinite(error):
            result["error"] = float(error)
        if units != count:
            result[self.unit_name] = units  # n counts candidates, and this what was resampled
        if not chosen:
            result["why"] = why
        if undefined and units >= FEWEST:
            result["undefined"] = undefined
        return result

    def _given(
        self, kinds: dict[str, np.ndarray], wanted: tuple[str, ...], units: int, undefined: int
    ) -> tuple[dict[str, np.ndarray], str]:
        """The intervals that can be given, and why there is none where that is so."""
        if units < FEWEST:
            return {}, f"{units} of at least {FEWEST} {self.unit_name} for an interval"
        if undefined > self.resamples / 2:
            return {}, "too few resamples define it"
        if np.ptp(kinds["percentile"]) <= SAME and "wilson" not in wanted:
            return {}, "all resamples agree, so the bootstrap cannot tell"
        wide = lambda ends: np.isfinite(ends).all() and ends[1] - ends[0] > SAME
        return {kind: ends for kind, ends in kinds.items() if wide(ends)}, "no kind of interval is defined"

    def _name(self, kind: str) -> str:
        return "Wilson" if kind == "wilson" else f"{kind} bootstrap over {self.unit_name}"


def _is_binary(ratio: Ratio) -> bool:
    """Whether it is a mean of zeros and ones; a difference may happen to be one, and is not."""
    zero_one = lambda values: np.isin(values, (0.0, 1.0)).all()
    return bool(ratio.bounds == (0, 1) and zero_one(ratio.numerator) and zero_one(ratio.denominator))


def _moves_and_pivots(
    sums: list[np.ndarray], factor: np.ndarray, noise: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """[R, B] by how much each resample moves a ratio, and that in its own standard errors.

    From the resampled sums of residuals e and denominators d: Σe, Σe², Σed, Σd, Σd².  A resample
    without spread is infinitely far from where it is not.
    """
    shift, square, cross, size, size2 = sums
    with np.errstate(invalid="ignore", divide="ignore"):
        moved = shift / np.where(size > 0, size, np.nan)
        spread = np.maximum(square - 2 * moved * cross + moved**2 * size2, 0.0)
        own = factor * np.sqrt(spread) / size
        far = np.where(moved == 0, np.nan, moved * np.inf)
        return moved, np.where(own > noise, moved / own, far)


def engine(
    queries: int, seed: int, resamples: int, clusters: np.ndarray | None = None, backend: str = "auto"
) -> Engine:
    """An engine that resamples queries, or `clusters` [Q] of them."""
    if clusters is None:
        return Engine(np.arange(queries), seed, resamples, "queries", backend)
    return Engine(np.unique(clusters, return_inverse=True)[1], seed, resamples, "clusters", backend)


def missing(count: int, kind: str, why: str) -> Figure:
    """A figure that is not defined, and why."""
    return {"value": None, "ci": None, "n": int(count), "kind": kind, "why": why}


def _distinct_sums(draw: Draw, parts: tuple[np.ndarray, ...]) -> list[np.ndarray]:
    """Each part [U, R] as its resampled sums [R, B]; equal columns (masks, mostly) are summed once."""
    place: dict[bytes, int] = {}
    columns, index = [], []
    for column in (column for part in parts for column in part.T):
        key = hashlib.sha256(np.ascontiguousarray(column).data).digest()
        if key not in place:
            place[key] = len(columns)
            columns.append(column)
        index.append(place[key])
    sums = bootstrap.weighted_sums(draw, np.stack(columns, axis=1))
    return list(sums[np.array(index).reshape(len(parts), -1)])


def _wilson(found: Estimates) -> np.ndarray:
    """[2, R] Wilson intervals; where clusters agree inside, of as many trials as the error tells."""
    variance = found.value * (1 - found.value)
    with np.errstate(invalid="ignore", divide="ignore"):
        effective = np.where(found.error > 0, variance / found.error**2, found.units)
        trials = np.where(found.units == found.count, found.count, np.minimum(effective, found.count))
        ends = intervals.wilson(found.value * trials, trials)
    return np.where(found.binary, ends, np.nan)
