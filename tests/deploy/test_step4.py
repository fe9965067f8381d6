"""Step 4's own files: what is written of ours, and what is taken over of its."""

import copy
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cotrr.deploy import step4
from cotrr.deploy.registry import Draft
from cotrr.errors import InputError
from tests.deploy.small import make_registry, model_files, promotion
from tests.deploy.test_card import spoil

MODELS = {
    "clip_v1": {
        "version_id": "clip_v1", "model_name": "clip", "model_path": "models/clip", "creator": "ana",
        "created_at": "2025-01-01T00:00:00Z", "description": "CLIP only",
        "baseline_metrics": {"compliance_at_1": 0.5, "conflict_auc": None, "recall_at_100": 0.9},
        "tags": {"team": ["search"]},
    },
    "rule_v2": {
        "version_id": "rule_v2", "model_name": "rule", "model_path": "models/rule", "creator": "ben",
        "created_at": "2025-02-01T00:00:00", "description": "", "baseline_metrics": {},
    },
}  # fmt: skip


def deployment(name, model, status, day, **fields):
    return {"deployment_id": name, "model_version": model, "overlay_version": "o1", "status": status,
            "deployed_at": f"2025-03-{day:02d}T00:00:00+00:00", "metrics": {}, "rollback_target": None,
            **fields}  # fmt: skip


DEPLOYMENTS = {
    "d1": deployment("d1", "clip_v1", "promoted", 1, metrics={"ctr": 0.1}, note="first"),
    "d2": deployment("d2", "rule_v2", "promoted", 2, rollback_target="clip_v1"),
    "d3": deployment("d3", "clip_v1", "failed", 3),
}


@pytest.fixture
def theirs(tmp_path):
    """Writes Step 4's two files and returns their paths."""

    def write(models=MODELS, deployments=DEPLOYMENTS):
        paths = tmp_path / "their_models.json", tmp_path / "their_deployments.json"
        for path, content in zip(paths, (models, deployments), strict=True):
            path.write_text(content if isinstance(content, str) else json.dumps(content))
        return paths

    return write


def act(registry, kind, version, **facts):
    if kind == "promote":
        return registry.append(lambda state: promotion(registry, version, **facts))
    return registry.append(lambda state: Draft(kind=kind, actor="tester", version=version, facts=facts))


def exported(registry, folder):
    return [json.loads(path.read_text()) for path in step4.export(registry, "o7", folder)]


def deployments(registry, folder):
    return list(exported(registry, folder)[1].values())


def live(registry, folder):
    """The model version that Step 4 takes to be live from the file."""
    found = step4.live(deployments(registry, folder))
    return found and found["model_version"]


def test_the_record_of_a_version_has_the_contracts_fields_and_no_made_up_figure(tmp_path):
    registry = make_registry(tmp_path / "registry")
    metrics = {
        "compliance@1": {"value": 0.75, "ci": [0.7, 0.8]},
        "ndcg@10": {"value": 0.5, "ci": None},
        "conflict_rate@1": {"value": 0.125, "ci": None},
        "conflict_auc": {"value": None, "ci": None, "why": "one class"},
        "conflict_ece": {"value": 0.0625, "ci": [0.0, 0.1]},
    }
    version = registry.register(model_files(1), {"metrics": metrics, "description": "with text tower"}, "eve")
    (record,) = exported(registry, tmp_path)[0].values()
    assert record == {
        "version_id": version.model,
        "model_name": "cotrr",
        "model_path": str(tmp_path / "registry" / "cotrr" / "versions" / version.folder),
        "created_at": "2026-01-01T12:00:00.000000+00:00",
        "creator": "eve",
        "description": "with text tower",
        "baseline_metrics": {
            "compliance_at_1": 0.75, "compliance_at_3": None, "compliance_at_5": None, "ndcg_at_10": 0.5,
            "conflict_rate": 0.125, "conflict_auc": None, "conflict_ece": 0.0625,
        },
    }  # fmt: skip


def test_a_version_without_figures_is_written_with_nulls(tmp_path):
    (record,) = exported(make_registry(tmp_path / "registry", 1), tmp_path)[0].values()
    assert set(record["baseline_metrics"].values()) == {None}
    assert record["description"] == ""


def test_what_is_rolled_back_is_so_and_what_is_live_again_has_a_deployment_of_its_own(tmp_path):
    registry = make_registry(tmp_path / "registry", 2)
    one, two = (version.model for version in registry.state().versions)
    judgement = {"figures": {"compliance@1": {"value": 0.8, "ci": [0.7, 0.9]}}}
    act(registry, "alias", "v1", alias="shadow")
    registry.append(lambda state: promotion(registry, "v1", "eve", judgement))
    second = act(registry, "promote", "v2")
    registry.rollback("eve")
    told = [(d["model_version"], d["status"], d["rollback_target"]) for d in deployments(registry, tmp_path)]
    assert told == [(one, "shadow", None), (one, "promoted", None), (two, "rolled_back", one),
                    (one, "promoted", None)]  # fmt: skip
    first, promoted, rolled_back, again = deployments(registry, tmp_path)
    assert promoted["metrics"] == dict.fromkeys(step4.METRICS) | {"compliance_at_1": 0.8}
    assert first["metrics"] == {}
    assert rolled_back["deployment_id"] == f"deploy_5_{second.digest[:8]}"
    assert rolled_back["deployed_at"] == second.at < again["deployed_at"]
    assert {d["overlay_version"] for d in deployments(registry, tmp_path)} == {"o7"}


def test_a_deployment_keeps_the_overlay_that_its_event_tells(tmp_path):
    registry = make_registry(tmp_path / "registry", 1)
    act(registry, "promote", "v1", overlay_version="o3")
    assert [d["overlay_version"] for d in deployments(registry, tmp_path)] == ["o3"]


@pytest.mark.parametrize("seed", range(5))
def test_whatever_happens_the_files_say_what_the_log_says(tmp_path, theirs, seed):
    registry, draw = make_registry(tmp_path / "registry", 3), random.Random(seed)
    step4.import_files(registry, *theirs(), "ana")
    for _ in range(40):
        state = registry.state()
        kind = draw.choice(["promote", "rollback", "alias"])
        if kind == "rollback" and len(state.past) > 1:
            registry.rollback("eve", to=draw.choice([None, *filter(None, state.past)]))
        elif kind == "promote":
            act(registry, "promote", draw.choice(sorted({"v1", "v2", "v3"} - {state.champion})))
        elif kind == "alias":
            act(registry, "alias", draw.choice(["", "v1", "v2", "v3"]), alias="shadow")
        state, records = registry.state(), deployments(registry, tmp_path)
        assert live(registry, tmp_path) == state.version(state.champion).model
        shadows = [d["model_version"] for d in records if d["status"] == "shadow"]
        shadow = state.aliases.get("shadow")
        assert shadows[-1:] == ([state.version(shadow).model] if shadow else [])
        times = [d["deployed_at"] for d in records if d["deployment_id"].startswith("deploy_")]
        assert times == sorted(times)


def test_rolled_back_to_nothing_nothing_of_ours_is_live(tmp_path):
    registry = make_registry(tmp_path / "registry", 3)
    for label in ("v1", "v2", "v3"):
        act(registry, "promote", label)
    registry.rollback("eve", to="v1")
    assert live(registry, tmp_path) == registry.state().versions[0].model
    registry.rollback("eve")
    assert live(registry, tmp_path) is None


def test_what_was_imported_is_exported_as_it_came(tmp_path, theirs):
    registry = make_registry(tmp_path / "registry")
    events = step4.import_files(registry, *theirs(), "ana")
    assert [event.kind for event in events] == ["import", "import", "adopt"]
    assert registry.state().version("champion").model == "rule_v2"
    models, history = exported(registry, tmp_path)
    assert (models, history) == (MODELS, DEPLOYMENTS)
    assert list(models) == list(MODELS) and list(history) == list(DEPLOYMENTS)
    assert registry.verify() == ([], [])


@pytest.mark.parametrize(
    ("models", "history"),
    [
        (list(MODELS.values()), list(DEPLOYMENTS.values())),
        ({"versions": list(MODELS.values())}, {"deployments": list(DEPLOYMENTS.values())}),
        ({"models": list(MODELS.values())}, list(DEPLOYMENTS.values())),
        (
            {name: {k: v for k, v in record.items() if k != "version_id"} for name, record in MODELS.items()},
            DEPLOYMENTS,
        ),
    ],
)
def test_every_shape_is_read_alike(tmp_path, theirs, models, history):
    registry = make_registry(tmp_path / "registry")
    step4.import_files(registry, *theirs(models, history), "ana")
    assert exported(registry, tmp_path) == [MODELS, DEPLOYMENTS]


def test_an_import_twice_changes_nothing(tmp_path, theirs):
    registry = make_registry(tmp_path / "registry")
    step4.import_files(registry, *theirs(), "ana")
    registry.register(model_files(1), {}, "eve")
    act(registry, "promote", "v3")
    head = registry.state().head
    assert step4.import_files(registry, *theirs(), "ana") == []
    assert registry.state().head == head


def test_our_own_files_go_round(tmp_path, theirs):
    registry = make_registry(tmp_path / "registry", 2)
    step4.import_files(registry, *theirs(), "ana")
    for label in ("v1", "v2"):
        act(registry, "promote", label)
    registry.rollback("eve")
    act(registry, "alias", "v2", alias="shadow")
    paths = step4.export(registry, "o7", tmp_path / "out")
    assert step4.import_files(registry, *paths, "ana") == []
    other = make_registry(tmp_path / "other")
    step4.import_files(other, *paths, "ana")
    assert exported(other, tmp_path) == exported(registry, tmp_path)
    assert other.state().version("champion").model == registry.state().version("champion").model


def test_deployments_of_step_4_that_came_later_are_added(tmp_path, theirs):
    registry = make_registry(tmp_path / "registry")
    step4.import_files(registry, *theirs(), "ana")
    failed = DEPLOYMENTS | {"d4": deployment("d4", "clip_v1", "failed", 4)}
    (event,) = step4.import_files(registry, *theirs(deployments=failed), "ana")
    assert event.kind == "alias" and registry.state().aliases == {"champion": "v2"}
    back = failed | {"d2": DEPLOYMENTS["d2"] | {"status": "rolled_back"},
                     "d5": deployment("d5", "clip_v1", "promoted", 5)}  # fmt: skip
    (event,) = step4.import_files(registry, *theirs(deployments=back), "ana")
    assert event.kind == "adopt" and registry.state().champion == "v1"
    assert exported(registry, tmp_path) == [MODELS, back]
    none = back | {name: back[name] | {"status": "rolled_back"} for name in ("d1", "d5")}
    step4.import_files(registry, *theirs(deployments=none), "ana")
    assert registry.state().champion == ""
    assert exported(registry, tmp_path) == [MODELS, none]


def test_a_rollback_to_step_4s_own_is_told_it(tmp_path, theirs):
    registry = make_registry(tmp_path / "registry")
    step4.import_files(registry, *theirs(), "ana")
    registry.register(model_files(1), {}, "eve")
    act(registry, "promote", "v3")
    assert deployments(registry, tmp_path)[-1]["rollback_target"] == "rule_v2"
    registry.rollback("eve")
    assert live(registry, tmp_path) == "rule_v2"
    assert [d["status"] for d in deployments(registry, tmp_path)][-2:] == ["rolled_back", "promoted"]


def test_what_step_4_made_live_while_ours_is_live_is_refused_before_anything_is_written(tmp_path, theirs):
    registry = make_registry(tmp_path / "registry", 1)
    act(registry, "promote", "v1")
    head = registry.state().head
    with pytest.raises(InputError, match=r"'rule_v2' is live there, but 'light.*`rollback` here first"):
        step4.import_files(registry, *theirs(), "ana")
    assert registry.state().head == head
    registry.rollback("eve")
    step4.import_files(registry, *theirs(), "ana")
    assert registry.state().version("champion").model == "rule_v2"


def test_a_deployment_of_ours_that_step_4_changed_is_refused(tmp_path):
    registry = make_registry(tmp_path / "registry", 1)
    act(registry, "promote", "v1")
    paths = step4.export(registry, "o7", tmp_path)
    content = json.loads(paths[1].read_text())
    for record in content.values():
        record["status"] = "rolled_back"
    paths[1].write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"deploy_2_\w+.status`: 'rolled_back', but 'promoted' by the log"):
        step4.import_files(registry, *paths, "ana")


def test_ours_that_step_4_made_live_by_itself_is_refused(tmp_path, theirs):
    registry = make_registry(tmp_path / "registry", 1)
    ours = registry.state().versions[0].model
    with pytest.raises(InputError, match="is live there, but 'nothing' by the log"):
        step4.import_files(registry, *theirs({}, [deployment("d9", ours, "promoted", 9)]), "ana")


def test_a_version_that_changed_is_refused(tmp_path, theirs):
    registry = make_registry(tmp_path / "registry")
    step4.import_files(registry, *theirs(), "ana")
    changed = copy.deepcopy(MODELS)
    changed["clip_v1"]["tags"]["team"] = []
    with pytest.raises(InputError, match=r"field `clip_v1`: changed since it was imported. Give"):
        step4.import_files(registry, *theirs(changed), "ana")


def test_ids_that_look_like_our_labels_are_not_taken_for_them(tmp_path, theirs):
    registry = make_registry(tmp_path / "registry")
    models = {name: MODELS["clip_v1"] | {"version_id": name} for name in ("v2", "v1")}
    step4.import_files(registry, *theirs(models, [deployment("d", "v1", "promoted", 1)]), "ana")
    assert registry.state().champion == "v2"
    assert exported(registry, tmp_path)[0] == models


def test_a_clock_of_step_4_that_is_ahead_does_not_hide_what_is_live(tmp_path, theirs):
    registry = make_registry(tmp_path / "registry", 1)
    ahead = deployment("d", "clip_v1", "promoted", 1, deployed_at="2030-01-01T00:00:00Z")
    step4.import_files(registry, *theirs(deployments=[ahead]), "ana")
    act(registry, "promote", "v1")
    assert live(registry, tmp_path) == registry.state().versions[0].model


def changed(record, **fields):
    return {key: value for key, value in (record | fields).items() if value is not ...}


ONE, FIRST = MODELS["clip_v1"], DEPLOYMENTS["d1"]
BAD = [
    ([changed(ONE, creator=...)], [], r"models.json, field `\[0\].creator`: .*missing"),
    ({"clip_v1": changed(ONE, description=3)}, [], r"field `clip_v1.description`: expected `str`, got `int`"),
    ([changed(ONE, created_at="yesterday")], [], r"field `\[0\].created_at`: expected ISO 8601"),
    ([changed(ONE, version_id="a\nb")], [], r"field `\[0\].version_id`: not printable"),
    ([changed(ONE, baseline_metrics={"ndcg_at_10": "high"})], [],
     r"`\[0\].baseline_metrics.ndcg_at_10`: expected"),
    ([ONE, ONE], [], r"`\[1\].version_id`: 'clip_v1' is there twice"),
    ('{"a": {}, "a": {}}', [], "'a' is there twice"),
    ({"other": ONE}, [], r"field `other.version_id`: stands under 'other'"),
    ({"versions": [ONE], "updated": "today"}, [], "beside `versions` stand fields that no export could keep"),
    ("[NaN]", [], "NaN is not finite"),
    ('[{"a": 1e999}]', [], "1e999 is not finite"),
    ("[", [], r"models.json, line 1: no JSON"),
    ("[" * 100_000, [], "no JSON"),
    ("3", [], "expected an object of records by id"),
    ([3], [], r"field `\[0\]`: expected `object`"),
    ([changed(ONE, note="x" * 2**17)], [], "larger than 131,072 bytes"),
    ('[{"version_id": "\\ud800"}]', [], r"field `\[0\]"),
    (MODELS, [changed(FIRST, status="live")], r"deployments.json, field `\[0\].status`: invalid enum"),
    (MODELS, [FIRST, FIRST], "'d1' is there twice"),
    (MODELS, {"d1": changed(FIRST, model_version="gone")},
     r"field `d1.model_version`: 'gone' is no known version"),
    (MODELS, [changed(FIRST, deployed_at="soon")], r"`\[0\].deployed_at`: expected ISO 8601, got 'soon'"),
]  # fmt: skip


@pytest.mark.parametrize(("models", "history", "message"), BAD)
def test_bad_records_are_refused_by_name(tmp_path, theirs, models, history, message):
    registry = make_registry(tmp_path / "registry")
    with pytest.raises(InputError, match=f"(?i){message}"):
        step4.import_files(registry, *theirs(models, history), "ana")
    assert registry.state().events == ()


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_garbage_is_refused_before_anything_is_written_or_taken_over_whole(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("garbage")
    registry = make_registry(folder / "registry")
    texts = [json.dumps(spoil(data, content)).encode() for content in (MODELS, DEPLOYMENTS)]
    if data.draw(st.booleans()):
        cut = data.draw(st.integers(0, len(texts[1])))
        noise = data.draw(st.sampled_from([b"[" * 10**5, b"\\ud800", b"NaN", b"1e999", b"\xff", b","]))
        texts[1] = texts[1][:cut] + noise + texts[1][cut:]
    paths = [folder / name for name in (step4.MODELS, step4.DEPLOYMENTS)]
    for path, text in zip(paths, texts, strict=True):
        path.write_bytes(text)
    try:
        step4.import_files(registry, *paths, "ana")
    except InputError:
        assert registry.state().events == ()
    else:
        step4.export(registry, "none", folder / "out")
        assert step4.import_files(registry, *paths, "ana") == []


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none.json: no such file"):
        step4.import_files(make_registry(tmp_path), tmp_path / "none.json", tmp_path / "none.json", "ana")
