"""The reranker inside Step 4's request: fast, thread-safe, and never the reason that a request fails.

reranker = Reranker.load("checkpoints/cotrr_lite_v1")                # a model folder
reranker = Reranker.load("registry", version="champion")             # verified, and `refresh` follows it
reranked = reranker.rerank(query, candidates)
"""

import collections
import pathlib
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cotrr.deploy import candidates as requests
from cotrr.deploy.registry import Registry
from cotrr.deploy.scorer import Query, Scorer
from cotrr.deploy.store import open_store
from cotrr.errors import InputError
from cotrr.ranker import model_files
from cotrr.ranker.calibrators import Scored

TOP_M = 20  # Step 4's default


class Reranked(NamedTuple):
    """The candidates' new order, and what is known of each, by original index."""

    order: list[int]  # original indices, best first
    scored: Scored | None  # [n]; None: the order is the original one, and `fallback` says why
    reasons: dict[int, str]  # why a candidate was put behind
    fallback: str
    model_version: str

    def rows(self) -> list[dict[str, Any]]:
        """What the contract adds to each candidate, best first; null where it was not scored."""
        rows = []
        for rank, i in enumerate(self.order, 1):
            known = self.scored is not None and i not in self.reasons
            row: dict[str, Any] = {
                field: _number(getattr(self.scored, name)[i]) if known else None
                for field, name in _FIELDS.items()
            }
            row |= {"rank": rank, "original_rank": i + 1, "model_version": self.model_version}
            rows.append(row | ({"reason": self.reasons[i]} if i in self.reasons else {}))
        return rows


_FIELDS = {"rerank_score": "score", "rerank_std": "std", "rerank_low": "low", "rerank_high": "high",
           "p_conflict": "p_conflict"}  # fmt: skip


def arrange(logit: np.ndarray, bad: Sequence[int] = (), top_m: int = TOP_M) -> list[int]:
    """Original indices, best first: the first `top_m` (0: all) by logit, behind them the rest as it came.

    Equal logits keep their order; the `bad` among the first stand with the rest.

    >>> arrange(np.array([0.1, 0.9, 0.5, 2.0]), bad=[2], top_m=3)
    [1, 0, 2, 3]
    """
    head = min(top_m or len(logit), len(logit))
    ranked = [i for i in np.argsort(-logit[:head], kind="stable").tolist() if i not in bad]
    return ranked + sorted(set(range(len(logit))).difference(ranked))


class Source(NamedTuple):
    """Where a reranker came from and looks for news."""

    registry: Registry
    version: str


class Reranker:
    """Reranks one query at a time, from any number of threads."""

    def __init__(self, scorer: Scorer, top_m: int = TOP_M, deadline_ms: float | None = None,
                 source: Source | None = None):  # fmt: skip
        """`deadline_ms` after the start of a request the original order is returned."""
        self._scorer, self._source = scorer, source
        self._top_m, self._deadline = top_m, deadline_ms
        self._counts: collections.Counter[str] = collections.Counter()
        self._lock, self._refreshing = threading.Lock(), threading.Lock()

    @classmethod
    def load(cls, place: str | pathlib.Path, name: str = "cotrr", version: str = "champion",
             top_m: int = TOP_M, deadline_ms: float | None = None) -> "Reranker":  # fmt: skip
        """A reranker from a model folder, or from a registry's version or alias, its files verified.

        Raises InputError where there is no such model, or its files were changed.
        """
        if (pathlib.Path(place) / "model.json").exists():
            return cls(Scorer(model_files.parse(model_files.read_files(place), place)), top_m, deadline_ms)
        source = Source(Registry(open_store(str(place)), name), version)
        return cls(_newest(source), top_m, deadline_ms, source)

    @property
    def model_version(self) -> str:
        """The version of the model that serves."""
        return self._scorer.version

    def swap(self, scorer: Scorer) -> None:
        """Serves with another model from the next request on; those that run end with the old one."""
        self._scorer = scorer
        self._count("swapped")

    def refresh(self) -> bool:
        """Follows the registry: whether another model serves now.

        Raises InputError, and goes on as before, where the new one cannot be read and verified, or where
        the version is no longer one of ours.
        """
        if self._source is None:
            return False
        with self._refreshing:
            label = self._source.registry.state().version(self._source.version)
            if label.model == self.model_version:
                return False
            self.swap(_newest(self._source))
            return True

    def rerank(self, query: Mapping[str, Any], candidates: Sequence[Mapping[str, Any]]) -> Reranked:
        """The candidates of a query in the contract's fields, in Step 4's order; never raises."""
        start, scorer = time.perf_counter(), self._scorer
        try:
            asked = requests.parse_query(query, scorer.text_dim)
            parsed = requests.parse(candidates, asked, scorer.image_dim)
            return self._ranked(scorer, asked, parsed, start)
        except InputError as error:
            return self._original(scorer, len(candidates), "bad query", str(error))
        except Exception as error:  # whatever it is, the request goes on
            return self._original(scorer, _length(candidates), "unexpected", repr(error))

    def rerank_arrays(self, query: Query, image: np.ndarray, attributes: np.ndarray) -> Reranked:
        """As `rerank`, of arrays [n, d] and [n, A] (in the order of contract.ATTRIBUTES); NaN is missing."""
        start, scorer = time.perf_counter(), self._scorer
        try:
            parsed = _check_arrays(scorer, query, image, attributes)
            return self._ranked(scorer, query, parsed, start)
        except InputError as error:
            return self._original(scorer, _length(attributes), "bad query", str(error))
        except Exception as error:
            return self._original(scorer, _length(attributes), "unexpected", repr(error))

    def stats(self) -> dict[str, int]:
        """How many requests came, and how many of them, or of their candidates, went how."""
        with self._lock:
            return dict(self._counts)

    def _ranked(self, scorer: Scorer, query: Query, parsed: requests.Parsed, start: float) -> Reranked:
        if self._late(start):
            return self._original(scorer, len(parsed.attributes), "deadline", "passed before scoring")
        scored = scorer.score(query, parsed.image, parsed.attributes)
        reasons = dict(parsed.reasons)
        for i in np.flatnonzero(~np.isfinite(scored.logit)):
            reasons.setdefault(int(i), "no finite score")
        if self._late(start):
            return self._original(scorer, len(scored.logit), "deadline", "passed while scoring")
        self._count("requests", **({"bad candidates": len(reasons)} if reasons else {}))
        order = arrange(scored.logit, list(reasons), self._top_m)
        return Reranked(order, scored, reasons, "", scorer.version)

    def _original(self, scorer: Scorer, count: int, kind: str, why: str) -> Reranked:
        self._count("requests", **{f"fallback: {kind}": 1})
        return Reranked(list(range(count)), None, {}, f"{kind}: {why}", scorer.version)

    def _late(self, start: float) -> bool:
        return self._deadline is not None and 1e3 * (time.perf_counter() - start) > self._deadline

    def _count(self, name: str, **more: int) -> None:
        with self._lock:
            self._counts.update({name: 1, **more})


def _newest(source: Source) -> Scorer:
    """The scorer of what a version or alias means now, tried once before it serves."""
    version = source.registry.state().version(source.version)
    content = source.registry.files(version)
    scorer = Scorer(model_files.parse(content, version.label))
    query = Query(np.zeros(0, np.float32), "", ())
    tried = scorer.score(query, np.zeros((1, 0), np.float32), np.full((1, len(requests.NAMES)), np.nan))
    if not np.isfinite(tried.logit).all():
        raise InputError(f"{version.label} gives no finite score")
    return scorer


def _check_arrays(scorer: Scorer, query: Query, image: np.ndarray, attributes: np.ndarray) -> requests.Parsed:
    """The arrays of a request with bad rows marked; InputError for shapes that cannot be meant."""
    if attributes.ndim != 2 or attributes.shape[1] != len(requests.NAMES):
        raise InputError(f"attributes have the shape {attributes.shape}, not [n, {len(requests.NAMES)}]")
    if image.ndim != 2 or len(image) != len(attributes) or image.shape[1] not in (0, scorer.image_dim):
        raise InputError(f"images have the shape {image.shape}, not [{len(attributes)}, {scorer.image_dim}]")
    if len(query.text) not in (0, scorer.text_dim):
        raise InputError(f"the text has {len(query.text)} numbers, not {scorer.text_dim}")
    with np.errstate(invalid="ignore"):
        outside = (attributes < requests.BOUNDS[0]) | (attributes > requests.BOUNDS[1])
    bad = outside.any(axis=1) | np.isinf(attributes).any(axis=1) | np.isinf(image).any(axis=1)
    if not bad.any():
        return requests.Parsed(image, attributes, {})
    keep = ~bad[:, None]
    reasons = {int(i): "a number outside what the contract allows" for i in np.flatnonzero(bad)}
    return requests.Parsed(np.where(keep, image, np.nan), np.where(keep, attributes, np.nan), reasons)


def _length(candidates: Any) -> int:
    try:
        return len(candidates)
    except TypeError:
        return 0


def _number(value: Any) -> float | None:
    return round(float(value), 6) if np.isfinite(value) else None
