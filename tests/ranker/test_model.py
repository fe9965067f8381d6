"""The network: where it starts, what it depends on, and what is shrunk."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cotrr.ranker import features
from cotrr.ranker.model import Reranker, squared_norm
from tests.ranker.synthetic import NAMES, development, padded, randomised

LISTS = development(queries=6).lists
WORDS = features.vocabulary(LISTS)
STATISTICS = features.fit(LISTS, WORDS, features.Settings(4, 3, 0.6, 0.1))
WIDTH, QUERY = 2 * len(NAMES) + 4, 1 + 3 + len(WORDS.constraints)
featurize = jax.jit(jax.vmap(features.featurize, in_axes=(None, 0, None)))
widths = pytest.mark.parametrize("hidden", [0, 8])


def inputs(lists=LISTS):
    mask = features.group_mask(("clip", "so", "conflict"))
    return featurize(STATISTICS, features.encode(lists, WORDS), mask)


@cache
def of_query(q):
    return jax.tree.map(lambda value: value[q], inputs())


@cache
def started(hidden):
    return Reranker(hidden=hidden).init(jax.random.key(0), of_query(0))


@widths
def test_it_starts_as_the_rule_of_step_4(hidden):
    params = started(hidden)
    for q in range(6):
        scores, there = Reranker(hidden=hidden).apply(params, of_query(q)), LISTS.where[q]
        column = lambda name, q=q: LISTS.attributes[q, :, NAMES.index(name)]
        rule = 0.2 * column("clip_score") + 0.7 * column("compliance_score") - 0.3 * column("conflict_prob")
        np.testing.assert_array_equal(np.argsort(scores.rank[there]), np.argsort(rule[there]))
        p = np.clip(column("conflict_prob")[there], 0.01, 0.99)
        np.testing.assert_allclose(scores.conflict[there], np.log(p / (1 - p)), atol=1e-5)


@widths
def test_parameter_shapes(hidden):
    shapes = jax.tree.map(jnp.shape, started(hidden)["params"])
    expected = {
        "query_weights": {"kernel": (QUERY, 2 * WIDTH)},
        "query_offset": {"kernel": (QUERY, 2), "bias": (2,)},
        "base_scale": (2,),
    }
    if hidden:
        expected |= {
            "query_hidden": {"kernel": (QUERY, 8)},
            "candidate_hidden": {"kernel": (WIDTH, 8), "bias": (8,)},
            "heads": {"kernel": (8, 2)},
        }
    assert shapes == expected


def test_scores_are_the_bilinear_form_plus_the_base():
    params, one = randomised(started(0)), of_query(1)
    p = params["params"]
    query, candidate = np.asarray(one.query), np.hstack([one.attributes, one.image])
    weights = query @ p["query_weights"]["kernel"]
    offset = query @ p["query_offset"]["kernel"] + p["query_offset"]["bias"]
    expected = candidate @ weights.reshape(WIDTH, 2) + offset + p["base_scale"] * np.asarray(one.base)
    scores = Reranker().apply(params, one)
    np.testing.assert_allclose(np.stack(scores, axis=1), expected, rtol=1e-4, atol=1e-4)


@widths
def test_permuting_candidates_permutes_scores(hidden):
    params, one = randomised(started(hidden)), of_query(0)
    order = np.random.default_rng(0).permutation(len(one.where))
    moved = one._replace(**{k: getattr(one, k)[order] for k in ("image", "attributes", "base", "where")})
    scores = Reranker(hidden=hidden).apply(params, one)
    again = Reranker(hidden=hidden).apply(params, moved)
    assert np.ptp(scores.rank) > 0.1
    for part, other in zip(scores, again, strict=True):
        np.testing.assert_allclose(part[order], other, rtol=1e-5, atol=1e-5)


@widths
@pytest.mark.parametrize("garbage", [np.nan, 1e6])
def test_padding_changes_no_score(hidden, garbage):
    params = randomised(started(hidden))
    apply = jax.vmap(partial(Reranker(hidden=hidden).apply, params))
    alone, more = apply(inputs()), apply(inputs(padded(LISTS, 5, garbage)))
    for part, other in zip(alone, more, strict=True):
        assert np.isfinite(other).all()
        np.testing.assert_allclose(other[:, :8], part, rtol=1e-5, atol=1e-5)


@widths
def test_another_query_changes_every_candidate(hidden):
    params, one = randomised(started(hidden)), of_query(0)
    other = one._replace(query=one.query + 0.5)
    scores = [Reranker(hidden=hidden).apply(params, each) for each in (one, other)]
    for part, changed in zip(*scores, strict=True):
        assert (np.abs(part - changed)[np.asarray(one.where)] > 1e-3).all()


def test_dropout_only_where_there_is_something_to_drop():
    params, one, key = randomised(started(8)), of_query(0), jax.random.key(3)
    apply = jax.jit(lambda rate: Reranker(hidden=8).apply(params, one, rate, rngs={"dropout": key}))
    plain = Reranker(hidden=8).apply(params, one)
    np.testing.assert_array_equal(Reranker(hidden=8).apply(params, one, 0.0).rank, plain.rank)
    np.testing.assert_allclose(apply(0.0).rank, plain.rank, rtol=1e-5, atol=1e-5)
    assert np.abs(apply(0.5).rank - plain.rank).min() > 1e-4
    bare = randomised(started(0))
    dropped = Reranker().apply(bare, one, 0.5, rngs={"dropout": jax.random.key(3)})
    np.testing.assert_array_equal(dropped.rank, Reranker().apply(bare, one).rank)


def test_dropout_keeps_the_mean():
    params, one = randomised(started(8)), of_query(0)
    network = Reranker(hidden=8)
    draw = jax.jit(jax.vmap(lambda key: network.apply(params, one, 0.3, rngs={"dropout": key}).rank))
    mean = np.mean(draw(jax.random.split(jax.random.key(0), 20_000)), axis=0)
    np.testing.assert_allclose(mean, network.apply(params, one).rank, atol=0.15)


@widths
def test_squared_norm_leaves_out_the_base_and_the_constant_offset(hidden):
    params = randomised(started(hidden))
    p = params["params"]
    everything = sum(float(np.sum(value**2)) for value in jax.tree.leaves(params))
    free = float(np.sum(p["base_scale"] ** 2) + np.sum(p["query_offset"]["bias"] ** 2))
    assert float(squared_norm(params)) == pytest.approx(everything - free, rel=1e-5)
    slope = jax.grad(squared_norm)(params)["params"]
    for path, value in jax.tree_util.tree_leaves_with_path(slope):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert np.any(value != 0) == (name not in ("base_scale", "query_offset/bias")), name
