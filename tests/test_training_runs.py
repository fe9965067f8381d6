"""Training as a command: nothing is lost when it dies, and several processes do what one does."""

import json
import pathlib
import random
import shutil
import signal
import socket
import time

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.commands import launch, make_data, start

pytestmark = pytest.mark.usefixtures("unoptimised")
SETTINGS = ["--folds=3", "--epochs=12", "--image_components=16", "--checkpoint_every=4", "--hidden=4",
            "--dropout=0.1", "--members=2"]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A small dataset."""
    return make_data(tmp_path_factory.mktemp("data"), 60, 30, "0.5,0,0.5")


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


def test_a_run_killed_at_random_moments_ends_in_the_same_bits(data, straight, tmp_path):
    folder, rng = tmp_path / "model", random.Random(0)
    process = start_training(data, folder)
    wait_for(folder / "checkpoints" / "4", process)
    for _ in range(3):
        time.sleep(rng.uniform(0, 1.5))
        process.kill()
        process.communicate()
        process = start_training(data, folder, "--resume")
        wait_for(folder / "epochs.jsonl", process)
    said, _ = process.communicate()
    assert process.returncode == 0, said
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
    shutil.copytree(straight, folder)
    (folder / "model.json").unlink()
    for path in (folder / "checkpoints" / "12").rglob("*"):
        if path.is_file() and path.stat().st_size > 100:
            path.write_bytes(path.read_bytes()[:50])
    process = start_training(data, folder, "--resume")
    said, _ = process.communicate()
    assert process.returncode == 0 and "is damaged" in said and "resuming after epoch 8" in said
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
