"""Tests of the probabilities' figures: scikit-learn, direct loops over resamples, and what is undefined."""

import numpy as np
import pytest
from sklearn.metrics import brier_score_loss, roc_auc_score

from cotrr.evaluate import bootstrap, calibration, figures, intervals, probabilities
from cotrr.evaluate.acceptance import judge
from cotrr.evaluate.figures import engine
from cotrr.evaluate.probabilities import Judged
from tests.evaluate.listing import check_figures, counts_of, figures_of, make_lists

Q, N, B = 14, 5, 100
ENGINE = engine(Q, seed=3, resamples=B)
CLUSTERS = np.arange(Q) // 2 * 3 % 11
BY_CLUSTER = engine(Q, seed=3, resamples=B, clusters=CLUSTERS)
both = pytest.mark.parametrize("by", [ENGINE, BY_CLUSTER], ids=["queries", "clusters"])


@pytest.fixture(autouse=True, scope="module")
def fewest():
    """These lists are small: intervals from two queries on."""
    real, figures.FEWEST = figures.FEWEST, 2
    yield
    figures.FEWEST = real


@pytest.fixture(scope="module")
def lists():
    """14 queries of 3 to 5 candidates; one candidate without a label, one without a conflict."""
    rng = np.random.default_rng(0)
    where = np.arange(N) < np.array([5, 4, 3, 5, 5, 4, 5, 3, 5, 5, 4, 4, 5, 5])[:, None]
    compliance, y = rng.integers(0, 11, (Q, N)) / 10, rng.random((Q, N))
    conflict = (rng.random((Q, N)) < 0.4).astype(float)
    y[0, 1], conflict[1, 0] = np.nan, np.nan
    return make_lists(compliance, y, conflict, where)


@pytest.fixture(scope="module")
def probability(lists):
    """Probabilities in tenths, with ties; one is alone in its bin, one is 1 and one is not known."""
    drawn = np.random.default_rng(2).random((Q, N)) * 0.6 + 0.4 * np.nan_to_num(lists.conflict)
    drawn = drawn.round(1)
    drawn[2, 0], drawn[4, 2], drawn[6, 0] = np.nan, 1.0, 0.55
    return drawn


@pytest.fixture(scope="module")
def rows(lists, probability):
    """Query, probability and outcome of every candidate that has them."""
    return rows_of(lists, probability)


def rows_of(lists, probability):
    """Query, probability and outcome, by a loop."""
    found = [
        (q, float(probability[q, i]), float(lists.conflict[q, i] >= 0.5))
        for q in range(len(probability))
        for i in range(probability.shape[1])
        if lists.labelled[q, i] and np.isfinite(lists.conflict[q, i]) and np.isfinite(probability[q, i])
    ]
    query, p, outcome = map(np.array, zip(*found, strict=True))
    return Judged(query.astype(int), p, outcome)


def one(by, probability, lists):
    """The figures of one system."""
    return probabilities.conflicts(by, {"model": probability}, lists)["systems"]["model"]


def repeated(by, judged):
    """The candidates of each resample, as often as their unit is drawn."""
    for counts in counts_of(by):
        often = counts[by.unit[judged.query]]
        yield Judged(*(np.repeat(part, often) for part in judged))


def gap(p, outcome):
    """ECE by a loop."""
    bins = np.minimum(np.digitize(p, np.arange(1, 16) / 15), 14)
    return sum(abs((p - outcome)[bins == i].sum()) for i in range(15)) / len(p)


class TestConflicts:
    def test_values(self, lists, probability, rows):
        result = probabilities.conflicts(ENGINE, {"model": probability}, lists)
        check_figures(result)
        found, (_, p, outcome) = result["systems"]["model"], rows
        assert found["auc"]["value"] == pytest.approx(roc_auc_score(outcome, p), abs=1e-12)
        assert found["brier"]["value"] == pytest.approx(brier_score_loss(outcome, p), abs=1e-12)
        assert found["ece"]["value"] == pytest.approx(gap(p, outcome), abs=1e-12)
        assert found["smooth_ece"]["value"] == calibration.smooth_ece(p, outcome)
        assert {figure["n"] for figure in found.values() if "n" in figure} == {len(p)}
        assert result["n"] == len(p) + 1  # one candidate has no probability
        everywhere = lists.labelled & np.isfinite(lists.conflict)
        assert result["positive_rate"]["value"] == pytest.approx(lists.conflict[everywhere].mean())
        assert result["positive_rate"]["n"] == everywhere.sum()

    @both
    def test_intervals_of_auc_and_brier(self, by, lists, probability, rows):
        found = one(by, probability, lists)
        auc, brier = [], []
        for _, p, outcome in repeated(by, rows):
            auc.append(roc_auc_score(outcome, p))
            brier.append(brier_score_loss(outcome, p))
        for name, drawn in (("auc", auc), ("brier", brier)):
            ends = np.percentile(drawn, [2.5, 97.5])
            assert found[name]["intervals"]["percentile"] == pytest.approx(ends, abs=1e-9), name
        assert found["auc"]["ci"] == found["auc"]["intervals"]["percentile"]
        assert found["auc"]["kind"] == f"percentile bootstrap over {by.unit_name}"
        assert found["brier"]["kind"] == f"studentised bootstrap over {by.unit_name}"
        assert found["auc"][by.unit_name] == by.draw.units

    @both
    def test_auc_has_bca_by_leaving_units_out(self, by, lists, probability, rows):
        found = one(by, probability, lists)["auc"]
        drawn = np.array([roc_auc_score(outcome, p) for _, p, outcome in repeated(by, rows)])
        unit = by.unit[rows.query]
        without = [
            roc_auc_score(rows.outcome[unit != u], rows.probability[unit != u]) for u in range(by.draw.units)
        ]
        apart = np.array(without)[None] - found["value"]
        speed = intervals.acceleration(apart, np.ones_like(apart, bool))
        point = np.array([roc_auc_score(rows.outcome, rows.probability)])
        expected = intervals.bca(intervals.ascending(drawn[None]), point, speed)[:, 0]
        assert found["intervals"]["bca"] == pytest.approx(expected, abs=1e-9)

    @both
    def test_ece_interval_is_centred(self, by, lists, probability, rows):
        found = one(by, probability, lists)["ece"]
        drawn = np.array([gap(p, outcome) for _, p, outcome in repeated(by, rows)])
        ends = np.percentile(drawn, [2.5, 97.5]) - (drawn.mean() - found["value"])
        assert drawn.mean() > found["value"]  # what resampling adds
        assert found["ci"] == pytest.approx(np.clip(ends, 0, 1), abs=1e-9)
        assert found["kind"] == f"centred bootstrap over {by.unit_name}"

    @both
    def test_debiased_ece_is_that_of_its_square(self, by, lists, probability, rows):
        found = one(by, probability, lists)["debiased_ece"]
        bins = calibration.equal_mass_bin_of(rows.probability)

        def square(p, outcome, row):
            total = 0.0
            for i in set(row):
                inside, n = row == i, (row == i).sum()
                share = outcome[inside].mean()
                if n > 1:
                    total += n * ((p[inside].mean() - share) ** 2 - share * (1 - share) / (n - 1))
            return total / len(p)

        value, drawn = square(rows.probability, rows.outcome, bins), []
        for counts in counts_of(by):
            often = counts[by.unit[rows.query]]
            drawn.append(square(*(np.repeat(part, often) for part in (*rows[1:], bins))))
        ends = np.percentile(drawn, [2.5, 97.5]) - (np.mean(drawn) - value)
        assert found["value"] == pytest.approx(np.sqrt(max(value, 0)), abs=1e-9)
        assert found["ci"] == pytest.approx(np.sqrt(np.maximum(ends, 0)), abs=1e-6)

    def test_systems_are_apart_and_the_first_is_the_model(self, lists, probability):
        other = np.where(np.isnan(probability), 0.5, 1 - probability)
        found = probabilities.conflicts(ENGINE, {"first": probability, "second": other}, lists)
        check_figures(found)
        assert list(found["systems"]) == ["first", "second"]
        assert found["systems"]["first"] == one(ENGINE, probability, lists)
        assert found["systems"]["second"] == one(ENGINE, other, lists)
        for name in ("auc", "ece"):
            assert found[name] == found["systems"]["first"][name]

    def test_one_class(self, lists, probability):
        for outcome in (0.0, 1.0):
            only = lists._replace(conflict=np.full_like(lists.conflict, outcome))
            result = probabilities.conflicts(ENGINE, {"model": probability}, only)
            check_figures(result)
            found = result["systems"]["model"]
            assert found["auc"]["value"] is found["auc"]["ci"] is None
            assert "one class" in found["auc"]["why"]
            assert found["brier"]["ci"]
            assert result["positive_rate"]["value"] == outcome

    def test_resamples_of_one_class_are_counted(self, lists, probability):
        rare = np.zeros_like(lists.conflict)
        rare[:2, 0] = 1
        figure = one(ENGINE, probability, lists._replace(conflict=rare))["auc"]
        assert figure["undefined"] == (counts_of(ENGINE)[:, :2].sum(axis=1) == 0).sum() > 0
        assert figure["ci"]

    def test_silver_labels_count_from_one_half_on(self, lists, probability):
        silver = np.where(lists.conflict == 1, 0.5, np.where(lists.conflict == 0, 0.49, np.nan))
        expected = probabilities.conflicts(ENGINE, {"model": probability}, lists)
        silver = lists._replace(conflict=silver.astype(np.float32))
        assert probabilities.conflicts(ENGINE, {"model": probability}, silver) == expected

    def test_nothing_known(self, lists):
        result = probabilities.conflicts(ENGINE, {"model": np.full((Q, N), np.nan)}, lists)
        check_figures(result)
        found = result["systems"]["model"]
        for figure in figures_of(found):
            assert (figure["value"], figure["n"]) == (None, 0)
        assert found["reliability"] == [] and found["consistency"] is None
        assert result["positive_rate"]["value"] is not None

    def test_one_query(self):
        lists = make_lists([[0.5, 0.2, 1.0, 0.0, 0.4]], conflict=[[1, 0, 1, 0, 0]])
        found = probabilities.conflicts(engine(1, 0, B), {"model": lists.compliance}, lists)
        check_figures(found)
        assert found["auc"]["value"] == 1.0
        for figure in figures_of(found):
            assert figure["ci"] is None
        assert "1 of at least 2 queries" in found["auc"]["why"]
        assert all(row["ci"] is None for row in found["systems"]["model"]["reliability"])

    def test_backends_agree(self, lists, probability):
        by = [engine(Q, 3, B, backend=backend) for backend in ("numpy", "jax")]
        numpy, jax = (probabilities.conflicts(b, {"model": probability}, lists) for b in by)
        assert numpy == jax

    def test_ece_of_a_calibrated_model_is_not_called_bad(self):
        rng, verdicts = np.random.default_rng(0), []
        for _ in range(30):
            p = rng.random((60, N)).astype(np.float32)
            lists = make_lists(p, conflict=rng.random((60, N)) < p)
            verdicts.append(judge(one(engine(60, 0, 200), p, lists)["ece"], 0.05, at_least=False))
        assert verdicts.count("not met") <= 5


class TestReliability:
    def test_rows(self, lists, probability, rows):
        found = one(ENGINE, probability, lists)
        query, p, outcome = rows
        assert len(found["reliability"]) == calibration.BINS
        assert sum(row["n"] for row in found["reliability"]) == len(p)
        told = [0, 0]
        for i, row in enumerate(found["reliability"]):
            inside = (p >= i / 15) & ((p < (i + 1) / 15) | (i == 14))
            assert (row["low"], row["high"], row["n"]) == (i / 15, (i + 1) / 15, inside.sum())
            if not inside.any():
                assert row["predicted"] is row["observed"] is row["ci"] is row["band"] is None
                continue
            assert row["predicted"] == pytest.approx(p[inside].mean())
            assert row["observed"] == pytest.approx(outcome[inside].mean())
            assert 0 <= row["band"][0] <= row["band"][1] <= 1
            several = len(set(query[inside])) > 1
            told[several] += 1
            assert row["ci"] is None or several
            if row["ci"]:
                there = np.bincount(query[inside], minlength=Q)
                seen = np.bincount(query[inside], outcome[inside], minlength=Q)
                n = counts_of(ENGINE) @ there
                drawn = (counts_of(ENGINE) @ seen)[n > 0] / n[n > 0]
                assert row["ci"] == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=1e-9)
        assert min(told) > 0
        gaps = [r["n"] * abs(r["predicted"] - r["observed"]) for r in found["reliability"] if r["n"]]
        assert found["ece"]["value"] == pytest.approx(sum(gaps) / len(p), abs=1e-9)

    def test_interval_of_a_bin_rests_on_its_queries(self, monkeypatch):
        """Not on its candidates: the first bin has 27 of 9 queries, the last 30 of 10."""
        monkeypatch.setattr(figures, "FEWEST", 10)
        query = np.r_[np.repeat(np.arange(9), 3), np.repeat(np.arange(10), 3)]
        p = np.r_[np.full(27, 0.02), np.full(30, 0.97)]
        rows = Judged(query, p, (np.random.default_rng(0).random(57) < 0.5).astype(float))
        found = probabilities.calibrated(ENGINE, rows)["reliability"]
        assert (found[0]["n"], found[0]["ci"]) == (27, None)
        assert found[14]["n"] == 30 and found[14]["ci"]

    def test_band_is_that_of_the_simulation(self, lists, probability, rows):
        found = one(ENGINE, probability, lists)["reliability"]
        band = calibration.simulate(rows.probability, ENGINE.seed).band
        for i, row in enumerate(found):
            assert row["band"] == (band[:, i].tolist() if row["n"] else None)

    def test_bin_sums_of_clusters_are_those_of_their_queries(self, rows):
        row = calibration.bin_of(rows.probability)
        bins = probabilities.resample_bins(BY_CLUSTER, rows, row)
        alone = probabilities.resample_bins(ENGINE, rows, row)
        assert bins.sums.shape == (BY_CLUSTER.draw.units, 15, 3)
        assert bins.drawn.shape == alone.drawn.shape == (B, 15, 3)
        np.testing.assert_allclose(bins.sums.sum(axis=0), alone.sums.sum(axis=0))
        expected = np.tensordot(counts_of(BY_CLUSTER), bins.sums, axes=1)
        np.testing.assert_allclose(bins.drawn, expected, atol=1e-8)


def judged(rng, queries=60, candidates=20, power=1.0, together=False):
    """Candidates whose outcomes happen with p^power, alone or all of a query together."""
    query = np.repeat(np.arange(queries), candidates)
    p = rng.random(len(query))
    uniform = rng.random(queries)[query] if together else rng.random(len(query))
    return Judged(query, p, (uniform < p**power).astype(float))


def consistency(rows, seed=0, resamples=300):
    """Whether the candidates' probabilities are calibrated."""
    return probabilities.calibrated(engine(60, seed, resamples), rows)["consistency"]


class TestConsistency:
    def test_calibrated_and_biased_models(self):
        rng = np.random.default_rng(0)
        fair, biased = consistency(judged(rng)), consistency(judged(rng, power=1.6))
        assert fair["verdict"] == "no sign of miscalibration"
        assert fair["p"] > 0.05 and fair["p_by_query"] > 0.05
        assert biased["verdict"] == "miscalibrated"
        assert biased["p"] < 0.01 and biased["p_by_query"] < 0.01

    def test_p_is_that_of_simulated_errors(self):
        rows = judged(np.random.default_rng(1), power=1.1)
        found, null = consistency(rows, seed=5), calibration.simulate(rows.probability, 5).ece
        seen = gap(rows.probability, rows.outcome)
        assert found["p"] == (1 + (null >= seen - 1e-12).sum()) / 1001
        assert found["expected"] == pytest.approx([np.median(null), np.quantile(null, 0.95)])
        assert found["resamples"] == 1000

    def test_p_by_query_flips_the_residuals_of_queries(self):
        rows = judged(np.random.default_rng(1), power=1.1)
        flips = 1 - 2 * bootstrap.flips(np, 5, np.arange(300), 60)
        bins, residual = calibration.bin_of(rows.probability), rows.probability - rows.outcome
        total = np.zeros((60, 15))
        np.add.at(total, (rows.query, bins), residual)
        null = np.abs(flips @ total).sum(axis=1) / len(residual)
        seen = np.abs(total.sum(axis=0)).sum() / len(residual)
        assert consistency(rows, seed=5)["p_by_query"] == (1 + (null >= seen - 1e-12).sum()) / 301

    def test_false_alarms(self):
        """Where outcomes of a query hang together only the test by query keeps its promise."""
        rng, alarms = np.random.default_rng(3), {}
        for together in (False, True):
            for _ in range(60):
                found = consistency(judged(rng, candidates=10, together=together), resamples=200)
                assert (found["verdict"] == "miscalibrated") == (found["p_by_query"] < 0.05)
                for kind in ("p", "p_by_query"):
                    alarms.setdefault((together, kind), []).append(found[kind] < 0.05)
        rate = {case: np.mean(told) for case, told in alarms.items()}
        assert rate[False, "p"] < 0.12 and rate[False, "p_by_query"] < 0.12
        assert rate[True, "p_by_query"] < 0.12 < 0.3 < rate[True, "p"]

    def test_intervals_of_the_errors_hold_the_truth(self):
        """Of p against p^1.3: about .075 in bins, .084 as a root mean square; nominal .95, at least .85."""
        rng, held = np.random.default_rng(4), {"ece": [], "debiased_ece": []}
        grid = (np.arange(150_000) + 0.5) / 150_000
        gaps = (grid - grid**1.3).reshape(15, -1).mean(axis=1)
        truth = {"ece": np.abs(gaps).mean(), "debiased_ece": np.sqrt((gaps**2).mean())}
        for k in range(100):
            rows, by = judged(rng, power=1.3), engine(60, k, 200)
            bins = probabilities.resample_bins(by, rows, calibration.bin_of(rows.probability))
            found = {"ece": probabilities.binned_ece(by, rows, bins),
                     "debiased_ece": probabilities.debiased_ece(by, rows)}  # fmt: skip
            for name, figure in found.items():
                held[name].append(figure["ci"][0] <= truth[name] <= figure["ci"][1])
        assert np.mean(held["debiased_ece"]) >= 0.88
        assert np.mean(held["ece"]) >= 0.8


class TestAuc:
    def test_intervals_by_query_hold_the_truth_where_those_by_candidate_do_not(self):
        """Candidates of a query hang together: by candidate .80 instead of .95."""

        def items(rng, queries):
            query = np.repeat(np.arange(queries), 20)
            ease = rng.normal(size=queries)[query]
            outcome = rng.random(len(query)) < 1 / (1 + np.exp(-1.5 * ease))
            return Judged(query, 1.2 * outcome + ease + rng.normal(size=len(query)), outcome * 1.0)

        everyone = items(np.random.default_rng(5), 20_000)
        truth, held = roc_auc_score(everyone.outcome, everyone.probability), {"query": [], "candidate": []}
        for k in range(80):
            rows = items(np.random.default_rng([6, k]), 25)
            alone = rows._replace(query=np.arange(500))
            for name, part in (("query", rows), ("candidate", alone)):
                by = engine(part.query[-1] + 1, k, 200)
                low, high = probabilities.pooled_auc(by, part)["ci"]
                held[name].append(low <= truth <= high)
        assert np.mean(held["query"]) > 0.88
        assert np.mean(held["candidate"]) < np.mean(held["query"]) - 0.05


def test_curves(lists, probability, rows):
    other = np.full((Q, N), 0.5)
    found = probabilities.curves({"model": probability, "other": other}, lists)
    outcome, p = found["model"]
    np.testing.assert_array_equal(outcome, rows.outcome > 0)
    np.testing.assert_array_equal(p, rows.probability)
    assert len(found["other"][0]) == len(found["other"][1]) == len(rows.query) + 1


@both
def test_coverage(by, lists):
    rng = np.random.default_rng(4)
    low, high = np.sort(rng.random((2, Q, N)), axis=0)
    found = probabilities.coverage(by, low, high, lists)
    check_figures(found)
    where = lists.labelled
    inside = where & (low <= lists.y) & (lists.y <= high)
    assert found["nominal"] == 0.95
    assert found["by_label"]["value"] == pytest.approx(inside.sum() / where.sum())
    assert found["by_label"]["n"] == where.sum()
    assert 0 < inside.sum() < where.sum()
    total, judged = where.sum(axis=1).astype(float), where.any(axis=1)
    share = lambda part: np.where(judged, part.sum(axis=1) / np.maximum(total, 1), 0)
    width = np.where(where, high - low, 0)
    assert found["coverage"]["value"] == pytest.approx(share(inside)[judged].mean())
    assert found["width"]["value"] == pytest.approx(share(width)[judged].mean())
    assert found["coverage"]["n"] == judged.sum()
    for name, part, weight in (
        ("coverage", share(inside), judged),
        ("width", share(width), judged),
        ("by_label", inside.sum(axis=1), total),
    ):
        drawn = (
            counts_of(by)
            @ by.by_unit(part.astype(float))
            / (counts_of(by) @ by.by_unit(weight.astype(float)))
        )
        ends = np.percentile(drawn, [2.5, 97.5])
        assert found[name]["intervals"]["percentile"] == pytest.approx(ends, abs=1e-9)
    assert probabilities.coverage(by, lists.y, lists.y, lists)["coverage"]["value"] == 1  # closed


class TestScoreCalibration:
    def test_expected_label_against_the_label(self, lists):
        score = np.random.default_rng(6).random((Q, N)).astype(np.float32)
        found, where = probabilities.score_calibration(ENGINE, score, lists), lists.labelled
        check_figures(found)
        p, y = score[where].astype(float), lists.y[where].astype(float)
        assert found["n"] == found["ece"]["n"] == where.sum()
        assert found["ece"]["value"] == pytest.approx(gap(p, y), abs=1e-12)
        assert sum(row["n"] for row in found["reliability"]) == where.sum()
        assert all(row["band"] is None for row in found["reliability"])  # labels are no coin tosses
        last = found["reliability"][-1]
        assert last["observed"] == pytest.approx(y[p >= 14 / 15].mean())

    def test_perfect_score(self, lists):
        found = probabilities.score_calibration(ENGINE, lists.y, lists)
        assert found["ece"]["value"] == pytest.approx(0, abs=1e-12)
        assert found["ece"]["ci"] is None

    def test_no_labels(self, lists):
        unlabelled = lists._replace(y=np.full_like(lists.y, np.nan))
        found = probabilities.score_calibration(ENGINE, lists.compliance, unlabelled)
        check_figures(found)
        assert (found["ece"]["value"], found["n"]) == (None, 0)
        held = probabilities.coverage(ENGINE, lists.y, lists.y, unlabelled)
        check_figures(held)
        assert held["coverage"]["value"] is held["width"]["value"] is None


def test_outcomes_more_even_than_chance_have_no_interval_of_nothing():
    rng = np.random.default_rng(0)
    positives = 10 + rng.integers(-1, 2, size=60)  # of 20 with p = ½: by chance they would vary far more
    outcome = (np.arange(20) < positives[:, None]).astype(float).ravel()
    judged = probabilities.Judged(np.repeat(np.arange(60), 20), np.full(1200, 0.5), outcome)
    figure = probabilities.debiased_ece(figures.engine(60, 0, 500), judged)
    assert (figure["value"], figure["ci"]) == (0.0, None)
    assert "less than chance" in figure["why"]
