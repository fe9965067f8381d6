"""Why one candidate outscores another: exact Shapley values of feature groups and attributes.

The game: its players are the attributes (and the embeddings), a coalition is worth the margin
of two candidates' rank logits when the other players are absent, that is, at the mean of their
domain.  Groups get their Shapley values; inside a group each player gets its Owen value, so players
add up to their group and groups to the margin.  For a model without a hidden layer these are the
plain Shapley values too.
"""

import functools
import itertools
from functools import partial
from math import factorial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cotrr.data.contract import ATTRIBUTES
from cotrr.data.lists import Lists
from cotrr.ranker import encoding, features
from cotrr.ranker.artifact import Model, encode
from cotrr.ranker.encoding import Encoded, mask_of
from cotrr.ranker.features import Features, Statistics
from cotrr.ranker.model import Params, Reranker


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
    final = np.flatnonzero(model.final)
    statistics, params = (
        jax.tree.map(lambda part: part[final], part) for part in (model.statistics, model.params)
    )
    players, owner = _players(model, lists)
    used = list(dict.fromkeys(owner[name] for name in players))
    groups = {group: [p for p, name in enumerate(players) if owner[name] == group] for group in used}
    coalitions, weights = _game(tuple(map(tuple, groups.values())))
    pair = _pairs(encode(model, lists), query, np.stack([first, second], axis=1))
    place = [encoding.MASKED.index(name) for name in players]
    masks = np.zeros((len(coalitions), len(encoding.MASKED)), np.float32)
    masks[:, place] = coalitions
    text = jnp.float32(mask_of(model.config)[-1])
    worth = _worths(params, statistics, pair, jnp.asarray(masks), text, hidden=model.config["hidden"])
    worth = np.asarray(worth, np.float64)
    values = worth @ weights.T
    return Explanation(
        margin=worth[:, coalitions.all(axis=1).argmax()],
        groups={group: values[:, members].sum(axis=1) for group, members in groups.items()},
        attributes=dict(zip(players, values.T, strict=True)),
    )


@functools.cache
def _game(groups: tuple[tuple[int, ...], ...]) -> tuple[np.ndarray, np.ndarray]:
    return owen_game(list(map(list, groups)))


def _players(model: Model, lists: Lists) -> tuple[list[str], dict[str, str]]:
    """What can move a score, and its group: the attributes that were ever seen, and the embeddings."""
    seen = np.asarray(model.statistics.missing)[model.final].min(axis=0) < 1
    there = np.append(seen, bool(lists.image.shape[-1])) & mask_of(model.config)
    owner = {**ATTRIBUTES, encoding.EMBEDDINGS: "clip"}
    return [name for name, in_game in zip(encoding.MASKED, there, strict=True) if in_game], owner


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
    masks: jax.Array,
    text: jax.Array,
    *,
    hidden: int,
) -> jax.Array:
    """[K, M] the margin of each pair under each coalition's mask [M, A + 1], mean over the members.

    What is masked stands at its domain's mean; the query's text is no player: it stays if
    the model looks at it, `text` [] 0 or 1.
    """
    network = Reranker(hidden=hidden)
    # A gate would be put on the weights, and each coalition would have a copy of them all.
    open_gates = features.make_gates(np.ones(masks.shape[1]))._replace(text=text)

    def by_member(pair: Encoded, params: Params, fitted: Statistics) -> jax.Array:
        inputs = features.featurize(fitted, pair)

        def worth(mask: jax.Array) -> jax.Array:
            scores: Any = network.apply(params, _masked(inputs, mask), open_gates)
            return scores.rank[0] - scores.rank[1]

        return jax.vmap(worth)(masks)

    members = lambda pair: jnp.mean(jax.vmap(partial(by_member, pair))(params, statistics), axis=0)
    return jax.lax.map(members, pairs)


def _masked(inputs: Features, mask: jax.Array) -> Features:
    """The features that a rank logit sees with a mask [A + 1] on them: what is out is 0."""
    attributes, embeddings = mask[:-1], mask[-1]
    return inputs._replace(
        attributes=inputs.attributes * jnp.tile(attributes, 2)[None],
        image=inputs.image * embeddings,
        match=inputs.match * embeddings,
        rule=inputs.rule * attributes[jnp.array(encoding.RULE_COLUMNS)][None],
    )
