"""Training as commands: nothing is lost when they die, several processes, sweeps, ablations."""

import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cotrr.ranker import artifact
from tests.test_launchers import ROOT, launch, start

SETTINGS = ["--folds=3", "--epochs=12", "--image_components=16", "--checkpoint_every=4", "--hidden=4",
            "--dropout=0.1", "--members=2"]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A small dataset."""
    work = tmp_path_factory.mktemp("data")
    launch("simulate_run", f"--output={work / 'run'}", "--queries=60", "--candidates=30")
    launch("generate_training_data", f"--input={work / 'run'}", f"--output={work / 'data'}",
           "--fractions=0.5,0,0.5")  # fmt: skip
    return work / "data"


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("straight") / "model"
    launch("train", f"--data={data}", f"--workdir={folder}", *SETTINGS)
    return folder


def start_training(data, folder, *more):
    return start("train", f"--data={data}", f"--workdir={folder}", *SETTINGS, *more)


def assert_same_model(one, other):
    weights = [np.load(folder / "weights.npz") for folder in (one, other)]
    assert weights[0].files == weights[1].files
    for key in weights[0].files:
        np.testing.assert_array_equal(weights[0][key], weights[1][key], err_msg=key)
    epochs = [[json.loads(line) for line in (folder / "epochs.jsonl").read_text().splitlines()]
              for folder in (one, other)]  # fmt: skip
    assert epochs[0] == epochs[1]


def wait_for(path, process):
    """Until there is such a file, or the process has ended."""
    while process.poll() is None and not list(path.parent.glob(path.name)):
        time.sleep(0.01)


@pytest.mark.parametrize("seed", range(2))
def test_a_run_killed_at_random_moments_ends_in_the_same_bits(data, straight, tmp_path, seed):
    folder, rng = tmp_path / "model", random.Random(seed)
    process = start_training(data, folder)
    wait_for(folder / "checkpoints" / "4", process)
    for _ in range(2):
        time.sleep(rng.uniform(0, 1.5))
        process.kill()
        process.communicate()
        process = start_training(data, folder, "--resume")
        wait_for(folder / "epochs.jsonl", process)
    process.communicate()
    assert process.returncode == 0
    assert_same_model(straight, folder)


def test_a_run_told_to_end_keeps_its_epoch_and_goes_on(data, straight, tmp_path):
    folder = tmp_path / "model"
    process = start_training(data, folder, "--checkpoint_every=1000")
    wait_for(folder / "epochs.jsonl", process)
    while not (folder / "epochs.jsonl").read_text().count("\n"):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM and "go on with --resume" in said
    assert list((folder / "checkpoints").iterdir()) and not (folder / "model.json").exists()
    launch("train", f"--data={data}", f"--workdir={folder}", *SETTINGS, "--resume", "--checkpoint_every=1000")
    assert_same_model(straight, folder)


def test_a_damaged_checkpoint_costs_one_interval(data, straight, tmp_path):
    folder = tmp_path / "model"
    process = start_training(data, folder)
    wait_for(folder / "checkpoints" / "8", process)
    process.kill()
    process.communicate()
    newest = max((folder / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
    for path in newest.rglob("*"):
        if path.is_file() and path.stat().st_size > 100:
            path.write_bytes(path.read_bytes()[:50])
    said = launch("train", f"--data={data}", f"--workdir={folder}", *SETTINGS, "--resume")
    assert "is damaged" in said
    assert_same_model(straight, folder)


def test_other_settings_are_not_resumed(data, straight):
    said = launch("train", f"--data={data}", f"--workdir={straight}", *SETTINGS, "--epochs=13", "--resume",
                  fails=2)  # fmt: skip
    assert "other settings" in said


def test_a_loss_that_is_not_finite_is_named(data, tmp_path):
    said = launch("train", f"--data={data}", f"--workdir={tmp_path / 'm'}", "--quick", "--learning_rate=1e30",
                  fails=2)  # fmt: skip
    for part in ("lane 0", "step ", "of epoch ", "--learning_rate=1e+30", "--penalty=0.16"):
        assert part in said


def test_two_processes_train_what_one_does(data, straight, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    folder = tmp_path / "model"
    both = [start_training(data, folder, "--distributed", f"--coordinator=localhost:{port}", "--processes=2",
                  f"--process={k}") for k in range(2)]  # fmt: skip
    said = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert "lowest validation loss" in said[0] and "lowest" not in said[1]
    one, two = (np.load(path / "weights.npz") for path in (straight, folder))
    for key in one.files:
        np.testing.assert_allclose(one[key], two[key], rtol=1e-3, atol=2e-4, err_msg=key)


def scalars(folder: pathlib.Path) -> dict:
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_each_lane_has_its_curves(straight):
    lanes = [scalars(straight / "tensorboard" / f"lane-{k:03d}") for k in range(2)]
    for lane in lanes:
        assert {"train/total", "train/gradient_norm", "train/update_norm", "validation/loss"} <= lane.keys()
        assert len(lane["train/total"]) == 12
    assert lanes[0]["train/total"] != lanes[1]["train/total"]
    events = EventAccumulator(str(straight / "tensorboard"))
    events.Reload()
    assert {"calibration/rank", "calibration/conflict"} <= set(events.Tags()["images"]) | set(
        events.Tags()["tensors"]
    )


def test_a_sweep_finds_a_recipe_and_can_be_resumed(data, tmp_path):
    folder = tmp_path / "tuned"
    call = ("sweep", f"--data={data}", f"--workdir={folder}", "--quick", "--image_components=16")
    said = launch(*call)
    found = json.loads((folder / "sweep.json").read_text())
    sizes = [len(rung["lanes"]) for rung in found["rungs"]]
    assert sizes == [8, 3, 1] and "8 configurations" in said
    for before, after in zip(found["rungs"], found["rungs"][1:], strict=False):
        best = sorted(before["lanes"], key=lambda lane: -lane["validation_metric"])[: len(after["lanes"])]
        assert [lane["lane"] for lane in after["lanes"]] == [lane["lane"] for lane in best]
    model = artifact.load(folder)
    assert model.provenance["configurations"] == 8
    chosen = next(lane for lane in found["rungs"][-1]["lanes"] if lane["lane"] == found["best"][0])
    assert model.config["penalty"] == chosen["penalty"]
    recipe = (folder / "recipe.flags").read_text()
    assert f"--penalty={chosen['penalty']}" in recipe
    # What is there is gone over, and ends in the same model.
    (folder / "model.json").unlink()
    assert "resuming" in launch(*call, "--resume")
    assert artifact.load(folder).version == model.version
    # The recipe trains the very same model.
    launch(
        "train", f"--data={data}", f"--workdir={tmp_path / 'again'}", f"--flagfile={folder / 'recipe.flags'}"
    )
    again = artifact.load(tmp_path / "again")
    for one, other in zip(model.params["params"].values(), again.params["params"].values(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)


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
    table = (tmp_path / "a" / "ablation.md").read_text()
    assert table.count("\n| ") == len(rows) and "max-T" in table


def test_devices_share_the_work_and_agree(tmp_path):
    """8 forced host devices against one, in processes of their own."""
    script = ROOT / "tests" / "ranker" / "on_devices.py"
    results = []
    for count in (1, 8):
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={count}",
            "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        path = tmp_path / f"{count}.npz"
        subprocess.run([sys.executable, script, str(path)], cwd=ROOT, env=environment, check=True)
        results.append(np.load(path))
    one, eight = results
    assert int(one["devices"]) == 1 and int(eight["devices"]) == 8
    for key in set(one.files) - {"devices"}:
        np.testing.assert_allclose(one[key], eight[key], rtol=1e-4, atol=1e-5, err_msg=key)
