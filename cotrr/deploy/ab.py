"""The verdict of an online experiment, valid however often one looks, in Step 4's experiment shape."""

import datetime
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import numpy as np
from msgspec import Meta

from cotrr import files
from cotrr.data.rows import explain
from cotrr.deploy import interleaving, sequences
from cotrr.deploy.experiment import (
    INTERLEAVED,
    INTERLEAVING,
    Claim,
    Experiment,
    Exposure,
    Log,
    Metric,
    Outcome,
    variants,
    version_of,
)
from cotrr.deploy.interleaving import BASELINE, CANDIDATE, Interleaved
from cotrr.deploy.sequences import Band
from cotrr.errors import InputError

Digest = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]


class Effect(NamedTuple):
    """What one metric says, after each of its n units."""

    units: np.ndarray  # [n] how many units were exposed by then
    change: Band  # [n]
    relative: Band  # [n]; [0] where there are no arms
    means: dict[str, float | None]  # by arm
    observed: dict[str, int]  # units that have a value, by arm
    sample_ratio: float | None  # p-value of the split among them


class Analysis(NamedTuple):
    """The result, ready for JSON, and the curves behind it."""

    result: dict[str, Any]
    effects: dict[str, Effect]
    sample_ratio: np.ndarray  # [U] running p-value


def analyse(
    experiment: Experiment, exposures: Log, outcomes: Log,
    before: Mapping[str, float] | None = None, now: datetime.datetime | None = None,
) -> Analysis:  # fmt: skip
    """Verdict of an experiment from its records; `before`: pre-period values by unit.

    Each unit counts once, in order of its first exposure, with all that came of its requests so far.  An
    outcome that comes late revises what its unit had said, while a sequence is promised for values that
    stay: who looks before they are final pays with part of the guarantee.  `now` (unset: the last record)
    is compared with `max_duration_hours`.
    """
    served = sorted(exposures.records, key=lambda record: record.at)
    first: dict[str, Exposure] = {}
    for record in served:
        first.setdefault(record.unit, record)
    arms = np.array([_arm(record) == CANDIDATE for record in first.values()], bool)
    kept, counted = _join(experiment, served, outcomes.records)
    if experiment.mode == "interleave":
        effects = {INTERLEAVING: _credits(experiment, list(first), served, kept)}
    else:
        effects = _effects(experiment, list(first), arms, kept, before or {})
    running = _sample_ratio(experiment, arms)
    broken = _broken(experiment, served)
    moments = [record.at for record in [*served, *outcomes.records]]
    start = experiment.started_at or min(moments, default=None)
    now = now or max(moments, default=None)
    expired = bool(start and now and now - start > datetime.timedelta(hours=experiment.max_duration_hours))
    ratios = {name: effect.sample_ratio for name, effect in effects.items()}
    counts = {reason: len(found) for reason, found in broken.items()}
    holds = _holds(experiment.srm_level, _last(running), ratios, counts)
    result = msgspec.to_builtins(experiment) | judge(experiment, effects, holds, expired)
    result |= {
        "expired": expired,
        "started_at": start and start.isoformat(),
        "analysed_at": now and now.isoformat(),
        "metrics": {name: msgspec.to_builtins(experiment.metrics.get(name, Metric())) | _figures(effect)
                    for name, effect in effects.items()},
        "sample_ratio": {"units": _split(arms), "candidate_share": _share(experiment), "p": _last(running),
                         "level": experiment.srm_level, "kind": "Dirichlet-multinomial martingale"},
        "exposures": {"requests": len(served), "duplicates": exposures.duplicates, "units": len(first)}
                     | counts,
        "outcomes": {"records": len(outcomes.records), "duplicates": outcomes.duplicates, **counted},
        "preperiod_units": sum(unit in first for unit in before or ()),
        "shadow": _agreement(served),
    }  # fmt: skip
    return Analysis(files.finite(result), effects, running)


class Verdict(NamedTuple):
    """What a result decides, once it was found to follow from its own figures."""

    baseline_version: str
    candidate_version: str
    verdict: Literal["promote", "rollback", "continue"]
    held: str = ""  # why nothing is decided; empty where something is


class _Row(msgspec.Struct):
    claim: str
    met: bool
    ci: tuple[float, float] | None


class _Checks(msgspec.Struct):
    promotion: list[_Row]
    rollback: list[_Row]
    guardrails: list[_Row]


class _Figures(msgspec.Struct):
    sample_ratio_p: float | None


class _Ratio(msgspec.Struct):
    p: float | None


class _Input(msgspec.Struct):
    sha256: Digest


class _Inputs(msgspec.Struct):
    experiment: _Input
    exposures: _Input
    outcomes: _Input


class _Exposures(msgspec.Struct):
    crossed_units: int
    misnamed_requests: int


class _Result(msgspec.Struct):
    """What a verdict rests on, of what `analyse` and its launcher write."""

    verdict: Literal["promote", "rollback", "continue"]
    status: Literal["running", "expired", "held", "decided"]
    reasons: list[str]
    checks: _Checks
    metrics: dict[str, _Figures]
    sample_ratio: _Ratio
    exposures: _Exposures
    inputs: _Inputs


def read_verdict(content: dict[str, Any]) -> Verdict:
    """The verdict of a result of `analyze`; raises InputError, with the field, where it does not follow.

    Each claim of the experiment is held against its interval again, and the doubts about the data are
    raised again; the intervals and counts themselves are believed, and the hashes say of which files.
    """
    try:
        result = msgspec.convert(content, _Result)
        experiment = msgspec.convert(_definition(content), Experiment)
        claims = {"promotion": experiment.promotion, "rollback": experiment.rollback,
                  "guardrails": experiment.guardrails}  # fmt: skip
    except (msgspec.ValidationError, ValueError, RecursionError) as error:
        reason, field = explain(error)
        raise InputError(reason, field=field) from None
    for part, wanted in claims.items():
        _check_rows(getattr(result.checks, part), wanted, f"checks.{part}")
    if (result.status == "decided") != (result.verdict != "continue"):
        raise InputError(f"{result.status!r} does not go with {result.verdict!r}", field="status")
    if result.verdict != "continue":
        _check_decided(result, experiment)
    held = "; ".join(result.reasons) or result.status if result.verdict == "continue" else ""
    return Verdict(experiment.baseline_version, experiment.candidate_version, result.verdict, held)


def _definition(content: dict[str, Any]) -> dict[str, Any]:
    """The experiment's own fields of a result; each metric is in one place with its figures."""
    kept = {name: content[name] for name in Experiment.__struct_fields__ if name in content}
    fields = Metric.__struct_fields__
    return kept | {"metrics": {name: {field: row[field] for field in fields if field in row}
                               for name, row in content["metrics"].items()}}  # fmt: skip


def _check_rows(rows: list[_Row], claims: list[Claim], field: str) -> None:
    if [row.claim for row in rows] != [str(claim) for claim in claims]:
        raise InputError("not the claims of the experiment", field=field)
    for i, (row, claim) in enumerate(zip(rows, claims, strict=True)):
        if row.met != claim.holds(*(row.ci or (-np.inf, np.inf))):
            raise InputError("does not follow from `ci`", field=f"{field}[{i}].met")


def _check_decided(result: _Result, experiment: Experiment) -> None:
    """Raises InputError where a verdict does not follow from the checks."""
    if experiment.mode == "shadow":
        raise InputError("shadow decides nothing", field="mode")
    checks = result.checks
    if result.verdict == "rollback":
        breached = [claim._replace(at_least=not claim.at_least).holds(*row.ci)
                    for claim, row in zip(experiment.guardrails, checks.guardrails, strict=True)
                    if row.ci]  # fmt: skip
        if not (any(breached) or any(row.met for row in checks.rollback)):
            raise InputError("no harm is shown", field="checks.rollback")
        return
    if not all(row.met for row in [*checks.promotion, *checks.guardrails]):
        raise InputError("not all are met", field="checks.promotion")
    doubts = _holds(experiment.srm_level, result.sample_ratio.p,
                    {name: figures.sample_ratio_p for name, figures in result.metrics.items()},
                    msgspec.structs.asdict(result.exposures))  # fmt: skip
    if doubts or result.sample_ratio.p is None:
        raise InputError("; ".join(doubts) or "no units", field="sample_ratio")


def judge(
    experiment: Experiment, effects: Mapping[str, Effect], holds: list[str], expired: bool
) -> dict[str, Any]:
    """Verdict (promote, rollback, continue), status and reasons; `holds`: why the data is in doubt.

    Harm that is shown rolls back even where the data is in doubt, since the baseline is safe; nothing
    else is decided then.  What is not measured is not met.
    """
    check = lambda claims: [_check(claim, effects[claim.metric]) for claim in claims]
    promotion, rollback, guardrails = map(
        check, (experiment.promotion, experiment.rollback, experiment.guardrails)
    )
    breached = check(claim._replace(at_least=not claim.at_least) for claim in experiment.guardrails)
    harm = [row for row in [*rollback, *breached] if row["met"]]
    wanting = [row for row in [*promotion, *guardrails] if not row["met"]]
    verdict, status = "continue", "expired" if expired else "running"
    if experiment.mode == "shadow":
        reasons = ["shadow: the candidate was not served, so its effect is not known", *holds]
        status = "held" if holds else status
    elif harm:
        verdict, status = "rollback", "decided"
        reasons = [f"shown: {_words(row)}" for row in harm] + holds
    elif holds:
        reasons, status = holds, "held"
    elif not wanting:
        verdict, status = "promote", "decided"
        reasons = [f"shown: {_words(row)}" for row in [*promotion, *guardrails]]
    else:
        reasons = [f"not shown: {_words(row)}" for row in wanting]
    if expired and verdict == "continue":
        reasons = [*reasons, f"no decision within {experiment.max_duration_hours:g} h: the baseline stays"]
    return {"verdict": verdict, "status": status, "reasons": reasons,
            "checks": {"promotion": promotion, "rollback": rollback, "guardrails": guardrails}}  # fmt: skip


def _check(claim: Claim, effect: Effect) -> dict[str, Any]:
    band = effect.relative if claim.relative else effect.change
    low, high = (band.low[-1], band.high[-1]) if len(band.low) else (-np.inf, np.inf)
    claimed = {"claim": str(claim), "metric": claim.metric, "relative": claim.relative}
    return claimed | {"met": bool(claim.holds(low, high))} | _figure(band)


def _words(row: Mapping[str, Any]) -> str:
    """The claim of a check and the figure that it rests on."""
    if row["ci"] is None:
        return f"{row['claim']} (no interval from {row['n']} units)"
    return f"{row['claim']} ({row['value']:+.4g}, [{row['ci'][0]:+.4g}, {row['ci'][1]:+.4g}])"


def _join(
    experiment: Experiment, served: list[Exposure], outcomes: list[Outcome]
) -> tuple[list[Outcome], dict[str, int]]:
    """The outcomes that belong to an exposure, and how many do not, by reason."""
    requests = {record.request_id: record for record in served}
    clicks = experiment.mode == "interleave"
    wanted = {"click"} if clicks else set(experiment.metric_names)
    left_out = dict.fromkeys(("unexposed", "before_exposure", "other_metrics", "not_shown"), 0)
    kept = []
    for outcome in outcomes:
        request = requests.get(outcome.request_id)
        if request is None or request.unit != outcome.unit:
            left_out["unexposed"] += 1
        elif outcome.at < request.at:
            left_out["before_exposure"] += 1
        elif outcome.metric not in wanted:
            left_out["other_metrics"] += 1
        elif clicks and outcome.item not in (request.ranking or ()):
            left_out["not_shown"] += 1
        else:
            kept.append(outcome)
    return kept, left_out


def _effects(
    experiment: Experiment, units: list[str], arms: np.ndarray, outcomes: list[Outcome],
    before: Mapping[str, float],
) -> dict[str, Effect]:  # fmt: skip
    """The change of every metric between the arms [U] (bool: candidate)."""
    place = {unit: i for i, unit in enumerate(units)}
    covariate = np.array([before.get(unit, np.nan) for unit in units])
    found = {}
    for name in experiment.metric_names:
        mine = [outcome for outcome in outcomes if outcome.metric == name]
        at = np.array([place[outcome.unit] for outcome in mine], int)
        total = lambda weights, at=at: np.bincount(at, weights, len(units))
        value = total([outcome.value for outcome in mine])
        size = total([outcome.denominator for outcome in mine])
        kind = experiment.metrics.get(name, Metric()).kind
        # A ratio counts a unit with a value and no denominator; a mean has nothing to divide by.
        there = np.flatnonzero(size if kind == "mean" else np.bincount(at, minlength=len(units)))
        found[name] = _effect(
            experiment, kind, there, arms[there], value[there], size[there], covariate[there]
        )
    return found


def _effect(
    experiment: Experiment, kind: str, there: np.ndarray, arms: np.ndarray, value: np.ndarray,
    size: np.ndarray, covariate: np.ndarray,
) -> Effect:  # fmt: skip
    """One metric's change, from the units `there` [n] that have it: sums of values and sizes [n]."""
    per_unit = value / size if kind == "mean" else sequences.linearised(value, size, arms)
    terms = sequences.arm_outcomes(per_unit, arms, experiment.candidate_share, covariate)
    how = experiment.level, experiment.planned_units
    change, relative = sequences.difference(terms, *how), sequences.relative_change(terms, *how)
    over, under = (per_unit, np.ones(len(there))) if kind == "mean" else (value, size)
    means = {arm: float(over[inside].sum() / weight) if (weight := under[inside].sum()) else None
             for arm, inside in ((BASELINE, ~arms), (CANDIDATE, arms))}  # fmt: skip
    ratio = _last(_sample_ratio(experiment, arms))
    return Effect(there + 1, change, relative, means, _split(arms), ratio)


def _credits(
    experiment: Experiment, units: list[str], served: list[Exposure], clicks: list[Outcome]
) -> Effect:
    """The credit of interleaved lists: one mean per unit, requests without a click counting as ties."""
    clicked: dict[str, set[str]] = {}
    for click in clicks:
        if click.item and click.value > 0:
            clicked.setdefault(click.request_id, set()).add(click.item)
    won: dict[str, list[float]] = {unit: [] for unit in units}
    for record in served:
        shown = Interleaved(tuple(record.ranking or ()), tuple(record.teams or ()))
        won[record.unit].append(interleaving.credit(shown, clicked.get(record.request_id, ())))
    values = np.array([np.mean(credits) for credits in won.values()])
    band = sequences.confidence_sequence(values, experiment.level, experiment.planned_units)
    nothing = Band(*[np.empty(0)] * 3)
    return Effect(np.arange(1, len(values) + 1), band, nothing, {}, {INTERLEAVED: len(values)}, None)


def _arm(record: Exposure) -> str:
    """The variant; of an interleaved list, the team that picked first."""
    return record.teams[0] if record.teams else record.variant


def _broken(experiment: Experiment, served: list[Exposure]) -> dict[str, set[str]]:
    """Units not served as assigned, and requests served by another version than their variant's."""
    units = list({record.unit for record in served})
    assigned = dict(zip(units, variants(experiment, units), strict=True))
    coin = lambda record: interleaving.coins(experiment.salt, record.request_id, 1)[0]
    crossed, misnamed = set(), set()
    for record in served:
        if record.variant != assigned[record.unit] or (
            record.teams and coin(record) != (_arm(record) == CANDIDATE)
        ):
            crossed.add(record.unit)
        shadow = record.shadow.model_version if record.shadow else experiment.candidate_version
        if (record.model_version, shadow) != (
            version_of(experiment, record.variant), experiment.candidate_version
        ):  # fmt: skip
            misnamed.add(record.request_id)
    return {"crossed_units": crossed, "misnamed_requests": misnamed}


def _holds(
    level: float, p: float | None, by_metric: Mapping[str, float | None], broken: Mapping[str, int]
) -> list[str]:
    """Why the data is in doubt: the split of all units, and of those that have each metric, by p-value."""
    checks = {"all units": p} | {f"units with {name}": value for name, value in by_metric.items()}
    found = [f"sample ratio of {name}: p = {p:.2g}, so the split is not the planned one"
             for name, p in checks.items()
             if p is not None and p <= level / len(checks)]  # fmt: skip
    found += [f"broken assignment: {count} {reason.replace('_', ' ')}"
              for reason, count in broken.items() if count]  # fmt: skip
    return found


def _share(experiment: Experiment) -> float:
    """The planned share of the candidate; of interleaved lists, how often it picks first."""
    return {"ab": experiment.candidate_share, "interleave": 0.5, "shadow": 0.0}[experiment.mode]


def _sample_ratio(experiment: Experiment, arms: np.ndarray) -> np.ndarray:
    """[U] running p-value of the split; empty where there is none."""
    if experiment.mode == "shadow":
        return np.empty(0)
    counts = np.cumsum(np.stack([~arms, arms], axis=-1), axis=0)
    return sequences.sample_ratio(counts, (1 - _share(experiment), _share(experiment)))


def _split(arms: np.ndarray) -> dict[str, int]:
    return {BASELINE: int((~arms).sum()), CANDIDATE: int(arms.sum())}


def _last(values: np.ndarray) -> float | None:
    return float(values[-1]) if len(values) else None


def _figure(band: Band) -> dict[str, Any]:
    """The newest value of a sequence, its interval (None where there is none), and the number of units."""
    value, low, high = (part[-1:].tolist() for part in band)
    known = np.isfinite(low + high).all() and low
    return {"value": value[0] if value else None, "ci": low + high if known else None,
            "n": len(band.value), "kind": "asymptotic confidence sequence"}  # fmt: skip


def _figures(effect: Effect) -> dict[str, Any]:
    return {**effect.means, "units": effect.observed, "difference": _figure(effect.change),
            "relative": _figure(effect.relative), "sample_ratio_p": effect.sample_ratio}  # fmt: skip


def _agreement(served: list[Exposure]) -> dict[str, Any] | None:
    """Mean agreement of the two rankings over the requests that logged it."""
    logged = [record.shadow for record in served if record.shadow]
    if not logged:
        return None
    return {"requests": len(logged), "top_k_overlap": float(np.mean([a.top_k_overlap for a in logged])),
            "same_top": float(np.mean([a.same_top for a in logged]))}  # fmt: skip
