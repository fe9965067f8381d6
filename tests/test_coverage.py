"""From a run to intervals: trained and calibrated on some queries, they hold the labels of others."""

import numpy as np

from cotrr.data import dataset
from cotrr.data.lists import to_lists
from cotrr.evaluate import figures, probabilities
from cotrr.ranker import artifact
from tests.commands import launch, make_data


def test_intervals_of_a_trained_model_hold_what_they_promise(tmp_path):
    data = make_data(tmp_path, 900, 24, "0.5,0,0.5")
    launch("train", f"--data={data}", f"--workdir={tmp_path / 'model'}",
           "--flagfile=experiments/recipes/cotrr_lite.flags", "--epochs=30")  # fmt: skip
    lists = to_lists(dataset.read(data, "test"))
    scored = artifact.score(artifact.load(tmp_path / "model"), lists)
    engine = figures.engine(len(lists.query_id), 0, 1000)
    found = probabilities.coverage(engine, scored.low, scored.high, lists)
    assert len(lists.query_id) > 400
    assert 0.93 < found["coverage"]["value"] < 0.97
    assert found["width"]["value"] < 0.8 * np.ptp(lists.y[lists.labelled])  # and they say something
