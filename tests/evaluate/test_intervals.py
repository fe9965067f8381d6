"""Tests of the intervals: scipy and statsmodels on the same resamples, and what is not defined."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from cotrr.evaluate import bootstrap, intervals

few = settings(max_examples=100, deadline=None, derandomize=True, database=None)
B = 500


def resampled(values, statistic, seed=0):
    """[B] a statistic of values repeated as often as they are drawn."""
    counts = bootstrap.counts(np, seed, np.arange(B), len(values))
    return np.array([statistic(np.repeat(values, row)) for row in counts])


def jackknife(values, statistic):
    """[U] the statistic without each value, minus the statistic."""
    return np.array([statistic(np.delete(values, i)) for i in range(len(values))]) - statistic(values)


def scipy_interval(values, statistic, drawn, method, level):
    """What scipy makes of the same resampled values."""
    found = stats.bootstrap(
        (values,), statistic, n_resamples=0, method=method, confidence_level=level, vectorized=False,
        bootstrap_result=SimpleNamespace(bootstrap_distribution=drawn),
    )  # fmt: skip
    return np.array(found.confidence_interval)


ratio = lambda values: np.mean(values) / np.sqrt(1 + np.var(values))
STATISTICS = {"mean": np.mean, "deviation": np.std, "ratio": ratio}


@pytest.mark.parametrize("level", [0.95, 0.8])
@pytest.mark.parametrize("name", STATISTICS)
@pytest.mark.parametrize("size", [11, 60])
class TestScipy:
    @pytest.fixture
    def case(self, name, size):
        values = np.random.default_rng(size).beta(5, 0.7, size)
        values[:3] = values[3]  # some resamples equal each other
        return values, STATISTICS[name], resampled(values, STATISTICS[name])

    def test_percentile_and_basic(self, case, level):
        values, statistic, drawn = case
        ordered, point = intervals.ascending(drawn[None]), np.array([statistic(values)])
        found = intervals.percentile(ordered, level)[:, 0], intervals.basic(ordered, point, level)[:, 0]
        for ends, method in zip(found, ("percentile", "basic"), strict=True):
            expected = scipy_interval(values, statistic, drawn, method, level)
            np.testing.assert_allclose(ends, expected, rtol=1e-10)

    def test_bca(self, case, level):
        values, statistic, drawn = case
        apart = jackknife(values, statistic)[None]
        speed = intervals.acceleration(apart, np.ones_like(apart, bool))
        found = intervals.bca(intervals.ascending(drawn[None]), np.array([statistic(values)]), speed, level)
        expected = scipy_interval(values, statistic, drawn, "BCa", level)
        np.testing.assert_allclose(found[:, 0], expected, rtol=1e-8)
        assert abs(speed[0]) > 0.005  # the values are skewed enough to tell


def test_bca_counts_values_equal_to_the_estimate_half():
    values = np.array([0.0] * 6 + [1.0] * 4)
    drawn = resampled(values, np.mean)
    assert (drawn == 0.4).mean() > 0.2
    noise = drawn + np.random.default_rng(0).normal(size=B) * 1e-13  # sums in another order
    apart = jackknife(values, np.mean)[None]
    speed = intervals.acceleration(apart, np.ones_like(apart, bool))
    expected = scipy_interval(values, np.mean, drawn, "BCa", 0.95)
    for given_values in (drawn, noise):
        found = intervals.bca(intervals.ascending(given_values[None]), np.array([0.4]), speed)
        np.testing.assert_allclose(found[:, 0], expected, atol=1e-9)


def test_acceleration_leaves_absent_units_out():
    values = np.random.default_rng(1).exponential(size=8)
    apart = jackknife(values, np.mean)
    alone = intervals.acceleration(apart[None], np.ones((1, 8), bool))
    padded = np.r_[apart[:3], 99.0, apart[3:], np.nan][None]
    there = np.ones((1, 10), bool)
    there[0, [3, 9]] = False
    np.testing.assert_allclose(intervals.acceleration(padded, there), alone)
    assert intervals.acceleration(np.zeros((1, 5)), np.ones((1, 5), bool)) == 0
    assert intervals.acceleration(np.full((1, 5), np.nan), np.zeros((1, 5), bool)) == 0


@pytest.mark.parametrize("level", [0.95, 0.8])
def test_studentised_by_a_loop(level):
    values = np.random.default_rng(2).exponential(size=25)
    error = lambda sample: np.std(sample, ddof=1) / np.sqrt(len(sample))
    pivots = resampled(values, lambda sample: (sample.mean() - values.mean()) / error(sample))
    tail = (1 - level) / 2
    low, high = np.quantile(pivots, [tail, 1 - tail])
    found = intervals.studentised(
        intervals.ascending(pivots[None]), np.array([values.mean()]), np.array([error(values)]), level
    )
    expected = values.mean() - error(values) * high, values.mean() - error(values) * low
    np.testing.assert_allclose(found[:, 0], expected)
    # The long tail is on the right, so the interval reaches further there.
    assert found[1, 0] - values.mean() > values.mean() - found[0, 0]


def test_centred_takes_off_what_resampling_adds():
    drawn = np.array([[3.0, 4, 5, 6, 7]])
    found = intervals.centred(intervals.ascending(drawn), np.array([4.0]), level=0.5)
    np.testing.assert_allclose(found[:, 0], [3, 5])  # quartiles 4 and 6, resampled mean 1 too high
    gaps = np.array([[3.0, np.nan, 4, 5, 6, 7, np.nan]])
    np.testing.assert_allclose(intervals.centred(intervals.ascending(gaps), np.array([4.0]), 0.5), found)


class TestQuantile:
    @few
    @given(st.lists(st.floats(-10, 10) | st.just(np.nan), min_size=1, max_size=9), st.floats(0, 1))
    def test_equals_that_of_numpy_without_nan(self, values, level):
        found = intervals.quantile(intervals.ascending(np.array([values])), level)[0]
        defined = [v for v in values if v == v]
        if defined:
            assert found == pytest.approx(np.quantile(defined, level), abs=1e-12)
        else:
            assert np.isnan(found)

    def test_each_row_has_its_own_level(self):
        drawn = intervals.ascending(np.arange(15.0).reshape(3, 5))
        assert intervals.quantile(drawn, np.array([0, 0.5, 1])).tolist() == [0, 7, 14]
        found = intervals.quantile(drawn, np.array([0.25, np.nan, 0.875]))
        np.testing.assert_array_equal(found, [1, np.nan, 13.5])

    def test_infinite_values_are_ends_like_others(self):
        of = lambda values, level: intervals.quantile(intervals.ascending(np.array([values])), level)[0]
        assert of([-np.inf, 1, 2, 3, np.inf], 0.5) == 2
        assert of([-np.inf, 1, 2, 3, np.inf], 0.25) == 1
        assert of([-np.inf, 1, 2, 3, np.inf], 0) == -np.inf
        assert of([-np.inf, 1, 2, 3, np.inf], 1) == np.inf
        assert of([1, 2, np.inf], 0.75) == np.inf
        assert not np.isfinite(of([-np.inf, 1, 2], 0.25))
        assert of([np.inf] * 3, 1) == np.inf
        assert not np.isfinite(of([-np.inf] * 4 + [0], 0.1))


class TestUndefined:
    nothing = np.full((2, 9), np.nan)

    def test_stays_undefined(self):
        drawn, point, error = intervals.ascending(self.nothing), np.ones(2), np.ones(2)
        for ends in (
            intervals.percentile(drawn),
            intervals.basic(drawn, point),
            intervals.bca(drawn, point, np.zeros(2)),
            intervals.studentised(drawn, point, error),
            intervals.centred(drawn, point),
        ):
            assert ends.shape == (2, 2)
            assert np.isnan(ends).all()

    def test_undefined_resamples_change_no_interval(self):
        drawn = np.random.default_rng(0).normal(size=(1, 40))
        point, speed = np.array([0.1]), np.array([0.02])
        mixed = np.insert(drawn, [0, 7, 7, 40], np.nan, axis=1)
        whole, gaps = intervals.ascending(drawn), intervals.ascending(mixed)
        assert gaps.defined.tolist() == [40]
        for interval in (intervals.percentile, lambda d: intervals.bca(d, point, speed),
                         lambda d: intervals.studentised(d, point, point)):  # fmt: skip
            np.testing.assert_array_equal(interval(gaps), interval(whole))

    def test_estimate_beyond_all_resamples_has_no_bca(self):
        drawn = intervals.ascending(np.arange(20.0)[None])
        for point in (-1.0, 20.0):
            assert np.isnan(intervals.bca(drawn, np.array([point]), np.zeros(1))).all()


class TestShares:
    trials = np.array([10, 10, 10, 50, 50, 997])
    successes = np.array([0, 3, 10, 1, 49, 500])

    @pytest.mark.parametrize("level", [0.95, 0.8])
    def test_wilson_equals_that_of_statsmodels(self, level):
        found = intervals.wilson(self.successes, self.trials, level)
        expected = proportion_confint(self.successes, self.trials, 1 - level, "wilson")
        np.testing.assert_allclose(found, expected, atol=1e-12)
        assert found.min() >= 0 and found.max() <= 1

    @pytest.mark.parametrize("level", [0.95, 0.8])
    def test_jeffreys_equals_that_of_statsmodels_but_at_the_ends(self, level):
        found = intervals.jeffreys(self.successes, self.trials, level)
        expected = np.array(proportion_confint(self.successes, self.trials, 1 - level, "jeffreys"))
        expected[0, 0], expected[1, 2] = 0, 1
        np.testing.assert_allclose(found, expected, atol=1e-12)

    @few
    @given(st.integers(1, 200).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
    def test_successes_and_failures_are_treated_alike(self, case):
        hits, trials = map(np.array, case)
        for interval in (intervals.wilson, intervals.jeffreys):
            low, high = interval(hits, trials)
            assert 0 <= low <= hits / trials + 1e-12 and hits / trials - 1e-12 <= high <= 1
            np.testing.assert_allclose([low, high], 1 - interval(trials - hits, trials)[::-1], atol=1e-12)

    def test_effective_trials_need_not_be_whole(self):
        ends = [intervals.wilson(0.3 * n, n) for n in (20.0, 20.5, 21.0)]
        widths = [high - low for low, high in ends]
        assert widths[0] > widths[1] > widths[2]

    @pytest.mark.parametrize(("interval", "least", "most"), [("wilson", 0.92, 0.97), ("jeffreys", 0.97, 1)])
    def test_exact_coverage_near_one(self, interval, least, most):
        """n = 50, p = .97: Wilson .94 and Jeffreys .985, where percentile intervals cover .78."""
        hits = np.arange(51)
        low, high = getattr(intervals, interval)(hits, np.full(51, 50))
        covered = stats.binom(50, 0.97).pmf(hits)[(low <= 0.97) & (high >= 0.97)].sum()
        assert least < covered < most
