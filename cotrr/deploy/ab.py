"""An online experiment: who gets which model, what was shown and what came of it, and the verdict.

Three modes.  `ab` gives each unit one of two models; `interleave` shows both in one list and lets clicks
decide; `shadow` serves the baseline and logs how far the candidate would have agreed.  Exposures,
outcomes and the pre-period are JSONL; the result has Step 4's experiment shape and more.
"""

import datetime
import pathlib
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import msgspec
import numpy as np
from msgspec import Meta

from cotrr import files
from cotrr.data.contract import Share
from cotrr.data.rows import explain
from cotrr.data.splits import unit_hash
from cotrr.deploy import interleaving, sequences
from cotrr.deploy.interleaving import BASELINE, CANDIDATE, Interleaved, Team
from cotrr.deploy.sequences import Band
from cotrr.errors import InputError

INTERLEAVED, INTERLEAVING = "interleaved", "interleaving"  # the variant, and its only metric
# What is better of the metrics that the contract names; of others, `metrics` says it.
HIGHER_IS_BETTER = {"compliance_at_1": True, "compliance_at_3": True, "compliance_at_5": True,
                    "ndcg_at_10": True, "conflict_rate": False, "conflict_auc": True, "conflict_ece": False,
                    INTERLEAVING: True}  # fmt: skip

Id = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,99}\Z")]  # may name a file
Name = Annotated[str, Meta(min_length=1, max_length=500)]
Version = Annotated[str, Meta(min_length=1, max_length=200)]
Number = Annotated[float, Meta(ge=-1e9, le=1e9)]  # its square stays finite
Moment = Annotated[datetime.datetime, Meta(tz=True)]
Probability = Annotated[float, Meta(gt=0, lt=1)]
Variant = Literal["baseline", "candidate", "interleaved"]
T = TypeVar("T")


class Claim(NamedTuple):
    """That the change of a metric, candidate against baseline, is at least or at most so much."""

    metric: str
    relative: bool
    at_least: bool
    threshold: float

    def holds(self, low: float, high: float) -> bool:
        """Whether it is true all over the interval of the change."""
        return low >= self.threshold if self.at_least else high <= self.threshold

    def __str__(self) -> str:
        amount = f"{100 * self.threshold:+.6g} %" if self.relative else f"{self.threshold:+.6g}"
        return f"{self.metric} {'at least' if self.at_least else 'at most'} {amount}"


class Criterion(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One bound of the change of a metric; `relative_`: as a share of the baseline's mean."""

    metric: Name
    at_least: Number | None = None
    at_most: Number | None = None
    relative_at_least: Number | None = None
    relative_at_most: Number | None = None

    def __post_init__(self) -> None:
        if len(self._bounds()) != 1:
            raise ValueError("expected one of at_least, at_most, relative_at_least, relative_at_most")

    def _bounds(self) -> list[tuple[str, float]]:
        given = [(name, getattr(self, name)) for name in self.__struct_fields__ if name != "metric"]
        return [(name, threshold) for name, threshold in given if threshold is not None]

    @property
    def claim(self) -> Claim:
        """What it says."""
        ((name, threshold),) = self._bounds()
        return Claim(self.metric, name.startswith("relative"), name.endswith("at_least"), threshold)


class Metric(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """How a metric is taken per unit; with a `margin` it is a guardrail: not worse by more than that."""

    kind: Literal["mean", "ratio"] = "mean"  # of the units' Σ value / Σ denominator, or of their sums
    higher_is_better: bool | None = None
    margin: Annotated[float, Meta(ge=0, le=1e9)] | None = None


class Experiment(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Step 4's experiment, and what this one needs besides."""

    experiment_id: Id
    baseline_version: Version
    candidate_version: Version
    test_set_path: str
    # A list, or flat {metric: number} of metrics that should rise: at least that much, or at most.
    promotion_criteria: list[Criterion] | dict[Name, Number]
    rollback_criteria: list[Criterion] | dict[Name, Number]
    max_duration_hours: Annotated[float, Meta(gt=0, le=1e5)]
    mode: Literal["ab", "shadow", "interleave"] = "ab"
    salt: str = ""  # empty: the experiment_id
    candidate_share: Probability = 0.5
    level: Probability = 0.95  # of the confidence sequences
    srm_level: Probability = 0.01  # false alarms of all sample-ratio checks together
    planned_units: Annotated[int, Meta(ge=1)] = 10_000  # where the sequences are narrowest
    started_at: Moment | None = None  # unset: the first exposure
    metrics: dict[Name, Metric] = {}

    def __post_init__(self) -> None:
        self.salt = self.salt or self.experiment_id
        for metric, how in self.metrics.items():
            if how.margin is not None and self.higher_is_better(metric) is None:
                raise ValueError(f"a guardrail needs `higher_is_better` - at `$.metrics.{metric}`")
        if not self.promotion and self.mode != "shadow":
            raise ValueError("nothing could ever promote - at `$.promotion_criteria`")
        for claim in [*self.promotion, *self.rollback, *self.guardrails]:
            if self.mode == "interleave" and (claim.metric != INTERLEAVING or claim.relative):
                raise ValueError(f"interleaving decides by bounds on the change of `{INTERLEAVING}` alone; "
                                 f"this is {claim}")  # fmt: skip
            if self.mode != "interleave" and claim.metric == INTERLEAVING:
                raise ValueError(f"`{INTERLEAVING}` needs mode interleave; this is {self.mode}")

    def higher_is_better(self, metric: str) -> bool | None:
        """As declared, or as the contract means its own metrics; None where nobody says it."""
        declared = self.metrics[metric].higher_is_better if metric in self.metrics else None
        return HIGHER_IS_BETTER.get(metric) if declared is None else declared

    @property
    def promotion(self) -> list[Claim]:
        """All of these promote."""
        return self._claims("promotion_criteria", better=True)

    @property
    def rollback(self) -> list[Claim]:
        """Any of these rolls back."""
        return self._claims("rollback_criteria", better=False)

    @property
    def guardrails(self) -> list[Claim]:
        """What must be shown of each guardrail: that the change is not worse than its margin."""
        return [Claim(name, False, bool(up := self.higher_is_better(name)), -how.margin if up else how.margin)
                for name, how in self.metrics.items() if how.margin is not None]  # fmt: skip

    @property
    def metric_names(self) -> list[str]:
        """All metrics to analyse."""
        if self.mode == "interleave":
            return [INTERLEAVING]
        return list(dict.fromkeys([*self.metrics, *(c.metric for c in [*self.promotion, *self.rollback])]))

    def _claims(self, field: str, better: bool) -> list[Claim]:
        criteria = getattr(self, field)
        if isinstance(criteria, list):
            found = [criterion.claim for criterion in criteria]
        else:
            found = [self._flat(field, metric, number, better) for metric, number in criteria.items()]
        for claim in found:
            up = self.higher_is_better(claim.metric)
            if up is not None and claim.at_least != (up == better):
                raise ValueError(f"{claim} bounds the change from the wrong side - at `$.{field}`")
        return found

    def _flat(self, field: str, metric: str, number: float, better: bool) -> Claim:
        # Of a metric that should fall, −0.2 may be points or a share; of an unknown one it may be either.
        if not self.higher_is_better(metric) or number == 0 or (number > 0) != better:
            raise ValueError(
                f"{metric}: {number:g} may be read in several ways; write "
                f'{{"metric": "{metric}", "at_least": …}}, or at_most, relative_at_least, relative_at_most '
                f"- at `$.{field}`"
            )
        return Claim(metric, False, better, number)


class Agreement(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """How far the candidate's ranking, not shown, agrees with the one that was."""

    model_version: Name
    top_k: Annotated[int, Meta(ge=1)]
    top_k_overlap: Share
    same_top: bool


class Exposure(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One request as it was served."""

    experiment_id: Id
    unit: Name
    request_id: Name
    at: Moment
    variant: Variant
    model_version: Name
    shadow: Agreement | None = None
    ranking: list[Name] | None = None  # what was shown, and the team of each item
    teams: list[Team] | None = None

    def __post_init__(self) -> None:
        if len(self.ranking or ()) != len(self.teams or ()):
            raise ValueError("`ranking` and `teams` differ in length - at `$.teams`")
        if self.variant == INTERLEAVED and not self.teams:
            raise ValueError("an interleaved list without items - at `$.teams`")


class Outcome(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What came of a request, by one metric; in mode interleave, a click on `item`."""

    experiment_id: Id
    unit: Name
    request_id: Name
    at: Moment
    metric: Name
    value: Number
    denominator: Annotated[float, Meta(ge=0, le=1e9)] = 1.0
    item: Name | None = None

    def __post_init__(self) -> None:
        if 0 < self.denominator < 1e-9:
            raise ValueError("expected 0, or at least 1e-9 - at `$.denominator`")


class Before(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A unit's value from before the experiment."""

    unit: Name
    value: Number


class Log(NamedTuple):
    """Distinct records of a file, and how many lines repeated one."""

    records: list
    duplicates: int = 0


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


def variants(experiment: Experiment, units: Iterable[str]) -> list[Variant]:
    """What each unit gets: a keyed blake2b hash of salt and unit, the same everywhere and for ever."""
    if experiment.mode != "ab":
        return ["baseline" if experiment.mode == "shadow" else "interleaved" for _ in units]
    chosen = unit_hash("experiment unit", units, experiment.salt) < experiment.candidate_share
    return np.where(chosen, CANDIDATE, BASELINE).tolist()


def assign(experiment: Experiment, unit: str) -> Variant:
    """What one unit gets."""
    return variants(experiment, [unit])[0]


def version_of(experiment: Experiment, variant: str) -> str:
    """The model version that serves a variant; interleaved lists name both."""
    versions = {BASELINE: experiment.baseline_version, CANDIDATE: experiment.candidate_version}
    return versions.get(variant) or "+".join(versions.values())


def exposure(
    experiment: Experiment, unit: str, request_id: str, at: datetime.datetime,
    shadow: Agreement | None = None, shown: Interleaved | None = None,
) -> Exposure:  # fmt: skip
    """The record of a request that is served to `unit`; raises InputError for a time without a zone."""
    if at.tzinfo is None:
        raise InputError("a time without a zone", field="at", remedy="Use datetime.now(datetime.UTC)")
    variant = assign(experiment, unit)
    return Exposure(experiment_id=experiment.experiment_id, unit=unit, request_id=request_id, at=at,
                    variant=variant, model_version=version_of(experiment, variant), shadow=shadow,
                    ranking=list(shown.ranking) if shown else None,
                    teams=list(shown.teams) if shown else None)  # fmt: skip


def shadow_line(
    experiment: Experiment, unit: str, request_id: str, at: datetime.datetime,
    baseline: Sequence[str], candidate: Sequence[str], k: int = 10,
) -> bytes:  # fmt: skip
    """The JSON line of a request that the baseline served and both ranked; InputError for empty lists.

    The overlap is the share of the k best (or of all, where lists are shorter) that both have.
    """
    if experiment.mode != "shadow" or not (baseline and candidate):
        raise InputError(f"request {request_id!r}: expected mode shadow and two rankings with items")
    tops = set(baseline[:k]), set(candidate[:k])
    overlap = len(tops[0] & tops[1]) / max(map(len, tops))
    agreement = Agreement(model_version=experiment.candidate_version, top_k=k, top_k_overlap=overlap,
                          same_top=baseline[0] == candidate[0])  # fmt: skip
    return to_line(exposure(experiment, unit, request_id, at, shadow=agreement))


def to_line(record: msgspec.Struct) -> bytes:
    """A record as one JSON line."""
    return msgspec.json.encode(record) + b"\n"


def read_experiment(path: str | pathlib.Path) -> Experiment:
    """An experiment from its JSON file; raises InputError naming file and field."""
    return _decode(pathlib.Path(path).read_bytes(), Experiment, path)


def read_exposures(path: str | pathlib.Path, experiment: Experiment) -> Log:
    """Exposures, one a request; raises InputError for what is broken or contradicts another line."""
    return _read(path, Exposure, lambda record: record.request_id, experiment.experiment_id)


def read_outcomes(path: str | pathlib.Path, experiment: Experiment) -> Log:
    """Outcomes, one a request, metric and item; raises InputError as `read_exposures` does."""
    key = lambda record: (record.request_id, record.metric, record.item)
    return _read(path, Outcome, key, experiment.experiment_id)


def read_before(path: str | pathlib.Path) -> dict[str, float]:
    """Pre-period values by unit; raises InputError as `read_exposures` does."""
    return {record.unit: record.value for record in _read(path, Before, lambda record: record.unit).records}


def _decode(content: bytes, kind: type[T], file: object, line: int | None = None) -> T:
    try:
        return msgspec.json.decode(content, type=kind)
    except msgspec.ValidationError as error:
        reason, field = explain(error)
        raise InputError(reason, file=file, line=line, field=field) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"broken JSON: {error}", file=file, line=line) from None


def _read(
    path: str | pathlib.Path, kind: type, key: Callable[[Any], Hashable], experiment_id: str | None = None
) -> Log:
    """Reads JSONL: a record that comes twice counts once, two that differ under one key are refused."""
    seen: dict[Hashable, tuple[int, Any]] = {}
    lines = 0
    with open(path, "rb") as stream:
        for number, content in enumerate(stream, 1):
            if not content.strip():
                continue
            lines += 1
            record = _decode(content, kind, path, number)
            if experiment_id and record.experiment_id != experiment_id:
                raise InputError(f"expected {experiment_id!r}, got {record.experiment_id!r}",
                                 file=path, line=number, field="experiment_id")  # fmt: skip
            first, other = seen.setdefault(key(record), (number, record))
            if other != record:
                raise InputError(f"contradicts line {first}, which has the same key", file=path, line=number,
                                 remedy="Keep the one that is true")  # fmt: skip
    return Log([record for _, record in seen.values()], lines - len(seen))


def analyse(
    experiment: Experiment, exposures: Log, outcomes: Log,
    before: Mapping[str, float] | None = None, now: datetime.datetime | None = None,
) -> Analysis:  # fmt: skip
    """Verdict of an experiment from its records; `before`: pre-period values by unit.

    Each unit counts once, in order of its first exposure, with all that came of its requests so far: an
    outcome that comes late changes what its unit had said.  `now` (unset: the last record) is compared
    with `max_duration_hours`.
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
    result = msgspec.to_builtins(experiment) | judge(
        experiment, effects, _holds(experiment, _last(running), effects, broken), expired
    )
    result |= {
        "expired": expired,
        "started_at": start and start.isoformat(),
        "analysed_at": now and now.isoformat(),
        "metrics": {name: msgspec.to_builtins(experiment.metrics.get(name, Metric())) | _figures(effect)
                    for name, effect in effects.items()},
        "sample_ratio": {"units": _split(arms), "candidate_share": _share(experiment), "p": _last(running),
                         "level": experiment.srm_level, "kind": "Dirichlet-multinomial martingale"},
        "exposures": {"requests": len(served), "duplicates": exposures.duplicates, "units": len(first)}
                     | {reason: len(found) for reason, found in broken.items()},
        "outcomes": {"records": len(outcomes.records), "duplicates": outcomes.duplicates, **counted},
        "preperiod_units": sum(unit in first for unit in before or ()),
        "shadow": _agreement(served),
    }  # fmt: skip
    return Analysis(files.finite(result), effects, running)


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
    experiment: Experiment, p: float | None, effects: Mapping[str, Effect], broken: Mapping[str, set[str]]
) -> list[str]:
    """Why the data is in doubt: the split of all units, and of those that have each metric."""
    checks = {"all units": p} | {f"units with {name}": e.sample_ratio for name, e in effects.items()}
    found = [f"sample ratio of {name}: p = {p:.2g}, so the split is not the planned one"
             for name, p in checks.items()
             if p is not None and p <= experiment.srm_level / len(checks)]  # fmt: skip
    found += [f"broken assignment: {len(which)} {reason.replace('_', ' ')}"
              for reason, which in broken.items() if which]  # fmt: skip
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
