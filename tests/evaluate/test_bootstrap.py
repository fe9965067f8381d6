"""Tests of the bootstrap: what it draws, what it computes from the draws, and how often it covers."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from cotrr.evaluate import bootstrap, calibration

Q = 12  # one shape for most tests


def echo():
    """A statistic that returns its counts; new each time, so that nothing compiled is reused."""
    return lambda counts, data: counts.astype(jnp.float32)


def replicates(statistic, data=None, queries=Q, resamples=50, seed=0):
    """[B, ...] the statistic in every replicate, as float64."""
    drawn = bootstrap._replicates(
        jax.random.key(seed), data, statistic=statistic, queries=queries, resamples=resamples
    )
    return np.asarray(drawn, np.float64)


def one_class(counts, data):
    """A statistic that is undefined where the first query is not drawn, or never is defined."""
    total = jnp.sum(counts * jnp.arange(Q)).astype(jnp.float32)
    return jnp.stack([jnp.where(counts[0] > 0, total, jnp.nan), jnp.where(counts[0] > 1, total, jnp.nan),
                      jnp.full((), jnp.nan), total])  # fmt: skip


@pytest.fixture(scope="module")
def drawn():
    """[4096, Q] counts of seed 0."""
    return replicates(echo(), resamples=4096).astype(int)


class TestCounts:
    def test_every_replicate_draws_as_many_queries_as_there_are(self, drawn):
        assert drawn.shape == (4096, Q)
        assert drawn.min() == 0
        assert (drawn.sum(axis=1) == Q).all()

    def test_moments_are_multinomial(self, drawn):
        covariance = np.cov(drawn.T)
        np.testing.assert_allclose(drawn.mean(axis=0), 1, atol=5 * math.sqrt(1 / 4096))
        np.testing.assert_allclose(np.diag(covariance), 1 - 1 / Q, atol=0.15)
        apart = covariance[~np.eye(Q, dtype=bool)]
        np.testing.assert_allclose(apart, -1 / Q, atol=0.08)
        assert apart.mean() == pytest.approx(-1 / Q, abs=0.01)

    @pytest.mark.parametrize("query", [0, 5, Q - 1])
    def test_one_query_is_drawn_binomially(self, drawn, query):
        observed = np.bincount(np.minimum(drawn[:, query], 4), minlength=5)
        law = stats.binom(Q, 1 / Q)
        expected = 4096 * np.array([*law.pmf(range(4)), law.sf(3)])
        assert stats.chisquare(observed, expected).pvalue > 1e-4

    def test_all_queries_are_drawn_alike(self, drawn):
        assert stats.chisquare(drawn.sum(axis=0)).pvalue > 1e-4

    def test_replicates_are_not_copies_of_each_other(self, drawn):
        assert len(np.unique(drawn, axis=0)) > 4000
        following = np.mean((drawn[1:] - 1) * (drawn[:-1] - 1))
        assert following == pytest.approx(0, abs=0.03)


class TestSeed:
    @pytest.mark.parametrize("chunk", [1, 7])
    def test_chunks_and_further_replicates_do_not_change_the_draws(self, monkeypatch, chunk, drawn):
        monkeypatch.setattr(bootstrap, "CHUNK", chunk)
        np.testing.assert_array_equal(replicates(echo()), drawn[:50])

    def test_one_by_one_draws_the_same(self, drawn):
        alone, key = jax.jit(bootstrap.resample_counts, static_argnums=2), jax.random.key(0)
        np.testing.assert_array_equal([alone(key, b, Q) for b in range(50)], drawn[:50])

    def test_seed_decides(self):
        one = echo()
        np.testing.assert_array_equal(replicates(one, seed=3), replicates(one, seed=3))
        assert (replicates(one, seed=3) != replicates(one, seed=4)).any()
        of = lambda seed: bootstrap.intervals(one, None, Q, seed=seed, resamples=50)
        np.testing.assert_array_equal(of(3), of(3))
        assert (of(3).high != of(4).high).any()


class TestIntervals:
    def test_percentiles_of_a_loop_over_repeated_rows(self, drawn):
        values = np.random.default_rng(0).random((Q, 3)).astype(np.float32)
        means = [np.repeat(values, counts, axis=0).mean(axis=0, dtype=float) for counts in drawn[:128]]
        options = {"seed": 0, "resamples": 128}
        for level, at in ((0.95, [2.5, 97.5]), (0.8, [10, 90])):
            found = bootstrap.intervals(bootstrap.weighted_means, values, Q, level=level, **options)
            np.testing.assert_allclose(found[:2], np.percentile(means, at, axis=0), rtol=1e-6)
            assert not found.undefined.any()
        default = bootstrap.intervals(bootstrap.weighted_means, values, Q, **options)
        np.testing.assert_allclose(default[:2], np.percentile(means, [2.5, 97.5], axis=0), rtol=1e-6)

    def test_undefined_replicates_are_counted_and_not_filled_in(self, drawn):
        found = bootstrap.intervals(one_class, None, Q, seed=0, resamples=128)
        total, first = drawn[:128] @ np.arange(Q), drawn[:128, 0]
        missing = [(first == 0).sum(), (first <= 1).sum(), 128, 0]
        assert found.undefined.tolist() == missing
        assert 0 < missing[0] <= 64 < missing[1]  # the seed shows both sides of one half
        for column, kept in ((0, total[first > 0]), (3, total)):
            expected = np.percentile(kept, [2.5, 97.5])
            np.testing.assert_allclose([found.low[column], found.high[column]], expected)
        assert np.isnan([found.low[1:3], found.high[1:3]]).all()

    def test_coverage_for_a_skewed_metric(self):
        """400 samples of 50 exponential values: the textbook figure is about .925."""
        values = np.random.default_rng(5).exponential(size=(50, 400)).astype(np.float32)
        found = bootstrap.intervals(bootstrap.weighted_means, values, 50, seed=1, resamples=512)
        covered = ((found.low <= 1) & (found.high >= 1)).mean()
        assert 0.89 < covered < 0.96
        missed_above, missed_below = (found.high < 1).mean(), (found.low > 1).mean()
        assert missed_above > missed_below  # the price of percentiles where the tail is on the right


class TestMeans:
    def test_queries_without_a_value_leave_their_column_alone(self):
        values = np.array([[1.0, np.nan], [2.0, 4.0], [6.0, np.nan]])
        found = lambda counts: bootstrap.weighted_means(jnp.array(counts), jnp.array(values)).tolist()
        assert found([1, 1, 1]) == pytest.approx([3.0, 4.0])
        assert found([0, 1, 2]) == pytest.approx([14 / 3, 4.0])
        assert found([1, 0, 2]) == pytest.approx([13 / 3, math.nan], nan_ok=True)
        assert found([0, 0, 0]) == pytest.approx([math.nan, math.nan], nan_ok=True)


def repeated(counts, query, *columns):
    """The columns with the rows of query q as often as counts[q] says."""
    often = counts[query]
    return [np.repeat(column, often) for column in columns]


class TestAuc:
    rng = np.random.default_rng(1)
    query, score = rng.integers(0, Q, 60), rng.integers(0, 9, 60) / 8  # many ties
    positive = rng.random(60) < 0.2 + 0.5 * score

    def test_scikit_learn(self, drawn):
        query, score, positive = self.query, self.score, self.positive
        items, compiled = bootstrap.sort_items(query, score, positive), jax.jit(bootstrap.weighted_auc)
        auc = lambda counts: float(compiled(jnp.asarray(counts, jnp.int32), items))
        vectors = [np.ones(Q, int), np.arange(Q), *drawn[:20]]
        for counts in vectors:
            weighted = roc_auc_score(positive, score, sample_weight=counts[query])
            assert auc(counts) == pytest.approx(weighted, abs=1e-6)
            labels, scores = repeated(counts, query, positive, score)
            assert auc(counts) == pytest.approx(roc_auc_score(labels, scores), abs=1e-6)

    def test_one_class_has_none(self):
        items = jax.tree.map(jnp.asarray, bootstrap.sort_items(self.query, self.score, self.query == 3))
        compiled = jax.jit(bootstrap.weighted_auc)
        found = lambda counts: float(compiled(jnp.asarray(counts, jnp.int32), items))
        assert math.isnan(found(np.zeros(Q)))
        assert math.isnan(found(np.where(np.arange(Q) == 3, 2, 0)))
        assert math.isnan(found(np.where(np.arange(Q) == 3, 0, 2)))
        assert not math.isnan(found(np.ones(Q, int)))

    def test_by_hand(self):
        def auc(score, positive):
            items = bootstrap.sort_items(np.zeros(4, int), np.array(score), np.array(positive, bool))
            return float(bootstrap.weighted_auc(jnp.array([3]), jax.tree.map(jnp.asarray, items)))

        assert auc([0.1, 0.2, 0.3, 0.4], [0, 0, 1, 1]) == 1
        assert auc([0.1, 0.2, 0.3, 0.4], [1, 1, 0, 0]) == 0
        assert auc([0.5, 0.5, 0.5, 0.5], [0, 1, 0, 1]) == 0.5
        assert auc([0.1, 0.5, 0.5, 0.9], [0, 0, 1, 0]) == pytest.approx(1.5 / 3)

    def test_float32_keeps_its_digits_over_a_million_candidates(self):
        rng = np.random.default_rng(2)
        query, score = rng.integers(0, 30_000, 1_000_000), rng.random(1_000_000).round(4)
        positive = rng.random(1_000_000) < 0.5 * score
        items = bootstrap.sort_items(query, score, positive)
        counts = rng.multinomial(30_000, np.full(30_000, 1 / 30_000))
        found = float(jax.jit(bootstrap.weighted_auc)(jnp.asarray(counts, jnp.int32), items))
        weight = counts[query]
        of = lambda chosen: np.bincount(
            (score[chosen] * 10_000).round().astype(int), weight[chosen], minlength=10_001
        )
        ups, downs = of(positive), of(~positive)
        wins = ups @ (np.cumsum(downs) - downs / 2)
        assert found == pytest.approx(wins / ups.sum() / downs.sum(), abs=3e-7)


class TestEce:
    def test_equals_the_ece_of_repeated_rows(self, drawn):
        rng = np.random.default_rng(3)
        query, p = rng.integers(0, Q, 80), rng.random(80)
        p[:3] = [1.0, 0.0, 0.2]
        outcome = (rng.random(80) < p**2).astype(float)
        bins = calibration.bin_sums(query, p, outcome, Q).astype(np.float32)
        compiled = jax.jit(bootstrap.weighted_ece)
        for counts in (np.ones(Q, int), np.arange(Q), *drawn[:10]):
            ps, ys = repeated(counts, query, p, outcome)
            gaps = 0.0
            for low, high in itertools.pairwise(np.arange(16) / 15):
                inside = (ps >= low) & ((ps < high) | (high == 1))
                if inside.any():
                    gaps += inside.mean() * abs(ps[inside].mean() - ys[inside].mean())
            assert float(compiled(jnp.asarray(counts), bins)) == pytest.approx(gaps, abs=1e-6)

    def test_no_rows_have_none(self):
        nothing = jnp.zeros((Q, 15, 3))
        assert math.isnan(float(bootstrap.weighted_ece(jnp.ones(Q, jnp.int32), nothing)))
        assert math.isnan(float(bootstrap.weighted_ece(jnp.zeros(Q, jnp.int32), nothing + 1)))
