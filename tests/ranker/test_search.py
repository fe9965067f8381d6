"""The search: what is drawn, who goes on."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from cotrr.errors import InputError
from cotrr.ranker import search, training
from cotrr.ranker.lanes import TrainConfig, make_lanes
from tests.ranker.runs import FEW, start


@pytest.mark.parametrize(("hidden", "dimensions"), [(0, 10), (8, 11)])
def test_drawn_settings_lie_in_their_ranges_and_cover_them(hidden, dimensions):
    config = TrainConfig(hidden=hidden, seed=3)
    configs = search.draw(config, 129)
    assert len(configs) == 129 and configs[0] == dataclasses.replace(config, looked_at=130)
    assert len(search.space(config)) == dimensions
    for name, range_ in search.space(config).items():
        values = np.array([getattr(drawn, name) for drawn in configs[1:]])
        drawn = values[values > 0]
        assert drawn.min() >= range_.low * 0.999 and drawn.max() <= range_.high * 1.001
        assert (values == 0).mean() == pytest.approx(range_.zeros, abs=0.02)
        # A Sobol sequence fills each quarter of the range (of the logarithm) alike.
        place = np.log(drawn / range_.low) / np.log(range_.high / range_.low)
        np.testing.assert_allclose(np.histogram(place, 4, (0, 1))[0] / len(drawn), 0.25, atol=0.03)


def test_the_same_seed_draws_the_same_and_more_draws_go_on():
    config = TrainConfig()
    assert search.draw(config, 9) == search.draw(config, 9)
    more = [dataclasses.replace(drawn, looked_at=10) for drawn in search.draw(config, 16)]
    assert more[:9] == search.draw(config, 9)
    found = search.draw(search.draw(config, 9)[3], 5)  # of what was found before: all looks count
    assert {drawn.looked_at for drawn in found} == {15}
    other = search.draw(dataclasses.replace(config, seed=1), 9)
    assert other[1].penalty != search.draw(config, 9)[1].penalty
    assert {
        drawn.members for drawn in search.draw(dataclasses.replace(config, members=4, bagging=1.0), 5)
    } == {1}


@pytest.mark.parametrize(("count", "epochs", "rungs"), [(64, 60, 3), (8, 8, 3), (2, 1, 1), (5, 3, 4)])
def test_rungs_shrink_and_end_at_the_last_epoch(count, epochs, rungs):
    ladder = search.ladder(count, epochs, rungs)
    assert ladder[0].lanes == count and ladder[-1].last == epochs
    lanes, last = zip(*ladder, strict=True)
    assert list(lanes) == sorted(lanes, reverse=True) and min(lanes) >= 1
    assert list(last) == sorted(last) and min(last) >= 1


def test_the_best_go_on_and_undefined_ones_last():
    state = SimpleNamespace(best_metric=np.array([0.5, np.nan, 0.9, 0.7, 0.9, 1.0]),
                            best=np.array([1.0, np.inf, 1.0, 1.0, 1.0, np.inf]))  # fmt: skip
    assert search.survivors(state, 3) == [2, 4, 3]
    assert search.survivors(state, 6) == [2, 4, 3, 0]  # the others are lost
    assert search.survivors(state, 2, members=2) == [1]  # a lost seed loses the others


def test_all_lost_is_no_best():
    state = SimpleNamespace(best_metric=np.full(3, np.nan), best=np.full(3, np.inf))
    with pytest.raises(InputError, match="no configuration has a finite"):
        search.survivors(state, 1)


def test_the_centre_is_the_geometric_mean_of_what_is_searched():
    configs = [TrainConfig(penalty=p, margin=m, pair_power=q, conflict_weight=3)
               for p, m, q in [(0.01, 0.2, 0), (0.04, 0, 0), (0.02, 0.8, 0.5)]]  # fmt: skip
    centre = search.centre(configs)
    assert centre == dataclasses.replace(configs[0], penalty=0.02, margin=0.4, pair_power=0.0)
    assert search.centre(configs[:1]) == configs[0]


def test_the_centre_stays_unless_another_is_better_by_more_than_chance():
    noise = np.random.default_rng(0).normal(0, 0.1, 100)
    base = np.full(100, 0.5)
    luck, sure = base + noise - noise.mean() + 0.02, base + 0.1 * noise + 0.03
    assert 0.01 < search._p_better(luck - base) < 0.04  # one of few would be taken for it, not one of many
    choose = lambda *values, alive=(2, 1, 0), looked_at=64: search.choose(
        np.array(values), [k for k in alive if k < len(values)], looked_at
    )
    assert choose(base, luck)[0] == 0 and choose(base, luck, looked_at=1)[0] == 1
    assert choose(base, luck, sure) == (2, "better than the centre of the best quarter by more than chance")
    assert choose(base, base) == (0, "the centre of the best quarter")
    unknown = np.where(np.arange(100) < 50, np.nan, sure)
    assert choose(base, unknown)[0] == 1
    assert choose(base, np.full(100, np.nan))[0] == 0
    assert choose(base, base - 0.1, sure, alive=(1, 2)) == (
        1,
        "the best, the centre of the best quarter being lost",
    )
    assert choose(base, sure, alive=(0,))[0] == 0


@pytest.mark.parametrize("rungs", [1, 3, 5])
def test_a_search_tells_the_quarter_from_the_rest_whatever_the_rungs(rungs):
    setup, stages = start(dataclasses.replace(FEW, hidden=0)), []
    configs = search.draw(setup.config, 16)

    def run(stage, state, first):
        stages.append((stage.name, len(stage.configs), first, stage.last))
        if stage.name == "finalists":
            return state._replace(best=np.zeros(len(stage.numbers)), best_metric=np.zeros(len(stage.numbers)))
        # The higher its number the better, but that 15 is lost.
        lost = np.array([k == 15 for k in stage.numbers])
        return state._replace(best=np.where(lost, np.inf, 1.0), best_metric=np.array(stage.numbers, float))

    found = search.tune(setup.train, configs, run, rungs=rungs, finalists=3)
    assert [stage.numbers for stage, _ in found.trained][-1] == [16, 14, 13]
    centre = search.centre([configs[k] for k in (14, 13, 12, 11)])
    assert found.trained[-1][0].configs == [centre, configs[14], configs[13]]
    assert (found.config, found.number) == (centre, 16)  # none was trained: no difference
    lanes = [16, 8, 4, 2, 1][:rungs]
    assert [count for _, count, _, _ in stages] == [*lanes, 3]
    firsts = [0, *[last for _, _, _, last in stages[: rungs - 1]], 0]
    assert [first for _, _, first, _ in stages] == firsts


def test_a_lost_centre_gives_way_to_the_members_of_the_best():
    config = dataclasses.replace(FEW, hidden=0, bagging=1.0, members=2)
    setup, finalists = start(config), []

    def run(stage, state, first):
        state = training.run_epochs(setup.train, state, make_lanes(stage.configs), first, min(stage.last, 2))
        if stage.name != "finalists":
            return state
        finalists.append((stage, state._replace(best=state.best.at[1].set(np.inf))))  # of the centre
        return finalists[0][1]

    found = search.tune(setup.train, search.draw(config, 8), run, rungs=1, members=2)
    stage, state = finalists[0]
    best = 1 + int(np.asarray(state.best_metric).reshape(-1, 2).mean(axis=1)[1:].argmax())
    assert found.why.startswith("the best")
    assert (found.number, found.config) == (stage.numbers[best], stage.configs[best])
    for of_found, of_all in zip(jax.tree.leaves(found.state.best_params), jax.tree.leaves(state.best_params),
                                strict=True):  # fmt: skip
        np.testing.assert_array_equal(of_found, of_all[2 * best : 2 * best + 2])
    judged = training.judge_lanes(setup.train, found.state, make_lanes([found.config]), 2)
    assert found.metric == pytest.approx(np.nanmean(np.asarray(judged)), rel=1e-4)


def test_lanes_are_taken_from_every_leaf():
    tree = {"a": np.arange(4), "b": (np.arange(8).reshape(4, 2),)}
    taken = search.take(tree, [2, 0])
    np.testing.assert_array_equal(taken["a"], [2, 0])
    np.testing.assert_array_equal(taken["b"][0], [[4, 5], [0, 1]])
