"""Tests of the whole evaluation: its parts belong together, and what is missing is told."""

import json

import numpy as np
import pytest

from cotrr.evaluate import evaluation, probabilities, ranking
from cotrr.evaluate.figures import engine
from cotrr.evaluate.ranking import METRICS, System
from cotrr.ranker.artifact import Scored
from tests.evaluate.listing import check_figures, figures_of, make_lists

Q, N, B = 24, 5, 100
BY = engine(Q, seed=3, resamples=B)


@pytest.fixture(scope="module")
def lists():
    """24 queries of five candidates in two domains; the first has no gain."""
    rng = np.random.default_rng(0)
    compliance = rng.integers(0, 11, (Q, N)) / 10
    compliance[0] = 0
    return make_lists(compliance, rng.random((Q, N)), rng.random((Q, N)) < 0.4, domain=list("ab" * (Q // 2)))


@pytest.fixture(scope="module")
def scored():
    """A model's scores; of one query their order is that of the logits, of several it is not."""
    rng = np.random.default_rng(2)
    logit = rng.normal(size=(Q, N))
    score = 1 / (1 + np.exp(rng.normal(size=(Q, 1)) - logit))
    return Scored(score, np.full((Q, N), 0.1), score - 0.2, score + 0.2, np.clip(score + 0.1, 0, 1), logit)


@pytest.fixture(scope="module")
def systems(scored):
    """A baseline full of ties, a system that cannot be formed, and the model."""
    tied = np.random.default_rng(1).integers(0, 2, (Q, N)).astype(float)
    return [System("CLIP-only", "clip", tied), System("+SO", "so", None, "compliance_score is missing"),
            System("+Reranker", "v1", scored.logit)]  # fmt: skip


def measure(systems, scored, lists, by=BY, conflict=None, baseline="CLIP-only"):
    """All figures of the model."""
    conflict = {"reranker": scored.p_conflict, "step 4": lists.compliance} if conflict is None else conflict
    return evaluation.measure(by, systems, conflict, scored, lists, baseline, "+Reranker")


@pytest.fixture(scope="module")
def report(systems, scored, lists):
    return measure(systems, scored, lists)


class TestMeasure:
    def test_every_part_is_that_of_its_module(self, report, systems, scored, lists):
        ranked = ranking.ranking(BY, systems, lists, "CLIP-only", "+Reranker")
        expected = {
            **ranked,
            "power": ranking.power(ranked, Q),
            "conflict": probabilities.conflicts(
                BY, {"reranker": scored.p_conflict, "step 4": lists.compliance}, lists
            ),
            "uncertainty": probabilities.coverage(BY, scored.low, scored.high, lists),
            "score_calibration": probabilities.score_calibration(BY, scored.score, lists),
            "risk_coverage": ranking.risk_coverage(BY, scored.logit, scored.score, lists),
            **ranking.counts(systems, lists),
        }
        assert {name: report[name] for name in expected} == expected
        assert report.keys() - expected.keys() == {"conventions", "degenerate"}

    def test_is_fit_for_json_and_says_why_anything_is_missing(self, report):
        check_figures(report)
        assert json.loads(json.dumps(report, allow_nan=False)) == json.loads(json.dumps(report))
        assert len(list(figures_of(report))) > 100

    def test_same_inputs_give_the_same_report(self, report, systems, scored, lists):
        again = measure(systems, scored, lists)
        assert json.dumps(again) == json.dumps(report)

    def test_clusters(self, systems, scored, lists):
        found = measure(systems, scored, lists, engine(Q, 3, B, clusters=np.arange(Q) // 2))
        check_figures(found)
        kinds = {figure["kind"] for figure in figures_of(found) if figure["ci"]}
        assert all("clusters" in kind or kind == "Wilson" for kind in kinds)
        assert found["metrics"]["compliance@1"]["clusters"] == Q // 2

    def test_order_of_queries_does_not_matter_to_values(self, report, systems, scored, lists):
        order = np.random.default_rng(4).permutation(Q)
        moved = measure(
            [s._replace(scores=None if s.scores is None else s.scores[order]) for s in systems],
            Scored(*(part[order] for part in scored)),
            lists.take(order),
        )
        for here, there in zip(figures_of(report), figures_of(moved), strict=True):
            assert here["value"] == (there["value"] and pytest.approx(there["value"], abs=1e-9))
            assert here["n"] == there["n"]

    def test_missing_conflicts(self, systems, scored, lists):
        """λ = 1: labels are compliance alone."""
        found = measure(systems, scored, lists._replace(conflict=np.full_like(lists.conflict, np.nan)))
        check_figures(found)
        assert found["conflict"]["auc"]["why"] == "no candidates"
        assert found["metrics"]["conflict_rate@1"]["value"] is None
        assert found["metrics"]["compliance@1"]["ci"]

    def test_missing_compliance(self, systems, scored, lists):
        """λ = 0: labels are the absence of conflicts alone."""
        found = measure(systems, scored, lists._replace(compliance=np.full_like(lists.compliance, np.nan)))
        check_figures(found)
        assert found["metrics"]["compliance@1"]["value"] is None
        assert found["risk_coverage"]["area"]["value"] is None
        assert found["metrics"]["ndcg_y@10"]["ci"] and found["conflict"]["auc"]["ci"]

    def test_no_labels(self, systems, scored, lists):
        nothing = {name: np.full((Q, N), np.nan, np.float32) for name in ("y", "compliance", "conflict")}
        found = measure(systems, scored, lists._replace(**nothing))
        check_figures(found)
        assert all(figure["value"] is None for figure in figures_of(found))

    def test_one_query(self, systems, scored, lists):
        one = lists.take(np.array([1]))
        alone = [s._replace(scores=None if s.scores is None else s.scores[1:2]) for s in systems]
        found = measure(alone, Scored(*(part[1:2] for part in scored)), one, engine(1, 0, B))
        check_figures(found)
        assert all(figure["ci"] is None for figure in figures_of(found))
        assert found["metrics"]["compliance@1"]["value"] is not None


def test_conventions_name_every_metric(report):
    assert report["conventions"] is evaluation.CONVENTIONS
    assert set(METRICS) <= evaluation.CONVENTIONS.keys()
    assert all(text.endswith(".") for text in evaluation.CONVENTIONS.values())


class TestDegenerate:
    """A sentence for everything that a reader could overlook."""

    def test_of_this_report(self, report):
        told = report["degenerate"]
        assert "1 queries without any gain (left out of nDCG)" in told
        ties = report["ties"]["CLIP-only"]
        assert ties > 0
        text = f"{ties} queries of CLIP-only depend on the order of tied scores"
        assert any(line.startswith(text) for line in told)
        assert not any("+Reranker depend" in line for line in told)  # none of its scores is tied

    def test_figures_without_interval_and_auc_of_one_class(self, systems, scored, lists):
        one_class = lists._replace(conflict=np.zeros_like(lists.conflict))
        told = measure(systems, scored, one_class)["degenerate"]
        for name in ("reranker", "step 4"):
            assert f"conflict AUC of {name}: all candidates are of one class" in told
        constant = lists._replace(compliance=np.full_like(lists.compliance, 0.75))
        told = measure(systems, scored, constant)["degenerate"]
        assert any(line.startswith("compliance@1: all resamples agree") for line in told)

    def test_nothing_to_tell(self, systems, scored, lists):
        rng = np.random.default_rng(7)
        fine = lists._replace(compliance=rng.uniform(0.1, 1, (Q, N)).astype(np.float32))
        clear = [systems[0]._replace(scores=rng.normal(size=(Q, N))), systems[2]]
        wider = fine._replace(conflict=(rng.random((Q, N)) < 0.5).astype(np.float32))
        found = measure(clear, scored, wider)
        assert found["degenerate"] == []
