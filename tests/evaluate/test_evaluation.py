"""Tests of the evaluation: every figure equals a direct computation, every gap says why."""

import functools
import json

import jax
import numpy as np
import pytest
from sklearn.metrics import brier_score_loss, roc_auc_score

from cotrr.data.lists import Lists
from cotrr.evaluate import bootstrap, calibration, evaluation
from cotrr.evaluate.acceptance import judge
from cotrr.evaluate.evaluation import Engine, System

Q, N, B = 8, 5, 100  # one shape for most tests
ENGINE = Engine(queries=Q, seed=3, resamples=B)


@pytest.fixture(autouse=True, scope="module")
def fewest():
    """These lists are small: intervals from two queries on, but where a test says otherwise."""
    real, evaluation.FEWEST = evaluation.FEWEST, 2
    yield real
    evaluation.FEWEST = real


NAMES = ("compliance@1", "compliance@3", "compliance@5", "ndcg@10", "ndcg_y@10", "conflict_rate@1")


def make_lists(compliance, y=None, conflict=None, where=None, domain=None) -> Lists:
    """Lists of the given labels [Q, n]; what ranking does not read is empty."""
    compliance = np.asarray(compliance, np.float32)
    queries, n = compliance.shape
    where = np.ones((queries, n), bool) if where is None else where
    part = lambda values: np.where(where, compliance if values is None else values, np.nan)
    nothing = np.zeros((queries, n, 0), np.float32)
    return Lists(
        query_id=np.array([f"q{q}" for q in range(queries)], object),
        query=np.array([f"query {q}" for q in range(queries)], object),
        domain=np.array(["a"] * queries if domain is None else domain, object),
        constraints=((),) * queries,
        text=np.zeros((queries, 0), np.float32),
        image=nothing,
        attributes=nothing,
        y=part(y).astype(np.float32),
        compliance=part(None).astype(np.float32),
        conflict=part(conflict).astype(np.float32),
        dual_score=np.full((queries, n), np.nan, np.float32),
        gold=where,
        row=np.where(where, np.arange(queries * n).reshape(queries, n), -1),
        where=where,
    )


@pytest.fixture(scope="module")
def lists():
    """8 queries of 3 to 5 candidates; one without any gain, one candidate without a label."""
    rng = np.random.default_rng(0)
    where = np.arange(N) < np.array([5, 4, 3, 5, 5, 4, 5, 3])[:, None]
    compliance, y = rng.integers(0, 11, (Q, N)) / 10, rng.random((Q, N))
    compliance[3], y[0, 1] = 0, np.nan
    domain = ["b", "a", "a", "b", "a", "c", "b", "b"]
    return make_lists(compliance, y, rng.random((Q, N)) < 0.4, where, domain)


@pytest.fixture(scope="module")
def systems():
    """A baseline, a system in between, and the model; no score is tied."""
    scores = np.random.default_rng(1).normal(size=(3, Q, N))
    return [System(name, f"is {name}", s) for name, s in zip(("base", "mid", "model"), scores, strict=True)]


@pytest.fixture(scope="module")
def ranked(lists, systems):
    """The figures of all three systems."""
    return evaluation.ranking(ENGINE, systems, lists)


def direct(scores, lists):
    """[Q] values of every metric by sorting; for scores without ties."""
    found = {name: np.full(len(scores), np.nan) for name in NAMES}
    for q in range(len(scores)):
        inside = np.flatnonzero(lists.labelled[q])
        order = inside[np.argsort(-scores[q, inside])]
        for k in (1, 3, 5):
            found[f"compliance@{k}"][q] = lists.compliance[q, order[:k]].mean()
        found["conflict_rate@1"][q] = lists.conflict[q, order[0]]
        for name, gain in (("ndcg@10", lists.compliance[q]), ("ndcg_y@10", lists.y[q])):
            discount = 1 / np.log2(np.arange(2, len(order) + 2))
            ideal = np.sort(gain[order])[::-1] @ discount
            found[name][q] = gain[order] @ discount / ideal if ideal > 0 else np.nan
    return found


@functools.cache
def weights(engine=ENGINE):
    """[B, Q] the resampling counts of the engine."""
    key, draw = jax.random.key(engine.seed), jax.jit(bootstrap.resample_counts, static_argnums=2)
    return np.stack([draw(key, b, engine.queries) for b in range(engine.resamples)])


def bounds(values, engine=ENGINE):
    """Percentile interval of the mean of [Q] values over the queries that have one."""
    drawn, there = weights(engine), ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        means = drawn[:, there] @ values[there] / drawn[:, there].sum(axis=1)
    return np.nanpercentile(means, [2.5, 97.5])


def figures_of(report):
    """Every figure in a nested report."""
    if isinstance(report, dict) and "kind" in report:
        yield report
    elif isinstance(report, dict | list):
        for part in report.values() if isinstance(report, dict) else report:
            yield from figures_of(part)


def check_figures(report):
    """Fit for JSON, and no number missing without a reason."""
    json.dumps(report, allow_nan=False)
    for figure in figures_of(report):
        assert set(figure) >= {"value", "ci", "n", "kind"}
        assert ("why" in figure) == (figure["value"] is None or figure["ci"] is None)
        assert figure.get("why", "because")
        if figure["ci"]:
            assert figure["ci"][0] <= figure["ci"][1]


def assert_interval(found, expected):
    """The expected bounds, or none where they coincide."""
    if expected[1] - expected[0] < 1e-6:
        assert found is None
    else:
        assert found == pytest.approx(expected, abs=1e-6)


class TestRanking:
    def test_values_and_intervals(self, lists, systems, ranked):
        found = ranked
        check_figures(found)
        assert [row["system"] for row in found["ladder"]] == ["base", "mid", "model"]
        assert found["ladder"][1]["describes"] == "is mid"
        assert found["metrics"] == found["ladder"][2]["metrics"]
        for system, row in zip(systems, found["ladder"], strict=True):
            assert tuple(row["metrics"]) == NAMES
            for name, values in direct(system.scores, lists).items():
                figure = row["metrics"][name]
                assert figure["value"] == pytest.approx(np.nanmean(values), abs=1e-6), name
                assert figure["ci"] == pytest.approx(bounds(values), abs=1e-6), name
                assert figure["n"] == (~np.isnan(values)).sum()
        assert found["metrics"]["ndcg@10"]["n"] == Q - 1

    def test_differences_are_paired(self, lists, systems, ranked):
        found = ranked
        values = {system.name: direct(system.scores, lists) for system in systems}
        assert list(found["deltas"]) == ["mid", "model"]
        pairs = [(found["deltas"][name], name, "base") for name in ("mid", "model")]
        pairs += [(figures, "model", name) for name, figures in found["gains"].items()]
        assert len(pairs) == 4
        shown = {row["system"]: row["metrics"] for row in found["ladder"]}
        for figures, better, worse in pairs:
            for name in NAMES:
                difference = values[better][name] - values[worse][name]
                apart = shown[better][name]["value"] - shown[worse][name]["value"]
                assert figures[name]["value"] == pytest.approx(apart, abs=1e-6)
                assert_interval(figures[name]["ci"], bounds(difference))

    def test_equal_systems_differ_by_exactly_nothing(self, lists, systems):
        twins = [*systems[:2], systems[0]._replace(name="twin")]
        for figure in evaluation.ranking(ENGINE, twins, lists)["deltas"]["twin"].values():
            assert (figure["value"], figure["ci"]) == (0.0, None)
            assert "all resamples agree" in figure["why"]

    def test_few_queries_have_no_interval(self, lists, systems, monkeypatch, fewest):
        assert fewest == 10
        monkeypatch.setattr(evaluation, "FEWEST", Q + 1)
        found = evaluation.ranking(ENGINE, systems, lists)
        for figure in found["metrics"].values():
            assert (figure["ci"], figure["value"] is None) == (None, False)
            assert f"of at least {Q + 1} queries" in figure["why"]

    def test_slices(self, lists, systems, ranked):
        found = ranked["slices"]
        assert list(found) == ["a", "b", "c"]
        base, model = direct(systems[0].scores, lists), direct(systems[2].scores, lists)
        for domain in "ab":
            inside = lists.domain == domain
            for name in NAMES:
                figure, delta = found[domain]["metrics"][name], found[domain]["deltas"][name]
                only = np.where(inside, model[name], np.nan)
                assert figure["value"] == pytest.approx(np.nanmean(only), abs=1e-6)
                assert_interval(figure["ci"], bounds(only))
                assert delta["value"] == pytest.approx(
                    np.nanmean((model[name] - base[name])[inside]), abs=1e-6
                )
        assert found["b"]["metrics"]["ndcg@10"]["n"] == 3
        assert found["b"]["metrics"]["compliance@1"]["n"] == 4

    def test_slice_of_one_query_has_no_interval(self, ranked):
        for figure in ranked["slices"]["c"]["metrics"].values():
            assert figure["value"] is not None
            assert (figure["ci"], figure["n"]) == (None, 1)
            assert "1 of at least 2 queries" in figure["why"]

    def test_resamples_without_the_slice_are_counted(self, lists, ranked):
        without = int((weights()[:, lists.domain == "a"].sum(axis=1) == 0).sum())
        assert without > 0
        assert ranked["slices"]["a"]["metrics"]["compliance@1"]["undefined"] == without
        assert "undefined" not in ranked["metrics"]["compliance@1"]

    def test_missing_baseline_says_why_and_leaves_the_rest(self, lists, systems, ranked):
        missing = systems[0]._replace(scores=None, why="no dual_score")
        found = evaluation.ranking(ENGINE, [missing, *systems[1:]], lists)
        check_figures(found)
        gone = [found["ladder"][0]["metrics"], *found["deltas"].values(), found["gains"]["base"]]
        gone += [part["deltas"] for part in found["slices"].values()]
        for figure in (figure for figures in gone for figure in figures.values()):
            assert (figure["value"], figure["ci"], figure["n"]) == (None, None, 0)
            assert figure["why"] == "no dual_score"
        assert found["ladder"][1:] == ranked["ladder"][1:]
        assert found["metrics"] == ranked["metrics"]
        assert found["gains"]["mid"] == ranked["gains"]["mid"]
        for domain, part in ranked["slices"].items():
            assert found["slices"][domain]["metrics"] == part["metrics"]

    def test_ties_are_averaged_and_padding_does_not_matter(self, lists):
        flat = np.zeros((Q, N))
        values = evaluation.per_query(flat, lists)
        expected = np.nanmean(np.where(lists.labelled, lists.compliance, np.nan), axis=1)
        np.testing.assert_allclose(values["compliance@1"], expected, rtol=1e-6)
        filled = np.where(lists.labelled, flat, np.nan)
        for name, column in evaluation.per_query(filled, lists).items():
            np.testing.assert_array_equal(column, values[name])

    def test_one_query(self):
        engine, lists = Engine(1, 0, B), make_lists([[0.5, 0.2, 1.0, 0.0, 0.4]], conflict=[[1, 0, 1, 0, 0]])
        systems = [System("base", "", np.arange(5.0)[None]), System("model", "", -np.arange(5.0)[None])]
        found = evaluation.ranking(engine, systems, lists)
        found["conflict"] = evaluation.conflicts(engine, {"model": lists.compliance}, lists)
        found["uncertainty"] = evaluation.coverage(engine, lists.y - 0.1, lists.y + 0.1, lists)
        check_figures(found)
        assert found["metrics"]["compliance@1"]["value"] == 0.5
        assert found["conflict"]["systems"]["model"]["auc"]["value"] == 1.0
        for figure in figures_of(found):
            assert figure["ci"] is None
            assert "1 of at least 2 queries" in figure["why"]
        assert all(row["ci"] is None for row in found["conflict"]["systems"]["model"]["reliability"])

    def test_constant_metric(self, lists, systems):
        constant = make_lists(np.full((Q, N), 0.75), domain=list(lists.domain))
        found = evaluation.ranking(ENGINE, systems, constant)
        check_figures(found)
        for name in ("compliance@1", "compliance@3"):
            assert found["metrics"][name]["value"] == pytest.approx(0.75, abs=1e-6)
            assert found["metrics"][name]["ci"] is None  # not [0.75, 0.75]: that would claim certainty
            assert "all resamples agree" in found["metrics"][name]["why"]
            assert found["deltas"]["model"][name]["value"] == pytest.approx(0, abs=1e-6)
        assert found["metrics"]["ndcg@10"]["value"] == pytest.approx(1.0, abs=1e-6)

    def test_no_labels(self, lists, systems):
        found = evaluation.ranking(ENGINE, systems, lists._replace(y=np.full_like(lists.y, np.nan)))
        check_figures(found)
        assert all(figure["value"] is None and figure["n"] == 0 for figure in figures_of(found))


def rows_of(lists, probability):
    """Query, probability and outcome of every candidate that has them."""
    rows = [
        (q, float(probability[q, i]), float(lists.conflict[q, i] >= 0.5))
        for q in range(len(probability))
        for i in range(probability.shape[1])
        if lists.labelled[q, i] and np.isfinite(lists.conflict[q, i]) and np.isfinite(probability[q, i])
    ]
    return map(np.array, zip(*rows, strict=True))


class TestConflicts:
    @pytest.fixture
    def probability(self, lists):
        drawn = np.random.default_rng(2).random((Q, N)) * 0.6 + 0.4 * np.nan_to_num(lists.conflict)
        drawn[2, 0], drawn[4, 2] = np.nan, 1.0
        return drawn.round(1)

    def test_direct_computation(self, lists, probability):
        result = evaluation.conflicts(ENGINE, {"model": probability}, lists)
        check_figures(result)
        found = result["systems"]["model"]
        query, p, outcome = rows_of(lists, probability)
        edges = np.minimum(np.digitize(p, np.arange(1, 16) / 15), 14)
        gaps = [abs((p - outcome)[edges == i].sum()) for i in range(15)]
        assert found["auc"]["value"] == pytest.approx(roc_auc_score(outcome, p), abs=1e-6)
        assert found["brier"]["value"] == pytest.approx(brier_score_loss(outcome, p), abs=1e-6)
        assert found["ece"]["value"] == pytest.approx(sum(gaps) / len(p), abs=1e-6)
        assert {found[name]["n"] for name in ("auc", "brier", "ece")} == {len(p)}
        assert result["n"] == len(p) + 1  # one candidate has no probability
        everywhere = lists.labelled & np.isfinite(lists.conflict)
        rate = lists.conflict[everywhere].mean()
        assert result["positive_rate"]["value"] == pytest.approx(rate, abs=1e-6)

        drawn, loss = [], (p - outcome) ** 2
        for counts in weights():
            often = counts[query.astype(int)]
            drawn.append([roc_auc_score(outcome, p, sample_weight=often), often @ loss / often.sum()])
        expected = np.percentile(drawn, [2.5, 97.5], axis=0).T
        assert found["auc"]["ci"] == pytest.approx(expected[0], abs=1e-5)
        assert found["brier"]["ci"] == pytest.approx(expected[1], abs=1e-6)

    def test_ece_interval_is_reflected(self, lists, probability):
        found = evaluation.conflicts(ENGINE, {"model": probability}, lists)["systems"]["model"]["ece"]
        query, p, outcome = rows_of(lists, probability)
        bins = np.minimum((p * 15).astype(int), 14)
        drawn = []
        for counts in weights():
            often = counts[query.astype(int)]
            gaps = [abs((often * (p - outcome))[bins == i].sum()) for i in range(15)]
            drawn.append(sum(gaps) / often.sum())
        low, high = np.percentile(drawn, [2.5, 97.5])
        expected = np.maximum(0, 2 * found["value"] - np.array([high, low]))
        assert found["ci"] == pytest.approx(expected, abs=1e-6)
        assert found["kind"].startswith("basic")

    def test_ece_of_a_calibrated_model_is_not_called_bad(self):
        rng, verdicts = np.random.default_rng(0), []
        for _ in range(20):
            p = rng.random((60, N)).astype(np.float32)
            outcome = (rng.random((60, N)) < p).astype(np.float32)
            found = evaluation.conflicts(Engine(60, 0, 200), {"m": p}, make_lists(p, conflict=outcome))
            verdicts.append(judge(found["ece"], 0.05, at_least=False))
        assert verdicts.count("not met") <= 4

    def test_reliability(self, lists, probability):
        found = evaluation.conflicts(ENGINE, {"model": probability}, lists)["systems"]["model"]
        query, p, outcome = rows_of(lists, probability)
        assert len(found["reliability"]) == calibration.BINS
        assert sum(row["n"] for row in found["reliability"]) == len(p)
        told = [0, 0]
        for i, row in enumerate(found["reliability"]):
            inside = (p >= i / 15) & ((p < (i + 1) / 15) | (i == 14))
            assert (row["low"], row["high"], row["n"]) == (i / 15, (i + 1) / 15, inside.sum())
            if not inside.any():
                assert row["predicted"] is row["observed"] is row["ci"] is None
                continue
            assert row["predicted"] == pytest.approx(p[inside].mean())
            assert row["observed"] == pytest.approx(outcome[inside].mean())
            queries = len(set(query[inside]))
            told[queries > 1] += 1
            assert row["ci"] is None or queries >= 2
            if row["ci"]:
                there = np.bincount(query[inside].astype(int), minlength=Q)
                seen = np.bincount(query[inside].astype(int), outcome[inside], minlength=Q)
                n = weights() @ there
                drawn = (weights() @ seen)[n > 0] / n[n > 0]
                assert row["ci"] == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=1e-6)
        assert min(told) > 0
        gaps = [
            row["n"] * abs(row["predicted"] - row["observed"]) for row in found["reliability"] if row["n"]
        ]
        assert found["ece"]["value"] == pytest.approx(sum(gaps) / len(p), abs=1e-6)

    def test_one_class(self, lists, probability):
        for outcome in (0.0, 1.0):
            only = lists._replace(conflict=np.full_like(lists.conflict, outcome))
            result = evaluation.conflicts(ENGINE, {"model": probability}, only)
            check_figures(result)
            found = result["systems"]["model"]
            assert found["auc"]["value"] is found["auc"]["ci"] is None
            assert "one class" in found["auc"]["why"]
            assert found["brier"]["ci"]
            assert result["positive_rate"]["value"] == outcome

    def test_resamples_of_one_class_are_counted(self, lists, probability):
        rare = np.zeros_like(lists.conflict)
        rare[:2, 0] = 1
        found = evaluation.conflicts(ENGINE, {"m": probability}, lists._replace(conflict=rare))
        figure = found["systems"]["m"]["auc"]
        assert figure["undefined"] == (weights()[:, :2].sum(axis=1) == 0).sum() > 0
        assert figure["ci"]

    def test_silver_labels_count_from_one_half_on(self, lists, probability):
        silver = lists._replace(conflict=np.where(lists.conflict == 1, 0.5, 0.49).astype(np.float32))
        expected = evaluation.conflicts(ENGINE, {"model": probability}, lists)
        assert evaluation.conflicts(ENGINE, {"model": probability}, silver) == expected

    def test_nothing_known(self, lists):
        unknown = np.full((Q, N), np.nan)
        result = evaluation.conflicts(ENGINE, {"model": unknown}, lists)
        check_figures(result)
        found = result["systems"]["model"]
        assert all(found[name]["value"] is None and found[name]["n"] == 0 for name in ("auc", "ece", "brier"))
        assert result["positive_rate"]["value"] is not None


def test_coverage(lists):
    rng = np.random.default_rng(4)
    low, high = rng.random((2, Q, N))
    low, high = np.minimum(low, high), np.maximum(low, high)
    found = evaluation.coverage(ENGINE, low, high, lists)
    check_figures(found)
    where = lists.labelled
    held = (low[where] <= lists.y[where]) & (lists.y[where] <= high[where])
    assert found["coverage"]["value"] == pytest.approx(held.mean())
    assert found["width"]["value"] == pytest.approx((high - low)[where].mean())
    assert found["coverage"]["n"] == where.sum()
    assert 0 < held.mean() < 1
    assert evaluation.coverage(ENGINE, lists.y, lists.y, lists)["coverage"]["value"] == 1  # closed
    inside, total = np.where(where, (low <= lists.y) & (lists.y <= high), 0).sum(axis=1), where.sum(axis=1)
    drawn = [counts @ inside / (counts @ total) for counts in weights()]
    assert found["coverage"]["ci"] == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=1e-6)


def test_counts():
    compliance = np.array(
        [[0.5, 0.2, 0.1], [0.0, 0.0, 0.0], [0.4, 0.9, 0.9], [0.3, 0.3, 0.3], [0.9, 0.1, 0.2]]
    )
    where = np.array([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 0, 0]], bool)
    lists = make_lists(compliance, where=where)
    flat, clear = np.zeros((5, 3)), np.tile(np.arange(3.0), (5, 1))
    systems = [System("flat", "", flat), System("clear", "", clear), System("none", "", None)]
    found = evaluation.counts(systems, lists)
    # Query 1 is tied among equals, query 2 is alone, query 3 is tied among equals, query 4 has no labels.
    assert found["ties"] == {"flat": 1, "clear": 0}
    assert list(found["skipped"].values()) == [1, 1]
    assert "without any gain" in next(iter(found["skipped"]))
