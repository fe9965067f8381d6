"""The gate: intervals decide, what is missing holds, and the log has its say."""

import json
import pathlib

import msgspec
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

import experiments
from cotrr.deploy import gate
from cotrr.deploy.gate import FAIL, HOLD, PASS, Check, Gain
from cotrr.deploy.policy import Limit, Policy, Superiority, read
from cotrr.deploy.registry import Draft
from cotrr.errors import InputError
from cotrr.evaluate import figures
from tests.deploy.small import make_registry

POLICIES = pathlib.Path(experiments.__file__).parent / "policies"
POLICY = Policy(name="p", description="", superiority=[Superiority("compliance@1")], maximum_looks=2)
FIGURE = {"value": 0.9, "ci": [0.85, 0.95], "n": 100, "kind": "bootstrap"}


def gains(*parts, level=0.95, clusters=None):
    queries = len(parts[0][0])
    engine = figures.engine(queries, 0, 2000, clusters)
    family = [Gain(f"gain {i}", np.asarray(values, float), threshold)
              for i, (values, threshold) in enumerate(parts)]  # fmt: skip
    return gate.judge_gains(engine, family, level)


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
    better = gate.gain_of("compliance@1", np.array([0.6]), np.array([0.5]))
    fewer = gate.gain_of("conflict_rate@1", np.array([0.2]), np.array([0.5]))
    np.testing.assert_allclose([better[0], fewer[0]], [0.1, 0.3])
    rounding = gate.gain_of("ndcg@10", np.array([0.5 + 1e-8]), np.array([0.5]))
    assert rounding[0] == 0


def test_a_fifth_fewer_conflicts_is_a_relative_gain():
    rng = np.random.default_rng(0)
    before, after = (rng.random((2, 2000)) < [[0.5], [0.42]]).astype(float)  # 16 % fewer
    values = gate.gain_of("conflict_rate@1", after, before, relative=0.2)
    assert values.mean() == pytest.approx(0.8 * before.mean() - after.mean())
    assert gains((values, 0.0))[0].verdict in (HOLD, FAIL)
    assert gains((gate.gain_of("conflict_rate@1", after * 0.5, before, 0.2), 0.0))[0].verdict == PASS


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
    assert gate.judge_limit(limit, figure).verdict == said


def test_one_failure_rejects_and_anything_open_holds():
    check = lambda verdict: Check("x", verdict)
    assert gate.verdict([check(PASS), check(PASS)]) == "PROMOTE"
    assert gate.verdict([check(PASS), check(HOLD)]) == "HOLD"
    assert gate.verdict([check(HOLD), check(FAIL), check(PASS)]) == "REJECT"
    assert gate.verdict([]) == "HOLD"


def test_a_test_set_is_its_candidates_and_labels_in_any_order():
    rows = [
        {"query_id": q, "id": i, "canonical_id": i, "label": "gold", "y": 0.5} for q in "ab" for i in "xy"
    ]
    of = lambda rows: gate.test_set(pa.Table.from_pylist(rows))
    assert of(rows) == of(rows[::-1])
    assert of(rows) != of([*rows[:-1], rows[-1] | {"y": 0.6}])
    assert of(rows) != of(rows[:-1])


def state_with(tmp_path, *drafts):
    registry = make_registry(tmp_path / "registry", versions=2)
    for draft in drafts:
        registry.append(lambda state, draft=draft: draft)
    return registry.state()


def look(**facts):
    return Draft(kind="judge", actor="a", version="v1", facts=facts)


def test_a_test_set_wears_out(tmp_path):
    state = state_with(tmp_path, look(test_set="t"), look(test_set="other"), look(test_set="t"))
    assert gate.looks(state, "t") == 2
    checks = lambda test: {c.check: c for c in gate._log_checks(state, state.version("v1"), "", POLICY, test)}
    assert checks("t")["fresh test set"].verdict == HOLD
    assert "fresh" in checks("t")["fresh test set"].why
    assert checks("other")["fresh test set"].verdict == PASS


def test_a_champion_that_changed_meanwhile_holds(tmp_path):
    state = state_with(tmp_path, Draft(kind="promote", actor="a", version="v2"))
    said = lambda champion: gate._log_checks(state, state.version("v1"), champion, POLICY, "t")[0].verdict
    assert said("v2") == PASS
    assert said("") == HOLD


def test_a_blocked_version_holds_until_a_canary_passes(tmp_path):
    block = lambda blocks: Draft(kind="canary", actor="a", version="v1", facts={"blocks": blocks})
    said = lambda state: gate._log_checks(state, state.version("v1"), "", POLICY, "t")[2].verdict
    assert said(state_with(tmp_path / "one", block(True))) == HOLD
    assert said(state_with(tmp_path / "two", block(True), block(False))) == PASS


def test_a_changed_policy_needs_a_new_name(tmp_path):
    state = state_with(tmp_path, look(policy="p", policy_hash=POLICY.digest))
    gate._refuse_changed_policy(state, POLICY)
    with pytest.raises(InputError, match="said something else"):
        gate._refuse_changed_policy(state, msgspec.structs.replace(POLICY, level=0.9))


@pytest.mark.parametrize(("verdict", "said"), [
    ("promote", PASS), ("rollback", FAIL), ("continue", HOLD), (None, HOLD), ([], HOLD),
])  # fmt: skip
def test_an_ab_test_has_its_say_if_it_compared_these_two(tmp_path, verdict, said):
    state = state_with(tmp_path, Draft(kind="promote", actor="a", version="v2"))
    one, two = state.versions
    told = {"candidate_version": one.model, "baseline_version": two.model, "verdict": verdict}
    of = lambda told, policy=POLICY: [c.verdict for c in gate._experiment_checks(policy, one, state, told)]
    assert of(told) == [said]
    assert of(told | {"baseline_version": "another"}) == [HOLD]
    assert of(told | {"candidate_version": two.model}) == [HOLD]
    assert of(None) == []
    assert of(None, msgspec.structs.replace(POLICY, experiment="required")) == [HOLD]


@pytest.mark.parametrize("name", ["standard", "step4"])
def test_the_policies_that_come_along_are_sound(name):
    policy = read(POLICIES / f"{name}.json", Policy)
    assert policy.name.startswith(name)
    assert policy.digest == read(POLICIES / f"{name}.json", Policy).digest


def test_step4s_own_criteria_are_a_policy():
    policy = read(POLICIES / "step4.json", Policy)
    first, second = policy.superiority
    assert (first.metric, first.above) == ("compliance@1", 0.03)
    assert (second.metric, second.relative) == ("conflict_rate@1", 0.2)
    assert policy.slices[0].margin == 0.05


@pytest.mark.parametrize(("change", "field"), [
    ({"level": 1.0}, "level"),
    ({"superiority": []}, "superiority"),
    ({"superiority": [{"metric": "accuracy"}]}, "metric"),
    ({"limits": [{"figure": "conflict_auc"}]}, "limits"),
    ({"limits": [{"figure": "conflict_auc", "at_least": 0.9, "at_most": 1.0}]}, "limits"),
    ({"surprise": 1}, "surprise"),
    ({"name": "../up"}, "name"),
    ({"minimum_clusters": 0}, "minimum_clusters"),
])  # fmt: skip
def test_a_policy_that_is_wrong_is_refused_by_field(tmp_path, change, field):
    path = tmp_path / "policy.json"
    path.write_text(json.dumps(msgspec.to_builtins(POLICY) | change))
    with pytest.raises(InputError, match=field) as caught:
        read(path, Policy)
    assert str(path) in str(caught.value)


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode)
       | st.dictionaries(st.sampled_from(["name", "level", "superiority", "limits"]),
                         st.none() | st.integers() | st.text(max_size=5) | st.lists(st.none(), max_size=2))
       .map(json.dumps).map(str.encode))  # fmt: skip
def test_garbage_is_no_policy(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "policy.json"
    path.write_bytes(content)
    with pytest.raises(InputError):
        read(path, Policy)
