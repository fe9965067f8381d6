"""An online experiment: who gets which model, what was shown, and what came of it.

Three modes.  `ab` gives each unit one of two models; `interleave` shows both in one list and lets clicks
decide; `shadow` serves the baseline and logs how far the candidate would have agreed.  Exposures,
outcomes and the pre-period are JSONL.
"""

import datetime
import pathlib
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import msgspec
import numpy as np
from msgspec import Meta

from cotrr.data.contract import Share
from cotrr.data.rows import explain
from cotrr.data.splits import unit_hash
from cotrr.deploy.interleaving import BASELINE, CANDIDATE, Interleaved, Team
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
            # Whichever way is good: what promotes must be no harm, what rolls back no gain.
            if claim.threshold < 0 if claim.at_least else claim.threshold > 0:
                what, other = ("promote", "a harm") if better else ("roll back", "a gain")
                raise ValueError(f"{claim} would {what} {other}; how much harm may pass is the `margin` of a "
                                 f"metric in `metrics` - at `$.{field}`")  # fmt: skip
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
