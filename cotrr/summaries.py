"""TensorBoard event files without TensorFlow: scalars, histograms, text, HParams."""

import pathlib
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.histogram.summary_v2 import histogram_pb
from tensorboard.plugins.hparams import metadata, plugin_data_pb2
from tensorboard.plugins.hparams import summary_v2 as hparams
from tensorboard.plugins.hparams.api_pb2 import Status
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.event_file_writer import EventFileWriter


class SummaryWriter:
    """Writes one event file into `logdir`; use it as a context manager."""

    def __init__(self, logdir: str | pathlib.Path):
        self._writer = EventFileWriter(str(logdir))

    def __enter__(self) -> "SummaryWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self._writer.close()

    def _add(self, summary: Summary, step: int) -> None:
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))

    def scalars(self, values: Mapping[str, Any], step: int) -> None:
        """Numbers by tag; undefined ones (NaN) leave a gap in the curve."""
        self._add(Summary(value=[
            Summary.Value(tag=tag, simple_value=float(value))
            for tag, value in values.items() if np.isfinite(value)
        ]), step)  # fmt: skip

    def restart(self, step: int) -> None:
        """A killed run goes on from `step`: what it had written from there on is not shown."""
        log = SessionLog(status=SessionLog.START)
        self._writer.add_event(Event(wall_time=time.time(), step=step, session_log=log))

    def histogram(self, tag: str, values: Any, step: int) -> None:
        """The distribution of an array."""
        self._add(histogram_pb(tag, np.asarray(values)), step)

    def text(self, tag: str, markdown: str, step: int = 0) -> None:
        """A Markdown text."""
        self._add(text_pb(tag, markdown), step)

    def hparams(self, values: Mapping[str, Any], metrics: tuple[str, ...]) -> None:
        """One row of the HParams table: this run's settings, and the scalar tags that judge it."""
        plain = {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in values.items()}
        domains = [hparams.HParam(name) for name in plain]
        self._add(hparams.hparams_config_pb(domains, [hparams.Metric(tag) for tag in metrics]), 0)
        self._add(hparams.hparams_pb(plain), 0)

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
