"""The reranker inside Step 4's request: fast, thread-safe, and never the reason that a request fails.

reranker = Reranker.load("checkpoints/cotrr_lite_v1")                # a model folder
reranker = Reranker.load("registry", version="champion")             # verified
stop = reranker.follow(seconds=10)                                   # another champion serves when it is one
reranked = reranker.rerank(query, candidates)

One request is too little work for several threads of BLAS, which wait for each other longer than they work:
let OPENBLAS_NUM_THREADS be 1 in the process that serves.
"""

import collections
import logging
import pathlib
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from cotrr.deploy import candidates as requests
from cotrr.deploy.registry import ALIASES, Registry
from cotrr.deploy.scorer import Query, Scorer
from cotrr.errors import InputError
from cotrr.ranker import model_files
from cotrr.ranker.calibrators import Scored
from cotrr.store import open_store

TOP_M = 20  # Step 4's default
FALLBACKS = ("bad request", "deadline", "no champion", "unexpected")  # why an order is the original one
COUNTED = ("requests", "reranked", *(f"fallback: {kind}" for kind in FALLBACKS), "candidates",
           "bad candidates", "swaps")  # fmt: skip
# What the contract says of a candidate, and where `Scored` has it.
FIELDS = {"rerank_score": "score", "rerank_std": "std", "rerank_low": "low", "rerank_high": "high",
          "p_conflict": "p_conflict"}  # fmt: skip
_log = logging.getLogger(__name__)


class Reranked(NamedTuple):
    """The candidates' new order, and what is known of each, by original index."""

    order: list[int]  # original indices, best first
    scored: Scored | None  # [n]; None: the order is the original one, and `fallback` says why
    reasons: dict[int, str]  # why a candidate was put behind
    fallback: str  # one of FALLBACKS, and more words; "" where candidates were scored
    model_version: str  # "" where there was no model
    label: str  # in the registry

    def rows(self) -> list[dict[str, Any]]:
        """What the contract adds to each candidate, best first; null where it was not scored."""
        numbers = {field: self._column(name) for field, name in FIELDS.items()}
        rows = []
        for rank, i in enumerate(self.order, 1):
            row: dict[str, Any] = {field: column[i] for field, column in numbers.items()}
            row |= {"rank": rank, "original_rank": i + 1, "model_version": self.model_version}
            rows.append(row | {"reason": self.reasons[i]} if i in self.reasons else row)
        return rows

    def _column(self, name: str) -> list[float | None]:
        if self.scored is None:
            return [None] * len(self.order)
        values = getattr(self.scored, name)
        column = values.round(6).tolist()
        for i in {*np.flatnonzero(~np.isfinite(values)).tolist(), *self.reasons}:
            column[i] = None
        return column


class Serving(NamedTuple):
    """What answers requests: a model, or none and the reason."""

    scorer: Scorer | None
    label: str = ""  # in the registry; "" of a model folder
    reason: str = ""

    @property
    def version(self) -> str:
        """The model's version; "" where there is none."""
        return self.scorer.version if self.scorer else ""


class Source(NamedTuple):
    """A version or alias in a registry."""

    registry: Registry
    version: str


class _Fallback(Exception):
    """The original order is the answer."""


def arrange(logit: np.ndarray, bad: Collection[int] = (), top_m: int = TOP_M) -> list[int]:
    """Original indices, best first: the first `top_m` (0: all) by logit, behind them the rest as it came.

    Equal logits keep their order.  The `bad` stand with the rest and take none of the `top_m` places, so
    the others are ranked as if those were not there.

    >>> arrange(np.array([0.1, 0.9, 0.5, 2.0, 3.0]), bad=[2], top_m=3)
    [3, 1, 0, 2, 4]
    """
    rest = np.ones(len(logit), bool)
    rest[list(bad)] = False
    head = np.flatnonzero(rest)[: top_m or None]
    rest[:] = True
    rest[head] = False
    return [*head[np.argsort(-logit[head], kind="stable")].tolist(), *np.flatnonzero(rest).tolist()]


class Reranker:
    """Reranks one query at a time, from any number of threads."""

    def __init__(
        self,
        scorer: Scorer | None,
        *,
        top_m: int = TOP_M,
        deadline_ms: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        """`deadline_ms` after the start of a request the original order is returned."""
        self._serving = Serving(scorer, reason="" if scorer else "there is no model")
        self._source: Source | None = None
        self._top_m, self._deadline, self._clock = top_m, deadline_ms, clock
        self._counts = collections.Counter(dict.fromkeys(COUNTED, 0))
        self._counting, self._refreshing = threading.Lock(), threading.Lock()
        self.trouble = ""  # why `follow` could not load what is live

    @classmethod
    def load(cls, place: str | pathlib.Path, name: str = "cotrr", version: str = "champion",
             top_m: int = TOP_M, deadline_ms: float | None = None) -> "Reranker":  # fmt: skip
        """A reranker from a model folder, or from a registry's version or alias, its files verified.

        An alias may name nothing, or a version of Step 4's own: then the original order is the answer,
        until it names one of ours and `refresh` sees it.  Raises InputError where there is no such model
        or registry, or files were changed.
        """
        if (pathlib.Path(place) / "model.json").exists():
            scorer = Scorer(model_files.parse(model_files.read_files(place), place))
            return cls(scorer, top_m=top_m, deadline_ms=deadline_ms)
        registry = Registry(open_store(str(place)), name)
        if not registry.state().events:
            raise InputError(f"neither a model nor a registry of {name!r} is here", file=place)
        reranker = cls(None, top_m=top_m, deadline_ms=deadline_ms)
        reranker._source = Source(registry, version)
        reranker._serving = _load(reranker._source)
        return reranker

    @property
    def serving(self) -> Serving:
        """What answers the next request."""
        return self._serving

    def swap(self, serving: Serving) -> None:
        """Serves with another model from the next request on; those that run end with the old one."""
        self._serving = serving
        self._count("swaps")

    def refresh(self) -> bool:
        """Follows the registry: whether something else serves now.

        Raises InputError or OSError, and goes on as before, where what is live now cannot be read and
        verified.
        """
        if self._source is None:
            return False
        with self._refreshing:
            if (found := _load(self._source, self._serving)) == self._serving:
                return False
            self.swap(found)
            return True

    def follow(self, seconds: float) -> threading.Event:
        """Refreshes every so often in a thread, until the returned event is set; see `trouble`."""
        stop = threading.Event()

        def work() -> None:
            while not stop.wait(seconds):
                try:
                    self.refresh()
                    self.trouble = ""
                except Exception as error:  # what serves now goes on, whatever it is
                    if str(error) != self.trouble:
                        _log.warning("%s still serves: %s", self._serving.label or "the model", error)
                    self.trouble = str(error) or type(error).__name__

        threading.Thread(target=work, name="cotrr refresh", daemon=True).start()
        return stop

    def rerank(self, query: Mapping[str, Any], candidates: Iterable[Mapping[str, Any]], *,
               top_m: int | None = None, since: float | None = None) -> Reranked:  # fmt: skip
        """The candidates of a query in the contract's fields, in Step 4's order; never raises.

        `since` is what the clock said when the request came, if that was before this call.
        """
        since, listed = self._clock() if since is None else since, _listed(candidates)

        def read(scorer: Scorer) -> tuple[Query, requests.Parsed]:
            if listed is None:
                raise InputError("candidates: expected a list")
            asked = requests.parse_query(query, scorer.text_dim)
            return asked, requests.parse(listed, asked, scorer.image_dim)

        return self._answer(len(listed or ()), read, top_m, since)

    def rerank_arrays(self, query: Mapping[str, Any], image: np.ndarray, attributes: np.ndarray, *,
                      top_m: int | None = None, since: float | None = None) -> Reranked:  # fmt: skip
        """As `rerank`, of images [n, d] and attributes [n, A] in the order of contract.ATTRIBUTES.

        NaN is missing, and d = 0 is no images at all; the query's `text_embedding` may be an array too.
        """
        since = self._clock() if since is None else since

        def read(scorer: Scorer) -> tuple[Query, requests.Parsed]:
            asked = requests.parse_query(query, scorer.text_dim)
            return asked, requests.parse_arrays(image, attributes, asked, scorer.image_dim)

        return self._answer(len(_listed(attributes) or ()), read, top_m, since)

    def stats(self) -> dict[str, int]:
        """How many requests came, and how many of them and of their candidates went how."""
        with self._counting:
            return dict(self._counts)

    def _answer(
        self,
        count: int,
        read: Callable[[Scorer], tuple[Query, requests.Parsed]],
        top_m: int | None,
        since: float,
    ) -> Reranked:
        serving = self._serving
        try:
            if serving.scorer is None:
                raise _Fallback("no champion", serving.reason)
            top_m = self._top_m if top_m is None else top_m
            if not (isinstance(top_m, int) and top_m >= 0):
                raise InputError("top_m: expected a whole number, 0 or more")
            query, parsed = read(serving.scorer)
            self._check_time(since, "before scoring")
            scored = serving.scorer.score(query, parsed.image, parsed.attributes)
            undefined = np.flatnonzero(~np.isfinite(scored.logit)).tolist()
            reasons = dict.fromkeys(undefined, "no finite score") | parsed.reasons
            order = arrange(scored.logit, reasons, top_m)
            self._check_time(since, "while scoring")
        except _Fallback as fallback:
            return self._original(serving, count, *fallback.args)
        except InputError as error:
            return self._original(serving, count, "bad request", str(error))
        except Exception as error:  # whatever it is, the request goes on
            return self._original(serving, count, "unexpected", type(error).__name__, error)
        self._count("requests", "reranked", candidates=count, bad=len(reasons))
        return Reranked(order, scored, reasons, "", serving.version, serving.label)

    def _original(self, serving: Serving, count: int, kind: str, why: str,
                  error: Exception | None = None) -> Reranked:  # fmt: skip
        times = self._count(f"fallback: {kind}", "requests", candidates=count)
        if error and times & (times - 1) == 0:  # the 1st, 2nd, 4th, 8th …: a log is no place to drown in
            _log.error("answered in the original order, for the %dth time", times, exc_info=error)
        return Reranked(list(range(count)), None, {}, f"{kind}: {why}", serving.version, serving.label)

    def _check_time(self, since: float, when: str) -> None:
        if self._deadline is not None and 1e3 * (self._clock() - since) > self._deadline:
            raise _Fallback("deadline", f"{self._deadline:g} ms passed {when}")

    def _count(self, *names: str, candidates: int = 0, bad: int = 0) -> int:
        """Counts; returns how often the first of the names has come."""
        with self._counting:
            self._counts.update(names)
            self._counts["candidates"] += candidates
            self._counts["bad candidates"] += bad
            return self._counts[names[0]]


def _load(source: Source, now: Serving | None = None) -> Serving:
    """What a version or alias means, tried once before it serves; `now`, if it still means that."""
    state = source.registry.state()
    if source.version in ALIASES and source.version not in state.aliases:
        return Serving(None, reason=f"no version is {source.version}")
    version = state.version(source.version)
    if source.version in ALIASES and not version.folder:
        return Serving(None, version.label, f"{version.label} is Step 4's own {version.model}")
    if now and now.scorer and now.label == version.label:
        return now
    scorer = Scorer(source.registry.contents(version))
    query = Query(np.zeros(0, np.float32), "", ())
    tried = scorer.score(query, np.zeros((1, 0), np.float32), np.full((1, len(requests.NAMES)), np.nan))
    if not np.isfinite(tried.logit).all():
        raise InputError(f"{version.label} gives no finite score")
    return Serving(scorer, version.label)


def _listed(candidates: Any) -> list[Any] | None:
    """The candidates as a list; None where there is no going through them."""
    try:
        return list(candidates)
    except Exception:
        return None
