"""The network: where it starts, what it depends on, what its gates keep out, and what is shrunk."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cotrr.ranker import encoding, features
from cotrr.ranker.model import Reranker, squared_norm
from tests.ranker.synthetic import NAMES, development, padded, randomised, without

LISTS = development(queries=6).lists
WORDS = encoding.vocabulary(LISTS)
STATISTICS = features.fit(LISTS, WORDS, features.Settings(4, 3))
WIDTH, QUERY = 2 * len(NAMES) + 4 + 4, 1 + 3 + len(WORDS.constraints)
featurize = jax.jit(jax.vmap(features.featurize, in_axes=(None, 0)))
widths = pytest.mark.parametrize("hidden", [0, 8])
GATES = features.make_gates(encoding.make_mask(encoding.GROUPS), 0.6, 0.1)


def inputs(lists=LISTS, statistics=STATISTICS):
    return featurize(statistics, encoding.encode(lists, WORDS))


@cache
def of_query(q):
    return jax.tree.map(lambda value: value[q], inputs())


@cache
def started(hidden):
    return Reranker(hidden=hidden).init(jax.random.key(0), of_query(0), GATES)


@widths
def test_it_starts_as_the_rule_of_step_4(hidden):
    params = started(hidden)
    for q in range(6):
        scores, there = Reranker(hidden=hidden).apply(params, of_query(q), GATES), LISTS.where[q]
        column = lambda name, q=q: LISTS.attributes[q, :, NAMES.index(name)]
        rule = 0.2 * column("clip_score") + 0.7 * column("compliance_score") - 0.3 * column("conflict_prob")
        np.testing.assert_array_equal(np.argsort(scores.rank[there]), np.argsort(rule[there]))
        p = np.clip(column("conflict_prob")[there], 0.01, 0.99)
        np.testing.assert_allclose(scores.conflict[there], np.log(p / (1 - p)), atol=1e-5)


@widths
def test_parameter_shapes(hidden):
    shapes = jax.tree.map(jnp.shape, started(hidden)["params"])
    expected = {
        "query_weights": (QUERY, WIDTH, 2),
        "query_offset": (QUERY, 2),
        "bias": (2,),
        "base_scale": (2,),
    }
    if hidden:
        expected |= {"query_hidden": (QUERY, 8), "candidate_hidden": (WIDTH, 8), "heads": (8, 2)}
    assert shapes == expected


@widths
def test_scores_are_the_bilinear_form_plus_the_hidden_layer_and_the_base(hidden):
    mask = encoding.make_mask(encoding.GROUPS, ["brightness", "clip_score"])
    gates, params, one = features.make_gates(mask, 0.6, 0.1, 0.7), randomised(started(hidden)), of_query(1)
    p, scaled = params["params"], np.tile(mask[:-1], 2) * np.asarray(one.attributes, np.float64)
    query = np.concatenate([one.wants, 0.1 * np.asarray(one.text)]).astype(float)
    candidate = np.hstack([scaled, 0.6 * np.asarray(one.image), 0.7 * np.asarray(one.match)])
    logits = np.einsum("q,nc,qch->nh", query, candidate, p["query_weights"])
    logits += query @ p["query_offset"] + p["bias"]
    if hidden:
        x = candidate @ p["candidate_hidden"] + query @ p["query_hidden"]
        logits += np.asarray(jax.nn.gelu(jnp.float32(x))) @ p["heads"]
    logits += p["base_scale"] * np.asarray(features.base_logits(one, gates))
    scores = Reranker(hidden=hidden).apply(params, one, gates)
    np.testing.assert_allclose(np.stack(scores, axis=1), logits, rtol=1e-4, atol=1e-4)


@widths
def test_permuting_candidates_permutes_scores(hidden):
    params, one = randomised(started(hidden)), of_query(0)
    order = np.random.default_rng(0).permutation(len(one.where))
    by_candidate = ("image", "match", "attributes", "rule", "conflict", "where")
    moved = one._replace(**{k: getattr(one, k)[order] for k in by_candidate})
    scores = Reranker(hidden=hidden).apply(params, one, GATES)
    again = Reranker(hidden=hidden).apply(params, moved, GATES)
    assert np.ptp(scores.rank) > 0.1
    for part, other in zip(scores, again, strict=True):
        np.testing.assert_allclose(part[order], other, rtol=1e-5, atol=1e-5)


@widths
@pytest.mark.parametrize("garbage", [np.nan, 1e6])
def test_padding_changes_no_score(hidden, garbage):
    apply = partial(Reranker(hidden=hidden).apply, randomised(started(hidden)))
    apply = jax.vmap(apply, in_axes=(0, None))
    alone, more = apply(inputs(), GATES), apply(inputs(padded(LISTS, 5, garbage)), GATES)
    for part, other in zip(alone, more, strict=True):
        assert np.isfinite(other).all()
        np.testing.assert_allclose(other[:, :8], part, rtol=1e-5, atol=1e-5)


MASKS = {
    **{group: (set(encoding.GROUPS) - {group}, ()) for group in encoding.GROUPS},
    "attribute": (encoding.GROUPS, ("saturation",)),
    "embeddings": (encoding.GROUPS, ("embeddings",)),
    "everything": ((), ()),
}


@widths
@pytest.mark.parametrize("name", MASKS)
def test_what_is_masked_moves_no_score_and_no_gradient(hidden, name):
    """Neither its value nor whether there is one."""
    mask, holed = encoding.make_mask(*MASKS[name]), LISTS.attributes.copy()
    holed[::2, 0] = np.nan  # so that there are indicators
    lists = LISTS._replace(attributes=holed)
    statistics = features.fit(lists, WORDS, features.Settings(4, 3))
    gates, params = features.make_gates(mask, 0.6, 0.1), randomised(started(hidden))

    @jax.jit
    def run(inputs, gates):
        apply = jax.vmap(Reranker(hidden=hidden).apply, in_axes=(None, 0, None))
        loss = lambda params: jnp.sum(jnp.sin(apply(params, inputs, gates).rank))
        return apply(params, inputs, gates), jax.grad(loss)(params)

    before, after = (inputs(each, statistics) for each in (lists, without(lists, ~mask)))
    for one, other in zip(*(jax.tree.leaves(run(each, gates)) for each in (before, after)), strict=True):
        np.testing.assert_array_equal(one, other)
    open_gates = features.make_gates(np.ones(len(mask)), 0.6, 0.1)
    seen = [run(each, open_gates)[0] for each in (before, after)]
    for one, other in zip(*seen, strict=True):
        assert np.abs(one - other).max() > 0.1
    if name == "everything":
        np.testing.assert_array_equal(before.where, LISTS.where)
        rank = np.asarray(run(before, gates)[0].rank)
        np.testing.assert_allclose(rank - rank[:, :1], 0, atol=1e-6)  # no candidate differs from another


def test_a_size_is_that_of_the_embeddings_themselves():
    """Gates scale as statistics with scaled axes do, so a finished model needs no sizes."""
    params, mask = randomised(started(8)), encoding.make_mask(encoding.GROUPS)
    scaled = STATISTICS._replace(
        image_axes=np.float32(0.6) * STATISTICS.image_axes, text_axes=np.float32(0.1) * STATISTICS.text_axes
    )
    apply = jax.vmap(partial(Reranker(hidden=8).apply, params), in_axes=(0, None))
    one = apply(inputs(), features.make_gates(mask, 0.6, 0.1))
    other = apply(inputs(statistics=scaled), features.make_gates(mask))
    for part, same in zip(one, other, strict=True):
        np.testing.assert_allclose(part, same, rtol=1e-4, atol=1e-4)
    assert np.abs(one.rank - apply(inputs(), features.make_gates(mask)).rank).max() > 0.1


@widths
def test_another_query_changes_every_candidate(hidden):
    params, one = randomised(started(hidden)), of_query(0)
    other = one._replace(wants=one.wants + 0.5)
    scores = [Reranker(hidden=hidden).apply(params, each, GATES) for each in (one, other)]
    for part, changed in zip(*scores, strict=True):
        assert (np.abs(part - changed)[np.asarray(one.where)] > 1e-3).all()


def test_dropout_only_where_there_is_something_to_drop():
    params, one, key = randomised(started(8)), of_query(0), jax.random.key(3)
    apply = jax.jit(lambda rate: Reranker(hidden=8).apply(params, one, GATES, rate, rngs={"dropout": key}))
    plain = Reranker(hidden=8).apply(params, one, GATES)
    np.testing.assert_array_equal(Reranker(hidden=8).apply(params, one, GATES, 0.0).rank, plain.rank)
    np.testing.assert_allclose(apply(0.0).rank, plain.rank, rtol=1e-5, atol=1e-5)
    assert np.abs(apply(0.5).rank - plain.rank).min() > 1e-4
    bare = randomised(started(0))
    dropped = Reranker().apply(bare, one, GATES, 0.5, rngs={"dropout": jax.random.key(3)})
    np.testing.assert_array_equal(dropped.rank, Reranker().apply(bare, one, GATES).rank)


def test_dropout_keeps_the_mean():
    params, one = randomised(started(8)), of_query(0)
    network = Reranker(hidden=8)
    draw = jax.jit(jax.vmap(lambda key: network.apply(params, one, GATES, 0.3, rngs={"dropout": key}).rank))
    mean = np.mean(draw(jax.random.split(jax.random.key(0), 20_000)), axis=0)
    np.testing.assert_allclose(mean, network.apply(params, one, GATES).rank, atol=0.3)


@widths
def test_squared_norm_leaves_out_the_base_and_the_constant_offset(hidden):
    params = randomised(started(hidden))
    p = params["params"]
    everything = sum(float(np.sum(value**2)) for value in jax.tree.leaves(params))
    free = float(np.sum(p["base_scale"] ** 2) + np.sum(p["bias"] ** 2))
    assert float(squared_norm(params)) == pytest.approx(everything - free, rel=1e-5)
    slope = jax.grad(squared_norm)(params)
    for path, value in jax.tree_util.tree_leaves_with_path(slope):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert np.any(value != 0) == (name not in ("params/base_scale", "params/bias")), name
