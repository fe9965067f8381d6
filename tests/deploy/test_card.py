"""The model card: it says what the evidence says, loudly where it must be, and the same in two ways."""

import copy
import functools
import json

import pytest
from hypothesis import strategies as st

from cotrr import files
from cotrr.deploy import card
from cotrr.errors import InputError
from cotrr.evaluate import acceptance, evaluation, figures, systems
from cotrr.evaluate.ranking import System
from cotrr.ranker import artifact
from tests.deploy.small import model_files
from tests.ranker.test_artifact import LISTS

CERTIFICATE = {
    "counts": {name: {"rows": 90, "queries": 24, "pictures": 30, "domains": 2}
               for name in ("train", "validation", "test")},
    "rows_read": 300, "rows_dropped": 30,
    "overlap": {key: {pair: 0 for pair in ("train/validation", "train/test", "validation/test")}
                for key in ("canonical_id", "query_id")},
    "near_duplicates": {"cosine_above": 0.98, "pairs": 0, "examples": []},
    "label_leakage": {}, "missing": {"brightness": 1.0, "contrast": 0.1},
    "labels": {"gold": 1.0, "silver": 0.0, "none": 0.0},
    "settings": {"compliance_weight": 0.7, "split": {"method": "strict"}},
    "settings_hash": "", "input": {"input": "runs/one", "manifest": {}}, "files": {},
}  # fmt: skip


def spoil(data, content):
    """A copy of JSON with one value somewhere inside of it replaced; `data` draws where and by what."""
    spoiled = {"": copy.deepcopy(content)}
    here, key = spoiled, ""
    while here[key] and isinstance(here[key], dict | list):
        if here is not spoiled and not data.draw(st.integers(0, 3)):
            break
        here = here[key]
        key = data.draw(st.sampled_from([*here] if isinstance(here, dict) else range(len(here))))
    here[key] = data.draw(st.sampled_from([None, [], {}, "", "\0", -1, True, 1e300, [[3]], {"a": {}}, ["a"]]))
    return spoiled[""]


@functools.cache
def _report(version: str) -> dict:
    model = artifact.parse(model_files(), "small")._replace(version=version)
    scored = artifact.score(model, LISTS)
    rungs = [*systems.ladder(model, LISTS), System("+Reranker", version, scored.logit)]
    engine = figures.engine(len(LISTS.query_id), 0, 1000)
    measured = evaluation.measure(
        engine, rungs, {"reranker": scored.p_conflict}, scored, LISTS, "CLIP-only", "+Reranker"
    )
    latency = {name: {"value": 0.5, "ci": [0.4, 0.6], "n": 300, "kind": "order statistics"}
               for name in ("p50_ms", "p95_ms")}  # fmt: skip
    reasons = [{"reason": "glass mismatch that Step 4 did not see", "count": 3, "share": 0.6, "fix": None}]
    found = measured | {
        "notices": [], "latency": latency | {"engine": "JAX"},
        "failures": {"queries": 24, "with_regret": 5, "reasons": reasons},
        "data": {"split": "test", "label": "gold", "queries": 24, "certificate": files.digest(CERTIFICATE),
                 "candidates": int(LISTS.labelled.sum())},
        "model": {"version": version}, "bootstrap": {"unit": "queries"},
    }  # fmt: skip
    return files.finite(found | {"acceptance": acceptance.table(found)})


def make_report(version: str) -> dict:
    """The parts of a report on the small model that a card rests on, as `evaluate` writes them."""
    return copy.deepcopy(_report(version))


@pytest.fixture
def model():
    found = artifact.parse(model_files(), "small")
    provenance = {"certificate": files.digest(CERTIFICATE), "labels": CERTIFICATE["labels"],
                  "calibrated_on": "gold"}  # fmt: skip
    return found._replace(provenance=provenance)


@pytest.fixture
def report(model):
    return make_report(model.version)


def said(model, certificate=CERTIFICATE, report=None):
    return "\n".join(card.build(model, certificate, report)["limits"])


def test_it_copies_the_figures_with_their_intervals(model, report):
    found = card.build(model, CERTIFICATE, report)["evaluation"]
    for metric, figure in report["metrics"].items():
        assert found["metrics"][metric] == {k: figure[k] for k in ("value", "ci", "n", "kind")}
        over_rule = found["over_rule"][metric]
        assert over_rule["value"] == report["gains"]["+SO+Conflict"][metric]["value"]
        assert found["over_baseline"][metric]["value"] == report["deltas"]["+Reranker"][metric]["value"]
    assert found["conflict"]["AUC"]["value"] == report["conflict"]["auc"]["value"]
    assert found["intervals"]["coverage"]["ci"] == report["uncertainty"]["coverage"]["ci"]
    assert set(found["latency"]) == {"p50_ms", "p95_ms"}
    assert set(found["domains"]) == {"d0", "d1"}
    assert found["failures"]["reasons"][0]["share"] == 0.6
    assert [row["verdict"] for row in found["acceptance"]] == [r["verdict"] for r in report["acceptance"]]


def test_it_is_pure_and_survives_json(model, report):
    before = copy.deepcopy(report), copy.deepcopy(CERTIFICATE)
    first, again = card.build(model, CERTIFICATE, report), card.build(model, CERTIFICATE, report)
    assert first == again == json.loads(json.dumps(first, allow_nan=False))
    assert card.markdown(first) == card.markdown(json.loads(json.dumps(first)))
    assert before == (report, CERTIFICATE)


def test_it_names_its_evidence(model, report):
    evidence = card.build(model, CERTIFICATE, report)["evidence"]
    digest = files.digest(CERTIFICATE)
    assert evidence == {"certificate": digest, "trained_on_certificate": digest,
                        "report": files.digest(report), "evaluated_on_certificate": digest}  # fmt: skip


def test_it_says_what_the_model_looks_at(model):
    config = model.config | {"groups": "so,conflict", "without": "brightness"}
    inputs = card.build(model._replace(config=config), CERTIFICATE)["inputs"]
    assert inputs["groups"] == ["so", "conflict"]
    assert "contrast" in inputs["attributes"] and "conflict_prob" in inputs["attributes"]
    assert not {"brightness", "clip_score"} & set(inputs["attributes"])
    assert inputs["embedding_lengths"] == {"image": 0, "text": 0}
    config = model.config | {"without": "embeddings"}
    inputs = card.build(model._replace(config=config), CERTIFICATE)["inputs"]
    assert "clip_score" in inputs["attributes"] and not any(inputs["embedding_lengths"].values())


def test_markdown_says_the_same_figures(model, report):
    text = card.markdown(card.build(model, CERTIFICATE, report))
    figure = report["metrics"]["compliance@1"]
    assert f"{figure['value']:.3f} [{figure['ci'][0]:.3f}, {figure['ci'][1]:.3f}]" in text
    for part in (
        model.version,
        "Coverage",
        "Latency p95",
        "glass mismatch",
        "strict",
        "**d0**",
        "24 queries",
    ):
        assert part in text, part
    assert "{{" not in text and "None" not in text and not text.endswith("\n\n")


def test_undefined_is_written_as_undefined(model, report):
    report["conflict"]["systems"]["reranker"]["auc"] = {"value": None, "ci": None, "n": 9, "kind": "",
                                                       "why": "all candidates are of one class"}  # fmt: skip
    made = card.build(model, CERTIFICATE, report)
    assert "| Conflict AUC | undefined (all candidates are of one class) | 9 |" in card.markdown(made)
    assert "1 figures are undefined (all candidates are of one class)." in made["limits"]


def test_nothing_is_claimed_without_a_report(model):
    made = card.build(model, CERTIFICATE)
    assert made["evaluation"] is None and made["evidence"]["report"] is None
    assert any("NOT EVALUATED" in limit for limit in made["limits"])
    assert "Not evaluated." in card.markdown(made)


def test_limits_follow_from_the_evidence(model, report):
    usual = said(model, CERTIFICATE, report)
    assert "SILVER" not in usual and "Data:" not in usual and "other data" not in usual
    silver = {"labels": {"gold": 0.5, "silver": 0.5, "none": 0.0}}
    assert "LEARNED FROM SILVER LABELS, 50.0%" in said(model._replace(provenance=silver))
    assert "have silver labels" in said(model, CERTIFICATE | silver)
    leak = {"overlap": {"canonical_id": {"train/test": 3}}, "label_leakage": {"contrast": "y rises with it"}}
    told = said(model, CERTIFICATE | leak)
    assert "3 canonical_id in both train and test" in told and "contrast alone determines y" in told
    chosen = model._replace(
        config=model.config | {"looked_at": 64}, provenance=model.provenance | {"calibrated_on": "silver"}
    )
    assert "chosen from 64 configurations" in said(chosen) and "calibrated on silver" in said(chosen)
    assert "not the data that it was trained on" in said(model, CERTIFICATE | {"rows_read": 1})


def test_limits_follow_from_the_figures(model, report):
    report["data"] |= {"label": "silver", "queries": 7}
    report["notices"] = ["m HAS LEARNED FROM 3 query_id of this split: its figures are optimistic."]
    report["slices"]["new"] = report["slices"]["d0"]
    worse = {"value": -0.1, "ci": [-0.2, -0.05], "n": 24, "kind": "bootstrap"}
    report["gains"]["+SO+Conflict"]["compliance@1"] = worse
    report["uncertainty"]["coverage"] |= {"value": 0.8, "ci": [0.7, 0.9]}
    told = said(model, CERTIFICATE, report)
    assert said(model, CERTIFICATE, report).startswith("Its figures rest on SILVER LABELS")
    for part in ("HAS LEARNED FROM 3 query_id", "nothing of these domains: new", "not the 95%",
                 "WORSE than Step 4's own rule in Compliance@1: −10.0 [−20.0, −5.0] pt",
                 report["power"]["text"]):  # fmt: skip
        assert part in told, part
    for row in report["acceptance"]:
        assert (f"{row['criterion']}: {row['verdict']}" in told) == (row["verdict"] != "met")


def test_another_models_report_is_refused(model, report):
    with pytest.raises(InputError, match="the report is about other-1, not light-"):
        card.build(model, CERTIFICATE, report | {"model": {"version": "other-1"}})


def test_markup_in_names_stays_text(model, report):
    report["slices"] = {"<script>|`x`": report["slices"]["d0"]}
    text = card.markdown(card.build(model, CERTIFICATE, report))
    assert "<script>" not in text and "&lt;script>\\|\\`x\\`" in text
