"""CoTRR-lite: one Flax module that scores a list of candidates; the only file that imports flax."""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from cotrr.ranker.features import Features

Params = Any


class Scores(NamedTuple):
    """Logits of n candidates."""

    rank: jax.Array  # [n]
    conflict: jax.Array  # [n]


class Reranker(nn.Module):
    """Step 4's rule plus a learned residual that starts at zero.

    The query decides how much each attribute and each image component of a candidate counts (a
    bilinear form of query and candidate); an optional hidden layer adds what is not bilinear.  The
    same network is applied to every candidate; what depends on the query alone is computed once.
    """

    hidden: int = 0

    @nn.compact
    def __call__(self, features: Features, dropout: float | jax.Array = 0.0) -> Scores:
        """Scores of one list; `dropout` > 0 needs an rng of that name."""
        query = features.query
        candidate = jnp.concatenate([features.attributes, features.image], axis=-1)  # [n, c]
        width = candidate.shape[-1]
        from_zero = partial(nn.Dense, kernel_init=nn.initializers.zeros_init())

        weights = from_zero(2 * width, use_bias=False, name="query_weights")(query).reshape(width, 2)
        logits = candidate @ weights + from_zero(2, name="query_offset")(query)[None]
        if self.hidden:
            context = nn.Dense(self.hidden, use_bias=False, name="query_hidden")(query)[None]
            hidden = nn.gelu(nn.Dense(self.hidden, name="candidate_hidden")(candidate) + context)
            hidden = _drop(self, hidden, dropout)
            logits = logits + from_zero(2, use_bias=False, name="heads")(hidden)
        base_scale = self.param("base_scale", nn.initializers.ones_init(), (2,))
        logits = logits + base_scale[None] * features.base
        return Scores(rank=logits[:, 0], conflict=logits[:, 1])


def _drop(module: nn.Module, values: jax.Array, rate: float | jax.Array) -> jax.Array:
    """Inverted dropout whose rate may be traced, so that runs with other rates share a program."""
    if isinstance(rate, (int, float)) and rate == 0:
        return values
    kept = jax.random.bernoulli(module.make_rng("dropout"), 1 - rate, values.shape)
    return jnp.where(kept, values / (1 - rate), 0.0)


def squared_norm(params: Params) -> jax.Array:
    """Σ w² of what is shrunk to zero: all but the scale of the base and the constant offset."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    free = ("['base_scale']", "['query_offset']['bias']")
    shrunk = [v for path, v in leaves if not jax.tree_util.keystr(path).endswith(free)]
    return jnp.sum(jnp.stack([jnp.sum(value**2) for value in shrunk]))
