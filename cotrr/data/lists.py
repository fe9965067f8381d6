"""From a table of candidates to padded lists: one row of arrays per query."""

import functools
import json
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from cotrr.data.contract import ATTRIBUTES, constraint_tokens
from cotrr.data.labels import GOLD, SILVER, numbers
from cotrr.data.rows import embedding_parts
from cotrr.data.splits import components
from cotrr.errors import InputError


class Lists(NamedTuple):
    """Q queries of up to n candidates each; d is the embedding's length, A the attributes.

    Missing numbers are NaN; `where` marks what is a candidate and not padding.
    """

    query_id: np.ndarray  # [Q] object
    query: np.ndarray  # [Q] object: the text
    domain: np.ndarray  # [Q] object
    constraints: tuple[tuple[str, ...], ...]  # [Q] tokens `key=value`
    text: np.ndarray  # [Q, d] float32
    image: np.ndarray  # [Q, n, d] float32
    attributes: np.ndarray  # [Q, n, A] float32, in the order of contract.ATTRIBUTES
    y: np.ndarray  # [Q, n] float32
    compliance: np.ndarray  # [Q, n] float32
    conflict: np.ndarray  # [Q, n] float32
    dual_score: np.ndarray  # [Q, n] float32: Step 4's fused score, a baseline and never a feature
    gold: np.ndarray  # [Q, n] bool: the label is a reviewer's
    row: np.ndarray  # [Q, n] int64: row of the table, -1 where padded
    where: np.ndarray  # [Q, n] bool

    @property
    def labelled(self) -> np.ndarray:
        """[Q, n] bool: candidates that have a label."""
        return self.where & ~np.isnan(self.y)

    def take(self, queries: np.ndarray) -> "Lists":
        """The lists of some queries, by index."""
        arrays = {name: part[queries] for name, part in self._asdict().items() if name != "constraints"}
        return Lists(**arrays, constraints=tuple(self.constraints[q] for q in queries))


def to_lists(table: pa.Table, label: str | None = None) -> Lists:
    """Groups a table by query, in order of appearance, padded to the longest list.

    `label` keeps only "gold" or only "silver" labels; None keeps what there is.  A table without
    `y` (a run that was just read) gives unlabelled lists.
    """
    # Arrow numbers values in their order of appearance.
    query = table["query_id"].combine_chunks().dictionary_encode().indices.to_numpy()
    first = np.unique(query, return_index=True)[1]
    stated = lambda name: _first_stated(table[name].is_valid().to_numpy(), query, first)
    row = _pad_rows(query, len(first))
    where = row >= 0
    take = lambda values: np.where(where, values[row], np.nan).astype(np.float32)
    text = lambda name: table[name].take(stated(name)).to_numpy(zero_copy_only=False)
    return Lists(
        query_id=table["query_id"].take(first).to_numpy(zero_copy_only=False),
        query=text("query"),
        domain=text("domain"),
        constraints=tuple(map(_tokens(), text("constraints"))),
        text=_gather(table, "text_embedding", stated("text_embedding")),
        image=_gather(table, "image_embedding", row),
        attributes=np.stack([take(numbers(table, name)) for name in ATTRIBUTES], axis=-1),
        **{name: take(values) for name, values in _labels(table, label).items()},
        dual_score=take(numbers(table, "dual_score")),
        gold=where & _is_gold(table)[row],
        row=row,
        where=where,
    )


def clusters(table: pa.Table, lists: Lists, column: str) -> np.ndarray | None:
    """[Q] the cluster of each query by a column; None by `query_id`: each query is its own.

    By `canonical_id`, queries that share a picture, directly or through others, are one cluster.
    Raises InputError where the column is missing, or a query has not one value of it.
    """
    if column == "query_id":
        return None
    if column not in table.column_names:
        raise InputError(
            "no such column", field=column, remedy=f"Name one of {', '.join(table.column_names)}"
        )
    named = table[column].to_numpy(zero_copy_only=False)
    if column == "canonical_id":
        query, place = np.nonzero(lists.where)
        picture = np.unique(named[lists.row[query, place]], return_inverse=True)[1]
        return components(query, picture)[np.unique(query, return_index=True)[1]].astype(str)
    found = []
    for query, rows, where in zip(lists.query_id, lists.row, lists.where, strict=True):
        values = {named[row] for row in rows[where]} - {None}
        if len(values) != 1:
            raise InputError(
                f"query {query!r} has {len(values)} values",
                field=column,
                remedy="A cluster holds whole queries: each query needs one value",
            )
        found.append(str(values.pop()))
    return np.array(found)


def _tokens() -> Callable[[str | None], tuple[str, ...]]:
    """The tokens of a JSON text of constraints; many queries have the same."""
    return functools.cache(lambda text: constraint_tokens(json.loads(text or "{}")))


def _pad_rows(query: np.ndarray, queries: int) -> np.ndarray:
    """[Q, n] row numbers of each query's candidates in table order, -1 behind them."""
    order = np.argsort(query, kind="stable")
    count = np.bincount(query, minlength=queries)
    position = np.arange(len(query)) - np.repeat(np.cumsum(count) - count, count)
    row = np.full((queries, count.max(initial=1)), -1)
    row[query[order], position] = order
    return row


def _first_stated(valid: np.ndarray, query: np.ndarray, first: np.ndarray) -> np.ndarray:
    """[Q] the first row of each query that states a fact of the query; its first row if none does."""
    rows = np.flatnonzero(valid)
    found, at = np.unique(query[rows], return_index=True)
    chosen = first.copy()
    chosen[found] = rows[at]
    return chosen


def _gather(table: pa.Table, name: str, row: np.ndarray) -> np.ndarray:
    """[..., d] the embeddings of distinct rows [...], NaN for row -1; d is 0 where no line has one."""
    if table[name].null_count == len(table):
        return np.zeros((*row.shape, 0), np.float32)
    found = np.empty((row.size, table.schema.field(name).type.list_size), np.float32)
    found[row.ravel() < 0] = np.nan
    place = np.full(len(table) + 1, -1)
    place[row.ravel()] = np.arange(row.size)  # what has no row falls on the last, which is none either
    start = 0
    for part in embedding_parts(table, name):  # each number is copied once: memory is what takes the time
        to = place[start : start + len(part)]
        start += len(part)
        if (to >= 0).all():
            found[to] = part
        else:
            found[to[to >= 0]] = part[to >= 0]
    return found.reshape(*row.shape, -1)


def _is_gold(table: pa.Table) -> np.ndarray:
    if "label" not in table.column_names:
        return np.zeros(len(table), bool)
    return table["label"].to_numpy(zero_copy_only=False) == GOLD


def _labels(table: pa.Table, kind: str | None) -> dict[str, np.ndarray]:
    """y and its two parts for each row, NaN where the row has no label of that kind."""
    nothing = np.full(len(table), np.nan)
    if "y" not in table.column_names:
        return {"y": nothing, "compliance": nothing, "conflict": nothing}
    kinds = table["label"].to_numpy(zero_copy_only=False)
    parts = {"compliance": ("review_compliance", "compliance_score"),
             "conflict": ("review_conflict", "conflict_prob")}  # fmt: skip
    values = {"y": numbers(table, "y")}
    for name, (gold, silver) in parts.items():
        values[name] = np.where(kinds == GOLD, numbers(table, gold),
                                np.where(kinds == SILVER, numbers(table, silver), np.nan))  # fmt: skip
    wanted = kinds == kind if kind else np.ones(len(table), bool)
    return {name: np.where(wanted, value, np.nan) for name, value in values.items()}
