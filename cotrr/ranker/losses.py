"""Losses for one query's list: `loss(scores[n], labels[n], *, where[n]) -> scalar`; callers vmap.

A mean over nothing is 0, so that a list without pairs is harmless; a NaN among the scores that
count stays visible.
"""

import jax
import jax.numpy as jnp


def masked_mean(values: jax.Array, weights: jax.Array) -> jax.Array:
    """Mean of `values` under `weights` ≥ 0; 0 where all weights are 0."""
    kept = jnp.where(weights > 0, values, 0.0)
    total = jnp.sum(weights)
    return jnp.sum(kept * weights) / jnp.where(total > 0, total, 1.0)


def ranknet(
    scores: jax.Array,
    labels: jax.Array,
    *,
    where: jax.Array,
    margin: float | jax.Array = 0.0,
    power: float | jax.Array = 0.0,
) -> jax.Array:
    """RankNet: mean logistic loss over the pairs with y_i > y_j (Burges et al. 2005).

    A pair weighs (y_i - y_j)^power, and counts as right only beyond `margin`.  The mean is over one
    query's pairs, so that a long list weighs no more than a short one.

    >>> float(ranknet(jnp.zeros(2), jnp.array([1.0, 0.0]), where=jnp.ones(2, bool)))  # log 2
    0.6931471824645996
    """
    gap = labels[:, None] - labels[None, :]
    pairs = where[:, None] & where[None, :] & (gap > 0)
    weights = jnp.where(pairs, jnp.where(pairs, gap, 1.0) ** power, 0.0)
    return masked_mean(jax.nn.softplus(margin - (scores[:, None] - scores[None, :])), weights)


def cross_entropy(logits: jax.Array, labels: jax.Array, *, where: jax.Array) -> jax.Array:
    """Mean logistic loss of `logits` against labels in [0, 1], which may be probabilities."""
    labels = jnp.where(where, labels, 0.0)
    return masked_mean(jax.nn.softplus(logits) - labels * logits, where.astype(logits.dtype))
