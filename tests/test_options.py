"""What launchers refuse of the flags that they share, before anything is read or written."""

import json
import types

import pytest

from experiments import terminal
from tests.commands import launch, run
from tests.conftest import scored_line

REQUIRED = {"generate_training_data": ["--input=x"], "rerank": ["--input=x", "--model=x"],
        "evaluate": ["--data=x", "--model=x"]}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("generate_training_data", ["--output=data", "--workers=2"], "--workers: the run is read at once"),
        ("generate_training_data", ["--output=data", "--runner=local"], "--runner: the run is read at once"),
        ("generate_training_data", ["--output=a.jsonl", "--part_mb=1"], "--part_mb: lines are not written"),
        ("generate_training_data", ["--output=s3://a/b"], "--output=s3://a/b: expected a path, not a URL"),
        ("evaluate", ["--output=s3://a/b"], "--output=s3://a/b: expected a path, not a URL"),
        ("evaluate", ["--output=b", "--workers=0"], "--workers"),
        ("rerank", ["--output=s3://a/b.jsonl"], "--output=s3://a/b.jsonl: expected a path, not a URL"),
        ("rerank", ["--output=b.jsonl", "--part_mb=1", "--workers=2"], "--part_mb, --workers: one file"),
    ],
)
def test_what_would_be_ignored_or_misread_is_refused(name, arguments, message):
    ended = run(name, *REQUIRED[name], *arguments)
    assert ended.status == 2
    assert message in ended.errors


@pytest.mark.parametrize("name", ["generate_training_data", "evaluate", "rerank"])
def test_shared_flags_are_in_the_help(name):
    said = launch(name, "--help", fails=1)
    assert "--workers:" in said and "--runner:" in said
    assert ("a gzip shard is one part" in " ".join(said.split())) == (name != "evaluate")


@pytest.mark.parametrize("output", ["data", "parts", "lines.jsonl"])
def test_nobody_looks_for_near_duplicates_unasked(output, write_run, tmp_path):
    folder = write_run([scored_line(q, i) for q in range(9) for i in range(4)])
    parts = ["--part_mb=0.01", "--workers=1"] if output == "parts" else []
    asked = lambda flag, place: launch("generate_training_data", f"--input={folder}", flag, *parts,
                                       f"--output={place}", "--fractions=0.4,0.3,0.3")  # fmt: skip
    for flag, pairs in (("--nonear_duplicates", type(None)), ("--near_duplicates", int)):
        place = tmp_path / flag / output
        asked(flag, place)
        told = place.with_name("lines.jsonl.certificate.json") if place.suffix else place / "certificate.json"
        assert type(json.loads(told.read_text())["near_duplicates"]["pairs"]) is pairs


def test_reading_tells_the_share_of_all_files_as_they_are(tmp_path, monkeypatch, capsys):
    (tmp_path / "scored.jsonl.gz").write_bytes(bytes(4_000_000))
    seconds = iter([0.0, 1.5, 3.0, 3.5, 9.0])
    monkeypatch.setattr(terminal, "time", types.SimpleNamespace(monotonic=lambda: next(seconds)))
    read = terminal.reading_progress(tmp_path / "scored.jsonl.gz")
    for _ in range(4):
        read(1_000_000)
    assert capsys.readouterr().out == "  2 of 4 MB read, 3 s left\n"
