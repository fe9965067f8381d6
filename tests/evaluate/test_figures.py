"""Tests of the figures: explicit resamples, clusters, edges, and reasons for what is missing."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cotrr.evaluate import figures, intervals
from cotrr.evaluate.figures import Engine, Ratio, engine, mean, missing
from tests.evaluate.listing import check_figures, counts_of

few = settings(max_examples=80, deadline=None, derandomize=True, database=None)
U, B = 24, 300
ENGINE = engine(U, seed=3, resamples=B)
CLUSTERS = np.arange(60) % U  # two or three queries each
BY_CLUSTER = engine(60, seed=3, resamples=B, clusters=CLUSTERS)


def values_of(queries=U, seed=0):
    """A skewed metric, undefined for some queries."""
    values = np.random.default_rng(seed).beta(4, 1, queries)
    values[::9] = np.nan
    return values


def shares_of(queries=U, seed=1):
    """Hits and trials of each query; some have none."""
    rng = np.random.default_rng(seed)
    trials = rng.integers(0, 6, queries)
    return rng.binomial(trials, 0.6).astype(float), trials.astype(float)


def resamples(engine):
    """The queries of each resample, unit by unit, as often as the unit is drawn."""
    members = [np.flatnonzero(engine.unit == u) for u in range(engine.draw.units)]
    for row in counts_of(engine):
        yield np.concatenate([np.tile(members[u], often) for u, often in enumerate(row)])


def share_error(hits, trials, unit):
    """Standard error of Σ hits / Σ trials by units that have a trial, by a loop."""
    value, total, square, count = hits.sum() / trials.sum(), trials.sum(), 0.0, 0
    for u in np.unique(unit):
        if trials[unit == u].sum() > 0:
            square += (hits[unit == u].sum() - value * trials[unit == u].sum()) ** 2
            count += 1
    return np.sqrt(square * count / (count - 1)) / total


def drawn_unit(engine, queries):
    """A number for each drawn copy of a unit, so that a unit drawn twice counts as two."""
    unit, seen, copy = engine.unit[queries], {}, []
    size = np.bincount(engine.unit)
    for u in unit:
        seen[u] = seen.get(u, 0) + 1
        copy.append((seen[u] - 1) // size[u])
    return unit * 1000 + np.array(copy)


@pytest.mark.parametrize("engine", [ENGINE, BY_CLUSTER], ids=["queries", "clusters"])
class TestExplicitResamples:
    def test_mean(self, engine):
        values = values_of(len(engine.unit))
        figure = engine.figures([mean(values)])[0]
        drawn = [np.nanmean(values[rows]) for rows in resamples(engine)]
        assert figure["value"] == pytest.approx(np.nanmean(values))
        assert figure["n"] == np.count_nonzero(~np.isnan(values))
        self.check_percentile_and_basic(figure, drawn)

    def test_share(self, engine):
        hits, trials = shares_of(len(engine.unit))
        figure = engine.figures([Ratio(hits, trials)])[0]
        drawn = [hits[rows].sum() / trials[rows].sum() for rows in resamples(engine)]
        assert figure["value"] == pytest.approx(hits.sum() / trials.sum())
        assert figure["n"] == trials.sum()
        assert figure[engine.unit_name] == len(set(engine.unit[trials > 0]))
        self.check_percentile_and_basic(figure, drawn)

    def check_percentile_and_basic(self, figure, drawn):
        ends = np.percentile(drawn, [2.5, 97.5])
        np.testing.assert_allclose(figure["intervals"]["percentile"], ends, atol=1e-9)
        np.testing.assert_allclose(figure["intervals"]["basic"], 2 * figure["value"] - ends[::-1], atol=1e-9)

    def test_bca(self, engine):
        hits, trials = shares_of(len(engine.unit))
        value = hits.sum() / trials.sum()
        drawn = np.array([hits[rows].sum() / trials[rows].sum() for rows in resamples(engine)])
        without = [engine.unit != u for u in np.unique(engine.unit[trials > 0])]
        jackknife = np.array([hits[keep].sum() / trials[keep].sum() for keep in without])
        apart = jackknife.mean() - jackknife
        speed = (apart**3).sum() / (6 * (apart**2).sum() ** 1.5)
        bias = stats.norm.ppf((np.mean(drawn < value) + np.mean(drawn <= value)) / 2)
        z = bias + stats.norm.ppf([0.025, 0.975])
        expected = np.quantile(drawn, stats.norm.cdf(bias + z / (1 - speed * z)))
        found = engine.figures([Ratio(hits, trials)])[0]["intervals"]["bca"]
        np.testing.assert_allclose(found, expected, atol=1e-8)

    def test_studentised(self, engine):
        hits, trials = shares_of(len(engine.unit))
        value, error = hits.sum() / trials.sum(), share_error(hits, trials, engine.unit)
        units = len(set(engine.unit[trials > 0]))
        pivots = []
        for rows in resamples(engine):
            of_copies = drawn_unit(engine, rows)
            own = share_error(hits[rows], trials[rows], of_copies)
            drawn = len(set(of_copies[trials[rows] > 0]))
            # The correction for few units is that of the sample, in every resample.
            own *= np.sqrt((drawn - 1) / drawn * units / (units - 1))
            pivots.append((hits[rows].sum() / trials[rows].sum() - value) / own)
        figure = engine.figures([Ratio(hits, trials)])[0]
        expected = value - error * np.percentile(pivots, [97.5, 2.5])
        assert figure["error"] == pytest.approx(error)
        np.testing.assert_allclose(figure["intervals"]["studentised"], expected, atol=1e-7)
        assert figure["ci"] == figure["intervals"]["studentised"]
        assert figure["kind"] == f"studentised bootstrap over {engine.unit_name}"


class TestErrors:
    def test_of_a_mean_is_the_textbook_one(self):
        values = values_of()
        there = values[~np.isnan(values)]
        found = ENGINE.estimate([mean(values)])
        assert found.error[0] == pytest.approx(stats.sem(there))
        assert found.units[0] == found.count[0] == len(there)
        assert found.drawn.shape == found.pivots.shape == (1, B)
        assert found.drawn.std() == pytest.approx(found.error[0], rel=0.15)

    def test_pivots_of_a_complete_mean_are_student_s(self):
        values = np.random.default_rng(5).beta(4, 1, U)
        expected = [
            (values[rows].mean() - values.mean()) / stats.sem(values[rows]) for rows in resamples(ENGINE)
        ]
        np.testing.assert_allclose(ENGINE.estimate([mean(values)]).pivots[0], expected, rtol=1e-6, atol=1e-8)

    def test_far_from_zero_no_digits_cancel(self):
        values = np.random.default_rng(5).beta(4, 1, U)
        near, far = (ENGINE.figures([mean(values + shift)])[0] for shift in (0, 1e5))
        for kind, ends in near["intervals"].items():
            np.testing.assert_allclose(np.array(far["intervals"][kind]) - 1e5, ends, atol=1e-9, err_msg=kind)


class TestSharing:
    def test_figures_do_not_depend_on_those_beside_them(self):
        ratios = [mean(values_of(seed=s)) for s in range(3)] + [Ratio(*shares_of()), mean(values_of(seed=0))]
        together = ENGINE.figures(ratios)
        for found, ratio in zip(together, ratios, strict=True):
            alone = ENGINE.figures([ratio])[0]
            assert found["value"] == pytest.approx(alone["value"], rel=1e-14)
            assert found["intervals"].keys() == alone["intervals"].keys()
            for kind, ends in alone["intervals"].items():
                np.testing.assert_allclose(found["intervals"][kind], ends, rtol=1e-12)
        assert together[0] == together[4]
        assert ENGINE.figures(ratios, ENGINE.estimate(ratios)) == together
        assert ENGINE.figures([]) == []

    def test_metrics_that_agree_but_once_are_told_apart(self):
        values = np.random.default_rng(0).beta(4, 1, U)
        other, fewer = values.copy(), values.copy()
        other[-1], fewer[-1] = 0.0, np.nan
        together = ENGINE.figures([mean(values), mean(other), mean(fewer)])
        for found, part in zip(together, (values, other, fewer), strict=True):
            expected = [np.nanmean(part[rows]) for rows in resamples(ENGINE)]
            ends = np.percentile(expected, [2.5, 97.5])
            np.testing.assert_allclose(found["intervals"]["percentile"], ends, atol=1e-9)

    def test_differences_are_paired(self):
        a, b = values_of(), values_of(seed=4)
        estimates = ENGINE.estimate([mean(a), mean(b), mean(a - b)])
        np.testing.assert_allclose(estimates.drawn[0] - estimates.drawn[1], estimates.drawn[2], atol=1e-9)

    @pytest.mark.parametrize("clusters", [None, np.arange(30) // 2])
    def test_numpy_and_jax_give_the_same_figures(self, clusters):
        values, hits = np.random.default_rng(0).beta(4, 1, (2, 30))
        ratios = [mean(values, (0, 1)), mean(np.where(hits > 0.9, np.nan, hits)), mean((hits > 0.2) * 1.0)]
        found = [engine(30, 1, 200, clusters, backend).figures(ratios) for backend in ("numpy", "jax")]
        assert json.dumps(found[0]) == json.dumps(found[1])

    def test_the_seed_decides(self):
        of = lambda seed: engine(U, seed, B).figures([mean(values_of())])
        assert of(3) == of(3)
        assert of(3) != of(4)


class TestClusters:
    def test_clusters_of_one_query_are_queries(self):
        names = np.array([f"c{q:02}" for q in range(U)])
        alone = engine(U, 3, B, clusters=names).figures([mean(values_of()), Ratio(*shares_of())])
        for found, expected in zip(alone, ENGINE.figures([mean(values_of()), Ratio(*shares_of())]),
                                   strict=True):  # fmt: skip
            assert found["kind"] == expected["kind"].replace("queries", "clusters")
            assert found.pop("clusters", None) == expected.pop("queries", None)
            assert found | {"kind": ""} == expected | {"kind": ""}

    def test_names_of_clusters_can_be_anything(self):
        named = engine(4, 0, B, clusters=np.array(["b", "a", "b", "c"], object))
        assert named.unit.tolist() == [1, 0, 1, 2]
        assert (named.draw.units, named.unit_name) == (3, "clusters")
        assert named.by_unit(np.array([1.0, 2, 4, 8])).tolist() == [2, 5, 8]
        assert named.by_unit(np.arange(8.0).reshape(4, 2)).tolist() == [[2, 3], [4, 6], [6, 7]]

    def test_queries_that_agree_inside_clusters_count_once(self):
        values = np.repeat(np.random.default_rng(0).beta(4, 1, U), 5)
        alone = engine(U, 3, B).figures([mean(values[::5])])[0]
        clustered = engine(5 * U, 3, B, clusters=np.repeat(np.arange(U), 5)).figures([mean(values)])[0]
        assert (clustered["n"], clustered["clusters"]) == (5 * U, U)
        assert clustered["error"] == pytest.approx(alone["error"])
        for kind, ends in alone["intervals"].items():
            np.testing.assert_allclose(clustered["intervals"][kind], ends, atol=1e-8)


def zero_one(ones, zeros):
    """A metric that is 1 or 0."""
    return np.r_[np.ones(ones), np.zeros(zeros)]


class TestShown:
    """Which interval stands in front."""

    def of(self, values, bounds=(0, 1), clusters=None):
        figure = engine(len(values), 0, B, clusters).figures([mean(values, bounds)])[0]
        check_figures(figure)
        return figure

    @pytest.mark.parametrize(
        ("ones", "zeros", "shown"),
        [(50, 0, "Wilson"), (0, 50, "Wilson"), (49, 1, "Wilson"), (41, 9, "Wilson"), (9, 41, "Wilson"),
         (40, 10, "studentised"), (10, 40, "studentised"), (25, 25, "studentised")],
    )  # fmt: skip
    def test_wilson_near_the_edge(self, ones, zeros, shown):
        figure = self.of(zero_one(ones, zeros))
        assert figure["kind"].startswith(shown)
        if shown == "Wilson":
            np.testing.assert_allclose(figure["ci"], intervals.wilson(ones, 50))
        else:
            assert figure["ci"] == figure["intervals"]["studentised"]
        assert ("percentile" in figure["intervals"]) == (0 < ones < 50)

    def test_wilson_counts_only_queries_that_have_a_value(self):
        figure = self.of(np.r_[zero_one(15, 1), np.full(10, np.nan)])
        assert figure["n"] == 16
        np.testing.assert_allclose(figure["ci"], intervals.wilson(15, 16))

    def test_wilson_of_clusters_that_agree_inside_counts_clusters(self):
        values, clusters = np.repeat(zero_one(38, 2), 4), np.repeat(np.arange(40), 4)
        figure = self.of(values, clusters=clusters)
        trials = 39  # p (1 − p) / error², as the error is that of 40 clusters with its n − 1
        np.testing.assert_allclose(figure["ci"], intervals.wilson(0.95 * trials, trials))
        alike = self.of(np.ones(160), clusters=clusters)
        np.testing.assert_allclose(alike["ci"], intervals.wilson(40, 40))

    def test_wilson_of_clusters_never_counts_more_than_the_queries(self):
        clusters = np.arange(80) % 40  # one of each pair fails: clusters are all alike
        values = np.ones(80)
        values[:9], values[40:49] = 0, 1
        apart = self.of(np.r_[values[:40], values[40:]], clusters=clusters)
        assert apart["ci"][1] - apart["ci"][0] >= np.ptp(intervals.wilson(71, 80)) - 1e-9

    def test_other_metrics_have_no_wilson_interval(self):
        for values in (np.r_[np.ones(49), 0.5], zero_one(49, 1) * 2, values_of(50)):
            figure = self.of(values, bounds=(0, 2))
            assert "wilson" not in figure["intervals"]

    @pytest.mark.parametrize("better", [0, 1, 4])
    def test_differences_of_zero_one_metrics_are_no_shares(self, better):
        """They could have been −1, so that none is below 0 does not mean that none could be."""
        figure = self.of(zero_one(better, 50 - better), bounds=(-1, 1))
        assert "Wilson" not in figure["kind"]
        assert "wilson" not in figure.get("intervals", {})

    def test_constants_claim_no_certainty(self):
        for value in (0.75, 0.1, 7.0):
            figure = self.of(np.full(30, value), bounds=(-np.inf, np.inf))
            assert figure["value"] == pytest.approx(value)
            assert (figure["ci"], figure["intervals"]) == (None, {})
            assert "all resamples agree" in figure["why"]

    def test_rounding_noise_is_no_variation(self):
        values = np.full(30, 0.1)
        values[::2] += 1e-16
        figure = self.of(values)
        assert (figure["ci"], figure["error"]) == (None, 0)
        assert np.isnan(engine(30, 0, B).estimate([mean(values)]).pivots).all()

    @pytest.mark.parametrize(
        ("values", "bounds"),
        [(np.r_[np.ones(49), 0.5], (0, 1)), (np.r_[np.zeros(48), 0.3, -0.2], (-1, 1)),
         (np.r_[np.zeros(48), 1, 1], (-1, 1))],
    )  # fmt: skip
    def test_nearly_constant_metric_is_not_said_to_be_unknown(self, values, bounds):
        """Resamples without the exceptions have no deviation of their own, and so no pivot to go by."""
        for resamples in (B, 201):  # of 201, quantiles are single values: they may be infinite
            figure = engine(50, 0, resamples).figures([mean(values, bounds)])[0]
            check_figures(figure)
            low, high = figure["ci"]
            assert low <= figure["value"] <= high
            assert high - low < 12 * figure["error"]

    def test_bounds_clip_all_intervals(self):
        values = np.r_[np.ones(18), 0.1, 0.2]
        wide, clipped = self.of(values, (-np.inf, np.inf)), self.of(values)
        assert wide["intervals"]["basic"][1] > 1
        for kind, ends in wide["intervals"].items():
            assert clipped["intervals"][kind] == np.clip(ends, 0, 1).tolist()


class TestMissing:
    def test_few_units(self):
        assert figures.FEWEST == 10
        nine, ten = (engine(n, 0, B).figures([mean(values_of(30)[1 : n + 1])])[0] for n in (9, 11))
        assert nine["n"] < 10
        assert (nine["ci"], nine["intervals"]) == (None, {})
        assert nine["why"] == f"{nine['n']} of at least 10 queries for an interval"
        assert ten["n"] == 10 and ten["ci"]

    def test_few_clusters_of_many_queries(self):
        figure = engine(90, 0, B, np.arange(90) // 10).figures([mean(values_of(90))])[0]
        assert figure["why"] == "9 of at least 10 clusters for an interval"
        assert (figure["n"], figure["clusters"]) == (80, 9)

    def test_no_value(self):
        figure = ENGINE.figures([mean(np.full(U, np.nan))])[0]
        assert figure == missing(0, ENGINE.kind, "no query defines it")
        assert missing(3, "k", "because") == {
            "value": None, "ci": None, "n": 3, "kind": "k", "why": "because"
        }  # fmt: skip
        assert json.dumps(missing(np.int64(3), "k", "because"))

    def test_a_missing_figure_does_not_disturb_others(self):
        ratios = [mean(values_of()), mean(np.full(U, np.nan)), Ratio(*shares_of())]
        found = ENGINE.figures(ratios)
        assert [found[0], found[2]] == ENGINE.figures([ratios[0], ratios[2]])

    def test_undefined_resamples_are_counted(self, monkeypatch):
        monkeypatch.setattr(figures, "FEWEST", 2)
        values = np.full(U, np.nan)
        values[:2] = 0.2, 0.9
        figure = ENGINE.figures([mean(values)])[0]
        without = int((counts_of(ENGINE)[:, :2].sum(axis=1) == 0).sum())
        assert figure["undefined"] == without > 0
        drawn = [np.nanmean(values[rows]) for rows in resamples(ENGINE) if set(rows) & {0, 1}]
        np.testing.assert_allclose(figure["intervals"]["percentile"], np.percentile(drawn, [2.5, 97.5]))
        assert "undefined" not in ENGINE.figures([mean(values_of())])[0]

    @few
    @given(st.lists(st.sampled_from([np.nan, 0.0, 0.25, 1 / 3, 0.9, 1.0]), min_size=14, max_size=14),
           st.booleans(), st.sampled_from([0, 1, 7]))  # fmt: skip
    def test_no_figure_has_a_gap_without_a_reason(self, values, clustered, same):
        values = np.array(values)
        values[:same] = values[0]
        clusters = np.arange(14) // (2 if same == 1 else 1) if clustered else None
        by = engine(14, 0, 60, clusters)
        trials = np.arange(14) % 4
        ratios = [mean(values, (0, 1)), mean(values - values[::-1], (-1, 1)),
                  Ratio(np.nan_to_num(values) * trials, trials.astype(float), (0, 1))]  # fmt: skip
        for ratio, figure in zip(ratios, by.figures(ratios), strict=True):
            check_figures(figure)
            assert figure["n"] == ratio.denominator.sum()
            if figure["ci"]:
                assert ratio.bounds[0] <= figure["ci"][0] < figure["ci"][1] <= ratio.bounds[1]
                assert figure["ci"] in figure["intervals"].values()
            if figure["value"] is not None:
                assert ratio.bounds[0] - 1e-12 <= figure["value"] <= ratio.bounds[1] + 1e-12


class TestStatistic:
    """Figures of any statistic whose resampled values are at hand."""

    drawn = np.random.default_rng(0).normal(0.6, 0.1, B)

    def of(self, drawn=None, value=0.55, units=20, **options):
        figure = ENGINE.statistic(value, self.drawn if drawn is None else drawn, 100, units, **options)
        check_figures(figure)
        return figure

    def test_kinds(self):
        figure = self.of(acceleration=0.03)
        ends = np.percentile(self.drawn, [2.5, 97.5])
        np.testing.assert_allclose(figure["intervals"]["percentile"], ends)
        np.testing.assert_allclose(figure["intervals"]["basic"], 1.1 - ends[::-1])
        np.testing.assert_allclose(figure["intervals"]["centred"], ends - self.drawn.mean() + 0.55)
        bca = intervals.bca(intervals.ascending(self.drawn[None]), np.array([0.55]), np.array([0.03]))
        np.testing.assert_allclose(figure["intervals"]["bca"], bca[:, 0])
        assert "bca" not in self.of()["intervals"]

    def test_shown(self):
        for kind in ("percentile", "basic", "centred"):
            figure = self.of(kind=kind)
            assert figure["ci"] == figure["intervals"][kind]
            assert figure["kind"] == f"{kind} bootstrap over queries"
        assert (figure["n"], figure["queries"]) == (100, 20)

    def test_bounds(self):
        figure = self.of(bounds=(0.5, 0.7))
        assert figure["ci"] == [0.5, 0.7]

    def test_undefined_resamples(self):
        for number in (0, 1, B // 2):
            drawn = np.where(np.arange(B) < number, np.nan, self.drawn)
            figure = self.of(drawn)
            assert figure.get("undefined", 0) == number
            np.testing.assert_allclose(figure["ci"], np.percentile(drawn[number:], [2.5, 97.5]))
        figure = self.of(np.where(np.arange(B) < B // 2 + 1, np.nan, self.drawn))
        assert (figure["ci"], figure["why"]) == (None, "too few resamples define it")
        assert figure["undefined"] == B // 2 + 1

    def test_reasons(self):
        assert self.of(value=np.nan)["value"] is None
        assert self.of(value=np.nan)["why"] == "no query defines it"
        assert "of at least 10 queries" in self.of(units=9)["why"]
        assert "all resamples agree" in self.of(np.full(B, 0.55))["why"]
        assert "undefined" not in self.of(np.full(B, np.nan), units=9)


class TestEngine:
    def test_resamples_are_shared(self):
        assert ENGINE.draw == (3, B, U, "auto")
        assert ENGINE.kind == "percentile bootstrap over queries"
        assert Engine(np.arange(5)).resamples == 10_000


@pytest.fixture(scope="module")
def held():
    """How often each kind of interval holds the mean of a skewed metric like nDCG."""
    inside, size, law = {}, 500, stats.beta(4, 0.8)
    for seed in range(4):
        rng = np.random.default_rng(seed)
        ratios = [mean(law.rvs(50, random_state=rng), (0, 1)) for _ in range(size)]
        for figure in engine(50, seed, 1000).figures(ratios):
            for kind, (low, high) in (figure["intervals"] | {"shown": figure["ci"]}).items():
                inside.setdefault(kind, []).append(low <= law.mean() <= high)
    assert {len(of_kind) for of_kind in inside.values()} == {4 * size}
    return {kind: np.mean(of_kind) for kind, of_kind in inside.items()}


class TestCoverage:
    """Nominal 95 % intervals of a mean of 50 queries; data sets are columns that share resamples."""

    def test_studentised_covers_what_it_says(self, held):
        assert 0.93 <= held["studentised"] <= 0.965
        assert held["shown"] == held["studentised"]

    def test_percentile_covers_less(self, held):
        assert 0.91 <= held["percentile"] < held["studentised"]
        assert held["basic"] < held["percentile"]

    def test_share_near_one(self):
        """p = .97: as shown (Wilson) about .94, where percentile intervals cover about .78."""
        rng = np.random.default_rng(0)
        found = engine(50, 0, 1000).figures([mean((rng.random(50) < 0.97) * 1.0, (0, 1)) for _ in range(800)])
        covered = np.mean([f["ci"][0] <= 0.97 <= f["ci"][1] for f in found])
        percentile = [f["intervals"].get("percentile", (1, 0)) for f in found]
        assert 0.91 < covered < 0.97
        assert np.mean([low <= 0.97 <= high for low, high in percentile]) < 0.85

    def test_clusters_that_hang_together(self):
        """Intraclass correlation .5: queries one by one would promise too much."""
        rng, cluster = np.random.default_rng(1), np.repeat(np.arange(40), 6)
        values = rng.normal(size=(500, 40))[:, cluster] + rng.normal(size=(500, 240))
        share = {}
        for name, clusters in (("clusters", cluster), ("queries", None)):
            found = engine(240, 0, 1000, clusters).figures([mean(column) for column in values])
            share[name] = np.mean([f["ci"][0] <= 0 <= f["ci"][1] for f in found])
        assert 0.92 < share["clusters"] < 0.975
        assert share["queries"] < 0.85
