"""Losses: values by hand, then invariances, then what must not break them, and what they cost."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cotrr.ranker.losses import cross_entropy, masked_mean, ranknet, softmax

ALL = jnp.ones(3, bool)
SCORES, LABELS = (2.0, 0.5, -1.0), (0.25, 1.0, 0.0)


def softplus(x):
    return math.log1p(math.exp(x))


def by_hand(scores, labels, margin=0.0, power=0.0):
    pairs = [(i, j) for i in range(len(scores)) for j in range(len(scores)) if labels[i] > labels[j]]
    weights = [(labels[i] - labels[j]) ** power for i, j in pairs]
    terms = [softplus(margin - (scores[i] - scores[j])) for i, j in pairs]
    return sum(w * t for w, t in zip(weights, terms, strict=True)) / sum(weights)


def naive(scores, labels, where, margin=None, power=None, lambda_power=None):
    """RankNet's value and gradient by [n, n] matrices, in double precision."""
    scores, labels, there = (np.asarray(part, np.float64) for part in (scores, labels, where))
    order = sorted(np.flatnonzero(there), key=lambda i: -scores[i])
    discount = np.ones(len(scores))
    discount[order] = 1 / np.log2(np.arange(len(order)) + 2)
    gap = np.where(there * there[:, None] > 0, labels[:, None] - labels, 0.0)
    weight = (gap > 0) * np.maximum(gap, 0) ** (power or 0)
    weight *= np.abs(gap * (discount[:, None] - discount)) ** (lambda_power or 0)
    z = scores[:, None] - scores - (margin or 0)
    total = weight.sum() or 1.0
    push = weight / (1 + np.exp(z))
    return (weight * np.logaddexp(0, -z)).sum() / total, (push.sum(axis=0) - push.sum(axis=1)) / total


def random_list(seed, n=7):
    rng = np.random.default_rng(seed)
    scores, labels = rng.normal(size=n), rng.choice([0.0, 0.3, 0.7, 1.0], n)
    return jnp.float32(scores), jnp.float32(labels), jnp.asarray(np.arange(n) < n - seed % 3)


LOSSES = {
    "ranknet": ranknet,
    "weighted": partial(ranknet, margin=0.3, power=1.5),
    "lambda": partial(ranknet, power=0.5, lambda_power=1.0),
    "softmax": softmax,
    "cross_entropy": cross_entropy,
}
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
KNOBS = [
    {},
    {"margin": 0.4},
    {"power": 1.5},
    {"lambda_power": 1.0},
    {"margin": 0.2, "power": 0.5, "lambda_power": 0.7},
]
each_knobs = pytest.mark.parametrize("knobs", KNOBS, ids="+".join)


def test_ranknet_is_the_mean_logistic_loss_of_its_three_pairs():
    # y: b > a > c, so the pairs are (b, a), (b, c), (a, c).
    expected = (softplus(2.0 - 0.5) + softplus(-1.0 - 0.5) + softplus(-1.0 - 2.0)) / 3
    assert float(ranknet(jnp.array(SCORES), jnp.array(LABELS), where=ALL)) == pytest.approx(expected)


@pytest.mark.parametrize(("margin", "power"), [(0.5, 0.0), (0.0, 1.0), (1.0, 2.0), (0.2, 0.5)])
def test_margin_and_power(margin, power):
    value = ranknet(jnp.array(SCORES), jnp.array(LABELS), where=ALL, margin=margin, power=power)
    assert float(value) == pytest.approx(by_hand(SCORES, LABELS, margin, power))
    assert float(value) != pytest.approx(by_hand(SCORES, LABELS), rel=1e-3)


def test_lambda_weighs_pairs_by_what_swapping_them_changes():
    # Ranked a, b, c with discounts 1, 1 / log2(3), 1 / 2; the pairs are (b, a), (b, c), (a, c).
    a, b, c = 1.0, 1 / math.log2(3), 0.5
    weights = [0.75 * (a - b), 1.0 * (b - c), 0.25 * (a - c)]
    terms = [softplus(2.0 - 0.5), softplus(-1.0 - 0.5), softplus(-1.0 - 2.0)]
    expected = sum(w * t for w, t in zip(weights, terms, strict=True)) / sum(weights)
    value = ranknet(jnp.array(SCORES), jnp.array(LABELS), where=ALL, lambda_power=1.0)
    assert float(value) == pytest.approx(expected)
    more = ranknet(jnp.array(SCORES), jnp.array(LABELS), where=ALL, lambda_power=2.0, power=1.0)
    weights = [w**2 * gap for w, gap in zip(weights, (0.75, 1.0, 0.25), strict=True)]
    expected = sum(w * t for w, t in zip(weights, terms, strict=True)) / sum(weights)
    assert float(more) == pytest.approx(expected)


@each_knobs
@pytest.mark.parametrize("n", [1, 2, 3, 6, 7, 61])
def test_ranknet_is_what_matrices_of_pairs_give(n, knobs):
    rng = np.random.default_rng(n)
    for masked in (False, True):
        where = rng.uniform(size=n) < 0.6 if masked else np.ones(n, bool)
        scores, labels = rng.normal(size=n) * 2, rng.integers(0, 5, n) / 4
        if not masked and n > 1:
            labels[:2] = 0.0, 1.0  # there is a pair
        expected, slope = naive(scores, labels, where, **knobs)
        assert (expected > 0) or masked or n == 1
        holes = jnp.where(jnp.asarray(where), jnp.float32(labels), jnp.nan)
        value, found = jax.value_and_grad(partial(ranknet, **knobs))(
            jnp.float32(scores), holes, where=jnp.asarray(where)
        )
        assert float(value) == pytest.approx(expected, rel=2e-6, abs=1e-7)
        np.testing.assert_allclose(found, slope, rtol=1e-5, atol=1e-7)


def test_its_gradient_is_that_of_its_value():
    scores, labels, where = random_list(3, 9)
    for knobs in KNOBS[:3]:  # ΔDCG jumps where two scores meet, and is held constant
        loss = jax.jit(partial(ranknet, **knobs))
        slope = jax.grad(loss)(scores, labels, where=where)
        for i in range(9):
            step = jnp.zeros(9).at[i].set(0.02)
            across = loss(scores + step, labels, where=where) - loss(scores - step, labels, where=where)
            assert float(across) / 0.04 == pytest.approx(float(slope[i]), abs=2e-5)


def test_knobs_and_lists_are_mapped_together_under_jit():
    """As lanes are: every knob traced, lists of a batch inside, a cotangent from outside."""
    lists = [jnp.stack(part) for part in zip(*(random_list(seed, 8) for seed in range(4)), strict=True)]
    knobs = {"margin": [0.0, 0.3, 0.5], "power": [0.0, 1.0, 2.0], "lambda_power": [1.0, 0.0, 0.5]}

    def one(scores, labels, where, knobs):
        return 3 * ranknet(scores, labels, where=where, **knobs)

    batch = jax.vmap(jax.value_and_grad(one), in_axes=(0, 0, 0, None))
    lanes = jax.jit(jax.vmap(batch, in_axes=(None, None, None, 0)))
    value, slope = lanes(*lists, {name: jnp.array(values) for name, values in knobs.items()})
    assert value.shape == (3, 4) and slope.shape == (3, 4, 8)
    for v in range(3):
        for q in range(4):
            mine = {name: values[v] for name, values in knobs.items()}
            expected, expected_slope = naive(*(part[q] for part in lists), **mine)
            assert float(value[v, q]) == pytest.approx(3 * expected, rel=5e-6)
            np.testing.assert_allclose(slope[v, q], 3 * expected_slope, rtol=1e-5, atol=1e-6)


def test_knobs_that_are_zero_are_those_that_are_none():
    scores, labels, where = random_list(2, 12)
    plain = ranknet(scores, labels, where=where)
    zero = ranknet(scores, labels, where=where, margin=0.0, power=0.0, lambda_power=0.0)
    assert float(plain) == pytest.approx(float(zero), rel=1e-6)


def test_softmax_by_hand():
    exps = [math.exp(s) for s in SCORES]
    logs = [math.log(e / sum(exps)) for e in exps]
    expected = -(0.25 * logs[0] + 1.0 * logs[1]) / 1.25
    value, slope = jax.value_and_grad(softmax)(jnp.array(SCORES), jnp.array(LABELS), where=ALL)
    assert float(value) == pytest.approx(expected)
    share = [0.2, 0.8, 0.0]
    np.testing.assert_allclose(
        slope, [e / sum(exps) - s for e, s in zip(exps, share, strict=True)], rtol=1e-5
    )
    value = softmax(jnp.array(SCORES), jnp.array(LABELS), where=jnp.array([True, False, True]))
    assert float(value) == pytest.approx(-math.log(exps[0] / (exps[0] + exps[2])))
    # Labels that are all 0 say nothing, and a share is met by the logarithm of its label.
    value, slope = jax.value_and_grad(softmax)(jnp.array(SCORES), jnp.zeros(3), where=ALL)
    assert value == 0 and (slope == 0).all()
    met = jax.grad(softmax)(jnp.log(jnp.array([0.5, 0.25, 0.1])), jnp.array([0.5, 0.25, 0.1]), where=ALL)
    np.testing.assert_allclose(met, 0, atol=1e-7)


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
    for knobs in KNOBS:
        loss = partial(ranknet, **knobs)
        value, slope = jax.value_and_grad(loss)(jnp.array(SCORES), jnp.full(3, 0.4), where=ALL)
        assert value == 0
        np.testing.assert_array_equal(slope, 0)


@pytest.mark.parametrize("name", ["ranknet", "weighted", "cross_entropy"])
def test_a_long_list_weighs_no_more_than_a_short_one(name):
    loss = LOSSES[name]
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
    value, slope = jax.value_and_grad(loss)(scores, jnp.array(LABELS), where=jnp.array([True, True, False]))
    assert np.isfinite(value) and np.isfinite(slope[:2]).all()


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


@pytest.mark.parametrize("knobs", [{}, KNOBS[-1]], ids=["plain", "all"])
def test_no_matrix_of_pairs_is_ever_there(knobs):
    """64 lists of 1,000: one float for each pair would be 256 MB."""

    def mean(scores, labels, where):
        return jnp.mean(jax.vmap(lambda s, y, w: ranknet(s, y, where=w, **knobs))(scores, labels, where))

    lists = [jax.ShapeDtypeStruct((64, 1000), kind) for kind in (jnp.float32, jnp.float32, bool)]
    compiled = jax.jit(jax.grad(mean)).lower(*lists).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 50e6
