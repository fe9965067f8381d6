"""Shadow mode: one model serves, another ranks the same requests in the background, and both are compared.

What is logged are the exposures that `experiments.ab analyze` reads: how far the candidate's ranking,
which nobody saw, agrees with the one that was served.
"""

import collections
import contextlib
import datetime
import logging
import pathlib
import queue
import threading
import uuid
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from cotrr.deploy import experiment as online
from cotrr.deploy.reranker import Reranked, Reranker
from cotrr.errors import InputError

ROOM = 32  # requests that may wait: each holds its candidates
COUNTED = ("logged", "dropped", "other version", "not ranked", "failed")
_log = logging.getLogger(__name__)


class Job(NamedTuple):
    """A request that was served and that the candidate has yet to rank."""

    unit: str
    request_id: str
    at: datetime.datetime
    served: Reranked
    rank: Callable[[], Reranked]


class Shadow:
    """Answers with `served`; `candidate` ranks behind its back, in one thread, and never holds it up."""

    def __init__(self, served: Reranker, candidate: Reranker, experiment: online.Experiment,
                 log: str | pathlib.Path, room: int = ROOM):  # fmt: skip
        """Appends to `log`; raises InputError unless the experiment is in mode shadow."""
        if experiment.mode != "shadow":
            raise InputError(f"mode {experiment.mode}, where a shadow was expected", field="mode")
        self.served, self.candidate = served, candidate
        self._experiment, self._file = experiment, open(log, "ab", buffering=0)  # noqa: SIM115
        self._waiting: queue.Queue[Job | None] = queue.Queue(room)
        self._counts, self._counting = collections.Counter(dict.fromkeys(COUNTED, 0)), threading.Lock()
        self._thread = threading.Thread(target=self._work, name="cotrr shadow", daemon=True)
        self._thread.start()

    def rerank(self, query: Mapping[str, Any], candidates: Any, *, unit: str = "", request_id: str = "",
               **how: Any) -> Reranked:  # fmt: skip
        """As `Reranker.rerank`; `unit` is whom the experiment counts, unless given the query."""
        with contextlib.suppress(Exception):  # a generator can be gone through only once
            candidates = list(candidates)
        served = self.served.rerank(query, candidates, **how)
        rank = lambda: self.candidate.rerank(query, candidates, top_m=how.get("top_m"))
        self._put(query, unit, request_id, served, rank)
        return served

    def rerank_arrays(self, query: Mapping[str, Any], image: Any, attributes: Any, *, unit: str = "",
                      request_id: str = "", **how: Any) -> Reranked:  # fmt: skip
        """As `Reranker.rerank_arrays`; the arrays must not be written to afterwards."""
        served = self.served.rerank_arrays(query, image, attributes, **how)
        rank = lambda: self.candidate.rerank_arrays(query, image, attributes, top_m=how.get("top_m"))
        self._put(query, unit, request_id, served, rank)
        return served

    def stats(self) -> dict[str, int]:
        """How many requests were logged, and how many were not and why."""
        with self._counting:
            return dict(self._counts)

    def close(self, seconds: float = 5) -> None:
        """Ends after what is waiting, or after so many seconds."""
        with contextlib.suppress(queue.Full):
            self._waiting.put(None, timeout=seconds)
        self._thread.join(seconds)

    def _put(self, query: Any, unit: str, request_id: str, served: Reranked,
             rank: Callable[[], Reranked]) -> None:  # fmt: skip
        if served.scored is None or not served.order:
            return self._count("not ranked")
        try:
            request_id = request_id or uuid.uuid4().hex
            unit = unit or str(query.get("query_id") or query.get("query") or request_id)
            now = datetime.datetime.now(datetime.UTC)
            self._waiting.put_nowait(Job(unit[:500], request_id[:500], now, served, rank))
        except queue.Full:
            self._count("dropped")
        except Exception:  # a query_id that is no text, say
            self._count("failed")

    def _work(self) -> None:
        with self._file:
            while (job := self._waiting.get()) is not None:
                try:
                    self._count(self._compare(job))
                except Exception as error:  # a full disk, say: what serves goes on
                    self._count("failed")
                    _log.error("not logged: %s", error)

    def _compare(self, job: Job) -> str:
        """Ranks, compares and logs one request; says what became of it."""
        ranked = job.rank()
        if ranked.scored is None:
            return "not ranked"
        wanted = (self._experiment.baseline_version, self._experiment.candidate_version)
        for version, one in zip(wanted, (job.served, ranked), strict=True):
            if version not in (one.model_version, one.label):
                return "other version"
        baseline, candidate = (list(map(str, one.order)) for one in (job.served, ranked))
        line = online.shadow_line(self._experiment, job.unit, job.request_id, job.at, baseline, candidate)
        if self._file.write(line) != len(line):
            raise OSError("a line was cut short")
        return "logged"

    def _count(self, name: str) -> None:
        with self._counting:
            self._counts[name] += 1
