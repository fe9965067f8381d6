"""Event files: written without TensorFlow, read back by TensorBoard's own reader."""

import contextlib
import io
import resource
import subprocess
import sys
import warnings

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import precision_score, recall_score
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.summary_pb2 import SummaryMetadata
from tensorboard.plugins.hparams import plugin_data_pb2
from tensorboard.util.tensor_util import make_ndarray

from cotrr.files import append
from cotrr.summaries import SummaryWriter


@contextlib.contextmanager
def disk_full_at(size):
    """No file of this process grows beyond `size` bytes: the kernel takes what fits, then fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def read(logdir):
    accumulator = EventAccumulator(str(logdir), size_guidance={"scalars": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def test_scalars_come_back_and_undefined_ones_leave_a_gap(tmp_path):
    with SummaryWriter(tmp_path) as writer:
        for step, value in enumerate((1.5, np.nan, 0.5, np.inf)):
            writer.scalars({"train/total": value, "train/penalty": np.float32(step)}, step)
    events = read(tmp_path)
    assert sorted(events.Tags()["scalars"]) == ["train/penalty", "train/total"]
    assert [(e.step, e.value) for e in events.Scalars("train/total")] == [(0, 1.5), (2, 0.5)]
    assert [(e.step, e.value) for e in events.Scalars("train/penalty")] == [(i, i) for i in range(4)]


def test_histogram_counts_every_value(tmp_path):
    values = np.random.default_rng(0).normal(size=(4, 25)).astype(np.float32)
    with SummaryWriter(tmp_path) as writer:
        writer.histogram("parameters/heads", values, 7)
    (event,) = read(tmp_path).Tensors("parameters/heads")
    buckets = make_ndarray(event.tensor_proto)
    assert event.step == 7 and buckets[:, 2].sum() == 100
    assert buckets[0, 0] == pytest.approx(values.min()) and buckets[-1, 1] == pytest.approx(values.max())


def test_text_comes_back(tmp_path):
    with SummaryWriter(tmp_path) as writer:
        writer.text("config", "**λ** = 0.7")
    events = read(tmp_path)
    assert make_ndarray(events.Tensors("config")[0].tensor_proto).item().decode() == "**λ** = 0.7"
    assert events.SummaryMetadata("config").plugin_data.plugin_name == "text"


def png(width, height):
    """A white picture."""
    out = io.BytesIO()
    Image.new("RGB", (width, height), "white").save(out, "PNG")
    return out.getvalue()


def test_an_image_comes_back(tmp_path):
    with SummaryWriter(tmp_path) as writer:
        writer.image("plot", png(30, 20), 2)
    events = read(tmp_path)
    (event,) = events.Tensors("plot")
    assert event.step == 2
    assert make_ndarray(event.tensor_proto).tolist() == [b"30", b"20", png(30, 20)]
    assert events.SummaryMetadata("plot").plugin_data.plugin_name == "images"


def test_a_curve_is_scikit_learns(tmp_path):
    rng = np.random.default_rng(0)
    p = rng.random(500)
    p[0] = 1.0
    labels = rng.random(500) < p
    with SummaryWriter(tmp_path) as writer:
        writer.pr_curve("conflict", labels, p)
    events = read(tmp_path)
    curve = make_ndarray(events.Tensors("conflict")[0].tensor_proto)
    assert events.SummaryMetadata("conflict").plugin_data.plugin_name == "pr_curves"
    assert curve.shape == (6, 127)
    for k in (0, 30, 100, 126):
        flagged = p >= k / 126
        assert curve[4, k] == pytest.approx(precision_score(labels, flagged))
        assert curve[5, k] == pytest.approx(recall_score(labels, flagged))


def hparams_of(events, tag) -> plugin_data_pb2.HParamsPluginData:
    metadata: SummaryMetadata = events.SummaryMetadata(tag)
    assert metadata.plugin_data.plugin_name == "hparams"
    return plugin_data_pb2.HParamsPluginData.FromString(metadata.plugin_data.content)


def test_hparams_make_one_finished_row(tmp_path):
    values = {"hidden": 8, "rate": 0.01, "groups": "clip,so", "quick": True, "sizes": (1, 2)}
    with SummaryWriter(tmp_path) as writer:
        writer.hparams("one", values, ("validation/loss", "validation/metric"))
        writer.end_session()
    events = read(tmp_path)
    experiment = hparams_of(events, "_hparams_/experiment").experiment
    assert [info.name for info in experiment.hparam_infos] == list(values)
    assert [m.name.tag for m in experiment.metric_infos] == ["validation/loss", "validation/metric"]
    start = hparams_of(events, "_hparams_/session_start_info").session_start_info
    row = start.hparams
    assert start.group_name == "one"
    assert (row["hidden"].number_value, row["rate"].number_value) == (8, 0.01)
    assert (row["groups"].string_value, row["quick"].bool_value) == ("clip,so", True)
    assert row["sizes"].string_value == "(1, 2)"
    end = hparams_of(events, "_hparams_/session_end_info").session_end_info
    assert plugin_data_pb2.DESCRIPTOR.pool.FindEnumTypeByName("tensorboard.hparams.Status").values_by_number[
        end.status
    ].name == "STATUS_SUCCESS"  # fmt: skip
    assert end.end_time_secs > 1.7e9


def test_what_a_full_disk_took_a_part_of_is_not_there(tmp_path):
    path = tmp_path / "log"
    append(path, b"one\n")
    with disk_full_at(6), pytest.raises(OSError, match="too large"):
        append(path, b"two\n")
    assert path.read_bytes() == b"one\n"
    append(path, b"three\n")
    assert path.read_bytes() == b"one\nthree\n"


@pytest.mark.parametrize("room", [0, 5, 30])
def test_a_full_disk_costs_the_events_meanwhile_and_a_warning_each_time(tmp_path, room):
    with SummaryWriter(tmp_path) as writer:
        for lost, written in (((0,), (1, 2)), ((3, 4, 5), (6,)), ((7,), (8,))):
            size = sum(path.stat().st_size for path in tmp_path.iterdir())
            with disk_full_at(size + room), warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                for step in lost:
                    writer.scalars({"loss": step}, step)
            (warning,) = told
            assert f"from step {lost[0]} on are lost: File too large" in str(warning.message)
            for step in written:
                writer.scalars({"loss": step}, step)
    assert [event.step for event in read(tmp_path).Scalars("loss")] == [1, 2, 6, 8]


def test_several_writers_of_a_folder_are_read_in_their_order(tmp_path):
    for step in range(12):
        with SummaryWriter(tmp_path) as writer:
            writer.scalars({"loss": step}, step)
    assert [event.step for event in read(tmp_path).Scalars("loss")] == list(range(12))


SCRIPT = """
import sys
import warnings
sys.modules["tensorflow"] = None  # importing it fails, whether it is installed or not
from cotrr.summaries import SummaryWriter
with SummaryWriter(sys.argv[1]) as writer:
    writer.scalars({"a": 1.0}, 0)
    writer.histogram("h", [1.0, 2.0], 0)
    writer.text("t", "words")
    writer.pr_curve("p", [True, False], [0.7, 0.2])
    writer.hparams("one", {"x": 1}, ("a",))
    writer.end_session()
assert not [name for name in sys.modules if name.startswith("tensorflow.")]
assert sys.modules["tensorflow"] is None
"""


def test_tensorflow_is_not_needed(tmp_path):
    done = subprocess.run([sys.executable, "-c", SCRIPT, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert read(tmp_path).Scalars("a")[0].value == 1.0
