"""Shadow mode: what is served is never touched, and what is logged is what `ab` reads."""

import json
import threading

import numpy as np
import pytest

from cotrr.data.contract import ATTRIBUTES
from cotrr.deploy import Reranker
from cotrr.deploy import experiment as online
from cotrr.deploy.reranker import Serving
from cotrr.deploy.shadow import Shadow
from cotrr.errors import InputError
from tests.deploy.test_ab import experiment
from tests.deploy.test_reranker import LINES, QUERY, SCORER, Broken, make_other, wait_for

OTHER = make_other()
EXPERIMENT = experiment(mode="shadow", baseline_version=SCORER.version, candidate_version=OTHER.version)


class Held:
    """A scorer that waits until it may go on."""

    version, text_dim, image_dim = OTHER.version, OTHER.text_dim, OTHER.image_dim

    def __init__(self):
        self.go = threading.Event()

    def score(self, *request):
        assert self.go.wait(10)
        return OTHER.score(*request)


@pytest.fixture
def start(tmp_path):
    """Starts a shadow that is closed at the end."""
    started = []

    def make(candidate=OTHER, served=SCORER, exp=EXPERIMENT, log=tmp_path / "shadow.jsonl", **how):
        shadow = Shadow(Reranker(served), Reranker(candidate), exp, log, **how)
        started.append(shadow)
        return shadow

    yield make
    for shadow in started:
        shadow.close()
        assert not shadow._thread.is_alive()


def read(tmp_path):
    return online.read_exposures(tmp_path / "shadow.jsonl", EXPERIMENT).records


def counted(shadow):
    return {name: count for name, count in shadow.stats().items() if count}


def test_it_serves_one_and_logs_the_other(start, tmp_path):
    shadow = start()
    assert shadow.rerank(QUERY, iter(LINES)).rows() == Reranker(SCORER).rerank(QUERY, LINES).rows()
    attributes, image = np.full((8, len(ATTRIBUTES)), 0.5), np.zeros((8, 0))
    shadow.rerank_arrays(QUERY, image, attributes, unit="u", request_id="r1")
    shadow.close()
    first, second = read(tmp_path)
    assert (second.unit, second.request_id) == ("u", "r1")
    assert first.request_id
    assert first.variant == "baseline"
    assert first.model_version == SCORER.version
    orders = [Reranker(s).rerank(QUERY, LINES).order for s in (SCORER, OTHER)]
    assert first.shadow.same_top == (orders[0][0] == orders[1][0])
    assert (first.shadow.top_k, first.shadow.top_k_overlap) == (10, 1.0)
    assert counted(shadow) == {"logged": 2}


def test_units_are_queries_unless_given(start, tmp_path):
    shadow = start()
    for query, unit in (({"query_id": "q7", "query": "pink"}, ""), ({"query": "x" * 900}, ""), ({}, "me")):
        shadow.rerank(QUERY | query, LINES, unit=unit)
    shadow.close()
    assert [record.unit for record in read(tmp_path)] == ["q7", "x" * 500, "me"]


def test_labels_may_name_the_versions(start):
    shadow = start(exp=experiment(mode="shadow", baseline_version="v1", candidate_version="v2"))
    shadow.served.swap(Serving(SCORER, "v1"))
    shadow.rerank(QUERY, LINES)
    wait_for(lambda: sum(shadow.stats().values()))  # the other one has no label yet
    shadow.candidate.swap(Serving(OTHER, "v2"))
    shadow.rerank(QUERY, LINES)
    shadow.close()
    assert counted(shadow) == {"other version": 1, "logged": 1}


def test_a_full_queue_drops_and_counts(start, tmp_path):
    held = Held()
    shadow = start(held, room=2)
    shadow.rerank(QUERY, LINES)
    wait_for(lambda: shadow._waiting.empty())  # it is being ranked
    for _ in range(5):
        assert not shadow.rerank(QUERY, LINES).fallback
    assert counted(shadow) == {"dropped": 3}
    held.go.set()
    shadow.close()
    assert counted(shadow) == {"dropped": 3, "logged": 3}
    assert len(read(tmp_path)) == 3


@pytest.mark.parametrize(
    ("candidate", "served", "what"),
    [(Broken(), SCORER, "not ranked"), (OTHER, Broken(), "not ranked"), (SCORER, SCORER, "other version")],
)
def test_what_cannot_be_compared_is_not_logged(start, tmp_path, candidate, served, what):
    shadow = start(candidate, served)
    shadow.rerank(QUERY, LINES)
    shadow.rerank(QUERY, [])
    shadow.rerank(None, LINES)
    shadow.close()
    assert counted(shadow).pop(what) >= 1
    assert not (tmp_path / "shadow.jsonl").read_bytes()


def test_a_name_that_is_none_is_counted(start):
    shadow = start()
    assert not shadow.rerank(QUERY | {"query_id": 10**5000}, LINES).fallback
    assert counted(shadow) == {"failed": 1}


def test_a_log_that_cannot_be_written_is_counted(start, caplog):
    shadow = start(log="/dev/full")
    assert not shadow.rerank(QUERY, LINES).fallback
    wait_for(lambda: counted(shadow))
    assert counted(shadow) == {"failed": 1}
    assert "not logged" in caplog.text


def test_a_log_goes_on(start, tmp_path):
    for _ in range(2):
        shadow = start()
        shadow.rerank(QUERY, LINES)
        shadow.close()
    assert len((tmp_path / "shadow.jsonl").read_text().splitlines()) == 2
    assert json.loads((tmp_path / "shadow.jsonl").read_text().splitlines()[1])["experiment_id"]


def test_another_mode_is_refused(start):
    with pytest.raises(InputError, match="mode"):
        start(exp=experiment())
