"""Training as a command: nothing is lost when it dies, and several processes do what one does."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cotrr.checkpoints import Checkpoints
from cotrr.ranker import fitting
from tests.commands import ROOT, free_port, in_two_processes, launch, log_of, make_data, run, start, stop_when

pytestmark = pytest.mark.usefixtures("unoptimised")
EPOCHS = 20
SETTINGS = ["--folds=3", f"--epochs={EPOCHS}", "--image_components=16", "--checkpoint_every=4", "--hidden=4",
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


def logged(folder):
    """What a run has logged."""
    return [json.loads(line) for line in (folder / "epochs.jsonl").read_text().splitlines()]


def assert_same_model(one, other, lost=()):
    """`lost` are epochs that the other has not logged."""
    weights = [np.load(folder / "weights.npz") for folder in (one, other)]
    assert weights[0].files == weights[1].files
    for key in weights[0].files:
        np.testing.assert_array_equal(weights[0][key], weights[1][key], err_msg=key)
    assert [record for record in logged(one) if record["epoch"] not in lost] == logged(other)


def kept(folder):
    """The epoch of the latest checkpoint, and whether one is being written."""
    names = [path.name for path in (folder / "checkpoints").glob("*")]
    return max((int(name) for name in names if name.isdigit()), default=0), any(
        "orbax-checkpoint-tmp" in name for name in names
    )


def test_a_run_killed_as_it_trains_and_saves_ends_in_the_same_bits(data, straight, tmp_path):
    folder = tmp_path / "model"

    def killed(least, saving):
        (before, _), (latest, _) = log_of(folder), kept(folder)
        process = start_training(data, folder, "--resume")

        def holds():
            log, epochs = log_of(folder)  # a run that is resumed begins the file anew
            return log != before and epochs > max(least, latest) and saving in (None, kept(folder)[1])

        stop_when(process, holds)
        process.kill()
        said, _ = process.communicate()
        assert process.returncode == -signal.SIGKILL, said
        assert holds() and log_of(folder)[1] < EPOCHS and not (folder / "model.json").exists()

    killed(least=0, saving=True)
    killed(least=5, saving=None)
    killed(least=12, saving=True)
    assert "resuming" in launch("train", f"--data={data}", f"--workdir={folder}", *SETTINGS, "--resume")
    assert_same_model(straight, folder)


def test_a_run_told_to_end_keeps_its_epoch_and_goes_on(data, straight, tmp_path):
    folder = tmp_path / "model"
    process = start_training(data, folder, "--checkpoint_every=1000")
    stop_when(process, lambda: log_of(folder)[1] > 0)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM and "go on with --resume" in said
    assert 0 < kept(folder)[0] < EPOCHS and not (folder / "model.json").exists()
    launch("train", f"--data={data}", f"--workdir={folder}", *SETTINGS, "--resume", "--checkpoint_every=1000")
    assert_same_model(straight, folder)


@pytest.fixture
def sigterm():
    """What this process does when it is told to end, while a test runs."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended at once"))
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("sigterm")
def test_a_run_told_to_end_after_its_epochs_ends_too(data, straight, tmp_path, monkeypatch):
    folder, save = tmp_path / "model", Checkpoints.save
    call = ("train", f"--data={data}", f"--workdir={folder}", *SETTINGS, "--resume")

    def told(checkpoints, step, state):
        save(checkpoints, step, state)
        if step == EPOCHS:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", told)
        assert f"epoch {EPOCHS} is kept" in launch(*call, fails=128 + signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(fitting, "finish", lambda *_: signal.raise_signal(signal.SIGTERM))
        assert run(*call).status == "ended at once"
    launch(*call)
    assert_same_model(straight, folder)


TRAIN_ON_A_DISK_THAT_IS_FULL_FOR_A_WHILE = """
import contextlib
from cotrr.config import launch
from cotrr.ranker import training
from experiments import train
from tests.test_summaries import disk_full_at

full, run_epoch = contextlib.ExitStack(), training.run_epoch

def disturbed(views, state, number, lanes):
    if number == 5:
        full.enter_context(disk_full_at(10))
    if number == 10:
        full.close()
    return run_epoch(views, state, number, lanes)

training.run_epoch = disturbed
launch(train.main, train.define_flags)
"""


def test_a_full_disk_costs_what_was_to_be_written_meanwhile(data, straight, tmp_path):
    folder = tmp_path / "model"
    done = subprocess.run(
        [sys.executable, "-c", TRAIN_ON_A_DISK_THAT_IS_FULL_FOR_A_WHILE, f"--data={data}",
         f"--workdir={folder}", *SETTINGS],
        cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True,
    )  # fmt: skip
    said = done.stderr
    assert done.returncode == 0, said
    assert "no checkpoint after epoch 8" in said and "no checkpoint after epoch 12" not in said
    assert said.count("on are lost") == 2  # of each lane
    lost = range(6, 11)
    assert [f"epoch {epoch} is not logged" in said for epoch in range(5, 12)] == [False, *[True] * 5, False]
    assert_same_model(straight, folder, lost)
    assert kept(folder) == (EPOCHS, False)
    for lane in ("lane-000-0", "lane-000-1"):
        events = EventAccumulator(str(folder / "tensorboard" / lane))
        events.Reload()
        steps = [event.step for event in events.Scalars("train/total")]
        assert steps == [epoch for epoch in range(1, EPOCHS + 1) if epoch not in lost]


def test_a_damaged_checkpoint_costs_one_interval(data, straight, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(straight, folder)
    (folder / "model.json").unlink()
    for path in (folder / "checkpoints" / str(EPOCHS)).rglob("*"):
        if path.is_file() and path.stat().st_size > 100:
            path.write_bytes(path.read_bytes()[:50])
    process = start_training(data, folder, "--resume")
    said, _ = process.communicate()
    assert process.returncode == 0 and "is damaged" in said and f"resuming after epoch {EPOCHS - 4}" in said
    assert_same_model(straight, folder)


def test_other_settings_are_not_resumed(data, straight):
    said = launch("train", f"--data={data}", f"--workdir={straight}", *SETTINGS, "--epochs=21", "--resume",
                  fails=2)  # fmt: skip
    assert "other settings" in said


@pytest.mark.parametrize(
    ("setting", "parts"),
    [
        ("--learning_rate=1e30", ["lane 0", "step ", "of epoch ", "--learning_rate=1e+30", "--penalty=0.16"]),
        ("--pointwise_weight=3.4e38", ["step 1 of epoch 1", "weights of the loss may be too large"]),
    ],
)
def test_a_loss_that_is_not_finite_is_named(data, tmp_path, setting, parts):
    said = launch("train", f"--data={data}", f"--workdir={tmp_path / 'm'}", "--quick", setting, fails=2)
    for part in parts:
        assert part in said
    assert ("It may be too high" in said) == ("learning_rate" in setting)


def test_a_settings_file_that_is_none_is_told(data, tmp_path):
    (tmp_path / "config.json").write_text('{"seed": ')
    said = launch("train", f"--data={data}", f"--workdir={tmp_path}", *SETTINGS, "--resume", fails=2)
    assert "config.json" in said and "not the settings of a training run. Set --overwrite" in said


def test_quick_settings_give_way_to_those_of_the_command_line(data, tmp_path):
    (tmp_path / "recipe").write_text("--members=4\n--epochs=60\n--folds=5\n")
    launch("train", f"--data={data}", f"--workdir={tmp_path / 'm'}", f"--flagfile={tmp_path / 'recipe'}",
           "--quick", "--epochs=2", "--members", "2", "--hidden=4", "--learning_rate=1e30",
           fails=2)  # fmt: skip
    settings = json.loads((tmp_path / "m" / "config.json").read_text())
    assert [settings[name] for name in ("members", "epochs", "folds")] == [2, 2, 3]


def test_two_processes_train_what_one_does(data, straight, tmp_path):
    folder = tmp_path / "model"
    said = in_two_processes("train", f"--data={data}", f"--workdir={folder}", *SETTINGS)
    assert "lowest validation loss" in said[0] and "lowest" not in said[1]
    one, two = (np.load(path / "weights.npz") for path in (straight, folder))
    for key in one.files:
        np.testing.assert_allclose(one[key], two[key], rtol=1e-3, atol=2e-4, err_msg=key)


def test_where_the_first_process_is_refused_the_other_does_not_wait(data, straight, tmp_path):
    call = ("train", f"--data={data}", *SETTINGS)
    said = in_two_processes(*call, f"--workdir={straight}", fails=2)
    assert "holds a training run" in said[0] and "the first process failed" in said[1]
    (tmp_path / "file").touch()
    said = in_two_processes(*call, f"--workdir={tmp_path / 'file'}", fails=2)
    assert "file" in said[0] and "the first process failed" in said[1]


INTERRUPTED = """
import sys
from cotrr import devices
from cotrr.errors import InputError

def work():
    raise KeyboardInterrupt

devices.join(sys.argv[1], 2, int(sys.argv[2]))
try:
    devices.first_alone(work)
except (KeyboardInterrupt, InputError) as error:
    print(repr(error), file=sys.stderr)
"""


def test_an_interrupt_of_the_first_process_ends_the_other_too():
    both = [subprocess.Popen([sys.executable, "-c", INTERRUPTED, f"localhost:{port}", str(k)], cwd=ROOT,
                             env=os.environ | {"JAX_PLATFORMS": "cpu"}, stderr=subprocess.PIPE, text=True)
            for port in [free_port()] for k in range(2)]  # fmt: skip
    said = [process.communicate(timeout=180)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert "KeyboardInterrupt" in said[0] and "the first process failed" in said[1]


@pytest.mark.parametrize(("flags", "reason"), [
    (["--processes=2"], "--processes: one process has no use for it. Set --distributed too"),
    (["--distributed"], "--distributed: "),
    (["--distributed", "--coordinator=localhost:1", "--processes=2", "--process=2"], "--distributed: "),
    (["--distributed", "--coordinator=localhost", "--processes=2", "--process=0"], "--coordinator=host:port"),
])  # fmt: skip
def test_flags_of_several_processes_go_together(data, tmp_path, flags, reason):
    # In a process of its own: nothing may have been computed before it joins others.
    process = start("train", f"--data={data}", f"--workdir={tmp_path / 'm'}", *flags)
    said = process.communicate(timeout=180)[0]
    assert process.returncode == 2 and reason in said and "Traceback" not in said, said


def scalars(folder: pathlib.Path) -> dict:
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_each_lane_has_its_curves(straight):
    lanes = [scalars(straight / "tensorboard" / f"lane-000-{k}") for k in range(2)]
    for lane in lanes:
        assert {"train/total", "train/gradient_norm", "train/update_norm", "validation/loss"} <= lane.keys()
        assert len(lane["train/total"]) == EPOCHS
    assert lanes[0]["train/total"] != lanes[1]["train/total"]
    events = EventAccumulator(str(straight / "tensorboard"))
    events.Reload()
    assert {"calibration/rank", "calibration/conflict"} <= set(events.Tags()["images"]) | set(
        events.Tags()["tensors"]
    )
