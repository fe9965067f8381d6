"""A run reads the same whole or in pieces, by one process or several, with either parser of numbers."""

import itertools
import json
import random

import numpy as np
import pytest

from cotrr.data import rows, runs
from cotrr.errors import InputError
from tests.conftest import scored_line
from tests.data.test_runs import BAD_LINES

VECTOR = [0.1, -2.5e-3, 3.0, 4.25]
NO_EMBEDDINGS = {
    "nested": '{"query":"q","id":"a","constraints":{"image_embedding":[1,2]}}',
    "inside a text": '{"query":"q","id":"\\"image_embedding\\": [1]"}',
    "null": '{"query":"q","id":"a","image_embedding":null}',
    "a value": '{"query":"image_embedding","id":"text_embedding","other":[1]}',
    "of another name": '{"query":"q","id":"a","my_embedding":[1,2]}',
}
BROKEN_EMBEDDINGS = ("[1,2,3,true]", '[1,2,3,"4"]', "[1,2,3,[4]]", "[]", "[1,2,3,]", "[01,2,3,4]", "[1,2",
                     "[1 2 3 4]", "[1,2,3,4.5.6]", "[+1,2,3,4]", "[1.,2,3,4]", "{}", "[NaN,1]")  # fmt: skip


@pytest.fixture(params=["simdjson", "msgspec"])
def parser(request, monkeypatch):
    """Both parsers of numbers, where both are installed."""
    if request.param == "msgspec":
        monkeypatch.setattr(rows, "simdjson", None)
    else:
        pytest.importorskip("simdjson")


def mixed(seed: int) -> list[str]:
    """Lines that leave things out, contradict each other, stand twice or are broken."""
    rng = random.Random(seed)
    lost = ("text_embedding", "image_embedding", "constraints", "conflicts")
    drop = lambda: {name: ... for name in lost if rng.random() < 0.2}
    given = lambda: {"odd": 1} if rng.random() < 0.1 else {"clip_score": 0.5}
    lines = [json.dumps(scored_line(q, rng.randrange(9), **drop(), **given()))
             for q in range(4) for _ in range(6)]  # fmt: skip
    bad = [line if isinstance(line, str) else json.dumps(line) for line, *_ in BAD_LINES.values()]
    for line in [*rng.sample([line for line in bad if line.isascii()], 3), "", "  "]:
        lines.insert(rng.randrange(len(lines)), line)
    return lines


def reading(folder, quarantine):
    """All that reading gives, or the error."""
    try:
        found = runs.read_run(folder, quarantine=quarantine, keep_lines=True)
    except InputError as error:
        return str(error)
    aside = quarantine.read_bytes() if quarantine and quarantine.exists() else None
    columns = found.table.drop_columns(rows.EMBEDDINGS).to_pydict()
    vectors = [rows.embedding_matrix(found.table, name).tobytes() for name in rows.EMBEDDINGS]
    return found.summary, found.table.schema, columns, vectors, aside


@pytest.mark.parametrize("seed", range(5))
def test_pieces_change_nothing(seed, parser, write_run, tmp_path, monkeypatch):
    folder = write_run(mixed(seed))
    (folder / "manifest.json").unlink()
    bare = folder / "scored.jsonl"
    for quarantine in (None, tmp_path / "bad.jsonl"):
        whole = reading(bare, quarantine)
        for size in (150, 1000):
            monkeypatch.setattr(runs, "PIECE", size)
            assert reading(bare, quarantine) == whole
        monkeypatch.undo()


def test_processes_change_nothing(write_run, lines, tmp_path, monkeypatch):
    lines[30]["brightness"], lines[40] = "bright", lines[3]
    folder = write_run(lines, manifest=[f"{l['query_id']}/{l['id']}" for l in lines])
    read = lambda workers: runs.read_run(folder, quarantine=tmp_path / "bad", workers=workers)
    alone = read(1)
    monkeypatch.setattr(runs, "PIECE", 2000)
    together = read(2)
    assert together.summary == alone.summary and together.summary["quarantined"] == 2
    assert together.table.equals(alone.table)
    with pytest.raises(InputError, match="line 31, field `brightness`"):
        runs.read_run(folder, workers=2)


def test_a_contradiction_is_told_before_a_broken_line_behind_it(write_run):
    lines = [scored_line(0, 0), scored_line(0, 1), scored_line(0, 1), "{broken"]
    with pytest.raises(InputError, match="line 3.* was there already on .*line 2"):
        runs.read_run(write_run(lines, manifest=[]))


@pytest.mark.parametrize("text", [f"{VECTOR}", "[ 1 ,2.5e0,\t-3, 4E2 ]", "[-0.0,1e-400,0.1,2]"])
def test_numbers_are_those_that_json_reads(text, parser, write_run):
    line = f'{{"query":"q","id":"a","image_embedding": {text}}}'
    table = runs.read_run(write_run([line], manifest=["a"])).table
    np.testing.assert_array_equal(
        rows.embedding_matrix(table, "image_embedding"), np.float32([json.loads(text)])
    )


@pytest.mark.parametrize("text", BROKEN_EMBEDDINGS)
def test_a_broken_embedding_is_told_as_the_decoder_of_lines_tells_it(text, parser, write_run):
    line = f'{{"query":"q","id":"a","image_embedding":{text},"text_embedding":{VECTOR}}}'
    with pytest.raises(InputError) as told:
        runs.read_run(write_run([line], manifest=["a"]))
    with pytest.raises(InputError) as expected:
        rows.parse(rows.Line(told.value.file, 1, line.encode() + b"\n"))
    assert str(told.value) == str(expected.value)


@pytest.mark.parametrize("name", NO_EMBEDDINGS)
def test_what_only_looks_like_an_embedding_is_none(name):
    reader = rows.Reader(None, keep_lines=False)
    reader.add(rows.Line("f", 1, NO_EMBEDDINGS[name].encode()))
    table = reader.table()
    assert all(table[field].null_count == 1 for field in rows.EMBEDDINGS)


@pytest.mark.parametrize("line", [
    '{"query":"q","id":"a","image_embedding":[9,9],"image_embedding":[1,2]}',
    '{"query":"q","id":"a","image\\u005fembedding":[1,2]}',
    '{"query":"q","id":"a","constraints":{"image_embedding":[9,9]},"image\\u005fembedding":[1,2]}',
    '{"query":"q","id":"a","constraints":{"image_embedding":[9,9]},"image_embedding":[1,2]}',
])  # fmt: skip
def test_odd_lines_read_as_json_says(line):
    reader = rows.Reader(None, keep_lines=False)
    reader.add(rows.Line("f", 1, line.encode()))
    assert rows.embedding_matrix(reader.table(), "image_embedding").tolist() == [[1.0, 2.0]]


def test_cuts_between_queries(write_run, lines):
    folder = write_run(lines)
    run = runs.find_run(folder)
    for size in (1, 500, 5000, 10**9):
        plan = runs.pieces(run, size, whole_queries=True)
        contents = [list(rows.lines_of(piece)) for piece in plan]
        assert b"".join(itertools.chain.from_iterable(contents)) == (folder / "scored.jsonl").read_bytes()
        queries = [{json.loads(line)["query_id"] for line in part} for part in contents]
        assert sum(map(len, queries)) == 6
    assert len(runs.pieces(run, 1, whole_queries=True)) == 6
