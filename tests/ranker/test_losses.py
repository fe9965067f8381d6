"""Losses: values by hand, then invariances, then what must not break them."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cotrr.ranker.losses import cross_entropy, masked_mean, ranknet

ALL = jnp.ones(3, bool)
SCORES, LABELS = (2.0, 0.5, -1.0), (0.25, 1.0, 0.0)


def softplus(x):
    return math.log1p(math.exp(x))


def by_hand(scores, labels, margin=0.0, power=0.0):
    pairs = [(i, j) for i in range(len(scores)) for j in range(len(scores)) if labels[i] > labels[j]]
    weights = [(labels[i] - labels[j]) ** power for i, j in pairs]
    terms = [softplus(margin - (scores[i] - scores[j])) for i, j in pairs]
    return sum(w * t for w, t in zip(weights, terms, strict=True)) / sum(weights)


def random_list(seed, n=7):
    rng = np.random.default_rng(seed)
    scores, labels = rng.normal(size=n), rng.choice([0.0, 0.3, 0.7, 1.0], n)
    return jnp.float32(scores), jnp.float32(labels), jnp.asarray(np.arange(n) < n - seed % 3)


LOSSES = {
    "ranknet": ranknet,
    "weighted": partial(ranknet, margin=0.3, power=1.5),
    "cross_entropy": cross_entropy,
}
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


def test_ranknet_is_the_mean_logistic_loss_of_its_three_pairs():
    # y: b > a > c, so the pairs are (b, a), (b, c), (a, c).
    expected = (softplus(2.0 - 0.5) + softplus(-1.0 - 0.5) + softplus(-1.0 - 2.0)) / 3
    assert float(ranknet(jnp.array(SCORES), jnp.array(LABELS), where=ALL)) == pytest.approx(expected)


@pytest.mark.parametrize(("margin", "power"), [(0.5, 0.0), (0.0, 1.0), (1.0, 2.0), (0.2, 0.5)])
def test_margin_and_power(margin, power):
    value = ranknet(jnp.array(SCORES), jnp.array(LABELS), where=ALL, margin=margin, power=power)
    assert float(value) == pytest.approx(by_hand(SCORES, LABELS, margin, power))
    assert float(value) != pytest.approx(by_hand(SCORES, LABELS), rel=1e-3)


def test_cross_entropy_of_soft_labels():
    logits, labels = (1.5, -0.5, 3.0), (0.8, 0.3, 0.0)
    p = [1 / (1 + math.exp(-z)) for z in logits]
    terms = [-(t * math.log(q) + (1 - t) * math.log(1 - q)) for t, q in zip(labels, p, strict=True)]
    value = cross_entropy(jnp.array(logits), jnp.array(labels), where=ALL)
    assert float(value) == pytest.approx(sum(terms) / 3)
    value = cross_entropy(jnp.array(logits), jnp.array(labels), where=jnp.array([True, True, False]))
    assert float(value) == pytest.approx(sum(terms[:2]) / 2)


def test_a_soft_label_is_best_met_by_its_own_logit():
    slope = jax.grad(lambda z: cross_entropy(z[None], jnp.array([0.8]), where=jnp.ones(1, bool)))
    assert float(slope(jnp.float32(math.log(0.8 / 0.2)))) == pytest.approx(0, abs=1e-6)
    assert float(slope(jnp.float32(0.0))) == pytest.approx(0.5 - 0.8)


def test_masked_mean_weighs():
    assert float(masked_mean(jnp.array([1.0, 4.0, jnp.nan]), jnp.array([3.0, 1.0, 0.0]))) == 1.75


@each_loss
def test_mean_over_nothing_is_zero_with_zero_gradient(loss):
    scores = jnp.array(SCORES)
    value, slope = jax.value_and_grad(loss)(scores, jnp.array(LABELS), where=~ALL)
    assert value == 0
    np.testing.assert_array_equal(slope, 0)


def test_tied_labels_make_no_pair():
    value, slope = jax.value_and_grad(ranknet)(jnp.array(SCORES), jnp.full(3, 0.4), where=ALL, power=0.5)
    assert value == 0
    np.testing.assert_array_equal(slope, 0)


@each_loss
def test_a_long_list_weighs_no_more_than_a_short_one(loss):
    short = jnp.array(SCORES), jnp.array(LABELS)
    long = tuple(jnp.tile(part, 40) for part in short)
    other = jnp.array([0.1, 0.9, 0.5]), jnp.array([1.0, 0.2, 0.0])
    mean = lambda lists: sum(loss(s, y, where=jnp.ones(len(s), bool)) for s, y in lists) / len(lists)
    assert float(mean([long, other])) == pytest.approx(float(mean([short, other])), rel=1e-5)


@each_loss
def test_extreme_scores_have_finite_gradients(loss):
    scores = jnp.array([-1e4, 1e4, 0.0, 1e4, -1e4])
    labels = jnp.array([1.0, 0.0, 0.5, 1.0, 0.0])
    value, slope = jax.value_and_grad(loss)(scores, labels, where=jnp.ones(5, bool))
    assert np.isfinite(value) and np.isfinite(slope).all()
    assert slope[0] < -0.05 < 0.05 < slope[1]  # the two that stand wrong still move


@each_loss
def test_undefined_labels_outside_where_touch_nothing(loss):
    scores, labels = jnp.array(SCORES), jnp.array(LABELS)
    where = jnp.array([True, True, False])
    holed = labels.at[2].set(jnp.nan)
    value, slope = jax.value_and_grad(loss)(scores, holed, where=where)
    expected, expected_slope = jax.value_and_grad(loss)(scores[:2], labels[:2], where=where[:2])
    assert float(value) == pytest.approx(float(expected))
    np.testing.assert_allclose(slope, [*expected_slope, 0.0], rtol=1e-6)


@each_loss
def test_an_undefined_score_stays_visible_inside_where_alone(loss):
    scores = jnp.array(SCORES).at[2].set(jnp.nan)
    assert np.isnan(loss(scores, jnp.array(LABELS), where=ALL))
    assert np.isfinite(loss(scores, jnp.array(LABELS), where=jnp.array([True, True, False])))


@each_loss
def test_neither_order_nor_padding_matters(loss):
    scores, labels, where = random_list(1)
    expected = float(loss(scores, labels, where=where))
    order = np.random.default_rng(0).permutation(len(scores))
    assert float(loss(scores[order], labels[order], where=where[order])) == pytest.approx(expected, rel=1e-6)
    pad = lambda values, fill: jnp.concatenate([values, jnp.full(5, fill, values.dtype)])
    more = loss(pad(scores, 77.0), pad(labels, jnp.nan), where=pad(where, False))
    assert float(more) == pytest.approx(expected, rel=1e-6)


@each_loss
def test_jit_is_eager_and_vmap_is_a_loop(loss):
    lists = [random_list(seed) for seed in range(5)]
    loop = jnp.stack([loss(s, y, where=w) for s, y, w in lists])
    compiled = jnp.stack([jax.jit(loss)(s, y, where=w) for s, y, w in lists])
    batch = jax.vmap(lambda s, y, w: loss(s, y, where=w))(*map(jnp.stack, zip(*lists, strict=True)))
    np.testing.assert_allclose(compiled, loop, rtol=1e-6)
    np.testing.assert_allclose(batch, loop, rtol=1e-6)
