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

STAGES = (*(f"rung-{k}" for k in range(1, 10)), "finalists")  # the most there are
SURE = 0.05


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


def ladder(count: int, epochs: int, rungs: int) -> list[Rung]:
    """The rungs of a search: each keeps half of the lanes, the epochs go up by halves.

    >>> ladder(64, 60, 3)
    [Rung(lanes=64, last=15), Rung(lanes=32, last=30), Rung(lanes=16, last=60)]
    """
    return [Rung(-(-count // 2**rung), max(epochs // 2 ** (rungs - 1 - rung), 1))
            for rung in range(rungs)]  # fmt: skip


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
    metric: float  # of its members' mean score, over held-out queries; NaN where it has none
    number: int  # of the configuration; the centre's comes after the last
    why: str  # it was taken
    trained: list[tuple[Stage, State]]  # every stage, the finalists last


# Trains the lanes of a stage from a state that has so many epochs behind it.
Run = Callable[[Stage, State, int], State]


def tune(
    train: Train,
    configs: Sequence[TrainConfig],
    run: Run,
    *,
    rungs: int = 3,
    finalists: int = 3,
    members: int = 1,
) -> Found:
    """The centre of the best quarter of some configurations, or the best of them, with so many members.

    The best of many is so by luck where the held-out queries are few; what the best have in common is
    not.  So the centre is taken, unless another of at least two finalists beats it by more than chance.
    Raises InputError where all are lost.
    """
    trained, ranked = halve(train, configs, run, rungs)
    best = [dataclasses.replace(configs[k], members=members) for k in ranked[: -(-len(configs) // 4)]]
    contest = [centre(best), *best[: finalists - 1]]
    numbers = [len(configs), *ranked[: len(contest) - 1]]
    stage, lanes = Stage(STAGES[-1], contest, train.config.epochs, numbers), make_lanes(contest)
    state = run(stage, training.init_lanes(train, lanes), 0)
    values = np.asarray(training.judge_lanes(train, state, lanes, members))
    chosen, why = choose(values, survivors(state, len(contest), members), contest[0].looked_at)
    of_chosen = take(state, range(chosen * members, (chosen + 1) * members))
    known = values[chosen][~np.isnan(values[chosen])]
    metric = float(known.mean()) if len(known) else np.nan
    return Found(contest[chosen], of_chosen, metric, numbers[chosen], why, [*trained, (stage, state)])


def halve(
    train: Train, configs: Sequence[TrainConfig], run: Run, rungs: int
) -> tuple[list[tuple[Stage, State]], list[int]]:
    """Trains all configurations, ever fewer of them ever longer; and their numbers, best first.

    Who went on is better than who did not; who was lost is not among them.
    """
    state, first, trained = training.init_lanes(train, make_lanes(configs)), 0, list[tuple[Stage, State]]()
    alive, dropped = list(range(len(configs))), list[int]()
    stages = ladder(len(configs), train.config.epochs, rungs)
    for name, rung, following in zip(STAGES, stages, [*stages[1:], stages[-1]], strict=False):
        stage = Stage(name, [configs[k] for k in alive], rung.last, alive)
        state = run(stage, state, first)
        trained.append((stage, state))
        order = survivors(state, rung.lanes)
        kept, others = order[: following.lanes], order[following.lanes :]
        dropped = [alive[k] for k in others] + dropped
        alive, state, first = [alive[k] for k in kept], take(state, kept), rung.last
    return trained, alive + dropped


def choose(values: np.ndarray, alive: Sequence[int], looked_at: int) -> tuple[int, str]:
    """Which of C configurations is taken by metrics [C, Q] of held-out queries, and why.

    It is the first of all, the centre, unless another is better by more than chance: by a paired t test
    over queries at 5 %, Bonferroni's for as many as were looked at.  `alive` are those that are not
    lost, best first.
    """
    if 0 not in alive:
        return alive[0], "the best, the centre of the best quarter being lost"
    for other in alive:
        if _p_better(values[other] - values[0]) * looked_at < SURE:
            return other, "better than the centre of the best quarter by more than chance"
    return 0, "the centre of the best quarter"


def _p_better(differences: np.ndarray) -> float:
    """One-sided p of a t test that the mean of differences [Q] is not above 0; NaN ones do not count."""
    known = differences[~np.isnan(differences)]
    if len(known) < 2 or not known.std():
        return 1.0
    return float(stats.ttest_1samp(known, 0, alternative="greater").pvalue)


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
