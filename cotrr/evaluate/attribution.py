"""Why one candidate outscores another: exact Shapley values of feature groups and attributes.

The game: its players are the attributes (and the image embedding), a coalition is worth the margin
of two candidates' rank logits when the other players are absent, that is, at the mean of their
domain.  Groups get their Shapley values; inside a group each player gets its Owen value, so players
add up to their group and groups to the margin.  For a model without a hidden layer these are the
plain Shapley values too.
"""

import itertools
from functools import partial
from math import factorial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cotrr.data.contract import ATTRIBUTES
from cotrr.data.lists import Lists
from cotrr.ranker import features
from cotrr.ranker.artifact import Model
from cotrr.ranker.features import Encoded, Statistics
from cotrr.ranker.model import Params, Reranker

IMAGE = "image_embedding"


class Explanation(NamedTuple):
    """Of K pairs of candidates: positive values pushed the first one ahead."""

    margin: np.ndarray  # [K] rank logit of the first minus that of the second
    groups: dict[str, np.ndarray]  # [K] each
    attributes: dict[str, np.ndarray]  # [K] each


def shapley_weight(size: int, players: int) -> float:
    """Weight of a coalition of `size` others in one player's Shapley value (Shapley 1953).

    >>> [round(shapley_weight(size, 3), 4) for size in range(3)]
    [0.3333, 0.1667, 0.3333]
    """
    return factorial(size) * factorial(players - size - 1) / factorial(players)


def owen_game(groups: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Coalitions [M, P] bool and weights [P, M]: Owen values are the weights times the coalitions' worths.

    `groups` partitions the players 0 … P − 1.  A player joins others of its group while each other
    group is there as a whole or not at all (Owen 1977).
    """
    players = sum(map(len, groups))
    coalitions, weights = [], []
    for g, group in enumerate(groups):
        others = [group for i, group in enumerate(groups) if i != g]
        for whole in itertools.product((False, True), repeat=len(others)):
            for inside in itertools.product((False, True), repeat=len(group)):
                coalition, weight = np.zeros(players, bool), np.zeros(players)
                coalition[[p for there, other in zip(whole, others, strict=True) if there for p in other]] = (
                    True
                )
                coalition[[p for there, p in zip(inside, group, strict=True) if there]] = True
                outer = shapley_weight(sum(whole), len(groups))
                for there, player in zip(inside, group, strict=True):
                    size = sum(inside) - there
                    weight[player] = (1 if there else -1) * outer * shapley_weight(size, len(group))
                coalitions.append(coalition)
                weights.append(weight)
    return np.array(coalitions).reshape(-1, players), np.array(weights).reshape(-1, players).T


def explain(
    model: Model, lists: Lists, query: np.ndarray, first: np.ndarray, second: np.ndarray
) -> Explanation:
    """Of the margins of candidates `first` [K] over `second` [K] of the queries `query` [K]."""
    used = model.config["groups"].split(",")
    final = np.flatnonzero(model.final)
    statistics, params = (
        jax.tree.map(lambda part: part[final], part) for part in (model.statistics, model.params)
    )
    seen = np.asarray(statistics.missing).min(axis=0) < 1
    owner = {name: group for (name, group), there in zip(ATTRIBUTES.items(), seen.tolist(), strict=True)
             if there and group in used}  # fmt: skip
    if "clip" in used and lists.image.shape[-1]:
        owner[IMAGE] = "clip"
    players = list(owner)
    groups = {group: [p for p, name in enumerate(players) if owner[name] == group] for group in used}
    coalitions, weights = owen_game([members for members in groups.values() if members])
    pair = _pairs(features.encode(lists, model.vocabulary), query, np.stack([first, second], axis=1))
    alone = np.array([[name == player for name in ATTRIBUTES] for player in players], bool)
    image = np.array([player == IMAGE for player in players])
    masks = map(jnp.asarray, (features.group_mask(used), alone, image, coalitions))
    worth = np.asarray(_worths(params, statistics, pair, *masks, hidden=model.config["hidden"]), np.float64)
    values = worth @ weights.T
    return Explanation(
        margin=worth[:, coalitions.all(axis=1).argmax()],
        groups={group: values[:, members].sum(axis=1) for group, members in groups.items()},
        attributes=dict(zip(players, values.T, strict=True)),
    )


def _pairs(encoded: Encoded, query: np.ndarray, candidates: np.ndarray) -> Encoded:
    """The two candidates [K, 2] of each query as lists of two."""
    own = encoded._replace(**{name: getattr(encoded, name)[query] for name in ("domain", "wants", "text")})
    at = lambda values: values[query[:, None], candidates]
    return own._replace(image=at(encoded.image), attributes=at(encoded.attributes), where=at(encoded.where))


@partial(jax.jit, static_argnames="hidden")
def _worths(
    params: Params,
    statistics: Statistics,
    pairs: Encoded,
    allowed: jax.Array,
    alone: jax.Array,
    image: jax.Array,
    coalitions: jax.Array,
    *,
    hidden: int,
) -> jax.Array:
    """[K, M] the margin of each pair by coalition, mean over the members.

    Features are additive in the players: what each adds is measured with it `alone` [P, A].
    """
    network = Reranker(hidden=hidden)

    def by_member(pair: Encoded, params: Params, fitted: Statistics) -> jax.Array:
        whole = features.featurize(fitted, pair, allowed)
        nobody = features.featurize(fitted, pair, jnp.zeros_like(allowed))
        single: Any = jax.vmap(partial(features.featurize, fitted, pair))(alone)

        def worth(coalition: jax.Array) -> jax.Array:
            there = coalition.astype(jnp.float32)
            add = lambda one, none: none + jnp.tensordot(there, one - none[None], axes=1)
            scores = network.apply(params, whole._replace(
                image=whole.image * jnp.sum(there * image),
                attributes=add(single.attributes, nobody.attributes), base=add(single.base, nobody.base),
            ))  # fmt: skip
            return scores.rank[0] - scores.rank[1]

        return jax.vmap(worth)(coalitions)

    members = lambda pair: jnp.mean(jax.vmap(partial(by_member, pair))(params, statistics), axis=0)
    return jax.lax.map(members, pairs)
