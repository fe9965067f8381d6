"""Lanes: each is alone in its program, stops by itself, and looks at what its mask lets through."""

import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cotrr.errors import InputError
from cotrr.ranker import artifact, encoding, fitting, training
from cotrr.ranker.lanes import make_lanes
from cotrr.ranker.model import Scores
from cotrr.ranker.views import Examples
from tests.commands import ROOT
from tests.ranker import on_devices
from tests.ranker.runs import (
    FEW,
    METRIC,
    VARIED,
    change,
    examples_of,
    go,
    lane,
    start,
)
from tests.ranker.synthetic import assert_close, assert_same_bits, development, numbers, without

pytestmark = pytest.mark.usefixtures("unoptimised")


@pytest.fixture(scope="module")
def few():
    return start(FEW)


@pytest.fixture(scope="module")
def together(few):
    states, history = go(few.train, VARIED, FEW.epochs)
    metrics = {name: np.stack([m[name] for m in history], axis=1) for name in history[0]}
    return states, metrics  # metrics [V, epochs, F]


@pytest.mark.parametrize("v", range(5))
def test_lanes_in_one_program_are_each_lane_alone(few, together, v):
    states, history = go(few.train, [VARIED[v]], FEW.epochs)
    for alone, of_all in zip(states, together[0], strict=True):
        assert_close(lane(alone, 0), lane(of_all, v))
    for name in history[0]:
        alone = np.stack([m[name][0] for m in history])
        np.testing.assert_allclose(alone, together[1][name][v], rtol=1e-4, atol=1e-5, err_msg=name)
    # They are not all one, and have gone some way.
    for other in {0, 1, 2, 3, 4} - {v}:
        weights = [lane(together[0][-1].params, k)["params"]["query_weights"] for k in (v, other)]
        assert np.abs(weights[0] - weights[1]).max() > 3e-3


def test_training_in_one_go_is_its_epochs_one_by_one(few, together):
    lanes = make_lanes(VARIED)
    state, metrics = jax.jit(few.train)(lanes.key[1], lane(lanes.hparams, 1), lanes.mask[1])
    assert_close(jax.tree.map(numbers, state), lane(together[0][-1], 1))
    assert set(metrics) == set(together[1])
    for name, values in metrics.items():
        assert values.shape == (5, 3)
        np.testing.assert_allclose(values, together[1][name][1], rtol=1e-4, atol=1e-5, err_msg=name)


def test_queries_are_judged_by_the_mean_score_of_members_in_their_best_epochs(few, together):
    state, lanes = together[0][-1], make_lanes(VARIED)
    alone = np.asarray(training.judge_lanes(few.train, state, lanes, 1))
    members = np.asarray(training.judge_lanes(few.train, state, lanes, 5))[0]
    assert (np.asarray(state.best_epoch) < FEW.epochs).any()  # else the last parameters were the best
    examples, held_out, y = few.train.examples, few.views.held_out, few.development.lists.y
    for query in range(held_out.shape[1]):
        scores = np.zeros((5, len(held_out), y.shape[1]))
        for v, f in np.ndindex(scores.shape[:2]):
            params = jax.tree.map(lambda leaf, v=v, f=f: leaf[v, f], state.best_params)
            seen = jax.tree.map(lambda leaf, f=f, q=query: leaf[f, q], examples.features)
            gates = training._gates(lane(lanes.hparams, v), lanes.mask[v])
            scores[v, f] = few.train._network.apply(params, seen, gates).rank

        def by_hand(of_views, query=query):
            values = [METRIC(s, np.where(w, y[query], 0), where=w)
                      for s, w in zip(of_views, held_out[:, query], strict=True) if w.any()]  # fmt: skip
            return np.mean(values) if values else np.nan

        np.testing.assert_allclose(alone[:, query], [by_hand(s) for s in scores], rtol=1e-3)
        np.testing.assert_allclose(members[query], by_hand(scores.mean(axis=0)), rtol=1e-3)
    # The views' means of these decide who goes on.
    of_views = [[np.nanmean(values[view.any(axis=1)]) for view in held_out[:-1]] for values in alone]
    np.testing.assert_allclose(np.mean(of_views, axis=1), state.best_metric, rtol=1e-3)


def test_seeds_by_hyperparameters_are_nested_maps(few, together):
    _, hparams, mask = make_lanes(VARIED)
    keys = make_lanes(VARIED[:2]).key  # of seeds 0 and 5
    by_seed = lambda train: jax.vmap(train, in_axes=(0, None, None))
    grid = jax.jit(lambda train, *of_lanes: jax.vmap(by_seed(train), in_axes=(None, 0, 0))(*of_lanes))
    state, metrics = grid(few.train, keys, hparams, mask)
    assert metrics["total"].shape == (5, 2, 5, 3)  # hyperparameters, seeds, epochs, views
    for v, seed in ((0, 0), (1, 1), (2, 0), (3, 0)):
        assert_close(lane(lane(state, v), seed), lane(together[0][-1], v))
    hidden = np.asarray(state.params["params"]["candidate_hidden"])
    assert np.abs(hidden[:, 0] - hidden[:, 1]).max(axis=(1, 2, 3)).min() > 0.01


def test_a_lane_whose_patience_is_over_is_frozen_while_others_go_on(together):
    """Without a learning rate the first epoch stays the best, and two more are waited for."""
    states, metrics = together
    over = [training.stopped(state, number, FEW) for number, state in enumerate(states)]
    expected = [[False, number >= 3] for number in range(6)]
    np.testing.assert_array_equal(np.array(over)[:, [0, 4]], expected)
    assert states[-1].best_epoch[4] == 1 and states[-1].best_epoch[0] > 3
    for number in range(5):
        before, after = (lane(states[k], 4) for k in (number, number + 1))
        if number >= 3:
            assert_same_bits(before, after)
        else:  # the moments of Adam move all the same
            assert any(
                (one != other).any()
                for one, other in zip(
                    jax.tree.leaves(before.optimizer), jax.tree.leaves(after.optimizer), strict=True
                )
            )
        moved = states[number + 1].params["params"]["bias"] != states[number].params["params"]["bias"]
        assert moved[0].all() and not moved[4].any()
    for name, values in metrics.items():
        views = values[:, :, : 2 if name.startswith("validation") else 3]  # the final one holds out nothing
        assert np.isnan(values[4, 3:]).all() and not np.isnan(views[4, :3]).any(), name
        assert np.isfinite(views[0]).all(), name


def test_make_lanes():
    configs = [change(FEW, seed=3, members=2), change(FEW, learning_rate=0.0, penalty=0.0, groups="so")]
    lanes = make_lanes(configs)
    expected = [jax.random.fold_in(jax.random.key(seed), k) for seed, k in ((3, 0), (3, 1), (0, 0))]
    assert lanes.key.shape == (3,)
    for one, key in zip(lanes.key, expected, strict=True):
        assert_same_bits(one, key)
    hparams = lanes.hparams
    np.testing.assert_array_equal(hparams.learning_rate, np.float32([0.01, 0.01, 0]))
    np.testing.assert_array_equal(hparams.pair_power, np.float32([0.5] * 3))
    np.testing.assert_array_equal(lanes.mask[0], lanes.mask[1])
    np.testing.assert_array_equal(lanes.mask[2], encoding.make_mask(["so"]))
    unused = {name for name, value in hparams._asdict().items() if value is None}
    assert unused == {"bagging", "dropout", "margin", "lambda_power", "softmax_weight"}
    assert make_lanes([configs[1]]).hparams.penalty == 0  # never left out


PARTS = {"ranknet": 0.7, "softmax": 0.3, "pointwise": 1.5, "conflict": 0.2}


@pytest.mark.parametrize("used", [["ranknet"], ["softmax", "conflict"], ["pointwise"], list(PARTS), []])
def test_what_no_lane_weighs_is_left_out(few, used):
    given = {f"{name}_weight": PARTS[name] if name in used else 0.0 for name in PARTS}
    lanes = make_lanes([change(FEW, **given)])
    states = jax.eval_shape(training.init_lanes, few.train, lanes)
    _, metrics = jax.eval_shape(training.run_epoch, few.train, states, jnp.int32(0), lanes)
    assert set(PARTS) & set(metrics) == set(used)
    assert {"total", "penalty", "validation_loss"} <= set(metrics)
    # Nor is it in the loss.
    rng = np.random.default_rng(0)
    scores = Scores(*jnp.float32(rng.normal(size=(2, 8))))
    example = Examples(None, jnp.float32(rng.uniform(size=8)), None, None,
                                *jnp.float32(rng.uniform(size=(2, 8))))  # fmt: skip
    total, parts = training.list_loss(scores, example, jnp.ones(8, bool), lane(lanes.hparams, 0))
    assert set(parts) == {*used, "total"}
    assert float(total) == pytest.approx(sum(PARTS[name] * float(parts[name]) for name in used))
    assert float(parts["total"]) == float(total)


def test_the_total_is_the_weighted_sum_of_its_parts(together):
    """Also where one lane weighs what another does not."""
    metrics = {name: values[:, :3] for name, values in together[1].items()}  # before any lane is frozen
    for v, config in enumerate(VARIED[:4]):
        weighed = {name: getattr(config, f"{name}_weight") for name in PARTS}
        total = sum(weight * metrics[name][v] for name, weight in weighed.items()) + metrics["penalty"][v]
        np.testing.assert_allclose(metrics["total"][v], total, rtol=1e-4)
        assert all((metrics[name][v] > 0).all() for name in PARTS)


def test_a_step_that_broke_is_named(few):
    """An undefined feature of one query, in the eyes of one view."""
    examples, q, view = examples_of(few), 5, 2
    image = np.array(examples.features.image)
    image[view, q, 0, 0] = np.nan
    train = training.make_train(
        FEW, examples._replace(features=examples.features._replace(image=image)), METRIC
    )
    _, (metrics,) = go(train, [FEW], 1)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), training.OTHERS), 0)
    first = list(np.asarray(jax.random.permutation(key, 24))).index(q) // 9
    assert metrics["broken_step"].tolist() == [[-1, -1, first]]
    assert np.isfinite(metrics["total"][0, :2]).all() and np.isnan(metrics["total"][0, 2])


@pytest.mark.parametrize(
    ("groups", "names"),
    [("so,conflict", ""), ("clip,conflict", ""), ("clip,so,conflict", "embeddings,brightness,conflict_prob")],
)
def test_a_masked_lane_is_one_that_was_given_garbage(few, groups, names):
    config = change(FEW, groups=groups, without=names)
    mask = encoding.mask_of(dataclasses.asdict(config))
    encoded = encoding.encode(without(few.development.lists, ~mask), few.vocabulary)
    seen = fitting.featurize_views(few.statistics, encoded)
    examples = examples_of(few)
    trains = [training.make_train(FEW, each, METRIC) for each in (examples, examples._replace(features=seen))]
    assert_same_bits(*(go(train, [config], 2) for train in trains))
    # Without the mask it would have mattered.
    opened = [go(train, [FEW], 1)[0][-1].params["params"]["query_weights"] for train in trains]
    assert np.abs(opened[0] - opened[1]).max() > 1e-3


def test_garbage_that_is_masked_may_be_there_before_anything_is_fitted():
    """But for the terms of Step 4's rule: its scale is that of all three."""
    config, data = change(FEW, without="embeddings,brightness,ice_ratio,conflict_score"), development()
    mask = encoding.mask_of(dataclasses.asdict(config))
    setups = [start(FEW, data._replace(lists=lists)) for lists in (data.lists, without(data.lists, ~mask))]
    assert not np.array_equal(setups[0].statistics.mean, setups[1].statistics.mean)
    runs = [go(setup.train, [config], 2) for setup in setups]
    assert_same_bits(*runs)
    models = [fitting.finish(setup, run[0][-1], config, "m", {})
              for setup, run in zip(setups, runs, strict=True)]  # fmt: skip
    assert models[0].calibration == models[1].calibration
    scored = [artifact.score(models[0], each.development.lists).score for each in setups]
    np.testing.assert_array_equal(*scored)


def test_a_mesh_changes_nothing(few):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("queries",))
    plain, spread = (go(train, [FEW], 2) for train in (few.train, start(FEW, mesh=mesh).train))
    assert_close(*(jax.tree.map(numbers, run) for run in (plain, spread)))


def test_devices_share_the_work_and_agree(tmp_path):
    """8 forced host devices, in a process of their own, against the one of this process."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    subprocess.run([sys.executable, "-m", "tests.ranker.on_devices", tmp_path / "eight.npz"], cwd=ROOT,
                   env=environment, check=True)  # fmt: skip
    one, eight = on_devices.train(), np.load(tmp_path / "eight.npz")
    assert (one["devices"], eight["devices"]) == (1, 8)
    assert one.keys() == eight.keys()
    for key in one.keys() - {"devices"}:
        np.testing.assert_allclose(one[key], eight[key], rtol=1e-4, atol=1e-5, err_msg=key)


def test_bagged_members_differ_and_a_power_of_zero_weighs_all_alike(few):
    config = change(FEW, hidden=0, members=2, bagging=1.0, dropout=0.0)
    setup = start(config)
    bagged = go(setup.train, [config], 2)[0][-1].params["params"]["query_weights"]
    assert np.abs(bagged[0] - bagged[1]).max() > 1e-4
    alike = go(setup.train, [change(config, bagging=b, members=1, hidden=0) for b in (0.0, 1.0)], 2)
    plain = go(setup.train, [change(config, bagging=0.0, members=1)], 2)
    assert_close(lane(alike[0][-1].params, 0), lane(plain[0][-1].params, 0))
    with pytest.raises(InputError, match="all would be the same"):
        change(config, bagging=0.0)
