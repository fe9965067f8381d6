"""Hyperparameter search: a Sobol sequence of configurations, and successive halving of their lanes."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy.stats import qmc

from cotrr.errors import InputError
from cotrr.ranker.lanes import TrainConfig
from cotrr.ranker.training import State


class Range(NamedTuple):
    """Where a setting is drawn from: uniformly in its logarithm, but for a share of exact zeros."""

    low: float
    high: float
    zeros: float = 0.0  # share of the draws


# Sobol dimensions in this order.  The ranges lie around the recipe, which is always drawn first.
SPACE = {
    "learning_rate": Range(3e-3, 3e-2),
    "penalty": Range(2e-2, 0.5),
    "conflict_weight": Range(2.0, 30.0),
    "image_size": Range(0.3, 1.2),
    "text_size": Range(0.1, 1.5),
    "match_size": Range(0.5, 4.0),
    "pointwise_weight": Range(0.1, 3.0),
    "pair_power": Range(0.25, 1.0, zeros=0.5),
    "lambda_power": Range(0.25, 1.0, zeros=0.5),
    "margin": Range(0.1, 1.0, zeros=0.5),
    "dropout": Range(0.05, 0.5, zeros=0.2),
}


def space(config: TrainConfig) -> dict[str, Range]:
    """What is searched for a config: without a hidden layer there is no dropout."""
    return {name: range_ for name, range_ in SPACE.items() if config.hidden or name != "dropout"}


def draw(config: TrainConfig, count: int) -> list[TrainConfig]:
    """`config` itself, then a scrambled Sobol sequence (Owen 1998) keyed by its seed."""
    ranges = space(config)
    sequence = qmc.Sobol(len(ranges), seed=np.random.default_rng(config.seed))
    points = sequence.random_base2(max(count - 1, 1).bit_length())[: count - 1]
    place = lambda point: {name: _place(ranges[name], u) for name, u in zip(ranges, point, strict=True)}
    drawn: list[dict[str, Any]] = [{}, *map(place, points.tolist())]
    looked_at = config.looked_at - 1 + count
    return [dataclasses.replace(config, members=1, looked_at=looked_at, **values) for values in drawn]


def _place(range_: Range, u: float) -> float:
    if u < range_.zeros:
        return 0.0
    share = (u - range_.zeros) / (1 - range_.zeros)
    value = range_.low * (range_.high / range_.low) ** share
    return float(f"{value:.4g}")  # what a recipe says is what was trained


class Rung(NamedTuple):
    """One stage of successive halving (Jamieson & Talwalkar 2016)."""

    lanes: int
    last: int  # epoch that it ends after


def rungs(count: int, epochs: int, stages: int, kept: float = 1 / 3) -> list[Rung]:
    """The stages of a search: each keeps a third of the lanes, the epochs go up by halves.

    >>> rungs(27, 60, 3)
    [Rung(lanes=27, last=15), Rung(lanes=9, last=30), Rung(lanes=3, last=60)]
    """
    return [Rung(max(math.ceil(count * kept**stage), 1), max(epochs // 2 ** (stages - 1 - stage), 1))
            for stage in range(stages)]  # fmt: skip


def survivors(state: State, count: int, members: int = 1) -> list[int]:
    """The `count` configurations, of so many lanes each, with the best mean validation metric, best first.

    Undefined ones, and those of which a lane is lost, come last.  Raises InputError where all are lost.
    """
    by_config = lambda values: np.asarray(values, np.float64).reshape(-1, members)
    metric = np.nan_to_num(by_config(state.best_metric).mean(axis=1), nan=-np.inf)
    metric[~np.isfinite(by_config(state.best)).all(axis=1)] = -np.inf
    order = np.argsort(-metric, kind="stable")[:count].tolist()
    if not np.isfinite(by_config(state.best)[order[0]]).all():
        raise InputError("no configuration has a finite validation loss", field="--learning_rate")
    return order


def take(lanes: Any, chosen: Sequence[int]) -> Any:
    """Some lanes of a tree whose leaves have a leading axis of lanes."""
    return jax.tree.map(lambda leaf: leaf[np.asarray(chosen)], lanes)
