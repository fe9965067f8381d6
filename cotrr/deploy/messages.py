"""What the HTTP service takes and gives: the same types check requests and describe the API."""

from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta

from cotrr.data.contract import Share
from cotrr.deploy import candidates as requests

JSON, ARRAYS, PROBLEM = "application/json", "application/vnd.cotrr.arrays", "application/problem+json"


class Limits(NamedTuple):
    """What a request may cost."""

    max_body: int = 8 * 2**20  # bytes
    max_candidates: int = 1000
    timeout_s: float = 10.0  # for the head of a request, and again for its body


class Body(msgspec.Struct, forbid_unknown_fields=True):
    """A request in JSON."""

    query: dict[str, Any]
    candidates: list[Any]  # checked one by one: a bad one is put behind and stops no other
    top_m: requests.Count | None = None
    request_id: str = ""
    unit: str = ""


class Result(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    """One candidate; the numbers are null where it was not scored."""

    rerank_score: Share | None
    rerank_std: Share | None
    rerank_low: Share | None
    rerank_high: Share | None
    p_conflict: Share | None
    rank: Annotated[int, Meta(ge=1)]
    original_rank: Annotated[int, Meta(ge=1)]
    model_version: str
    id: str | None = None  # as the request states it
    reason: str | None = None  # why it was put behind


class Answer(msgspec.Struct):
    """The candidates, best first; `fallback` is empty unless they are in their original order, and why."""

    model_version: str
    label: str
    fallback: str
    results: list[Result]


class Trouble(msgspec.Struct):
    """What is wrong with a request (RFC 9457)."""

    status: int
    title: str
    detail: str
    field: str | None = None
