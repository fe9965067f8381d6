"""Tests of the calibration measures: bins and their edges, three kinds of ECE, and what chance shows."""

import math
import warnings

import calibration as oracle
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from cotrr.evaluate import calibration

with warnings.catch_warnings():  # it imports a plotting library, which may warn of its own style
    warnings.simplefilter("ignore")
    import relplot

few = settings(max_examples=60, deadline=None, derandomize=True, database=None)
BINS = calibration.BINS
rows_of_probabilities = st.lists(
    st.tuples(st.floats(0, 1) | st.sampled_from([0.0, 0.2, 1 / 3, 0.5, 1.0]), st.booleans()),
    min_size=1,
    max_size=60,
)


def summed(probability, outcome, row=calibration.bin_of):
    """[bins, 3] sums of plain lists."""
    probability, outcome = np.array(probability, float), np.array(outcome, float)
    one = np.zeros(len(probability), np.int64)
    return calibration.bin_sums(one, probability, outcome, row(probability), 1)[0]


def drawn(size, power=1.0, seed=0, ties=False):
    """Probabilities, and outcomes that happen with their `power`."""
    rng = np.random.default_rng(seed)
    probability = rng.beta(0.8, 1.2, size)
    if ties:
        probability = np.round(probability * 5) / 5
    return probability, (rng.random(size) < probability**power).astype(float)


class TestBins:
    def test_an_edge_belongs_to_the_bin_above_it(self):
        edges = np.arange(16) / 15
        assert calibration.bin_of(edges).tolist() == [*range(15), 14]

    def test_just_below_an_edge_belongs_to_the_bin_below_it(self):
        below = np.nextafter(np.arange(1, 16) / 15, 0)
        assert calibration.bin_of(below).tolist() == list(range(15))

    def test_one_is_in_the_last_bin_and_no_bin_is_added(self):
        assert calibration.bin_of(np.array([1.0, 0.0])).tolist() == [14, 0]
        assert calibration.bin_of(np.array([1.0, 0.5, 0.499]), bins=2).tolist() == [1, 1, 0]

    def test_sums_of_each_query(self):
        probability, outcome = np.array([0.1, 0.9, 0.7, 1.0]), np.array([0.0, 1, 0, 1])
        query, row = np.array([0, 0, 1, 1]), np.array([0, 14, 10, 10])
        first, second, none = calibration.bin_sums(query, probability, outcome, row, 3)
        np.testing.assert_allclose(first[[0, 14]], [[1, 0.1, 0], [1, 0.9, 1]])
        np.testing.assert_allclose(second[10], [2, 1.7, 1])
        assert (first[..., 0].sum(), second[..., 0].sum(), none.any()) == (2, 2, False)

    def test_nothing(self):
        assert summed([], []).tolist() == np.zeros((BINS, 3)).tolist()


class TestEqualMassBins:
    def test_as_many_in_each(self):
        row = calibration.equal_mass_bin_of(np.random.default_rng(0).random(150))
        assert np.bincount(row).tolist() == [10] * 15
        assert calibration.equal_mass_bin_of(np.array([0.3, 0.9, 0.1, 0.5]), bins=2).tolist() == [0, 1, 0, 1]

    @few
    @given(rows_of_probabilities)
    def test_higher_is_never_lower_and_equal_stays_together(self, rows):
        p = np.array([probability for probability, _ in rows])
        row = calibration.equal_mass_bin_of(p)
        assert row.min() >= 0 and row.max() < BINS
        ordered = row[np.argsort(p, kind="stable")]
        assert (np.diff(ordered) >= 0).all()
        assert all(len(set(row[p == value])) == 1 for value in p)

    @few
    @given(rows_of_probabilities)
    def test_same_parts_as_uncertainty_calibration(self, rows):
        p = np.array([probability for probability, _ in rows])
        edges = oracle.get_equal_bins(list(p), BINS)
        parts = np.searchsorted(edges, p)
        row = calibration.equal_mass_bin_of(p)
        same = lambda of: of[:, None] == of[None]
        assert (same(row) == same(parts)).all()


class TestEce:
    def test_by_hand(self):
        # Two bins of fifteen: {.30, .32} observed 1 of 2, {.94, 1, 1} observed 2 of 3.
        found = calibration.ece(summed([0.30, 0.32, 0.94, 1.0, 1.0], [0, 1, 1, 0, 1]))
        low, high = abs(0.31 - 1 / 2), abs(2.94 / 3 - 2 / 3)
        assert found == pytest.approx(2 / 5 * low + 3 / 5 * high)

    def test_opposite_errors_of_two_bins_do_not_cancel(self):
        assert calibration.ece(summed([0.2, 0.8], [1, 0])) == pytest.approx(0.8)

    def test_errors_within_a_bin_cancel(self):
        assert calibration.ece(summed([0.5, 0.5], [0, 1])) == pytest.approx(0)

    def test_certain_and_right_or_wrong(self):
        assert calibration.ece(summed([1.0, 0.0], [1, 0])) == 0
        assert calibration.ece(summed([1.0, 0.0], [0, 1])) == 1

    @few
    @given(rows_of_probabilities)
    def test_direct_loop(self, rows):
        p, y = (np.array(part, float) for part in zip(*rows, strict=True))
        gaps = 0.0
        for i in range(BINS):
            inside = (p * BINS >= i) & ((p * BINS < i + 1) | (i == BINS - 1))
            if inside.any():
                gaps += inside.mean() * abs(p[inside].mean() - y[inside].mean())
        assert calibration.ece(summed(p, y)) == pytest.approx(gaps, abs=1e-12)

    def test_nothing_has_no_ece_and_rows_are_apart(self):
        sums = np.stack([summed([], []), summed([0.2], [1]), summed([0.9, 0.3], [1, 0])])
        found = calibration.ece(sums)
        assert math.isnan(found[0])
        np.testing.assert_allclose(found[1:], [0.8, 0.2])


class TestDebiased:
    def test_by_hand(self):
        # One bin: mean .3 against 1 of 4, variance of the share (1/4 · 3/4) / 3; one row counts nothing.
        found = calibration.debiased_square(summed([0.3, 0.3, 0.3, 0.3, 0.95], [1, 0, 0, 0, 0]))
        assert found == pytest.approx(4 / 5 * (0.05**2 - 0.25 * 0.75 / 3))
        assert found < 0

    @few
    @given(rows_of_probabilities)
    def test_uncertainty_calibration(self, rows):
        p, y = zip(*rows, strict=True)
        expected = oracle.unbiased_l2_ce(
            oracle.bin(list(zip(p, map(float, y), strict=True)), oracle.get_equal_bins(list(p), BINS))
        )
        found = float(calibration.debiased_square(summed(p, y, calibration.equal_mass_bin_of)))
        assert max(found, 0) ** 0.5 == pytest.approx(expected, abs=1e-7)

    @pytest.mark.parametrize(("size", "power", "ties"), [(300, 1, False), (300, 2, False), (2000, 1.3, True)])
    def test_uncertainty_calibration_on_many(self, size, power, ties):
        p, y = drawn(size, power, ties=ties)
        edges = oracle.get_equal_bins(list(p), BINS)
        expected = oracle.unbiased_l2_ce(oracle.bin(list(zip(p, y, strict=True)), edges))
        found = float(calibration.debiased_square(summed(p, y, calibration.equal_mass_bin_of)))
        assert max(found, 0) ** 0.5 == pytest.approx(expected, abs=1e-12)
        assert expected > 0 or power == 1

    def test_is_unbiased_where_the_plug_in_error_is_not(self):
        """The mean over 3000 data sets of a model that is off by p − p^1.5, with bins that stay."""
        p = np.sort(np.random.default_rng(0).random(150))
        row = np.arange(150) // 10
        y = np.random.default_rng(1).random((3000, 150)) < p**1.5
        count = np.full((3000, BINS), 10.0)
        by_bin = lambda values: np.add.reduceat(values, np.arange(0, 150, 10), axis=-1)
        sums = np.stack([count, np.broadcast_to(by_bin(p), (3000, BINS)), by_bin(y.astype(float))], axis=-1)
        alone = calibration.bin_sums(row * 0, p, y[0].astype(float), row, 1)[0]
        np.testing.assert_allclose(sums[0], alone, rtol=1e-12)
        found = calibration.debiased_square(sums)
        truth = (by_bin(p - p**1.5) ** 2 / 100).mean()
        # Chances differ a little inside a bin, which makes the bias that is taken off a little too large.
        spread = by_bin((p**1.5) ** 2) / 10 - (by_bin(p**1.5) / 10) ** 2
        expected = truth - (spread / 9).mean()
        standard_error = found.std() / np.sqrt(3000)
        assert found.mean() == pytest.approx(expected, abs=4 * standard_error)
        plug_in = ((sums[..., 1] - sums[..., 2]) ** 2 / 100).mean(axis=1)
        assert plug_in.mean() > truth + 20 * standard_error

    def test_weights_are_repeated_rows(self):
        p, y = drawn(40)
        query, often = np.arange(40) // 4, np.random.default_rng(3).integers(0, 4, 10)
        row = calibration.equal_mass_bin_of(p)
        sums = calibration.bin_sums(query, p, y, row, 10)
        times = often[query]
        repeated = calibration.bin_sums(
            np.repeat(query, times), *(np.repeat(part, times) for part in (p, y, row)), 10
        )
        weighted = np.tensordot(often, sums, axes=1)
        np.testing.assert_allclose(weighted, repeated.sum(axis=0))
        both = calibration.debiased_square(np.stack([weighted, repeated.sum(axis=0)]))
        assert both[0] == pytest.approx(both[1], abs=1e-15)

    def test_nothing_has_none(self):
        assert math.isnan(calibration.debiased_square(summed([], [])))
        assert calibration.debiased_square(summed([0.3], [1])) == 0


class TestSmooth:
    def test_one_probability_by_hand(self):
        """All residuals are of one sign, so no width smooths any of them away."""
        for p, hits in ((0.5, 7), (0.0, 3), (1.0, 2), (0.99, 1)):
            outcome = np.r_[np.ones(hits), np.zeros(10 - hits)]
            found = calibration.smooth_ece(np.full(10, p), outcome)
            assert found == pytest.approx(abs(p - hits / 10), abs=1e-6)

    def test_errors_close_by_cancel_and_errors_far_away_do_not(self):
        outcome = np.r_[np.ones(50), np.zeros(50)]
        near = calibration.smooth_ece(np.repeat([0.499, 0.501], 50), outcome)
        far = calibration.smooth_ece(np.repeat([0.05, 0.95], 50), outcome)
        assert near < 0.06 < 0.3 < far

    def test_perfect_has_none_and_nothing_is_undefined(self):
        outcome = np.array([0.0, 1, 1, 0])
        assert calibration.smooth_ece(outcome, outcome) == pytest.approx(0, abs=1e-9)
        assert math.isnan(calibration.smooth_ece(np.zeros(0), np.zeros(0)))

    @pytest.mark.parametrize("ties", [False, True])
    @pytest.mark.parametrize(("size", "power"), [(30, 1), (400, 1), (400, 2), (3000, 1.2), (3000, 0.5)])
    def test_relplot(self, size, power, ties):
        p, y = drawn(size, power, ties=ties)
        p = 0.1 + 0.8 * p  # what stands on 0 and 1 it counts half
        assert calibration.smooth_ece(p, y) == pytest.approx(relplot.smECE(p, y), abs=1.5e-3)

    @pytest.mark.parametrize(("size", "power", "ties"), [(30, 1, False), (100, 1, True), (100, 2, False)])
    def test_direct_integral_with_images_behind_zero_and_one(self, size, power, ties):
        p, y = drawn(size, power, ties=ties)
        p[:5] = 0, 1, 1, 1, 0
        at = (np.arange(2000) + 0.5) / 2000

        def error(width):
            images = np.concatenate([centre + p * side for centre in (-2, 0, 2) for side in (-1, 1)])
            kernel = stats.norm(scale=width).pdf(at[:, None] - images)
            return np.abs(kernel @ np.tile(p - y, 6)).mean() / size

        width = optimize.brentq(lambda w: error(w) - w, 0.01, 1, xtol=1e-5)
        assert calibration.smooth_ece(p, y) == pytest.approx(width, abs=1e-4)

    @few
    @given(rows_of_probabilities)
    def test_is_the_width_of_its_own_smoothing_and_symmetric(self, rows):
        p, y = (np.array(part, float) for part in zip(*rows, strict=True))
        found = calibration.smooth_ece(p, y)
        assert -1e-12 <= found <= 1
        assert found <= np.abs(p - y).mean() + 1e-6
        assert found >= abs((p - y).mean()) - 1e-6
        assert found == pytest.approx(calibration.smooth_ece(1 - p, 1 - y), abs=5e-4)


def expected_ece(probability):
    """The mean ECE of outcomes that happen with these chances, by the exact law of each bin's sum."""
    gap, row = 0.0, calibration.bin_of(probability)
    for i in np.unique(row):
        chances = probability[row == i]
        law = stats.poisson_binom(chances)
        hits = np.arange(len(chances) + 1)
        gap += law.pmf(hits) @ np.abs(hits - chances.sum())
    return gap / len(probability)


class TestSimulate:
    @pytest.mark.parametrize(("size", "about"), [(300, 0.0675), (3000, 0.0212)])
    def test_mean_ece_of_a_calibrated_model(self, size, about):
        p = np.random.default_rng(size).random(size)
        found = calibration.simulate(p, seed=0, simulations=2000).ece
        error = found.std() / np.sqrt(2000)
        assert found.shape == (2000,)
        assert found.mean() == pytest.approx(expected_ece(p), abs=4 * error)
        assert found.mean() == pytest.approx(about, rel=0.1)  # a published figure for another law of p

    def test_band_is_that_of_the_exact_law(self):
        p = np.random.default_rng(1).beta(0.6, 1, 400)
        found, row = calibration.simulate(p, seed=0, simulations=4000).band, calibration.bin_of(p)
        for i in np.unique(row):
            law = stats.poisson_binom(p[row == i])
            low, high = found[:, i] * (row == i).sum()
            inside = law.cdf(high) - law.cdf(np.ceil(low) - 1)
            assert inside > 0.945
            # No narrower band of counts would do, but for the noise of the simulation.
            assert law.cdf(low - 1) < 0.03 and law.sf(high) < 0.03
            assert law.cdf(low) > 0.02 and law.sf(high - 1) > 0.02

    def test_empty_bins_have_no_band(self):
        band = calibration.simulate(np.array([0.1, 0.1, 1.0]), seed=0, simulations=50).band
        assert np.isnan(band[:, [0, *range(2, 14)]]).all()
        assert band[:, 14].tolist() == [1, 1]
        assert not np.isnan(band[:, 1]).any()

    def test_certain_outcomes_show_no_error(self):
        found = calibration.simulate(np.array([0.0, 1.0, 1.0]), seed=0, simulations=20)
        assert found.ece.tolist() == [0] * 20

    def test_order_of_rows_and_size_of_chunks_do_not_matter_and_the_seed_does(self):
        p = np.random.default_rng(2).random(1000)
        one = calibration.simulate(p, seed=3, simulations=1100)  # more than a chunk
        np.testing.assert_array_equal(calibration.simulate(p[::-1], 3, 1100).ece, one.ece)
        np.testing.assert_array_equal(calibration.simulate(p, 3, 700).ece, one.ece[:700])
        assert (calibration.simulate(p, 4, 1100).ece != one.ece).any()

    def test_false_alarms(self):
        """Calibrated models are called calibrated 19 times out of 20."""
        p = np.random.default_rng(5).random(200)
        y = np.random.default_rng(6).random((1000, 200)) < p
        null = calibration.simulate(p, seed=7, simulations=1000).ece
        gaps = np.zeros((1000, BINS))
        for i, bin_ in enumerate(calibration.bin_of(p)):
            gaps[:, bin_] += p[i] - y[:, i]
        seen = np.abs(gaps).sum(axis=1) / 200
        values = (1 + (null[None] >= seen[:, None]).sum(axis=1)) / 1001
        assert (values <= 0.05).mean() == pytest.approx(0.05, abs=0.025)
