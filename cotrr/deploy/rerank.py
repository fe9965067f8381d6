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


def lines(table: pa.Table, lists: Lists, scored: Scored, top_m: int, version: str) -> Iterator[bytes]:
    """One JSON line per candidate, queries in input order and their candidates by rank.

    Each holds the scored line as it came, without its embeddings (`table` was read with
    `keep_lines`), and what the contract adds.  `original_rank` is the place among the query's lines.
    """
    for q in range(len(lists.query_id)):
        for rank, i in enumerate(order(scored.logit[q], lists.where[q], top_m), 1):
            line = msgspec.json.decode(
                table["line_json"][int(lists.row[q, i])].as_py(), type=dict[str, msgspec.Raw]
            )
            added = {
                "rerank_score": round(float(scored.score[q, i]), 6),
                "rerank_std": round(float(scored.std[q, i]), 6),
                "rerank_low": round(float(scored.low[q, i]), 6),
                "rerank_high": round(float(scored.high[q, i]), 6),
                "p_conflict": round(float(scored.p_conflict[q, i]), 6),
                "rank": rank,
                "original_rank": int(i) + 1,
                "model_version": version,
            }
            yield msgspec.json.encode(line | added) + b"\n"
