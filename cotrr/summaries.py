"""TensorBoard event files without TensorFlow: scalars, images, curves, text, HParams."""

import io
import os
import pathlib
import socket
import struct
import time
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.plugins.histogram.summary_v2 import histogram_pb
from tensorboard.plugins.hparams import metadata, plugin_data_pb2
from tensorboard.plugins.hparams import summary_v2 as hparams
from tensorboard.plugins.hparams.api_pb2 import Status
from tensorboard.plugins.image import metadata as image_metadata
from tensorboard.plugins.pr_curve import metadata as pr_metadata
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.record_writer import RecordWriter

from cotrr import files

THRESHOLDS = 127  # of a precision–recall curve


class SummaryWriter:
    """Writes one event file into `logdir`; use it as a context manager.

    Events that cannot be written, as on a full disk, are lost with one warning, and later ones go on.
    TensorBoard's own writer ends for good with the first, for its thread does.
    """

    def __init__(self, logdir: str | pathlib.Path):
        # TensorBoard reads the files of a folder in the order of their names.
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._path = pathlib.Path(logdir) / name
        self._head = _record(Event(wall_time=time.time(), file_version="brain.Event:2"))
        self._failing = False

    def __enter__(self) -> "SummaryWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        pass  # every event is in the file already

    def _add(self, summary: Summary, step: int) -> None:
        self._write(Event(wall_time=time.time(), step=step, summary=summary))

    def _write(self, event: Event) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            files.append(self._path, self._head + _record(event))
            self._head, self._failing = b"", False
        except OSError as error:
            if not self._failing:
                told = f"{self._path}: events from step {event.step} on are lost: {error.strerror or error}"
                warnings.warn(told, stacklevel=2)
            self._failing = True

    def scalars(self, values: Mapping[str, Any], step: int) -> None:
        """Numbers by tag; undefined ones (NaN) leave a gap in the curve."""
        self._add(Summary(value=[
            Summary.Value(tag=tag, simple_value=float(value))
            for tag, value in values.items() if np.isfinite(value)
        ]), step)  # fmt: skip

    def restart(self, step: int) -> None:
        """A killed run goes on from `step`: what it had written from there on is not shown."""
        log = SessionLog(status=SessionLog.START)
        self._write(Event(wall_time=time.time(), step=step, session_log=log))

    def histogram(self, tag: str, values: Any, step: int) -> None:
        """The distribution of an array."""
        self._add(histogram_pb(tag, np.asarray(values)), step)

    def text(self, tag: str, markdown: str, step: int = 0) -> None:
        """A Markdown text."""
        self._add(text_pb(tag, markdown), step)

    def image(self, tag: str, png: bytes, step: int = 0) -> None:
        """A picture, as the bytes of a PNG file."""
        width, height = struct.unpack(">II", png[16:24])  # PNG (ISO/IEC 15948), IHDR
        tensor = TensorProto(dtype="DT_STRING", tensor_shape={"dim": [{"size": 3}]})
        tensor.string_val.extend([str(width).encode(), str(height).encode(), png])
        metadata = image_metadata.create_summary_metadata(None, None)
        self._add(Summary(value=[Summary.Value(tag=tag, tensor=tensor, metadata=metadata)]), step)

    def pr_curve(self, tag: str, labels: np.ndarray, probabilities: np.ndarray, step: int = 0) -> None:
        """Precision and recall of [N] probabilities for labels [N] bool, at 127 thresholds."""
        place = np.floor(np.asarray(probabilities) * (THRESHOLDS - 1)).astype(int)
        of = lambda chosen: np.cumsum(np.bincount(place[chosen], minlength=THRESHOLDS)[::-1])[::-1]
        labels = np.asarray(labels, bool)
        tp, fp = of(labels).astype(np.float64), of(~labels).astype(np.float64)
        tn, fn = fp[0] - fp, tp[0] - tp
        share = lambda hits, total: hits / np.maximum(total, 1e-7)
        data = np.stack([tp, fp, tn, fn, share(tp, tp + fp), share(tp, tp + fn)]).astype(np.float32)
        shape = {"dim": [{"size": size} for size in data.shape]}
        tensor = TensorProto(dtype="DT_FLOAT", tensor_shape=shape, tensor_content=data.tobytes())
        metadata = pr_metadata.create_summary_metadata(None, None, THRESHOLDS)
        self._add(Summary(value=[Summary.Value(tag=tag, tensor=tensor, metadata=metadata)]), step)

    def hparams(self, trial: str, values: Mapping[str, Any], metrics: tuple[str, ...]) -> None:
        """A row of the HParams table: a trial's settings, and the scalar tags by which this run judges it."""
        plain = {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in values.items()}
        domains = [hparams.HParam(name) for name in plain]
        self._add(hparams.hparams_config_pb(domains, [hparams.Metric(tag) for tag in metrics]), 0)
        self._add(hparams.hparams_pb(plain, trial), 0)

    def end_session(self) -> None:
        """Marks this run's row of the HParams table as finished."""
        info = plugin_data_pb2.SessionEndInfo(
            status=Status.Value("STATUS_SUCCESS"), end_time_secs=time.time()
        )
        content = plugin_data_pb2.HParamsPluginData(session_end_info=info)
        value = Summary.Value(
            tag=metadata.SESSION_END_INFO_TAG, metadata=metadata.create_summary_metadata(content)
        )
        self._add(Summary(value=[value]), 0)


def _record(event: Event) -> bytes:
    """An event as it stands in a file, between its length and its checksums."""
    stream = io.BytesIO()
    RecordWriter(stream).write(event.SerializeToString())
    return stream.getvalue()
