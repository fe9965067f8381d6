"""Small training runs that tests share."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from cotrr.evaluate.metrics import ndcg
from cotrr.ranker import encoding, features, fitting, training
from cotrr.ranker.lanes import TrainConfig, make_lanes
from cotrr.ranker.views import make_examples
from tests.ranker.synthetic import development, numbers

METRIC = partial(ndcg, k=5)

# All queries in one step, so that the first loss can be computed by hand.
CONFIG = TrainConfig(
    folds=0, epochs=30, image_components=6, text_components=2, batch_queries=24, penalty=1e-3,
    learning_rate=0.03, pair_power=0.5, margin=0.1, conflict_weight=0.5, text_size=0.1, match_size=1.0,
)  # fmt: skip

DROPPING = dataclasses.replace(
    CONFIG, folds=2, members=2, hidden=4, dropout=0.2, epochs=6, batch_queries=9, learning_rate=0.01
)

change = dataclasses.replace
FEW = TrainConfig(
    folds=2, epochs=5, patience=2, hidden=3, image_components=4, text_components=2, batch_queries=9,
    pair_power=0.5,
)  # fmt: skip
# Lanes that differ in everything that they may differ in; the last learns nothing.
VARIED = [
    FEW,
    change(FEW, seed=5, learning_rate=0.03, penalty=0.1, image_size=1.0, text_size=0.5),
    change(FEW, without="brightness,embeddings,compliance_score", pair_power=1.0, margin=0.2,
           conflict_weight=0.0),
    change(FEW, groups="so,conflict", dropout=0.3, lambda_power=1.0, softmax_weight=0.5, ranknet_weight=0.3,
           pointwise_weight=2.0),
    change(FEW, seed=7, learning_rate=0.0),
]  # fmt: skip


def start(config, data=None, mesh=None):
    return fitting.set_up(data or development(), config, METRIC, mesh)


def inputs_of(setup):
    """[F, Q, ...] features, as each view sees them."""
    return fitting.featurize_views(setup.statistics, setup.encoded)


def base_of(setup):
    """[F, Q, n, 2] Step 4's rule and conflict logit, as each view sees them."""
    gates = features.make_gates(encoding.make_mask(encoding.GROUPS))
    base = jax.vmap(jax.vmap(features.base_logits, in_axes=(0, None)), in_axes=(0, None))
    return np.asarray(base(inputs_of(setup), gates), np.float64)


def go(train, configs, epochs, state=None, first=0):
    """States [V, ...] and metrics [V, F] of epochs first + 1, …, epochs, as a launcher runs them."""
    lanes = make_lanes(configs)
    states, history = [training.init_lanes(train, lanes) if state is None else state], []
    for number in range(first, epochs):
        state, metrics = training.run_epoch(train, states[-1], jnp.asarray(number), lanes)
        states.append(state)
        history.append(metrics)
    return states, history


def lane(tree, v):
    """One lane (or view) of a tree of them; keys as their numbers."""
    return jax.tree.map(lambda value: numbers(value)[v], tree)


def examples_of(setup):
    lists, views = setup.development.lists, setup.views
    scale = np.ones(views.train.shape[:2], np.float32)
    return make_examples(lists, inputs_of(setup), scale, views)
