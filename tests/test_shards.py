"""Work by shards: results in order, committed once, the same bytes whoever is killed when."""

import functools
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

from cotrr import shards
from cotrr.data import runs
from cotrr.data.lists import to_lists
from cotrr.deploy import rerank
from cotrr.errors import InputError
from cotrr.ranker import artifact
from cotrr.store import LocalStore
from tests.conftest import scored_line
from tests.ranker.test_artifact import make_model

ROOT = pathlib.Path(__file__).resolve().parents[1]
DIM = 6  # of the model's embeddings


# Functions that a process need not import this module for.
SQUARES = [f"print('to standard output, where results do not go') or {x} * {x}" for x in range(9)]
PROCESS = "__import__('time').sleep(0.1) or __import__('os').getpid()"


def refuse(x: int) -> int:
    if x == 3:
        raise InputError("three", line=x)
    return x


@pytest.fixture(params=[1, 3])
def runner(request):
    with shards.local(request.param) as local:
        yield local


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "light"
    artifact.save(make_model(), folder)
    return folder


@pytest.fixture
def long_run(write_run):
    """Forty queries of nine candidates."""
    return write_run([scored_line(q, i, dim=DIM) for q in range(40) for i in range(9)])


def make_job(model, output, **changes) -> rerank.Job:
    version = json.loads((model / "model.json").read_text())["version"]
    return rerank.Job(str(model), version, 5, False, str(output), 20_000)._replace(**changes)


def rerank_run(run, job, runner=map):
    return rerank.rerank_run(runs.find_run(run), job, runner, lambda _: None)


def content(folder: pathlib.Path) -> dict[str, bytes]:
    """All that a job leaves, by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and ".aside" not in path.parts}  # fmt: skip


def test_results_come_in_order_and_errors_whole(runner):
    assert list(runner(eval, SQUARES)) == [x * x for x in range(9)]
    results = runner(refuse, range(9))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(InputError, match="three") as caught:
        next(results)
    assert type(caught.value) is InputError and caught.value.line == 3  # also across a process


def test_nobody_waits_for_a_process_to_start():
    with shards.local(2) as runner:
        assert list(runner(eval, ["__import__('os').getpid()"] * 3)) == [os.getpid()] * 3


def test_few_tasks_are_under_way_at_once():
    asked = []
    with shards.local(2) as runner:
        results = runner(abs, (asked.append(x) or x for x in range(50)))
        for _ in range(5):
            next(results)
        assert len(asked) <= 5 + 4 * 2


def test_a_dead_process_is_an_error_and_not_a_hang():
    suicide = f"{PROCESS} == {os.getpid()} or __import__('os')._exit(7)"
    with shards.local(2) as runner, pytest.raises(RuntimeError, match="died .exit status 7. at"):
        list(runner(eval, [suicide] * 400))


def test_children_end_with_their_parent():
    code = ("import time; from cotrr import shards\nwith shards.local(3) as runner:\n"
            f"    print(*runner(eval, [{PROCESS!r}] * 50), flush=True); time.sleep(60)")  # fmt: skip
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    children = {int(word) for word in parent.stdout.readline().split()} - {parent.pid}
    parent.send_signal(signal.SIGKILL)
    parent.communicate()
    deadline = time.monotonic() + 10
    while any(map(alive, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert children and not any(map(alive, children))


def alive(process: int) -> bool:
    try:
        return pathlib.Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_work_is_committed_once(tmp_path):
    store, calls = LocalStore(tmp_path / "out"), []

    def work():
        calls.append(1)
        return {"part.txt": b"made"}, {"rows": 3}

    first = shards.once(store, "part", "key", work)
    assert shards.once(store, "part", "key", work) == first and len(calls) == 1
    (tmp_path / "out" / "records" / "part.json").unlink()  # killed before the record was put
    assert shards.once(store, "part", "key", work) == first and len(calls) == 2
    with pytest.raises(InputError, match="other input or with other settings"):
        shards.once(store, "part", "another key", work)
    with pytest.raises(InputError, match="already, with other content"):
        shards.once(store, "again", "key", lambda: ({"part.txt": b"other"}, {}))


def test_parts_are_the_lines_of_the_whole(model, long_run, tmp_path, runner):
    job = make_job(model, tmp_path / "out")
    manifest = rerank_run(long_run, job, runner)
    table = runs.read_run(long_run, keep_lines=True).table
    lists = to_lists(table)
    scored = rerank.score(rerank.load(job.model, job.version), lists)
    whole = b"".join(rerank.lines(table, lists, scored, 5, job.version))
    parts = [name for part in manifest["parts"] for name in part["files"]]
    assert len(parts) > 5
    assert b"".join((tmp_path / "out" / name).read_bytes() for name in parts) == whole
    assert (manifest["rows"], manifest["queries"]) == (360, 40)
    assert manifest["left_behind"] == rerank.left_behind(lists, scored, 5)


def test_the_scorer_says_what_the_model_says(model, long_run):
    lists = to_lists(runs.read_run(long_run).table)
    ours = rerank.score(rerank.load(str(model), make_job(model, "").version), lists)
    theirs = artifact.score(artifact.load(model), lists)
    for one, other in zip(ours, theirs, strict=True):
        assert one[lists.where] == pytest.approx(other[lists.where], abs=1e-4)


def test_again_changes_nothing_and_other_settings_are_refused(model, long_run, tmp_path):
    job = make_job(model, tmp_path / "out")
    rerank_run(long_run, job)
    before = content(tmp_path / "out")
    rerank_run(long_run, job)
    assert content(tmp_path / "out") == before
    with pytest.raises(InputError, match="job.json: is there already"):
        rerank_run(long_run, job._replace(top_m=3))
    text = (long_run / "scored.jsonl").read_text()
    (long_run / "scored.jsonl").write_text(text.replace('"subject_ratio": 0.3', '"subject_ratio": 0.4'))
    with pytest.raises(InputError, match="part-000000.json: made from other input"):
        rerank_run(long_run, job)


def test_ray_does_the_same(model, long_run, tmp_path):
    """On a real cluster of this machine, in processes of their own: Ray forks, and JAX is here."""
    pytest.importorskip("ray")
    launch = functools.partial(subprocess.run, cwd=ROOT, check=True, capture_output=True)
    for runner in shards.RUNNERS:
        launch(call(model, long_run, tmp_path / runner, f"--runner={runner}"))
        launch([sys.executable, "-m", "experiments.generate_training_data", "--part_mb=0.02",
                f"--input={long_run}", f"--output={tmp_path / runner / 'data'}",
                f"--runner={runner}"])  # fmt: skip
    assert content(tmp_path / "ray") == content(tmp_path / "local")
    assert len(list((tmp_path / "ray" / "data").glob("train-*.parquet"))) > 5


def call(model, run, output, *more) -> list[str]:
    """The launcher, for small parts."""
    return [sys.executable, "-m", "experiments.rerank", f"--model={model}", f"--input={run}",
            f"--output={output}", "--workers=2", "--part_mb=0.02", *more]  # fmt: skip


def test_killed_at_any_moment_it_ends_with_the_same_bytes(model, long_run, tmp_path):
    launch = functools.partial(subprocess.run, cwd=ROOT, check=True, capture_output=True)
    rng, broken_off = random.Random(0), 0
    launch(call(model, long_run, tmp_path / "whole"))
    parts = len(list((tmp_path / "whole").glob("part-*.jsonl")))
    for _ in range(3):
        process = subprocess.Popen(call(model, long_run, tmp_path / "killed"), cwd=ROOT,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        wanted = rng.randrange(1, parts)
        while process.poll() is None and len(list((tmp_path / "killed").glob("part-*.jsonl"))) < wanted:
            time.sleep(0.001)
        process.kill()
        process.wait()
        broken_off += not (tmp_path / "killed" / "manifest.json").exists()
    assert broken_off
    launch(call(model, long_run, tmp_path / "killed"))
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_bad_lines_are_told_with_their_place_in_the_shard(model, write_run, tmp_path):
    lines = [json.dumps(scored_line(q, i, dim=DIM)) for q in range(20) for i in range(9)]
    lines[100] = lines[100].replace('"subject_ratio": 0.3', '"subject_ratio": 3')
    lines[150] = lines[149]
    items = [f"{l['query_id']}/{l['id']}" for l in map(json.loads, lines)]
    run = write_run(lines, manifest=items)
    with pytest.raises(InputError, match="line 101, field `subject_ratio`"):
        rerank_run(run, make_job(model, tmp_path / "a"))
    manifest = rerank_run(run, make_job(model, tmp_path / "b", quarantine=True))
    aside = b"".join(data for name, data in sorted(content(tmp_path / "b").items()) if "quarantine" in name)
    assert [json.loads(line)["line"] for line in aside.splitlines()] == [101, 151]
    assert (manifest["rows"], manifest["quarantined"]) == (178, 2)


def test_a_query_in_two_parts_is_refused(model, write_run, tmp_path):
    lines = [scored_line(q, i, dim=DIM) for q in range(20) for i in range(9)]
    run = write_run([*lines[1:], lines[0]])
    with pytest.raises(InputError, match="a query's lines must stand together"):
        rerank_run(run, make_job(model, tmp_path / "out"))
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_run_that_its_manifest_contradicts_is_refused(model, write_run, tmp_path):
    lines = [scored_line(q, i, dim=DIM) for q in range(9) for i in range(9)]
    ids = [line["id"] for line in lines]
    rerank_run(write_run(lines, manifest=ids), make_job(model, tmp_path / "ids"))
    items = [f"{l['query_id']}/{l['id']}" for l in lines]
    for wrong in (items[1:], [*items, "q0/x"], [*items[1:], "q0/x"]):
        with pytest.raises(InputError, match=f"lists {len(wrong)} scored items, the lines have 81"):
            rerank_run(write_run(lines, manifest=wrong), make_job(model, tmp_path / f"{len(wrong)}"))


def test_another_encoder_is_refused(model, write_run, tmp_path):
    run = write_run([scored_line(0, i, dim=4) for i in range(3)])
    with pytest.raises(InputError, match="4 numbers where the model was trained on 6"):
        rerank_run(run, make_job(model, tmp_path / "out"))


def test_remote_output(model, long_run, tmp_path):
    """Through fsspec, whose store in memory has the same put-if-absent as s3:// and gs://."""
    fsspec = pytest.importorskip("fsspec")
    rerank_run(long_run, make_job(model, tmp_path / "here"))
    rerank_run(long_run, make_job(model, "memory://shards/reranked"))
    system = fsspec.filesystem("memory")
    there = {path.removeprefix("/shards/reranked/"): system.cat_file(path) for path in system.find("/shards")
             if ".aside" not in path}  # fmt: skip
    assert there == content(tmp_path / "here")
