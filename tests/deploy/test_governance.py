"""Governance: each breach planted once and found by its rule alone; clean evidence passes."""

import contextlib
import copy
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable

import msgspec
import numpy as np
import pyarrow as pa
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cotrr import files
from cotrr.data import dataset, runs
from cotrr.data.lists import to_lists
from cotrr.deploy import card, governance, policy, quotas, rules
from cotrr.deploy.governance import difference
from cotrr.deploy.policy import Policy, Superiority
from cotrr.deploy.quotas import Quotas
from cotrr.deploy.registry import Draft, Registry
from cotrr.errors import InputError
from cotrr.evaluate import evaluation, figures
from cotrr.evaluate.ranking import System
from cotrr.ranker import artifact
from cotrr.store import LocalStore
from tests.conftest import scored_line
from tests.deploy.small import make_registry, model_files, promotion
from tests.deploy.test_card import CERTIFICATE, make_report, spoil

ROOT = pathlib.Path(__file__).resolve().parents[2]
QUOTAS = policy.read(ROOT / "experiments" / "policies" / "governance.json", Quotas)
few = settings(max_examples=50, deadline=None, derandomize=True, database=None,
               suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
WORKFLOW = ROOT / ".github" / "workflows" / "governance.yml"
POLICIES = str(ROOT / "experiments" / "policies")


@contextlib.contextmanager
def rewritten(folder):
    """The certificate of a dataset, written back as it was changed."""
    path = pathlib.Path(folder) / "certificate.json"
    told = json.loads(path.read_text())
    yield told
    path.write_text(json.dumps(told))


def broken(found, checked=True):
    return {breach.rule for breach in found if breach.checked == checked}


def candidate(query, item, **fields):
    """A line that no rule objects to; queries and pictures that the small models have not seen."""
    dim = fields.pop("dim", 16)
    known = {"url": f"https://site{item % 4}.example/p{item}.jpg", "http_status": 200,
             "photographer": f"Ann {item % 5}"}  # fmt: skip
    return scored_line(100 + query, 100 + item, dim=dim, **known | fields)


def many(count=20, **fields):
    rng = np.random.default_rng(5)
    return [candidate(q, int(i), **fields) for q in range(count) for i in rng.choice(40, 12, replace=False)]


@pytest.fixture
def make(write_run, tmp_path):
    """A run of lines, and the dataset that it gives once `change` has been at the table."""

    def make(lines, change: Callable[[pa.Table], pa.Table] = lambda table: table):
        run = write_run(lines)
        reading = runs.read_run(run)
        table, cost = dataset.prepare(reading.table, (0.5, 0.0, 0.5), 0.7, "s", "strict")
        settings = {"compliance_weight": 0.7, "fractions": [0.5, 0.0, 0.5], "split": cost}
        summary = reading.summary | {"hashes": dataset.hash_files(runs.find_run(run))}
        dataset.write(change(table), tmp_path / "data", settings, summary)
        return str(run), str(tmp_path / "data")

    return make


def check(folder):
    data, found = governance.read_data(folder)
    return found + governance.check_data(data)


def put(table, column, rows, value):
    """The table with one column changed in some rows."""
    values = table[column].to_pylist()
    for row in rows:
        values[row] = value
    at = table.column_names.index(column)
    return table.set_column(at, column, pa.array(values, table[column].type))


def rows_of(table, split):
    return [i for i, name in enumerate(table["split"].to_pylist()) if name == split]


def test_clean_data_and_a_clean_run_pass(make):
    run, folder = make(many())
    data, found = governance.read_data(folder)
    assert found + governance.check_data(data) + governance.check_origin(run, data) == []
    assert quotas.check_run(run, quotas.read_sights(run), [], QUOTAS) == []


@pytest.mark.parametrize("key", ["canonical_id", "query_id"])
def test_ids_in_two_splits_are_found(make, key):
    def change(table):
        value = table[key][rows_of(table, "test")[0]].as_py()
        return put(table, key, rows_of(table, "train")[:1], value)

    _, folder = make(many(), change)
    found = check(folder)
    assert broken(found) == {"leakage"}
    assert f"1 {key} in both train and test" in found[0].what


def test_near_duplicates_are_found(make):
    def change(table):
        (a, *_), (b, *_) = rows_of(table, "train"), rows_of(table, "test")
        vector = np.array(table["image_embedding"][a].as_py()) * 1.001
        other = table["canonical_id"][b]
        same = [i for i, value in enumerate(table["canonical_id"]) if value == other]
        return put(table, "image_embedding", same, vector.tolist())

    _, folder = make(many(), change)
    assert broken(check(folder)) == {"near_duplicates"}


def test_an_attribute_that_gives_the_label_away_is_found(make):
    lines = many()
    for line in lines:
        line["brightness"] = 0.7 * line["review"]["compliance"] + 0.3 * (1 - line["review"]["conflict"])
    _, folder = make(lines)
    assert broken(check(folder)) == {"label_leakage"}


def test_silver_test_labels_are_found(make):
    lines = [line | {"review": None, "compliance_score": i % 7 / 7, "conflict_prob": i % 5 / 5}
             for i, line in enumerate(many())]  # fmt: skip
    _, folder = make(lines)
    found = check(folder)
    assert broken(found) == {"silver_labels"}
    assert found[0].what == "all labels of the test split are silver"


@pytest.mark.parametrize(
    ("column", "value"), [("y", 0.123), ("label", "silver"), ("review_compliance", None)]
)
def test_labels_that_no_review_gives_are_found(make, column, value):
    _, folder = make(many(), lambda table: put(table, column, rows_of(table, "test")[:3], value))
    found = check(folder)
    assert broken(found) == {"silver_labels"}
    assert "3 labels do not follow" in found[0].what


def test_a_test_split_without_labels_is_unchecked(make):
    _, folder = make(many(review=..., compliance_score=...))
    assert broken(check(folder)) == set()
    assert broken(check(folder), checked=False) == {"silver_labels"}


def test_other_files_than_the_certified_are_found(make):
    _, folder = make(many())
    test = pathlib.Path(folder) / "test.parquet"
    test.write_bytes(test.with_name("train.parquet").read_bytes())
    found = check(folder)
    assert broken(found) == {"certificate"}
    assert broken(found, checked=False) == set(rules.MEASURED)


def test_a_certificate_that_says_something_else_is_found(make):
    _, folder = make(many())
    with rewritten(folder) as told:
        told["counts"]["test"]["queries"] += 1
    found = check(folder)
    assert broken(found) == {"certificate"}
    assert "counts.test.queries is" in found[0].what


@pytest.mark.parametrize("part", ["near_duplicates", "settings"])
def test_a_certificate_that_says_nothing_is_found(make, part):
    _, folder = make(many())
    path = pathlib.Path(folder) / "certificate.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {part: {}}))
    found = check(folder)
    assert broken(found) == {"certificate"}
    assert broken(found, checked=False) == set(rules.MEASURED)


def test_near_duplicates_that_were_not_looked_for_are_unchecked(make):
    _, folder = make(many())
    with rewritten(folder) as told:
        told["near_duplicates"] |= {"pairs": None, "why": "not looked for"}
    found = check(folder)
    assert broken(found) == set() and broken(found, checked=False) == {"near_duplicates"}


def test_pictures_without_embeddings_are_unchecked(make):
    _, folder = make(many(image_embedding=...))
    assert broken(check(folder)) == set()
    assert broken(check(folder), checked=False) == {"near_duplicates"}
    path = pathlib.Path(folder) / "certificate.json"
    told = json.loads(path.read_text())
    told["near_duplicates"]["pairs"] = 0
    path.write_text(json.dumps(told))
    assert broken(check(folder), checked=False) == {"near_duplicates"}


def test_leakage_is_not_believed_from_the_certificate(make):
    leaky = lambda table: put(table, "query_id", rows_of(table, "train")[:1],
                              table["query_id"][rows_of(table, "test")[0]].as_py())  # fmt: skip
    _, folder = make(many(), leaky)
    with rewritten(folder) as told:
        told["overlap"]["query_id"]["train/test"] = 0
    assert broken(check(folder)) == {"leakage", "certificate"}


def test_another_run_than_the_certified_is_found(make, write_run):
    run, folder = make(many())
    data, _ = governance.read_data(folder)
    other = str(write_run(many(19), name="other"))
    assert broken(governance.check_origin(other, data)) == {"certificate"}
    blank = data._replace(passport=data.passport | {"input": {}})
    assert broken(governance.check_origin(run, blank), checked=False) == {"certificate"}


@pytest.fixture
def check_run(write_run):
    def check_run(lines, earlier=None, wanted=QUOTAS, name="run"):
        run = str(write_run(lines, name=name))
        before = quotas.read_sights(str(write_run(earlier, name="earlier"))) if earlier else []
        return quotas.check_run(run, quotas.read_sights(run), before, wanted)

    return check_run


def test_too_many_sources_in_a_domain_are_found(check_run):
    spread = lambda count: [
        candidate(0, i, url=f"https://site{i % count}.example/p{i}.jpg") for i in range(24)
    ]
    assert check_run(spread(10)) == []
    found = check_run(spread(11))
    assert broken(found) == {"domain_cap"}
    assert found[0].what == "sources in d0: 11; must be at most 10"
    assert check_run([line | {"source": " One  site"} for line in spread(11)]) == []  # the field goes first


def test_sources_that_lines_do_not_tell_may_be_too_many(check_run):
    lines = [candidate(0, i, url=...) for i in range(11)]
    assert broken(check_run(lines), checked=False) == {"domain_cap"}
    assert check_run(lines[:10]) == []  # ten pictures have at most ten sources
    lines += [candidate(0, 20 + i, url=f"https://s{i}.example/p") for i in range(11)]
    assert broken(check_run(lines)) == {"domain_cap"}


def test_too_few_photographers_are_found(check_run):
    named = lambda *names: [candidate(0, i, photographer=names[i % len(names)]) for i in range(12)]
    assert check_run(named("Ann", "Bea", "Cem")) == []
    assert broken(check_run(named("Ann", "Bea", " ann "))) == {"photographers"}
    assert broken(check_run(named("Ann", ...)), checked=False) == {"photographers"}
    assert check_run(named("Ann", "Bea", "Cem", ...)) == []  # three are enough, whoever took the rest


def test_broken_urls_are_found(check_run, write_run, tmp_path):
    states = lambda broken, **more: [candidate(0, i, **({"http_status": 404} if i < broken else more))
                                     for i in range(200)]  # fmt: skip
    assert check_run(states(2)) == []
    assert broken(check_run(states(3))) == {"broken_urls"}
    assert broken(check_run(states(3, http_status=...))) == {"broken_urls"}
    assert broken(check_run(states(0, http_status=...)), checked=False) == {"broken_urls"}
    assert check_run(states(0, http_status=..., url_status=301)) == []
    local = [candidate(0, i, url=f"file:p%20{i}.jpg", http_status=..., source="own") for i in range(12)]
    assert broken(check_run(local)) == {"broken_urls"}
    for i in range(12):
        (tmp_path / "run" / f"p {i}.jpg").write_bytes(b"")
    assert check_run(local) == []


@pytest.mark.parametrize(
    "url", ["file:///etc/hostname", "file:///no/such", "../outside.jpg", "a/../../outside.jpg", "../none.jpg",
            "//host/p.jpg", "file://host/p.jpg", "%2e%2e/outside.jpg"])  # fmt: skip
def test_files_outside_of_the_run_are_not_looked_at(check_run, tmp_path, url):
    (tmp_path / "outside.jpg").write_bytes(b"")
    lines = [candidate(0, i, url=url, http_status=..., source="own", image_embedding=...) for i in range(12)]
    found = [breach for breach in check_run(lines) if breach.rule == "broken_urls"]
    assert len(found) == 1 and not found[0].checked


def test_absolute_urls_of_files_in_the_run_are_looked_at(check_run, tmp_path):
    inside = f"file://{tmp_path}/run"
    lines = [candidate(0, i, url=f"{inside}/p{i}.jpg", http_status=..., source="own") for i in range(12)]
    assert broken(check_run(lines)) == {"broken_urls"}
    for i in range(12):
        (tmp_path / "run" / f"p{i}.jpg").write_bytes(b"")
    assert check_run(lines) == []


def test_duplicates_are_found(check_run):
    lines = [candidate(0, i) for i in range(12)]
    embedding = lines[0]["image_embedding"]
    assert broken(check_run([*lines, candidate(0, 20, image_embedding=embedding)])) == {"duplicates"}
    assert broken(check_run([*lines, candidate(0, 20, url=lines[0]["url"] + "?again")])) == {"duplicates"}
    frames = [*lines, candidate(0, 20, image_embedding=embedding, canonical_id="shoot100")]
    assert check_run(frames) == []  # another frame of the same shoot is no other picture
    blank = [*lines, candidate(0, 20, url=..., image_embedding=..., source="own")]
    assert broken(check_run(blank), checked=False) == {"duplicates"}


def test_only_what_is_new_has_rates(check_run):
    earlier = [candidate(0, i, http_status=404) for i in range(12)]
    new = [candidate(0, i) for i in range(12, 24)]
    assert broken(check_run([*earlier, *new])) == {"broken_urls"}
    assert check_run([*earlier, *new], earlier) == []
    again = candidate(0, 30, image_embedding=earlier[0]["image_embedding"])
    assert broken(check_run([*new, again], earlier)) == {"duplicates"}
    loose = msgspec.structs.replace(QUOTAS, max_duplicate_rate_new=0.1)
    assert check_run([*new, again], earlier, loose) == []


def test_an_earlier_dataset_is_read_too(make):
    run, folder = make(many())
    seen = {sight.picture for sight in quotas.read_sights(folder)}
    assert seen and seen <= {sight.picture for sight in quotas.read_sights(run)}


@pytest.mark.parametrize(
    ("change", "told"),
    [({"domain_cap_per_run": 0}, "domain_cap_per_run"), ({"max_broken_url_rate_new": 2}, "max_broken_url"),
     ({"surprise": 1}, "surprise"), ({"name": ""}, "name")],
)  # fmt: skip
def test_garbage_policies_are_refused(change, told, tmp_path):
    (tmp_path / "p.json").write_text(json.dumps(msgspec.to_builtins(QUOTAS) | change))
    with pytest.raises(InputError, match=told):
        policy.read(tmp_path / "p.json", Quotas)
    (tmp_path / "p.json").write_bytes(b"\xff{")
    with pytest.raises(InputError):
        policy.read(tmp_path / "p.json", Quotas)


def version_files(number=1, report=True):
    """The files of a version with its evidence and its card."""
    content = dict(model_files(number))
    model = artifact.parse(content, "small")
    found = make_report(model.version) if report else None
    made = card.build(model, CERTIFICATE, found)
    content |= {"certificate.json": json.dumps(CERTIFICATE).encode(),
                "card.json": json.dumps(made).encode(), "card.md": card.markdown(made).encode()}  # fmt: skip
    return content | ({"report.json": json.dumps(found).encode()} if found else {})


def test_a_card_that_follows_passes():
    assert governance.check_card("v1", version_files()) == []
    assert governance.check_card("v1", version_files(report=False)) == []


def test_a_missing_card_is_found():
    for absent in ("card.json", "card.md"):
        content = version_files()
        del content[absent]
        found = governance.check_card("v1", content)
        assert broken(found) == {"missing_card"} and absent in found[0].what
        assert broken(found, checked=False) == {"card_evidence"}


def altered(content, name, change):
    value = json.loads(content[name])
    change(value)
    return content | {name: json.dumps(value).encode()}


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("card.json", lambda made: made["evaluation"]["metrics"]["ndcg@10"].update(value=0.99),
         "evaluation.metrics.ndcg@10.value is 0.99, but the evidence gives 0."),
        ("card.json", lambda made: made["evaluation"]["conflict"]["AUC"]["ci"].__setitem__(0, 0.9),
         "evaluation.conflict.AUC.ci.0 is 0.9"),
        ("card.json", lambda made: made["limits"].clear(), "limits is []"),
        ("card.json", lambda made: made.update(boast="the best"), "boast is \"the best\""),
        ("report.json", lambda report: report["metrics"]["compliance@1"].update(n=1000),
         "evaluation.metrics.compliance@1.n is 24, but the evidence gives 1000"),
        ("report.json", lambda report: report["model"].update(version="b-1"), "the report is about b-1"),
        ("report.json", lambda report: report.pop("metrics"), "gives no card (KeyError('metrics'))"),
        ("certificate.json", lambda told: told.update(rows_dropped=0), "data.rows_dropped_by_split is 30"),
    ],
)  # fmt: skip
def test_a_card_that_does_not_follow_is_found_with_its_place(name, change, told):
    found = governance.check_card("v1", altered(version_files(), name, change))
    assert broken(found) == {"card_evidence"}
    assert told in found[0].what


def test_markdown_that_is_not_the_cards_is_found():
    content = version_files()
    content["card.md"] = content["card.md"].replace(b"0.", b"1.", 1)
    found = governance.check_card("v1", content)
    assert [breach.what for breach in found] == ["card.md is another's"]
    for garbled in (b"[", b"[" * 100_000):
        assert broken(governance.check_card("v1", content | {"card.json": garbled})) == {"card_evidence"}


def test_a_card_of_another_format_is_unchecked():
    content = altered(version_files(), "card.json", lambda made: made.update(format=0))
    assert broken(governance.check_card("v1", content), checked=False) == {"card_evidence"}


@few
@given(st.data())
def test_garbage_beside_a_model_is_a_finding(data):
    content = version_files()
    parts = {name: json.loads(content[name]) for name in ("report.json", "certificate.json", "card.json")}
    which = data.draw(st.sampled_from([*parts]))
    parts[which] = spoil(data, parts[which])
    if which != "card.json":  # the card of what is spoiled, where there is one
        with contextlib.suppress(*governance.GARBLED):
            model = artifact.parse(content, "small")
            parts["card.json"] = card.build(model, parts["certificate.json"], parts["report.json"])
    content |= {name: json.dumps(part).encode() for name, part in parts.items()}
    assert all(isinstance(breach, rules.Breach) for breach in governance.check_card("v1", content))


@few
@given(st.data())
def test_a_garbage_report_is_a_finding(reported, data):
    _, passport, report = reported
    content = model_files() | {"report.json": json.dumps(spoil(data, report)).encode()}
    found = governance.check_model("v1", content, passport)
    assert {breach.rule for breach in found} <= {*rules.OF_REPORT}


@few
@given(st.data())
def test_a_garbage_certificate_is_a_finding(make, data):
    _, folder = make(many(4))
    path = pathlib.Path(folder) / "certificate.json"
    path.write_text(json.dumps(spoil(data, json.loads(path.read_text()))))
    with contextlib.suppress(InputError):
        check(folder)


@few
@given(st.data())
def test_a_garbage_policy_gets_an_input_error(tmp_path, data):
    (tmp_path / "p.json").write_text(json.dumps(spoil(data, msgspec.to_builtins(QUOTAS))))
    with contextlib.suppress(InputError):
        assert policy.read(tmp_path / "p.json", Quotas).name


def test_what_was_learned_from_is_found(make):
    _, folder = make(many())
    data, _ = governance.read_data(folder)
    assert governance.check_model("v1", model_files(), data) == []
    _, folder = make([line | {"canonical_id": f"shoot{int(line['id'][1:]) - 100}"} for line in many()])
    data, _ = governance.read_data(folder)
    found = governance.check_model("v1", model_files(), data)
    assert broken(found) == {"learned_from_test"}
    assert "canonical_id" in found[0].what


@pytest.fixture
def reported(make):
    """A model's files with its report on a dataset, as `evaluate` measures it; and the dataset."""
    _, folder = make(many(dim=6))
    data, _ = governance.read_data(folder)
    model, table = artifact.parse(model_files(), "small"), data.tables["test"]
    lists = to_lists(table, "gold")
    scored = artifact.score(model, lists)
    rungs = [System("rule", "", lists.dual_score), System("ours", "", scored.logit)]
    engine = figures.engine(len(lists.query_id), 0, 1000)
    conflict = {"reranker": scored.p_conflict}
    found = evaluation.measure(engine, rungs, conflict, scored, lists, "rule", "ours")
    about = {"label": "gold", "split": "test", "candidates": int(lists.labelled.sum()),
             "certificate": files.digest(data.passport)}  # fmt: skip
    report = files.finite(found | {"data": about})

    def check(change=lambda report: None, data=data):
        changed = copy.deepcopy(report)
        change(changed)
        content = model_files() | {"report.json": json.dumps(changed).encode()}
        return governance.check_model("v1", content, data)

    return check, data, report


@pytest.mark.parametrize(
    ("about", "told"),
    [({"label": "silver"}, "are of silver labels"), ({"label": "mixed"}, "are of mixed labels"),
     ({"candidates": 1000}, "counts 1000 candidates")],
)  # fmt: skip
def test_reports_of_silver_labels_are_found(reported, about, told):
    check, *_ = reported
    assert check() == []
    found = check(lambda report: report["data"].update(about))
    assert broken(found) == {"silver_labels"}
    assert told in found[0].what


@pytest.mark.parametrize(
    ("path", "told"),
    [("metrics compliance@1", "metrics.compliance@1 is 0.99, but the model's scores give 0."),
     ("metrics conflict_rate@1", "metrics.conflict_rate@1"), ("metrics ndcg@10", "(1 differ)"),
     ("slices d0 metrics compliance@3", "slices.d0.metrics.compliance@3"),
     ("conflict systems reranker auc", "conflict.systems.reranker.auc is 0.99")],
)  # fmt: skip
@pytest.mark.parametrize("value", [0.99, None])
def test_forged_figures_of_a_report_are_found(reported, path, told, value):
    check, *_ = reported
    change = lambda report: governance._find(report, path.split()).update(value=value)
    found = check(change)
    assert broken(found) == {"report_evidence"} and len(found) == 1
    assert told.replace("0.99", str(value)) in found[0].what


def test_what_a_report_on_other_data_says_is_unchecked(reported):
    check, data, _ = reported
    other = data._replace(passport=data.passport | {"rows_read": 1})
    found = check(data=other)
    assert broken(found) == set() and broken(found, checked=False) == {*rules.OF_REPORT}
    assert "about other data" in found[0].what


@pytest.mark.parametrize("content", [b"{", b"{}", b"3", b"[" * 100_000, b"null", b'{"data": {}}'])
def test_a_garbled_report_is_unchecked(reported, content):
    _, data, _ = reported
    found = governance.check_model("v1", model_files() | {"report.json": content}, data)
    assert broken(found) == set() and broken(found, checked=False) == {*rules.OF_REPORT}


POLICY = Policy(name="p", description="", superiority=[Superiority("compliance@1")])


def judgement(version, wanted=POLICY, **changes):
    return {
        "verdict": "PROMOTE", "candidate": {"label": version.label, "model": version.model},
        "policy": msgspec.to_builtins(wanted), "policy_hash": wanted.digest, "labels": "gold",
        "certificate": files.digest(CERTIFICATE), "checks": [{"check": "no leakage", "verdict": "pass"}],
    } | changes  # fmt: skip


@pytest.fixture
def live(tmp_path, make):
    """A registry whose v1 was promoted on a judgement, with some changes; and what governance finds."""
    registry = make_registry(tmp_path / "registry")
    version = registry.register(version_files(), {}, "tester")
    _, folder = make(many())
    data, _ = governance.read_data(folder)

    def log(kind="promote", passport=CERTIFICATE, **changes):
        judged = judgement(version, **changes)
        grounds = {"judgement": judged, "certificate": passport, "policy": judged["policy"]}
        kept = {what: registry.put_evidence(value) for what, value in grounds.items()}
        registry.append(lambda state: Draft(kind=kind, actor="t", version=version.label, evidence=kept,
                                            facts={"verdict": "PROMOTE"}))  # fmt: skip

    def check(policies=tmp_path / "policies"):
        return governance.check_registry(registry, data, str(policies))

    put_policies(tmp_path / "policies", p=POLICY)
    return registry, log, check


def put_policies(folder, **policies):
    """A folder of policies, by file name; one of them is of another kind."""
    folder.mkdir(exist_ok=True)
    for name, content in {**policies, "governance": QUOTAS}.items():
        (folder / f"{name}.json").write_bytes(msgspec.json.encode(content))
    return folder


def test_a_clean_registry_passes(live):
    registry, log, check = live
    assert check() == []  # nothing is live
    log()
    log("judge", verdict="HOLD")
    assert check() == []
    registry.register(version_files(2), {}, "tester")
    registry.append(lambda state: promotion(registry, "v2"))
    assert broken(check()) == {"champion_evidence"}
    registry.rollback("tester")
    assert broken(check()) == set()  # v1 had been promoted on evidence


def test_an_empty_registry_is_unchecked(tmp_path):
    found = governance.check_registry(make_registry(tmp_path), governance.Data("", CERTIFICATE, {}), POLICIES)
    assert broken(found) == {"broken_chain"} and broken(found, checked=False) == set(rules.OF_REGISTRY)


def test_versions_without_a_card_are_found(live):
    registry, log, check = live
    log()
    registry.register(model_files(2), {}, "tester")
    found = check()
    assert broken(found) == {"missing_card"} and found[0].where == "cotrr/v2"


LEAKY = copy.deepcopy(CERTIFICATE)
LEAKY["overlap"]["query_id"]["train/test"] = 2
UNSEEN = CERTIFICATE | {"near_duplicates": {"pairs": None, "why": "not looked for"}}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"verdict": "HOLD"}, "the verdict of event 2 is HOLD"),
        ({"candidate": {"label": "v2", "model": "other"}}, "event 2 judged v2 other"),
        ({"labels": "silver"}, "judged on silver labels"),
        ({"checks": [{"check": "gold labels", "verdict": "fail"}]}, "not passed: gold labels"),
        ({"checks": []}, "there are no checks"),
        ({"certificate": "0" * 64}, "their certificate is not kept"),
        ({"passport": LEAKY, "certificate": files.digest(LEAKY)}, "2 query_id in both train and test"),
        ({"labels": 3}, "rests on no judgement"),
    ],
)  # fmt: skip
def test_a_champion_without_evidence_is_found(live, changes, told):
    _, log, check = live
    log(**changes)
    found = check()
    assert broken(found) == {"champion_evidence"}
    assert told in found[0].what


def test_a_champion_on_data_that_were_not_looked_at_is_unchecked(live):
    _, log, check = live
    log(passport=UNSEEN, certificate=files.digest(UNSEEN))
    found = check()
    assert broken(found) == set() and broken(found, checked=False) == {"champion_evidence"}
    assert found[0].what == "its test data: near duplicates: not looked for"


def test_a_champion_by_a_policy_that_nobody_keeps_is_found(live, tmp_path):
    _, log, check = live
    log()
    lax = msgspec.structs.replace(POLICY, name="lax", minimum_clusters=10)
    log("judge", wanted=lax)  # to ask for another is no crime
    assert check() == []
    found = check(put_policies(tmp_path / "others", lax=lax))
    assert broken(found) == {"policy_unknown"}
    assert "policy 'p' that promoted it is no file of" in found[0].what


def test_lost_evidence_is_found(live, tmp_path):
    registry, log, check = live
    log()
    (digest,) = {e.evidence["judgement"] for e in registry.state().events if e.evidence}
    (tmp_path / "registry" / "cotrr" / "evidence" / f"{digest}.json").unlink()
    assert broken(check()) == {"champion_evidence", "broken_chain"}


def test_a_policy_changed_without_a_new_name_is_found(live, tmp_path):
    _, log, check = live
    log()
    other = msgspec.structs.replace(POLICY, maximum_looks=9)
    assert check() == []
    log("judge", wanted=other)
    assert broken(check()) == {"policy_changed"}
    path = put_policies(tmp_path / "changed", p=other) / "p.json"
    found = check(path.parent)
    assert broken(found) == {"policy_changed", "policy_unknown"}


def test_a_policy_changed_in_the_folder_is_found(live, tmp_path):
    _, log, check = live
    log()
    path = put_policies(tmp_path / "changed", p=msgspec.structs.replace(POLICY, maximum_looks=9)) / "p.json"
    found = check(path.parent)
    assert broken(found) == {"policy_changed", "policy_unknown"}
    assert {breach.where for breach in found} == {str(path), "cotrr/v1"}


def test_a_hash_that_is_not_the_policys_is_found(live):
    _, log, check = live
    log(policy_hash="0" * 64)
    assert broken(check()) == {"policy_changed", "policy_unknown"}
    with pytest.raises(InputError, match="no folder of policies"):
        check("nowhere")


def test_a_broken_chain_is_found(live, tmp_path):
    _, log, check = live
    log()
    event = tmp_path / "registry" / "cotrr" / "events" / "00000002.json"
    event.write_bytes(event.read_bytes().replace(b'"actor":"t"', b'"actor":"u"'))
    assert "broken_chain" in broken(check())
    fresh = Registry(LocalStore(tmp_path / "registry"))
    found = governance.check_registry(fresh, governance.Data("", CERTIFICATE, {}), POLICIES)
    assert broken(found) == {"broken_chain"}
    assert {"champion_evidence", "policy_changed"} <= broken(found, checked=False)


def test_changed_weights_are_found(live, tmp_path):
    _, log, check = live
    log()
    (path,) = (tmp_path / "registry").glob("cotrr/versions/*/weights.npz")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert broken(check()) == {"broken_chain"}


def test_differences_are_named_by_their_place():
    assert difference({"a": [1, {"b": None}]}, {"a": [1, {"b": None}]}) == ""
    assert difference({"a": [1, 2]}, {"a": [1, 3]}) == "a.1 is 2, but the evidence gives 3"
    assert difference({"a": 1}, {"a": 1.0}).startswith("a is 1,")
    assert difference([1], [1, 2]) == " is [1], but the evidence gives [1, 2]"


@pytest.fixture
def workflow(tmp_path):
    """Runs the very command of the workflow, in a checkout of its own, with variables of the workflow set."""
    job = yaml.safe_load(WORKFLOW.read_text())["jobs"]["governance"]
    (command,) = (step["run"] for step in job["steps"] if step.get("name") == "Check")
    for name in ("experiments", "cotrr"):
        (tmp_path / name).symlink_to(ROOT / name)
    path = os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ["PATH"]])
    unset = {name: "" for name in job["env"]} | {"JAX_PLATFORMS": "cpu"}

    def workflow(**variables):
        return subprocess.run(["bash", "-e", "-c", command], cwd=tmp_path, capture_output=True, text=True,
                              env=os.environ | unset | {"PATH": path} | variables)  # fmt: skip

    return workflow


def test_the_workflow_passes_on_clean_evidence(make, tmp_path, workflow):
    _, folder = make(many())
    Registry(LocalStore(tmp_path / "registry")).register(version_files(report=False), {}, "tester")
    done = workflow(DATA=folder, REGISTRY="registry")
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "governance" / "governance.json").read_text())
    assert result["passed"] and result["held"] == [*rules.RULES] and not result["not_asked"]
    assert "passed: 0 breaches, 0 unchecked, 0 waived, 17 rules hold" in done.stdout


def test_the_workflow_fails_with_the_list(make, tmp_path, workflow):
    _, folder = make(many(photographer=...))
    (tmp_path / "model").mkdir()
    for name, data in model_files().items():
        (tmp_path / "model" / name).write_bytes(data)
    done = workflow(DATA=folder, MODEL="model", WAIVE="photographers,missing_card")
    assert done.returncode == 1
    assert "breach: model: missing_card: no card.json and no card.md. Register it" in done.stdout
    assert "unchecked: model: card_evidence: there is no card. " in done.stdout
    assert "WAIVED: " in done.stderr and "photographers in d1: 0 to " in done.stderr
    assert "FAILED: 1 breaches, 1 unchecked, 2 waived" in done.stdout
    text = (tmp_path / "governance" / "governance.md").read_text()
    assert "| missing_card | model | no card.json" in text and "Not asked: broken_chain" in text


def test_what_is_live_is_checked_beside_a_model_that_is_not_registered(make, tmp_path, workflow):
    _, folder = make([line | {"canonical_id": f"shoot{int(line['id'][1:]) - 100}"} for line in many()])
    registry = make_registry(tmp_path / "registry", 2)
    registry.append(lambda state: promotion(registry, "v1"))
    (tmp_path / "model").mkdir()
    for name, data in model_files(3).items():
        (tmp_path / "model" / name).write_bytes(data)
    done = workflow(DATA=folder, MODEL="model", REGISTRY="registry")
    for where in ("model", "cotrr/v1"):
        assert f"breach: {where}: learned_from_test: " in done.stdout, where


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"DATA": "nowhere", "REGISTRY": "x"}, "no certificate"),
        ({"DATA": "x", "REGISTRY": "x", "WAIVE": "leek"}, "--waive=leek: no such rule"),
    ],
)
def test_wrong_calls_are_told_in_one_line(workflow, variables, told):
    done = workflow(**variables)
    assert done.returncode == 2 and told in done.stderr and "Traceback" not in done.stderr
