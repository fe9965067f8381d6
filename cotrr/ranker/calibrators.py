"""From logits to probabilities with intervals: what a finished model does; NumPy alone."""

import sys
from typing import Any, NamedTuple

import numpy as np


def expit(logits: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(−x)), without overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * np.asarray(logits, np.float64)))


# What these three do is over sooner, for a few candidates, than NumPy's own have begun.
def clip(x: np.ndarray, low: float, high: float, out: np.ndarray | None = None) -> np.ndarray:
    """`np.clip`."""
    return np.minimum(np.maximum(x, low, out=out), high, out=out)


def _mean(x: np.ndarray) -> np.ndarray:
    return x.sum(axis=0) / len(x)


def _std(x: np.ndarray) -> np.ndarray:
    return np.sqrt(_mean(np.square(x - _mean(x))))


class Platt(NamedTuple):
    """p = expit(slope · logit + offset); the slope is positive, so no order changes."""

    slope: float
    offset: float

    def __call__(self, logits: np.ndarray) -> np.ndarray:
        """[...] calibrated values in (0, 1)."""
        return expit(self.slope * logits + self.offset)


class Beta(NamedTuple):
    """expit(a · log p − b · log(1 − p) + c) of p = expit(logit), with a, b ≥ 0 (Kull et al. 2017)."""

    a: float
    b: float
    c: float

    def __call__(self, logits: np.ndarray) -> np.ndarray:
        """[...] calibrated values in (0, 1)."""
        up, down = log_odds_terms(logits)
        return expit(self.a * up + self.b * down + self.c)


class Isotonic(NamedTuple):
    """Straight lines between the ends of the blocks of an isotonic regression, constant outside."""

    knots: tuple[float, ...]  # rising logits
    values: tuple[float, ...]  # never falling

    def __call__(self, logits: np.ndarray) -> np.ndarray:
        """[...] calibrated values in (0, 1)."""
        return np.interp(logits, self.knots, self.values)


Calibrator = Platt | Beta | Isotonic
KINDS: dict[str, type] = {"platt": Platt, "beta": Beta, "isotonic": Isotonic}


class Choice(NamedTuple):
    """Which kind of calibrator was taken, and each kind's log-loss on folds it was not fitted on."""

    kind: str
    log_loss: dict[str, float]


class Intervals(NamedTuple):
    """Low and high ends of y as curves over the expected label."""

    knots: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]

    def __call__(self, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Low and high ends [...] for expected labels [...]."""
        return np.interp(label, self.knots, self.low), np.interp(label, self.knots, self.high)


class Calibration(NamedTuple):
    """How scores become an expected label, a conflict probability, and 95 % intervals of y."""

    rank: Calibrator
    conflict: Calibrator
    intervals: Intervals
    queries: int  # that it was fitted on
    choices: dict[str, Choice]  # of both heads


# Of a model that is not calibrated yet: its own probabilities, and intervals that say nothing.
NONE = Calibration(Platt(1.0, 0.0), Platt(1.0, 0.0), Intervals((0.0,), (0.0,), (1.0,)), 0, {})


def log_odds_terms(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log p and −log(1 − p) [...] of p = expit(logit); both rise with the logit."""
    return -np.logaddexp(0, -logits), np.logaddexp(0, logits)


class Scored(NamedTuple):
    """Calibrated scores of [..., n] candidates; padding is 0."""

    score: np.ndarray  # expected label in [0, 1]
    std: np.ndarray  # spread of the lanes' expected labels; NaN with a single lane
    low: np.ndarray  # 95 % interval of the label
    high: np.ndarray
    p_conflict: np.ndarray
    logit: np.ndarray  # the mean rank logit that orders candidates


def conclude(
    fitted: Calibration, rank: np.ndarray, conflict: np.ndarray, final: np.ndarray, where: np.ndarray
) -> Scored:
    """What logits [L, ..., n] of L lanes say of candidates `where` [..., n]; `final` [L] are the members."""
    logit = _mean(rank[final])
    calibrated = fitted.rank(np.concatenate([logit[None], rank]))
    label, each = calibrated[0], calibrated[1:]
    low, high = fitted.intervals(label)
    std = _std(each) if len(each) > 1 else np.full(label.shape, np.nan)
    shown = np.array([label, std, np.minimum(low, label), np.maximum(high, label),
                      fitted.conflict(_mean(conflict[final]))])  # fmt: skip
    return Scored(*np.where(where, clip(shown, 0.0, 1.0), 0.0), logit=np.where(where, logit, -np.inf))


def pack(calibration: Calibration) -> dict[str, Any]:
    """The calibration in plain JSON types."""
    return {
        "rank": _plain(calibration.rank),
        "conflict": _plain(calibration.conflict),
        "intervals": _listed(calibration.intervals),
        "queries": calibration.queries,
        "choices": {
            head: {"kind": choice.kind, "log_loss": dict(choice.log_loss)}
            for head, choice in calibration.choices.items()
        },
    }


def _plain(calibrator: Calibrator) -> dict[str, Any]:
    kind = next(kind for kind, made in KINDS.items() if isinstance(calibrator, made))
    return {"kind": kind, **_listed(calibrator)}


def _listed(values: Calibrator | Intervals) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values._asdict().items()}


def unpack(facts: dict[str, Any]) -> Calibration:
    """What `pack` was given; KeyError, TypeError or ValueError where that cannot be."""
    return Calibration(
        rank=_calibrator(facts["rank"]),
        conflict=_calibrator(facts["conflict"]),
        intervals=_intervals(facts["intervals"]),
        queries=_whole(facts["queries"]),
        choices={head: _choice(choice) for head, choice in _mapping(facts["choices"]).items()},
    )


def _calibrator(facts: dict[str, Any]) -> Calibrator:
    kind = KINDS[facts["kind"]]
    if kind is Isotonic:
        fitted = Isotonic(*_polyline(facts, "knots", "values"))
        _require(fitted.values[0] >= 0 and fitted.values[-1] <= 1, "isotonic values outside [0, 1]")
        return fitted
    fitted = kind(*(_number(facts[name]) for name in kind._fields))
    # A falling calibrator would turn the order of the candidates.
    rises = fitted.slope > 0 if isinstance(fitted, Platt) else min(fitted.a, fitted.b) >= 0
    _require(rises, f"a calibrator that falls: {fitted}")
    return fitted


def _intervals(facts: dict[str, Any]) -> Intervals:
    fitted = Intervals(*_polyline(facts, "knots", "low", "high"))
    _require(fitted.low[0] >= 0 and fitted.high[-1] <= 1, "intervals outside [0, 1]")
    _require(all(low <= high for low, high in zip(fitted.low, fitted.high, strict=True)), "ends that cross")
    return fitted


def _choice(facts: dict[str, Any]) -> Choice:
    losses = {kind: _number(loss) for kind, loss in _mapping(facts["log_loss"]).items()}
    unknown = {facts["kind"], *losses} - set(KINDS)
    _require(not unknown, f"no such calibrator: {unknown}")
    return Choice(facts["kind"], losses)


def _polyline(facts: dict[str, Any], *names: str) -> list[tuple[float, ...]]:
    """Sequences of one length, at least 1, none of which falls."""
    curves = []
    for name in names:
        if not isinstance(facts[name], list):
            raise TypeError(f"{name} is not a list")
        curves.append(tuple(_number(value) for value in facts[name]))
        _require(list(curves[-1]) == sorted(curves[-1]), f"{name} is not sorted")
    _require({len(curve) for curve in curves} == {len(curves[0]) or 1}, f"lengths of {names}")
    return curves


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"not an object: {value!r}")
    return value


def _number(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"not a number: {value!r}")
    _require(abs(value) <= sys.float_info.max, "a number that is not finite")
    return float(value)


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"not a whole number: {value!r}")
    _require(value >= 0, "a negative count")
    return value


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)
