"""The launchers end to end, as commands, with their outputs read back."""

import json
import re
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cotrr.ranker import artifact
from experiments import training_folder
from tests.commands import ROOT, launch, make_data, run, start
from tests.conftest import scored_line


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    """Simulate, generate, train and evaluate at small size, once."""
    work = tmp_path_factory.mktemp("road")
    make_data(work, 70, 40, "0.5,0,0.5")
    launch("train", f"--data={work / 'data'}", f"--workdir={work / 'model'}",
           "--flagfile=experiments/recipes/cotrr_lite.flags", "--quick")  # fmt: skip
    launch("evaluate", f"--model={work / 'model'}", f"--data={work / 'data'}",
           f"--output={work / 'report'}", "--resamples=1000")  # fmt: skip
    return work


def test_generation_is_measured_on_what_was_written(road):
    certificate = json.loads((road / "data" / "certificate.json").read_text())
    test, train = (pq.read_table(road / "data" / f"{name}.parquet") for name in ("test", "train"))
    assert certificate["counts"]["test"]["rows"] == len(test)
    for key in ("canonical_id", "query_id"):
        assert not set(test[key].to_pylist()) & set(train[key].to_pylist())
    review = np.array(test["review_compliance"]), np.array(test["review_conflict"])
    np.testing.assert_allclose(np.array(test["y"]), 0.7 * review[0] + 0.3 * (1 - review[1]), atol=1e-9)


def test_training_leaves_all_that_scoring_and_looking_need(road):
    names = {path.name for path in (road / "model").iterdir()}
    assert names == {"config.json", "model.json", "weights.npz", "trained_on.npz", "epochs.jsonl",
                     "checkpoints", "tensorboard", ".lock"}  # fmt: skip
    facts = json.loads((road / "model" / "model.json").read_text())
    assert facts["provenance"]["certificate"]
    epochs = [json.loads(line) for line in (road / "model" / "epochs.jsonl").read_text().splitlines()]
    assert [epoch["epoch"] for epoch in epochs] == list(range(1, len(epochs) + 1))
    assert np.mean(epochs[-1]["total"]) < np.mean(epochs[0]["total"])
    events = EventAccumulator(str(road / "model" / "tensorboard" / "lane-000"))
    events.Reload()
    assert {"train/total", "validation/loss", "validation/metric"} <= set(events.Tags()["scalars"])
    assert len(events.Scalars("train/total")) == len(epochs)


def test_report_says_the_same_in_three_ways(road):
    report = json.loads((road / "report" / "report.json").read_text())
    assert {
        "metrics",
        "ladder",
        "deltas",
        "conflict",
        "slices",
        "acceptance",
        "data",
        "model",
    } <= report.keys()
    assert [row["system"] for row in report["ladder"]][:3] == ["CLIP-only", "+SO", "+SO+Conflict"]
    for metric, figure in report["metrics"].items():
        low, high = figure["ci"]
        assert low <= figure["value"] <= high, metric
        assert figure["n"] > 0
    assert report["ladder"][-1]["metrics"] == report["metrics"]
    figure = report["metrics"]["compliance@1"]
    text = f"{figure['value']:.3f} [{figure['ci'][0]:.3f}, {figure['ci'][1]:.3f}]"
    assert text in (road / "report" / "report.md").read_text()
    html = (road / "report" / "report.html").read_text()
    assert f"{figure['value']:.3f}" in html
    deltas = report["deltas"]["+Reranker"]["ndcg@10"]
    assert deltas["value"] == pytest.approx(
        report["metrics"]["ndcg@10"]["value"] - report["ladder"][0]["metrics"]["ndcg@10"]["value"]
    )


def test_evaluation_is_reproducible(road):
    """Also in another process."""
    process = start("evaluate", f"--model={road / 'model'}", f"--data={road / 'data'}",
                    f"--output={road / 'again'}", "--resamples=1000", "--quick")  # fmt: skip
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    first, again = (json.loads((road / name / "report.json").read_text()) for name in ("report", "again"))
    for key in ("metrics", "ladder", "deltas", "conflict", "slices", "uncertainty"):
        assert first[key] == again[key], key


def test_models_are_compared_on_the_same_resamples(road):
    launch("train", f"--data={road / 'data'}", f"--workdir={road / 'other'}", "--groups=clip", "--quick")
    call = ("evaluate", f"--model={road / 'model'}", f"--model={road / 'other'}", f"--data={road / 'data'}",
            "--quick", f"--output={road / 'both'}")  # fmt: skip
    launch(*call, f"--baseline={road / 'other'}", "--cluster_by=query_id")
    alone, both = (json.loads((road / name / "report.json").read_text()) for name in ("report", "both"))
    assert [row["system"] for row in both["models"]] == ["+Reranker", "+Reranker other"]
    assert both["baseline"] == "+Reranker other"
    assert both["metrics"]["ndcg@10"]["ci"] == alone["metrics"]["ndcg@10"]["ci"]  # each query its own cluster
    assert "queries" in both["metrics"]["ndcg@10"]["kind"]
    assert both["acceptance"][0]["figure"]["value"] == alone["acceptance"][0]["figure"]["value"]
    shown = {row["system"]: row["metrics"]["compliance@1"]["value"] for row in both["ladder"]}
    found = both["deltas"]["+Reranker"]["compliance@1"]["value"]
    assert found == pytest.approx(shown["+Reranker"] - shown["+Reranker other"])
    pairs = {(row["system"], row["reference"]) for row in both["comparisons"][0]["rows"]}
    assert ("+Reranker", "+Reranker other") in pairs
    assert "expected clip" in launch(*call, "--baseline=nothing", fails=2)
    assert "each query needs one value" in launch(*call, "--cluster_by=id", fails=2)
    assert "no such column" in launch(*call, "--cluster_by=session", fails=2)
    assert "training folder" in launch(*call, f"--output={road / 'model'}", fails=2)
    assert any((road / "model" / "tensorboard").iterdir())


def test_the_figures_go_to_tensorboard(road):
    events = EventAccumulator(str(road / "report" / "tensorboard"))
    events.Reload()
    report = json.loads((road / "report" / "report.json").read_text())
    tag = "evaluation/+Reranker/compliance@1"
    assert events.Scalars(tag)[0].value == pytest.approx(report["metrics"]["compliance@1"]["value"])
    assert any("reliability" in tag for tag in events.Tags()["images"] + events.Tags()["tensors"])


def test_evaluation_refuses_rows_that_were_learned_from(road):
    call = ("evaluate", f"--model={road / 'model'}", f"--data={road / 'data'}", "--split=train",
            f"--output={road / 'seen'}", "--quick")  # fmt: skip
    assert "has learned from" in launch(*call, fails=2)
    assert not (road / "seen").exists()
    assert "its figures are optimistic" in launch(*call, "--allow_overlap")
    assert "LEARNED FROM" in (road / "seen" / "report.md").read_text()


def test_other_salt_is_seen_through(road):
    """Another split of the same run shares pictures with what the model learned from."""
    launch("generate_training_data", f"--input={road / 'runs' / 'one'}", f"--output={road / 'resplit'}",
           "--fractions=0.5,0,0.5", "--split_salt=other")  # fmt: skip
    said = launch("evaluate", f"--model={road / 'model'}", f"--data={road / 'resplit'}",
                  f"--output={road / 'no'}", fails=2)  # fmt: skip
    assert "has learned from" in said


@pytest.mark.parametrize("top_m", [0, 20])
def test_rerank_writes_the_contract(road, top_m):
    output = road / f"reranked{top_m}.jsonl"
    said = launch("rerank", f"--model={road / 'model'}", f"--input={road / 'runs' / 'one'}",
                  f"--output={output}", f"--top_m={top_m}")  # fmt: skip
    assert ("--top_m=0 reranks whole lists" in said) == bool(top_m)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    scored = [json.loads(line) for line in (road / "runs" / "one" / "scored.jsonl").read_text().splitlines()]
    assert len(lines) == len(scored)
    version = artifact.load(road / "model").version
    before = {}
    for line in scored:
        before.setdefault(line["query_id"], []).append(line)
    after = {}
    for line in lines:
        after.setdefault(line["query_id"], []).append(line)
    assert list(after) == list(before)
    for query, ranked in after.items():
        assert [line["rank"] for line in ranked] == list(range(1, len(ranked) + 1))
        for line in ranked:
            assert 0 <= line["rerank_low"] <= line["rerank_score"] <= line["rerank_high"] <= 1
            assert 0 <= line["p_conflict"] <= 1
            assert line["rerank_std"] >= 0
            assert line["model_version"] == version
            original = before[query][line["original_rank"] - 1]
            assert {k: line[k] for k in original if not k.endswith("embedding")} == {
                k: v for k, v in original.items() if not k.endswith("embedding")
            }
        head = ranked[: top_m or len(ranked)]
        assert {line["original_rank"] for line in head} == set(range(1, len(head) + 1))
        scores = [line["rerank_score"] for line in head]
        assert scores == sorted(scores, reverse=True)
        tail = [line["original_rank"] for line in ranked[len(head) :]]
        assert tail == sorted(tail)


def test_rerank_needs_no_labels_and_scores_alike(road, tmp_path):
    lines = [json.loads(line) for line in (road / "runs" / "one" / "scored.jsonl").read_text().splitlines()]
    for line in lines:
        del line["review"]
    (tmp_path / "bare.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[::-1]))
    launch("rerank", f"--model={road / 'model'}", f"--input={tmp_path / 'bare.jsonl'}",
           f"--output={tmp_path / 'out.jsonl'}", "--top_m=0")  # fmt: skip
    launch("rerank", f"--model={road / 'model'}", f"--input={road / 'runs' / 'one'}",
           f"--output={tmp_path / 'labelled.jsonl'}", "--top_m=0")  # fmt: skip
    scores = [
        {(line["query_id"], line["id"]): line["rerank_score"]
         for line in map(json.loads, (tmp_path / name).read_text().splitlines())}
        for name in ("out.jsonl", "labelled.jsonl")
    ]  # fmt: skip
    assert scores[0].keys() == scores[1].keys()
    for key, score in scores[0].items():
        assert score == pytest.approx(scores[1][key], abs=2e-6)


def test_rerank_refuses_another_encoder(road, tmp_path):
    (tmp_path / "other.jsonl").write_text(json.dumps(scored_line(0, 0)) + "\n")
    said = launch("rerank", f"--model={road / 'model'}", f"--input={tmp_path / 'other.jsonl'}",
                  f"--output={tmp_path / 'out.jsonl'}", fails=2)  # fmt: skip
    assert "was trained on" in said
    assert not (tmp_path / "out.jsonl").exists()


def test_silver_labels_are_flagged_everywhere(write_run, tmp_path):
    scores = lambda q, i: {"compliance_score": ((q + i) % 7) / 7, "conflict_prob": ((q * i) % 5) / 5}
    lines = [scored_line(q, i, review=..., **scores(q, i)) for q in range(40) for i in range(12)]
    folder = write_run(lines)
    said = launch("generate_training_data", f"--input={folder}", f"--output={tmp_path / 'data'}",
                  "--fractions=0.5,0,0.5")  # fmt: skip
    assert "100.0% of the rows have silver labels" in said
    launch("train", f"--data={tmp_path / 'data'}", f"--workdir={tmp_path / 'm'}", "--quick")
    said = launch("evaluate", f"--data={tmp_path / 'data'}", f"--model={tmp_path / 'm'}",
                  f"--output={tmp_path / 'r'}", "--quick")  # fmt: skip
    assert "Labels are silver" in said
    assert json.loads((tmp_path / "r" / "report.json").read_text())["data"]["label"] == "silver"


def test_a_run_without_embeddings_goes_all_the_way(write_run, tmp_path):
    lines = [scored_line(q, i, image_embedding=..., text_embedding=..., constraints=...,
                         brightness=round(((q * 5 + i * 3) % 11) / 11, 3))
             for q in range(40) for i in range(12)]  # fmt: skip
    folder = write_run(lines)
    launch("generate_training_data", f"--input={folder}", f"--output={tmp_path / 'data'}",
           "--fractions=0.5,0,0.5")  # fmt: skip
    launch("train", f"--data={tmp_path / 'data'}", f"--workdir={tmp_path / 'm'}", "--quick")
    launch("evaluate", f"--data={tmp_path / 'data'}", f"--model={tmp_path / 'm'}",
           f"--output={tmp_path / 'r'}", "--quick")  # fmt: skip
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    clip = report["ladder"][0]["metrics"]["compliance@1"]
    assert clip["value"] is None
    assert "clip_score is missing everywhere" in clip["why"]
    assert report["metrics"]["compliance@1"]["value"] is not None
    assert report["acceptance"][0]["verdict"] == "not measured"


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("generate_training_data", ["--input=nowhere", "--output=out"], "no such run"),
        ("generate_training_data", ["--input=README.md", "--output=out"], "broken JSON"),
        ("generate_training_data", ["--input=x", "--output=y", "--fractions=1,1,1"], "--fractions=1,1,1"),
        ("train", ["--data=nowhere", "--workdir=out"], "no certificate"),
        ("evaluate", ["--model=nowhere", "--data=nowhere", "--output=out"], "no finished model"),
        ("rerank", ["--model=nowhere", "--input=x", "--output=out"], "no finished model"),
        ("rerank", ["nowhere"], "--model"),
        ("simulate_run", ["--output=out", "--queries=0"], "queries"),
        ("simulate_run", ["--output=out", "--reviewer_noise=nan"], "--reviewer_noise=nan"),
        ("train", ["--data=x", "--workdir=out", "--members=0"], "--members=0: expected at least 1"),
        ("train", ["--data=x", "--workdir=out", "--folds=1"], "--folds=1"),
        ("train", ["--data=x", "--workdir=out", "--learning_rate=nan"], "--learning_rate=nan"),
        ("evaluate", ["--model=x", "--data=x", "--output=out", "--resamples=3"], "resamples"),
        ("rerank", ["--model=x", "--input=x", "--output=out", "--topm=3"], "topm"),
    ],
)
def test_wrong_calls_are_told_in_one_line(name, arguments, message, tmp_path):
    arguments = [argument.replace("=out", f"={tmp_path / 'out'}") for argument in arguments]
    ended = run(name, *arguments)
    assert ended.status == 2
    assert message in ended.errors
    assert "Traceback" not in ended.errors
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name",
    [
        "simulate_run",
        "generate_training_data",
        "import_svmlight",
        "train",
        "sweep",
        "ablate",
        "evaluate",
        "rerank",
        "demo",
        "registry",
        "ab",
        "canary",
        "governance",
        "export",
        "serve",
    ],
)
def test_help_explains_every_flag(name):
    said = subprocess.run(
        [sys.executable, "-m", f"experiments.{name}", "--help"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    assert f"python -m experiments.{name}" in said
    source = (ROOT / "experiments" / f"{name}.py").read_text()
    own = re.findall(r"flags\.DEFINE_\w+\(\s*\"(\w+)\"", source)
    shared = ["learning_rate", *training_folder.SHARED] if name in ("train", "sweep", "ablate") else []
    assert own or shared
    for flag in (*own, *shared):  # each with what it is for
        assert re.search(rf"--(\[no\])?{flag}: \S.{{10,}}", said), flag


def test_training_is_not_overwritten_by_accident(road, tmp_path):
    call = ("train", f"--data={road / 'data'}", "--quick", "--epochs=2")
    before = (road / "model" / "model.json").read_bytes()
    assert "--overwrite" in launch(*call, f"--workdir={road / 'model'}", fails=2)
    assert (road / "model" / "model.json").read_bytes() == before
    (tmp_path / "foreign" / "checkpoints" / "precious").mkdir(parents=True)
    assert "not a training folder" in launch(*call, f"--workdir={tmp_path / 'foreign'}", fails=2)
    assert (tmp_path / "foreign" / "checkpoints" / "precious").exists()


def test_an_output_never_replaces_its_input(road, tmp_path):
    run = tmp_path / "run.jsonl"
    run.write_bytes((road / "runs" / "one" / "scored.jsonl").read_bytes())
    before = run.read_bytes()
    for call in (("rerank", f"--model={road / 'model'}"), ("generate_training_data",)):
        assert "inside the run" in launch(*call, f"--input={run}", f"--output={run}", fails=2)
    assert run.read_bytes() == before
    folder = road / "runs" / "one"
    said = launch("generate_training_data", f"--input={folder}", f"--output={folder / 'data'}", fails=2)
    assert "inside the run" in said


def test_json_lines_come_with_their_certificate(road, tmp_path):
    launch("generate_training_data", f"--input={road / 'runs' / 'one'}", f"--output={tmp_path / 'o.jsonl'}")
    certificate = json.loads((tmp_path / "o.jsonl.certificate.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    kept = sum(line["split"] == "train" for line in lines)
    assert certificate["counts"]["train"]["rows"] == kept
    assert len(lines) == certificate["rows_read"]


def test_photographs(shared, tmp_path):
    """The reranker is as far ahead of CLIP-only and of Step 4's rule as README.md says."""
    photos = shared("photos/make_run.py")
    subprocess.run([sys.executable, photos, "--out", tmp_path / "run"], check=True, capture_output=True)
    launch("generate_training_data", f"--input={tmp_path / 'run'}", f"--output={tmp_path / 'data'}",
           "--fractions=0.5,0,0.5")  # fmt: skip
    launch("train", f"--data={tmp_path / 'data'}", f"--workdir={tmp_path / 'm'}",
           "--flagfile=experiments/recipes/cotrr_lite.flags")  # fmt: skip
    launch(
        "evaluate", f"--model={tmp_path / 'm'}", f"--data={tmp_path / 'data'}", f"--output={tmp_path / 'r'}"
    )
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    delta = report["deltas"]["+Reranker"]["compliance@1"]
    assert delta["value"] >= 0.10
    assert delta["ci"][0] > 0.03
    assert report["gains"]["+SO+Conflict"]["ndcg@10"]["ci"][0] > 0
    # A little below what README.md says: another processor rounds otherwise.
    reached = report["metrics"]
    assert reached["compliance@1"]["value"] > 0.78 and reached["ndcg@10"]["value"] > 0.84
    assert report["conflict"]["auc"]["value"] > 0.855 and report["conflict"]["ece"]["value"] < 0.05
    assert 0.93 < report["uncertainty"]["coverage"]["value"] < 0.97
