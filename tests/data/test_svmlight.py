"""svmlight lines: read by hand, refused where they are broken, and imported end to end."""

import gzip
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cotrr.data import dataset, runs, svmlight
from cotrr.data.contract import ATTRIBUTES
from cotrr.data.lists import to_lists
from cotrr.errors import InputError

ROOT = pathlib.Path(__file__).resolve().parents[2]
LINES = """# a comment alone

2 qid:7 1:0.5 3:-.25 #docid = D1
0\tqid:7\t2:1e-1
1.5 qid:x 1:+2. 2:3 3:4#no blank
0 qid:8
"""


def launch(*arguments: object, fails: int = 0) -> str:
    """Runs the launcher; returns what it said."""
    done = subprocess.run(
        [sys.executable, "-m", "experiments.import_svmlight", *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == fails, said
    assert "Traceback" not in said and "Warning" not in said
    return said


@pytest.fixture
def put(tmp_path):
    """Writes a file and returns its path; gzipped where its name ends in .gz."""

    def put(name: str, content: str | bytes) -> pathlib.Path:
        content = content if isinstance(content, bytes) else content.encode()
        path = tmp_path / name
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
        return path

    return put


@pytest.fixture
def source(put):
    """A file that was read, as part of a split."""

    def source(split: str, content: str, name: str | None = None) -> svmlight.Source:
        path = put(f"{name or split}.txt", content)
        return svmlight.Source(split, name or split, path, svmlight.read(path, name or split))

    return source


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_are_read(put, name, end):
    table = svmlight.read(put(name, LINES.replace("\n", end)))
    np.testing.assert_array_equal(table.grade, [2, 0, 1.5, 0])
    assert table.query.tolist() == ["7", "7", "x", "8"]
    assert table.features.dtype == np.float32
    expected = np.float32([[0.5, 0, -0.25], [0, 0.1, 0], [2, 3, 4], [0, 0, 0]])
    np.testing.assert_array_equal(table.features, expected)
    assert table.comment.tolist() == ["docid = D1", "", "no blank", ""]
    assert table.line.tolist() == [3, 4, 5, 6]


GOOD = b"0 qid:1 1:1\n"


@pytest.mark.parametrize(
    ("content", "line", "field", "reason"),
    [
        (b"x qid:1 1:1", 1, "grade", "'x' is not a number"),
        (GOOD + b"\n1:1 2:1", 3, "grade", "'1:1' is not a number"),
        (GOOD + b"-1 qid:1 1:1", 2, "grade", "'-1' is negative"),
        (GOOD + b"nan qid:1 1:1", 2, "grade", "'nan' is not a finite"),
        (GOOD + b"1e999 qid:1 1:1", 2, "grade", "'1e999' is not a finite"),
        (GOOD + b"1_0 qid:1 1:1", 2, "grade", "'1_0' is not a number"),
        (GOOD + b"0 qid:1 1:1 2", 2, "feature", "'2': expected <index>:<number>"),
        (GOOD + b"0 qid:1 a:1", 2, "feature", "'a:1': expected <index>:<number>"),
        (GOOD + b"0 qid:1 1.5:1", 2, "feature", "'1.5:1': expected <index>:<number>"),
        (GOOD + b"0 qid:1 -1:1", 2, "feature", "'-1:1': expected <index>:<number>"),
        (GOOD + b"0 qid:1 1234567890:1", 2, "feature", "from 1 to 999999999"),
        (GOOD + b"0 qid:1 1:", 2, "feature 1", "'' is not a number"),
        (GOOD + b"0 qid:1 1: 2", 2, "feature 1", "'' is not a number"),
        (GOOD + b"0 qid:1 1:2:3", 2, "feature 1", "'2:3' is not a number"),
        (GOOD + b"0 qid:1 1:0x1", 2, "feature 1", "'0x1' is not a number"),
        (GOOD + b"0 qid:1 2:nan", 2, "feature 2", "'nan' is not a finite"),
        (GOOD + b"0 qid:1 2:-Inf", 2, "feature 2", "'-Inf' is not a finite"),
        (GOOD + b"0 qid:1 1:0 2:1e39", 2, "feature 2", "not a finite number in float32"),
        (GOOD + b"0 qid:1 0:1", 2, "feature 0", "indices count from 1"),
        (GOOD + b"0 qid:1 3:1 2:1", 2, "feature 2", "comes after feature 3"),
        (GOOD + b"0 qid:1 3:1 3:1", 2, "feature 3", "comes after feature 3"),
        (GOOD + b"0 1:1 qid:1", 2, "qid", "right after the grade"),
        (GOOD + b"0 qid:1 qid:1 1:1", 2, "qid", "right after the grade"),
        (GOOD + b"0 qid: 1:1", 2, "qid", "right after the grade"),
        (GOOD + b"0 qid:\xff 1:1", 2, "qid", "not UTF-8"),
        (GOOD + b"0 1:1", 2, "qid", "no qid, though other lines"),
        (b"0 1:1\n" + GOOD, 1, "qid", "no qid, though other lines"),
        (GOOD + b"0 qid:2 1:1\n" + GOOD, 3, "qid", "query '1' begins again"),
        (GOOD + b"0 qid:1 999999999:1", 2, "feature 999999999", "too many for a dense matrix"),
        (b"\xef\xbb\xbf" + GOOD, 1, None, "byte-order mark"),
        (gzip.compress(GOOD, mtime=0), 1, None, "this is gzip"),
        (b"0 1:1", 1, "qid", "no qid, and no group sizes: "),
        (b"", None, None, "no rows"),
        (b"# 0 qid:1 1:1\n\n", None, None, "no rows"),
    ],
)
def test_broken_lines_are_told_with_their_place(put, content, line, field, reason):
    path = put("a.txt", content)
    with pytest.raises(InputError) as caught:
        svmlight.read(path)
    error = caught.value
    assert str(error.file) == str(path)
    assert (error.line, error.field) == (line, field)
    assert reason in error.reason


def test_files_that_are_not_there_or_break_off(put, tmp_path):
    with pytest.raises(InputError, match="nowhere.txt: no such file"):
        svmlight.read(tmp_path / "nowhere.txt")
    path = put("a.txt.gz", GOOD * 1000)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match="the gzip stream breaks"):
        svmlight.read(path)


garbage = st.one_of(
    st.binary(max_size=60),
    st.lists(
        st.sampled_from(["0", "1", "-1", "qid:1", "qid:2", "qid:", "1:0.5", "2:1e9", "3:1e99", "0:1", "2:nan",
                         "1:", ":", "#", "\n", "\r", "\t", "\0", "é", "1:1:1"]), max_size=30,
    ).map(lambda parts: " ".join(parts).encode()),
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(content=garbage)
def test_anything_is_read_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "garbage.txt"
    path.write_bytes(content)
    try:
        table = svmlight.read(path)
    except InputError:
        return
    assert len(table.grade) == len(table.query) == len(table.features) > 0
    assert np.isfinite(table.features).all() and (table.grade >= 0).all()


@pytest.mark.parametrize("zipped", ["", ".gz"])
def test_groups_make_queries(put, zipped):
    path = put("rank.train.gz", "1 1:1\n0 1:2\n# aside\n2 2:3\n")
    put(f"rank.train.query{zipped}", "2\n1\n")
    assert svmlight.read(path, "train").query.tolist() == ["train-1", "train-1", "train-2"]
    assert svmlight.read(path).query[0] == "rank.train-1"
    sizes = put("sizes", "1\n2\n")
    assert svmlight.read(path, "t", sizes).query.tolist() == ["t-1", "t-2", "t-2"]


@pytest.mark.parametrize(
    ("sizes", "line", "reason"),
    [("2\n", None, "add up to 2, but"), ("2\n0\n1\n", 2, "'0': expected"), ("2\nx\n", 2, "'x': expected"),
     ("", None, "add up to 0, but")],
)  # fmt: skip
def test_broken_groups(put, sizes, line, reason):
    path = put("a.txt", "1 1:1\n0 1:2\n2 2:3\n")
    groups = put("a.txt.query", sizes)
    with pytest.raises(InputError) as caught:
        svmlight.read(path)
    assert caught.value.line == line and reason in caught.value.reason
    assert str(caught.value.file) == str(groups)


def test_groups_that_do_not_fit(put, tmp_path):
    with pytest.raises(InputError, match="have their own qid"):
        svmlight.read(put("a.txt", GOOD), "a", put("sizes", "1\n"))
    with pytest.raises(InputError, match="none not there"):
        svmlight.read(put("b.txt", "0 1:1\n"), "b", tmp_path / "none")


def test_gains_by_hand():
    grade = np.array([0.0, 1, 2, 4])
    np.testing.assert_array_equal(svmlight.relevance(grade, 4, "linear"), [0, 0.25, 0.5, 1])
    np.testing.assert_allclose(
        svmlight.relevance(grade, 4, "exponential"), [0, 1 / 15, 3 / 15, 1], rtol=1e-14
    )
    huge = svmlight.relevance(np.array([0.0, 4999, 5000]), 5000, "exponential")
    np.testing.assert_allclose(huge, [0, 0.5, 1])


def test_normalization_by_hand():
    features = np.float32([[1, 5, 0], [3, 5, -1], [2, 5, 1], [7, 0, 0]])
    query = np.array(["a", "a", "a", "b"], object)
    expected = np.float32([[0, 0, 0.5], [1, 0, 0], [0.5, 0, 1], [0, 0, 0]])
    np.testing.assert_array_equal(svmlight.normalize_by_query(features, query), expected)
    wide = np.float32([[-3e38], [3e38]])  # its width is no float32
    found = svmlight.normalize_by_query(wide, np.array(["a", "a"], object))
    np.testing.assert_array_equal(found, [[0], [1]])


def test_a_query_belongs_to_one_file(source):
    train = source("train", "1 qid:1 1:1\n0 qid:2 1:1\n")
    test = source("test", "1 qid:3 1:1\n0 qid:3 1:1\n0 qid:2 1:1\n")
    with pytest.raises(InputError, match=r"test.txt, line 3, .*query '2' is in train .*: leakage"):
        svmlight.to_table([train, test], "linear", "none")
    again = source("train", "1 qid:2 1:1\n", "train2")
    with pytest.raises(InputError, match="query '2' .* stands in one file"):
        svmlight.to_table([train, again], "linear", "none")


def test_nothing_to_learn_from(source):
    with pytest.raises(InputError, match="every grade is 0"):
        svmlight.to_table([source("train", "0 qid:1 1:1\n")], "linear", "none")
    with pytest.raises(InputError, match="no line has a feature"):
        svmlight.to_table([source("train", "1 qid:1\n")], "linear", "none")


def test_a_document_is_another_candidate_in_each_query(source):
    lines = "1 qid:1 1:1 #docid = D\n0 qid:1 1:2 #docid = D\n0 qid:2 1:3 #docid = D inc = 1\n0 qid:2 1:4\n"
    table = svmlight.to_table([source("train", lines)], "linear", "none")
    assert table["canonical_id"].to_pylist() == ["1/D", "train:2", "2/D", "train:4"]
    assert table["id"].to_pylist() == ["D", "train:2", "D", "train:4"]


@pytest.fixture
def imported(put, tmp_path):
    """Two training files and a test file, imported by the launcher."""
    one = put("one.txt", "2 qid:1 1:1 2:4\n1 qid:1 1:3\n0 qid:1 2:2\n")
    two = put("two.txt.gz", "0 qid:2 3:1 # docid=A\n4 qid:2\n")
    test = put("test.txt", "1 qid:3 4:1\n")
    output = tmp_path / "data"
    said = launch(f"--train={one},{two}", f"--test={test}", f"--output={output}", "--gain=exponential",
                  "--normalize=query")  # fmt: skip
    assert "python -m experiments.train" in said
    assert said.count("warning") == said.count("near duplicates: not looked for") == 1
    return output


def test_round_trip(imported):
    table = dataset.read(imported, "train")
    lists = to_lists(table)
    assert lists.query_id.tolist() == ["1", "2"] and lists.domain.tolist() == ["svmlight"] * 2
    assert lists.constraints == ((), ()) and lists.text.shape == (2, 0)
    np.testing.assert_array_equal(lists.where, [[True, True, True], [True, True, False]])
    expected = np.float32(
        [[[1 / 3, 1, 0, 0], [1, 0, 0, 0], [0, 0.5, 0, 0]], [[0, 0, 1, 0], [0] * 4, [np.nan] * 4]]
    )
    np.testing.assert_array_equal(lists.image, expected)
    y = np.float32([[3 / 15, 1 / 15, 0], [0, 1, np.nan]])
    np.testing.assert_allclose(lists.y, y, rtol=1e-6)
    np.testing.assert_array_equal(lists.compliance, lists.y)
    assert np.isnan(lists.conflict).all()  # nobody has said
    assert lists.gold[lists.where].all() and np.isnan(lists.attributes).all()
    assert table["canonical_id"].to_pylist() == ["train1:1", "train1:2", "train1:3", "2/A", "train2:2"]
    assert len(to_lists(dataset.read(imported, "validation")).query_id) == 0
    assert to_lists(dataset.read(imported, "test")).y.tolist() == [[pytest.approx(1 / 15)]]


def test_certificate_has_what_train_and_evaluate_read(imported):
    found = dataset.read_certificate(imported)
    assert [found["counts"][name]["rows"] for name in ("train", "validation", "test")] == [5, 0, 1]
    assert found["labels"] == {"gold": 1, "silver": 0, "none": 0}
    assert found["rows_dropped"] == 0 and found["label_leakage"] == {}
    assert found["missing"]["image_embedding"] == 0
    assert all(found["missing"][name] == 1 for name in (*ATTRIBUTES, "text_embedding"))
    assert found["near_duplicates"]["pairs"] is None and "not looked for" in found["near_duplicates"]["why"]
    chosen = found["settings"]
    assert chosen["compliance_weight"] == 1 and chosen["max_grade"] == 4
    assert chosen["fractions"] == pytest.approx([5 / 6, 0, 1 / 6]) and chosen["split"]["method"] == "given"
    assert found["input"]["embedding_dim"] == 4 and len(found["input"]["hashes"]) == 3


def test_columns_are_those_of_a_run(imported, write_run, lines):
    prepared, _ = dataset.prepare(runs.read_run(write_run(lines)).table, (1, 0, 0), 0.7, "s", "strict")
    ours = dataset.read(imported, "train").schema
    assert ours.names == prepared.schema.names
    for name in set(ours.names) - {"image_embedding", "text_embedding"}:  # another length
        assert ours.field(name).type == prepared.schema.field(name).type, name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train=nowhere", "--output=out"], "nowhere: no such file"),
        (["--train=", "--output=out"], "expected at least one file"),
        (["--output=out"], "--train is required"),
        (["--train=one", "--test=one", "--output=out"], "query '1' is in train"),
        (["--train=one", "--output=out", "--group_files=a,b"], "2 for 1 files"),
        (["--train=one", "--output=out", "--gain=log"], "--gain"),
        (["--train=one", "--output=one"], "a file is in the way"),
    ],
)
def test_wrong_calls_are_told(put, tmp_path, arguments, message):
    put("one", "1 qid:1 1:1\n")
    places = {"=one": f"={tmp_path / 'one'}", "=out": f"={tmp_path / 'out'}"}
    for short, long in places.items():
        arguments = [argument.replace(short, long) for argument in arguments]
    assert message in launch(*arguments, fails=2)
    assert not (tmp_path / "out").exists()


def test_ohsumed(shared):
    tables = [svmlight.read(shared(f"ltr/ohsumed/S{i}.txt.gz")) for i in range(1, 6)]
    assert sum(len(table.grade) for table in tables) == 16_140
    assert len({query for table in tables for query in table.query}) == 106
    assert {table.features.shape[1] for table in tables} == {25}
    assert set(np.concatenate([table.grade for table in tables])) == {0, 1, 2}
    assert tables[0].comment[0] == "docid = 7612"


def test_lightgbm_example(shared, tmp_path):
    folder = shared("ltr/lightgbm")
    launch(f"--train={folder / 'rank.train.gz'}", f"--test={folder / 'rank.test.gz'}",
           f"--output={tmp_path / 'data'}")  # fmt: skip
    counts = json.loads((tmp_path / "data" / "certificate.json").read_text())["counts"]
    assert [counts[name][key] for name in ("train", "test") for key in ("rows", "queries")] == [
        3005,
        201,
        768,
        50,
    ]
    lists = to_lists(dataset.read(tmp_path / "data", "train"))
    assert lists.image.shape[-1] == 300 and lists.query_id[16] == "train-17"
