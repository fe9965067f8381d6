"""Tests of the resampled AUC: by hand, against scikit-learn, and one path against the other."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from cotrr.evaluate import auc, bootstrap
from cotrr.evaluate.bootstrap import Draw

U, N, B = 12, 90, 40
BACKENDS = ("numpy", "jax")


def judged(kind, seed=1):
    """Units, scores and classes of N candidates; a high score makes a positive more likely."""
    rng = np.random.default_rng(seed)
    unit, score = rng.integers(0, U, N), rng.random(N)
    positive = rng.random(N) < 0.2 + 0.5 * score
    score = {
        "apart": score,
        "some ties": np.round(score * 12) / 12,
        "heavy ties": np.round(score),
        "all tied": np.full(N, 0.3),
        "float32": np.float32(0.5) + score.astype(np.float32) * np.float32(4e-6),
    }[kind]
    return unit, score, positive


KINDS = ("apart", "some ties", "heavy ties", "all tied", "float32")


def counts(draw):
    """[B, U] of a draw."""
    return bootstrap.counts(np, draw.seed, np.arange(draw.resamples), draw.units)


def pairs(weights, unit, positive):
    """[B] weighted pairs of a positive and a negative candidate."""
    often = weights[:, unit]
    return often[:, positive].sum(axis=1) * often[:, ~positive].sum(axis=1)


def test_fixture_of_float32_has_ties_that_float64_has_not():
    score = judged("float32")[1]
    assert score.dtype == np.float32 and 20 < len(set(score)) < N


class TestByHand:
    @pytest.mark.parametrize(
        ("score", "positive", "wins"),
        [
            ([0.1, 0.2, 0.3, 0.4], [0, 0, 1, 1], 4),
            ([0.4, 0.3, 0.2, 0.1], [0, 0, 1, 1], 0),
            ([0.4, 0.1, 0.3, 0.2], [1, 0, 0, 1], 3),
            ([0.5, 0.5, 0.5, 0.5], [0, 1, 0, 1], 2),
            ([0.1, 0.5, 0.5, 0.9], [0, 0, 1, 0], 1.5),
            ([-np.inf, 0, 0, np.inf], [0, 1, 1, 1], 3),
            ([0.1, 0.2], [1, 1], 0),
            ([0.1, 0.2], [0, 0], 0),
        ],
    )
    def test_wins(self, score, positive, wins):
        items = auc.sort_items(np.zeros(len(score), int), np.array(score), np.array(positive, bool))
        assert auc.pair_wins(items, 1).tolist() == [[wins]]
        for backend in BACKENDS:
            assert auc.weighted_wins(Draw(0, 2, 1, backend), items).tolist() == [wins, wins]

    def test_wins_of_each_pair_of_units(self):
        # Unit 0 has a positive at .6 and a negative at .2, unit 1 a negative at .6 and a positive at .1.
        items = auc.sort_items(
            np.array([0, 0, 1, 1]), np.array([0.6, 0.2, 0.6, 0.1]), np.array([1, 0, 0, 1], bool)
        )
        assert auc.pair_wins(items, 3).tolist() == [[1, 0.5, 0], [0, 0, 0], [0, 0, 0]]
        assert auc.wins_without(items, 3).tolist() == [0, 1, 1.5]

    def test_order_of_candidates_does_not_matter(self):
        unit, score, positive = judged("some ties")
        order = np.random.default_rng(0).permutation(N)
        there = auc.pair_wins(auc.sort_items(unit[order], score[order], positive[order]), U)
        np.testing.assert_array_equal(auc.pair_wins(auc.sort_items(unit, score, positive), U), there)


@pytest.mark.parametrize("kind", KINDS)
class TestAllKinds:
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_scikit_learn_with_weights(self, kind, backend):
        unit, score, positive = judged(kind)
        draw = Draw(2, B, U, backend)
        weights, items = counts(draw), auc.sort_items(unit, score, positive)
        found = auc.weighted_wins(draw, items) / pairs(weights, unit, positive)
        assert found.dtype == np.float64
        expected = [roc_auc_score(positive, score, sample_weight=row[unit]) for row in weights]
        np.testing.assert_allclose(found, expected, atol=1e-12)

    def test_scikit_learn_with_repeated_rows(self, kind):
        unit, score, positive = judged(kind)
        draw = Draw(2, B, U, "numpy")
        weights, items = counts(draw), auc.sort_items(unit, score, positive)
        found = auc.weighted_wins(draw, items) / pairs(weights, unit, positive)
        for value, row in zip(found, weights, strict=True):
            often = row[unit]
            expected = roc_auc_score(np.repeat(positive, often), np.repeat(score, often))
            assert value == pytest.approx(expected, abs=1e-12)

    def test_quadratic_form_equals_the_scan_in_every_bit(self, kind):
        items, draw = auc.sort_items(*judged(kind)), Draw(2, B, U)
        wins = [auc.weighted_wins(draw._replace(backend=backend), items) for backend in BACKENDS]
        assert wins[0].tobytes() == wins[1].tobytes()

    def test_without_each_unit(self, kind):
        unit, score, positive = judged(kind)
        found = auc.wins_without(auc.sort_items(unit, score, positive), U)
        for u in range(U):
            ups, downs = score[positive & (unit != u)][:, None], score[~positive & (unit != u)][None]
            assert found[u] == (ups > downs).sum() + (ups == downs).sum() / 2


def test_replicate_of_one_class_wins_nothing():
    unit, score, _ = judged("some ties")
    positive, draw = unit == 3, Draw(2, B, U)
    items, weights = auc.sort_items(unit, score, positive), counts(draw)
    for backend in BACKENDS:
        wins = auc.weighted_wins(draw._replace(backend=backend), items)
        assert (wins[weights[:, 3] == 0] == 0).all()
        assert (wins[weights[:, 3] > 0] > 0).all()
    assert 0 < (weights[:, 3] == 0).sum() < B


def test_layout_for_accelerators_gives_the_same_bits(monkeypatch):
    items, draw = auc.sort_items(*judged("some ties")), Draw(2, 8, U, "jax")
    expected = auc.weighted_wins(draw, items)
    monkeypatch.setattr(bootstrap, "on_cpu", lambda: False)
    monkeypatch.setattr(auc, "UNROLLED", 4)  # so that the candidates fill several blocks of a step
    assert auc.weighted_wins(draw, items).tobytes() == expected.tobytes()


def test_further_replicates_change_no_bit():
    items, draw = auc.sort_items(*judged("some ties")), Draw(2, 300, U, "jax")
    wins = auc.weighted_wins(draw, items)
    assert wins.shape == (300,)
    fewer = auc.weighted_wins(draw._replace(resamples=B, backend="numpy"), items)
    np.testing.assert_array_equal(wins[:B], fewer)


def many(units, candidates):
    """Candidates with scores of four digits, and their AUC's wins by whole numbers."""
    rng = np.random.default_rng(2)
    unit, level = rng.integers(0, units, candidates), rng.integers(0, 10_001, candidates)
    positive = rng.random(candidates) < level / 20_000

    def wins(weight):
        of = lambda side: np.bincount(level[side], weight[side], minlength=10_001).astype(np.int64)
        ups, downs = of(positive), of(~positive)
        return int(ups @ (2 * np.cumsum(downs) - downs)) / 2

    return unit, level / 10_000, positive, wins


def test_scan_is_exact_over_many_candidates():
    unit, score, positive, wins = many(3000, 200_000)
    items, draw = auc.sort_items(unit, score, positive), Draw(2, 2, 3000, "jax")
    found = auc.weighted_wins(draw, items)
    assert found.tolist() == [wins(row[unit]) for row in counts(draw)]
    assert found.min() > 2**32  # far more than float32 could count


def test_quadratic_form_is_exact_over_many_candidates():
    unit, score, positive, wins = many(100, 40_000)
    items, draw = auc.sort_items(unit, score, positive), Draw(2, 5, 100, "numpy")
    assert auc.weighted_wins(draw, items).tolist() == [wins(row[unit]) for row in counts(draw)]


def test_jackknife_is_exact_over_many_candidates():
    unit, score, positive, wins = many(3000, 200_000)
    found = auc.wins_without(auc.sort_items(unit, score, positive), 3000)
    for u in (0, 1500, 2999):
        assert found[u] == wins((unit != u).astype(int))
