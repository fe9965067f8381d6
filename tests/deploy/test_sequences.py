"""Tests of the sequences: closed formulas, scipy, coverage at every look, and what is not known."""

import math

import numpy as np
import pytest
from scipy import optimize, stats

from cotrr.deploy import sequences
from cotrr.deploy.sequences import BURN_IN, LEARNING


def alarms(band):
    """Share of equal pairs [R, T] that look different at any of 199 looks."""
    assert np.isfinite(band.low[:, -1]).mean() > 0.9  # the alarms are not rare for want of intervals
    looks = np.linspace(BURN_IN, band.low.shape[1] - 1, 199).astype(int)
    return ((band.low > 0) | (band.high < 0))[:, looks].any(axis=1).mean()


class TestConfidenceSequence:
    def test_equals_the_published_formula(self):
        t, alpha, planned = 400, 0.05, 900
        # Stationary point of the width in ρ², found without the Lambert function.
        width = lambda rho2, t: 2 * (t * rho2 + 1) / (t**2 * rho2) * math.log(math.sqrt(t * rho2 + 1) / alpha)
        rho2 = optimize.minimize_scalar(
            lambda rho2: width(rho2, planned), bounds=(1e-6, 1), method="bounded", options={"xatol": 1e-12}
        ).x
        values = np.random.default_rng(0).normal(3, 2, t)
        band = sequences.confidence_sequence(values, 1 - alpha, planned)
        half = values.std() * math.sqrt(width(rho2, t))
        assert band.value[-1] == pytest.approx(values.mean())
        assert band.high[-1] - band.value[-1] == pytest.approx(half, rel=1e-6)
        assert band.value[-1] - band.low[-1] == pytest.approx(half, rel=1e-6)

    def test_one_time_from_sums_is_the_last_of_all_times(self):
        values = np.random.default_rng(1).exponential(size=500)
        band = sequences.confidence_sequence(values)
        once = sequences.interval(np.array(500), values.mean(), values.var(), np.ptp(values), 0.95, 10_000)
        np.testing.assert_allclose([part[-1] for part in band], list(once), rtol=1e-12)

    def test_nothing_is_known_early_or_without_spread(self):
        band = sequences.confidence_sequence(np.random.default_rng(2).normal(size=BURN_IN))
        assert np.isinf(band.low[:-1]).all() and np.isinf(band.high[:-1]).all()
        assert np.isfinite([band.low[-1], band.high[-1]]).all()
        for constant in (0.0, 0.1, 1e8 + 0.1):
            band = sequences.confidence_sequence(np.full(1000, constant))
            assert np.isinf(band.low).all() and np.isinf(band.high).all()
        assert len(sequences.confidence_sequence(np.empty(0)).low) == 0

    def test_large_offset_loses_no_digits(self):
        values = np.random.default_rng(3).normal(size=300)
        near, far = (sequences.confidence_sequence(values + shift) for shift in (0, 1e7))
        np.testing.assert_allclose(far.high - far.value, near.high - near.value, rtol=1e-6)

    def test_longer_sequences_begin_alike(self):
        values = np.random.default_rng(4).normal(size=600)
        whole, part = sequences.confidence_sequence(values), sequences.confidence_sequence(values[:400])
        np.testing.assert_array_equal(whole.low[:400], part.low)


class TestArms:
    def test_terms_by_hand(self):
        values = np.arange(2.0 * LEARNING + 2)
        candidate = np.arange(len(values)) % 2 == 1
        old, new, surprise, _ = sequences.arm_outcomes(values, candidate, 0.25)
        i = 2 * LEARNING  # a baseline unit after LEARNING of each
        assert np.isnan(old[: i - 1]).all() and np.isnan(new[:i]).all()
        expected = values[:i][~candidate[:i]].mean(), values[:i][candidate[:i]].mean()
        assert old[i] == pytest.approx(expected[0] + (values[i] - expected[0]) / 0.75)
        assert new[i] == pytest.approx(expected[1])
        assert surprise[i] == pytest.approx(values[i] - expected[0])
        assert new[i + 1] == pytest.approx(expected[1] + (values[i + 1] - expected[1]) / 0.25)

    def test_slope_is_that_of_the_earlier_units(self):
        rng = np.random.default_rng(0)
        x, candidate = rng.normal(size=200), rng.random(200) < 0.5
        y = 5 + 2 * x + rng.normal(size=200)
        new = sequences.arm_outcomes(y, candidate, 0.5, x).candidate
        past = candidate[:-1]
        fit = stats.linregress(x[:-1][past], y[:-1][past])
        predicted = fit.intercept + fit.slope * x[-1]
        assert new[-1] == pytest.approx(predicted + (y[-1] - predicted) * 2 * candidate[-1])

    def test_a_covariate_narrows_the_interval(self):
        rng = np.random.default_rng(1)
        x, candidate = rng.normal(size=20_000), rng.random(20_000) < 0.5
        y = 0.8 * x + 0.6 * rng.normal(size=20_000) + 0.1 * candidate
        widths = []
        for covariate in (None, x, np.where(rng.random(20_000) < 0.5, x, np.nan)):
            band = sequences.difference(sequences.arm_outcomes(y, candidate, 0.5, covariate))
            assert band.low[-1] < 0.1 < band.high[-1]
            widths.append(band.high[-1] - band.low[-1])
        # Unexplained variance: 1, .36, and the mean of the two.
        assert widths[1] / widths[0] == pytest.approx(math.sqrt(0.36), rel=0.03)
        assert widths[2] / widths[0] == pytest.approx(math.sqrt(0.68), rel=0.03)

    @pytest.mark.parametrize("covariate", [None, np.ones(400), np.full(400, np.nan)])
    def test_constant_outcomes_say_nothing(self, covariate):
        candidate = np.random.default_rng(2).random(400) < 0.5
        for values in (np.full(400, 0.1), np.where(candidate, 0.3, 0.1)):
            arms = sequences.arm_outcomes(values, candidate, 0.5, covariate)
            for band in (sequences.difference(arms), sequences.relative_change(arms)):
                assert np.isinf(band.low).all() and np.isinf(band.high).all()

    def test_relative_change_inverts_means(self):
        rng = np.random.default_rng(3)
        candidate = rng.random(4000) < 0.5
        values = (rng.random(4000) < np.where(candidate, 0.2, 0.4)).astype(float)
        arms = sequences.arm_outcomes(values, candidate, 0.5)
        band = sequences.relative_change(arms, planned=4000)
        for end in (band.low[-1], band.high[-1]):
            contrast = sequences.confidence_sequence(arms.candidate - (1 + end) * arms.baseline, planned=4000)
            ends = sorted((abs(contrast.low[-1]), abs(contrast.high[-1])))
            # All but exact: the covariances are widened by what a smaller arm may not have seen yet.
            assert ends[0] < 0.02 * ends[1]
        assert band.low[-1] < -0.5 < band.high[-1]

    def test_relative_to_nothing_is_not_known(self):
        rng = np.random.default_rng(4)
        arms = sequences.arm_outcomes(rng.normal(size=1000), rng.random(1000) < 0.5, 0.5)
        band = sequences.relative_change(arms)
        assert np.isinf(band.low).all() and np.isinf(band.high).all()


class TestFalseAlarms:
    """199 looks at two equal arms, 200 times."""

    shape = 200, 4000

    @pytest.mark.parametrize("share", [0.5, 0.2])
    @pytest.mark.parametrize("kind", ["compliance", "rare", "covariate"])
    def test_difference(self, kind, share):
        rng = np.random.default_rng(5)
        x, candidate = rng.normal(size=self.shape), rng.random(self.shape) < share
        values = {
            "compliance": lambda: rng.beta(5, 0.7, size=x.shape),
            "rare": lambda: (rng.random(x.shape) < 0.05).astype(float),
            "covariate": lambda: x + rng.normal(size=x.shape),
        }[kind]()
        arms = sequences.arm_outcomes(values, candidate, share, x if kind == "covariate" else None)
        band = sequences.difference(arms, planned=4000)
        assert alarms(band) <= 0.05

    def test_ratio(self):
        """Lines of a unit belong together: taking each for itself gives far too many alarms."""
        rng = np.random.default_rng(6)
        candidate = rng.random(self.shape) < 0.5
        lines = 1.0 + rng.geometric(0.2, size=candidate.shape)
        hits = rng.binomial(lines.astype(int), rng.beta(0.5, 1.5, size=candidate.shape))
        unit = sequences.linearised(hits, lines, candidate)
        band = sequences.difference(sequences.arm_outcomes(unit, candidate, 0.5), planned=4000)
        assert alarms(band) <= 0.05
        rate = lambda inside: (hits * inside).sum(axis=1) / (lines * inside).sum(axis=1)
        change = rate(candidate) - rate(~candidate)
        naive = np.sqrt(0.25 * 0.75 * 4 / lines.sum(axis=1))
        reach = sequences.reach(np.array(self.shape[1]), 0.95, 4000)
        error = (band.high - band.low)[:, -1] / 2 / reach / math.sqrt(self.shape[1])
        assert (np.abs(change) > 1.96 * naive).mean() > 0.2
        assert (np.abs(change) > 1.96 * error).mean() == pytest.approx(0.05, abs=0.03)
        np.testing.assert_allclose(band.value[:, -1], change, atol=0.01)


class TestRareEvents:
    def test_a_small_arm_without_events_is_not_taken_for_better(self):
        """Two events in 100 units, 5 % of them with the candidate, whose own spread is 0 for long."""
        rng = np.random.default_rng(7)
        candidate, values = rng.random((200, 3000)) < 0.05, (rng.random((200, 3000)) < 0.02).astype(float)
        arms = sequences.arm_outcomes(values, candidate, 0.05)
        naive = sequences.confidence_sequence(arms.candidate - arms.baseline)
        missed = lambda band: ((band.low > 0) | (band.high < 0)).any(axis=1).mean()
        assert missed(sequences.difference(arms)) <= 0.05
        assert missed(naive) > 0.2

    def test_one_observation_does_not_decide(self):
        values = np.zeros(1000)
        values[50] = 1
        assert np.isinf(sequences.confidence_sequence(values).low).all()
        values[::100] = 1  # eleven of them
        assert np.isfinite(sequences.confidence_sequence(values).low[-1])


class TestSampleRatio:
    def test_equals_scipy(self):
        counts, shares = np.array([[3, 5], [40, 70], [350, 420]]), np.array([0.4, 0.6])
        prior = sequences.CONCENTRATION * shares
        factors = [
            math.exp(stats.dirichlet_multinomial(prior, c.sum()).logpmf(c)
                     - stats.multinomial(c.sum(), shares).logpmf(c)) for c in counts
        ]  # fmt: skip
        expected = 1 / np.maximum.accumulate(np.maximum(factors, 1))
        np.testing.assert_allclose(sequences.sample_ratio(counts, shares), expected, rtol=1e-8)
        assert expected[-1] < 1

    def test_never_goes_up_again(self):
        counts = np.cumsum(np.random.default_rng(0).multinomial(50, [0.5, 0.5], size=(20, 100)), axis=1)
        assert (np.diff(sequences.sample_ratio(counts, [0.5, 0.5]), axis=-1) <= 0).all()

    @pytest.mark.parametrize("shares", [[0.5, 0.5], [0.1, 0.9], [0.2, 0.3, 0.5]])
    def test_false_alarms_at_a_hundred_looks(self, shares):
        days = np.random.default_rng(1).multinomial(100, shares, size=(3000, 100))
        p = sequences.sample_ratio(np.cumsum(days, axis=1), shares)
        assert (p[:, -1] <= 0.01).mean() <= 0.01

    def test_finds_a_wrong_split(self):
        days = np.random.default_rng(2).multinomial(100, [0.45, 0.55], size=(200, 100))
        p = sequences.sample_ratio(np.cumsum(days, axis=1), [0.5, 0.5])
        assert (p[:, 29] <= 0.01).mean() > 0.8 and (p[:, -1] <= 0.01).all()

    def test_hopeless_splits_and_no_units(self):
        assert sequences.sample_ratio(np.array([[0, 10**6]]), [0.5, 0.5])[0] == 0
        assert sequences.sample_ratio(np.empty((0, 2)), [0.5, 0.5]).shape == (0,)
        assert sequences.sample_ratio(np.zeros((1, 2)), [0.5, 0.5])[0] == 1
