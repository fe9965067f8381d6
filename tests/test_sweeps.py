"""Sweeps and ablations as commands."""

import itertools
import json

import jax
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from cotrr import devices
from cotrr.data import dataset
from cotrr.ranker import artifact
from tests.commands import in_two_processes, launch, log_of, make_data, start, stop_when

pytestmark = pytest.mark.usefixtures("unoptimised")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A small dataset."""
    return make_data(tmp_path_factory.mktemp("data"), 60, 30, "0.5,0,0.5")


def tune(data, folder, *more):
    """A small sweep's command; its rungs end with epochs 3, 6 and 12."""
    return ("sweep", f"--data={data}", f"--workdir={folder}", "--quick", "--epochs=12",
            "--image_components=16", "--checkpoint_every=1", *more)  # fmt: skip


@pytest.fixture(scope="module")
def tuned(data, tmp_path_factory):
    """The folder of a sweep that nothing disturbed, and what it said."""
    folder = tmp_path_factory.mktemp("sweep") / "tuned"
    return folder, launch(*tune(data, folder))


def test_a_sweep_finds_a_recipe(data, tuned, tmp_path):
    folder, said = tuned
    found = json.loads((folder / "sweep.json").read_text())
    *rungs, finalists = (found[name] for name in ("rung-1", "rung-2", "rung-3", "finalists"))
    assert [len(rung) for rung in rungs] == [8, 4, 2] and "8 configurations" in said
    numbers = lambda rows: [row["configuration"] for row in rows]
    by_metric = lambda rows: sorted(rows, key=lambda row: -row["validation_metric"])
    for before, after in itertools.pairwise(rungs):
        assert numbers(after) == numbers(by_metric(before)[: len(after)])
    assert numbers(finalists) == [8, *numbers(by_metric(rungs[-1]))]
    penalties = [row["penalty"] for row in finalists]
    assert penalties[0] == pytest.approx(np.sqrt(penalties[1] * penalties[2]), rel=1e-3)
    model = artifact.load(folder)
    assert model.config["looked_at"] == 9
    assert model.config["penalty"] == penalties[numbers(finalists).index(found["taken"])]
    assert found["why"] in (folder / "recipe.flags").read_text() and found["why"] in said
    recipe = (folder / "recipe.flags").read_text()
    assert f"--penalty={model.config['penalty']}" in recipe and "--looked_at=9\n" in recipe
    # The recipe trains the very same model.
    launch(
        "train", f"--data={data}", f"--workdir={tmp_path / 'again'}", f"--flagfile={folder / 'recipe.flags'}"
    )
    again = artifact.load(tmp_path / "again")
    for one, other in zip(model.params["params"].values(), again.params["params"].values(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)


def test_a_sweep_that_was_killed_in_a_rung_ends_in_the_same_bits(data, tuned, tmp_path):
    folder = tmp_path / "tuned"
    process = start(*tune(data, folder))
    stop_when(process, lambda: log_of(folder / "rung-2")[1] == 2)  # of three
    process.kill()
    process.communicate()
    assert not (folder / "rung-3").exists()
    said = launch(*tune(data, folder, "--resume"))
    assert "resuming after epoch 3" in said and ("after epoch 4" in said or "after epoch 5" in said)
    # What is there is gone over, and ends in the same model.
    (folder / "model.json").unlink()
    launch(*tune(data, folder, "--resume"))
    assert artifact.load(folder).version == artifact.load(tuned[0]).version
    assert (folder / "sweep.json").read_bytes() == (tuned[0] / "sweep.json").read_bytes()


@pytest.mark.parametrize("name", ["train", "sweep", "ablate"])
def test_another_process_than_the_first_writes_checkpoints_alone(data, tmp_path, monkeypatch, name):
    monkeypatch.setattr(devices, "primary", lambda: False)
    folder = tmp_path / "m"
    said = launch(name, f"--data={data}", f"--workdir={folder}", "--quick", "--folds=2", "--epochs=2",
                  "--image_components=4")  # fmt: skip
    assert "next:" not in said
    wrote = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    assert wrote and all("checkpoints" in path.parts for path in wrote)


def test_finalists_are_trained_with_several_seeds(data, tmp_path):
    said = launch("sweep", f"--data={data}", f"--workdir={tmp_path / 'm'}", "--quick", "--image_components=8",
                  "--members=2", "--bagging=1", "--finalists=2", "--rungs=2")  # fmt: skip
    assert "finalists: 4 lanes to epoch 8" in said
    model = artifact.load(tmp_path / "m")
    assert model.config["members"] == 2 and model.final.sum() == 2
    weights = np.asarray(model.params["params"]["query_weights"])[model.final]
    assert np.abs(weights[0] - weights[1]).max() > 1e-3


def test_a_configuration_whose_loss_is_not_finite_is_lost_and_the_sweep_goes_on(data, tmp_path):
    said = launch("sweep", f"--data={data}", f"--workdir={tmp_path / 'm'}", "--quick", "--image_components=8",
                  "--learning_rate=1e30", "--rungs=1")  # fmt: skip  # the given one is the first
    found = json.loads((tmp_path / "m" / "sweep.json").read_text())
    assert "the loss of lane 000" in said
    assert 0 not in [row["configuration"] for row in found["finalists"]]
    assert np.isfinite(np.asarray(artifact.load(tmp_path / "m").params["params"]["query_weights"])).all()


@pytest.mark.parametrize(("name", "wrote"), [("sweep", "sweep.json"), ("ablate", "ablation.json")])
def test_two_processes_find_what_one_does(data, tmp_path, name, wrote):
    call = (name, f"--data={data}", "--quick", "--folds=2", "--image_components=4", "--epochs=2")
    launch(*call, f"--workdir={tmp_path / 'one'}")
    said = in_two_processes(*call, f"--workdir={tmp_path / 'two'}")
    assert "next:" in said[0] and "next:" not in said[1]
    one, two = (jax.tree.leaves(json.loads((tmp_path / n / wrote).read_text())) for n in ("one", "two"))
    assert len(one) == len(two) > 50
    for a, b in zip(one, two, strict=True):
        assert a == b if isinstance(a, str | bool) else a == pytest.approx(b, rel=1e-2, abs=1e-2)


def test_what_would_be_learned_from_is_not_judged_and_nothing_is_lost(data, tmp_path, monkeypatch):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "ablation.json").write_text("precious")
    read = dataset.read
    monkeypatch.setattr(dataset, "read", lambda where, split: read(where, "train"))  # as every split
    said = launch("ablate", f"--data={data}", f"--workdir={folder}", "--quick", "--overwrite", fails=2)
    assert "every ablation learns from" in said and "of this split" in said
    assert (folder / "ablation.json").read_text() == "precious"


def test_ablations_are_compared_with_the_full_model(data, tmp_path):
    launch("ablate", f"--data={data}", f"--workdir={tmp_path / 'a'}", "--quick", "--image_components=16")
    found = json.loads((tmp_path / "a" / "ablation.json").read_text())
    rows = {row["system"]: row for row in found["rows"]}
    assert {"CLIP-only", "+SO", "+SO+Conflict", "full", "trained on clip", "without so", "without embeddings",
            "without clip_score", "LambdaRank (ΔnDCG)", "no conflict head"} <= rows.keys()  # fmt: skip
    value = lambda name: rows[name]["metrics"]["ndcg@10"]["value"]
    differences = {(row["system"], row["metric"]): row for row in found["differences"]["rows"]}
    assert {row["reference"] for row in found["differences"]["rows"]} == {"full"}
    for name in rows.keys() - {"full"}:
        row = differences[name, "ndcg@10"]
        assert row["difference"]["value"] == pytest.approx(value(name) - value("full"), abs=1e-6)
        assert row["p_max_t"] >= row["p"]
    # TensorBoard tells the lanes apart by name, and by what they differ in.
    runs = {path.name for path in (tmp_path / "a" / "tensorboard").glob("lane-*")}
    trained = rows.keys() - {"CLIP-only", "+SO", "+SO+Conflict", "Step 4 dual_score"}
    assert len(runs) == len(trained) and {"lane-00-full", "lane-01-trained-on-clip"} <= runs
    events = EventAccumulator(str(tmp_path / "a" / "tensorboard" / "lane-00-full")).Reload()
    shown = HParamsPluginData.FromString(events.SummaryMetadata("_hparams_/experiment").plugin_data.content)
    names = {info.name for info in shown.experiment.hparam_infos}
    assert {"groups", "without", "lambda_power"} <= names and not {"penalty", "dropout", "seed"} & names
    table = (tmp_path / "a" / "ablation.md").read_text()
    assert table.count("\n| ") == len(rows) and "max-T" in table
