"""The bootstrap over queries: one matrix of resampling counts, and every interval from it.

Replicate b draws Q queries with replacement from a generator keyed by (seed, b), so the counts do
not depend on chunks or devices, and all metrics, systems and slices are resampled together: their
differences are paired.  Rows of one query always travel together.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

CHUNK = 128  # replicates held in memory at once


class Interval(NamedTuple):
    """95 % percentile interval; NaN where fewer than half of the replicates were defined."""

    low: np.ndarray
    high: np.ndarray
    undefined: np.ndarray  # replicates in which the statistic was undefined


def resample_counts(key: jax.Array, replicate: jax.Array, queries: int) -> jax.Array:
    """[Q] int32: how often each query is drawn in one replicate (exact multinomial)."""
    drawn = jax.random.randint(jax.random.fold_in(key, replicate), (queries,), 0, queries)
    return jnp.zeros(queries, jnp.int32).at[drawn].add(1)


@partial(jax.jit, static_argnames=("statistic", "queries", "resamples"))
def _replicates(key: jax.Array, data: Any, *, statistic: Callable, queries: int, resamples: int) -> jax.Array:
    def one(replicate: jax.Array) -> jax.Array:
        return statistic(resample_counts(key, replicate, queries), data)

    return jax.lax.map(one, jnp.arange(resamples), batch_size=min(CHUNK, resamples))


def intervals(
    statistic: Callable[[jax.Array, Any], jax.Array],
    data: Any,
    queries: int,
    *,
    seed: int,
    resamples: int,
    level: float = 0.95,
) -> Interval:
    """Percentile intervals of `statistic(counts [Q], data) -> [...]` over `resamples` replicates."""
    drawn = np.asarray(
        _replicates(jax.random.key(seed), data, statistic=statistic, queries=queries, resamples=resamples),
        np.float64,
    )
    undefined = np.isnan(drawn).sum(axis=0)
    tail = (1 - level) / 2
    # A column of NaN alone has no quantiles; zeros stand in and are masked again below.
    safe = np.where(undefined == resamples, 0.0, drawn)
    low, high = np.nanquantile(safe, [tail, 1 - tail], axis=0)
    told = undefined <= resamples / 2
    return Interval(np.where(told, low, np.nan), np.where(told, high, np.nan), undefined)


def weighted_means(counts: jax.Array, values: jax.Array) -> jax.Array:
    """[C] means of the columns of `values` [Q, C]; a NaN leaves that query out of its column."""
    counts = counts.astype(jnp.float32)
    there = ~jnp.isnan(values)
    product = partial(jnp.matmul, precision="highest")
    total = product(counts, there.astype(jnp.float32))
    mean = product(counts, jnp.where(there, values, 0.0)) / jnp.where(total > 0, total, 1.0)
    return jnp.where(total > 0, mean, jnp.nan)


class SortedItems(NamedTuple):
    """The labelled candidates of all queries in ascending order of score, for `weighted_auc`."""

    query: np.ndarray  # [N] int32
    positive: np.ndarray  # [N] bool
    first: np.ndarray  # [N] int32: where the run of equal scores begins
    last: np.ndarray  # [N] int32: one past its end


def sort_items(query: np.ndarray, score: np.ndarray, positive: np.ndarray) -> SortedItems:
    """Sorts N candidates once; every replicate then needs cumulative sums alone."""
    order = np.argsort(score, kind="stable")
    ordered = score[order]
    edge = lambda side: np.searchsorted(ordered, ordered, side).astype(np.int32)
    return SortedItems(query[order].astype(np.int32), positive[order].astype(bool),
                       edge("left"), edge("right"))  # fmt: skip


def weighted_auc(counts: jax.Array, items: SortedItems) -> jax.Array:
    """Pooled AUC with ties ½ when query q occurs counts[q] times; NaN with one class.

    Counts are integers, so the cumulative sums are exact.
    """
    weight = counts[items.query]
    negative = jnp.where(items.positive, 0, weight)
    below = jnp.concatenate([jnp.zeros(1, weight.dtype), jnp.cumsum(negative)])
    wins = 0.5 * (below[items.first].astype(jnp.float32) + below[items.last].astype(jnp.float32))
    positives = jnp.where(items.positive, weight, 0).astype(jnp.float32)
    pairs = jnp.sum(positives) * below[-1].astype(jnp.float32)
    return jnp.where(pairs > 0, _blocked_sum(positives * wins) / jnp.where(pairs > 0, pairs, 1.0), jnp.nan)


def _blocked_sum(values: jax.Array, block: int = 256) -> jax.Array:
    """Sum in two levels: float32 keeps its digits over millions of terms."""
    padded = jnp.pad(values, (0, -len(values) % block))
    return jnp.sum(jnp.sum(padded.reshape(-1, block), axis=1))


def weighted_ece(counts: jax.Array, bins: jax.Array) -> jax.Array:
    """ECE when query q occurs counts[q] times, from its bin sums [Q, bins, 3] (see calibration)."""
    summed = jnp.einsum("q,qbs->bs", counts.astype(jnp.float32), bins, precision="highest")
    total = jnp.sum(summed[:, 0])
    gap = jnp.sum(jnp.abs(summed[:, 1] - summed[:, 2]))
    return jnp.where(total > 0, gap / jnp.where(total > 0, total, 1.0), jnp.nan)
