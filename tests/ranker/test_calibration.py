"""Calibration: laws recovered, order kept, the right kind chosen, and intervals that cover."""

import copy
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, logit

from cotrr.ranker.calibration import (
    CALIBRATORS,
    KNOTS,
    LEVELS,
    WINDOW,
    choose,
    cross_fitted,
    fit,
    fit_beta,
    fit_intervals,
    fit_isotonic,
    fit_platt,
    query_quantile,
)
from cotrr.ranker.calibrators import Beta, Choice, Intervals, Isotonic, Platt, pack, unpack


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


@pytest.mark.parametrize("kind", CALIBRATORS)
@pytest.mark.parametrize("outcome", [0.0, 1.0])
def test_one_outcome_alone_gives_finite_parameters(kind, outcome):
    fitted = CALIBRATORS[kind](np.linspace(-3, 3, 20), np.full(20, outcome))
    assert all(np.isfinite(part).all() for part in fitted)
    assert 0 < abs(fitted(np.array(0.0)) - outcome) < 0.03


@pytest.mark.parametrize("law", [Beta(2.0, 0.5, -0.4), Beta(0.3, 1.5, 0.8), Beta(1.0, 1.0, 0.0)])
def test_beta_recovers_what_made_the_targets(law):
    logits = np.random.default_rng(0).normal(size=500) * 2
    np.testing.assert_allclose(fit_beta(logits, law(logits)), law, atol=2e-3)
    rng = np.random.default_rng(1)
    many = rng.normal(size=40_000) * 2
    fitted = fit_beta(many, (rng.uniform(size=40_000) < law(many)).astype(float))
    np.testing.assert_allclose(fitted, law, atol=0.12)


def test_beta_is_what_the_paper_writes():
    p = np.array([0.03, 0.4, 0.5, 0.99])
    expected = 1 / (1 + 1 / (np.exp(0.3) * p**2 / (1 - p) ** 0.7))  # Kull et al. 2017
    np.testing.assert_allclose(Beta(2, 0.7, 0.3)(logit(p)), expected)
    np.testing.assert_allclose(Beta(1.5, 1.5, 0.2)(logit(p)), Platt(1.5, 0.2)(logit(p)))
    assert np.isfinite(Beta(2, 3, 0.1)(np.array([-1e4, 1e4]))).all()  # where p rounds to 0 or 1


def test_beta_that_would_fall_is_held_at_zero():
    logits = np.linspace(-3, 3, 50)
    against = fit_beta(logits, expit(-2 * logits))
    assert min(against.a, against.b) == 0 and (np.diff(against(logits)) >= 0).all()


def test_isotonic_by_hand():
    # Sorted means 0, 0.6 (of three), 0.5, 1, 1: the second block pools (1.8 + 0.5) / 4.
    logits = np.array([5.0, 2, 0, 2, 3, 2, 4])
    targets = np.array([1.0, 0.6, 0, 0.2, 0.5, 1, 1])
    fitted = fit_isotonic(logits, targets)
    assert fitted.knots == (0, 2, 3, 4, 5)
    np.testing.assert_allclose(fitted.values, (1 / 16, 0.575, 0.575, 15 / 16, 15 / 16))
    at = np.array([[-9, 1, 2.5], [3.5, 4.5, 9]])
    middle = (1 / 16 + 0.575) / 2, (0.575 + 15 / 16) / 2
    np.testing.assert_allclose(fitted(at), [[1 / 16, middle[0], 0.575], [middle[1], 15 / 16, 15 / 16]])


def test_isotonic_recovers_what_made_the_targets():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=40_000)
    law = lambda logits: 0.1 + 0.3 * (logits > -0.5) + 0.5 * (logits > 0.7)
    fitted = fit_isotonic(logits, (rng.uniform(size=40_000) < law(logits)).astype(float))
    at = np.array([-1.5, -1, -0.6, -0.4, 0, 0.6, 0.8, 1.5])
    np.testing.assert_allclose(fitted(at), law(at), atol=0.03)


@pytest.mark.parametrize("kind", CALIBRATORS)
@settings(deadline=None)
@given(
    rows=st.lists(st.tuples(st.floats(-40, 40), st.floats(0, 1)), min_size=1, max_size=30),
    at=st.lists(st.floats(-100, 100), min_size=2),
)
def test_calibrators_never_fall_and_stay_probabilities(kind, rows, at):
    fitted = CALIBRATORS[kind](*np.array(rows).T)
    values = fitted(np.sort(at))
    assert (np.diff(values) >= -1e-12).all() and (values >= 0).all() and (values <= 1).all()
    assert fitted(np.reshape(at[:2], (2, 1))).shape == (2, 1)
    assert fitted == CALIBRATORS[kind](*np.array(rows).T)


def test_query_quantile_by_hand():
    # Four shares of 1/4: three queries and the new one; a query's share is spread over its rows.
    query, score = np.array([0, 2, 1, 0, 2]), np.array([-0.1, 0.5, 0.3, 0.2, 0.4])
    for coverage, margin in (
        (0.1, -0.1),
        (0.25, 0.2),
        (0.26, 0.3),
        (0.5, 0.3),
        (0.51, 0.4),
        (0.75, 0.5),
        (0.76, 1.0),
    ):
        assert query_quantile(query, score, coverage) == margin, coverage


def test_the_quantile_is_infinite_where_queries_are_too_few():
    score = np.full(200, -0.01)
    assert query_quantile(np.arange(200) % 18, score) == 1.0
    assert query_quantile(np.arange(200) % 19, score) == -0.01


@pytest.fixture
def folded():
    """Logits, targets that follow them differently in each fold, and three folds of uneven size."""
    rng = np.random.default_rng(0)
    fold, logits = rng.choice([4, 0, 7], 90, p=[0.5, 0.3, 0.2]), rng.normal(size=90)
    return logits, expit((1 + fold) * logits + rng.normal(size=90)), fold


@pytest.mark.parametrize("kind", CALIBRATORS)
def test_cross_fitted_values_by_hand(folded, kind):
    (logits, targets, fold), one = folded, CALIBRATORS[kind]
    values = cross_fitted(logits, targets, fold, one)
    assert values.shape == (90,)
    for k in (0, 4, 7):
        rest = one(logits[fold != k], targets[fold != k])
        np.testing.assert_array_equal(values[fold == k], rest(logits[fold == k]))
    everyone = one(logits, targets)(logits)
    assert np.abs(values - everyone).max() > 0.01
    # A single fold has no other to learn from.
    np.testing.assert_array_equal(cross_fitted(logits, targets, np.full(90, 3), one), everyone)
    if kind == "platt":
        np.testing.assert_array_equal(cross_fitted(logits, targets, fold), values)


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


def test_query_quantile_covers_a_new_querys_candidate():
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(1500):
        query, residual = clustered(rng, 40)
        margin = query_quantile(query, residual)
        other, new = clustered(rng, 20)
        covered.append(np.mean([np.mean(new[other == q] <= margin) for q in range(20)]))
    assert 0.945 < np.mean(covered) < 0.95 + 1 / 41 + 0.01


LAWS = {
    "platt": Platt(1.3, -0.5),
    "beta": Beta(2.5, 0.3, 0.5),
    "isotonic": lambda logits: 0.1 + 0.35 * (logits > -1) + 0.5 * (logits > 1),
}


@pytest.mark.parametrize("kind", LAWS)
@pytest.mark.parametrize("outcomes", [True, False])
def test_choose_picks_the_kind_of_the_law(kind, outcomes):
    rng = np.random.default_rng(0)
    logits, fold = rng.normal(size=6000) * 2, rng.integers(5, size=6000)
    targets = LAWS[kind](logits)
    targets = (rng.uniform(size=6000) < targets).astype(float) if outcomes else targets
    fitted, choice = choose(logits, targets, fold)
    assert choice.kind == kind and list(choice.log_loss) == list(CALIBRATORS)
    assert fitted == CALIBRATORS[kind](logits, targets)  # of all rows
    for one, loss in choice.log_loss.items():
        values = cross_fitted(logits, targets, fold, CALIBRATORS[one])
        expected = -np.mean(targets * np.log(values) + (1 - targets) * np.log(1 - values))
        assert loss == pytest.approx(expected)
        assert loss >= choice.log_loss[kind] - 1e-4


def test_choose_has_platt_alone_where_nothing_judges():
    logits = np.random.default_rng(0).normal(size=500) * 2
    targets = LAWS["isotonic"](logits)
    fitted, choice = choose(logits, targets, np.full(500, 2))
    assert fitted == fit_platt(logits, targets) and list(choice.log_loss) == ["platt"]
    assert choice.kind == "platt" and choose(logits, targets, np.arange(500) % 2)[1].kind == "isotonic"


def test_choose_is_finite_where_a_fold_contradicts_the_others():
    logits = np.linspace(-30, 30, 40)
    _, choice = choose(logits, np.where(np.arange(40) % 2, logits > 0, logits < 0) * 1.0, np.arange(40) % 2)
    assert np.isfinite(list(choice.log_loss.values())).all()


def lists(rng, queries, rows=20):
    """Most candidates are hopeless; the middle is uncertain, and errors inside a list go together."""
    query = np.repeat(np.arange(queries), rows)
    label = rng.beta(0.5, 2, len(query))
    error = 0.7 * rng.normal(size=queries)[query] + 0.7 * rng.normal(size=len(query))
    return query, label, np.clip(label + 0.8 * label * (1 - label) * error, 0, 1)


def test_intervals_cover_new_queries_and_are_narrow_where_labels_are_sure():
    rng = np.random.default_rng(0)
    covered, hopeless, middle = [], [], []
    for _ in range(200):
        query, label, y = lists(rng, 60)
        intervals = fit_intervals(label, y, query, query % 4)
        _, new, truth = lists(rng, 30)
        low, high = intervals(new)
        covered.append(np.mean((low <= truth) & (truth <= high)))
        hopeless.append(np.ptp(intervals(np.array(0.005))))
        middle.append(np.ptp(intervals(np.array(0.5))))
    assert 0.93 < np.mean(covered) < 0.98
    assert np.mean(hopeless) < 0.25 * np.mean(middle)


def test_intervals_of_labels_on_few_values_hold_no_more_than_they_claim():
    # A margin around quantiles of such labels is either nothing or a whole step, and holds .98 here.
    rng = np.random.default_rng(0)

    def draw(queries):
        label = rng.beta(1, 2, (queries, 20))
        y = rng.binomial(4, np.clip(label + 0.15 * rng.normal(size=(queries, 1)), 0, 1)) / 4
        return np.repeat(np.arange(queries), 20), label.ravel(), y.ravel()

    covered = []
    for _ in range(30):
        query, label, y = draw(150)
        intervals = fit_intervals(label, y, query, query % 4)
        _, new, truth = draw(150)
        low, high = intervals(new)
        covered.append(np.mean((low <= truth) & (truth <= high)))
    assert 0.945 < np.mean(covered) < 0.965


def test_intervals_by_hand():
    intervals = Intervals((0.2, 0.6), (0.1, 0.3), (0.3, 0.9))
    low, high = intervals(np.array([[0.0, 0.2], [0.4, 1.0]]))
    np.testing.assert_allclose(low, [[0.1, 0.1], [0.2, 0.3]])
    np.testing.assert_allclose(high, [[0.3, 0.3], [0.6, 0.9]])


def ends(y):
    """Low and high ends by level; a label takes few values, and so do its quantiles."""
    low = np.quantile(y, LEVELS / 2, method="inverted_cdf")
    return low, np.quantile(y, 1 - LEVELS / 2, method="inverted_cdf")


@pytest.mark.parametrize("folds", [1, 3])
def test_the_level_is_that_of_curves_from_other_folds(folds):
    query, label, y = lists(np.random.default_rng(0), 40, rows=2)
    label[:], y = 0.5, np.round(y, 2)  # equal labels: a single window
    fold = query % folds
    half = fold if folds > 1 else query % 2  # a single fold is halved by query
    score = np.empty(80)
    for k in np.unique(half):
        low, high = ends(y[half != k])
        held = (low <= y[half == k, None]) & (y[half == k, None] <= high)
        assert (np.diff(held.astype(int)) <= 0).all()  # nested
        score[half == k] = 1 - held.mean(axis=1)
    level = round((1 - query_quantile(query, score, 0.9)) * len(LEVELS)) - 1
    assert 0 < level < len(LEVELS) - 1
    intervals = fit_intervals(label, y, query, fold, coverage=0.9)
    low, high = (end[level] for end in ends(y))
    np.testing.assert_allclose(intervals, [[0.5], [low], [high]], atol=2e-6)


def test_interval_curves_are_quantiles_of_the_rows_around():
    rng = np.random.default_rng(0)
    label = np.arange(4000) / 4000
    y = np.clip(label + 0.2 * rng.uniform(-1, 1, 4000), 0, 1)
    query = rng.integers(400, size=4000)
    intervals = fit_intervals(label, y, query, query % 5)
    at = np.linspace(0, 3999, KNOTS).round().astype(int)
    half = round(WINDOW * np.sqrt(4000) / 2)
    np.testing.assert_allclose(intervals.knots, label[at])
    inside = slice(10, 40)  # where the quantiles rise by themselves
    by_level = np.array([ends(y[k - half : k + half]) for k in at[inside]])  # [K, 2, M]
    apart = by_level - np.array([intervals.low[inside], intervals.high[inside]]).T[..., None]
    assert np.abs(apart).max(axis=1).mean(axis=0).min() < 2e-3  # at one level, but for a reversal or two
    assert np.isin(np.array(intervals.low[inside]), np.floor(y * 1e6) / 1e6).mean() > 0.8


def test_labels_on_an_end_are_held_whatever_rounding_did():
    y = np.float32(0.7338460107644399) * np.ones(400)  # as labels are kept
    query = np.arange(400) % 40
    intervals = fit_intervals(np.linspace(0.1, 0.9, 400), y, query, query % 5)
    low, high = intervals(np.linspace(0, 1, 77))
    assert (low <= y[0]).all() and (y[0] <= high).all() and (high - low < 3e-6).all()


def test_intervals_of_one_query_are_the_whole_range():
    intervals = fit_intervals(np.full(3, 0.4), np.array([0.4, 0.5, 0.3]), np.zeros(3), np.zeros(3))
    assert intervals == Intervals((0.4,), (0.0,), (1.0,))


@settings(deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.sampled_from([0, 0.1, 0.25, 0.7, 1.0]) | st.floats(0, 1), st.floats(0, 1)),
        min_size=1,
        max_size=15,
    ),
    copies=st.integers(1, 80),
    folds=st.integers(1, 4),
    at=st.lists(st.floats(0, 1), min_size=1),
)
def test_intervals_never_cross_and_their_curves_never_fall(rows, copies, folds, at):
    label, y = np.tile(np.array(rows).T, copies)  # ties everywhere
    query = np.arange(len(y)) % 37
    intervals = fit_intervals(label, y, query, query % folds)
    for curve in intervals:
        assert list(curve) == sorted(curve) and 1 <= len(curve) <= KNOTS
    low, high = intervals(np.array(at))
    assert (low >= 0).all() and (low <= high).all() and (high <= 1).all()


@pytest.fixture
def heads():
    """Arguments of `fit`: 30 queries of 10 rows, and a conflict that some rows do not know."""
    rng = np.random.default_rng(0)
    query, rank, conflict = np.repeat(np.arange(30), 10), rng.normal(size=300), rng.normal(size=300)
    y = np.clip(expit(2 * rank - 1) + rng.uniform(-0.1, 0.1, 300), 0, 1)
    is_conflict = expit(0.5 * conflict + 0.3)
    is_conflict[:50] = np.nan
    return rank, conflict, y, is_conflict, query, query % 3


def test_fit_takes_each_head_and_the_cross_fitted_label(heads):
    rank, conflict, y, is_conflict, query, fold = heads
    fitted = fit(*heads)
    assert (fitted.rank, fitted.choices["rank"]) == choose(rank, y, fold)
    assert (fitted.conflict, fitted.choices["conflict"]) == choose(conflict[50:], is_conflict[50:], fold[50:])
    np.testing.assert_allclose(fitted.conflict, (0.5, 0.3), atol=2e-3)
    np.testing.assert_allclose(fitted.rank(rank), expit(2 * rank - 1), atol=0.1)
    label = cross_fitted(rank, y, fold, CALIBRATORS[fitted.choices["rank"].kind])
    assert fitted.intervals == fit_intervals(label, y, query, fold) and fitted.queries == 30
    assert fitted.intervals != fit_intervals(fitted.rank(rank), y, query, fold)
    low, high = fitted.intervals(label)
    assert 0.93 < np.mean((low <= y) & (y <= high)) <= 1 and np.mean(high - low) < 0.6


def test_fit_without_a_known_conflict_keeps_that_heads_probabilities(heads):
    rank, conflict, y, _, query, fold = heads
    fitted = fit(rank, conflict, y, np.full(300, np.nan), query, fold)
    assert fitted.conflict == Platt(1.0, 0.0) and fitted.choices["conflict"] == Choice("platt", {})
    assert unpack(pack(fitted)) == fitted


@pytest.mark.parametrize(
    "calibrator", [Platt(1.7, -0.1), Beta(0.0, 1 / 3, 2.0), Isotonic((-1.5, 2.0), (0.1, 0.7))]
)
def test_what_is_packed_comes_back(heads, calibrator):
    fitted = fit(*heads)._replace(rank=calibrator)
    back = unpack(json.loads(json.dumps(pack(fitted), allow_nan=False)))
    assert back == fitted == unpack(pack(fitted))
    assert type(back.rank) is type(calibrator) and type(back.intervals) is Intervals
    assert all(type(choice) is Choice for choice in back.choices.values())


GARBAGE = [
    None,
    "x",
    [],
    {},
    3,
    True,
    float("nan"),
    10**400,
    [1.0, "x"],
    [2.0, 1.0],
    {"kind": "platt"},
    {"kind": []},
]
PLACES = [
    (),
    ("rank",),
    ("rank", "kind"),
    ("rank", "knots"),
    ("rank", "values"),
    ("conflict",),
    ("conflict", "slope"),
    ("conflict", "offset"),
    ("intervals",),
    ("intervals", "knots"),
    ("intervals", "low"),
    ("intervals", "high"),
    ("queries",),
    ("choices",),
    ("choices", "rank"),
    ("choices", "rank", "kind"),
    ("choices", "rank", "log_loss"),
    ("choices", "rank", "log_loss", "platt"),
]
# Garbage elsewhere, and good here.
FINE = {
    ("conflict", "slope"): [3],
    ("conflict", "offset"): [3],
    ("queries",): [3, 10**400],
    ("choices",): [{}],
    ("choices", "rank", "log_loss"): [{}],
    ("choices", "rank", "log_loss", "platt"): [3],
}


@pytest.fixture(scope="module")
def packed():
    return {
        "rank": {"kind": "isotonic", "knots": [0.0, 1.0], "values": [0.2, 0.3]},
        "conflict": {"kind": "platt", "slope": 1.0, "offset": 0.0},
        "intervals": {"knots": [0.2, 0.4], "low": [0.0, 0.1], "high": [0.3, 0.9]},
        "queries": 7,
        "choices": {"rank": {"kind": "isotonic", "log_loss": {"platt": 0.5}}},
    }


def put(facts, place, value):
    if not place:
        return value
    facts = copy.deepcopy(facts)
    inner = facts
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return facts


@pytest.mark.parametrize("place", PLACES, ids=".".join)
def test_unpack_refuses_garbage(packed, place):
    assert pack(unpack(packed)) == packed
    for value in GARBAGE:
        if any(value is fine or value == fine for fine in FINE.get(place, []) if type(value) is type(fine)):
            unpack(put(packed, place, value))
        else:
            with pytest.raises((KeyError, TypeError, ValueError)):
                unpack(put(packed, place, value))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("rank", "knots"), [0.0]),
        (("rank", "knots"), [0.0, float("inf")]),
        (("rank", "values"), [0.2, 1.2]),
        (("rank", "values"), [-0.2, 0.2]),
        (("rank",), {"kind": "isotonic", "knots": [], "values": []}),
        (("rank",), {"kind": "beta", "a": -0.1, "b": 1.0, "c": 0.0}),
        (("rank",), {"kind": "beta", "a": 1.0, "b": 1.0}),
        (("conflict", "slope"), -1.0),
        (("conflict", "slope"), 0.0),
        (("intervals", "high"), [0.3, 0.9, 1.0]),
        (("intervals", "high"), [0.3, 1.1]),
        (("intervals", "low"), [-0.1, 0.1]),
        (("intervals", "low"), [0.4, 0.4]),
        (("queries",), -1),
        (("queries",), 7.0),
        (("choices", "rank", "kind"), "spline"),
        (("choices", "rank", "log_loss", "spline"), 0.4),
    ],
)
def test_unpack_refuses_what_no_fit_makes(packed, place, value):
    with pytest.raises((KeyError, TypeError, ValueError)):
        unpack(put(packed, place, value))


@pytest.mark.parametrize("place", [place for place in PLACES if place], ids=".".join)
def test_unpack_misses_what_is_not_there(packed, place):
    if place[:1] == ("choices",) and place[-1] in ("rank", "platt"):
        return  # any number of them
    facts = copy.deepcopy(packed)
    inner = facts
    for key in place[:-1]:
        inner = inner[key]
    del inner[place[-1]]
    with pytest.raises(KeyError):
        unpack(facts)
