"""Lines become rows: each by itself, whatever the line before it was like."""

import gc
import json

import pytest

from cotrr.data import rows
from cotrr.errors import InputError
from tests.conftest import scored_line


def read(*lines, keep_lines=False):
    reader = rows.Reader(None, keep_lines)
    for number, line in enumerate(lines, 1):
        reader.add(rows.Line("f", number, json.dumps(line).encode()))
    return reader


def test_constraints_are_told_as_they_stand_with_their_keys_sorted():
    stated = ({"b": 1, "a": [{"d": "é", "c": None}]}, {"a": 1}, {"a": 1.0}, {"a": True}, {}, ...)
    table = read(*(scored_line(0, i, constraints=given) for i, given in enumerate(stated))).table()
    assert table["constraints"].to_pylist() == [
        '{"a": [{"c": null, "d": "\\u00e9"}], "b": 1}', '{"a": 1}', '{"a": 1.0}', '{"a": true}', "{}", None
    ]  # fmt: skip


def test_unknown_fields_change_nothing_else():
    line = scored_line(0, 0)
    plain, odd = read(line, keep_lines=True), read(line | {"odd": [1], "more": {}}, keep_lines=True)
    assert odd.unknown == [{"odd", "more"}] and plain.unknown == [set()]
    assert odd.facts == plain.facts
    assert odd.table().drop_columns("line_json").equals(plain.table().drop_columns("line_json"))
    assert json.loads(odd.table()["line_json"][0].as_py())["odd"] == [1]


def test_an_embedding_that_is_repeated_is_as_wrong_as_before():
    reader = read(scored_line(0, 0))
    for item in (1, 2):
        with pytest.raises(InputError, match="all zeros") as caught:
            reader.add(
                rows.Line("f", item, json.dumps(scored_line(0, item, text_embedding=[0] * 4)).encode())
            )
        assert (caught.value.line, caught.value.field) == (item, "text_embedding")
    reader.add(rows.Line("f", 3, json.dumps(scored_line(0, 3)).encode()))
    assert reader.table()["id"].to_pylist() == [scored_line(0, i)["id"] for i in (0, 3)]


@pytest.mark.parametrize("before", [gc.enable, gc.disable])
def test_collections_go_on_as_they_did(before, tmp_path):
    (tmp_path / "run.jsonl").write_text(json.dumps(scored_line(0, 0)))
    piece = rows.Piece(str(tmp_path / "run.jsonl"), 0, 9)
    try:
        before()
        assert rows.read_block(piece, None, keep_lines=False).lines == 1
        assert gc.isenabled() == (before is gc.enable)
    finally:
        gc.enable()
