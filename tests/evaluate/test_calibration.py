"""Tests of the calibration measures: bins, their edges, and ECE by hand."""

import math

import numpy as np
import pytest

from cotrr.evaluate import calibration

ONE_QUERY = np.zeros(4, np.int64)


def summed(probability, outcome, query=None, queries=1, bins=calibration.BINS):
    """`bin_sums` from plain lists."""
    query = np.zeros(len(probability), np.int64) if query is None else np.asarray(query)
    return calibration.bin_sums(query, np.array(probability), np.array(outcome, float), queries, bins)


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
        sums = summed([0.1, 0.9, 0.7, 1.0], [0, 1, 0, 1], query=[0, 0, 1, 1], queries=3, bins=2)
        first, second, none = sums
        np.testing.assert_allclose(first, [[1, 0.1, 0], [1, 0.9, 1]])
        np.testing.assert_allclose(second, [[0, 0, 0], [2, 1.7, 1]])
        assert not none.any()

    def test_candidates_of_one_bin_add_up(self):
        sums = calibration.bin_sums(ONE_QUERY, np.full(4, 0.5), np.array([1.0, 1.0, 0.0, 1.0]), 1)
        np.testing.assert_allclose(sums[0, 7], [4, 2.0, 3])
        assert sums[..., 0].sum() == 4


class TestEce:
    def test_by_hand(self):
        # Two bins: {0.1, 0.3} observed 1 of 2, {0.6, 0.8, 1.0} observed 2 of 3.
        found = calibration.ece(summed([0.1, 0.3, 0.6, 0.8, 1.0], [0, 1, 1, 0, 1], bins=2)[0])
        low, high = abs(0.4 / 2 - 1 / 2), abs(2.4 / 3 - 2 / 3)
        assert found == pytest.approx(2 / 5 * low + 3 / 5 * high)

    def test_opposite_errors_of_two_bins_do_not_cancel(self):
        assert calibration.ece(summed([0.2, 0.8], [1, 0])[0]) == pytest.approx(0.8)

    def test_errors_within_a_bin_cancel(self):
        assert calibration.ece(summed([0.5, 0.5], [0, 1])[0]) == pytest.approx(0)

    def test_certain_and_right_or_wrong(self):
        assert calibration.ece(summed([1.0, 0.0], [1, 0])[0]) == 0
        assert calibration.ece(summed([1.0, 0.0], [0, 1])[0]) == 1

    def test_nothing_has_no_ece(self):
        sums = summed([], [], queries=2)
        assert sums.shape == (2, 15, 3)
        assert math.isnan(calibration.ece(sums.sum(axis=0)))
