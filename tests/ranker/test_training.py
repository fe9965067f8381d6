"""Training: who learns from what, that it learns, that it repeats to the bit, and that lanes are apart."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cotrr.checkpoints import Checkpoints
from cotrr.errors import InputError
from cotrr.evaluate.metrics import ndcg
from cotrr.ranker import artifact, calibration, features, fitting, training
from cotrr.ranker.model import Reranker, Scores
from cotrr.ranker.training import TrainConfig
from tests.ranker.synthetic import assert_close, assert_same_bits, development, numbers, without

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


def start(config, data=None, mesh=None):
    return fitting.set_up(data or development(), config, METRIC, mesh)


def inputs_of(setup):
    """[F, Q, ...] features, as each view sees them."""
    return fitting.featurize_views(setup.statistics, setup.encoded)


def base_of(setup):
    """[F, Q, n, 2] Step 4's rule and conflict logit, as each view sees them."""
    gates = features.make_gates(features.make_mask(features.GROUPS))
    base = jax.vmap(jax.vmap(features.base_logits, in_axes=(0, None)), in_axes=(0, None))
    return np.asarray(base(inputs_of(setup), gates), np.float64)


def go(train, configs, epochs, state=None, first=0):
    """States [V, ...] and metrics [V, F] of epochs first + 1, …, epochs, as a launcher runs them."""
    lanes = training.make_lanes(configs)
    states, history = [training.init_lanes(train, lanes) if state is None else state], []
    for number in range(first, epochs):
        state, metrics = training.run_epoch(train, states[-1], jnp.asarray(number), lanes)
        states.append(state)
        history.append(metrics)
    return states, history


def lane(tree, v):
    """One lane (or view) of a tree of them; keys as their numbers."""
    return jax.tree.map(lambda value: numbers(value)[v], tree)


@pytest.fixture(scope="module")
def simple():
    return start(CONFIG)


@pytest.fixture(scope="module")
def dropping():
    return start(DROPPING)


@pytest.fixture(scope="module")
def learned(simple):
    return go(simple.train, [CONFIG], CONFIG.epochs)


@pytest.fixture(scope="module")
def dropped(dropping):
    return go(dropping.train, [DROPPING], DROPPING.epochs)


def test_loss_falls_and_the_held_out_metric_beats_the_rule(simple, learned):
    _, history = learned
    loss = [float(m["total"].mean()) for m in history]
    assert loss[-1] < 0.85 * loss[0]
    lists, validation = simple.development.lists, simple.development.validation
    rule = jax.vmap(lambda s, y, w: METRIC(s, y, where=w))(
        jnp.float32(base_of(simple)[0, validation, :, 0]),
        np.nan_to_num(lists.y)[validation],
        lists.where[validation],
    )
    assert float(history[-1]["validation_metric"][0, 0]) > float(np.mean(rule)) + 0.05
    assert history[-1]["validation_loss"][0, 0] < history[0]["validation_loss"][0, 0]


def test_first_loss_is_the_mean_over_queries_by_hand(simple, learned):
    setup, metrics = simple, learned[1][0]
    lists, train = setup.development.lists, setup.views.train[0]
    scale = setup.statistics.label_scale[0, [int(name[1]) for name in lists.domain]]
    base = base_of(setup)[0]
    softplus = lambda x: np.logaddexp(0, x)
    ranknet, pointwise, conflict = [], [], []
    for q in np.flatnonzero(train.any(axis=1)):
        keep = train[q]
        s, c = base[q, keep].T
        y = lists.y[q, keep].astype(np.float64)
        gap = (y[:, None] - y[None]) / scale[q]
        i, j = np.nonzero(gap > 0)
        ranknet.append(np.average(softplus(0.1 - (s[i] - s[j])), weights=gap[i, j] ** 0.5))
        pointwise.append(np.mean(softplus(s) - y * s))
        conflict.append(np.mean(softplus(c) - lists.conflict[q, keep] * c))
    expected = {"ranknet": np.mean(ranknet), "pointwise": np.mean(pointwise), "conflict": np.mean(conflict)}
    for name, value in expected.items():
        assert float(metrics[name][0, 0]) == pytest.approx(value, rel=1e-4), name
    total = expected["ranknet"] + expected["pointwise"] + 0.5 * expected["conflict"]
    assert float(metrics["total"][0, 0]) == pytest.approx(total, rel=1e-4)
    assert metrics["penalty"][0, 0] == 0  # all that is shrunk starts at zero


def test_validation_is_the_mean_over_held_out_lists_by_hand(dropping, dropped):
    """Of the parameters after the epoch, and whatever the batches are."""
    state, metrics = lane((dropped[0][2], dropped[1][1]), 1)
    data, views, hparams = dropping.development, dropping.views, lane(training.make_lanes([DROPPING]), 1)
    examples, gates = inputs_of(dropping), features.make_gates(hparams.mask, 0.6, 0.1)
    for view in range(2):
        apply = partial(Reranker(hidden=4).apply, lane(state.params, view))
        losses, values = [], []
        for q in np.flatnonzero(views.held_out[view].any(axis=1)):
            rows = views.held_out[view, q]
            scores = apply(lane(lane(examples, view), q), gates)
            y, gap = (
                np.where(rows, part, 0)
                for part in (data.lists.y[q], data.lists.y[q] / dropping.statistics.label_scale[view, q % 2])
            )
            softplus = lambda x: np.logaddexp(0, x)
            s, c = (np.asarray(part, float)[rows] for part in scores)
            i, j = np.nonzero(gap[rows][:, None] > gap[rows])
            weights = (gap[rows][i] - gap[rows][j]) ** 0.5
            pairs = np.average(softplus(0.1 - s[i] + s[j]), weights=weights) if len(i) else 0
            points = np.mean(softplus(s) - y[rows] * s)
            losses.append(pairs + points + 0.5 * np.mean(softplus(c) - data.lists.conflict[q, rows] * c))
            values.append(float(METRIC(scores.rank, jnp.float32(y), where=rows)))
        assert len(losses) > 3
        assert float(metrics["validation_loss"][view]) == pytest.approx(np.mean(losses), rel=1e-4)
        assert float(metrics["validation_metric"][view]) == pytest.approx(np.nanmean(values), rel=1e-4)
    assert np.isnan(metrics["validation_loss"][2]) and np.isnan(metrics["validation_metric"][2])


def test_a_resumed_run_goes_on_bit_by_bit(dropping, dropped, tmp_path):
    straight, history = dropped[0][:6], dropped[1][:5]
    with Checkpoints(tmp_path) as kept:
        kept.save(3, go(dropping.train, [DROPPING], 3)[0][-1])
    with Checkpoints(tmp_path) as kept:
        fresh = training.init_lanes(dropping.train, training.make_lanes([change(DROPPING, seed=99)]))
        assert kept.latest() == 3
        loaded = kept.load(3, fresh)
    assert_same_bits(loaded, straight[3])
    resumed, rest = go(dropping.train, [DROPPING], 5, loaded, first=3)
    assert_same_bits(resumed[-1], straight[5])
    assert_same_bits(rest, history[3:])


def test_best_parameters_are_those_of_the_lowest_mean_validation_loss(dropped):
    states, history = dropped
    losses = np.array([np.nanmean(m["validation_loss"], axis=1) for m in history])
    for v in range(2):
        best, last = int(np.argmin(losses[:, v])), lane(states[-1], v)
        assert int(last.best_epoch) == best + 1 and float(last.best) == pytest.approx(losses[best, v])
        metric = np.nanmean(history[best]["validation_metric"][v])
        assert float(last.best_metric) == pytest.approx(metric)
        assert_same_bits(last.best_params, lane(states[best + 1].params, v))


def test_a_worse_epoch_does_not_replace_the_best(dropped):
    state = lane(dropped[0][0], 0)
    new = state._replace(params=jax.tree.map(lambda x: x + 1, state.params), best=jnp.float32(0.5))
    new = new._replace(best_metric=jnp.float32(0.8))
    for loss, taken in ((0.6, False), (jnp.nan, False), (0.4, True)):
        kept = training._keep_best(new, jnp.float32(loss), jnp.float32(0.7), jnp.int32(7))
        assert_same_bits(kept.best_params, new.params if taken else state.best_params)
        found = float(kept.best), float(kept.best_metric), int(kept.best_epoch)
        assert found == pytest.approx((0.4, 0.7, 7) if taken else (0.5, 0.8, 0))


def test_same_seed_same_bits(simple, dropping, dropped):
    again, other = (go(dropping.train, [change(DROPPING, seed=seed)], 2) for seed in (0, 1))
    assert_same_bits(again, (dropped[0][:3], dropped[1][:2]))
    weights = [run[0][-1].params["params"]["query_weights"] for run in (again, other)]
    assert np.abs(weights[0] - weights[1]).max() > 1e-4
    anew = start(CONFIG)
    for part in ("vocabulary", "statistics", "views"):
        assert_same_bits(getattr(anew, part), getattr(simple, part))
    assert_same_bits(inputs_of(anew), inputs_of(simple))


def test_batches_come_in_an_order_of_the_runs_seed_and_the_epoch_alone(dropping):
    """Lanes of other seeds see the same batches: with nothing random of their own they are one."""
    quiet = [change(DROPPING, hidden=0, dropout=0.0, members=1, seed=seed) for seed in (0, 1)]
    train = dataclasses.replace(dropping.train, config=quiet[0])
    (_, _, state), _ = go(train, quiet, 2)
    assert_same_bits(lane(state.params, 0), lane(state.params, 1))
    other = dataclasses.replace(train, config=quiet[1])
    (_, _, elsewhere), _ = go(other, quiet, 2)
    weights = [s.params["params"]["query_weights"] for s in (state, elsewhere)]
    assert np.abs(weights[0] - weights[1]).max() > 1e-4


def test_every_query_is_learned_from_in_an_epoch(dropping):
    """24 queries in steps of 9: the first three of the order come twice."""
    train = dropping.train
    assert (train._steps, train._batch) == (3, 9)
    batches = np.asarray(train._batches(jnp.resize(jnp.arange(24), 27)))
    assert batches.shape == (3, 9) and np.bincount(batches.ravel()).tolist() == [2] * 3 + [1] * 21
    taken = train._take(jnp.array([5, 24]))
    assert taken.gap.shape == (3, 2, 8) and taken.y.shape == (2, 8)
    np.testing.assert_array_equal(taken.y[0], dropping.development.lists.y[5])
    assert not taken.train[:, 1].any() and not taken.held_out[:, 1].any()  # one that is not there


def test_members_differ(dropped):
    hidden = np.asarray(dropped[0][2].params["params"]["candidate_hidden"])
    assert hidden.shape[:2] == (2, 3)
    assert len(np.unique(hidden.reshape(6, -1), axis=0)) == 6


# Lanes that differ in everything that they may differ in; the last learns nothing.
FEW = TrainConfig(
    folds=2, epochs=5, patience=2, hidden=3, image_components=4, text_components=2, batch_queries=9,
    pair_power=0.5,
)  # fmt: skip
VARIED = [
    FEW,
    change(FEW, seed=5, learning_rate=0.03, penalty=0.1, image_size=1.0, text_size=0.5),
    change(FEW, without="brightness,embeddings,compliance_score", pair_power=1.0, margin=0.2,
           conflict_weight=0.0),
    change(FEW, groups="so,conflict", dropout=0.3, lambda_power=1.0, softmax_weight=0.5, ranknet_weight=0.3,
           pointwise_weight=2.0),
    change(FEW, seed=7, learning_rate=0.0),
]  # fmt: skip


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
    lanes = training.make_lanes(VARIED)
    state, metrics = jax.jit(few.train)(lanes.key[1], lane(lanes.hparams, 1), lanes.mask[1])
    assert_close(jax.tree.map(numbers, state), lane(together[0][-1], 1))
    assert set(metrics) == set(together[1])
    for name, values in metrics.items():
        assert values.shape == (5, 3)
        np.testing.assert_allclose(values, together[1][name][1], rtol=1e-4, atol=1e-5, err_msg=name)


def test_seeds_by_hyperparameters_are_nested_maps(few, together):
    _, hparams, mask = training.make_lanes(VARIED)
    keys = training.make_lanes(VARIED[:2]).key  # of seeds 0 and 5
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
    lanes = training.make_lanes(configs)
    expected = [jax.random.fold_in(jax.random.key(seed), k) for seed, k in ((3, 0), (3, 1), (0, 0))]
    assert lanes.key.shape == (3,)
    for one, key in zip(lanes.key, expected, strict=True):
        assert_same_bits(one, key)
    hparams = lanes.hparams
    np.testing.assert_array_equal(hparams.learning_rate, np.float32([0.01, 0.01, 0]))
    np.testing.assert_array_equal(hparams.pair_power, np.float32([0.5] * 3))
    np.testing.assert_array_equal(lanes.mask[0], lanes.mask[1])
    np.testing.assert_array_equal(lanes.mask[2], features.make_mask(["so"]))
    unused = {name for name, value in hparams._asdict().items() if value is None}
    assert unused == {"bagging", "dropout", "margin", "lambda_power", "softmax_weight"}
    assert training.make_lanes([configs[1]]).hparams.penalty == 0  # never left out


PARTS = {"ranknet": 0.7, "softmax": 0.3, "pointwise": 1.5, "conflict": 0.2}


@pytest.mark.parametrize("used", [["ranknet"], ["softmax", "conflict"], ["pointwise"], list(PARTS), []])
def test_what_no_lane_weighs_is_left_out(few, used):
    given = {f"{name}_weight": PARTS[name] if name in used else 0.0 for name in PARTS}
    lanes = training.make_lanes([change(FEW, **given)])
    states = jax.eval_shape(training.init_lanes, few.train, lanes)
    _, metrics = jax.eval_shape(training.run_epoch, few.train, states, jnp.int32(0), lanes)
    assert set(PARTS) & set(metrics) == set(used)
    assert {"total", "penalty", "validation_loss"} <= set(metrics)
    # Nor is it in the loss.
    rng = np.random.default_rng(0)
    scores = Scores(*jnp.float32(rng.normal(size=(2, 8))))
    example = training.Examples(None, jnp.float32(rng.uniform(size=8)), None, None,
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
    mask = artifact.mask_of(dataclasses.asdict(config))
    encoded = features.encode(without(few.development.lists, ~mask), few.vocabulary)
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
    mask = artifact.mask_of(dataclasses.asdict(config))
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


def test_finish_calibrates_on_rows_held_out(dropping, dropped):
    """Each held-out row's logit is the mean of the members of the view that holds it out."""
    state, config = dropped[0][2], change(DROPPING, without="brightness")
    model = fitting.finish(dropping, state, config, "m", {"a": 1})
    data, held, inputs = dropping.development, dropping.views.held_out, inputs_of(dropping)
    gates = features.make_gates(features.make_mask(features.GROUPS, ["brightness"]), 0.6, 0.1)
    # [F, V, Q, n], by the gates that training had
    apply = jax.vmap(Reranker(hidden=4).apply, in_axes=(None, 0, None))
    apply = jax.vmap(jax.vmap(apply, in_axes=(0, None, None)), in_axes=(1, 0, None))
    scores = [np.asarray(part, float) for part in apply(state.best_params, inputs, gates)]
    rows = [(view, q, i) for view in range(2) for q, i in np.argwhere(held[view])]
    rows.sort(key=lambda row: row[1:])
    view, q, i = np.array(rows).T
    rank, conflict = (part[view, :, q, i].mean(axis=1) for part in scores)
    y, clash = (part[q, i].astype(float) for part in (data.lists.y, data.lists.conflict))
    fitted = calibration.fit(rank, conflict, y, clash, q, view)
    assert sorted(set(view)) == [0, 1] and model.calibration.queries == len(set(q))
    for head, logits in (("rank", rank), ("conflict", conflict)):
        mine, expected = getattr(model.calibration, head), getattr(fitted, head)
        assert type(mine) is type(expected)
        np.testing.assert_allclose(mine(logits), expected(logits), atol=1e-4)
        assert model.calibration.choices[head].log_loss == pytest.approx(
            fitted.choices[head].log_loss, rel=1e-4
        )
    label = np.linspace(0, 1, 21)
    np.testing.assert_allclose(model.calibration.intervals(label), fitted.intervals(label), atol=1e-3)
    # Members of one view stand together, by the view's statistics with the sizes in them.
    np.testing.assert_array_equal(model.final, [False] * 4 + [True] * 2)
    for lane_number, (view, member) in enumerate((view, member) for view in range(3) for member in range(2)):
        assert_same_bits(lane(model.params, lane_number), lane(lane(state.best_params, member), view))
        mine, fitted = lane(model.statistics, lane_number), lane(dropping.statistics, view)
        np.testing.assert_allclose(mine.image_axes, 0.6 * fitted.image_axes, rtol=1e-6)
        np.testing.assert_allclose(mine.text_axes, 0.1 * fitted.text_axes, rtol=1e-6)
        axes = {"image_axes": fitted.image_axes, "text_axes": fitted.text_axes}
        assert_same_bits(mine._replace(**axes), fitted)
    logit = artifact.score(model, data.lists).logit
    there = data.lists.where
    np.testing.assert_allclose(logit[there], scores[0][2].mean(axis=0)[there], rtol=1e-4, atol=1e-4)
    assert model.config == dataclasses.asdict(config)
    assert model.provenance == {"a": 1, "calibrated_on": "gold"}
    silver = data._replace(lists=data.lists._replace(gold=np.zeros_like(data.lists.gold)))
    again = fitting.finish(dropping._replace(development=silver), state, config, "m", {})
    assert again.provenance == {"calibrated_on": "silver"} and again.calibration == model.calibration
    labelled = data.lists.labelled
    assert artifact.overlap(model, "query_id", data.lists.query_id) == 24
    assert artifact.overlap(model, "canonical_id", np.unique(data.canonical_id[labelled])) == len(
        set(data.canonical_id[labelled])
    )


def test_finish_without_folds_halves_the_validation_split_by_query(simple, learned):
    model = fitting.finish(simple, learned[0][-1], CONFIG, "m", {})
    assert model.final.tolist() == [True]
    held = simple.views.held_out[0]
    q, i = np.nonzero(held)
    logits = np.asarray(artifact.lane_scores(model.params, model.statistics, simple.encoded,
                                             artifact.mask_of(model.config), hidden=0).rank)[0]  # fmt: skip
    label, choice = calibration.choose(
        logits[q, i].astype(float), simple.development.lists.y[q, i].astype(float), q % 2
    )
    assert (model.calibration.rank, model.calibration.choices["rank"]) == (label, choice)
    assert model.calibration.queries == 8


def test_golden(dropped):
    totals = np.array([m["total"] for m in dropped[1][:2]])
    message = (
        "The loss of a fixed run changed. If features, losses, lanes, views, batches, keys or the optimiser "
        "were meant to change, every model trained from now on differs: say so, and pin the new values."
    )
    np.testing.assert_allclose(totals, GOLDEN, rtol=2e-4, err_msg=message)


GOLDEN = [[[2.178811, 2.129188, 2.146566], [2.179471, 2.130562, 2.148099]],
          [[1.464762, 1.620056, 1.6685], [1.460559, 1.623432, 1.662348]]]  # fmt: skip


def test_views_of_folds():
    data = development()
    data.lists.y[0, 0] = np.nan
    views = training.make_views(data.lists, data.canonical_id, data.validation, 3)
    labelled = data.lists.labelled
    assert views.train.shape == views.held_out.shape == (4, *labelled.shape)
    query = np.broadcast_to(data.lists.query_id[:, None], labelled.shape)
    for train, held_out in zip(views.train[:3], views.held_out[:3], strict=True):
        assert train.any() and held_out.any() and not (train & held_out).any()
        assert not (train & ~labelled).any() and not (held_out & ~labelled).any()
        assert not set(query[train]) & set(query[held_out])
        assert not set(data.canonical_id[train]) & set(data.canonical_id[held_out])
        # No more is lost than rows whose query or whose picture is in the fold.
        of_fold = np.isin(query, list(set(query[held_out]))) | np.isin(
            np.where(labelled, data.canonical_id, ""), list(set(data.canonical_id[held_out]))
        )
        assert not (labelled & ~train & ~held_out & ~of_fold).sum() > 0.2 * labelled.sum()
    assert views.held_out[:3].sum(axis=0).max() == 1
    assert (views.train[:3].sum(axis=0) >= 1)[labelled].all()
    np.testing.assert_array_equal(views.train[3], labelled)
    assert not views.held_out[3].any()


def test_the_view_without_folds_holds_out_the_validation_split():
    data = development()
    views = training.make_views(data.lists, data.canonical_id, data.validation, 0)
    np.testing.assert_array_equal(views.train, (data.lists.labelled & ~data.validation[:, None])[None])
    np.testing.assert_array_equal(views.held_out, (data.lists.labelled & data.validation[:, None])[None])


@pytest.mark.parametrize("folds", [0, 3])
def test_gold_alone_is_held_out_where_there_is_any(folds):
    data = development()
    gold = data.lists.where & (np.random.default_rng(0).uniform(size=data.lists.where.shape) < 0.5)
    data.lists.y[0:20:4, 1:3] = np.nan
    views_of = lambda gold: training.make_views(
        data.lists._replace(gold=gold), data.canonical_id, data.validation, folds
    )
    labelled, nothing = data.lists.labelled, np.zeros_like(gold)
    mixed, silver = views_of(gold), views_of(nothing)
    assert (gold & ~labelled).any() and (labelled & ~gold).any()
    judged = [view for view in silver.held_out if view.any()]
    assert len(judged) == (folds or 1)
    for view in judged:  # with both kinds in it, so that leaving out silver means something
        assert (view & gold).any() and (view & ~gold).any()
    np.testing.assert_array_equal(mixed.held_out, silver.held_out & gold)
    for k, view in enumerate(mixed.held_out):
        assert view.any() == silver.held_out[k].any() and not (view & ~gold).any()
    # Silver is learned from all the same, but for what the fold takes out.
    np.testing.assert_array_equal(mixed.train, silver.train)
    assert (mixed.train & ~gold).any()
    # Gold without a label is none.
    np.testing.assert_array_equal(views_of(gold & ~labelled).held_out, silver.held_out)
    np.testing.assert_array_equal(views_of(data.lists.where).held_out, silver.held_out)


def examples_of(setup):
    lists, views = setup.development.lists, setup.views
    scale = np.ones(views.train.shape[:2], np.float32)
    return training.make_examples(lists, inputs_of(setup), scale, views)


def test_labels_that_are_held_out_or_undefined_do_not_reach_their_view():
    data = development()
    data.lists.y[::2, 1:3] = np.nan
    data.lists.conflict[1, 0] = np.nan  # of a labelled row: it teaches the rank head alone
    data.lists.conflict[2] = np.nan
    setup = start(FEW, data)
    labelled, held, holed = data.lists.labelled, setup.views.held_out[0], examples_of(setup)
    assert np.isnan(holed.y[~labelled]).all() and np.isnan(holed.gap[:, ~labelled]).all()
    other = {name: np.where(labelled, np.where(held, 1 - values, values), 0.9).astype(np.float32)
             for name in ("y", "gap", "conflict") for values in [getattr(holed, name)]}  # fmt: skip
    trains = [training.make_train(FEW, examples, METRIC) for examples in (holed, holed._replace(**other))]
    runs = [go(train, [change(VARIED[3], groups=FEW.groups)], 2) for train in trains]  # of every loss
    view = lambda run, k: jax.tree.map(lambda x: x[0, k], run[0][-1].params)
    assert_same_bits(view(runs[0], 0), view(runs[1], 0))
    weights = [view(run, 2)["params"]["query_weights"] for run in runs]
    assert np.abs(weights[0] - weights[1]).max() > 1e-4
    first, second = (run[1][-1]["validation_loss"][0] for run in runs)
    assert first[0] != second[0] and np.isnan(first[2])
    state = runs[0][0][-1]._replace(key=None)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    assert all(
        np.isfinite(runs[0][1][-1][name]).all() for name in ("total", "ranknet", "softmax", "conflict")
    )


def test_labels_are_scaled_inside_their_domain():
    data = development()
    lists = data.lists
    views = training.make_views(lists, data.canonical_id, data.validation, 2)
    scale = np.linspace(0.5, 2, 72).astype(np.float32).reshape(3, 24)
    examples = training.make_examples(lists, None, scale, views)
    assert examples.gap.shape == (3, 24, 8)
    for k in range(3):
        np.testing.assert_allclose(examples.gap[k], lists.y / scale[k, :, None])
    np.testing.assert_array_equal(examples.y, lists.y)
    np.testing.assert_array_equal(examples.conflict, lists.conflict)
    assert_same_bits((examples.train, examples.held_out), (views.train, views.held_out))


def test_nothing_to_learn_from_or_nothing_held_out():
    data = development()
    with pytest.raises(InputError, match="1 of 1 views have no labelled rows held out") as error:
        start(CONFIG, data._replace(validation=np.zeros(24, bool)))
    assert error.value.field == "y" and "--folds=5" in str(error.value)
    with pytest.raises(InputError, match="1 of 1 views have no labelled rows to learn from"):
        start(CONFIG, data._replace(validation=np.ones(24, bool)))
    with pytest.raises(InputError, match=r"\d+ of 50 views have no labelled rows held out.*fewer folds"):
        start(change(CONFIG, folds=50), data)
    few = data.lists._replace(y=np.full_like(data.lists.y, np.nan))
    few.y[0, 0] = 0.5
    with pytest.raises(InputError, match=r"\d of 3 views have no labelled rows to learn from.*fewer --folds"):
        start(change(CONFIG, folds=2), data._replace(lists=few))


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


def test_a_picture_of_one_query_goes_where_its_query_goes():
    data = development()
    alone = data._replace(canonical_id=np.array([[f"{q}/{i}" for i in range(8)] for q in range(24)], object))
    views = training.make_views(alone.lists, alone.canonical_id, alone.validation, 3)
    labelled = alone.lists.labelled
    np.testing.assert_array_equal(views.held_out[:3].sum(axis=0), labelled)  # every row is held out once
    for k in range(3):
        np.testing.assert_array_equal(views.train[k], labelled & ~views.held_out[k])
