"""Tests of the ranking metrics: by hand, over all orders, against other tools and published numbers."""

import csv
import gzip
import importlib
import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numba
import numpy as np
import pytest
import pytrec_eval
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score

from cotrr.evaluate import metrics

N = 6  # one shape for most tests: every new one is compiled again
few = settings(max_examples=60, deadline=None, derandomize=True, database=None)
scores_with_ties = st.lists(st.sampled_from([-math.inf, -1.0, 0.0, 0.5, 2.0]), min_size=N, max_size=N)
grades = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=N, max_size=N)
masks = st.lists(st.booleans(), min_size=N, max_size=N)


def expected_over_orders(scores, values, discounts, where=None):
    """Σ value·discount averaged over every order that the scores allow."""
    inside = [i for i in range(len(scores)) if where is None or where[i]]
    orders = [
        order
        for order in itertools.permutations(inside)
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order))
    ]
    sums = [math.fsum(values[i] * d for i, d in zip(order, discounts, strict=False)) for order in orders]
    return math.fsum(sums) / len(sums)


def log2_gain(k, n=N, letor=False):
    """Discounts of ranks 1..n, cut at k."""
    return [
        0.0 if r > k else 1.0 if letor and r == 1 else 1 / math.log2(r if letor else r + 1)
        for r in range(1, n + 1)
    ]


@partial(jax.jit, static_argnames="k")
def measure(scores, values, where, k):
    """Every metric of one list, compiled once for each shape and k."""
    return {
        "ndcg": metrics.ndcg(scores, values, where=where, k=k),
        "letor": metrics.ndcg(scores, values, where=where, k=k, letor=True),
        "mean": metrics.mean_at(scores, values, where=where, k=k),
        "ties": metrics.depends_on_ties(scores, values, where=where, k=k),
    }


def of_list(scores, values, where=None, k=3, n=N):
    """`measure` of a list padded to n with values that must not matter."""
    short = n - len(scores)
    where = [True] * len(scores) if where is None else list(where)
    found = measure(
        jnp.array([*scores, *[9.0] * short], jnp.float32),
        jnp.array([*values, *[7.0] * short], jnp.float32),
        jnp.array(where + [False] * short, bool),
        k,
    )
    return {name: value.item() for name, value in found.items()}


class TestByHand:
    def test_ndcg(self):
        # Ranked: 0.2, 0.9, 0.5 | 0.4.  Ideal: 0.9, 0.5, 0.4.
        found = of_list([0.3, 0.9, 0.1, 0.5], [0.5, 0.2, 0.4, 0.9])
        reached = 0.2 + 0.9 / math.log2(3) + 0.5 / 2
        assert found["ndcg"] == pytest.approx(reached / (0.9 + 0.5 / math.log2(3) + 0.4 / 2), rel=1e-6)
        flat = 0.2 + 0.9 + 0.5 / math.log2(3)
        assert found["letor"] == pytest.approx(flat / (0.9 + 0.5 + 0.4 / math.log2(3)), rel=1e-6)

    def test_ideal_is_over_all_candidates_not_the_best_k_shown(self):
        assert of_list([4, 3, 2, 1], [0, 0, 0, 1])["ndcg"] == 0.0
        found = of_list([4, 3, 2, 1], [0.5, 0, 0, 1])["ndcg"]
        assert found == pytest.approx(0.5 / (1 + 0.5 / math.log2(3)), rel=1e-6)

    @pytest.mark.parametrize(("k", "expected"), [(1, 0.2), (3, (0.2 + 0.9 + 0.5) / 3), (5, 2.0 / 4)])
    def test_compliance(self, k, expected):
        found = of_list([0.3, 0.9, 0.1, 0.5], [0.5, 0.2, 0.4, 0.9], k=k)
        assert found["mean"] == pytest.approx(expected, rel=1e-6)

    def test_list_shorter_than_k_is_divided_by_its_length(self):
        found = of_list([1.0, 2.0], [0.4, 0.8], k=5)
        assert found["mean"] == pytest.approx(0.6, rel=1e-6)
        reached, ideal = 0.8 + 0.4 / math.log2(3), 0.8 + 0.4 / math.log2(3)
        assert found["ndcg"] == pytest.approx(reached / ideal, rel=1e-6)

    def test_conflict_rate_shares_a_tied_top(self):
        # Two of three candidates share the first place, one of them a conflict.
        assert of_list([2.0, 2.0, 1.0], [1, 0, 1], k=1)["mean"] == pytest.approx(0.5)
        # Three share it; two are conflicts.
        assert of_list([2.0, 2.0, 2.0], [1, 0, 1], k=1)["mean"] == pytest.approx(2 / 3)

    def test_tie_across_the_cut(self):
        # Rank 1 is clear; ranks 2..4 are tied and only 2 and 3 count.
        found = of_list([3.0, 1.0, 1.0, 1.0], [0.0, 0.9, 0.3, 0.0])
        assert found["mean"] == pytest.approx((0 + 2 * 0.4) / 3, rel=1e-6)
        reached = 0.4 * (1 / math.log2(3) + 1 / 2)
        assert found["ndcg"] == pytest.approx(reached / (0.9 + 0.3 / math.log2(3)), rel=1e-6)

    def test_discounts(self):
        np.testing.assert_allclose(metrics.log2_discounts(5, 3), log2_gain(3, 5), rtol=1e-6)
        np.testing.assert_allclose(metrics.log2_discounts(5), log2_gain(5, 5), rtol=1e-6)
        np.testing.assert_allclose(metrics.log2_discounts(5, letor=True), log2_gain(5, 5, True), rtol=1e-6)
        assert metrics.log2_discounts(4, letor=True)[:2].tolist() == [1.0, 1.0]


class TestUndefined:
    def test_no_gain_has_no_ndcg(self):
        found = of_list([3, 2, 1], [0, 0, 0])
        assert math.isnan(found["ndcg"])
        assert found["mean"] == 0.0

    def test_gain_outside_the_mask_is_no_gain(self):
        assert math.isnan(of_list([3, 2, 1], [0, 1, 0], where=[True, False, True])["ndcg"])

    def test_empty_list_has_no_metric(self):
        found = of_list([], [])
        assert all(math.isnan(found[name]) for name in ("ndcg", "letor", "mean"))
        assert not found["ties"]

    def test_nan_score_stays_visible(self):
        found = of_list([3, math.nan, 1], [0.5, 0.5, 0.5])
        assert all(math.isnan(found[name]) for name in ("ndcg", "letor", "mean"))

    def test_nan_outside_the_mask_does_not_matter(self):
        found = of_list([3, math.nan, 1], [0.5, math.nan, 0.25], where=[True, False, True], k=2)
        assert found["mean"] == pytest.approx(0.375)
        assert found["ndcg"] == pytest.approx(1.0)

    def test_nan_value_stays_visible(self):
        assert math.isnan(of_list([3, 2, 1], [0.5, math.nan, 0.5])["mean"])
        assert math.isnan(of_list([3, 2, 1], [0.5, math.nan, 0.5])["ndcg"])


class TestExtremeScores:
    def test_minus_infinity_is_the_last_place_and_not_padding(self):
        # Candidates of score -inf stand behind the others and before all padding.
        found = of_list([-math.inf, 1.0], [0.4, 0.8], k=2)
        assert found["mean"] == pytest.approx(0.6, rel=1e-6)
        assert found["ndcg"] == pytest.approx(1.0, rel=1e-6)
        assert of_list([-math.inf] * 3, [0.3, 0.6, 0.9], k=1)["mean"] == pytest.approx(0.6, rel=1e-6)

    def test_plus_infinity_is_the_first_place(self):
        assert of_list([1.0, math.inf, 2.0], [0.1, 0.8, 0.2], k=1)["mean"] == pytest.approx(0.8)

    def test_signed_zeros_are_tied(self):
        assert of_list([0.0, -0.0], [1.0, 0.0], k=1)["mean"] == pytest.approx(0.5)
        assert of_list([-0.0, 0.0], [1.0, 0.0], k=1)["mean"] == pytest.approx(0.5)


class TestAllOrders:
    @few
    @given(scores_with_ties, grades, masks, st.sampled_from([1, 3]))
    def test_expected_value(self, scores, values, where, k):
        found = of_list(scores, values, where, k)
        inside = [v for v, w in zip(values, where, strict=True) if w]
        if not inside:
            assert math.isnan(found["mean"])
            return
        mean = expected_over_orders(scores, values, [1.0] * k, where) / min(k, len(inside))
        assert found["mean"] == pytest.approx(mean, abs=1e-6)
        best = sorted(inside, reverse=True)
        for name, letor in (("ndcg", False), ("letor", True)):
            discounts = log2_gain(k, letor=letor)
            ideal = math.fsum(v * d for v, d in zip(best, discounts, strict=False))
            if ideal == 0:
                assert math.isnan(found[name])
            else:
                reached = expected_over_orders(scores, values, discounts, where)
                assert found[name] == pytest.approx(reached / ideal, abs=1e-6)

    @few
    @given(scores_with_ties, grades, masks, st.sampled_from([1, 3]))
    def test_ties_matter_where_orders_disagree(self, scores, values, where, k):
        inside = [i for i in range(N) if where[i]]
        tops = {
            tuple(values[i] for i in order[:k])
            for order in itertools.permutations(inside)
            if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order))
        }
        assert of_list(scores, values, where, k)["ties"] == (len(tops) > 1)


class TestInvariance:
    @few
    @given(scores_with_ties, grades, masks, st.permutations(range(N)), st.sampled_from([1, 3]))
    def test_order_of_candidates_does_not_matter(self, scores, values, where, order, k):
        pick = lambda part: [part[i] for i in order]
        here, there = of_list(scores, values, where, k), of_list(pick(scores), pick(values), pick(where), k)
        assert here == pytest.approx(there, abs=1e-6, nan_ok=True)

    @few
    @given(scores_with_ties, grades, masks)
    def test_more_padding_does_not_matter(self, scores, values, where):
        here, there = of_list(scores, values, where), of_list(scores, values, where, n=N + 5)
        assert here == pytest.approx(there, abs=1e-6, nan_ok=True)

    @few
    @given(scores_with_ties, grades)
    def test_increasing_maps_of_scores_do_not_matter(self, scores, values):
        mapped = [math.atan(s) * 10 + 3 for s in scores]
        here, there = of_list(scores, values), of_list(mapped, values)
        assert here == pytest.approx(there, abs=1e-6, nan_ok=True)

    @few
    @given(scores_with_ties, grades)
    def test_bounds(self, scores, values):
        found = of_list(scores, values)
        perfect = of_list(values, values)
        assert found["mean"] <= perfect["mean"] + 1e-6
        assert math.isnan(found["ndcg"]) or -1e-6 <= found["ndcg"] <= 1 + 1e-6
        best = sorted(values, reverse=True)[:3]
        assert perfect["mean"] == pytest.approx(math.fsum(best) / len(best), abs=1e-6)
        assert math.isnan(perfect["ndcg"]) or perfect["ndcg"] == pytest.approx(1, abs=1e-6)

    def test_jit_is_eager_and_vmap_is_a_loop(self):
        rng = np.random.default_rng(0)
        scores = jnp.asarray(rng.integers(0, 4, (3, N)), jnp.float32)
        values = jnp.asarray(rng.random((3, N)), jnp.float32)
        where = jnp.asarray(rng.random((3, N)) < 0.7)
        eager = measure.__wrapped__
        looped = [eager(*row, k=3) for row in zip(scores, values, where, strict=True)]
        batched = jax.jit(jax.vmap(partial(eager, k=3)))(scores, values, where)
        for name, column in batched.items():
            alone = [measure(*row, 3)[name] for row in zip(scores, values, where, strict=True)]
            np.testing.assert_allclose(column, [row[name] for row in looped], rtol=1e-6, err_msg=name)
            np.testing.assert_allclose(column, alone, rtol=1e-6, err_msg=name)


@pytest.fixture
def ranx(monkeypatch):
    """ranx without numba's compiler, which would take 20 seconds for these lists."""
    monkeypatch.setattr(numba.config, "DISABLE_JIT", True)
    return importlib.import_module("ranx")


class TestOtherTools:
    def test_scikit_learn_with_ties(self):
        rng = np.random.default_rng(1)
        for _ in range(30):
            scores, gains = rng.integers(0, 3, N).astype(float), rng.integers(0, 4, N).astype(float)
            gains[0] = 1.0
            expected = ndcg_score([gains], [scores], k=3, ignore_ties=False)
            assert of_list(scores, gains)["ndcg"] == pytest.approx(expected, abs=1e-6)

    def test_pytrec_eval(self):
        rng = np.random.default_rng(2)
        scores, gains = rng.permuted(np.arange(20 * N)).reshape(20, N) / 7, rng.integers(0, 4, (20, N))
        gains[:, 0] = np.maximum(gains[:, 0], 1)
        named = lambda rows, kind: {
            f"q{q}": {f"d{i}": kind(v) for i, v in enumerate(row)} for q, row in enumerate(rows)
        }
        judge = pytrec_eval.RelevanceEvaluator(named(gains, int), {"ndcg_cut.3"})
        for name, expected in judge.evaluate(named(scores, float)).items():
            q = int(name[1:])
            assert of_list(scores[q], gains[q])["ndcg"] == pytest.approx(expected["ndcg_cut_3"], abs=1e-6)

    @pytest.mark.parametrize(("metric", "gain"), [("ndcg_burges", lambda g: 2.0**g - 1), ("ndcg", float)])
    def test_ranx(self, ranx, metric, gain):
        rng = np.random.default_rng(3)
        scores, grade = rng.permuted(np.arange(20 * N)).reshape(20, N) / 7, rng.integers(0, 4, (20, N))
        grade[:, 0] = np.maximum(grade[:, 0], 1)
        named = lambda rows, kind: {
            f"q{q}": {f"d{i}": kind(v) for i, v in enumerate(row)} for q, row in enumerate(rows)
        }
        judge = ranx.Qrels(named(grade, int)), ranx.Run(named(scores, float))
        ranx.evaluate(*judge, f"{metric}@3")
        for name, expected in judge[1].scores[f"{metric}@3"].items():
            q = int(name[1:])
            found = of_list(scores[q], [gain(g) for g in grade[q]])["ndcg"]
            assert found == pytest.approx(expected, abs=1e-6)


def read_svmlight(folder):
    """Grades and features of each query of OHSUMED, in file order."""
    queries = {}
    for part in range(1, 6):
        with gzip.open(folder / f"S{part}.txt.gz", "rt") as file:
            for line in file:
                grade, query, *features = line.split("#")[0].split()
                row = [float(feature.split(":")[1]) for feature in features]
                queries.setdefault(query, []).append([float(grade), *row])
    return [np.array(rows) for rows in queries.values()]


def test_published_sheet_of_ohsumed(shared):
    """All 250 nDCG and 250 precision numbers that LETOR published for single features."""
    folder = shared("ltr/ohsumed")
    queries = read_svmlight(folder)
    longest = max(map(len, queries))
    assert (len(queries), sum(map(len, queries))) == (106, 16140)
    scores = np.zeros((len(queries), 25, longest), np.float32)
    grade, where = np.zeros((len(queries), longest), np.float32), np.zeros((len(queries), longest), bool)
    for q, rows in enumerate(queries):
        n = len(rows)
        where[q, :n], grade[q, :n] = True, rows[:, 0]
        best_first = np.argsort(-rows[:, 1:], axis=0, kind="stable")  # ties stay in file order
        np.put_along_axis(scores[q, :, :n], best_first.T, -np.arange(n, dtype=np.float32)[None], axis=1)

    def all_cuts(scores, grade, where):
        cuts = range(1, 11)
        gains = 2**grade - 1
        relevant = (grade > 0).astype(jnp.float32)
        ndcg = [metrics.ndcg(scores, gains, where=where, k=k, letor=True) for k in cuts]
        precision = [metrics.mean_at(scores, relevant, where=where, k=k) for k in cuts]
        return jnp.stack([jnp.stack(ndcg), jnp.stack(precision)])

    by_feature = jax.vmap(all_cuts, in_axes=(0, None, None))
    found = np.asarray(jax.jit(jax.vmap(by_feature))(scores, grade, where), np.float64)
    assert np.array_equal(np.isnan(found[:, 0, 0, 0]), (grade == 0).all(axis=1))
    found = np.nan_to_num(found).mean(axis=0)  # a query without a relevant document counts 0
    with open(folder / "single_features.csv") as file:
        published = [[float(x) for x in list(row.values())[1:21]] for row in csv.DictReader(file)]
    np.testing.assert_allclose(found.reshape(25, 20), published, rtol=0, atol=1e-5)
