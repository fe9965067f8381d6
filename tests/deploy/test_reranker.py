"""The reranker inside a request: parity with the files, bad input, deadlines, threads, swaps."""

import concurrent.futures
import json
import logging
import math
import pathlib
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cotrr.deploy
from cotrr.data import runs
from cotrr.data.lists import to_lists
from cotrr.deploy import Reranker, rerank
from cotrr.deploy.registry import Draft
from cotrr.deploy.reranker import COUNTED, FALLBACKS, FIELDS, Serving, arrange
from cotrr.deploy.scorer import Scorer
from cotrr.errors import InputError
from cotrr.ranker import artifact
from cotrr.ranker import model_files as parts
from tests.conftest import scored_line
from tests.deploy.small import make_registry, model_files, promotion

DIM = 6  # of the small model's embeddings
few = settings(max_examples=300, deadline=None, derandomize=True, database=None)


def make_scorer(number: int = 1) -> Scorer:
    return Scorer(parts.parse(model_files(number), "model"))


SCORER = make_scorer()


def make_lines(queries=1, items=8, **fields) -> list[dict]:
    return [scored_line(q, 3 * q + i, DIM, **fields) for q in range(queries) for i in range(items)]


LINES = make_lines()
QUERY = {"domain": "d0", "constraints": {"color": "pink"}, "text_embedding": LINES[0]["text_embedding"]}


class Clock:
    """Says the times it is given, then the last one for ever."""

    def __init__(self, *times):
        self.times = list(times)

    def __call__(self):
        return self.times.pop(0) if len(self.times) > 1 else self.times[0]


class Broken:
    """A scorer that fails, or finds no finite score."""

    version, text_dim, image_dim = "broken", DIM, DIM

    def __init__(self, logit=None):
        self.logit = logit

    def score(self, query, image, attributes):
        if self.logit is None:
            raise ZeroDivisionError("of the scorer's own")
        scored = SCORER.score(query, image, attributes)
        return scored._replace(logit=np.full(len(image), self.logit))


def counted(reranker) -> dict[str, int]:
    """What was counted at all."""
    return {name: count for name, count in reranker.stats().items() if count}


def assert_original(found, count: int, fallback: str) -> None:
    assert found.order == list(range(count))
    assert found.scored is None
    assert found.fallback.startswith(fallback)
    assert fallback.split(":")[0] in FALLBACKS
    assert [row["rank"] for row in found.rows()] == [row["original_rank"] for row in found.rows()]
    assert all(row[field] is None for row in found.rows() for field in FIELDS)


def make_other() -> Scorer:
    """A scorer whose numbers differ from SCORER's, unlike those of `model_files(2)`."""
    found = parts.parse(model_files(2), "model")
    return Scorer(found._replace(weights=found.weights | {"params/bias": found.weights["params/bias"] + 1}))


def wait_for(condition, seconds=10):
    """Waits until something is so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


class TestParity:
    @pytest.mark.parametrize("top_m", [0, 3, 20])
    def test_it_says_what_the_reranked_file_says(self, write_run, tmp_path, top_m):
        lines = make_lines(queries=4, items=9)
        lines[2]["image_embedding"] = lines[3]["clip_score"] = lines[12]["conflict_prob"] = ...
        lines = [{k: v for k, v in line.items() if v is not ...} for line in lines]
        (tmp_path / "model").mkdir()
        for name, data in model_files().items():
            (tmp_path / "model" / name).write_bytes(data)
        table = runs.read_run(write_run(lines), keep_lines=True).table
        model, lists = artifact.load(tmp_path / "model"), to_lists(table)
        written = rerank.lines(table, lists, artifact.score(model, lists), top_m, model.version)
        written = [json.loads(line) for line in written]
        reranker = Reranker.load(tmp_path / "model", top_m=top_m)
        for q in range(4):
            mine, theirs = lines[9 * q : 9 * q + 9], written[9 * q : 9 * q + 9]
            found = reranker.rerank(mine[0], mine)
            assert [mine[i]["id"] for i in found.order] == [line["id"] for line in theirs]
            for row, line in zip(found.rows(), theirs, strict=True):
                assert row == {name: pytest.approx(line[name], abs=1e-5)
                               if name in FIELDS else line[name] for name in row}  # fmt: skip

    def test_arrays_say_the_same(self):
        found = Reranker(SCORER).rerank(QUERY, LINES)
        image = np.array([line["image_embedding"] for line in LINES])
        lists = {name: np.array([line.get(name, math.nan) for line in LINES]) for name in parts.ATTRIBUTES}
        lists |= {"strong_conflicts": np.ones(8), "soft_conflicts": np.zeros(8)}
        again = Reranker(SCORER).rerank_arrays(QUERY, image, np.stack(list(lists.values()), axis=1))
        assert again.order == found.order
        for part, other in zip(again.scored, found.scored, strict=True):
            np.testing.assert_array_equal(part, other)

    def test_many_candidates(self):
        lines = make_lines(items=1500)
        found = Reranker(SCORER, top_m=0).rerank(QUERY, lines)
        assert sorted(found.order) == list(range(1500))
        assert (np.diff(found.scored.logit[found.order]) <= 0).all()


class TestOrder:
    def test_only_the_first_change_places(self):
        full, some = (Reranker(SCORER, top_m=m).rerank(QUERY, LINES).order for m in (0, 4))
        assert sorted(some[:4]) == [0, 1, 2, 3]
        assert some[:4] == [i for i in full if i < 4]
        assert some[4:] == [4, 5, 6, 7]
        assert Reranker(SCORER, top_m=4).rerank(QUERY, LINES, top_m=0).order == full

    @pytest.mark.parametrize("count", [1, 2, 3, 5, 17, 64, 100, 257])
    def test_equal_candidates_keep_their_order(self, count):
        same = [LINES[0]] * count
        assert Reranker(SCORER, top_m=0).rerank(QUERY, same).order == list(range(count))

    def test_none_and_one(self):
        reranker = Reranker(SCORER)
        empty, one = reranker.rerank(QUERY, []), reranker.rerank(QUERY, LINES[:1])
        assert (empty.order, empty.rows(), empty.fallback) == ([], [], "")
        assert (one.order, one.rows()[0]["rank"], one.fallback) == ([0], 1, "")
        assert counted(reranker) == {"requests": 2, "reranked": 2, "candidates": 1}

    @pytest.mark.parametrize("top_m", [0, 3])
    def test_the_bad_take_no_place(self, top_m):
        logit = np.array([0.0, 9, 1, 9, 2, 3])
        order = arrange(logit, [1, 3], top_m)
        assert order == ([5, 4, 2, 0, 1, 3] if not top_m else [4, 2, 0, 1, 3, 5])


class TestNothingFails:
    @pytest.mark.parametrize("top_m", [0, 4])
    @pytest.mark.parametrize(
        "bad", [None, {"brightness": 7}, {"image_embedding": [1.0]}, {"clip_score": 1e300},
                {"brightness": math.nan}, {"conflicts": "many"}],
    )  # fmt: skip
    def test_a_bad_candidate_stands_behind_and_the_others_as_without_it(self, bad, top_m):
        reranker = Reranker(SCORER, top_m=top_m)
        found, without = reranker.rerank(QUERY, [*LINES[:2], bad, *LINES[2:]]), reranker.rerank(QUERY, LINES)
        ranked = top_m or 8
        assert [i - (i > 2) for i in found.order if i != 2] == without.order
        assert found.order[ranked:] == sorted(found.order[ranked:])
        assert 2 in found.order[ranked:]
        assert set(found.reasons) == {2}
        for part, other in zip(found.scored, without.scored, strict=True):
            np.testing.assert_allclose(np.delete(part, 2), other, atol=1e-6)
        (row,) = (row for row in found.rows() if "reason" in row)
        assert row["reason"] == found.reasons[2]
        assert all(row[field] is None for field in FIELDS)
        assert counted(reranker)["bad candidates"] == 1

    def test_all_bad(self):
        found = Reranker(SCORER).rerank(QUERY, [None, 3, "x"])
        assert (found.order, set(found.reasons), found.fallback) == ([0, 1, 2], {0, 1, 2}, "")

    @pytest.mark.parametrize(
        ("query", "candidates", "count", "why"),
        [
            (None, LINES, 8, "bad request: query: not a mapping"),
            ({"domain": 3}, LINES, 8, "bad request: query: domain"),
            ({"text_embedding": [1.0]}, LINES, 8, "bad request: query: text_embedding: 1 numbers"),
            (QUERY, None, 0, "bad request: candidates: expected a list"),
            (QUERY, 3, 0, "bad request: candidates: expected a list"),
        ],
    )
    def test_a_bad_request_keeps_its_order(self, query, candidates, count, why):
        reranker = Reranker(SCORER)
        assert_original(reranker.rerank(query, candidates), count, why)
        found = {"requests": 1, "fallback: bad request": 1, "candidates": count}
        assert counted(reranker) == {name: n for name, n in found.items() if n}

    @pytest.mark.parametrize("top_m", [-1, 2.5, "3"])
    def test_a_bad_top_m(self, top_m):
        assert_original(Reranker(SCORER).rerank(QUERY, LINES, top_m=top_m), 8, "bad request: top_m")

    def test_a_generator_a_mapping_and_a_string(self):
        reranker = Reranker(SCORER)
        assert reranker.rerank(QUERY, (line for line in LINES)).order == reranker.rerank(QUERY, LINES).order
        assert reranker.rerank(QUERY, LINES[0]).reasons.keys() == set(range(len(LINES[0])))
        assert reranker.rerank(QUERY, "abc").order == [0, 1, 2]

    @pytest.mark.parametrize("image", [(8, 5), (7, 6), (8,), (8, 6, 1)])
    def test_arrays_of_other_shapes(self, image):
        found = Reranker(SCORER).rerank_arrays(QUERY, np.zeros(image), np.zeros((8, 18)))
        assert_original(found, 8, "bad request: images have the shape")

    def test_arrays_that_are_none(self):
        assert_original(Reranker(SCORER).rerank_arrays(QUERY, None, None), 0, "bad request")
        assert_original(Reranker(SCORER).rerank_arrays(QUERY, "a", [["b"] * 18]), 1, "unexpected")

    def test_a_scorer_that_fails(self, caplog):
        reranker = Reranker(Broken())
        with caplog.at_level(logging.ERROR):
            for _ in range(9):
                assert_original(reranker.rerank(QUERY, LINES), 8, "unexpected: ZeroDivisionError")
        assert counted(reranker) == {"requests": 9, "fallback: unexpected": 9, "candidates": 72}
        assert len(caplog.records) == 4  # the 1st, 2nd, 4th and 8th time
        assert "of the scorer's own" in caplog.text

    @pytest.mark.parametrize("logit", [math.nan, math.inf, -math.inf])
    def test_a_score_that_is_not_finite(self, logit):
        found = Reranker(Broken(logit)).rerank(QUERY, LINES)
        assert (found.order, found.fallback) == (list(range(8)), "")
        assert set(found.reasons.values()) == {"no finite score"}
        json.dumps(found.rows(), allow_nan=False)

    def test_no_model(self):
        reranker = Reranker(None)
        assert_original(reranker.rerank(QUERY, LINES), 8, "no champion")
        assert not reranker.refresh()

    @pytest.mark.parametrize(
        ("times", "when"), [((0, 0.0021), "before scoring"), ((0, 0.001, 0.0021), "while scoring")]
    )
    def test_a_deadline_that_passed(self, times, when):
        reranker = Reranker(SCORER, deadline_ms=2, clock=Clock(*times))
        assert_original(reranker.rerank(QUERY, LINES), 8, f"deadline: 2 ms passed {when}")
        assert counted(reranker) == {"requests": 1, "fallback: deadline": 1, "candidates": 8}

    def test_a_deadline_that_did_not_pass(self):
        assert not Reranker(SCORER, deadline_ms=2, clock=Clock(0, 0.002)).rerank(QUERY, LINES).fallback
        late = Reranker(SCORER, deadline_ms=2, clock=Clock(1)).rerank(QUERY, LINES, since=0)
        assert_original(late, 8, "deadline")

    # What json.loads gives, NaN and infinities among it.
    garbage = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=12,
    )
    fields = st.dictionaries(st.sampled_from(sorted({*LINES[0], *QUERY, *parts.ATTRIBUTES})), garbage)
    anything = garbage | fields

    @few
    @given(query=anything | st.just(QUERY), candidates=anything | st.lists(anything, max_size=5),
           top_m=st.none() | st.integers(-1, 9))  # fmt: skip
    def test_garbage_is_always_put_in_some_order(self, query, candidates, top_m):
        found = Reranker(SCORER).rerank(query, candidates, top_m=top_m)
        count = len(candidates) if isinstance(candidates, list | dict | str) else 0
        assert sorted(found.order) == list(range(count))
        assert not found.fallback.startswith("unexpected")
        json.dumps(found.rows(), allow_nan=False)

    @few
    @given(data=st.data())
    def test_garbage_among_good_candidates_changes_nothing_for_them(self, data):
        bad = data.draw(st.lists(self.anything, min_size=1, max_size=3))
        reranker = Reranker(SCORER, top_m=0)
        found = reranker.rerank(QUERY, [*LINES, *bad])
        good = [i for i in found.order if i < 8]
        assert good == reranker.rerank(QUERY, LINES).order


class TestThreads:
    def requests(self, count=40):
        return [make_lines(items=3 + i % 7) for i in range(count)]

    def test_many_threads_give_what_one_gives(self):
        work = self.requests()
        alone = [Reranker(SCORER).rerank(QUERY, lines).rows() for lines in work]
        reranker = Reranker(SCORER)
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda lines: reranker.rerank(QUERY, lines).rows(), work * 5))
        assert found == alone * 5
        counts = counted(reranker)
        assert counts["requests"] == counts["reranked"] == 200
        assert counts["candidates"] == 5 * sum(map(len, work))

    def test_a_swap_under_load_loses_nothing_and_mixes_nothing(self):
        old, new = Serving(SCORER, "v1"), Serving(make_other(), "v2")
        assert old.version != new.version
        rows = {s.version: Reranker(s.scorer).rerank(QUERY, LINES).rows() for s in (old, new)}
        assert rows[old.version] != rows[new.version]
        reranker, answers = Reranker(SCORER), []
        stop = threading.Event()

        def ask():
            while not stop.is_set():
                answers.append(reranker.rerank(QUERY, LINES))

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            asking = [pool.submit(ask) for _ in range(4)]
            for i in range(60):
                reranker.swap((new, old)[i % 2])
                time.sleep(0.002)
            stop.set()
            for one in asking:
                one.result()
        assert {answer.model_version for answer in answers} == set(rows)
        for answer in answers:
            assert answer.rows() == rows[answer.model_version]
        assert counted(reranker)["reranked"] == len(answers)
        assert counted(reranker)["swaps"] == 60


class TestRegistry:
    @pytest.fixture
    def registry(self, tmp_path):
        registry = make_registry(tmp_path / "registry", 2)
        registry.append(lambda _: promotion(registry, "v1"))
        return registry

    def reranker(self, tmp_path, **how):
        return Reranker.load(tmp_path / "registry", **how)

    def promote(self, registry, label):
        registry.append(lambda _: promotion(registry, label))

    def test_it_follows_the_champion(self, registry, tmp_path):
        reranker = self.reranker(tmp_path)
        assert reranker.serving.label == "v1"
        assert not reranker.refresh()
        self.promote(registry, "v2")
        first = reranker.rerank(QUERY, LINES)
        assert reranker.refresh()
        second = reranker.rerank(QUERY, LINES)
        assert [found.label for found in (first, second)] == ["v1", "v2"]
        assert (
            second.model_version == registry.state().version("v2").model == second.rows()[0]["model_version"]
        )
        registry.rollback("t")
        assert reranker.refresh()
        assert reranker.rerank(QUERY, LINES).model_version == first.model_version
        assert counted(reranker)["swaps"] == 2

    def test_a_pinned_version_stays(self, registry, tmp_path):
        for version in ("v2", registry.state().version("v2").model):
            reranker = self.reranker(tmp_path, version=version)
            assert reranker.serving.label == "v2"
            registry.append(lambda state: Draft(kind="alias", actor="t", version="v1",
                                                facts={"alias": "shadow"}))  # fmt: skip
            assert not reranker.refresh()
        assert self.reranker(tmp_path, version="shadow").serving.label == "v1"

    def test_a_damaged_champion_leaves_the_old_one(self, registry, tmp_path):
        reranker = self.reranker(tmp_path)
        self.promote(registry, "v2")
        folder = registry.state().version("v2").folder
        weights = tmp_path / "registry" / "cotrr" / "versions" / folder / "weights.npz"
        whole = weights.read_bytes()
        weights.write_bytes(whole[:-1] + b"?")
        with pytest.raises(InputError, match="changed since"):
            reranker.refresh()
        assert reranker.rerank(QUERY, LINES).label == "v1"
        with pytest.raises(InputError, match="changed since"):
            self.reranker(tmp_path)
        weights.write_bytes(whole)
        assert reranker.refresh()

    def test_a_broken_log_leaves_the_old_one(self, registry, tmp_path):
        reranker = self.reranker(tmp_path)
        event = tmp_path / "registry" / "cotrr" / "events" / "00000004.json"
        event.write_text("{}")
        with pytest.raises(InputError):
            reranker.refresh()
        assert not reranker.rerank(QUERY, LINES).fallback

    def test_back_to_nothing_is_step4s_own_order(self, registry, tmp_path):
        reranker = self.reranker(tmp_path)
        registry.rollback("t", reason="complaints")
        assert reranker.refresh()
        assert_original(reranker.rerank(QUERY, LINES), 8, "no champion: no version is champion")
        assert reranker.serving == Serving(None, reason="no version is champion")
        assert not reranker.refresh()
        assert_original(self.reranker(tmp_path).rerank(QUERY, LINES), 8, "no champion")
        self.promote(registry, "v2")
        assert reranker.refresh()
        assert not reranker.rerank(QUERY, LINES).fallback

    def test_step4s_own_version_is_step4s_own_order(self, registry, tmp_path):
        reranker = self.reranker(tmp_path)
        registry.append(lambda _: Draft(kind="import", actor="t", version="v3", facts={"model": "clip-b32"}))
        registry.append(lambda _: Draft(kind="adopt", actor="t", version="v3"))
        assert reranker.refresh()
        assert_original(reranker.rerank(QUERY, LINES), 8, "no champion: v3 is Step 4's own clip-b32")
        with pytest.raises(InputError, match="Step 4's own"):
            self.reranker(tmp_path, version="v3")

    def test_what_is_not_there_is_refused(self, registry, tmp_path):
        with pytest.raises(InputError, match="no version 'v9'"):
            self.reranker(tmp_path, version="v9")
        for place in (tmp_path / "nowhere", tmp_path):
            with pytest.raises(InputError, match="neither a model nor a registry"):
                Reranker.load(place)

    def test_a_thread_follows_and_says_what_is_wrong(self, registry, tmp_path, caplog):
        reranker = self.reranker(tmp_path)
        folder = registry.state().version("v2").folder
        manifest = tmp_path / "registry" / "cotrr" / "versions" / folder / "manifest.json"
        whole = manifest.read_bytes()
        manifest.write_bytes(b"{}")
        stop = reranker.follow(0.01)
        try:
            self.promote(registry, "v2")
            wait_for(lambda: reranker.trouble)
            assert "changed since" in reranker.trouble
            assert reranker.serving.label == "v1"
            manifest.write_bytes(whole)
            wait_for(lambda: not reranker.trouble)
            assert reranker.serving.label == "v2"
        finally:
            stop.set()
        assert len([r for r in caplog.records if "v1 still serves" in r.getMessage()]) == 1


def test_counts_are_there_before_anything_happens():
    assert Reranker(SCORER).stats() == dict.fromkeys(COUNTED, 0)


def test_it_imports_little_and_answers_soon(tmp_path):
    for name, data in model_files().items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "lines.json").write_text(json.dumps(LINES))
    code = """
import json, sys, time
from cotrr.deploy import Reranker
folder = sys.argv[1]
lines = json.loads(open(f"{folder}/lines.json").read())
assert not Reranker.load(folder).rerank(lines[0], lines).fallback
print(time.process_time())  # all that this process has worked: others may keep it waiting
print(sorted({"jax", "flax", "scipy", "pyarrow", "absl"} & {m.split(".")[0] for m in sys.modules}))
"""
    root = pathlib.Path(__file__).resolve().parents[2]
    said = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True,
                          check=True, cwd=root).stdout  # fmt: skip
    seconds, modules = said.splitlines()
    assert modules == "[]"
    assert float(seconds) < 0.7


def test_the_package_exports_it():
    assert cotrr.deploy.Reranker is Reranker
    with pytest.raises(AttributeError, match="no attribute 'Scorrer'"):
        cotrr.deploy.Scorrer  # noqa: B018
