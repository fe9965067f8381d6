"""Gains and limits: intervals decide, and what is missing or undecided holds."""

import numpy as np
import pytest

from cotrr.deploy import checks
from cotrr.deploy.checks import FAIL, HOLD, PASS, Check, Gain
from cotrr.deploy.policy import Limit
from cotrr.evaluate import figures

FIGURE = {"value": 0.9, "ci": [0.85, 0.95], "n": 100, "kind": "bootstrap"}


def gains(*parts, level=0.95, clusters=None):
    queries = len(parts[0][0])
    engine = figures.engine(queries, 0, 2000, clusters)
    family = [Gain(f"gain {i}", np.asarray(values, float), threshold)
              for i, (values, threshold) in enumerate(parts)]  # fmt: skip
    return checks.judge_gains(engine, family, level)


def normal(mean, queries=200, sd=0.2, seed=0):
    noise = np.random.default_rng(seed).normal(size=queries)
    return mean + sd * (noise - noise.mean()) / noise.std()


def test_a_gain_is_decided_on_either_side_or_left_open():
    said = lambda mean, threshold: gains((normal(mean), threshold))[0].verdict
    assert said(0.05, 0.0) == PASS
    assert said(-0.05, 0.0) == FAIL
    assert said(0.01, 0.0) == HOLD
    assert said(-0.005, -0.05) == PASS  # non-inferior
    assert said(0.05, 0.03) == HOLD  # better, but not by so much


def test_the_bound_is_the_value_less_errors_of_student_or_more():
    check = gains((normal(0.05), 0.0))[0]
    error = 0.2 / np.sqrt(199)
    assert check.value == pytest.approx(0.05)
    assert 0.05 - 1.9 * error < check.bound <= 0.05 - 1.6525 * error  # t of 199 at 95 %
    assert check.p < 1e-3


def test_more_queries_are_what_the_normal_theory_says():
    check = gains((normal(0.01), 0.0))[0]
    needed = ((1.6449 + 0.8416) * 0.2 * np.sqrt(200 / 199) / 0.01) ** 2
    assert check.more_queries == pytest.approx(needed - 200, abs=2)
    assert gains((normal(0.05), 0.0))[0].more_queries is None  # decided


def test_as_many_more_queries_do_decide_it():
    more = gains((normal(0.02), 0.0))[0]
    assert more.verdict == HOLD
    draw = lambda seed: np.random.default_rng(seed).normal(0.02, 0.2, 200 + more.more_queries)
    decided = [gains((draw(seed), 0.0))[0].verdict == PASS for seed in range(40)]
    assert 0.6 < np.mean(decided) < 0.95


def test_clusters_are_what_is_counted():
    values = np.repeat(normal(0.03, queries=25), 8)  # eight queries that say the same
    assert gains((values, 0.0))[0].verdict == PASS
    assert gains((values, 0.0), clusters=np.repeat(np.arange(25), 8))[0].verdict == HOLD


def test_holm_adjusts_a_family():
    alone = gains((normal(0.03), 0.0))[0]
    family = gains(*[(normal(0.03, seed=s), 0.0) for s in range(8)])
    assert alone.p < 0.05
    assert max(check.p for check in family) > alone.p
    assert all(check.p >= alone.p for check in family)


def test_too_few_units_hold_whatever_they_say():
    values = np.full(100, np.nan)
    values[:9] = 0.5
    check = gains((values, 0.0))[0]
    assert (check.verdict, check.bound, check.p) == (HOLD, None, None)
    assert "9 of at least 10" in check.why
    assert gains((np.full(100, np.nan), 0.0))[0].verdict == HOLD


def test_the_same_order_everywhere_passes_a_margin_only_with_enough_queries():
    same = lambda queries: gains((np.zeros(queries), -0.01))[0]
    assert same(100).verdict == HOLD  # (1 − 0.01)^100 = 0.37
    assert same(400).verdict == PASS  # 0.018
    assert same(400).p == pytest.approx(0.99**400)
    assert gains((np.zeros(400), 0.0))[0].verdict == HOLD  # nothing gained


def test_a_gain_knows_which_way_is_better():
    better = checks.gain_of("compliance@1", np.array([0.6]), np.array([0.5]))
    fewer = checks.gain_of("conflict_rate@1", np.array([0.2]), np.array([0.5]))
    np.testing.assert_allclose([better[0], fewer[0]], [0.1, 0.3])
    rounding = checks.gain_of("ndcg@10", np.array([0.5 + 1e-8]), np.array([0.5]))
    assert rounding[0] == 0


def test_a_fifth_fewer_conflicts_is_a_relative_gain():
    rng = np.random.default_rng(0)
    before, after = (rng.random((2, 2000)) < [[0.5], [0.42]]).astype(float)  # 16 % fewer
    values = checks.gain_of("conflict_rate@1", after, before, relative=0.2)
    assert values.mean() == pytest.approx(0.8 * before.mean() - after.mean())
    assert gains((values, 0.0))[0].verdict in (HOLD, FAIL)
    assert gains((checks.gain_of("conflict_rate@1", after * 0.5, before, 0.2), 0.0))[0].verdict == PASS


@pytest.mark.parametrize(("limit", "figure", "said"), [
    (Limit("conflict_auc", at_least=0.8), FIGURE, PASS),
    (Limit("conflict_auc", at_least=0.9), FIGURE, HOLD),
    (Limit("conflict_auc", at_least=0.96), FIGURE, FAIL),
    (Limit("conflict_ece", at_most=0.95), FIGURE, PASS),
    (Limit("conflict_ece", at_most=0.90), FIGURE, HOLD),
    (Limit("conflict_ece", at_most=0.80), FIGURE, FAIL),
    (Limit("conflict_auc", at_least=0.8), None, HOLD),
    (Limit("conflict_auc", at_least=0.8), {"value": None, "ci": None, "why": "one class"}, HOLD),
    (Limit("conflict_auc", at_least=0.8), FIGURE | {"ci": None}, HOLD),
])  # fmt: skip
def test_a_limit_goes_by_the_interval_and_a_missing_figure_never_passes(limit, figure, said):
    assert checks.judge_limit(limit, figure).verdict == said


def test_one_failure_rejects_and_anything_open_holds():
    one = lambda verdict: Check("x", verdict)
    assert checks.verdict([one(PASS), one(PASS)]) == "PROMOTE"
    assert checks.verdict([one(PASS), one(HOLD)]) == "HOLD"
    assert checks.verdict([one(HOLD), one(FAIL), one(PASS)]) == "REJECT"
    assert checks.verdict([]) == "HOLD"


@pytest.mark.parametrize("losers", [0, 1, 3, 4, 20])
def test_a_margin_that_few_queries_touch_is_decided_exactly(losers):
    values = np.zeros(5000)
    values[:losers] = -1.0
    assert gains((values, -0.01))[0].verdict == PASS
    few = gains((values[:150], -0.01))[0]  # too few queries, and it says how many more
    assert few.verdict == (FAIL if losers == 20 else HOLD)
    assert (few.more_queries is None) == (losers == 20 or losers / 150 >= 0.01)


def test_exactly_so_many_more_decide_a_margin():
    values = np.zeros(150)
    values[0] = -0.5
    more = gains((values, -0.02))[0].more_queries
    longer = np.concatenate([values, np.zeros(more)])
    longer[1 : round((150 + more) / 150)] = -0.5
    assert gains((longer, -0.02))[0].verdict == PASS


def test_units_that_all_say_the_same_leave_room_for_those_that_would_not():
    check = gains((np.full(100, 0.3), 0.2))[0]
    assert check.p == pytest.approx((1 - 0.1 / 1.3) ** 100)
