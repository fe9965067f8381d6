"""Tests of the tests: exact enumeration, scipy and statsmodels, and how often they cry wolf."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar as mcnemar_oracle
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import NormalIndPower

from cotrr.evaluate import comparisons
from cotrr.evaluate.bootstrap import Draw

few = settings(max_examples=100, deadline=None, derandomize=True, database=None)
B = 20_000


def exact(differences, slack=1e-7):
    """p-values over all 2^U changes of sign, single and by max-T; sums are equal up to `slack`."""
    signs = np.array(list(itertools.product([-1, 1], repeat=len(differences))))
    scale = np.sqrt((differences**2).sum(axis=0))
    drawn = np.abs(signs @ differences) / np.where(scale > 0, scale, 1)
    reached = drawn[-1] - slack
    return (drawn >= reached).mean(axis=0), (drawn.max(axis=1)[:, None] >= reached).mean(axis=0)


def within_chance(found, expected, resamples=B):
    """Whether a simulated p-value is as near to the exact one as 5 standard errors."""
    return np.abs(found - expected) <= 5 * np.sqrt(expected * (1 - expected) / resamples) + 2 / resamples


class TestSignFlip:
    @pytest.mark.parametrize("units", [5, 9])
    def test_all_changes_of_sign(self, units):
        differences = np.random.default_rng(units).normal(0.3, 1, (units, 4)) * [1, 100, 1e-3, 1]
        for found, expected in zip(
            comparisons.sign_flip(Draw(1, B, units), differences), exact(differences), strict=True
        ):
            assert within_chance(found, expected).all()

    @pytest.mark.parametrize("seed", range(4))
    @pytest.mark.parametrize("kind", [np.float64, np.float32])
    def test_equal_sums_are_equal(self, seed, kind):
        """Labels come in tenths, so many changes of sign give the very sum seen, up to rounding."""
        a, b = np.random.default_rng(seed).integers(0, 11, (2, 11, 3)) / 10
        expected, more = exact(a - b), exact(a - b, slack=-1e-7)
        assert (expected[0] > more[0] + 0.01).any()  # equality decides
        differences = a.astype(kind).astype(float) - b.astype(kind).astype(float)
        for found, wanted in zip(comparisons.sign_flip(Draw(1, B, 11), differences), expected, strict=True):
            assert within_chance(found, wanted).all(), (found, wanted)

    def test_scipy(self):
        rng = np.random.default_rng(3)
        a, b = rng.beta(4, 1, (2, 10))
        oracle = stats.permutation_test(
            (a, b),
            lambda x, y, axis: np.mean(x - y, axis=axis),
            permutation_type="samples",
            vectorized=True,
            n_resamples=np.inf,
        )
        single, joint = comparisons.sign_flip(Draw(1, B, 10), (a - b)[:, None])
        assert within_chance(single, oracle.pvalue).all()
        assert joint == single

    def test_backends_agree(self):
        differences = np.random.default_rng(4).normal(0.1, 1, (60, 5))
        found = [comparisons.sign_flip(Draw(1, 400, 60, b), differences) for b in ("numpy", "jax")]
        np.testing.assert_array_equal(*found)

    def test_is_never_zero(self):
        single, joint = comparisons.sign_flip(Draw(0, 999, 80), np.ones((80, 2)))
        assert single.tolist() == joint.tolist() == [1 / 1000] * 2

    def test_equal_systems_have_p_of_one(self):
        single, joint = comparisons.sign_flip(Draw(0, 99, 20), np.zeros((20, 3)))
        assert single.tolist() == joint.tolist() == [1, 1, 1]
        nothing = np.tile([[0.0, np.nan, 1.0]], (20, 1))
        single, joint = comparisons.sign_flip(Draw(0, 99, 20), nothing)
        assert single[:2].tolist() == joint[:2].tolist() == [1, 1]
        assert single[2] == joint[2] == 0.01

    def test_balanced_differences_have_p_of_one(self):
        single, _ = comparisons.sign_flip(Draw(0, 99, 20), np.tile([0.1, -0.1], 10)[:, None])
        assert single == 1

    def test_undefined_differences_are_none(self):
        differences = np.random.default_rng(5).normal(size=(30, 2))
        differences[::4] = 0
        gaps = np.where(differences == 0, np.nan, differences)
        draw = Draw(0, 500, 30)
        np.testing.assert_array_equal(
            comparisons.sign_flip(draw, gaps), comparisons.sign_flip(draw, differences)
        )

    def test_direction_and_scale_do_not_matter(self):
        differences, draw = np.random.default_rng(6).normal(0.2, 1, (30, 3)), Draw(0, 500, 30)
        expected = comparisons.sign_flip(draw, differences)
        np.testing.assert_array_equal(comparisons.sign_flip(draw, -differences), expected)
        np.testing.assert_array_equal(comparisons.sign_flip(draw, differences * [1, 1024, 2**-9]), expected)


class TestMaxT:
    @pytest.mark.parametrize("seed", range(5))
    def test_is_never_below_the_single_test_and_grows_with_the_family(self, seed):
        differences = np.random.default_rng(seed).normal(0.2, 1, (40, 6))
        draw = Draw(seed, 999, 40)
        single, joint = comparisons.sign_flip(draw, differences)
        assert (joint >= single).all()
        assert (joint > single).any()
        smaller = comparisons.sign_flip(draw, differences[:, :3])[1]
        assert (joint[:3] >= smaller).all()

    def test_copies_cost_nothing_and_holm_does_not_know(self):
        one = np.random.default_rng(7).normal(0.4, 1, (40, 1))
        draw = Draw(0, 999, 40)
        single, joint = comparisons.sign_flip(draw, np.hstack([one, one, -one, np.zeros((40, 1))]))
        assert joint[:3].tolist() == single[:3].tolist() == [single[0]] * 3
        assert comparisons.holm(single)[0] > joint[0]

    def test_order_of_p_is_that_of_the_scaled_differences(self):
        differences = np.random.default_rng(8).normal(0.3, 1, (40, 8)) * 10.0 ** np.arange(8)
        scaled = np.abs(differences.sum(axis=0)) / np.sqrt((differences**2).sum(axis=0))
        joint = comparisons.sign_flip(Draw(0, 999, 40), differences)[1]
        assert (np.diff(joint[np.argsort(-scaled)]) >= 0).all()


class TestHolm:
    @pytest.mark.parametrize("size", [1, 2, 5, 24])
    def test_statsmodels(self, size):
        rng = np.random.default_rng(size)
        for p in (rng.random(size), rng.beta(0.3, 3, size), rng.integers(0, 4, size) / 100):
            found = comparisons.holm(p)
            np.testing.assert_allclose(found, multipletests(p, method="holm")[1], rtol=1e-12)

    def test_by_hand(self):
        found = comparisons.holm(np.array([0.01, 0.04, 0.03, 0.005]))
        np.testing.assert_allclose(found, [0.03, 0.06, 0.06, 0.02])
        assert comparisons.holm(np.array([0.2])).tolist() == [0.2]
        assert comparisons.holm(np.array([0.6, 0.6])).tolist() == [1, 1]


class TestMcnemar:
    @few
    @given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 5))
    def test_statsmodels(self, better, worse, equal):
        differences = np.r_[np.ones(better), -np.ones(worse), np.zeros(equal)]
        found = comparisons.mcnemar(differences)
        oracle = mcnemar_oracle([[equal, better], [worse, 0]], exact=True)
        assert (found["better"], found["worse"]) == (better, worse)
        assert found["p"] == pytest.approx(min(oracle.pvalue, 1), abs=1e-12)

    def test_without_a_difference_p_is_one(self):
        assert comparisons.mcnemar(np.zeros(4)) == {"better": 0, "worse": 0, "p": 1.0}
        assert comparisons.mcnemar(np.array([np.nan, 1.0, -1.0])) == {"better": 1, "worse": 1, "p": 1.0}


class TestDetectable:
    @pytest.mark.parametrize(("level", "power"), [(0.95, 0.8), (0.9, 0.9), (0.99, 0.7)])
    def test_statsmodels(self, level, power):
        size = NormalIndPower(ddof=0).solve_power(nobs1=100, alpha=1 - level, power=power, ratio=0)
        assert comparisons.detectable(0.1, level, power) == pytest.approx(size, rel=1e-4)

    def test_four_of_five_tests_find_it(self):
        rng, n = np.random.default_rng(0), 200
        apart = comparisons.detectable(1 / np.sqrt(n))
        means = (apart + rng.normal(size=(20_000, n))).mean(axis=1)
        assert (np.abs(means) * np.sqrt(n) > 1.96).mean() == pytest.approx(0.8, abs=0.012)


class TestSimultaneous:
    pivots = np.random.default_rng(0).standard_t(20, size=(6, 2000))

    def test_is_the_quantile_of_the_largest(self):
        assert comparisons.simultaneous(np.array([[1.0, -4, 2, 0], [-3.0, 1, 1, 0]]), 0.5) == 3
        assert comparisons.simultaneous(np.array([[1.0, -4, 2, 0], [-3.0, 1, 1, 0]]), 0.25) == 2
        assert comparisons.simultaneous(np.arange(100.0)[None], 0.95) == 95  # rounded up, to be safe

    def test_is_no_less_than_any_single_one(self):
        factor = comparisons.simultaneous(self.pivots)
        assert factor >= max(comparisons.simultaneous(row[None]) for row in self.pivots)
        assert factor <= np.quantile(np.abs(self.pivots), 1 - 0.05 / 6, axis=1).max() * 1.05  # Bonferroni

    def test_one_normal_pivot_needs_what_the_table_says(self):
        pivots = np.random.default_rng(1).normal(size=(1, 200_000))
        assert comparisons.simultaneous(pivots) == pytest.approx(1.96, abs=0.02)
        together = np.repeat(pivots, 3, axis=0)
        assert comparisons.simultaneous(together) == comparisons.simultaneous(pivots)

    def test_undefined_pivots_do_not_count(self):
        expected = comparisons.simultaneous(self.pivots)
        nothing = np.full((1, 2000), np.nan)
        assert comparisons.simultaneous(np.r_[self.pivots, nothing]) == expected
        endless = np.where(np.arange(2000) == 7, np.inf, 0.0)[None]  # a resample without spread
        assert comparisons.simultaneous(np.r_[self.pivots, endless]) == expected


class TestFalseAlarms:
    """Without any difference, tests at 5 % are wrong 5 times out of 100."""

    def skewed(self, rng, shape):
        """Differences of two skewed metrics of the same law."""
        return rng.beta(5, 1, shape) - rng.beta(5, 1, shape)

    @pytest.mark.parametrize("units", [20, 50])
    def test_single(self, units):
        differences = self.skewed(np.random.default_rng(units), (units, 4000))
        single, joint = comparisons.sign_flip(Draw(1, 1000, units), differences)
        assert (single <= 0.05).mean() == pytest.approx(0.05, abs=0.012)
        assert (single <= 0.2).mean() == pytest.approx(0.2, abs=0.025)
        assert (joint <= 0.05).mean() <= 1 / 4000

    def test_of_a_family(self):
        rng, alarms = np.random.default_rng(2), {"single": 0, "max-T": 0, "Holm": 0}
        for _ in range(400):
            differences = 0.7 * self.skewed(rng, (50, 1)) + 0.7 * self.skewed(rng, (50, 10))
            single, joint = comparisons.sign_flip(Draw(1, 500, 50), differences)
            for name, p in (("single", single), ("max-T", joint), ("Holm", comparisons.holm(single))):
                alarms[name] += (p <= 0.05).any()
        rates = {name: count / 400 for name, count in alarms.items()}
        assert rates["single"] > 0.15  # why families are adjusted for
        assert 0.03 < rates["max-T"] < 0.07
        assert rates["Holm"] <= rates["max-T"]  # which does not know of the correlation
