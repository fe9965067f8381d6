"""Trains small lanes on all devices that there are, and writes their parameters: run as a command."""

import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from cotrr import devices
from cotrr.compilation import keep_compiled
from cotrr.evaluate.metrics import ndcg
from cotrr.ranker import fitting, training
from cotrr.ranker.lanes import TrainConfig, make_lanes
from tests.ranker.synthetic import development

CONFIG = TrainConfig(folds=2, members=2, epochs=4, image_components=6, text_components=2, batch_queries=9,
                     hidden=4, dropout=0.2, lambda_power=0.5, softmax_weight=0.1)  # fmt: skip


def train() -> dict[str, jax.Array | int]:
    """Parameters and metrics by name, and the number of devices that shared the work."""
    setup = fitting.set_up(development(), CONFIG, partial(ndcg, k=5), devices.mesh())
    lanes = make_lanes([CONFIG])
    state = training.init_lanes(setup.train, lanes)
    for number in range(CONFIG.epochs):
        state, metrics = training.run_epoch(setup.train, state, jnp.asarray(number), lanes)
    spread = {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(setup.train.examples)}
    arrays = {
        jax.tree_util.keystr(path): value for path, value in jax.tree_util.tree_leaves_with_path(state.params)
    }
    return {"devices": max(spread), **arrays, **metrics}


if __name__ == "__main__":
    keep_compiled()
    np.savez(sys.argv[1], **train())
