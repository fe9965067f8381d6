"""Losses for one query's list: `loss(scores[n], labels[n], *, where[n]) -> scalar`; callers vmap.

A mean over nothing is 0, so that a list without pairs is harmless; a NaN among the scores that
count stays visible.  Memory is O(n), however long the list.
"""

from typing import Any

import jax
import jax.numpy as jnp

Number = float | jax.Array
LANES = 16  # numbers in a vector register: lists are padded to a multiple of it


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
    margin: Number | None = None,
    power: Number | None = None,
    lambda_power: Number | None = None,
) -> jax.Array:
    """RankNet: mean logistic loss over the pairs with y_i > y_j (Burges et al. 2005).

    A pair counts as right only beyond `margin`.  It weighs (y_i - y_j)^power, times what swapping
    the two would change in DCG, to the power `lambda_power` (1 is LambdaRank, Burges 2010; linear
    gain).  The mean is over one query's pairs, so that a long list weighs no more than a short one.

    >>> float(ranknet(jnp.zeros(2), jnp.array([1.0, 0.0]), where=jnp.ones(2, bool)))  # log 2
    0.6931471824645996
    """
    scores, labels = jnp.where(where, scores, 0.0), jnp.where(where, labels, 0.0)
    items: dict[str, jax.Array] = {"label": labels, "there": where.astype(scores.dtype)}
    if lambda_power is not None:
        order = jnp.argsort(jnp.where(where, -jax.lax.stop_gradient(scores), jnp.inf))
        rank = jnp.zeros(order.shape, jnp.float32).at[order].set(jnp.arange(len(order), dtype=jnp.float32))
        items["discount"] = 1 / jnp.log2(rank + 2)
    odd = -len(scores) % LANES
    scores, items = jax.tree.map(lambda values: jnp.pad(values, (0, odd)), (scores, items))
    return _pairwise(scores, items, {"margin": margin, "power": power, "lambda_power": lambda_power})


def _pair(one: dict, other: dict, knobs: dict) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Weight, sign and z of pairs: a pair's loss is weight · log(1 + exp(-z)), its order is `sign`."""
    gap = one["label"] - other["label"]
    sign = jnp.sign(gap)
    weight = one["there"] * other["there"] * jnp.abs(sign)
    # Of pairs that weigh nothing it is not taken.  That of gaps is the same for lanes that share labels.
    log = lambda values: jnp.log(jnp.where(weight > 0, jnp.abs(values), 1.0))
    powers = []
    if knobs["power"] is not None:
        powers.append(knobs["power"] * log(gap))
    if knobs["lambda_power"] is not None:
        powers.append(knobs["lambda_power"] * (log(gap) + log(one["discount"] - other["discount"])))
    if powers:
        weight = weight * jnp.exp(sum(powers))
    z = sign * (one["score"] - other["score"])
    return weight, sign, z if knobs["margin"] is None else z - knobs["margin"]


def _scan_pairs(scores: jax.Array, items: dict, knobs: dict, slope: bool) -> tuple[jax.Array, Any]:
    """The loss, and its gradient where `slope`: every unordered pair once, one exponential each.

    Item i meets item i + k (mod n) for k = 1, …, n/2, so that no [n, n] matrix is ever there.
    """
    n = len(scores)
    items = items | {"score": scores}
    twice = {name: jnp.concatenate([values, values]) for name, values in items.items()}

    def meet(carry: tuple, k: jax.Array) -> tuple[tuple, None]:
        loss, total, gradient = carry
        other = {name: jax.lax.dynamic_slice(values, (k,), (n,)) for name, values in twice.items()}
        weight, sign, z = _pair(items, other, knobs)
        weight = jnp.where(2 * k == n, weight / 2, weight)  # halfway round each pair comes twice
        small = jnp.exp(-jnp.abs(z))
        loss = loss + weight * (jnp.maximum(-z, 0.0) + jnp.log(1 + small))  # log1p: five times slower on CPUs
        if slope:
            push = weight * sign * jnp.where(z >= 0, small, 1.0) / (1 + small)
            back = jax.lax.dynamic_slice(jnp.concatenate([push, push]), (n - k,), (n,))
            gradient = gradient - push + back
        return (loss, total + weight, gradient), None

    zeros = jnp.zeros_like(scores)
    (loss, total, gradient), _ = jax.lax.scan(
        meet, (zeros, zeros, zeros), jnp.arange(1, n // 2 + 1), unroll=4
    )
    total = jnp.sum(total)
    total = jnp.where(total > 0, total, 1.0)
    return jnp.sum(loss) / total, gradient / total


@jax.custom_vjp
def _pairwise(scores: jax.Array, items: dict, knobs: dict) -> jax.Array:
    return _scan_pairs(scores, items, knobs, slope=False)[0]


def _pairwise_forward(scores: jax.Array, items: dict, knobs: dict) -> tuple[jax.Array, Any]:
    loss, gradient = _scan_pairs(scores, items, knobs, slope=True)
    return loss, (gradient, items, knobs)


def _pairwise_backward(kept: Any, cotangent: jax.Array) -> tuple:
    gradient, *constants = kept
    return (cotangent * gradient, *jax.tree.map(jnp.zeros_like, constants))


_pairwise.defvjp(_pairwise_forward, _pairwise_backward)


def softmax(scores: jax.Array, labels: jax.Array, *, where: jax.Array) -> jax.Array:
    """Cross-entropy of the list's softmax to its labels ≥ 0 as shares of their sum (Cao et al. 2007)."""
    labels = jnp.where(where, labels, 0.0)
    total = jnp.sum(labels)
    share = labels / jnp.where(total > 0, total, 1.0)
    scores = jnp.where(where, scores, 0.0)
    # An empty list is normalised over its padding, so that its slope is 0 and not undefined.
    normalizer = jax.nn.logsumexp(scores, where=where | ~jnp.any(where))
    return -jnp.sum(share * (scores - normalizer))


def cross_entropy(logits: jax.Array, labels: jax.Array, *, where: jax.Array) -> jax.Array:
    """Mean logistic loss of `logits` against labels in [0, 1], which may be probabilities."""
    logits, labels = jnp.where(where, logits, 0.0), jnp.where(where, labels, 0.0)
    return masked_mean(jax.nn.softplus(logits) - labels * logits, where.astype(logits.dtype))
