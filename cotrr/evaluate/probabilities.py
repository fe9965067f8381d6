"""Figures of probabilities and intervals: AUC, calibration, reliability, coverage."""

from typing import Any, NamedTuple

import numpy as np

from cotrr.data.lists import Lists
from cotrr.evaluate import auc, bootstrap, calibration, intervals
from cotrr.evaluate.figures import Engine, Figure, Ratio, mean, missing


class Judged(NamedTuple):
    """N candidates with a probability and a 0/1 outcome."""

    query: np.ndarray  # [N] int
    probability: np.ndarray  # [N]
    outcome: np.ndarray  # [N] 0 or 1


def conflicts(engine: Engine, probabilities: dict[str, np.ndarray], lists: Lists) -> dict[str, Any]:
    """AUC, ECE, Brier score and reliability of conflict probabilities [Q, n] by system.

    The first system is the model, whose AUC and ECE stand in front as well.
    Candidates without a probability (NaN) are left out and counted by n.  A silver label is itself
    a probability: it counts as a conflict from one half on.
    """
    labelled = lists.labelled & ~np.isnan(lists.conflict)
    result: dict[str, Any] = {"systems": {}, "n": int(labelled.sum())}
    for name, probability in probabilities.items():
        known = labelled & ~np.isnan(probability)
        outcome = (lists.conflict[known] >= 0.5).astype(np.float64)
        judged = Judged(np.nonzero(known)[0], probability[known].astype(np.float64), outcome)
        result["systems"][name] = {"auc": pooled_auc(engine, judged), "brier": brier(engine, judged)}
        result["systems"][name] |= calibrated(engine, judged)
    model = next(iter(result["systems"].values()))
    result |= {"auc": model["auc"], "ece": model["ece"]}
    positive = np.where(labelled, lists.conflict >= 0.5, 0).sum(axis=1)
    rate = Ratio(positive.astype(float), labelled.sum(axis=1).astype(float), (0, 1))
    result["positive_rate"] = engine.figures([rate])[0]
    return result


def curves(probabilities: dict[str, np.ndarray], lists: Lists) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Outcomes [N] bool and probabilities [N] by system, for precision–recall curves."""
    labelled = lists.labelled & ~np.isnan(lists.conflict)
    known = {name: labelled & ~np.isnan(p) for name, p in probabilities.items()}
    return {name: (lists.conflict[k] >= 0.5, probabilities[name][k]) for name, k in known.items()}


def pooled_auc(engine: Engine, judged: Judged) -> Figure:
    """Pooled AUC of candidates."""
    positive, count = judged.outcome > 0, len(judged.query)
    if positive.all() or not positive.any():
        return missing(count, engine.kind, "all candidates are of one class" if count else "no candidates")
    unit, draw = engine.unit[judged.query], engine.draw
    items = auc.sort_items(unit, judged.probability, positive)
    classes = np.stack(
        [np.bincount(unit, side, minlength=draw.units) for side in (positive, ~positive)], axis=1
    )
    total, drawn = classes.sum(axis=0), bootstrap.weighted_sums(draw, classes)
    share = lambda wins, pairs: np.where(pairs > 0, wins / np.where(pairs > 0, pairs, 1), np.nan)
    value = float(items.positive @ np.cumsum(items.negative, dtype=np.float64) / total.prod())
    there = classes.sum(axis=1) > 0
    apart = share(auc.wins_without(items, draw.units), np.prod(total - classes, axis=1)) - value
    return engine.statistic(
        value, share(auc.weighted_wins(draw, items), np.prod(drawn, axis=0)), count, int(there.sum()),
        acceleration=float(intervals.acceleration(np.nan_to_num(apart)[None], there[None])[0]),
    )  # fmt: skip


def brier(engine: Engine, judged: Judged) -> Figure:
    """Mean squared error of the probabilities."""
    total = lambda values: np.bincount(judged.query, values, minlength=len(engine.unit)).astype(float)
    loss = (judged.probability - judged.outcome) ** 2
    return engine.figures([Ratio(total(loss), total(np.ones_like(loss)), (0, 1))])[0]


class Bins(NamedTuple):
    """Count, summed probability and summed outcome by bin."""

    sums: np.ndarray  # [U, bins, 3] of each unit
    drawn: np.ndarray  # [B, bins, 3] of each resample


def resample_bins(engine: Engine, judged: Judged, row: np.ndarray) -> Bins:
    """The bins `row` [N] of candidates, by unit and by resample."""
    sums = engine.by_unit(calibration.bin_sums(*judged, row, len(engine.unit)))
    drawn = bootstrap.weighted_sums(engine.draw, sums.reshape(len(sums), -1)).T
    return Bins(sums, drawn.reshape(-1, *sums.shape[1:]))


def binned_ece(engine: Engine, judged: Judged, bins: Bins) -> Figure:
    """The plug-in ECE of equal-width bins; its interval is centred, as resampling adds to the ECE."""
    value, drawn = float(calibration.ece(bins.sums.sum(axis=0))), calibration.ece(bins.drawn)
    return engine.statistic(value, drawn, len(judged.query), _units(bins), "centred")


def debiased_ece(engine: Engine, judged: Judged) -> Figure:
    """The L2 calibration error of equal-mass bins less what chance adds; its interval is its square's."""
    bins = resample_bins(engine, judged, calibration.equal_mass_bin_of(judged.probability))
    square = float(calibration.debiased_square(bins.sums.sum(axis=0)))
    drawn = calibration.debiased_square(bins.drawn)
    found = engine.statistic(square, drawn, len(judged.query), _units(bins), "centred", (-1, 1))
    if found["ci"] and found["ci"][1] <= 0:  # not [0, 0], which would claim certainty
        found |= {"ci": None, "why": "less than chance adds, at both ends of the interval"}
    root = lambda ends: np.sqrt(np.maximum(ends, 0.0)).tolist()
    kinds = {kind: root(ends) for kind, ends in found["intervals"].items()}
    return found | {"value": root(square), "ci": found["ci"] and root(found["ci"]), "intervals": kinds}


def calibrated(engine: Engine, judged: Judged) -> dict[str, Any]:
    """ECE (plug-in, debiased, smooth), reliability bins with bands, and whether it is calibrated."""
    p, count = judged.probability, len(judged.query)
    if not count:
        nothing = missing(0, engine.kind, "no candidates")
        errors = dict.fromkeys(("ece", "debiased_ece", "smooth_ece"), nothing)
        return errors | {"reliability": [], "consistency": None}
    bins, simulated = (
        resample_bins(engine, judged, calibration.bin_of(p)),
        calibration.simulate(p, engine.seed),
    )
    ece, smooth = binned_ece(engine, judged, bins), calibration.smooth_ece(p, judged.outcome)
    return {
        "ece": ece,
        "debiased_ece": debiased_ece(engine, judged),
        "smooth_ece": missing(count, engine.kind, "a point estimate") | {"value": smooth},
        "reliability": reliability(engine, bins, simulated.band),
        "consistency": _consistency(engine, ece["value"], bins.sums, simulated.ece),
    }


def _units(bins: Bins) -> int:
    return int(np.count_nonzero(bins.sums[..., 0].sum(axis=1)))


def _consistency(engine: Engine, ece: float, sums: np.ndarray, simulated: np.ndarray) -> dict[str, Any]:
    residual = sums[..., 1] - sums[..., 2]
    flipped = np.abs(bootstrap.flipped_sums(engine.draw, residual)).sum(axis=0)
    p = lambda null: float((1 + (null >= ece * (1 - 1e-9)).sum()) / (len(null) + 1))
    by_query = p(flipped / sums[..., 0].sum())
    return {
        "p": p(simulated), "p_by_query": by_query,
        "expected": [float(np.median(simulated)), float(np.quantile(simulated, 0.95))],
        "resamples": len(simulated),
        "verdict": "miscalibrated" if by_query < 0.05 else "no sign of miscalibration",
    }  # fmt: skip


def reliability(engine: Engine, bins: Bins, band: np.ndarray | None = None) -> list[dict[str, Any]]:
    """Each bin's predicted and observed share with its interval; `band` [2, bins] where it should lie."""
    filled = np.count_nonzero(bins.sums[..., 0], axis=0)
    counted, _, happened = np.moveaxis(bins.drawn, -1, 0)
    observed = np.where(counted > 0, happened / np.maximum(counted, 1), np.nan)
    rows = []
    for i, (count, predicted, seen) in enumerate(bins.sums.sum(axis=0)):
        row = {"low": i / calibration.BINS, "high": (i + 1) / calibration.BINS, "n": int(count),
               "predicted": None, "observed": None, "ci": None, "band": None}  # fmt: skip
        if count:
            bounds = engine.statistic(seen / count, observed[:, i], int(count), int(filled[i]))["ci"]
            row |= {"predicted": predicted / count, "observed": seen / count, "ci": bounds,
                    "band": None if band is None else band[:, i].tolist()}  # fmt: skip
        rows.append(row)
    return rows


def score_calibration(engine: Engine, score: np.ndarray, lists: Lists) -> dict[str, Any]:
    """Reliability of the calibrated score [Q, n] as the expected label y."""
    where = lists.labelled
    p, y = score[where].astype(np.float64), lists.y[where].astype(np.float64)
    judged = Judged(np.nonzero(where)[0], p, y)
    bins = resample_bins(engine, judged, calibration.bin_of(p))
    return {"ece": binned_ece(engine, judged, bins), "n": len(p), "reliability": reliability(engine, bins)}


def coverage(engine: Engine, low: np.ndarray, high: np.ndarray, lists: Lists) -> dict[str, Any]:
    """How often the 95 % interval [Q, n] of the calibrated score holds the label, and its width.

    A query counts once, however long its list: that is what the intervals promise.  `by_label` counts
    every label once.
    """
    where = lists.labelled
    y, total = np.where(where, lists.y, 0.0), where.sum(axis=1).astype(float)
    inside = np.where(where, (low <= y) & (y <= high), 0).sum(axis=1).astype(float)
    width = np.where(where, high - low, 0.0).sum(axis=1)
    of_query = lambda sums: mean(np.where(total > 0, sums / np.maximum(total, 1), np.nan), (0, 1))
    held, wide, by_label = engine.figures([of_query(inside), of_query(width), Ratio(inside, total, (0, 1))])
    return {"coverage": held, "width": wide, "by_label": by_label, "nominal": 0.95}
