"""Reading runs: what is accepted, and what each kind of bad input is told."""

import gzip
import json
import math

import numpy as np
import pytest

from cotrr.data import rows, runs
from cotrr.data.contract import ATTRIBUTES, Candidate, constraint_tokens, picture_of
from cotrr.data.lists import to_lists
from cotrr.errors import InputError
from tests.conftest import scored_line


def test_reads_every_field(write_run):
    line = scored_line(0, 0, object_area=0.2, glass_ratio=0.1, garnish_ratio=0.05, ice_ratio=0.0,
                       brightness=0.5, contrast=0.4, saturation=0.3, conflict_calibrated=0.2,
                       temperature_conflict=0.1, clarity_conflict=0.9, dual_score=1.5,
                       clip_score=0.7)  # fmt: skip
    table = runs.read_run(write_run([line])).table
    for name in set(ATTRIBUTES) - {"strong_conflicts", "soft_conflicts"}:
        assert table[name].to_pylist() == [line[name]], name
    assert table["strong_conflicts"].to_pylist() == [1.0]
    assert table["soft_conflicts"].to_pylist() == [0.0]
    assert table["dual_score"].to_pylist() == [1.5]
    assert table["conflicts"].to_pylist() == [line["conflicts"]]
    assert table["review_conflict"].to_pylist() == [line["review"]["conflict"]]
    np.testing.assert_array_equal(
        rows.embedding_matrix(table, "text_embedding")[0], np.float32(line["text_embedding"])
    )


def test_missing_is_nan_and_clip_score_is_the_cosine(write_run):
    line = scored_line(0, 0, subject_ratio=..., conflicts=None)
    table = runs.read_run(write_run([line])).table
    assert table["subject_ratio"].to_pylist() == [None]
    assert table["strong_conflicts"].to_pylist() == [None]
    a, b = np.array(line["text_embedding"]), np.array(line["image_embedding"])
    assert table["clip_score"][0].as_py() == pytest.approx(
        a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-6
    )


def test_no_embeddings_no_clip_score(write_run):
    line = scored_line(0, 0, text_embedding=..., image_embedding=...)
    reading = runs.read_run(write_run([line]))
    assert reading.table["clip_score"].to_pylist() == [None]
    assert {"image_embedding", "text_embedding", "clip_score"} <= set(reading.summary["absent_fields"])


def test_both_spellings_of_the_conflict_probability(write_run):
    line = scored_line(0, 0, conflict_prob=..., conflict_probability=0.9)
    assert runs.read_run(write_run([line])).table["conflict_prob"].to_pylist() == [0.9]
    with pytest.raises(InputError, match="both spellings"):
        runs.read_run(write_run([scored_line(0, 0, conflict_prob=0.1, conflict_probability=0.9)]))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"query": "q", "id": "a"}, ("q", "default", "a", "a")),
        ({"query": "q", "query_id": "1", "canonical_id": "c"}, ("1", "default", "c", "c")),
        ({"query": "q", "url": "x/p.jpg?w=3#top"}, ("q", "default", "x/p.jpg", "x/p.jpg")),
        ({"query": "q", "id": "a", "url": "x/p.jpg?w=3"}, ("q", "default", "a", "x/p.jpg")),
    ],
)
def test_keys_take_their_defaults(given, expected):
    row = Candidate(**given)
    assert (row.query_id, row.domain, row.id, row.canonical_id) == expected


def test_url_and_constraints():
    assert picture_of("a/b#c?d") == "a/b"
    assert constraint_tokens({"ice": "none", "garnish": ["mint", None]}) == ("garnish=mint", "ice=none")
    assert constraint_tokens(None) == ()


BAD_LINES = {
    "broken JSON": ('{"query": "a", ', "broken JSON", None),
    "not an object": ("[1, 2]", "expected `object`", None),
    "not UTF-8": ("\udcff", "broken JSON", None),
    "not UTF-8 inside": ('{"query": "a", "id": "b", "other": "\udcff"}', "broken JSON", None),
    "wrong type": (scored_line(0, 0, subject_ratio="big"), "expected `float", "subject_ratio"),
    "bool for a number": (scored_line(0, 0, subject_ratio=True), "got `bool`", "subject_ratio"),
    "out of range": (scored_line(0, 0, compliance_score=1.5), "<= 1.0", "compliance_score"),
    "negative": (scored_line(0, 0, color_delta_e=-1.0), ">= 0.0", "color_delta_e"),
    "NaN": (scored_line(0, 0, brightness=math.nan), "NaN or infinity", "brightness"),
    "infinity": (scored_line(0, 0, image_embedding=[1, math.inf, 0, 0]), "NaN", "image_embedding[1]"),
    "too large": ('{"query":"a","id":"b","clip_score":1e999}', "number out of range", "clip_score"),
    "too long": (scored_line(0, 0, image_embedding=[1e300, 1, 1, 1]), "of length inf", "image_embedding"),
    "too short": (scored_line(0, 0, image_embedding=[1e-9, 0, 0, 0]), "of length 1e-09", "image_embedding"),
    "huge": (scored_line(0, 0, color_delta_e=1e39), "<= 1000000.0", "color_delta_e"),
    "byte-order mark": ("\ufeff" + json.dumps(scored_line(0, 0)), "byte-order mark", None),
    "other length": (scored_line(0, 1, image_embedding=[1.0, 2.0]), "2 numbers where", "image_embedding"),
    "all zeros": (scored_line(0, 0, text_embedding=[0, 0, 0, 0]), "all zeros", "text_embedding"),
    "unknown label": (scored_line(0, 0, review={"compliance": 0.5, "conflict": 2}),
                      "enum", "review.conflict"),
    "half a label": (scored_line(0, 0, review={"compliance": 0.5}), "missing", "review.conflict"),
    "unknown severity": (scored_line(0, 0, conflicts=[{"type": "a", "severity": "medium", "confidence": 1}]),
                         "'medium'", "conflicts[0].severity"),
    "no key": ('{"query": "a"}', "one of `id`", "id"),
    "no query": ('{"id": "a"}', "missing required field", "query"),
    "another domain": (scored_line(9, 2, domain="elsewhere"), "differs from", "domain"),
    "another text": (scored_line(9, 2, text_embedding=[9, 9, 9, 9]), "differs from", "text_embedding"),
    "duplicate": (scored_line(9, 1), "was there already", "id"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_line_fails_with_place_and_field(name, write_run):
    line, reason, field = BAD_LINES[name]
    folder = write_run([scored_line(9, 1)])
    text = line if isinstance(line, str) else json.dumps(line)
    with open(folder / "scored.jsonl", "ab") as out:
        out.write(text.encode(errors="surrogateescape") + b"\n")
    with pytest.raises(InputError) as caught:
        runs.read_run(folder)
    error = caught.value
    assert error.line == 2 and error.file == str(folder / "scored.jsonl")
    assert reason in str(error) and error.field == field
    assert "--on_bad_line=quarantine" in str(error)


@pytest.mark.parametrize("name", BAD_LINES)
def test_quarantine_keeps_the_line_and_counts_it(name, write_run, tmp_path):
    line, reason, field = BAD_LINES[name]
    text = (line if isinstance(line, str) else json.dumps(line)).encode(errors="surrogateescape")
    folder = write_run([scored_line(9, 1), scored_line(9, 3)])
    with open(folder / "scored.jsonl", "ab") as out:
        out.write(text + b"\n")
    place = tmp_path / "out" / "bad.jsonl"
    reading = runs.read_run(folder, quarantine=place)
    assert reading.summary["quarantined"] == 1 and reading.summary["rows"] == 2
    record = json.loads(place.read_text())
    assert record["line"] == 3 and record["field"] == field and reason in record["reason"]
    assert "content" in record or "content_base64" in record


def test_quarantined_lines_count_as_present(write_run, lines, tmp_path):
    items = [f"{l['query_id']}/{l['id']}" for l in lines]
    lines[5]["brightness"] = "bright"
    texts = [json.dumps(line) for line in lines]
    texts[7] = texts[7][:20]  # broken: its key cannot be read
    read = lambda items: runs.read_run(write_run(texts, manifest=items), quarantine=tmp_path / "bad")
    assert read(items).summary["rows"] == 46
    with pytest.raises(InputError, match="lists 49 .* have 46; first example only in the manifest"):
        read([*items, "q9/x"])


def test_empty_runs(write_run, tmp_path):
    with pytest.raises(InputError, match="no candidates"):
        runs.read_run(write_run([], manifest=[]))
    folder = write_run(["{}"], name="only_bad", manifest=[])
    with pytest.raises(InputError, match="1 lines in quarantine"):
        runs.read_run(folder, quarantine=tmp_path / "bad.jsonl")


def test_run_that_is_not_completed(write_run, lines):
    with pytest.raises(InputError, match="'running'.*completed"):
        runs.read_run(write_run(lines, status="running"))


def test_manifest_disagrees(write_run, lines):
    items = [f"{l['query_id']}/{l['id']}" for l in lines]
    with pytest.raises(InputError, match=r"lists 49 .* have 48; first example only in the manifest: 'q9/x'"):
        runs.read_run(write_run(lines, manifest=[*items, "q9/x"]))
    with pytest.raises(InputError, match=r"lists 47 .* have 48; first example only in the lines"):
        runs.read_run(write_run(lines, manifest=items[1:]))
    assert len(runs.read_run(write_run(lines, manifest=sorted({l["id"] for l in lines}))).table) == 48


def test_manifest_broken_or_absent(write_run, lines):
    folder = write_run(lines, embedding_dim=5)
    with pytest.raises(InputError, match="4 numbers where this run has 5"):
        runs.read_run(folder)
    (folder / "manifest.json").write_text('{"run_id": 3}')
    with pytest.raises(InputError, match="manifest.json"):
        runs.read_run(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(InputError, match="needs its manifest"):
        runs.read_run(folder)
    reading = runs.read_run(folder / "scored.jsonl")  # the bare file is accepted, and noted
    assert reading.summary["manifest"] is None and reading.summary["rows"] == 48
    with pytest.raises(InputError, match="no such run"):
        runs.read_run(folder / "absent")


def test_ids_may_stand_once_for_each_query(write_run, lines):
    ids = [line["id"] for line in lines]
    assert len(runs.read_run(write_run(lines, manifest=ids)).table) == 48
    with pytest.raises(InputError, match="listed more often than it is there: 'p0'"):
        runs.read_run(write_run(lines, manifest=[*ids, *["p0"] * 9]))


def test_a_line_may_leave_out_what_others_say_of_the_query(write_run):
    bare = scored_line(0, 0, text_embedding=..., constraints=...)
    table = runs.read_run(write_run([bare, scored_line(0, 1)])).table
    lists = to_lists(table)
    assert lists.constraints == (("color=pink",),)
    np.testing.assert_array_equal(lists.text[0], np.float32(scored_line(0, 1)["text_embedding"]))


def test_scored_path_must_be_there(write_run, lines):
    with pytest.raises(InputError, match="not there"):
        runs.read_run(write_run(lines, scored_path="scored-final.jsonl"))


def test_scored_path_cannot_leave_the_folder(write_run, lines):
    with pytest.raises(InputError, match="leads out"):
        runs.read_run(write_run(lines, scored_path="../elsewhere.jsonl"))


def test_shards_gzip_and_latest_link(write_run, lines, tmp_path):
    folder = write_run(lines)
    text = (folder / "scored.jsonl").read_text().splitlines(keepends=True)
    (folder / "scored.jsonl").unlink()
    (folder / "scored-00.jsonl").write_text("".join(text[:20]))
    with gzip.open(folder / "scored-01.jsonl.gz", "wt") as out:
        out.write("".join(text[20:]) + "\n\n")
    (tmp_path / "latest").symlink_to(folder.name)
    table = runs.read_run(tmp_path / "latest").table
    assert [
        f"{q}/{i}" for q, i in zip(table["query_id"].to_pylist(), table["id"].to_pylist(), strict=True)
    ] == [f"{l['query_id']}/{l['id']}" for l in lines]
    whole = (folder / "scored-01.jsonl.gz").read_bytes()
    (folder / "scored-01.jsonl.gz").write_bytes(whole[:-30])
    with pytest.raises(InputError, match="gzip stream breaks"):
        runs.read_run(tmp_path / "latest")
    (folder / "scored-00.jsonl.gz").write_bytes(whole)
    with pytest.raises(InputError, match="both plain and gzipped"):
        runs.read_run(folder)


def test_unknown_fields_are_counted_and_lines_kept(write_run, lines):
    lines[3]["colour_of_the_bar"] = "mahogany"
    reading = runs.read_run(write_run(lines), keep_lines=True)
    assert reading.summary["unknown_fields"] == {"colour_of_the_bar": 1}
    kept = json.loads(reading.table["line_json"][3].as_py())
    assert kept == {k: v for k, v in lines[3].items() if not k.endswith("_embedding")}
