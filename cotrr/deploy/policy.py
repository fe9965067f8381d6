"""A promotion policy: what the gate asks of a candidate, as a JSON file whose schema is checked."""

import pathlib
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta

from cotrr import files
from cotrr.data.contract import Share
from cotrr.data.rows import explain
from cotrr.errors import InputError

T = TypeVar("T")
Metric = Literal["compliance@1", "compliance@3", "compliance@5", "ndcg@10", "ndcg_y@10",
                 "conflict_rate@1", "conflict_rate@3", "conflict_rate@5"]  # fmt: skip
Margin = Annotated[float, Meta(gt=0, le=0.5)]


class Superiority(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The gain over the champion must be above `above` plus `relative` of the champion's own value.

    A gain is in the metric's good direction: a conflict rate that falls by a fifth has relative 0.2.
    """

    metric: Metric
    above: Share = 0.0
    relative: Share = 0.0


class NonInferiority(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The loss to the champion must be smaller than `margin`."""

    metric: Metric
    margin: Margin


class Limit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A figure of the candidate itself must lie on one side, with all of its 95 % interval."""

    figure: Metric | Literal["conflict_auc", "conflict_ece", "coverage", "latency_p95_ms"]
    at_least: float | None = None
    at_most: float | None = None

    def __post_init__(self) -> None:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("one of `at_least` and `at_most` must be there - at `$.limits`")


class Policy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All must hold for a promotion; a changed policy needs a new name."""

    name: Annotated[str, Meta(pattern=r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")]
    description: str
    superiority: Annotated[list[Superiority], Meta(min_length=1)]
    non_inferiority: list[NonInferiority] = []
    slices: list[NonInferiority] = []  # in every domain
    limits: list[Limit] = []
    level: Annotated[float, Meta(ge=0.9, lt=1)] = 0.95  # of the one-sided bound of every gain
    first_champion: Literal["clip", "so", "rule", "dual"] = "rule"  # where nothing of ours is live
    cluster_by: Annotated[str, Meta(min_length=1)] = "query_id"
    minimum_clusters: Annotated[int, Meta(ge=10)] = 50
    maximum_looks: Annotated[int, Meta(ge=1, le=100)] = 5  # at one test set, whatever came of them
    experiment: Literal["required", "if given"] = "if given"  # an A/B verdict

    @property
    def digest(self) -> str:
        """SHA-256 of what it says, defaults included."""
        return files.digest(msgspec.to_builtins(self))


def read(path: str | pathlib.Path, kind: type[T]) -> T:
    """A policy of some kind from a JSON file; raises InputError naming the field that is wrong."""
    try:
        return msgspec.json.decode(pathlib.Path(path).read_bytes(), type=kind)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise InputError("no such policy", file=path, remedy="See experiments/policies") from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        reason, field = explain(error)
        raise InputError(reason, file=path, field=field) from None
