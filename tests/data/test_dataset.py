"""Splits, labels, the dataset folder and its certificate."""

import json

import numpy as np
import pyarrow as pa
import pytest

from cotrr import files
from cotrr.data import certificate, dataset, labels, runs, splits
from cotrr.data.contract import ATTRIBUTES
from cotrr.data.lists import to_lists
from cotrr.errors import InputError
from tests.conftest import scored_line

FRACTIONS = (0.5, 0.2, 0.3)
SETTINGS = {"compliance_weight": 0.7}


@pytest.fixture
def many():
    """Forty queries of twenty candidates from sixty pictures, two frames per shoot."""
    rng = np.random.default_rng(5)
    return [scored_line(q, int(i), canonical_id=f"shoot{i // 2}")
            for q in range(40) for i in rng.choice(60, 20, replace=False)]  # fmt: skip


@pytest.fixture
def make(write_run, tmp_path):
    def make(lines, fractions=FRACTIONS, method="strict", salt="s"):
        reading = runs.read_run(write_run(lines))
        table, _ = dataset.prepare(reading.table, fractions, 0.7, salt, method)
        return table, dataset.write(table, tmp_path / "data", SETTINGS, reading.summary)

    return make


def test_hash_is_pinned():
    # Another value here means that every dataset splits anew: never change it lightly.
    np.testing.assert_allclose(
        splits.unit_hash("canonical_id", ["a", "shoot_001"], "cotrr"),
        [0.7086482363184882, 0.3664346234259578],
        rtol=0,
    )
    assert not np.allclose(splits.unit_hash("query_id", ["a"], "cotrr"), 0.7086482363184882)
    assert not np.allclose(splits.unit_hash("canonical_id", ["a"], "other"), 0.7086482363184882)


def test_hash_is_uniform():
    unit = splits.unit_hash("query_id", [str(i) for i in range(20000)], "x")
    assert unit.min() >= 0 and unit.max() < 1
    np.testing.assert_allclose(np.histogram(unit, 10, (0, 1))[0] / 20000, 0.1, atol=0.01)


def test_strict_split_has_no_overlap_and_counts_its_cost(many, make):
    table, result = make(many)
    assert result["overlap"] == {
        key: {"train/validation": 0, "train/test": 0, "validation/test": 0}
        for key in ("canonical_id", "query_id")
    }
    kept = sum(counts["rows"] for counts in result["counts"].values())
    assert kept + result["rows_dropped"] == len(many) == result["rows_read"]
    assert 0 < result["rows_dropped"] == table["split"].null_count
    assert all(counts["rows"] for counts in result["counts"].values())


def split_rows(queries, pictures, method):
    ids = (pa.chunked_array([column]) for column in (queries, pictures))
    return splits.split_rows(*ids, FRACTIONS, "s", method)


def test_split_does_not_depend_on_order(many):
    ids = np.array([[l["query_id"], l["canonical_id"]] for l in many], object)
    order = np.random.default_rng(0).permutation(len(ids))
    for method in splits.METHODS:
        split, _ = split_rows(ids[:, 0], ids[:, 1], method)
        again, _ = split_rows(ids[order, 0], ids[order, 1], method)
        np.testing.assert_array_equal(split[order], again)


def test_components_drop_nothing():
    query = np.repeat([f"q{i}" for i in range(400)], 3).astype(object)
    picture = np.array([f"p{i // 2}" for i in range(1200)], object)  # chains of few queries
    alone = [f"{p}-{q[1:]}" if int(q[1:]) % 4 == 0 else p for p, q in zip(picture, query, strict=True)]
    picture = np.array(alone, object)
    split, cost = split_rows(query, picture, "auto")
    assert cost["method"] == "components" and cost["rows_dropped"] == 0
    for ids in (query, picture):
        homes = {}
        for key, part in zip(ids, split, strict=True):
            assert homes.setdefault(key, part) == part
    np.testing.assert_allclose(np.bincount(split) / len(split), FRACTIONS, atol=0.1)


def test_a_fraction_may_be_zero(many, make, tmp_path):
    _, result = make(many, fractions=(1.0, 0.0, 0.0))
    assert result["counts"]["train"]["rows"] == len(many) and result["rows_dropped"] == 0
    assert result["counts"]["test"]["rows"] == 0
    assert len(to_lists(dataset.read(tmp_path / "data", "test")).query_id) == 0


@pytest.mark.parametrize("words", ["1", "0.5,0.5,0.5", "0.5,nan,0.5", "a,0,1", "1.2,-.2,0", "nan,0,1"])
def test_bad_fractions(words):
    with pytest.raises(ValueError, match=r"--fractions=.*adding up to 1"):
        splits.parse_fractions(words.split(","))


def test_planted_shared_picture_is_found(many, make, tmp_path):
    make(many)
    tables = {name: dataset.read(tmp_path / "data", name) for name in splits.SPLITS}
    stolen = tables["train"].slice(0, 1)
    tables["test"] = pa.concat_tables([tables["test"], stolen])
    found = certificate.certify({name: [table] for name, table in tables.items()}, 0, SETTINGS, {})
    assert found["overlap"]["canonical_id"]["train/test"] == 1
    assert found["overlap"]["query_id"]["train/test"] == 1
    assert any("train and test" in breach for breach in certificate.breaches(found))


def test_near_duplicate_pictures_are_found(many, make):
    table, _ = make(many)
    pictures = {name: set(table.filter(pa.compute.equal(table["split"], name))["canonical_id"].to_pylist())
                for name in ("train", "test")}  # fmt: skip
    one, other = min(pictures["train"]), min(pictures["test"])
    twin = next(l["image_embedding"] for l in many if l["canonical_id"] == one)
    for line in many:
        if line["canonical_id"] == other:
            line["image_embedding"] = [2 * v for v in twin]
    _, result = make(many)
    assert result["near_duplicates"]["pairs"] >= 1
    assert {one, other} <= set(result["near_duplicates"]["examples"][0].values())


def test_what_was_looked_for_is_no_doubt(many, make):
    assert certificate.unchecked(make(many)[1]) == []


@pytest.mark.parametrize("blind", [("train", "validation", "test"), ("test",)])
def test_pictures_without_an_embedding_are_not_compared(many, make, blind):
    table, _ = make(many)
    inside = table.filter(pa.compute.is_in(table["split"], pa.array(blind)))["canonical_id"].to_pylist()
    for line in many:
        if line["canonical_id"] in inside:
            del line["image_embedding"]
    _, result = make(many)
    near = result["near_duplicates"]
    assert near["pairs"] is None and near["why"].startswith("not looked for: no picture has an embedding")
    assert certificate.leaks(result) == []
    assert certificate.unchecked(result) == [f"near duplicates: {near['why']}"]
    assert f"near duplicates: {near['why']}" in certificate.breaches(result)


def test_what_a_certificate_does_not_tell_is_unchecked(many, make):
    _, result = make(many)
    result["overlap"]["canonical_id"].pop("train/test")
    assert certificate.unchecked(result) == ["not counted: canonical_id in both train and test"]
    assert len(certificate.unchecked(result | {"overlap": {}})) == 6
    for near in ({"pairs": None}, {}):
        found = certificate.unchecked(result | {"near_duplicates": near, "overlap": result["overlap"]})
        assert found[-1] == "near duplicates: not looked for"
    old = result | {"missing": result["missing"] | {"image_embedding": 1.0}}  # counted none, having seen none
    assert "no picture has an embedding" in certificate.unchecked(old)[-1]


def test_label_leakage_is_found(many, make):
    _, clean = make(many)
    assert clean["label_leakage"] == {}
    for line in many:
        line["brightness"] = round(
            1 - line["review"]["compliance"] * 0.7 - (1 - line["review"]["conflict"]) * 0.3, 6
        )
    _, leaky = make(many)
    assert leaky["label_leakage"] == {"brightness": "y falls with it"}
    for line in many:  # a code of y without order
        line["brightness"] = (line["brightness"] * 7919) % 1
    _, coded = make(many)
    assert coded["label_leakage"] == {"brightness": "each value of it has one y"}


def test_labels(write_run):
    lines = [scored_line(0, 0, review={"compliance": 0.6, "conflict": 1}),
             scored_line(0, 1, review=None, compliance_score=0.4, conflict_prob=0.3),
             scored_line(0, 2, review=None, compliance_score=...)]  # fmt: skip
    table = runs.read_run(write_run(lines)).table
    marks = labels.label(table, 0.7)
    np.testing.assert_allclose(marks.y, [0.42, 0.7 * 0.4 + 0.3 * 0.7, np.nan])
    np.testing.assert_allclose(marks.conflict, [1, 0.3, np.nan])
    assert marks.kind.tolist() == ["gold", "silver", None]
    with pytest.raises(ValueError, match="--compliance_weight=1.5"):
        labels.label(table, 1.5)


def test_shares_of_labels_and_missing_values(many, make):
    for line in many[: len(many) // 2]:
        del line["review"]
        del line["subject_ratio"]
    _, result = make(many, fractions=(1.0, 0.0, 0.0))
    assert result["labels"] == {"gold": 0.5, "silver": 0.5, "none": 0.0}
    assert result["missing"]["subject_ratio"] == 0.5 and result["missing"]["ice_ratio"] == 1.0
    assert any("silver" in breach for breach in certificate.breaches(result))


def test_lists_hold_each_row_once_and_pad_with_nothing(many, make, tmp_path):
    make(many)
    table = dataset.read(tmp_path / "data", "train")
    lists = to_lists(table)
    assert lists.where.sum() == len(table)
    np.testing.assert_array_equal(np.sort(lists.row[lists.where]), np.arange(len(table)))
    assert np.isnan(lists.attributes[~lists.where]).all() and np.isnan(lists.y[~lists.where]).all()
    q, i = np.argwhere(lists.where)[17]
    row = table.slice(int(lists.row[q, i]), 1).to_pylist()[0]
    assert row["query_id"] == lists.query_id[q] and row["domain"] == lists.domain[q]
    np.testing.assert_array_equal(lists.image[q, i], np.float32(row["image_embedding"]))
    assert lists.y[q, i] == np.float32(row["y"])
    column = list(ATTRIBUTES).index("color_delta_e")
    assert lists.attributes[q, i, column] == np.float32(row["color_delta_e"])
    assert np.isnan(to_lists(table, labels.SILVER).y).all()


def test_dataset_refuses_other_files(many, make, tmp_path):
    make(many)
    path = tmp_path / "data" / "test.parquet"
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(InputError, match="not the one that the certificate"):
        dataset.read(tmp_path / "data", "test")
    path.unlink()
    with pytest.raises(InputError, match="missing"):
        dataset.read(tmp_path / "data", "test")
    with pytest.raises(InputError, match="no certificate"):
        dataset.read(tmp_path, "test")


def test_json_lines_keep_the_run_and_add_split_and_y(many, make, write_run, tmp_path):
    many[0]["extra"] = {"kept": True}
    table, _ = make(many)
    counts = dataset.write_lines(runs.find_run(tmp_path / "run"), table, tmp_path / "out.jsonl")
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(written) == len(many) == sum(counts.values())
    for before, after in zip(many, written, strict=True):
        added = {name: after.pop(name) for name in ("split", "y", "label")}
        assert after == before
        review = before["review"]
        assert added["y"] == pytest.approx(0.7 * review["compliance"] + 0.3 * (1 - review["conflict"]))
        assert added["split"] in (*splits.SPLITS, None)


def test_files_replace_or_leave_alone(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"x": float("nan"), "y": np.float32(2), "z": np.arange(2)})
    assert json.loads(path.read_text()) == {"x": None, "y": 2.0, "z": [0, 1]}
    with pytest.raises(ZeroDivisionError), files.replacing(path) as temporary:
        temporary.write_text(str(1 / 0))
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"] and "2.0" in path.read_text()
