"""Calibration: parameters recovered, order kept, and intervals that cover."""

import numpy as np
import pytest
from scipy.special import expit, logit

from cotrr.ranker.calibration import Platt, cross_fitted, fit, fit_platt, interval_radius


@pytest.mark.parametrize(("slope", "offset"), [(2.0, -0.7), (0.3, 1.5), (1.0, 0.0)])
def test_platt_recovers_what_made_the_targets(slope, offset):
    logits = np.random.default_rng(0).normal(size=500) * 2
    fitted = fit_platt(logits, expit(slope * logits + offset))  # targets are probabilities
    np.testing.assert_allclose(fitted, (slope, offset), atol=2e-3)
    outcomes = np.random.default_rng(1).uniform(size=40_000)
    many = np.random.default_rng(2).normal(size=40_000) * 2
    fitted = fit_platt(many, (outcomes < expit(slope * many + offset)).astype(float))
    np.testing.assert_allclose(fitted, (slope, offset), atol=0.08)


def test_calibrated_means_equal_the_targets():
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=300), rng.uniform(size=300)
    assert np.mean(fit_platt(logits, targets)(logits)) == pytest.approx(np.mean(targets), abs=1e-4)


def test_platt_never_turns_the_order():
    logits = np.linspace(-3, 3, 50)
    against = fit_platt(logits, expit(-2 * logits))
    assert against.slope > 0 and (np.diff(against(logits)) > 0).all()
    assert Platt(2.0, 1.0)(np.array(0.5)) == pytest.approx(expit(2.0))


def test_one_outcome_alone_gives_finite_parameters():
    fitted = fit_platt(np.linspace(-3, 3, 20), np.zeros(20))
    assert np.isfinite(fitted).all() and fitted(np.array(0.0)) < 0.01


def test_radius_by_hand():
    # Four shares of 1/4: three queries and the new one; a query's share is spread over its rows.
    query, residual = np.array([0, 2, 1, 0, 2]), np.array([0.1, 0.5, 0.3, 0.2, 0.4])
    for coverage, radius in (
        (0.1, 0.1),
        (0.25, 0.2),
        (0.26, 0.3),
        (0.5, 0.3),
        (0.51, 0.4),
        (0.75, 0.5),
        (0.76, 1.0),
    ):
        assert interval_radius(query, residual, coverage) == radius, coverage


def test_radius_is_one_where_queries_are_too_few():
    residual = np.full(200, 0.01)
    assert interval_radius(np.arange(200) % 18, residual) == 1.0
    assert interval_radius(np.arange(200) % 19, residual) == 0.01


@pytest.fixture
def folded():
    """Logits, targets that follow them differently in each fold, and three folds of uneven size."""
    rng = np.random.default_rng(0)
    fold, logits = rng.choice([4, 0, 7], 90, p=[0.5, 0.3, 0.2]), rng.normal(size=90)
    return logits, expit((1 + fold) * logits + rng.normal(size=90)), fold


def test_cross_fitted_values_by_hand(folded):
    logits, targets, fold = folded
    values = cross_fitted(logits, targets, fold)
    assert values.shape == (90,)
    for k in (0, 4, 7):
        rest = fit_platt(logits[fold != k], targets[fold != k])
        np.testing.assert_array_equal(values[fold == k], rest(logits[fold == k]))
    everyone = fit_platt(logits, targets)(logits)
    assert np.abs(values - everyone).max() > 0.01
    # A single fold has no other to learn from.
    np.testing.assert_array_equal(cross_fitted(logits, targets, np.full(90, 3)), everyone)


@pytest.mark.parametrize("k", [0, 4, 7])
def test_cross_fitted_values_do_not_depend_on_their_own_folds_targets(folded, k):
    logits, targets, fold = folded
    inside, values = fold == k, cross_fitted(logits, targets, fold)
    other = cross_fitted(logits, np.where(inside, 1 - targets, targets), fold)
    np.testing.assert_array_equal(other[inside], values[inside])
    assert (np.abs(other - values)[~inside] > 1e-4).all()  # the other folds do learn from them
    # One row's logit moves its own value, and no other of its fold.
    first = np.flatnonzero(inside)[0]
    moved = cross_fitted(np.where(np.arange(90) == first, logits + 1, logits), targets, fold)
    assert moved[first] > values[first]
    np.testing.assert_array_equal(np.delete(moved[inside], 0), np.delete(values[inside], 0))


def clustered(rng, queries):
    """Short lists are hard, and errors inside a list go together."""
    size = rng.choice([1, 12], queries)
    level = np.where(size == 1, 0.5, 0.1) * rng.uniform(0.5, 1, queries)
    query = np.repeat(np.arange(queries), size)
    return query, level[query] * rng.uniform(0.8, 1, len(query))


def test_intervals_cover_a_new_querys_candidate():
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(1500):
        query, residual = clustered(rng, 40)
        radius = interval_radius(query, residual)
        other, new = clustered(rng, 20)
        covered.append(np.mean([np.mean(new[other == q] <= radius) for q in range(20)]))
    assert 0.945 < np.mean(covered) < 0.95 + 1 / 41 + 0.01


def test_fit_takes_each_head_and_the_residuals_of_the_calibrated_label():
    rng = np.random.default_rng(0)
    query, rank, conflict = np.repeat(np.arange(30), 10), rng.normal(size=300), rng.normal(size=300)
    y = np.clip(expit(2 * rank - 1) + rng.uniform(-0.1, 0.1, 300), 0, 1)
    is_conflict = expit(0.5 * conflict + 0.3)
    is_conflict[:50] = np.nan
    fold = query % 3
    fitted = fit(rank, conflict, y, is_conflict, query, fold)
    np.testing.assert_allclose(fitted.rank, (2, -1), atol=0.2)
    np.testing.assert_allclose(fitted.conflict, (0.5, 0.3), atol=2e-3)
    assert 0.08 < fitted.radius < 0.12 and fitted.queries == 30
    assert (fitted.rank, fitted.conflict) == (fit_platt(rank, y), fit_platt(conflict[50:], is_conflict[50:]))
    # The residuals are those of a calibration that has not seen the row's fold.
    assert fitted.radius == interval_radius(query, np.abs(y - cross_fitted(rank, y, fold)))
    assert fitted.radius != interval_radius(query, np.abs(y - fitted.rank(rank)))
    assert np.allclose(logit(fitted.rank(rank)), fitted.rank.slope * rank + fitted.rank.offset)
