"""The gate: a version against what is live, on one frozen test set, and what the log has to say."""

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
from cotrr.deploy.ab import Verdict
from cotrr.deploy.checks import FAIL, HOLD, PASS
from cotrr.deploy.policy import NonInferiority, Policy, Superiority, read
from cotrr.deploy.registry import Draft, Registry
from cotrr.errors import InputError
from cotrr.ranker import artifact
from tests.deploy.small import make_registry, model_files, promotion
from tests.ranker.test_artifact import LISTS

POLICIES = pathlib.Path(experiments.__file__).parent / "policies"
POLICY = Policy(name="p", description="", superiority=[Superiority("compliance@1")], maximum_looks=2)


def state_with(tmp_path, *drafts):
    registry = make_registry(tmp_path / "registry", versions=2)
    for draft in drafts:
        registry.append(lambda state, draft=draft: draft if isinstance(draft, Draft) else draft(registry))
    return registry.state()


def look(**facts):
    return Draft(kind="judge", actor="a", version="v1", facts=facts)


def sketch(first, last):
    return gate.sketch(f"q{i}" for i in range(first, last))


def test_a_test_set_wears_out_and_so_does_one_that_is_nearly_the_same(tmp_path):
    mine, other, nearly = sketch(0, 500), sketch(500, 1000), sketch(10, 500)
    state = state_with(tmp_path, look(queries=mine), look(queries=other), look(queries=nearly))
    assert gate.looks(state, mine) == gate.looks(state, nearly) == 2
    assert gate.looks(state, other) == 1
    said = lambda queries: gate._log_checks(state, state.version("v1"), "", POLICY, queries)[1]
    assert said(nearly).verdict == HOLD
    assert "fresh" in said(nearly).why
    assert said(other).verdict == PASS


def test_a_sketch_tells_how_much_two_sets_share():
    assert gate.shared(sketch(0, 1000), sketch(0, 1000)) == 1
    assert gate.shared(sketch(0, 1000), sketch(1000, 2000)) == 0
    assert gate.shared(sketch(0, 3000), sketch(1000, 4000)) == pytest.approx(0.5, abs=0.2)
    assert gate.sketch(["b", "a", "a"]) == gate.sketch(["a", "b"])


def test_a_champion_that_changed_meanwhile_holds(tmp_path):
    state = state_with(tmp_path, lambda registry: promotion(registry, "v2"))
    said = lambda champion: gate._log_checks(state, state.version("v1"), champion, POLICY, [])[0].verdict
    assert said("v2") == PASS
    assert said("") == HOLD


def test_a_blocked_version_holds_until_a_canary_passes(tmp_path):
    block = lambda blocks: Draft(kind="canary", actor="a", version="v1", facts={"blocks": blocks})
    said = lambda state: gate._log_checks(state, state.version("v1"), "", POLICY, [])[2].verdict
    assert said(state_with(tmp_path / "one", block(True))) == HOLD
    assert said(state_with(tmp_path / "two", block(True), block(False))) == PASS


def test_a_changed_policy_needs_a_new_name(tmp_path):
    state = state_with(tmp_path, look(policy="p", policy_hash=POLICY.digest))
    state.refuse_changed_policy(POLICY.name, POLICY.digest)
    with pytest.raises(InputError, match="said something else"):
        state.refuse_changed_policy(POLICY.name, msgspec.structs.replace(POLICY, level=0.9).digest)


@pytest.mark.parametrize(("verdict", "said"), [
    ("promote", PASS), ("rollback", FAIL), ("continue", HOLD),
])  # fmt: skip
def test_an_ab_test_has_its_say_if_it_compared_these_two(tmp_path, verdict, said):
    state = state_with(tmp_path, lambda registry: promotion(registry, "v2"))
    one, two = state.versions
    told = Verdict(two.model, one.model, verdict, "")
    of = lambda told, policy=POLICY: [c.verdict for c in gate._experiment_checks(policy, one, state, told)]
    assert of(told) == [said]
    assert of(told._replace(baseline_version="another")) == [HOLD]
    assert of(told._replace(candidate_version=two.model)) == [HOLD]
    assert of(None) == []
    assert of(None, msgspec.structs.replace(POLICY, experiment="required")) == [HOLD]


def test_before_the_first_champion_an_ab_test_compares_with_what_the_policy_names(tmp_path):
    state = state_with(tmp_path)
    said = lambda baseline: (
        gate._experiment_checks(
            POLICY, state.version("v1"), state, Verdict(baseline, state.version("v1").model, "promote", "")
        )[0].verdict
    )
    assert said("rule") == PASS
    assert said("anything") == HOLD


def test_an_ab_result_that_is_three_words_is_refused_before_any_look(registry):
    version = registry.state().versions[0]
    told = {"candidate_version": version.model, "baseline_version": "clip", "verdict": "promote"}
    with pytest.raises(InputError):
        promoted(registry, held_out(), experiment=told)
    assert len(registry.state().events) == 2


@pytest.mark.parametrize("name", ["standard", "step4"])
def test_the_policies_that_come_along_are_sound(name):
    policy = read(POLICIES / f"{name}.json", Policy)
    assert policy.name.startswith(name)
    changed = msgspec.structs.replace(policy, minimum_clusters=policy.minimum_clusters + 1)
    assert policy.digest != changed.digest


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
    ({"name": "standard-1\n"}, "name"),
    ({"minimum_clusters": 9}, "minimum_clusters"),
    ({"superiority": [{"metric": "compliance@1", "above": -0.1}]}, "above"),
    ({"non_inferiority": [{"metric": "compliance@1", "margin": 0.0}]}, "margin"),
    ({"maximum_looks": 1000}, "maximum_looks"),
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


CLEAN = {
    "overlap": {key: {pair: 0 for pair in ("train/validation", "train/test", "validation/test")}
                for key in ("canonical_id", "query_id")},
    "near_duplicates": {"cosine_above": 0.98, "pairs": 0, "examples": []}, "label_leakage": {},
}  # fmt: skip
EASY = Policy(
    name="easy", description="", superiority=[Superiority("compliance@1")],
    minimum_clusters=10, maximum_looks=3,
    slices=[NonInferiority("compliance@1", 0.5)], first_champion="clip",
)  # fmt: skip


def held_out(label="gold", passport=CLEAN, learned=False, without=None):
    """Eighty queries that the small models have not learned from; labels follow their own order."""
    model = artifact.parse(model_files(1), "")
    lists = LISTS.take(np.arange(16, 24).repeat(10))
    ids = lambda stem, shape: np.array([f"{stem}{i}" for i in range(np.prod(shape))], object).reshape(shape)
    lists = lists._replace(query_id=np.resize(LISTS.query_id[:16], 80) if learned else ids("new", 80))
    logit = artifact.score(model, lists).logit
    rank = np.argsort(np.argsort(-logit, axis=1), axis=1)
    compliance = np.clip(1 - 0.15 * rank, 0, 1).astype(np.float32)
    lists = lists._replace(compliance=compliance, y=compliance, domain=lists.domain if without is None else
                           np.where(lists.domain == without, "another", lists.domain))  # fmt: skip
    rows = [{"query_id": query, "id": str(i), "canonical_id": f"{query} {i}", "label": label, "y": 0.5}
            for query in lists.query_id for i in range(lists.where.shape[1])]  # fmt: skip
    return gate.HeldOut(pa.Table.from_pylist(rows), lists, label, passport)


def promoted(registry, test, policy=EASY, name="v1", **more):
    event, judgement = gate.promote(registry, name, test, policy, "tester", resamples=1000, **more)
    return event, judgement, {check["check"]: check["verdict"] for check in judgement["checks"]}


@pytest.fixture
def registry(tmp_path):
    return make_registry(tmp_path / "registry", versions=2)


def test_a_version_that_is_better_goes_live_with_its_evidence(registry):
    event, judgement, checks = promoted(registry, held_out())
    assert set(checks.values()) == {PASS}
    assert (event.kind, judgement["verdict"], registry.state().champion) == ("promote", "PROMOTE", "v1")
    kept = registry.evidence(event.evidence["judgement"])
    assert kept["checks"] == msgspec.json.decode(msgspec.json.encode(judgement["checks"]))
    assert registry.evidence(event.evidence["policy"])["name"] == "easy"
    assert registry.verify()[0] == []


def test_the_same_ranking_again_is_no_gain(registry):
    promoted(registry, held_out())
    event, judgement, checks = promoted(registry, held_out(), name="v2")
    assert judgement["incumbent"]["label"] == "v1"
    assert checks["superiority in compliance@1"] == HOLD  # v2 has the weights of v1
    assert (event.kind, registry.state().champion) == ("judge", "v1")


@pytest.mark.parametrize(("test", "check", "said"), [
    ({"label": "silver"}, "gold labels", FAIL),
    ({"learned": True}, "no leakage", FAIL),
    ({"passport": CLEAN | {"label_leakage": {"clip_score": "y rises with it"}}}, "no leakage", FAIL),
    ({"passport": CLEAN | {"near_duplicates": {"pairs": None}}}, "no leakage", HOLD),
    ({"passport": CLEAN | {"overlap": {}}}, "no leakage", HOLD),
    ({"without": "d1"}, "no loss in compliance@1 in d1", HOLD),
])  # fmt: skip
def test_what_is_wrong_with_a_test_set_keeps_a_version_out(registry, test, check, said):
    event, judgement, checks = promoted(registry, held_out(**test))
    assert checks[check] == said
    assert judgement["verdict"] == {FAIL: "REJECT", HOLD: "HOLD"}[said]
    assert (event.kind, registry.state().champion) == ("judge", "")


def test_a_first_champion_that_the_data_do_not_have_holds(registry):
    policy = msgspec.structs.replace(EASY, first_champion="dual")
    test = held_out()
    test = test._replace(lists=test.lists._replace(dual_score=np.full_like(test.lists.dual_score, np.nan)))
    _, judgement, checks = promoted(registry, test, policy)
    assert checks["superiority in compliance@1"] == HOLD
    assert judgement["verdict"] == "HOLD"


def test_a_champion_that_goes_live_while_another_is_judged_is_not_overtaken(registry, monkeypatch):
    other, judge = Registry(registry.store, registry.name), gate.judge

    def meanwhile(*arguments):
        judged = judge(*arguments)
        monkeypatch.setattr(gate, "judge", judge)
        promoted(other, held_out(), name="v2")
        return judged

    monkeypatch.setattr(gate, "judge", meanwhile)
    event, judgement, checks = promoted(registry, held_out())
    assert checks["champion as judged"] == HOLD
    assert (event.kind, judgement["verdict"], registry.state().champion) == ("judge", "HOLD", "v2")


def test_the_fourth_look_at_a_test_set_holds(registry):
    strict = msgspec.structs.replace(EASY, superiority=[Superiority("compliance@1", above=0.9)])
    for _ in range(3):
        assert promoted(registry, held_out(), strict)[2]["fresh test set"] == PASS
    assert promoted(registry, held_out(), strict)[2]["fresh test set"] == HOLD
