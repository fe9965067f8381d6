"""The checks of a promotion: gains over the champion by one-sided bounds, and limits of figures.

Every check passes, fails, or holds; what is missing or undecided holds.
"""

from functools import partial
from typing import NamedTuple

import numpy as np
from scipy.special import ndtri
from scipy.stats import binom, t

from cotrr.deploy.policy import Limit
from cotrr.evaluate import acceptance, figures, intervals, ranking
from cotrr.evaluate.comparisons import holm
from cotrr.evaluate.figures import Engine, Figure, mean

PASS, HOLD, FAIL = "pass", "hold", "fail"
POWER = 0.8  # with which the further queries that are asked for decide
LOWER_IS_BETTER = "conflict_rate"


class Check(NamedTuple):
    """One question of a policy, and what the evidence says."""

    check: str
    verdict: str  # pass, hold, fail
    why: str = ""
    value: float | None = None
    bound: float | None = None  # one-sided, at the policy's level
    threshold: float | None = None
    p: float | None = None  # that it holds; adjusted by Holm within its family
    more_queries: int | None = None  # that would decide it, were the value the truth


class Gain(NamedTuple):
    """A difference that must lie above a threshold: the mean of [Q] values, NaN where undefined."""

    check: str
    values: np.ndarray
    threshold: float


def verdict(checks: list[Check]) -> str:
    """PROMOTE where all checks pass, REJECT where any fails, HOLD otherwise.

    >>> verdict([Check("a", PASS), Check("b", HOLD)]), verdict([])
    ('HOLD', 'HOLD')
    """
    found = {check.verdict for check in checks}
    return "REJECT" if FAIL in found else "PROMOTE" if found == {PASS} else "HOLD"


def judge_gains(engine: Engine, gains: list[Gain], level: float) -> list[Check]:
    """A family of gains, each tested one-sided on units that are resampled whole; Holm adjusts.

    A gain passes where it is significantly above its threshold, and fails where it is significantly
    below.  Two tests must agree, for each errs where the other does not: bootstrap-t (Davison & Hinkley
    1997, 4.4.1), which knows skew, and Student's t on the units, which is steady where few of them move.
    """
    if not gains:
        return []
    found = engine.estimate([mean(gain.values, (-1, 1)) for gain in gains])
    alpha, thresholds = 1 - level, np.array([gain.threshold for gain in gains])
    rare = [Rare.of(engine, gain) for gain in gains]
    above, below = _p_values(found, thresholds)
    for i, few in enumerate(rare):
        if few:
            above[i], below[i] = few.p(), 1.0
    told = (found.units >= figures.FEWEST) & np.isfinite(above) & np.isfinite(below)
    above, below = (holm(np.where(told, p, 1.0)) for p in (above, below))
    more = _more(found, thresholds, alpha / len(gains))
    lower = _lower(found, level)
    checks = []
    for i, gain in enumerate(gains):
        if not told[i]:
            why = f"{found.units[i]} of at least {figures.FEWEST} {engine.unit_name}"
            checks.append(Check(gain.check, HOLD, why, _number(found.value[i]), None, gain.threshold))
            continue
        said = PASS if above[i] <= alpha else FAIL if below[i] <= alpha else HOLD
        needed = few.more(alpha / len(gains)) if (few := rare[i]) else more[i]
        checks.append(
            Check(
                gain.check, said,
                {PASS: "", FAIL: "decided: on the wrong side", HOLD: "not decided"}[said],
                float(found.value[i]), _number(lower[i]), gain.threshold, float(above[i]),
                needed if said == HOLD else None,
            )
        )  # fmt: skip
    return checks


class Rare(NamedTuple):
    """A margin that so few units touch that neither resampling nor Student tells: an exact bound does.

    A unit loses 1 at most, so were the mean loss the margin, at least that share of the units would
    lose; gains are not even counted.
    """

    losers: int
    units: int
    margin: float

    @classmethod
    def of(cls, engine: Engine, gain: Gain) -> "Rare | None":
        """None where the ordinary tests serve: units differ in size, enough of them move, no margin."""
        there = engine.by_unit((~np.isnan(gain.values)).astype(float))
        unit, there = engine.by_unit(np.nan_to_num(gain.values))[there > 0], there[there > 0]
        if gain.threshold >= 0 or (unit != 0).sum() >= figures.EDGE or len(set(there)) > 1:
            return None
        return cls(int((unit < 0).sum()), len(unit), -gain.threshold)

    def p(self) -> float:
        """That no more units lose, were the mean loss the margin."""
        return float(binom.cdf(self.losers, self.units, self.margin))

    def more(self, alpha: float) -> int | None:
        """How many more units would pass, with as many losers among them; None beyond 100 times as many."""
        for times in 1.02 ** np.arange(1, 235):
            units = int(np.ceil(self.units * times))
            if binom.cdf(round(self.losers * times), units, self.margin) <= alpha:
                return units - self.units
        return None


def _p_values(found: figures.Estimates, thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[R] p-values of "not above" and of "not below" the thresholds; NaN where undefined.

    Where all units say the same there is nothing to resample: were the truth on the other side, some
    share of the units would have to lie at the far end, and none of them does.
    """
    value, distance, none = found.value, found.value - thresholds, found.error == 0
    reached = (distance / np.where(none, 1.0, found.error))[:, None]
    count = found.pivots.shape[1]
    share = lambda hit: (1 + hit.sum(axis=1)) / (count + 1)
    defined = np.where(np.isnan(found.pivots).any(axis=1), np.nan, 1.0)
    agreed = lambda by, room: (1 - np.clip(by / np.maximum(room, 1e-9), 0, 1)) ** found.units
    student = partial(t.sf, df=np.maximum(found.units - 1, 1))
    above = np.maximum(share(found.pivots >= reached) * defined, student(reached[:, 0]))
    below = np.maximum(share(found.pivots <= reached) * defined, student(-reached[:, 0]))
    return (np.where(none, agreed(distance, 1 + value), above),
            np.where(none, agreed(-distance, 1 - value), below))  # fmt: skip


def _lower(found: figures.Estimates, level: float) -> np.ndarray:
    """[R] one-sided lower bounds of both tests together."""
    student = t.ppf(level, np.maximum(found.units - 1, 1))
    return found.value - found.error * np.maximum(
        intervals.quantile(intervals.ascending(found.pivots), level), student
    )


def _more(found: figures.Estimates, thresholds: np.ndarray, alpha: float) -> list[int | None]:
    """How many more queries would decide each, with POWER; None where the value is at its threshold."""
    distance = np.abs(found.value - thresholds)
    with np.errstate(divide="ignore", invalid="ignore"):
        needed = found.count * ((ndtri(1 - alpha) + ndtri(POWER)) * found.error / distance) ** 2
    return [int(np.ceil(n - c)) if np.isfinite(n) and n > c else None
            for n, c in zip(needed, found.count, strict=True)]  # fmt: skip


def gain_of(metric: str, candidate: np.ndarray, incumbent: np.ndarray, relative: float = 0.0) -> np.ndarray:
    """[Q] by how much the candidate is better, less `relative` of the incumbent's value.

    >>> gain_of("conflict_rate@1", np.array([0.0, 1.0]), np.array([1.0, 1.0]), relative=0.2)
    array([ 0.8, -0.2])
    """
    better = incumbent - candidate if metric.startswith(LOWER_IS_BETTER) else candidate - incumbent
    better = np.where(np.abs(better) < ranking.NOISE, 0.0, better)
    return better - relative * incumbent if relative else better


def judge_limit(limit: Limit, figure: Figure | None) -> Check:
    """A figure of the candidate against its limit, by the figure's own 95 % interval."""
    least = limit.at_least is not None
    threshold = limit.at_least if limit.at_least is not None else limit.at_most
    assert threshold is not None
    said = {"met": PASS, "not met": FAIL}.get(acceptance.judge(figure, threshold, least), HOLD)
    figure = figure or {"value": None, "ci": None, "why": "not measured"}
    why = "" if said == PASS else figure.get("why") or f"interval {figure['ci']}"
    bound = figure["ci"][0 if least else 1] if figure["ci"] else None
    sign = "≥" if least else "≤"
    return Check(f"{limit.figure} {sign} {threshold:g}", said, why, figure["value"], bound, threshold)


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
