"""Ranking metrics of one query's list, as expected values over the orders of tied scores.

Every metric here is a sum of values times the discounts of the ranks they stand on, so all share
`expected_discounts` (McSherry & Najork 2008).  Callers vmap.  Undefined is NaN.
"""

import jax
import jax.numpy as jnp
import numpy as np


def expected_discounts(scores: jax.Array, discounts: jax.Array, *, where: jax.Array) -> jax.Array:
    """[n] expected discount of each candidate when ties are broken at random.

    `scores` [n], `discounts` [n] of ranks 1..n, `where` [n] bool.  A candidate outside `where` gets
    0; a NaN score makes all NaN.

    >>> expected_discounts(jnp.array([2.0, 1.0, 1.0]), jnp.array([1.0, 0.5, 0.0]), where=jnp.ones(3, bool))
    Array([1.  , 0.25, 0.25], dtype=float32)
    """
    key = jnp.where(where, -scores, jnp.inf)
    first, last = _standing(key)
    # A score of -inf ties with the padding behind it: the run ends where the candidates do.
    last = jnp.minimum(last, jnp.sum(where))
    cumulative = jnp.concatenate([jnp.zeros(1, discounts.dtype), jnp.cumsum(discounts)])
    expected = (cumulative[last] - cumulative[first]) / jnp.maximum(last - first, 1)
    broken = jnp.any(jnp.isnan(scores) & where)
    return jnp.where(where, jnp.where(broken, jnp.nan, expected), 0.0)


def _standing(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[n] how many keys are smaller than each, and how many are no larger.

    Each is compared with all, which vectorises over lists where sorting does not: half the time.
    """
    odd = -len(key) % 16
    padded = jnp.pad(key, (0, odd), constant_values=jnp.inf)
    twice = jnp.concatenate([padded, padded])

    def meet(counts: tuple[jax.Array, jax.Array], k: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        other = jax.lax.dynamic_slice(twice, (k,), (len(padded),))
        return (counts[0] + (other < padded), counts[1] + (other <= padded)), None

    none = jnp.zeros(len(padded), jnp.int32)
    (less, upto), _ = jax.lax.scan(meet, (none, none + 1), jnp.arange(1, len(padded)), unroll=8)
    return less[: len(key)], upto[: len(key)]


def log2_discounts(n: int, k: int | None = None, *, letor: bool = False) -> np.ndarray:
    """[n] 1/log2(rank + 1) down to rank k; LETOR's variant is 1, 1, 1/log2(3), 1/log2(4), …"""
    rank = np.arange(1, n + 1)
    discounts = 1 / np.log2(np.maximum(rank, 2) if letor else rank + 1)
    return np.where(rank <= (k or n), discounts, 0.0).astype(np.float32)


def mean_at(scores: jax.Array, values: jax.Array, *, where: jax.Array, k: int) -> jax.Array:
    """Mean of `values` over the k best candidates (all, where there are fewer): Compliance@k."""
    count = jnp.sum(where)
    rank = jnp.arange(1, scores.shape[-1] + 1)
    discounts = jnp.where(rank <= k, 1.0, 0.0) / jnp.minimum(k, count)
    weights = expected_discounts(scores, discounts, where=where)
    return jnp.where(count > 0, jnp.sum(weights * jnp.where(where, values, 0.0)), jnp.nan)


def ndcg(
    scores: jax.Array, gains: jax.Array, *, where: jax.Array, k: int = 10, letor: bool = False
) -> jax.Array:
    """nDCG@k of gains ≥ 0 (linear: pass labels; Burges: pass 2^label - 1); NaN without any gain.

    The ideal order is over all candidates in `where` (Järvelin & Kekäläinen 2002).
    """
    gains = jnp.where(where, gains, 0.0)
    discounts = jnp.asarray(log2_discounts(scores.shape[-1], k, letor=letor))
    reached = jnp.sum(expected_discounts(scores, discounts, where=where) * gains)
    ideal = jnp.sum(jnp.sort(gains, descending=True) * discounts)
    return jnp.where(ideal > 0, reached / jnp.where(ideal > 0, ideal, 1.0), jnp.nan)


def depends_on_ties(scores: jax.Array, values: jax.Array, *, where: jax.Array, k: int) -> jax.Array:
    """Whether the order of tied scores changes which values stand on the k best ranks."""
    tied = (scores[:, None] == scores[None, :]) & where[:, None] & where[None, :]
    ahead = jnp.sum((scores[None, :] > scores[:, None]) & where[None, :], axis=1)
    differ = values[:, None] != values[None, :]
    return jnp.any(tied & differ & (ahead < k)[:, None])
