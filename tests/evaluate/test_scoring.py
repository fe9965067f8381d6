"""A split in parts: whatever they are, and whoever is killed when, the figures are those of one file."""

import functools
import itertools
import json
import pathlib
import re
import subprocess
import sys
import time
import types

import numpy as np
import pyarrow as pa
import pytest

from cotrr import files
from cotrr.data import dataset, runs
from cotrr.data.lists import clusters
from cotrr.errors import InputError
from cotrr.evaluate import failures, scoring
from cotrr.ranker import artifact
from cotrr.ranker.artifact import Scored
from cotrr.store import LocalStore
from experiments import evaluate as launcher
from experiments import terminal
from tests.conftest import scored_line
from tests.ranker.test_artifact import make_model

ROOT = pathlib.Path(__file__).resolve().parents[2]
DIM = 6  # of the model's embeddings
CUTS = (4, 5, 17, 30)  # queries before each part but the first: one part is a single query
SETTINGS = {"compliance_weight": 0.7, "fractions": [0, 0, 1], "split": {"method": "strict"}}
OWN = ("created_at", "commands", "seconds", "acceptance", "latency")  # of a report: names and timings
PROVENANCE = {"best_epoch": 3, "validation_loss": 0.5, "certificate": "c", "labels": {"gold": 1.0}}


def make_lines() -> list[dict]:
    """Forty queries of five to nine candidates; the shortest lists and all silver labels come first."""
    rng = np.random.default_rng(3)
    kinds = ["color_mismatch", "glass_mismatch", "garnish_missing"]
    some = lambda: [kind for kind in kinds if rng.random() < 0.3]
    found = []
    for q in range(40):
        for i in rng.choice(30, 5 + q // 9, replace=False):
            line = scored_line(
                100 + q, int(i), dim=DIM, canonical_id=f"own{i}", cluster_id=f"session {q // 3}",
                subject_ratio=rng.random(), color_delta_e=30 * rng.random(), conflict_prob=rng.random(),
                compliance_score=rng.random(), dual_score=rng.random(),
                conflicts=[{"type": kind, "severity": "soft", "confidence": 0.5} for kind in some()],
                review={"compliance": round(rng.random(), 1), "conflict": int(rng.random() < 0.4),
                        "conflict_types": some()},
            )  # fmt: skip
            found.append(line if q > 5 else line | {"review": None})
    return found


def write(lines: list[dict], folder: pathlib.Path) -> pathlib.Path:
    """A dataset whose test split has all lines."""
    folder.mkdir(parents=True)
    (folder / "run.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    reading = runs.read_run(folder / "run.jsonl")
    table, _ = dataset.prepare(reading.table, (0, 0, 1), 0.7, "s", "strict")
    dataset.write(table, folder / "data", SETTINGS, reading.summary)
    return folder / "data"


def in_parts(data: pathlib.Path, folder: pathlib.Path, cuts=CUTS) -> pathlib.Path:
    """The same dataset with its test split in several files."""
    table = dataset.load(data / "test.parquet")
    query = table["query_id"].combine_chunks().dictionary_encode().indices.to_numpy()
    edges = np.searchsorted(query, [0, *cuts, query.max() + 1])
    folder.mkdir(parents=True)
    passport = dataset.read_certificate(data)
    del passport["files"]["test.parquet"]
    for number, (start, stop) in enumerate(itertools.pairwise(edges)):
        name = f"test-{number:06d}.parquet"
        dataset.save(table.slice(start, stop - start), folder / name)
        passport["files"][name] = files.sha256(folder / name)
    files.write_json(folder / dataset.CERTIFICATE, passport)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two models, and a dataset in one file and in several."""
    folder = tmp_path_factory.mktemp("scoring")
    for name, hidden in (("light", 0), ("deep", 4)):
        artifact.save(make_model(hidden)._replace(name=name, provenance=PROVENANCE), folder / name)
    in_parts(write(make_lines(), folder / "one"), folder / "several")
    return folder


def evaluate(place: pathlib.Path, data: str, output: pathlib.Path, **given) -> dict:
    """The launcher in this process; its report."""
    usual = {"model": [str(place / "light")], "data": str(place / data), "output": str(output),
             "split": "test", "baseline": "clip", "cluster_by": None, "resamples": 1000, "seed": 0,
             "quick": False, "allow_overlap": False, "runner": "local", "workers": 1}  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launcher, "FLAGS", types.SimpleNamespace(**usual | given))
        launcher.main()
    return json.loads((output / "report.json").read_text())


@pytest.fixture(scope="module")
def whole(place):
    """The report of the dataset in one file."""
    return evaluate(place, "one/data", place / "whole")


@pytest.fixture(scope="module")
def several(place):
    """The report of the same in several."""
    return evaluate(place, "several", place / "reported")


def leaves(value, path="report"):
    """Every end of a nested report, by its path; pushes by name, as those of nothing come in any order."""
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            key = part["name"] if isinstance(part, dict) and "name" in part else key
            yield from leaves(part, f"{path}/{key}")
    else:
        yield path, value


def assert_same_report(one: dict, other: dict, atol: float = 1e-5) -> None:
    """Numbers to `atol`, all else to the letter, but for names of folders and what follows from timings."""
    timeless = lambda report: {
        **{key: value for key, value in report.items() if key not in OWN},
        "data": report["data"] | {"dataset": "", "certificate": ""},
        "acceptance": [row for row in report["acceptance"] if "Latency" not in row["criterion"]],
        "latency": report["latency"].get("engine"),  # the rest is of the first part alone
    }
    one, other = dict(leaves(timeless(one))), dict(leaves(timeless(other)))
    assert one.keys() == other.keys()
    for path, value in one.items():
        expected = pytest.approx(value, abs=atol) if isinstance(value, float) else value
        assert other[path] == expected, path
        assert type(other[path]) is type(value), path


def make_job(place, data="several", models=("light",), label="gold", cluster_by="query_id", store=None):
    named = tuple((str(place / name), artifact.load(place / name).version) for name in models)
    return scoring.Job(str(place / data), named, label, cluster_by, store)


def parts_of(job):
    return scoring.split_parts(job.data, "test")


def score(job, runner=map):
    return scoring.score(job, parts_of(job), runner, lambda part: None)


def assert_same(one, other, atol=0.0) -> None:
    """Two values of `Kept`; scores to `atol`."""
    for name, values in one.lists._asdict().items():
        theirs = getattr(other.lists, name)
        assert type(theirs) is type(values)
        assert name == "constraints" or theirs.dtype == values.dtype
        np.testing.assert_array_equal(theirs, values, err_msg=name)
    assert len(one.scored) == len(other.scored)
    for ours, theirs in zip(one.scored, other.scored, strict=True):
        for name in Scored._fields:
            values = getattr(ours, name)
            assert getattr(theirs, name).dtype == values.dtype
            np.testing.assert_allclose(getattr(theirs, name), values, atol=atol, rtol=0, err_msg=name)
    assert other.failures.reasons == one.failures.reasons
    assert other.failures.types == one.failures.types
    assert [e["query_id"] for e in other.failures.examples] == [e["query_id"] for e in one.failures.examples]
    assert other.named.to_pydict() == one.named.to_pydict()
    assert (other.rows, other.left_out) == (one.rows, one.left_out)


def test_the_data_are_worth_testing(whole):
    found = whole["failures"]
    assert found["with_regret"] > 2 * len(whole["examples"]) and len(whole["examples"]) == failures.EXAMPLES
    assert {row["kind"] for row in found["reasons"]} >= {"missed", "false_alarm", "unnamed"}
    assert whole["data"]["queries"] == 34 and whole["data"]["label"] == "gold"
    assert whole["ladder"][3]["system"] == "Step 4 dual_score"


def test_several_files_have_the_report_of_one(whole, several, place):
    assert_same_report(whole, several)
    assert {path.name for path in (place / "reported").iterdir()} == {
        "report.json", "report.md", "report.html", "tensorboard"
    }  # fmt: skip


def test_what_is_kept_of_parts_is_what_is_kept_of_the_whole(place):
    for cluster_by in ("query_id", "cluster_id", "canonical_id"):
        one, several = (score(make_job(place, data, ("light", "deep"), cluster_by=cluster_by))
                        for data in ("one/data", "several"))  # fmt: skip
        assert_same(one, several, atol=1e-6)
    assert several.left_out == 6
    table = dataset.read(place / "one" / "data", "test")
    everything, _ = scoring.labelled(table, "gold")
    np.testing.assert_array_equal(clusters(several.named, several.lists, "canonical_id"),
                                  clusters(table, everything, "canonical_id"))  # fmt: skip


def test_a_row_is_as_small_as_it_is_said_to_be(place):
    kept = score(make_job(place, models=("light", "deep")))
    arrays = [value for value in kept.lists if isinstance(value, np.ndarray) and value.dtype != object]
    of_scores = sum(values.nbytes for scored in kept.scored for values in scored)
    assert sum(values.nbytes for values in arrays) == 98 * kept.lists.where.size
    assert of_scores == 2 * 48 * kept.lists.where.size
    assert "98 bytes" in scoring.__doc__ and "48 of every model's" in scoring.__doc__


def test_what_is_committed_is_what_was_kept(place, tmp_path):
    store = LocalStore(tmp_path / "parts")
    for cluster_by in ("query_id", "canonical_id"):
        job = make_job(place, models=("light", "deep"), cluster_by=cluster_by)
        for part in parts_of(job):
            fresh = scoring.score_part(job, part)
            assert_same(fresh, scoring.score_part(job._replace(store=store), part))  # as it is committed
            again = scoring.score_part(job._replace(store=store), part)  # as it is read
            assert_same(fresh, again)
            assert again.failures == fresh.failures


@pytest.fixture
def another_processor(monkeypatch):
    """Scores whose last bits are another's."""

    def score(model, lists):
        found = SCORE(model, lists)
        return found._replace(logit=np.nextafter(found.logit, np.float32(9)))

    def begin():
        monkeypatch.setattr(artifact, "score", score)

    return begin


def test_killed_before_the_record_and_started_on_another_processor(place, tmp_path, another_processor):
    class Killed(LocalStore):
        def put(self, key, data):
            if key.startswith("records/"):
                raise Broken
            return super().put(key, data)

    job = make_job(place)
    part = parts_of(job)[3]
    with pytest.raises(Broken):
        scoring.score_part(job._replace(store=Killed(tmp_path / "parts")), part)
    another_processor()
    found = scoring.score_part(job._replace(store=LocalStore(tmp_path / "parts")), part)
    assert_same(scoring.score_part(job, part), found)


def test_the_quicker_of_two_processors_is_believed(place, tmp_path, another_processor):
    job = make_job(place, store=LocalStore(tmp_path / "parts"))
    part = parts_of(job)[3]
    quicker = []

    class Slow(LocalStore):
        def put(self, key, data):
            if key.startswith("records/"):
                another_processor()
                quicker.append(scoring.score_part(job, part))
            return super().put(key, data)

    alone = scoring.score_part(job._replace(store=None), part)
    found = scoring.score_part(job._replace(store=Slow(tmp_path / "parts")), part)
    assert_same(quicker[0], found)
    assert (found.scored[0].logit != alone.scored[0].logit).any()


def test_the_longest_name_of_a_split_can_be_committed(place, damaged, tmp_path):
    named = damaged.with_name("validation-000002.parquet")
    damaged.rename(named)
    passport = json.loads((named.parent / dataset.CERTIFICATE).read_text())
    passport["files"] = {named.name: files.sha256(named)}
    files.write_json(named.parent / dataset.CERTIFICATE, passport)
    job = make_job(place, named.parent, store=LocalStore(tmp_path / "parts"))
    (part,) = scoring.split_parts(job.data, "validation")
    scoring.score_part(job, part)
    assert scoring.committed(job, [part]) == {part}


def test_other_settings_never_collide(place, tmp_path):
    store = LocalStore(tmp_path / "parts")
    jobs = [make_job(place, store=store, **changes) for changes in (
        {}, {"models": ("deep",)}, {"models": ("light", "deep")}, {"models": ("deep", "light")},
        {"label": "silver"}, {"cluster_by": "cluster_id"})]  # fmt: skip
    part = parts_of(jobs[0])[1]
    for job in jobs:
        assert not scoring.committed(job, [part])
        scoring.score_part(job, part)
        assert scoring.committed(job, [part]) == {part}
    assert not scoring.committed(jobs[0], [part._replace(sha256="another")])


SCORE = artifact.score


class Broken(Exception):
    """What ends an evaluation in the middle."""


def counted(monkeypatch, stop_at: int = 0) -> list[int]:
    """The queries of each table that is scored from now on; the `stop_at`-th breaks."""
    calls = []

    def score(model, lists):
        calls.append(len(lists.query_id))
        if len(calls) == stop_at:
            raise Broken
        return SCORE(model, lists)

    monkeypatch.setattr(artifact, "score", score)
    return calls


def test_an_evaluation_that_broke_off_scores_what_is_left(place, tmp_path, monkeypatch, capsys, several):
    first = counted(monkeypatch, stop_at=4)
    with pytest.raises(Broken):
        evaluate(place, "several", tmp_path / "out")
    assert not (tmp_path / "out" / "report.json").exists()
    rest = counted(monkeypatch)
    report = evaluate(place, "several", tmp_path / "out")
    assert (first, rest) == ([0, 0, 11, 13], [13, 10])
    assert "3 of 5 parts were scored before\nscoring 177 rows\n" in capsys.readouterr().out
    assert not (tmp_path / "out" / launcher.SCRATCH).exists()
    assert_same_report(several, report, atol=0)  # to the last bit


def test_two_evaluations_into_one_folder_do_not_meet(place, tmp_path, monkeypatch):
    calls = counted(monkeypatch)
    with (
        files.locked(tmp_path / "out" / launcher.SCRATCH / "lock"),
        pytest.raises(InputError, match="another process writes here"),
    ):
        evaluate(place, "several", tmp_path / "out")
    assert not calls


def test_what_else_is_in_the_folder_stays(place, tmp_path):
    mine = tmp_path / "out" / "parts" / "mine"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    evaluate(place, "several", tmp_path / "out", quick=True)
    assert mine.read_text() == "mine"
    assert not (tmp_path / "out" / launcher.SCRATCH).exists()


def test_latency_tells_the_candidates_of_what_was_timed(place, whole, several):
    """The first part with labels has the queries 6 to 16, of 5 + q // 9 candidates each; all go to 39."""
    assert several["latency"]["candidates"] == np.median([5 + q // 9 for q in range(6, 17)]) == 6
    assert whole["latency"]["candidates"] == np.median([5 + q // 9 for q in range(6, 40)]) == 7


def test_a_url_is_no_folder_for_a_report(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="--output=s3://bucket/report: expected a path, not a URL. Name"):
        evaluate(place, "several", "s3://bucket/report")
    assert not any(tmp_path.iterdir())


def call(place: pathlib.Path, output: pathlib.Path, *more: str) -> list[str]:
    """The launcher, in a process of its own."""
    return [sys.executable, "-m", "experiments.evaluate", f"--model={place / 'light'}", "--resamples=1000",
            f"--data={place / 'several'}", f"--output={output}", "--workers=2", *more]  # fmt: skip


launch = functools.partial(subprocess.run, cwd=ROOT, check=True, capture_output=True, text=True)


def test_killed_it_goes_on_where_it_was(place, tmp_path, whole):
    """With two processes, both of which are gone with the one that is killed."""
    process = subprocess.Popen(call(place, tmp_path / "out"), cwd=ROOT, stdout=subprocess.DEVNULL)
    records = tmp_path / "out" / launcher.SCRATCH / "records"
    while process.poll() is None and not list(records.glob("test-*.json")):
        time.sleep(0.01)
    process.kill()
    assert process.wait() < 0
    said = launch(call(place, tmp_path / "out")).stdout
    assert re.search("[1-5] of 5 parts were scored before", said)
    assert_same_report(whole, json.loads((tmp_path / "out" / "report.json").read_text()))


def test_ray_says_the_same(place, tmp_path, whole):
    """On a real cluster of this machine, which is started before JAX has threads that a fork would lose."""
    pytest.importorskip("ray")
    said = launch(call(place, tmp_path / "out", "--runner=ray"))
    assert "fork" not in said.stderr
    assert_same_report(whole, json.loads((tmp_path / "out" / "report.json").read_text()))


def test_gold_in_any_part_makes_silver_no_label(place):
    glances = [scoring.glance(str(place / "several"), (), part) for part in parts_of(make_job(place))]
    kinds = [sorted(glance.labels) for glance in glances]
    assert kinds == [["silver"], ["silver"], ["gold", "silver"], ["gold"], ["gold"]]
    assert sum(glance.rows for glance in glances) == len(make_lines())
    assert scoring.label_of(frozenset().union(*(glance.labels for glance in glances))) == "gold"
    assert scoring.label_of(glances[0].labels) == "silver"


def test_what_one_part_lacks_is_not_missing_everywhere(place, tmp_path):
    """A term of the rule, the baseline, or all embeddings."""
    absent = dict.fromkeys(("compliance_score", "dual_score", "image_embedding", "text_embedding"))
    lines = [line | (absent if line["query_id"] < "q117" else {}) for line in make_lines()]
    in_parts(write(lines, tmp_path / "one"), tmp_path / "several")
    one, several = (
        score(make_job(place)._replace(data=str(tmp_path / data))) for data in ("one/data", "several")
    )
    assert_same(one, several, atol=1e-6)


def test_what_a_model_has_learned_from_counts_once(place, tmp_path, monkeypatch, capsys):
    """The queries q10 to q19, of which it knows q10 to q15, and pictures that stand in several parts each."""
    lines = [scored_line(q, i, dim=DIM) for q in range(10, 20) for i in range(q % 3, 30, 3)]
    in_parts(write(lines, tmp_path / "one"), tmp_path / "several", cuts=(2, 4, 7))
    table = dataset.read(tmp_path / "one" / "data", "test")
    told = artifact.learned_from(artifact.load(place / "light").seen, table)
    assert told.startswith("6 query_id and ")
    model = {"model": [str(place / "light")]}
    for data in ("one/data", "several"):
        calls = counted(monkeypatch)
        with pytest.raises(InputError, match=f"has learned from {told} of this split"):
            evaluate(tmp_path, data, tmp_path / "out", **model)
        assert not calls and not (tmp_path / "out").exists()
    counted(monkeypatch, stop_at=1)
    with pytest.raises(Broken):
        evaluate(tmp_path, "several", tmp_path / "out", allow_overlap=True, **model)
    assert f"HAS LEARNED FROM {told}" in capsys.readouterr().err


def test_a_part_without_overlap_hands_on_no_ids(place):
    job = make_job(place)
    assert all(len(scoring.glance(job.data, job.models, part).learned) == 0 for part in parts_of(job))


def test_no_cluster_is_told_before_anything_is_scored(place, tmp_path, monkeypatch):
    calls = counted(monkeypatch)
    for column, said in (("session", "no such column"), ("id", "each query needs one value")):
        with pytest.raises(InputError, match=said):
            evaluate(place, "several", tmp_path / "out", cluster_by=column)
    assert not any(calls)  # some parts have no labelled query


@pytest.fixture
def damaged(place, tmp_path):
    """A copy of the dataset in parts, to be damaged."""
    in_parts(place / "one" / "data", tmp_path / "several")
    return tmp_path / "several" / "test-000002.parquet"


def test_a_part_that_is_not_the_certified_one_is_refused(place, damaged, tmp_path):
    run = functools.partial(evaluate, place, damaged.parent, tmp_path / "out")
    dataset.save(dataset.load(damaged).slice(1), tmp_path / "other.parquet")
    for broken in ((tmp_path / "other.parquet").read_bytes(), damaged.read_bytes()[:100], b""):
        damaged.write_bytes(broken)
        with pytest.raises(InputError, match="test-000002.parquet: the file is not the one"):
            run()
    damaged.unlink()
    with pytest.raises(InputError, match="test-000002.parquet: this split is missing"):
        run()


def test_a_query_in_two_files_is_refused(place, damaged, tmp_path):
    again = damaged.with_name("test-000005.parquet")
    again.write_bytes(damaged.read_bytes())
    passport = json.loads((damaged.parent / dataset.CERTIFICATE).read_text())
    passport["files"][again.name] = files.sha256(again)
    files.write_json(damaged.parent / dataset.CERTIFICATE, passport)
    said = "is in two files of the split, test-000002.parquet and test-000005.parquet. Generate"
    with pytest.raises(InputError, match=said):
        evaluate(place, damaged.parent, tmp_path / "out")


def test_a_split_without_labels_is_told(place, tmp_path):
    bare = [line | {"review": None, "conflict_prob": None, "conflict_score": None} for line in make_lines()]
    in_parts(write(bare, tmp_path / "one"), tmp_path / "several")
    for data in ("one/data", "several"):
        with pytest.raises(InputError, match="the test split has no labelled rows"):
            evaluate(tmp_path, data, tmp_path / "out", model=[str(place / "light")])


def test_another_model_in_the_folder_is_told(place):
    with pytest.raises(InputError, match="the model is light-.*, not light-0. Start again"):
        scoring.load(str(place / "light"), "light-0")


def test_time_left_counts_what_is_scored_now(place, monkeypatch, capsys):
    """Of parts of 100 rows, one of which was scored before."""
    seconds = iter([0.0, 12.0, 12.5, 20.0])
    monkeypatch.setattr(terminal, "time", types.SimpleNamespace(monotonic=lambda: next(seconds)))
    monkeypatch.setattr(scoring, "committed", lambda job, parts: {parts[0]})
    parts = [scoring.Part(name, name) for name in "abcd"]
    glances = [scoring.Glance(100, frozenset(), pa.table({}))] * 4
    progress = launcher._progress(make_job(place), parts, glances)
    for part in parts:
        progress(part)
    assert capsys.readouterr().out.splitlines() == [
        "1 of 4 parts were scored before", "scoring 300 rows", "  200 of 400 rows scored, 24 s left",
    ]  # fmt: skip
