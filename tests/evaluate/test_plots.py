"""The figures as pictures and in TensorBoard: all that a report says is there, and nothing undefined."""

import io

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from cotrr.evaluate import plots
from cotrr.summaries import SummaryWriter
from tests.evaluate.test_report import bins, fig, sample


def picture(png):
    """A PNG's pixels [height, width, 3]."""
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def blue(pixels):
    """How many pixels are as blue as dots and intervals."""
    return int((np.abs(pixels - (31, 119, 180)).sum(axis=-1) < 30).sum())


@pytest.fixture
def events(tmp_path):
    labels = np.array([True, False, True])
    with SummaryWriter(tmp_path) as writer:
        curves = {"reranker": (labels, np.array([0.9, 0.2, 0.6])), "step 4": (labels[:0], np.zeros(0))}
        plots.log_report(writer, sample(), curves, step=3)
    accumulator = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0})
    accumulator.Reload()
    return accumulator


def test_every_defined_value_is_a_scalar(events):
    report, tags = sample(), set(events.Tags()["scalars"])
    for row in report["ladder"]:
        for metric, figure in row["metrics"].items():
            (event,) = events.Scalars(f"evaluation/{row['system']}/{metric}")
            assert (event.step, event.value) == (3, pytest.approx(figure["value"]))
    assert events.Scalars("conflict/reranker/auc")[0].value == pytest.approx(0.912)
    assert "conflict/reranker/debiased_ece" in tags
    assert "conflict/step 4/brier" not in tags  # undefined


def test_pictures_curves_and_the_table_are_there(events):
    tags = set(events.Tags()["tensors"])
    assert {"differences", "reliability/reranker", "reliability/step 4", "reliability/score", "risk_coverage",
            "conflict/reranker", "acceptance"} <= tags  # fmt: skip
    assert "conflict/step 4" not in tags  # nobody to draw a curve of
    for tag in ("differences", "reliability/score", "risk_coverage"):
        width, height, png = make_ndarray(events.Tensors(tag)[0].tensor_proto).tolist()
        assert picture(png).shape == (int(height), int(width), 3)
        assert blue(picture(png)) > 200
    told = make_ndarray(events.Tensors("acceptance")[0].tensor_proto).item().decode()
    assert told.count("\n") == 1 + len(sample()["acceptance"])
    assert "| met | Compliance@1 over CLIP-only ≥ +3 points | +12.3 [+8.3, +16.3] pt |" in told


def test_bands_are_drawn_where_there_are_any():
    plain = bins(0.0)
    banded = [row | {"band": [0.0, 1.0]} for row in plain]
    grey = lambda png: int(
        (np.ptp(picture(png), axis=-1) < 4).sum() - (picture(png).sum(axis=-1) > 750).sum()
    )
    assert grey(plots.reliability(banded, "x")) > 5 * grey(plots.reliability(plain, "x"))


def test_missing_intervals_and_values_are_no_error():
    curve = [{"coverage": 0.5, "queries": 3, "risk": fig(0.2, ci=None)},
             {"coverage": 1.0, "queries": 6, "risk": fig(None)}]  # fmt: skip
    assert plots.risk_coverage({"risk": "r", "curve": curve}).startswith(b"\x89PNG")
    gaps = {"a": {"ndcg@10": fig(None), "compliance@1": fig(0.1, ci=None)}}
    assert plots.forest({"deltas": gaps}).startswith(b"\x89PNG")
    assert plots.forest({"deltas": {}}).startswith(b"\x89PNG")
