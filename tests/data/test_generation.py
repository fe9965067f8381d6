"""A dataset made in parts: the same as at once, whoever is killed when."""

import gzip
import json
import pathlib

import numpy as np
import pytest

from cotrr import files, shards
from cotrr.data import certificate, dataset, generation, runs, splits
from cotrr.errors import InputError
from cotrr.store import LocalStore
from tests.conftest import scored_line

SETTINGS = {"fractions": (0.5, 0.2, 0.3), "compliance_weight": 0.7, "split_salt": "s"}


@pytest.fixture
def lines():
    """Forty queries of nine candidates from fifty pictures; some lines lack an embedding or constraints."""
    rng = np.random.default_rng(3)
    lines = [scored_line(q, int(i), query_id=f"q{q}", canonical_id=f"shoot{i // 2}")
             for q in range(40) for i in rng.choice(50, 9, replace=False)]  # fmt: skip
    for line in lines[90:120]:
        del line["image_embedding"], line["text_embedding"]
    lines[200]["constraints"], lines[205]["odd"] = None, 1
    return lines


def make_job(output: pathlib.Path, **changes) -> generation.Job:
    return generation.Job(str(output), 3000, split_method="strict", **SETTINGS)._replace(**changes)


def generate(run: pathlib.Path, job: generation.Job, runner=map, aside=None) -> dict:
    return generation.generate(runs.find_run(run), job, aside, runner, lambda _: None)


def at_once(run: pathlib.Path, output: pathlib.Path, method: str, aside: pathlib.Path | None = None) -> dict:
    reading = runs.read_run(run, quarantine=aside)
    table, cost = dataset.prepare(reading.table, *SETTINGS.values(), method)
    settings = SETTINGS | {"split_method": method, "split": cost}
    found = runs.find_run(run)
    return dataset.write(table, output, settings, reading.summary | {"hashes": dataset.hash_files(found)})


def assert_same(parts: pathlib.Path, whole: pathlib.Path) -> None:
    """The same rows in the same order, and the same certificate but for the files' names."""
    for split in splits.SPLITS:
        assert dataset.read(parts, split).equals(dataset.read(whole, split))
    one, other = (dataset.read_certificate(folder) for folder in (parts, whole))
    assert {**one, "files": 0} == {**other, "files": 0}


@pytest.mark.parametrize("method", splits.METHODS)
def test_parts_hold_what_the_whole_holds(write_run, lines, tmp_path, method):
    run = write_run(lines)
    with shards.local(2) as runner:
        made = generate(run, make_job(tmp_path / "parts", split_method=method), runner)
    at_once(run, tmp_path / "whole", method)
    assert len(made["files"]) > 10
    assert_same(tmp_path / "parts", tmp_path / "whole")
    left = {path.name for path in (tmp_path / "parts").iterdir()}
    assert left == {*made["files"], dataset.CERTIFICATE} and not (tmp_path / "parts.parts").exists()


def test_shards_and_bad_lines(write_run, lines, tmp_path):
    """Lines are numbered in their own shard, and what is wrong with one is put aside."""
    texts = list(map(json.dumps, lines))
    texts[100] = texts[100].replace('"subject_ratio": 0.3', '"subject_ratio": 3')
    texts[250] = texts[249]
    items = [f"{line['query_id']}/{line['id']}" for line in map(json.loads, texts)]
    run = write_run(texts, manifest=items)
    content = (run / "scored.jsonl").read_text().splitlines(keepends=True)
    (run / "scored.jsonl").unlink()
    for number, stop in enumerate((180, 360)):
        (run / f"scored-{number}.jsonl").write_text("".join(content[180 * number : stop]))
    job, place = make_job(tmp_path / "parts"), tmp_path / "parts.quarantine.jsonl"
    with pytest.raises(InputError, match=r"scored-0\.jsonl, line 101, field `subject_ratio`"):
        generate(run, job)
    aside = tmp_path / "aside.jsonl"
    at_once(run, tmp_path / "whole", "strict", aside)
    made = generate(run, job, aside=place)  # what the error told as a remedy, in the same folder
    assert place.read_bytes() == aside.read_bytes()
    assert (made["input"]["quarantined"], made["input"]["quarantine"]) == (2, str(place))
    for split in splits.SPLITS:
        assert dataset.read(tmp_path / "parts", split).equals(dataset.read(tmp_path / "whole", split))
    with pytest.raises(InputError, match="other input or other settings"):
        generate(run, job)  # lines are missing


def test_broken_off_anywhere_it_ends_with_the_same_bytes(write_run, lines, tmp_path, monkeypatch):
    """Every write of the job in turn is the last that is done; then the job is called again."""
    run, writes, put = write_run(lines[:60]), 0, LocalStore.put
    generate(run, make_job(tmp_path / "whole"))
    monkeypatch.setattr(LocalStore, "put", lambda *call: _counted(put, *call))

    def _counted(put, *call):
        nonlocal writes
        if not writes:
            raise KeyboardInterrupt
        writes -= 1
        return put(*call)

    broken_off, allowed = 0, 0
    while True:
        writes = allowed
        folder = tmp_path / f"broken{allowed}"
        try:
            generate(run, make_job(folder))
            break
        except KeyboardInterrupt:
            broken_off += 1
        writes = -1
        generate(run, make_job(folder))
        assert content(folder) == content(tmp_path / "whole")
        allowed += 1
    assert broken_off > 20


def content(folder: pathlib.Path) -> dict[str, bytes]:
    assert not pathlib.Path(f"{folder}.parts").exists()
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_finished_parts_are_not_read_again(write_run, lines, tmp_path, monkeypatch):
    run, read, starts = write_run(lines), generation.parts.read, []
    monkeypatch.setattr(generation.parts, "read", lambda piece, *rest, **more: (
        starts.append(piece.start), read(piece, *rest, **more))[1])  # fmt: skip
    with pytest.raises(ZeroDivisionError):
        generation.generate(runs.find_run(run), make_job(tmp_path / "parts"), tmp_path / "aside", map,
                            lambda _: 1 / (len(starts) < 5))  # fmt: skip
    assert len(starts) == 5
    generate(run, make_job(tmp_path / "parts"))
    assert len(set(starts)) == len(starts) > 10


def test_other_ways_to_write_a_run(write_run, lines, tmp_path):
    """Gzipped, an empty shard among others, and a query's lines apart where a part holds them all."""
    near = [*lines[:9:2], *lines[9:18], *lines[1:9:2], *lines[18:]]
    run = write_run(near)
    content = (run / "scored.jsonl").read_bytes().splitlines(keepends=True)
    (run / "scored.jsonl").unlink()
    (run / "scored-0.jsonl.gz").write_bytes(gzip.compress(b"".join(content[:180])))
    (run / "scored-1.jsonl").write_bytes(b"")
    (run / "scored-2.jsonl").write_bytes(b"".join(content[180:]))
    at_once(run, tmp_path / "whole", "strict")
    generate(run, make_job(tmp_path / "parts"))
    assert_same(tmp_path / "parts", tmp_path / "whole")


def test_nothing_of_others_is_touched(write_run, lines, tmp_path):
    run, job = write_run(lines), make_job(tmp_path / "out")
    (tmp_path / "out" / "records").mkdir(parents=True)
    (tmp_path / "out" / "records" / "mine").write_text("precious")
    with pytest.raises(InputError, match="no certificate, so this is no dataset"):
        generate(run, job)
    assert (tmp_path / "out" / "records" / "mine").read_text() == "precious"
    with files.locked(tmp_path / "other.parts" / ".lock"), pytest.raises(InputError, match="another process"):
        generate(run, make_job(tmp_path / "other"))


def test_pictures_may_be_left_uncompared(write_run, lines, tmp_path):
    run, job = write_run(lines), make_job(tmp_path / "out", near_duplicates=False)
    made = generate(run, job)
    assert made["near_duplicates"]["pairs"] is None
    assert any("--nonear_duplicates" in what for what in certificate.unchecked(made))
    assert generate(run, job) == dataset.read_certificate(tmp_path / "out")
    with pytest.raises(InputError, match="other input or other settings"):
        generate(run, job._replace(near_duplicates=True))


def test_again_changes_nothing_and_other_settings_are_refused(write_run, lines, tmp_path):
    run, job = write_run(lines), make_job(tmp_path / "parts")
    made = generate(run, job)
    before = content(tmp_path / "parts")
    assert generate(run, job) == dataset.read_certificate(tmp_path / "parts")
    assert content(tmp_path / "parts") == before
    assert made["counts"] == dataset.read_certificate(tmp_path / "parts")["counts"]
    with pytest.raises(InputError, match="other input or other settings"):
        generate(run, job._replace(split_salt="t"))
    text = (run / "scored.jsonl").read_text()
    (run / "scored.jsonl").write_text(text.replace('"subject_ratio": 0.3', '"subject_ratio": 0.4'))
    with pytest.raises(InputError, match="other input or other settings"):
        generate(run, job)


def test_what_only_all_parts_show_is_refused(write_run, lines, tmp_path):
    with pytest.raises(InputError, match="a query's lines must stand together"):
        generate(write_run([*lines[1:], lines[0]]), make_job(tmp_path / "apart"))
    run = write_run(lines, manifest=["q0/p1"])
    with pytest.raises(InputError, match="lists 1 scored items, the lines have 360; .* only in the lines"):
        generate(run, make_job(tmp_path / "items"))
    shared = write_run(lines, manifest=[f"other/{i}" for i in range(360)])
    with pytest.raises(InputError, match="lists 360 scored items, the lines have 360; .* only in the lines"):
        generate(shared, make_job(tmp_path / "foreign"))
    other = [scored_line(q, i, dim=5) for q in range(40, 60) for i in range(9)]
    bare = write_run([*lines, *other]) / "scored.jsonl"
    with pytest.raises(InputError, match="line 361, field `image_embedding`: 5 numbers where this run has 4"):
        generate(bare, make_job(tmp_path / "lengths"))
    once = write_run(lines, manifest=sorted({line["id"] for line in lines}))  # each id once, in many queries
    generate(once, make_job(tmp_path / "once"))
    assert {path.parent.name for path in tmp_path.glob("*/certificate.json")} == {"once"}


def test_remote_input(write_run, lines, tmp_path):
    """Through fsspec, whose files in memory are read as those of s3:// and gs:// are."""
    fsspec = pytest.importorskip("fsspec")
    pytest.importorskip("upath")
    run = write_run(lines)
    fsspec.filesystem("memory").put(f"{run}/", "/runs/one/", recursive=True)
    here = generate(run, make_job(tmp_path / "here"))
    there = generate("memory://runs/one", make_job(tmp_path / "there"))
    assert there["input"]["input"] == "memory://runs/one"
    assert {**there, "input": 0} == {**here, "input": 0}
    assert there["input"]["hashes"] == here["input"]["hashes"]
    with pytest.raises(InputError, match="memory://runs/other: no such run"):
        runs.find_run("memory://runs/other")
