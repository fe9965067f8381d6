"""Hyperparameter search: a Sobol sequence, successive halving of its lanes, and the centre of the best."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy import stats

from cotrr.errors import InputError
from cotrr.ranker import training
from cotrr.ranker.lanes import TrainConfig, make_lanes
from cotrr.ranker.training import State, Train


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
    sequence = stats.qmc.Sobol(len(ranges), seed=np.random.default_rng(config.seed))
    points = sequence.random_base2(max(count - 1, 1).bit_length())[: count - 1]
    place = lambda point: {name: _place(ranges[name], u) for name, u in zip(ranges, point, strict=True)}
    drawn: list[dict[str, Any]] = [{}, *map(place, points.tolist())]
    looked_at = config.looked_at + count  # the given one counts among them, and their centre comes to it
    return [dataclasses.replace(config, members=1, looked_at=looked_at, **values) for values in drawn]


def _place(range_: Range, u: float) -> float:
    if u < range_.zeros:
        return 0.0
    share = (u - range_.zeros) / (1 - range_.zeros)
    value = range_.low * (range_.high / range_.low) ** share
    return _written(value)


def _written(value: float) -> float:
    """What a recipe says is what was trained."""
    return float(f"{value:.4g}")


def centre(configs: Sequence[TrainConfig]) -> TrainConfig:
    """The first of some configurations with every searched setting at their geometric mean.

    A setting that is 0 in more than half of them is 0, and the mean of the others elsewhere.
    """

    def middle(name: str) -> float:
        values = np.array([getattr(config, name) for config in configs])
        if 2 * np.count_nonzero(values) < len(values):
            return 0.0
        return _written(np.exp(np.log(values[values > 0]).mean()))

    settings: dict[str, Any] = {name: middle(name) for name in space(configs[0])}
    return dataclasses.replace(configs[0], **settings)


class Rung(NamedTuple):
    """One stage of successive halving (Jamieson & Talwalkar 2016)."""

    lanes: int
    last: int  # epoch that it ends after


def rungs(count: int, epochs: int, stages: int) -> list[Rung]:
    """The stages of a search: each keeps half of the lanes, the epochs go up by halves.

    >>> rungs(64, 60, 3)
    [Rung(lanes=64, last=15), Rung(lanes=32, last=30), Rung(lanes=16, last=60)]
    """
    return [Rung(-(-count // 2**stage), max(epochs // 2 ** (stages - 1 - stage), 1))
            for stage in range(stages)]  # fmt: skip


class Stage(NamedTuple):
    """Lanes of a search that are trained together, to the end of epoch `last`."""

    name: str
    configs: list[TrainConfig]
    last: int
    numbers: list[int]  # of the configurations, as they were drawn; their centre comes after the last


class Found(NamedTuple):
    """What a search ends with."""

    config: TrainConfig
    state: State  # of its members
    trained: list[tuple[Stage, State]]  # every stage, the finalists last
    chosen: int  # which finalist; 0 is the centre


# Trains the lanes of a stage from a state that has so many epochs behind it.
Run = Callable[[Stage, State, int], State]


def tune(
    train: Train, configs: Sequence[TrainConfig], stages: int, finalists: int, members: int, run: Run
) -> Found:
    """The centre of the best quarter of some configurations, or the best of them, with so many members.

    The best of many is so by luck where the held-out queries are few; what the best have in common is
    not.  So the centre is taken, unless one of the other finalists beats it by more than chance would.
    """
    trained, order = halve(train, configs, stages, run)
    best = order[: -(-len(configs) // 4)]
    with_members = [dataclasses.replace(configs[k], members=members) for k in best]
    contest = [centre(with_members), *with_members[: finalists - 1]]
    stage = Stage("finalists", contest, train.config.epochs, [len(configs), *best[: finalists - 1]])
    lanes = make_lanes(contest)
    state = run(stage, training.init_lanes(train, lanes), 0)
    chosen = choose(state, np.asarray(training.judge_lanes(train, state, lanes)), len(configs), members)
    of_chosen = take(state, range(chosen * members, (chosen + 1) * members))
    return Found(contest[chosen], of_chosen, [*trained, (stage, state)], chosen)


def halve(
    train: Train, configs: Sequence[TrainConfig], stages: int, run: Run
) -> tuple[list[tuple[Stage, State]], list[int]]:
    """Trains all configurations, ever fewer of them ever longer; and who went to the end, best first."""
    state, first, trained = training.init_lanes(train, make_lanes(configs)), 0, list[tuple[Stage, State]]()
    alive, ladder = list(range(len(configs))), rungs(len(configs), train.config.epochs, stages)
    for rung, following in zip(ladder, [*ladder[1:], ladder[-1]], strict=True):
        stage = Stage(f"rung-{len(trained) + 1}", [configs[k] for k in alive], rung.last, alive)
        state = run(stage, state, first)
        trained.append((stage, state))
        order = survivors(state, following.lanes)
        alive, state, first = [alive[k] for k in order], take(state, order), rung.last
    return trained, alive


def choose(state: State, values: np.ndarray, looked_at: int, members: int = 1) -> int:
    """The first configuration, unless another's metric [lanes, Q] is better by more than chance.

    A paired t test over queries at 5 %, Bonferroni's for as many as were looked at.  Raises InputError
    where all are lost.
    """
    alive = survivors(state, len(values) // members, members)
    by_config = values.reshape(-1, members, values.shape[1]).mean(axis=1)
    keeper = 0 if 0 in alive else alive[0]
    better = {k: _p_better(by_config[k] - by_config[keeper]) for k in alive}
    return next((k for k in alive if better[k] * looked_at < 0.05), keeper)


def _p_better(differences: np.ndarray) -> float:
    """One-sided p of a t test that the mean of differences [Q] is not above 0; NaN ones do not count."""
    known = differences[~np.isnan(differences)]
    if len(known) < 2 or not known.std():
        return 1.0
    return float(stats.t.sf(known.mean() / (known.std(ddof=1) / np.sqrt(len(known))), len(known) - 1))


def survivors(state: State, count: int, members: int = 1) -> list[int]:
    """Up to `count` configurations, of so many lanes each, with the best mean validation metric, best first.

    Those without one come last, those of which a lane is lost not at all.  Raises InputError where all are.
    """
    by_config = lambda values: np.asarray(values, np.float64).reshape(-1, members)
    metric = np.nan_to_num(by_config(state.best_metric).mean(axis=1), nan=-np.inf)
    lost = ~np.isfinite(by_config(state.best)).all(axis=1)
    if lost.all():
        raise InputError("no configuration has a finite validation loss", field="--learning_rate")
    alive = np.flatnonzero(~lost)
    return alive[np.argsort(-metric[alive], kind="stable")][:count].tolist()


def take(lanes: Any, chosen: Sequence[int]) -> Any:
    """Some lanes of a tree whose leaves have a leading axis of lanes."""
    return jax.tree.map(lambda leaf: leaf[np.asarray(chosen)], lanes)
