"""CoTRR-lite: one Flax module that scores a list of candidates; the only file that imports flax."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from cotrr.ranker.features import Features, Gates, base_logits

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
    def __call__(self, features: Features, gates: Gates, dropout: float | jax.Array = 0.0) -> Scores:
        """Scores of one list; `dropout` > 0 needs an rng of that name."""
        query = jnp.concatenate([features.wants, features.text])
        candidate = jnp.concatenate([features.attributes, features.image, features.match], axis=-1)  # [n, c]
        # The gates scale weights and not features: lanes that differ in them share every product
        # with the features.
        wide = lambda gate, width: jnp.broadcast_to(gate, (width,))
        query_gate = jnp.concatenate(
            [jnp.ones(features.wants.shape), wide(gates.text, features.text.shape[-1])]
        )[:, None]
        candidate_gate = jnp.concatenate(
            [
                gates.attributes,
                gates.attributes,
                wide(gates.image, features.image.shape[-1]),
                wide(gates.match, features.match.shape[-1]),
            ]
        )[:, None]

        zeros, random = nn.initializers.zeros_init(), nn.initializers.lecun_normal()
        weights = self.param("query_weights", zeros, (len(query), candidate.shape[-1], 2))
        offset = self.param("query_offset", zeros, (len(query), 2))
        weights = jnp.tensordot(query, weights * query_gate[:, None] * candidate_gate[None], axes=1)
        logits = candidate @ weights + (query @ (offset * query_gate))[None]
        if self.hidden:
            of_query = self.param("query_hidden", random, (len(query), self.hidden))
            of_candidate = self.param("candidate_hidden", random, (candidate.shape[-1], self.hidden))
            hidden = candidate @ (of_candidate * candidate_gate) + (query @ (of_query * query_gate))[None]
            hidden = _drop(self, jax.checkpoint(nn.gelu)(hidden), dropout)  # recomputed: cheaper than kept
            logits = logits + hidden @ self.param("heads", zeros, (self.hidden, 2))
        logits = logits + self.param("bias", zeros, (2,))[None]
        base_scale = self.param("base_scale", nn.initializers.ones_init(), (2,))
        logits = logits + base_scale[None] * base_logits(features, gates)
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
    free = ("['base_scale']", "['bias']")
    shrunk = [v for path, v in leaves if not jax.tree_util.keystr(path).endswith(free)]
    return jnp.sum(jnp.stack([jnp.sum(value**2) for value in shrunk]))
