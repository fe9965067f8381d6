"""The canary: checks by hand, false alarms and planted changes, and the launcher with a registry."""

import json
import os
import pathlib
import shutil
import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cotrr.data import runs
from cotrr.data.lists import to_lists
from cotrr.deploy import canary, policy, sketches
from cotrr.deploy.canary import CanaryPolicy, Check, Probe, Seen
from cotrr.deploy.registry import Draft, Registry
from cotrr.errors import InputError
from cotrr.ranker import artifact
from cotrr.ranker.calibrators import Scored
from cotrr.ranker.model_files import parse
from cotrr.store import LocalStore
from experiments import canary as launcher
from experiments import terminal
from tests.commands import launch
from tests.conftest import scored_line
from tests.deploy.small import make_registry, model_files, promotion
from tests.deploy.test_sketches import NAMES, population, read

POLICY = CanaryPolicy(name="test")
SHIPPED = pathlib.Path(__file__).resolve().parents[2] / "experiments" / "policies" / "canary.json"
FAST = np.random.default_rng(0).lognormal(-1, 0.3, size=2000)


@pytest.fixture(scope="module")
def reference():
    return read(*population(80, np.random.default_rng(1)))


@pytest.fixture
def run():
    return population(80, np.random.default_rng(2))


def seen(run, reference, **more):
    parts = {"champion": None, "latencies": FAST, "baseline_latencies": FAST, "probe": None}
    return Seen(run[0], run[1], reference, **parts | more)


def alarms(checks):
    return [check for check in checks if check.verdict in ("warning", "critical")]


def with_attribute(lists, name, change):
    attributes = lists.attributes.copy()
    attributes[..., NAMES.index(name)] = change(attributes[..., NAMES.index(name)])
    return lists._replace(attributes=attributes)


def test_the_shipped_policy_is_step4s():
    found = policy.read(SHIPPED, CanaryPolicy)
    step4 = ("mean_drop_warning", "mean_drop_critical", "tail_drop_threshold", "confidence",
             "rolling_window", "minimum_runs", "block_on_critical")  # fmt: skip
    assert [getattr(found, name) for name in step4] == [0.03, 0.05, 0.05, 0.95, 7, 3, True]


VALUES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()


@given(st.dictionaries(st.sampled_from(CanaryPolicy.__struct_fields__) | st.text(max_size=3), VALUES))
def test_a_policy_is_read_or_refused_with_an_input_error(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "policy.json"
    path.write_text(json.dumps(value))
    try:
        found = policy.read(path, CanaryPolicy)
    except InputError:
        return
    assert found.drift_warning <= found.drift_critical and found.minimum_runs <= found.rolling_window


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"drift_warning": 0.9}, "drift_warning"),
        ({"minimum_runs": 8}, "minimum_runs"),
        ({"overlap_critical": 0.9}, "overlap_warning"),
        ({"confidence": 1.0}, "confidence"),
        ({"tpo_k": 3}, "tpo_k"),
    ],
)
def test_a_policy_that_contradicts_itself_is_refused(change, field, tmp_path):
    (tmp_path / "policy.json").write_text(json.dumps({"name": "bad"} | change))
    with pytest.raises(InputError, match=field):
        policy.read(tmp_path / "policy.json", CanaryPolicy)


def test_critical_comes_before_hold_and_hold_before_warning():
    check = lambda verdict: Check("c", verdict, None, None)
    assert canary.status(map(check, ["pass", "warning", "hold", "critical"])) == "critical"
    assert canary.status(map(check, ["pass", "warning", "hold"])) == "hold"
    assert canary.status([]) == "hold"


def test_a_grade_needs_size_and_a_change_beyond_chance():
    assert canary.grade(0.6, 0.2, 0.5, limit=0.5) == "critical"
    assert canary.grade(0.6, 0.2, 0.5, limit=0.7) == "pass"
    assert canary.grade(0.3, 0.2, 0.5, limit=0.1) == "warning"
    assert canary.grade(0.1, 0.2, 0.5, limit=0.01) == "pass"
    assert canary.grade(np.nan, 0.2, 0.5) == canary.grade(0.3, 0.2, 0.5, np.inf) == "hold"


def test_no_drift_raises_no_alarm_in_95_percent_of_runs():
    rng, raised = np.random.default_rng(4), []
    for _ in range(8):
        reference = read(*population(40, rng))
        raised += [
            bool(alarms(canary.drift_checks(reference, *population(40, rng), POLICY))) for _ in range(6)
        ]
    assert np.mean(raised) <= 0.05


def test_a_policy_may_ask_for_nothing_at_all():
    assert canary._graded("ties", 0.0, (0.0, 0.0), 0.0, "").verdict == "pass"
    assert canary._graded("rise", 0.1, (0.0, 0.0), 0.2, "").verdict == "hold"


def test_planted_drift_is_found_where_it_is(reference):
    run = population(80, np.random.default_rng(5), shift=2.0)  # of an sd of √3
    found = alarms(canary.drift_checks(reference, *run, POLICY))
    assert {check.feature for check in found} == {"brightness"}
    drift = {check.domain: check for check in found if check.name == "drift"}
    assert {*drift} == {"", "d0", "d1"} and drift[""].verdict == "critical"
    assert drift[""].value == pytest.approx(2 / np.sqrt(3), rel=0.25)


def test_a_lost_field_is_critical_and_its_drift_holds(reference, run):
    lists = with_attribute(run[0], "contrast", lambda values: np.full_like(values, np.nan))
    found = [c for c in canary.drift_checks(reference, lists, run[1], POLICY) if c.feature == "contrast"]
    told = {("fields", "critical"), ("missing rate", "critical"), ("drift", "hold")}
    assert {(c.name, c.verdict) for c in found} == told


def test_a_field_that_appears_is_a_warning_that_holds(run):
    empty = with_attribute(run[0], "contrast", lambda values: np.full_like(values, np.nan))
    reference = read(empty, run[1])
    found = [c for c in canary.drift_checks(reference, *run, POLICY) if c.feature == "contrast"]
    told = {("fields", "warning"), ("missing rate", "warning"), ("drift", "hold")}
    assert {(c.name, c.verdict) for c in found} == told
    again = canary.drift_checks(reference, empty, run[1], POLICY)
    assert {c.verdict for c in again if c.feature == "contrast"} == {"pass"}


def test_fields_that_appear_and_vanish_are_named_but_for_what_was_rare(reference, run):
    lost = lambda lists: lists._replace(text=np.full_like(lists.text, np.nan))
    fields = lambda reference, lists: [
        (c.verdict, c.feature) for c in canary.drift_checks(reference, lists, run[1], POLICY)
        if c.name == "fields"]  # fmt: skip
    assert fields(reference, run[0]) == [("pass", "")]
    assert fields(reference, lost(run[0])) == [("critical", "text_embedding")]
    assert fields(read(lost(run[0]), run[1]), run[0]) == [("warning", "text_embedding")]
    seldom = lambda values: np.where(np.arange(80)[:, None] == 0, values, np.nan)
    rare = with_attribute(run[0], "contrast", seldom)
    without = with_attribute(run[0], "contrast", lambda values: np.full_like(values, np.nan))
    assert fields(read(rare, run[1]), without) == [("pass", "")]  # it was there in one query of 80


def test_what_is_large_but_may_be_chance_holds(reference):
    rng, few = np.random.default_rng(11), {"queries": 5, "n": 8}
    policy = CanaryPolicy(name="test", minimum_queries=5)
    found = canary.drift_checks(reference, *population(rng=rng, shift=2.0, **few), policy)
    moved = {c.name: c for c in found if (c.feature, c.domain) == ("brightness", "")}
    assert moved["drift"].value > POLICY.drift_critical and moved["drift"].verdict == "hold"
    assert "not beyond chance" in moved["drift"].why
    found = canary.drift_checks(reference, *population(rng=rng, **few), policy)
    held = [c.value for c in found if c.verdict == "hold" and c.value is not None]
    assert min(held, default=1.0) >= POLICY.divergence_warning


@pytest.mark.parametrize(
    ("limit", "share", "verdict"),
    [(1.0, 0.06, "hold"), (0.9, 0.06, "pass"), (1.0, 0.04, "pass"), (0.9, 0.2, "hold")],
)
def test_a_divergence_that_cannot_be_beyond_chance_holds(reference, monkeypatch, limit, share, verdict):
    found = sketches.Drift(0.0, 0.1, share, limit, 0.0)
    monkeypatch.setattr(sketches, "drift", lambda *_: found)
    checks = canary.feature_checks(reference.overall.features["brightness"], np.ones((9, 3)), 0.95, POLICY)
    assert [c.verdict for c in checks] == ["pass", verdict]


def test_a_missing_rate_that_rises_in_few_queries_holds(reference):
    lists, scored = population(5, np.random.default_rng(12), n=8)
    gone = with_attribute(lists, "contrast", lambda v: np.where(np.arange(5)[:, None] < 2, np.nan, v))
    found = canary.drift_checks(reference, gone, scored, CanaryPolicy(name="test", minimum_queries=5))
    (rate,) = [c for c in found if (c.name, c.feature, c.domain) == ("missing rate", "contrast", "")]
    assert rate.verdict == "hold" and rate.value > POLICY.missing_critical


def test_what_leaves_a_constant_is_found(reference, run):
    lists = with_attribute(run[0], "soft_conflicts", lambda values: np.where(values == 0, 3.0, values))
    found = canary.drift_checks(reference, lists, run[1], POLICY)
    assert {c.verdict for c in found if c.feature == "soft_conflicts" and c.name == "drift"} == {"critical"}
    one = lists.attributes[..., NAMES.index("soft_conflicts")].copy()
    one[1:] = np.where(np.isnan(one[1:]), np.nan, 0.0)  # a single query: chance
    lists = with_attribute(lists, "soft_conflicts", lambda _: one)
    assert not alarms(canary.drift_checks(reference, lists, run[1], POLICY))


def test_new_lost_and_small_domains(reference, run):
    domain = np.where(run[0].domain == "d1", "purple", "d0").astype(object)
    found = canary.drift_checks(reference, run[0]._replace(domain=domain), run[1], POLICY)
    verdicts = {(c.name, c.domain): c.verdict for c in found if not c.feature}
    assert verdicts[("domain", "purple")] == "warning" and verdicts[("domain", "d1")] == "hold"
    few = np.flatnonzero((run[0].domain == "d0") | (np.arange(80) < 6))
    part = run[0].take(few), Scored(*(values[few] for values in run[1]))
    found = canary.drift_checks(reference, *part, POLICY)
    small = [c for c in found if c.domain == "d1" and c.name == "drift"]
    assert [(c.verdict, c.feature) for c in small] == [("hold", "")] and "3 queries" in small[0].why


def test_missing_data_holds(reference, run):
    assert canary.status(canary.judge(seen(run, reference), POLICY)) == "pass"
    for lack in ({"reference": None}, {"latencies": None}, {"probe": Probe({}, [])}):
        checks = canary.judge(seen(run, reference)._replace(**lack), POLICY)
        assert canary.status(checks) == "hold" and not alarms(checks), lack
    strict = CanaryPolicy(name="test", minimum_queries=81)
    assert canary.status(canary.judge(seen(run, reference), strict)) == "hold"


def test_a_version_that_cannot_score_is_critical(reference, run):
    broken = Scored(*(np.full(part.shape, np.nan) for part in run[1]))
    checks = canary.judge(seen((run[0], broken), reference), POLICY)
    assert {c.name for c in checks if c.verdict == "critical"} == {"finite scores", "missing rate"}


def test_first_and_tied_by_hand():
    scores = np.array([[3.0, 1.0, 2.0, 9.0], [1.0, 1.0, 0.0, 9.0]])
    where = np.array([[True, True, True, False]] * 2)
    np.testing.assert_array_equal(canary.first(scores, where, 2), [[1, 0, 1, 0], [1, 1, 0, 0]])
    assert canary.tied(scores, where, 1).tolist() == [False, True]
    assert canary.tied(np.array([[2.0, 1.0, 1.0, 0.0]]), np.ones((1, 4), bool), 1).tolist() == [False]
    assert canary.tied(np.full((1, 3), -np.inf), np.zeros((1, 3), bool), 2).tolist() == [False]


def test_ties_and_lists_of_one(run):
    lists, scored = run
    tied = scored._replace(logit=np.where(lists.where, 0.0, -np.inf))
    by_name = {c.name: c for c in canary.ranking_checks(lists, tied, None, POLICY)}
    assert by_name["ties"].verdict == "critical" and by_name["ties"].value == 1
    single = lists._replace(where=lists.where & (np.arange(10) == 0))
    by_name = {c.name: c for c in canary.ranking_checks(single, scored, None, POLICY)}
    assert by_name["single candidates"].value == 1


def test_overlap_with_the_champion(run):
    lists, scored = run
    check = lambda champion: {c.name: c for c in canary.ranking_checks(lists, scored, champion, POLICY)}
    assert check(scored)["overlap"].value == 1
    backwards = scored._replace(logit=np.where(lists.where, -scored.logit, -np.inf))
    found = check(backwards)["overlap"]
    size = lists.where.sum(axis=1)  # 10, 9 or 8 candidates: the first five and the last share 0, 1, 2
    assert found.value == pytest.approx(np.mean(10 - size) / 5) and found.verdict == "warning"
    assert check(scored._replace(logit=np.full_like(scored.logit, np.nan)))["overlap"].verdict == "hold"


def test_conflicts_that_rise_to_the_top_are_found(run):
    scored = run[1]
    some = np.nan_to_num(scored.logit, neginf=0.0) * 7 % 1 < 0.4
    lists = with_attribute(run[0], "strong_conflicts", lambda values: values + some)
    strong = lists.attributes[..., NAMES.index("strong_conflicts")] > 0
    scored = scored._replace(p_conflict=np.where(strong, 0.8, 0.0))
    worse = scored._replace(logit=np.where(lists.where, scored.logit + 9 * strong, -np.inf))
    for champion, verdict in ((scored, "critical"), (worse, "pass")):
        found = canary.ranking_checks(lists, worse, champion, POLICY)
        assert [c.verdict for c in found if "conflict" in c.name] == [verdict, verdict]
    k = canary.first(worse.logit, lists.where, 5), canary.first(scored.logit, lists.where, 5)
    rise = np.mean([canary._mean_in(chosen, scored.p_conflict) for chosen in k], axis=1) @ [1, -1]
    found = {c.name: c.value for c in canary.ranking_checks(lists, worse, scored, POLICY)}
    assert found["p_conflict@5"] == pytest.approx(rise)


def test_the_budget_is_an_exact_binomial_test():
    for above, verdict in ((60, "pass"), (80, "critical")):
        slow = np.r_[np.full(above, 2.0), np.full(1000 - above, 0.1)]
        found = canary.latency_checks(slow, None, POLICY)[0]
        p = stats.binomtest(above, 1000, 0.05, alternative="greater").pvalue
        assert found.verdict == verdict and found.value == above / 1000 and f"p = {p:.2g}" in found.why


def test_exceedance_by_hand_and_by_simulation():
    # Of 1 + 1 exchangeable requests the new one is above the largest old one in half of the orders.
    assert canary.exceedance(np.array([2.0]), np.array([1.0]), 0.01) == (1, 1.0, pytest.approx(0.5))
    rng = np.random.default_rng(6)
    p = [
        canary.exceedance(rng.exponential(size=400), rng.exponential(size=400), 0.01)[2] for _ in range(2000)
    ]
    assert np.mean(np.array(p) < 0.05) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 2000)


def test_two_percent_of_requests_eight_times_slower_are_found():
    rng, found, false = np.random.default_rng(7), [], []
    for _ in range(200):
        baseline, fresh = rng.lognormal(-1.2, 0.25, size=(2, 2000))
        slow = np.where(rng.uniform(size=2000) < 0.02, 8 * fresh, fresh)
        critical = lambda times, old=baseline: bool(alarms(canary.latency_checks(times, old, POLICY)))
        found.append(critical(slow))
        false.append(critical(fresh))
    assert np.mean(found) >= 0.95 and np.mean(false) <= 0.05


def test_slow_requests_are_found_without_a_baseline():
    rng, found, false = np.random.default_rng(8), [], []
    for _ in range(200):
        fresh = rng.lognormal(-1.2, 0.25, size=2000)
        slow = np.where(rng.uniform(size=2000) < 0.02, 8 * fresh, fresh)
        check = lambda times: canary.latency_checks(times, None, POLICY)[1]
        found.append(check(slow).verdict == "critical")
        false.append(check(fresh).verdict == "critical")
    assert np.mean(found) >= 0.9 and np.mean(false) == 0
    above, p = int((slow > 4 * np.median(slow)).sum()), check(slow).why.split("p = ")[1]
    assert p == f"{stats.binomtest(above, 2000, 0.01, alternative='greater').pvalue:.2g}"


def test_a_clock_that_is_too_coarse_holds():
    assert [c.verdict for c in canary.latency_checks(np.arange(900.0) // 600, None, POLICY)] == ["hold"]


def test_few_requests_hold():
    assert canary.latency_checks(FAST[:299], None, POLICY)[0].verdict == "hold"
    assert canary.latency_checks(FAST, FAST[:299], POLICY)[0].verdict == "hold"


def probe_run(rng, queries=200, drop=0.0, names="q"):
    """Compliance@1 of the same queries in each call, but for a little noise and a drop."""
    base = np.linspace(0.3, 1.0, queries)
    values = base + rng.normal(size=queries) * 0.02 - drop
    return {f"{names}{i}": float(value) for i, value in enumerate(values)}


@pytest.mark.parametrize(("drop", "verdict"), [(0.0, "pass"), (0.04, "warning"), (0.08, "critical")])
def test_a_probe_against_its_rolling_baseline(drop, verdict):
    rng = np.random.default_rng(8)
    before = [probe_run(rng, drop=0.5)] + [probe_run(rng) for _ in range(7)]  # the first is out of the window
    mean, tail = canary.probe_checks(Probe(probe_run(rng, drop=drop), before), POLICY)
    assert mean.verdict == verdict and mean.value == pytest.approx(drop, abs=0.005)
    assert tail.verdict == ("warning" if drop == 0.08 else "pass")


def test_paired_queries_decide_what_independent_ones_cannot():
    rng = np.random.default_rng(9)
    before = [probe_run(rng) for _ in range(3)]
    paired, _ = canary.probe_checks(Probe(probe_run(rng, drop=0.055), before), POLICY)
    other, _ = canary.probe_checks(Probe(probe_run(rng, queries=40, drop=0.06, names="x"), before), POLICY)
    assert paired.verdict == "critical" and other.verdict == "hold"
    assert "large, but not beyond chance" in other.why


def test_a_short_history_holds():
    rng = np.random.default_rng(10)
    checks = canary.probe_checks(Probe(probe_run(rng), [probe_run(rng)] * 2), POLICY)
    assert {c.verdict for c in checks} == {"hold"} and "2 of at least 3" in checks[0].why


def result(verdict, probe=None, blocks=True, run="r", **policy):
    checks = [Check("probe compliance@1" if probe else "c", verdict, 0.1, None)]
    kept = CanaryPolicy(**{"name": f"test-{blocks}", "block_on_critical": blocks} | policy)
    facts = {"run": run, "version": "v1", "model": "m"}
    return canary.report(checks, kept, "scheduled", Probe(probe, []) if probe else None, facts)


def made(day):
    return canary.run_time({"created_at": f"2026-01-0{day}T00:00:00"})


def test_only_a_better_verdict_gets_rid_of_a_block(tmp_path):
    registry = make_registry(tmp_path, versions=1)
    for verdict, blocked in (("hold", False), ("critical", True), ("hold", True), ("warning", False)):
        canary.record(registry, "v1", result(verdict), "tester", made(1))
        assert ("v1" in registry.state().blocked) == blocked, verdict
    canary.record(registry, "v1", result("critical", blocks=False), "tester")
    assert not registry.state().blocked


def test_only_a_run_that_is_not_older_gets_rid_of_a_block(tmp_path):
    registry = make_registry(tmp_path, versions=1)
    for verdict, at, blocked in (("critical", made(2), True), ("pass", made(1), True), ("pass", "", True),
                                 ("critical", "", True), ("pass", made(1), True), ("pass", made(2), False),
                                 ("critical", made(9).replace("2026", "2999"), True),
                                 ("pass", made(2), False)):  # fmt: skip
        canary.record(registry, "v1", result(verdict), "tester", at)
        assert ("v1" in registry.state().blocked) == blocked, (verdict, at)


def test_when_a_run_was_made():
    time = lambda text: canary.run_time({"created_at": text})
    assert time("2026-01-01T02:00:00+02:00") == time("2026-01-01") == "2026-01-01T00:00:00.000000+00:00"
    assert canary.run_time(None) == time("") == time("yesterday") == time("0001-01-01T00:00:00+09:00") == ""


def test_a_canary_logs_its_policy_and_a_changed_one_needs_a_new_name(tmp_path):
    registry = make_registry(tmp_path, versions=1)
    event = canary.record(registry, "v1", result("critical"), "tester", made(1))
    policy = CanaryPolicy(name="test-True")
    assert (event.facts["policy"], event.facts["policy_hash"]) == (policy.name, policy.digest)
    with pytest.raises(InputError, match="'test-True' said something else in event 2"):
        canary.record(registry, "v1", result("pass", drift_critical=9.0), "tester", made(2))
    assert registry.state().blocked == {"v1"}
    canary.record(registry, "v1", result("hold", name="test-2", drift_critical=9.0), "tester", made(2))


def test_the_baseline_is_of_what_was_live_without_critical_drops(tmp_path):
    registry = make_registry(tmp_path, versions=2)
    registry.append(lambda _: promotion(registry, "v1"))
    for i, (label, verdict) in enumerate([("v1", "pass"), ("v2", "pass"), ("v1", "critical"), ("v1", "hold"),
                                          ("v1", "warning"), ("v1", "pass")]):  # fmt: skip
        name = f"r{min(i, 4)}"  # the last two are of one run
        canary.record(registry, label, result(verdict, {"q": float(i)}, run=name), "tester")
    canary.record(registry, "v1", result("pass"), "tester")  # without a probe
    found = lambda *more: [run["q"] for run in canary.earlier_probes(registry, registry.state(), *more)]
    assert found(7) == [0, 3, 5] and found(2) == [3, 5] and found(7, "r4") == [0, 3]


def test_the_report_says_what_was_decided(reference, run):
    checks = canary.judge(seen(run, reference), POLICY)
    checks.append(Check("x|y", "critical", 0.5, 0.1, "why", "d", "f"))
    facts = {"run": "r", "version": "v1", "model": "m", "notices": ["look"]}
    made = canary.report(checks, POLICY, "source_sync", None, facts)
    assert made["status"] == "critical" and made["block"] == {"blocks": True, "rolls_back": False}
    assert made["counts"]["critical"] == 1 and made["thresholds"]["mean_drop_critical"] == 0.05
    text = canary.markdown(made)
    assert "| critical | x\\|y | f | d | 0.5 | 0.1 | why |" in text and "Note: look" in text


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A registry whose v1 knows a run of 24 queries, and v2 is live; a policy that rolls back."""
    folder = tmp_path_factory.mktemp("canary")
    lines = [scored_line(q, (q * 5 + i) % 60, dim=6, brightness=round(0.3 + (q * 7 + i * 3) % 20 / 100, 3))
             for q in range(24) for i in range(8)]  # fmt: skip
    (folder / "run.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "ms.jsonl").write_text('{"ms": 0.4}\n' * 400)
    lists = to_lists(runs.read_run(folder / "run.jsonl").table)
    registry = make_registry(folder / "registry")
    for number in (1, 2):
        content = model_files(number)
        model = artifact.assemble(parse(content, "model"))
        known = json.dumps(sketches.sketch(lists, artifact.score(model, lists))).encode()
        registry.register({**content, "reference.json": known}, {}, "tester")
        registry.append(lambda _, n=number: promotion(registry, f"v{n}"))
    bright = [line | {"brightness": line["brightness"] + 0.4} for line in lines]
    (folder / "bright.jsonl").write_text("".join(json.dumps(line) + "\n" for line in bright))
    (folder / "policy.json").write_text(json.dumps({"name": "p", "roll_back_on_critical": True}))
    return folder, registry


def flags(folder, run, **more):
    given = {"run": folder / run, "registry": folder / "registry", "output": folder / "out",
             "latencies": folder / "ms.jsonl", "actor": "tester", **more}  # fmt: skip
    return [f"--{name}={value}" for name, value in given.items()]


def test_the_launcher_passes_what_has_not_changed(place):
    folder, registry = place
    launch("canary", *flags(folder, "run.jsonl", version="v1", trigger="model_change"))
    made = json.loads((folder / "out" / "canary.json").read_text())
    assert made["status"] == "pass" and made["trigger"] == "model_change" and made["champion"] == "v2"
    assert (folder / "out" / "canary.md").read_text().startswith("# Canary: pass")
    event = registry.state().events[-1]
    assert (event.kind, event.version, event.facts["verdict"]) == ("canary", "v1", "pass")
    assert registry.evidence(event.evidence["canary"]) == made
    logs = EventAccumulator(str(folder / "out" / "tensorboard"))
    logs.Reload()
    assert {"status", "drift/all/brightness", "overlap/all"} <= set(logs.Tags()["scalars"])


def test_the_launcher_rolls_back_where_the_policy_says_so(place):
    folder, registry = place
    said = launch("canary", *flags(folder, "bright.jsonl", policy=folder / "policy.json"), fails=1)
    assert "rolled back from v2" in said and "brightness" in said
    state = registry.state()
    assert state.champion == "v1" and state.blocked == {"v2"} and state.events[-1].kind == "rollback"


def test_the_launcher_holds_without_a_reference(place, tmp_path):
    folder, _ = place
    make_registry(tmp_path / "registry", versions=1)
    launch("canary", *flags(folder, "run.jsonl", registry=tmp_path / "registry", version="v1",
                            output=tmp_path / "out"), fails=3)  # fmt: skip
    held = json.loads((tmp_path / "out" / "canary.json").read_text())["checks"]
    assert [c["name"] for c in held if c["verdict"] == "hold"] == ["drift"]


@pytest.fixture
def here(place, tmp_path, monkeypatch):
    """The launcher in this process, on a copy of the registry: its exit status, the output, the registry."""
    folder, _ = place
    shutil.copytree(folder / "registry", tmp_path / "registry")
    registry = Registry(LocalStore(tmp_path / "registry"))
    champion = registry.state().champion
    if champion != "v2":  # another test rolled back
        registry.append(lambda _: Draft(kind="canary", actor="t", version="v2", facts={"blocks": False}))
        registry.append(lambda _: promotion(registry, "v2"))

    def run(**given):
        usual = {"run": folder / "run.jsonl", "registry": tmp_path / "registry", "output": tmp_path / "out",
                 "latencies": folder / "ms.jsonl", "policy": launcher.POLICY, "name": "cotrr",
                 "version": "champion", "trigger": "scheduled", "probe": None, "baseline_latencies": None,
                 "calls": 5, "actor": "tester"}  # fmt: skip
        asked = {k: v if v is None or isinstance(v, int) else str(v) for k, v in (usual | given).items()}
        monkeypatch.setattr(launcher, "FLAGS", types.SimpleNamespace(**asked))
        with pytest.raises(SystemExit) as end:
            launcher.main()
        return end.value.code

    return run, tmp_path, registry


def test_a_critical_verdict_rolls_back_even_if_nothing_can_be_written(here, place, monkeypatch):
    run, _, registry = here
    monkeypatch.setattr(launcher, "_write", lambda *_: (_ for _ in ()).throw(OSError("No space left")))
    with pytest.raises(OSError, match="No space"):
        run(run=place[0] / "bright.jsonl", policy=place[0] / "policy.json")
    assert registry.state().champion == "v1" and registry.state().blocked == {"v2"}


def test_a_rollback_leaves_alone_what_was_promoted_meanwhile(here, place, monkeypatch, capsys):
    run, out, registry = here
    registry.register(model_files(3), {}, "tester")
    judged = canary.record

    def record(*args):
        event = judged(*args)
        Registry(registry.store).append(lambda _: promotion(registry, "v3"))
        return event

    monkeypatch.setattr(canary, "record", record)
    assert run(run=place[0] / "bright.jsonl", policy=place[0] / "policy.json") == 1
    assert registry.state().champion == "v3" and registry.state().blocked == {"v2"}
    assert "not rolled back: meanwhile v3 is live" in capsys.readouterr().err
    assert (out / "out" / "canary.json").exists()


def test_a_run_that_cannot_be_read_is_logged_and_holds(here):
    run, out, registry = here
    (out / "failed").mkdir()
    (out / "failed" / "manifest.json").write_text(json.dumps(
        {"manifest_id": "m", "run_id": "r", "model_version": "v", "overlay_version": "o", "status": "failed",
         "created_at": "2026-01-01T00:00:00", "items_by_stage": {"scored": []}}))  # fmt: skip
    (out / "half.jsonl").write_text('{"query_id"')
    (out / "latest").symlink_to("gone")
    for name in ("failed", "half.jsonl", "latest"):
        before = len(registry.state().events)
        assert run(run=out / name) == 3
        (event,) = registry.state().events[before:]
        assert (event.kind, event.version, event.facts["verdict"]) == ("canary", "v2", "hold")
        (check,) = registry.evidence(event.evidence["canary"])["checks"]
        assert check["name"] == "run" and "cannot be read" in check["why"]
        assert name in (out / "out" / "canary.md").read_text()


def test_a_mistyped_run_is_no_finding(here):
    run, out, registry = here
    before = registry.state()
    with pytest.raises(InputError, match="no such run"):
        run(run=out / "nowhere")
    assert registry.state() == before


def test_logs_go_on_and_a_training_run_is_not_written_to(here):
    run, out, registry = here
    (out / "out" / "tensorboard").mkdir(parents=True)
    (out / "out" / "tensorboard" / "theirs").write_text("kept")
    for _ in range(2):
        assert run() == 0
    logs = EventAccumulator(str(out / "out" / "tensorboard"))
    logs.Reload()
    numbers = [event.number for event in registry.state().events][-2:]
    assert [point.step for point in logs.Scalars("status")] == numbers
    assert (out / "out" / "tensorboard" / "theirs").read_text() == "kept"
    (out / "out" / "config.json").write_text("{}")
    with pytest.raises(InputError, match="training folder"):
        run()


@pytest.mark.parametrize("calls", [0, 1, 5, launcher.WARM_UP, 30])
def test_any_number_of_calls_is_measured(here, calls):
    run, out, _ = here
    assert run(latencies=None, calls=calls) == 3  # too few to judge by
    held = json.loads((out / "out" / "canary.json").read_text())["checks"]
    why = f"{calls} of at least 300 requests" if calls else "not measured"
    assert [c["why"] for c in held if c["verdict"] == "hold"] == [why]


def test_baseline_latencies_alone_are_refused(here, place):
    run, _, _ = here
    with pytest.raises(InputError, match="of no use without --latencies"):
        run(latencies=None, baseline_latencies=place[0] / "ms.jsonl")


def test_a_policy_that_was_changed_is_refused_before_anything_is_done(here):
    run, out, registry = here
    assert run() == 0
    (out / "policy.json").write_text(json.dumps({"name": "canary-2", "drift_critical": 9}))
    before = registry.state()
    with pytest.raises(InputError, match="'canary-2' said something else"):
        run(policy=out / "policy.json")
    assert registry.state() == before


def test_a_probe_has_gold_labels(here, monkeypatch):
    run, out, _ = here
    monkeypatch.setattr(launcher.dataset, "read", lambda *_: None)
    monkeypatch.setattr(launcher.artifact, "learned_from", lambda *_: "")
    monkeypatch.setattr(launcher.judging, "labelled_lists", lambda *_: (None, "silver"))
    with pytest.raises(InputError, match="its labels are silver"):
        run(probe=out)


def test_who_has_no_name_has_a_number(monkeypatch):
    assert terminal.actor("ana") == "ana"
    for error in (KeyError, OSError):
        monkeypatch.setattr(terminal.getpass, "getuser", lambda error=error: (_ for _ in ()).throw(error()))
        assert terminal.actor(None) == f"unknown uid {os.getuid()}"


def test_bad_latencies_are_bad_input(tmp_path):
    with pytest.raises(InputError, match="a folder, not a JSONL file"):
        launcher._read_latencies(str(tmp_path))
    (tmp_path / "ms.jsonl").write_text('{"ms": 0.4}\n\n{"ms": -1}\n')
    with pytest.raises(InputError, match="line 3.*ms"):
        launcher._read_latencies(str(tmp_path / "ms.jsonl"))
    (tmp_path / "ms.jsonl").write_text('{"ms": 0.4}\n\n{"ms": 2, "request": "r"}\n')
    assert launcher._read_latencies(str(tmp_path / "ms.jsonl")).tolist() == [0.4, 2.0]
