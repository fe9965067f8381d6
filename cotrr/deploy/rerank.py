"""Reranked candidates as the lines that go back to Step 4."""

from collections.abc import Iterator

import msgspec
import numpy as np
import pyarrow as pa

from cotrr.data.lists import Lists
from cotrr.ranker.artifact import Scored


def order(logits: np.ndarray, where: np.ndarray, top_m: int) -> np.ndarray:
    """Candidates of one list, best first: the first `top_m` by logit, the rest as they came.

    `logits` [n], `where` [n] bool with the candidates in front; `top_m` 0 reranks all.  Equal
    logits keep their original order.

    >>> order(np.array([0.1, 0.9, 0.5, 2.0]), np.ones(4, bool), top_m=3)
    array([1, 2, 0, 3])
    """
    count = int(where.sum())
    head = min(top_m or count, count)
    return np.concatenate([np.argsort(-logits[:head], kind="stable"), np.arange(head, count)])


def left_behind(lists: Lists, scored: Scored, top_m: int) -> int:
    """Queries whose highest score stands behind the first `top_m` candidates, so it stays there."""
    return int((scored.logit.argmax(axis=1) >= top_m).sum()) if top_m else 0


def lines(table: pa.Table, lists: Lists, scored: Scored, top_m: int, version: str) -> Iterator[bytes]:
    """One JSON line per candidate, queries in input order and their candidates by rank.

    Each holds the scored line as it came, without its embeddings (`table` was read with
    `keep_lines`), its keys in full, and what the contract adds.  `original_rank` is the place among
    the query's lines; `rerank_std` is null where a model has a single lane.
    """
    for q in range(len(lists.query_id)):
        for rank, i in enumerate(order(scored.logit[q], lists.where[q], top_m), 1):
            row = int(lists.row[q, i])
            line = msgspec.json.decode(table["line_json"][row].as_py(), type=dict[str, msgspec.Raw])
            number = lambda part, at=(q, i): round(float(part[at]), 6) if np.isfinite(part[at]) else None
            keys = {name: table[name][row].as_py() for name in ("query_id", "domain", "id", "canonical_id")}
            added = {
                "rerank_score": number(scored.score),
                "rerank_std": number(scored.std),
                "rerank_low": number(scored.low),
                "rerank_high": number(scored.high),
                "p_conflict": number(scored.p_conflict),
                "rank": rank,
                "original_rank": int(i) + 1,
                "model_version": version,
            }
            yield msgspec.json.encode(line | keys | added) + b"\n"
