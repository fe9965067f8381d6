"""Tests of the failures: regret by hand, and the pictures that an example shows."""

import json
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from cotrr.data.contract import ATTRIBUTES
from cotrr.data.lists import Lists
from cotrr.evaluate import failures

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
    }
    return pa.table(columns)


@pytest.fixture
def intervals():
    return SimpleNamespace(score=SCORES, low=SCORES - 0.1, high=SCORES + 0.1, p_conflict=SCORES / 10)


def test_regret(lists):
    expected = [0.7, 0.0, 0.2, NAN, 1.0]
    np.testing.assert_allclose(failures.regret(SCORES, lists), expected, atol=1e-6)


def test_scores_of_padding_do_not_matter(lists):
    hidden = np.where(WHERE, SCORES, NAN)
    np.testing.assert_array_equal(failures.regret(hidden, lists), failures.regret(SCORES, lists))


def test_largest_first(table, lists, intervals):
    found = failures.largest(table, lists, SCORES, intervals)
    json.dumps(found, allow_nan=False)
    assert [example["query_id"] for example in found] == ["id 4", "id 0", "id 2"]
    assert [example["regret"] for example in found] == pytest.approx([1.0, 0.7, 0.2], abs=1e-6)
    assert [(x["shown"]["id"], x["best"]["id"]) for x in found] == [
        ("4-0", "4-1"), ("0-0", "0-2"), ("2-1", "2-0"),
    ]  # fmt: skip
    for example in found:
        apart = example["best"]["compliance"] - example["shown"]["compliance"]
        assert example["regret"] == pytest.approx(apart)


def test_count_cuts(table, lists, intervals):
    found = failures.largest(table, lists, SCORES, intervals, count=1)
    assert [example["query_id"] for example in found] == ["id 4"]


def test_both_candidates_are_as_the_table_has_them(table, lists, intervals):
    example = failures.largest(table, lists, SCORES, intervals)[1]
    assert (example["query"], example["domain"]) == ("query 0", "domain 0")
    assert example["constraints"] == {"color": "pink", "glass": "a=b"}
    assert example["shown"] == {
        "id": "0-0", "url": "file:0-0.jpg", "compliance": pytest.approx(0.2), "score": 0.9,
        "score_low": pytest.approx(0.8), "score_high": pytest.approx(1.0), "p_conflict": pytest.approx(0.09),
        "conflicts": ["color_mismatch"], "attributes": {"subject_ratio": 0.5},
    }  # fmt: skip
    assert example["best"]["conflicts"] == []
    assert example["best"]["score"] == 0.3


def test_no_regret_has_no_examples(table, lists, intervals):
    perfect = np.nan_to_num(COMPLIANCE)
    assert failures.largest(table, lists, perfect, intervals) == []
