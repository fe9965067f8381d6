"""Tests of the failures: regret by hand, one reason each, and what an example shows."""

import json

import numpy as np
import pyarrow as pa
import pytest
from statsmodels.stats.proportion import proportion_confint

from cotrr.data.contract import ATTRIBUTES
from cotrr.data.lists import Lists
from cotrr.evaluate import failures
from cotrr.evaluate.attribution import Explanation
from cotrr.ranker.artifact import Scored

NAN = np.nan
COMPLIANCE = np.array([
    [0.2, 0.9, 0.9, 0.4],  # shown: 0; best: 2, which the model likes better than 1
    [0.7, 0.1, NAN, NAN],  # shown: the best
    [0.5, 0.3, 0.8, NAN],  # candidate 2 has no label, so it is neither shown nor best
    [NAN, NAN, NAN, NAN],  # no label at all
    [0.0, 1.0, 0.5, NAN],  # the largest regret
], np.float32)  # fmt: skip
SCORES = np.array([
    [0.9, 0.1, 0.3, 0.2],
    [0.8, 0.2, 9.0, 9.0],
    [0.1, 0.6, 0.9, 9.0],
    [0.5, 0.4, 0.3, 9.0],
    [0.7, 0.2, 0.1, 9.0],
])  # fmt: skip
WHERE = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0]], bool)


@pytest.fixture
def lists():
    y = np.where(np.isnan(COMPLIANCE), NAN, 0.5).astype(np.float32)
    y[2, 2] = NAN
    queries, n = WHERE.shape
    text = lambda name: np.array([f"{name} {q}" for q in range(queries)], object)
    # Rows of the table run backwards, so that a position is never a row.
    rows = np.where(WHERE, WHERE.sum() - np.cumsum(WHERE).reshape(WHERE.shape), -1)
    return Lists(
        query_id=text("id"), query=text("query"), domain=text("domain"),
        constraints=(("color=pink", "glass=a=b"), *((),) * (queries - 1)),
        text=np.zeros((queries, 0)), image=np.zeros((queries, n, 0)), attributes=np.zeros((queries, n, 0)),
        y=y, compliance=COMPLIANCE, conflict=y, dual_score=np.full(WHERE.shape, NAN), gold=WHERE,
        row=rows, where=WHERE,
    )  # fmt: skip


@pytest.fixture
def table(lists):
    """The candidate of query q at position i is called `q-i`."""
    names = {int(lists.row[q, i]): f"{q}-{i}" for q, i in zip(*np.nonzero(WHERE), strict=True)}
    ids = [names[row] for row in range(len(names))]
    none = pa.nulls(len(ids), pa.float64())
    columns = {name: none for name in ATTRIBUTES} | {
        "id": ids,
        "url": [f"file:{name}.jpg" for name in ids],
        "subject_ratio": [0.5] * len(ids),
        "review_conflict_types": [["color_mismatch"] if name == "0-0" else None for name in ids],
        "palette_lab": [[[100.0, 0.0, 0.0], [0.0, 0.0, 0.0]] if name == "0-0" else None for name in ids],
        "image_embedding": [[0.0]] * len(ids),
    }
    return pa.table(columns)


@pytest.fixture
def scored():
    """Scores that are their own calibration, with intervals of ± 0.1."""
    return Scored(SCORES, np.full_like(SCORES, 0.05), SCORES - 0.1, SCORES + 0.1, SCORES / 10, SCORES)


@pytest.fixture(autouse=True)
def pushes(monkeypatch):
    """Attributions in place of a model's: `clip_score` pushes the shown one ahead, everywhere."""

    def explain(model, lists, query, first, second):
        names = {"subject_ratio": -1.0, "clip_score": 3.0}
        values = {name: np.full(len(query), value) for name, value in names.items()}
        return Explanation(np.full(len(query), 2.0), {"clip": values["clip_score"]}, values)

    monkeypatch.setattr(failures.attribution, "explain", explain)


def analyse(table, lists, scored, count=8):
    found = failures.analyse(failures.look(None, table, lists, scored, count), lists, scored)
    json.dumps(found, allow_nan=False)
    return found


def detect(table, lists):
    return failures.detect(failures.count_types(table, lists))


def test_regret(lists):
    expected = [0.7, 0.0, 0.2, NAN, 1.0]
    np.testing.assert_allclose(failures.regret(SCORES, lists), expected, atol=1e-6)


def test_scores_of_padding_do_not_matter(lists):
    hidden = np.where(WHERE, SCORES, NAN)
    np.testing.assert_array_equal(failures.regret(hidden, lists), failures.regret(SCORES, lists))


def test_largest_first(table, lists, scored):
    found = analyse(table, lists, scored)
    assert (found["queries"], found["with_regret"]) == (4, 3)
    assert found["total_regret"] == pytest.approx(1.9)
    assert found["mean_regret"] == pytest.approx(1.9 / 4)
    examples = found["examples"]
    assert [example["query_id"] for example in examples] == ["id 4", "id 0", "id 2"]
    assert [example["regret"] for example in examples] == pytest.approx([1.0, 0.7, 0.2], abs=1e-6)
    assert [(x["shown"]["id"], x["best"]["id"]) for x in examples] == [
        ("4-0", "4-1"), ("0-0", "0-2"), ("2-1", "2-0"),
    ]  # fmt: skip
    for example in examples:
        apart = example["best"]["compliance"] - example["shown"]["compliance"]
        assert example["regret"] == pytest.approx(apart)


def test_count_cuts_the_examples_and_not_the_reasons(table, lists, scored):
    found = analyse(table, lists, scored, count=1)
    assert [example["query_id"] for example in found["examples"]] == ["id 4"]
    assert sum(row["count"] for row in found["reasons"]) == 3


def test_both_candidates_are_as_the_table_has_them(table, lists, scored):
    example = analyse(table, lists, scored)["examples"][1]
    assert (example["query"], example["domain"]) == ("query 0", "domain 0")
    assert example["constraints"] == {"color": "pink", "glass": "a=b"}
    assert example["shown"] == {
        "id": "0-0", "url": "file:0-0.jpg", "compliance": pytest.approx(0.2), "score": 0.9,
        "score_low": pytest.approx(0.8), "score_high": pytest.approx(1.0), "p_conflict": pytest.approx(0.09),
        "conflicts": ["color_mismatch"], "attributes": {"subject_ratio": 0.5}, "std": 0.05,
        "palette": ["#ffffff", "#000000"],
    }  # fmt: skip
    assert example["best"]["conflicts"] == []
    assert example["best"]["palette"] == []
    assert example["best"]["score"] == 0.3
    assert example["why"]["margin"] == 2.0
    assert example["why"]["attributes"] == [
        {"name": "clip_score", "value": 3.0, "shown": None, "best": None},
        {"name": "subject_ratio", "value": -1.0, "shown": 0.5, "best": 0.5},
    ]
    assert example["violates"] == {
        "by_reviewer": ["color_mismatch"], "by_step4": [], "asked": {"color": "pink"},
    }  # fmt: skip
    assert not example["within_uncertainty"]  # 0.9 ± 0.1 and 0.3 ± 0.1


def test_scores_within_each_others_intervals_are_told(table, lists, scored):
    near = scored._replace(low=SCORES - 1, high=SCORES + 1)
    assert all(example["within_uncertainty"] for example in analyse(table, lists, near)["examples"])


def test_no_regret_has_no_examples(table, lists, scored):
    found = analyse(table, lists, scored._replace(logit=np.nan_to_num(COMPLIANCE)))
    assert (found["examples"], found["reasons"], found["total_regret"]) == ([], [], 0.0)


def step4(*types):
    return [{"type": kind, "severity": "soft", "confidence": 0.5} for kind in types]


def with_conflicts(table, **conflicts):
    """The table with Step 4's conflicts of some candidates, `q0_1` for 0-1; none elsewhere."""
    given = [step4(*conflicts.get("q" + name.replace("-", "_"), ())) for name in table["id"].to_pylist()]
    return table.append_column("conflicts", pa.array(given))


def with_reviews(table, **types):
    """The table with a reviewer's conflicts for every candidate."""
    given = [list(types.get("q" + name.replace("-", "_"), ())) for name in table["id"].to_pylist()]
    at = table.column_names.index("review_conflict_types")
    return table.set_column(at, "review_conflict_types", pa.array(given, pa.list_(pa.string())))


@pytest.mark.parametrize(
    ("reviewed", "accused", "reason"),
    [
        ({"q4_0": ["glass_mismatch"]}, {}, ("missed", "glass_mismatch", None)),
        ({"q4_0": ["glass"]}, {"q4_0": ["glass"]}, ("outweighed", "glass", "clip_score")),
        ({}, {"q4_1": ["color_mismatch"]}, ("false_alarm", "color_mismatch", None)),
        ({}, {}, ("unnamed", None, "clip_score")),
        # The best one breaks the same rule, so this is not why it lost.
        ({"q4_0": ["a"], "q4_1": ["a"]}, {}, ("unnamed", None, "clip_score")),
        # Both are accused alike, so neither is this.
        ({}, {"q4_0": ["a"], "q4_1": ["a"]}, ("unnamed", None, "clip_score")),
        # What Step 4 could not see comes before what it saw wrongly.
        ({"q4_0": ["a"]}, {"q4_1": ["b"]}, ("missed", "a", None)),
    ],
)  # fmt: skip
def test_each_failure_has_one_reason(table, lists, scored, reviewed, accused, reason):
    found = analyse(with_conflicts(with_reviews(table, **reviewed), **accused), lists, scored)
    first = next(row for row in found["reasons"] if "id 4" in row["queries"])
    assert (first["kind"], first["type"], first["attribute"]) == reason
    assert found["examples"][0]["reason"] == first["reason"]


def test_counts_and_shares_add_up(table, lists, scored, monkeypatch):
    reviewed = with_reviews(table, q4_0=["a"], q0_0=["b"], q2_1=["c"])
    for limit in (12, 1):
        monkeypatch.setattr(failures, "REASONS", limit)
        rows = analyse(reviewed, lists, scored)["reasons"]
        assert len(rows) == min(3, limit + 1)
        assert sum(row["count"] for row in rows) == 3
        assert sum(row["share"] for row in rows) == pytest.approx(1)
    assert rows[1]["reason"] == "other reasons"
    assert rows[0]["share"] == pytest.approx(1.0 / 1.9)


@pytest.mark.parametrize("count", [1, 2, 8])
def test_what_was_found_in_parts_is_what_is_found_in_the_whole(table, lists, scored, count):
    """In any parts: one has no failure, and the largest regret stands in the last."""
    told = with_conflicts(with_reviews(table, q4_0=["a"], q0_0=["b"], q2_1=["b"]), q0_0=["b"], q2_0=["c"])
    look = lambda at: failures.look(None, told, lists.take(at), Scored(*(part[at] for part in scored)), count)
    whole = look(np.arange(5))
    assert len(whole.examples) == min(count, 3)
    for parts in ([[0, 1], [2], [3], [4]], [[0], [1, 2, 3, 4]], [[0, 1, 2, 3, 4]]):
        assert failures.merge([look(np.array(part)) for part in parts], count) == whole


def test_of_equal_regrets_the_first_is_shown_first(table, lists, scored):
    shown = np.arange(4) == failures.shown_and_best(SCORES, lists)[0][:, None]
    even = lists._replace(compliance=np.where(shown, 0, 0.5).astype(np.float32))
    look = lambda at: failures.look(None, table, even.take(at), Scored(*(part[at] for part in scored)), 2)
    whole = look(np.arange(5))
    assert [example["query_id"] for example in whole.examples] == ["id 0", "id 1"]
    assert failures.merge([look(np.arange(1)), look(np.arange(1, 5))], 2) == whole


def test_more_failures_than_are_explained_at_once(table, lists, scored, monkeypatch):
    whole = failures.look(None, table, lists, scored)
    monkeypatch.setattr(failures, "BLOCK", 2)  # of three
    assert failures.look(None, table, lists, scored) == whole


def test_detection_is_counted_where_both_have_spoken(table, lists):
    reviewed = with_reviews(table, q0_0=["a"], q0_1=["a"], q1_0=["a", "b"])
    a, b = detect(with_conflicts(reviewed, q0_0=["a"], q4_2=["a"]), lists)
    assert (a["type"], a["reviewed"], a["found"], a["accused"], a["right"]) == ("a", 3, 1, 2, 1)
    assert a["recall"] == pytest.approx([1 / 3, *proportion_confint(1, 3, method="wilson")])
    assert a["precision"] == pytest.approx([1 / 2, *proportion_confint(1, 2, method="wilson")])
    assert (b["recall"][0], b["precision"]) == (0.0, None)
    assert detect(table, lists) == []  # Step 4 has told nothing


def test_a_fix_is_told_only_where_the_data_bear_it(table, lists, scored, monkeypatch):
    missed = with_conflicts(with_reviews(table, q4_0=["a"], q0_0=["a"], q2_1=["a"]))
    assert [row["fix"] for row in analyse(missed, lists, scored)["reasons"]] == [None]  # three queries only
    monkeypatch.setattr(failures, "FEWEST", 3)
    row = analyse(missed, lists, scored)["reasons"][0]
    assert row["fix"].startswith("Step 4 finds 0 % [0, 56] of the reviewer's cases of a:")
    assert "up to 47.5 points" in row["fix"]  # 1.9 of regret over 4 queries
    monkeypatch.setattr(failures, "GOOD", 0.5)  # the recall may be as high as 0.56
    assert analyse(missed, lists, scored)["reasons"][0]["fix"] is None


def test_without_a_reviewer_there_is_no_accusation_to_judge(table, lists, scored):
    silver = with_conflicts(table, q4_1=["a"])
    kinds = {row["kind"] for row in analyse(silver, lists, scored)["reasons"]}
    assert "false_alarm" not in kinds
