"""Tests of the acceptance table: what an interval decides, and what each line reads."""

import json

import pytest

from cotrr.evaluate import acceptance


def fig(value, low=None, high=None, **more):
    """A figure of a report."""
    return {"value": value, "ci": None if low is None else [low, high], "n": 90, "kind": "k"} | more


@pytest.mark.parametrize(
    ("low", "high", "at_least", "at_most"),
    [
        (0.6, 0.7, "met", "not met"),
        (0.3, 0.4, "not met", "met"),
        (0.4, 0.6, "not decided", "not decided"),
        (0.5, 0.6, "met", "not decided"),  # touching: the threshold itself is good enough
        (0.4, 0.5, "not decided", "met"),
        (0.5, 0.5, "met", "met"),
    ],
)
def test_interval_against_a_threshold(low, high, at_least, at_most):
    figure = fig((low + high) / 2, low, high)
    assert acceptance.judge(figure, 0.5) == at_least
    assert acceptance.judge(figure, 0.5, at_least=False) == at_most


@pytest.mark.parametrize("at_least", [True, False])
def test_negative_thresholds(at_least):
    verdict = lambda low, high: acceptance.judge(fig(low, low, high), -0.1, at_least)
    assert verdict(-0.05, 0.2) == ("met" if at_least else "not met")
    assert verdict(-0.3, -0.2) == ("not met" if at_least else "met")
    assert verdict(-0.2, 0.2) == "not decided"


@pytest.mark.parametrize("at_least", [True, False])
def test_no_number_is_not_measured_and_no_interval_decides_nothing(at_least):
    for nothing in (None, {}, fig(None, why="no data")):
        assert acceptance.judge(nothing, 0.5, at_least) == "not measured"
    for value in (0.0, 0.5, 1.0):
        assert acceptance.judge(fig(value), 0.5, at_least) == "not decided"


def test_zero_is_a_measurement():
    assert acceptance.judge(fig(0.0, 0.0, 0.0), 0.05, at_least=False) == "met"


@pytest.fixture
def report():
    """Differences to CLIP-only are read; those to other systems, and of other systems, must not be."""
    large = lambda: {"compliance@1": fig(0.5, 0.4, 0.6), "ndcg@10": fig(0.5, 0.4, 0.6)}
    return {
        "deltas": {"CLIP-only": large(), "+Reranker": large()},  # to any --baseline
        "gains": {
            "CLIP-only": {"compliance@1": fig(0.05, 0.031, 0.07), "ndcg@10": fig(0.05, 0.04, 0.059)},
            "+SO": large(),
        },
        "conflict": {
            "systems": {
                "step 4": {"auc": fig(0.5, 0.4, 0.6), "ece": fig(0.5, 0.4, 0.6)},
                "reranker": {"auc": fig(0.9, 0.88, 0.93), "ece": fig(0.03, 0.02, 0.049)},
            }
        },
        "latency": {"p50_ms": fig(0.1, 0.1, 0.1), "p95_ms": fig(1.2, 1.1, 1.3)},
    }


def test_table(report):
    rows = acceptance.table(report)
    json.dumps(rows, allow_nan=False)
    assert [(row["criterion"], row["verdict"]) for row in rows] == [
        ("Compliance@1 over CLIP-only ≥ +3 points", "met"),
        ("nDCG@10 over CLIP-only ≥ +6 points", "not met"),
        ("Conflict AUC ≥ 0.9", "not decided"),
        ("Conflict ECE ≤ 0.05", "met"),
        ("Latency p95 of one query ≤ 1 ms", "not met"),
    ]
    assert [row["threshold"] for row in rows] == [0.03, 0.06, 0.9, 0.05, 1.0]
    assert rows[0]["figure"] is report["gains"]["CLIP-only"]["compliance@1"]
    assert all(row["why"] == "" for row in rows)


def test_order_of_systems_does_not_matter(report):
    expected = acceptance.table(report)
    report["gains"] = dict(reversed(report["gains"].items()))
    assert acceptance.table(report) == expected


def test_table_of_what_was_not_measured(report):
    report["gains"]["CLIP-only"]["ndcg@10"] = fig(None, why="no gain anywhere")
    report["conflict"]["systems"]["reranker"]["auc"] = fig(0.95, why="one query alone has no interval")
    report["latency"] = {}
    rows = {row["metric"]: row for row in acceptance.table(report)}
    assert (rows["ndcg@10"]["verdict"], rows["ndcg@10"]["why"]) == ("not measured", "no gain anywhere")
    assert rows["conflict AUC"]["verdict"] == "not decided"
    assert "one query" in rows["conflict AUC"]["why"]
    assert (rows["latency"]["verdict"], rows["latency"]["why"]) == ("not measured", "not measured here")


def test_table_without_a_model():
    rows = acceptance.table({"gains": {}, "conflict": {"systems": {}}, "latency": {}})
    assert {row["verdict"] for row in rows} == {"not measured"}
    assert {row["why"] for row in rows} == {"not measured here"}
