"""Tests of the rankings' figures: each equals a direct computation, each gap says why."""

from functools import partial

import jax
import numpy as np
import pytest

from cotrr.evaluate import comparisons, figures, metrics, ranking
from cotrr.evaluate.figures import engine
from cotrr.evaluate.ranking import METRICS, System
from tests.evaluate.listing import check_figures, counts_of, figures_of, make_lists

Q, N, B = 8, 5, 100  # one shape for most tests
ENGINE = engine(Q, seed=3, resamples=B)


@pytest.fixture(autouse=True, scope="module")
def fewest():
    """These lists are small: intervals from two queries on, but where a test says otherwise."""
    real, figures.FEWEST = figures.FEWEST, 2
    yield real
    figures.FEWEST = real


@pytest.fixture(scope="module")
def lists():
    """8 queries of 3 to 5 candidates; one without any gain, one candidate without a label."""
    rng = np.random.default_rng(0)
    where = np.arange(N) < np.array([5, 4, 3, 5, 5, 4, 5, 3])[:, None]
    compliance, y = rng.integers(0, 11, (Q, N)) / 10, rng.random((Q, N))
    compliance[3], y[0, 1] = 0, np.nan
    domain = ["b", "a", "a", "b", "b", "c", "b", "b"]
    return make_lists(compliance, y, rng.random((Q, N)) < 0.4, where, domain)


@pytest.fixture(scope="module")
def systems():
    """A baseline, a system in between, and the model; no score is tied."""
    scores = np.random.default_rng(1).normal(size=(3, Q, N))
    return [System(name, f"is {name}", s) for name, s in zip(("base", "mid", "model"), scores, strict=True)]


@pytest.fixture(scope="module")
def ranked(lists, systems):
    """The figures of all three systems."""
    return ranking.ranking(ENGINE, systems, lists)


def direct(scores, lists):
    """[Q] values of every metric by sorting; for scores without ties."""
    found = {name: np.full(len(scores), np.nan) for name in METRICS}
    for q in range(len(scores)):
        inside = np.flatnonzero(lists.labelled[q])
        order = inside[np.argsort(-scores[q, inside])]
        for k in (1, 3, 5):
            found[f"compliance@{k}"][q] = lists.compliance[q, order[:k]].mean()
            found[f"conflict_rate@{k}"][q] = lists.conflict[q, order[:k]].mean()
        for name, gain in (("ndcg@10", lists.compliance[q]), ("ndcg_y@10", lists.y[q])):
            discount = 1 / np.log2(np.arange(2, len(order) + 2))
            ideal = np.sort(gain[order])[::-1] @ discount
            found[name][q] = gain[order] @ discount / ideal if ideal > 0 else np.nan
    return found


def percentiles(values):
    """Percentile interval of the mean of [Q] values over the queries that have one."""
    drawn, there = counts_of(ENGINE), ~np.isnan(values)
    total = drawn[:, there].sum(axis=1)
    means = (drawn[:, there] @ values[there])[total > 0] / total[total > 0]
    return np.percentile(means, [2.5, 97.5])


def check_interval(figure, values):
    """The percentile interval of the values, or none where its ends coincide."""
    expected = percentiles(values)
    if expected[1] - expected[0] > 1e-6:
        assert figure["intervals"]["percentile"] == pytest.approx(expected, abs=1e-6)
        assert figure["ci"]
    else:
        assert "percentile" not in figure["intervals"]


class TestRanking:
    def test_values_and_intervals(self, lists, systems, ranked):
        check_figures(ranked)
        assert (ranked["baseline"], ranked["model_system"]) == ("base", "model")
        assert [row["system"] for row in ranked["ladder"]] == ["base", "mid", "model"]
        assert ranked["ladder"][1]["describes"] == "is mid"
        assert ranked["metrics"] == ranked["ladder"][2]["metrics"]
        for system, row in zip(systems, ranked["ladder"], strict=True):
            assert tuple(row["metrics"]) == METRICS
            for name, values in direct(system.scores, lists).items():
                figure = row["metrics"][name]
                assert figure["value"] == pytest.approx(np.nanmean(values), abs=1e-6), name
                check_interval(figure, values)
                assert figure["n"] == (~np.isnan(values)).sum()
        assert ranked["metrics"]["ndcg@10"]["n"] == Q - 1

    def test_differences_are_paired(self, lists, systems, ranked):
        values = {system.name: direct(system.scores, lists) for system in systems}
        assert list(ranked["deltas"]) == ["mid", "model"]
        assert list(ranked["gains"]) == ["base", "mid"]
        pairs = [(ranked["deltas"][name], name, "base") for name in ("mid", "model")]
        pairs += [(found, "model", name) for name, found in ranked["gains"].items()]
        shown = {row["system"]: row["metrics"] for row in ranked["ladder"]}
        for found, better, worse in pairs:
            for name in METRICS:
                apart = shown[better][name]["value"] - shown[worse][name]["value"]
                assert found[name]["value"] == pytest.approx(apart, abs=1e-6)
                check_interval(found[name], values[better][name] - values[worse][name])

    def test_baseline_and_model_by_name(self, lists, systems, ranked):
        found = ranking.ranking(ENGINE, systems, lists, baseline="mid", model="base")
        check_figures(found)
        assert (found["baseline"], found["model_system"]) == ("mid", "base")
        assert found["ladder"] == ranked["ladder"]
        assert found["metrics"] == ranked["ladder"][0]["metrics"]
        assert list(found["deltas"]) == ["base", "model"]
        assert list(found["gains"]) == ["mid", "model"]
        assert found["deltas"]["base"] == found["gains"]["mid"]
        for name in METRICS:
            opposite = -ranked["deltas"]["mid"][name]["value"]
            assert found["gains"]["mid"][name]["value"] == pytest.approx(opposite, abs=1e-12)
        assert found["slices"]["b"]["metrics"]["ndcg@10"] != ranked["slices"]["b"]["metrics"]["ndcg@10"]
        apart = [found["slices"][d]["deltas"]["compliance@1"] for d in "abc"]
        weight = [f["n"] for f in apart]
        overall = np.average([f["value"] for f in apart], weights=weight)
        assert overall == pytest.approx(found["deltas"]["base"]["compliance@1"]["value"])

    def test_equal_systems_differ_by_exactly_nothing(self, lists, systems):
        twins = [*systems[:2], systems[0]._replace(name="twin")]
        found = ranking.ranking(ENGINE, twins, lists)
        for figure in found["deltas"]["twin"].values():
            assert (figure["value"], figure["ci"]) == (0.0, None)
            assert "all resamples agree" in figure["why"]
        rows = [row for row in found["comparisons"][0]["rows"] if row["system"] == "twin"]
        assert len(rows) == len(METRICS)
        for row in rows:
            assert row["p"] == row["p_max_t"] == row["p_holm"] == 1
            assert row["simultaneous"] is row["detectable"] is None

    def test_rankings_of_the_same_candidates_differ_by_nothing(self, lists, systems, ranked):
        """No list is longer than 5, so whatever their order the best 5 are all: rounding is no difference."""
        for row in (row for family in ranked["comparisons"] for row in family["rows"]):
            if row["metric"] in ("compliance@5", "conflict_rate@5"):
                assert row["difference"]["value"] == pytest.approx(0, abs=1e-9)
                assert row["difference"]["ci"] is None
                assert row["p"] == row["p_max_t"] == 1

    def test_few_queries_have_no_interval(self, lists, systems, monkeypatch, fewest):
        assert fewest == 10
        monkeypatch.setattr(figures, "FEWEST", Q + 1)
        found = ranking.ranking(ENGINE, systems, lists)
        check_figures(found)
        for figure in found["metrics"].values():
            assert (figure["ci"], figure["value"] is None) == (None, False)
            assert f"of at least {Q + 1} queries" in figure["why"]
        for row in found["comparisons"][0]["rows"]:
            assert row["simultaneous"] is row["detectable"] is None

    def test_slices(self, lists, systems, ranked):
        found = ranked["slices"]
        assert list(found) == ["a", "b", "c"]
        base, model = direct(systems[0].scores, lists), direct(systems[2].scores, lists)
        for domain in "ab":
            inside = lists.domain == domain
            for name in METRICS:
                figure, delta = found[domain]["metrics"][name], found[domain]["deltas"][name]
                only = np.where(inside, model[name], np.nan)
                assert figure["value"] == pytest.approx(np.nanmean(only), abs=1e-6)
                check_interval(figure, only)
                apart = np.where(inside, model[name] - base[name], np.nan)
                assert delta["value"] == pytest.approx(np.nanmean(apart), abs=1e-6)
                check_interval(delta, apart)
        assert found["b"]["metrics"]["ndcg@10"]["n"] == 4
        assert found["b"]["metrics"]["compliance@1"]["n"] == 5

    def test_slice_of_one_query_has_no_interval(self, ranked):
        for figure in ranked["slices"]["c"]["metrics"].values():
            assert figure["value"] is not None
            assert (figure["ci"], figure["n"]) == (None, 1)
            assert "1 of at least 2 queries" in figure["why"]

    def test_resamples_without_the_slice_are_counted(self, lists, ranked):
        without = int((counts_of(ENGINE)[:, lists.domain == "a"].sum(axis=1) == 0).sum())
        assert without > 0
        assert ranked["slices"]["a"]["metrics"]["compliance@1"]["undefined"] == without
        assert "undefined" not in ranked["metrics"]["compliance@1"]

    def test_missing_baseline_says_why_and_leaves_the_rest(self, lists, systems, ranked):
        missing = systems[0]._replace(scores=None, why="no dual_score")
        found = ranking.ranking(ENGINE, [missing, *systems[1:]], lists)
        check_figures(found)
        gone = [found["ladder"][0]["metrics"], *found["deltas"].values(), found["gains"]["base"]]
        gone += [part["deltas"] for part in found["slices"].values()]
        for figure in (figure for metric in gone for figure in metric.values()):
            assert (figure["value"], figure["ci"], figure["n"]) == (None, None, 0)
            assert figure["why"] == "no dual_score"
        assert found["ladder"][1:] == ranked["ladder"][1:]
        assert found["metrics"] == ranked["metrics"]
        assert found["gains"]["mid"] == ranked["gains"]["mid"]
        for domain, part in ranked["slices"].items():
            assert found["slices"][domain]["metrics"] == part["metrics"]
        assert [family["family"] for family in found["comparisons"]] == ["model over each"]
        assert {row["reference"] for row in found["comparisons"][0]["rows"]} == {"mid"}

    def test_ties_are_averaged_and_padding_does_not_matter(self, lists):
        flat = np.zeros((Q, N))
        values = ranking.per_query(flat, lists)
        expected = np.nanmean(np.where(lists.labelled, lists.compliance, np.nan), axis=1)
        np.testing.assert_allclose(values["compliance@1"], expected, rtol=1e-6)
        filled = np.where(lists.labelled, flat, np.nan)
        for name, column in ranking.per_query(filled, lists).items():
            np.testing.assert_array_equal(column, values[name])

    def test_one_query(self):
        lists = make_lists([[0.5, 0.2, 1.0, 0.0, 0.4]], conflict=[[1, 0, 1, 0, 0]])
        systems = [System("base", "", np.arange(5.0)[None]), System("model", "", -np.arange(5.0)[None])]
        found = ranking.ranking(engine(1, 0, B), systems, lists)
        check_figures(found)
        assert found["metrics"]["compliance@1"]["value"] == 0.5
        for figure in figures_of(found):
            assert figure["ci"] is None
            assert "1 of at least 2 queries" in figure["why"]

    def test_constant_metric(self, lists, systems):
        constant = make_lists(np.full((Q, N), 0.75), domain=list(lists.domain))
        found = ranking.ranking(ENGINE, systems, constant)
        check_figures(found)
        for name in ("compliance@1", "compliance@3"):
            assert found["metrics"][name]["value"] == pytest.approx(0.75, abs=1e-6)
            assert found["metrics"][name]["ci"] is None  # not [0.75, 0.75]: that would claim certainty
            assert "all resamples agree" in found["metrics"][name]["why"]
            assert found["deltas"]["model"][name]["value"] == pytest.approx(0, abs=1e-6)
        assert found["metrics"]["ndcg@10"]["value"] == pytest.approx(1.0, abs=1e-6)

    def test_no_labels(self, lists, systems):
        found = ranking.ranking(ENGINE, systems, lists._replace(y=np.full_like(lists.y, np.nan)))
        check_figures(found)
        assert all(figure["value"] is None and figure["n"] == 0 for figure in figures_of(found))
        assert all(row["p"] == 1 for family in found["comparisons"] for row in family["rows"])


WIDE = 40  # queries, for tests


@pytest.fixture(scope="module")
def wide():
    """40 queries of labels 0 or 1, and three systems of which the last is better."""
    rng, shape = np.random.default_rng(5), (WIDE, 7)  # longer than 5, so that all metrics differ
    compliance = rng.integers(0, 2, shape).astype(float)
    lists = make_lists(compliance, rng.random(shape), rng.random(shape))
    scores = rng.normal(size=(3, *shape)) + np.array([0.0, 0.3, 1.5])[:, None, None] * compliance
    systems = [System(name, "", s) for name, s in zip(("base", "mid", "model"), scores, strict=True)]
    return lists, systems, {s.name: direct(s.scores, lists) for s in systems}


class TestComparisons:
    by = engine(WIDE, seed=1, resamples=999)

    @pytest.fixture(scope="module")
    @classmethod
    def found(cls, wide):
        return ranking.ranking(cls.by, wide[1], wide[0])

    def test_families(self, found):
        families = found["comparisons"]
        assert [family["family"] for family in families] == ["over base", "model over each"]
        for family, pairs in zip(
            families,
            ([("mid", "base"), ("model", "base")], [("model", "base"), ("model", "mid")]),
            strict=True,
        ):
            rows = family["rows"]
            assert family["hypotheses"] == len(rows) == 2 * len(METRICS)
            assert family["resamples"] == 999
            told = [(row["system"], row["reference"], row["metric"]) for row in rows]
            assert told == [(*pair, metric) for pair in pairs for metric in METRICS]
        for row in families[0]["rows"]:
            assert row["difference"] == found["deltas"][row["system"]][row["metric"]]
        for row in families[1]["rows"]:
            assert row["difference"] == found["gains"][row["reference"]][row["metric"]]

    def test_p_values_are_those_of_the_family(self, wide, found):
        values = wide[2]
        for family in found["comparisons"]:
            rows = family["rows"]
            apart = [values[r["system"]][r["metric"]] - values[r["reference"]][r["metric"]] for r in rows]
            apart = np.stack(apart, axis=1)
            apart = np.where(np.abs(apart) > 1e-12, apart, 0)
            single, joint = comparisons.sign_flip(self.by.draw, apart)
            np.testing.assert_allclose([row["p"] for row in rows], single, atol=0.002)
            np.testing.assert_allclose([row["p_max_t"] for row in rows], joint, atol=0.002)
            held = comparisons.holm(np.array([row["p"] for row in rows]))
            np.testing.assert_allclose([row["p_holm"] for row in rows], held)
            assert all(1 / 1000 <= row["p"] <= row["p_max_t"] <= 1 for row in rows)
        best = found["comparisons"][1]["rows"][0]
        assert best["p"] < 0.05  # a system that is better, so that something can be seen

    def test_mcnemar_where_a_metric_is_zero_or_one(self, wide, found):
        values = wide[2]
        for family in found["comparisons"]:
            for row in family["rows"]:
                if row["metric"] != "compliance@1":
                    assert row["mcnemar"] is None
                    continue
                apart = values[row["system"]]["compliance@1"] - values[row["reference"]]["compliance@1"]
                assert row["mcnemar"] == comparisons.mcnemar(apart)

    def test_simultaneous_intervals_hold_the_difference_and_are_wider(self, found):
        for family in found["comparisons"]:
            for row in family["rows"]:
                low, high = row["simultaneous"]
                value, error = row["difference"]["value"], row["difference"]["error"]
                assert -1 <= low < value < high <= 1
                assert high - low > 2 * 1.96 * error or high == 1 or low == -1
            halves = {
                round((row["simultaneous"][1] - row["difference"]["value"]) / row["difference"]["error"], 6)
                for row in family["rows"] if row["simultaneous"][1] < 1
            }  # fmt: skip
            assert len(halves) == 1  # one factor for the whole family

    def test_detectable(self, found):
        for row in found["comparisons"][0]["rows"]:
            assert row["detectable"] == pytest.approx(2.8016 * row["difference"]["error"], rel=1e-4)

    def test_clusters(self, wide):
        lists, systems, values = wide
        by = engine(WIDE, 1, 999, clusters=np.arange(WIDE) // 2)
        found = ranking.ranking(by, systems, lists)
        check_figures(found)
        row = found["comparisons"][1]["rows"][0]
        assert row["mcnemar"] is None  # its queries are not independent
        assert row["difference"]["clusters"] == WIDE // 2
        apart = values["model"]["compliance@1"] - values["base"]["compliance@1"]
        single, _ = comparisons.sign_flip(by.draw, apart.reshape(-1, 2).sum(axis=1)[:, None])
        assert row["p"] == pytest.approx(single[0], abs=0.002)

    def test_one_system_compares_with_nothing(self, wide):
        lists, systems, _ = wide
        found = ranking.ranking(self.by, systems[:1], lists)
        check_figures(found)
        assert found["comparisons"] == []
        assert found["deltas"] == found["gains"] == {}
        assert found["metrics"]["compliance@1"]["value"] is not None


class TestPower:
    by = engine(WIDE, seed=1, resamples=200)

    def test_sentence(self, wide):
        found = ranking.ranking(self.by, wide[1], wide[0])
        rows = {r["metric"]: r for r in found["comparisons"][0]["rows"] if r["system"] == "model"}
        points = [f"{100 * rows[m]['detectable']:.1f} points in" for m in ("compliance@1", "ndcg@10")]
        text = ranking.power(found, WIDE)["text"]
        assert text.startswith(f"{WIDE} queries show a true difference to base of {points[0]} Compliance@1")
        assert f"{points[1]} nDCG@10" in text

    def test_too_few_queries(self, wide, monkeypatch):
        monkeypatch.setattr(figures, "FEWEST", WIDE + 1)
        text = ranking.power(ranking.ranking(self.by, wide[1], wide[0]), WIDE)["text"]
        assert "cannot say" in text and "points" not in text

    def test_without_a_baseline_no_other_difference_is_told(self, wide):
        """Or it would be the difference to another system, under the baseline's name."""
        lists, (base, *others), _ = wide
        missing = base._replace(scores=None, why="no clip_score")
        found = ranking.ranking(self.by, [missing, *others], lists)
        text = ranking.power(found, WIDE)["text"]
        assert "cannot say" in text and "points" not in text


def risk_of_half(found):
    """The risk at half coverage."""
    return found["curve"][4]["risk"]["value"]


class TestRiskCoverage:
    def test_by_hand(self):
        # Shown candidates have compliance .9, .2, .5, .6; the second is the surest, then 4, 1, 3.
        compliance = np.array([[0.9, 0.1], [0.2, 0.8], [0.5, 0.4], [0.3, 0.6]])
        logit = np.array([[2.0, 1.0], [2.0, 1.0], [2.0, 1.0], [1.0, 2.0]])
        score = np.array([[0.5, 0.99], [0.9, 0.0], [0.4, 0.0], [0.0, 0.7]])
        found = ranking.risk_coverage(engine(4, 0, B), logit, score, make_lists(compliance))
        check_figures(found)
        queries = [1, 1, 2, 2, 2, 3, 3, 4, 4, 4]
        risk = {1: 0.8, 2: (0.8 + 0.4) / 2, 3: (0.8 + 0.4 + 0.1) / 3, 4: (0.8 + 0.4 + 0.1 + 0.5) / 4}
        assert [point["queries"] for point in found["curve"]] == queries
        assert [point["coverage"] for point in found["curve"]] == pytest.approx(np.arange(1, 11) / 10)
        values = [point["risk"]["value"] for point in found["curve"]]
        assert values == pytest.approx([risk[k] for k in queries])
        assert found["area"]["value"] == pytest.approx(np.mean(values))
        assert found["area"]["n"] == 4
        assert "risk is 0.600; on all of them 0.450" in found["text"]

    def test_intervals_and_whole_coverage(self, wide):
        lists, systems, values = wide
        by, logit = engine(WIDE, 1, 200), systems[2].scores
        found = ranking.risk_coverage(by, logit, 1 / (1 + np.exp(-logit)), lists)
        whole, ranked = found["curve"][-1]["risk"], ranking.ranking(by, systems, lists)["metrics"]
        assert whole["value"] == pytest.approx(1 - ranked["compliance@1"]["value"])
        for kind in ("percentile", "studentised"):
            flipped = [1 - end for end in ranked["compliance@1"]["intervals"][kind][::-1]]
            assert whole["intervals"][kind] == pytest.approx(flipped, abs=1e-9)
        shown = logit.max(axis=1)
        half = shown >= np.sort(shown)[WIDE // 2]
        assert found["curve"][4]["queries"] == WIDE // 2 == found["curve"][4]["risk"]["n"]
        expected = 1 - values["model"]["compliance@1"][half].mean()
        assert found["curve"][4]["risk"]["value"] == pytest.approx(expected)
        assert found["curve"][0]["risk"]["ci"]  # of 4 queries, as FEWEST is 2 here

    def test_padding_is_never_shown(self):
        """Here it would be the highest and the surest of all."""
        where = np.array([[True, False], [True, True]] * 6)
        lists = make_lists(np.tile([[0.5], [0.9]], (6, 2)), where=where)
        logit, score = np.tile([0.0, -1.0], (12, 1)), np.tile([[0.3], [0.7]], (6, 2))
        logit[~where] = score[~where] = 9.0
        found = risk_of_half(ranking.risk_coverage(engine(12, 0, B), logit, score, lists))
        assert found == pytest.approx(0.1)

    def test_queries_without_a_label_are_left_out(self):
        """They have no shown candidate; nor has compliance a value where only conflicts are judged."""
        compliance = np.tile([0.5, 0.2], (14, 1))
        y = np.where(np.arange(14)[:, None] < 2, np.nan, compliance)
        compliance[2] = np.nan
        lists = make_lists(compliance, y=y)
        found = ranking.risk_coverage(engine(14, 0, B), np.tile([1.0, 0.0], (14, 1)), compliance, lists)
        check_figures(found)
        assert found["curve"][-1]["risk"]["value"] == pytest.approx(0.5)
        assert found["curve"][-1]["risk"]["n"] == found["curve"][-1]["queries"] == 11


def test_counts():
    compliance = np.array(
        [[0.5, 0.2, 0.1], [0.0, 0.0, 0.0], [0.4, 0.9, 0.9], [0.3, 0.3, 0.3], [0.9, 0.1, 0.2]]
    )
    where = np.array([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 0, 0]], bool)
    lists = make_lists(compliance, where=where)
    flat, clear = np.zeros((5, 3)), np.tile(np.arange(3.0), (5, 1))
    behind = np.tile([0.0, 0.0, 1.0], (5, 1))  # query 0 is tied below its best
    named = {"flat": flat, "clear": clear, "behind": behind, "none": None}
    systems = [System(name, "", scores) for name, scores in named.items()]
    found = ranking.counts(systems, lists)
    # Query 1 is tied among equals, query 2 is alone, query 3 is tied among equals, query 4 has no labels.
    assert found["ties"] == {"flat": 1, "clear": 0, "behind": 1}
    assert list(found["skipped"].values()) == [1, 1]
    assert "without any gain" in next(iter(found["skipped"]))


def test_values_are_those_of_each_list_alone():
    rng = np.random.default_rng(9)
    lists = make_lists(rng.random((3, 4)), rng.random((3, 4)), rng.random((3, 4)))
    scores = rng.normal(size=(3, 4)).astype(np.float32)
    found, alone = ranking.per_query(scores, lists), jax.jit(partial(metrics.ndcg, k=10))
    for q in range(3):
        expected = float(alone(scores[q], lists.y[q], where=np.ones(4, bool)))
        assert found["ndcg_y@10"][q] == pytest.approx(expected, rel=1e-6)
    assert all(column.dtype == np.float64 for column in found.values())
