"""The queries with the largest regret: what was shown, and what should have been."""

from typing import Any

import numpy as np
import pyarrow as pa

from cotrr.data.contract import ATTRIBUTES
from cotrr.data.lists import Lists


def regret(scores: np.ndarray, lists: Lists) -> np.ndarray:
    """[Q] best reachable minus reached Compliance@1; NaN for a query without labels."""
    where = lists.labelled
    top = np.where(where, scores, -np.inf).argmax(axis=1)[:, None]
    reached = np.take_along_axis(lists.compliance, top, axis=1)[:, 0]
    best = np.where(where, lists.compliance, -np.inf).max(axis=1)
    return np.where(where.any(axis=1), best - reached, np.nan)


def largest(
    table: pa.Table, lists: Lists, scores: np.ndarray, intervals: Any, count: int = 8
) -> list[dict[str, Any]]:
    """The `count` queries of largest positive regret, with both candidates as the table has them.

    `intervals` has `score`, `low`, `high` and `p_conflict`, each [Q, n].
    """
    lost = regret(scores, lists)
    worst = [q for q in np.argsort(-np.nan_to_num(lost), kind="stable")[:count] if lost[q] > 0]
    examples = []
    for q in worst:
        where = lists.labelled[q]
        shown = int(np.where(where, scores[q], -np.inf).argmax())
        # Of the most compliant candidates the one that the model liked best.
        compliance = np.where(where, lists.compliance[q], -np.inf)
        best = int(np.where(compliance == compliance.max(), scores[q], -np.inf).argmax())
        examples.append({
            "query": lists.query[q], "query_id": lists.query_id[q], "domain": lists.domain[q],
            "constraints": _by_key(lists.constraints[q]),
            "regret": float(lost[q]),
            "shown": _candidate(table, lists, intervals, q, shown),
            "best": _candidate(table, lists, intervals, q, best),
        })  # fmt: skip
    return examples


def _by_key(tokens: tuple[str, ...]) -> dict[str, str]:
    """What is asked, by key; several values of one key stand in one text."""
    asked: dict[str, str] = {}
    for token in tokens:
        key, value = token.split("=", 1)
        asked[key] = f"{asked[key]} or {value}" if key in asked else value
    return asked


def _candidate(table: pa.Table, lists: Lists, intervals: Any, q: int, i: int) -> dict[str, Any]:
    row = table.slice(int(lists.row[q, i]), 1).to_pylist()[0]
    return {
        "id": row["id"],
        "url": row["url"],
        "compliance": float(lists.compliance[q, i]),
        "score": float(intervals.score[q, i]),
        "score_low": float(intervals.low[q, i]),
        "score_high": float(intervals.high[q, i]),
        "p_conflict": float(intervals.p_conflict[q, i]),
        "conflicts": row["review_conflict_types"] or [],
        "attributes": {name: row[name] for name in ATTRIBUTES if row[name] is not None},
    }
