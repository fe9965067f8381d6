"""Tests of the experiment: assignment, logs and their defects, verdicts of planted effects, the launcher."""

import contextlib
import datetime
import functools
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cotrr import files
from cotrr.deploy import ab, interleaving
from cotrr.deploy import experiment as online
from cotrr.errors import InputError
from tests.deploy.test_card import spoil

few = settings(max_examples=150, deadline=None, derandomize=True, database=None)
ROOT = pathlib.Path(__file__).resolve().parents[2]
START = datetime.datetime(2026, 3, 1, tzinfo=datetime.UTC)
STEP4 = {
    "experiment_id": "cotrr-v2", "baseline_version": "v1", "candidate_version": "v2",
    "test_set_path": "data/cotrr/test.parquet",
    "promotion_criteria": [{"metric": "compliance_at_1", "at_least": 0.03},
                           {"metric": "conflict_rate", "relative_at_most": -0.2}],
    "rollback_criteria": [{"metric": "compliance_at_1", "at_most": -0.05}],
    "max_duration_hours": 1000,
}  # fmt: skip


def experiment(**fields) -> online.Experiment:
    return online._decode(
        json.dumps(STEP4 | {"planned_units": 4000} | fields).encode(), online.Experiment, "e.json"
    )


def records(exp, units=4000, seed=0, requests=1, **rates):
    """Exposures and 0/1 outcomes; `rates` are (baseline, candidate) by metric."""
    rng = np.random.default_rng(seed)
    exposures, outcomes = [], []
    for i in range(units):
        for r in range(requests):
            at = START + datetime.timedelta(minutes=i + r / 10)
            shown = online.exposure(exp, f"u{i}", f"r{i}-{r}", at)
            exposures.append(shown)
            for metric, pair in rates.items():
                value = float(rng.random() < pair[shown.variant == "candidate"])
                outcomes.append(online.Outcome(
                    experiment_id=exp.experiment_id, unit=f"u{i}", request_id=f"r{i}-{r}", at=at,
                    metric=metric, value=value,
                ))  # fmt: skip
    return online.Log(exposures), online.Log(outcomes)


def verdict(exp, exposures, outcomes, **more):
    result = ab.analyse(exp, exposures, outcomes, **more).result
    json.dumps(result, allow_nan=False)
    return result


GOOD = {"compliance_at_1": (0.6, 0.75), "conflict_rate": (0.4, 0.2)}


class TestExperiment:
    def test_step4_criteria(self):
        exp = experiment()
        assert [str(claim) for claim in exp.promotion] == [
            "compliance_at_1 at least +0.03", "conflict_rate at most -20 %"
        ]  # fmt: skip
        assert [str(claim) for claim in exp.rollback] == ["compliance_at_1 at most -0.05"]
        assert exp.salt == "cotrr-v2"

    def test_flat_criteria_where_they_have_one_meaning(self):
        exp = experiment(
            promotion_criteria={"compliance_at_1": 0.03}, rollback_criteria={"compliance_at_1": -0.05}
        )
        assert exp.promotion == [online.Claim("compliance_at_1", False, True, 0.03)]
        assert exp.rollback == [online.Claim("compliance_at_1", False, False, -0.05)]

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"promotion_criteria": {"conflict_rate": -0.2}}, "several ways"),
            ({"promotion_criteria": {"clicks": 0.1}}, "several ways"),
            ({"promotion_criteria": {"compliance_at_1": -0.03}}, "several ways"),
            ({"promotion_criteria": []}, "nothing could ever promote"),
            ({"promotion_criteria": [{"metric": "m"}]}, "expected one of"),
            ({"promotion_criteria": [{"metric": "m", "at_least": 0, "at_most": 1}]}, "expected one of"),
            ({"promotion_criteria": [{"metric": "m", "at_leest": 0}]}, "at_leest"),
            ({"promotion_criteria": [{"metric": "conflict_rate", "at_least": 0.1}]}, "wrong side"),
            ({"rollback_criteria": [{"metric": "compliance_at_1", "at_least": -0.05}]}, "wrong side"),
            ({"promotion_criteria": [{"metric": "compliance_at_1", "at_least": -0.5}]}, "promote a harm"),
            ({"promotion_criteria": [{"metric": "conflict_rate", "at_most": 0.1}]}, "promote a harm"),
            ({"promotion_criteria": [{"metric": "m", "at_least": -0.5}]}, "promote a harm"),
            ({"rollback_criteria": [{"metric": "compliance_at_1", "at_most": 0.05}]}, "roll back a gain"),
            ({"rollback_criteria": [{"metric": "m", "at_least": -0.1}]}, "roll back a gain"),
            ({"metrics": {"latency": {"margin": 5}}}, "higher_is_better"),
            ({"mode": "interleave"}, "interleaving"),
            ({"promotion_criteria": [{"metric": "interleaving", "at_least": 0}]}, "mode interleave"),
            ({"candidate_share": 1}, "candidate_share"),
            ({"experiment_id": "../x"}, "experiment_id"),
            ({"experiment_id": "x\n"}, "experiment_id"),
            ({"started_at": "2026-03-01T00:00:00"}, "started_at"),
            ({"surprise": 1}, "surprise"),
        ],
    )
    def test_refused(self, fields, message):
        with pytest.raises(InputError, match=message) as caught:
            experiment(**fields)
        assert "e.json" in str(caught.value)

    def test_no_nan(self):
        with pytest.raises(InputError, match="broken JSON"):
            online._decode(json.dumps(STEP4 | {"level": float("nan")}).encode(), online.Experiment, "e.json")


class TestAssignment:
    def test_the_same_in_every_process(self):
        exp = experiment()
        assert [online.assign(exp, f"u{i}")[0] for i in range(12)] == list("cbbccbcbcbbb")
        code = ("from tests.deploy.test_ab import *; e = experiment();"
                "print(''.join(v[0] for v in online.variants(e, [f'u{i}' for i in range(12)])))")  # fmt: skip
        found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                               env=os.environ | {"PYTHONHASHSEED": "7"}, check=True)  # fmt: skip
        assert found.stdout.strip() == "cbbccbcbcbbb"

    @pytest.mark.parametrize("share", [0.5, 0.1])
    def test_shares(self, share):
        got = online.variants(experiment(candidate_share=share), [str(i) for i in range(20_000)])
        assert got.count("candidate") / 20_000 == pytest.approx(share, abs=0.01)

    def test_salts_are_independent(self):
        one, two = (
            np.array(online.variants(experiment(salt=salt), map(str, range(10_000)))) for salt in "ab"
        )
        assert (one == two).mean() == pytest.approx(0.5, abs=0.02)

    def test_modes(self):
        assert online.assign(experiment(mode="shadow"), "u") == "baseline"


class TestLogs:
    def line(self, **fields):
        exposure = {"experiment_id": "cotrr-v2", "unit": "u1", "request_id": "r1",
                    "at": "2026-03-01T00:00:00Z", "variant": "baseline", "model_version": "v1"}  # fmt: skip
        return json.dumps(exposure | fields)

    def read(self, tmp_path, *lines, of=online.read_exposures):
        path = tmp_path / "lines.jsonl"
        path.write_text("".join(line + "\n" for line in lines))
        return of(path, experiment())

    def test_round_trip(self, tmp_path):
        exp = experiment()
        made = online.exposure(exp, "u1", "r1", START)
        assert self.read(tmp_path, online.to_line(made).decode().strip()).records == [made]

    def test_repeated_lines_count_once(self, tmp_path):
        log = self.read(tmp_path, self.line(), "", self.line(), self.line(request_id="r2"))
        assert len(log.records) == 2 and log.duplicates == 1

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"variant": "candidate"}, "line 2: contradicts line 1"),
            ({"request_id": "r2", "at": "2026-03-01T00:00:00"}, "line 2, field `at`"),
            ({"request_id": "r2", "at": 3}, "line 2, field `at`"),
            ({"request_id": "r2", "variant": "canary"}, "line 2, field `variant`"),
            ({"request_id": "r2", "unit": ""}, "line 2, field `unit`"),
            ({"request_id": "r2", "experiment_id": "other"}, "line 2, field `experiment_id`"),
            ({"request_id": "r2", "ranking": ["a"], "teams": []}, "line 2, field `teams`"),
            ({"request_id": "r2", "price": 3}, "unknown field `price`"),
        ],
    )
    def test_refused(self, tmp_path, fields, message):
        with pytest.raises(InputError, match=message) as caught:
            self.read(tmp_path, self.line(), self.line(**fields))
        assert "lines.jsonl" in str(caught.value)

    def test_outcomes_differ_by_metric_and_item(self, tmp_path):
        base = {"experiment_id": "cotrr-v2", "unit": "u1", "request_id": "r1", "at": "2026-03-01T00:00:00Z"}
        line = lambda **fields: json.dumps(base | {"metric": "m", "value": 1} | fields)
        log = self.read(tmp_path, line(), line(metric="n"), line(item="a"), line(), of=online.read_outcomes)
        assert len(log.records) == 3 and log.duplicates == 1
        for bad in (line(value=0), line(metric="x", value="1"), line(metric="x", denominator=-1),
                    line(metric="x", denominator=1e-300),
                    line(metric="x").replace("1}", "NaN}"), line(metric="x", value=1e300)):  # fmt: skip
            with pytest.raises(InputError, match="line 2"):
                self.read(tmp_path, line(), bad, of=online.read_outcomes)

    def test_a_pre_period_has_one_value_a_unit(self, tmp_path):
        path = tmp_path / "before.jsonl"
        path.write_text('{"unit": "a", "value": 1}\n{"unit": "b", "value": 2}\n')
        assert online.read_before(path) == {"a": 1, "b": 2}
        path.write_text('{"unit": "a", "value": 1}\n{"unit": "a", "value": 2}\n')
        with pytest.raises(InputError, match="contradicts line 1"):
            online.read_before(path)

    @few
    @given(st.data())
    def test_garbage_gets_an_input_error(self, tmp_path_factory, data):
        whole = self.line().encode()
        cut = data.draw(st.integers(0, len(whole)))
        noise = data.draw(
            st.binary(max_size=8) | st.sampled_from([b"[" * 10**5, b"\\ud800", b"NaN", b"1e999"])
        )
        path = tmp_path_factory.getbasetemp() / "garbage.jsonl"
        path.write_bytes(whole[:cut] + noise + whole[cut + data.draw(st.integers(0, 4)) :])
        for read in (online.read_exposures, online.read_outcomes, lambda path, _: online.read_before(path),
                     lambda path, _: online.read_experiment(path)):  # fmt: skip
            with contextlib.suppress(InputError):
                read(path, experiment())


class TestVerdict:
    def test_better_on_all_criteria_is_promoted(self):
        exp = experiment()
        result = verdict(exp, *records(exp, **GOOD))
        assert (result["verdict"], result["status"]) == ("promote", "decided")
        assert {key: result[key] for key in STEP4} == STEP4
        row = result["metrics"]["compliance_at_1"]
        low, high = row["difference"]["ci"]
        assert low < 0.15 < high and low > 0.03
        assert sum(row["units"].values()) == 4000
        assert row["candidate"] - row["baseline"] == pytest.approx(row["difference"]["value"], abs=0.01)
        assert result["metrics"]["conflict_rate"]["relative"]["ci"][1] <= -0.2

    def test_one_criterion_short_goes_on(self):
        exp = experiment()
        result = verdict(exp, *records(exp, **GOOD | {"conflict_rate": (0.4, 0.34)}))
        assert (result["verdict"], result["status"]) == ("continue", "running")
        assert result["reasons"][0].startswith("not shown: conflict_rate at most -20 %")

    def test_a_metric_that_was_not_measured_never_promotes(self):
        exp = experiment()
        result = verdict(exp, *records(exp, compliance_at_1=(0.6, 0.75)))
        assert result["verdict"] == "continue"
        assert result["reasons"] == ["not shown: conflict_rate at most -20 % (no interval from 0 units)"]

    def test_worse_is_rolled_back(self):
        exp = experiment()
        result = verdict(exp, *records(exp, **GOOD | {"compliance_at_1": (0.7, 0.5)}))
        assert (result["verdict"], result["status"]) == ("rollback", "decided")

    def test_equal_models_go_on(self):
        exp = experiment()
        result = verdict(exp, *records(exp, compliance_at_1=(0.6, 0.6), conflict_rate=(0.3, 0.3)))
        assert result["verdict"] == "continue"

    @pytest.mark.parametrize(("rates", "expected"), [((0.1, 0.1), "promote"), ((0.1, 0.14), "continue"),
                                                     ((0.1, 0.3), "rollback")])  # fmt: skip
    def test_guardrails(self, rates, expected):
        exp = experiment(metrics={"complaints": {"higher_is_better": False, "margin": 0.05}})
        result = verdict(exp, *records(exp, **GOOD, complaints=rates))
        assert result["verdict"] == expected

    def test_no_data(self):
        for mode in ("ab", "shadow"):
            result = verdict(experiment(mode=mode), online.Log([]), online.Log([]))
            assert result["verdict"] == "continue"
        assert result["sample_ratio"]["p"] is None

    def test_time_runs_out(self):
        exp = experiment(max_duration_hours=24)
        logs = records(exp, units=300, **GOOD)
        late = START + datetime.timedelta(hours=25)
        assert not verdict(exp, *logs)["expired"]
        result = verdict(exp, *logs, now=late)
        assert (result["verdict"], result["status"], result["expired"]) == ("continue", "expired", True)
        assert result["reasons"][-1] == "no decision within 24 h: the baseline stays"
        assert verdict(exp, *records(exp, **GOOD))["verdict"] == "promote"  # what is shown late is shown


class TestDoubt:
    def test_a_wrong_split_holds(self):
        exp = experiment()
        exposures, outcomes = records(exp, **GOOD)
        kept = [e for i, e in enumerate(exposures.records) if e.variant == "baseline" or i % 3]
        result = verdict(exp, online.Log(kept), outcomes)
        assert (result["verdict"], result["status"]) == ("continue", "held")
        assert "sample ratio of all units" in result["reasons"][0]
        assert result["outcomes"]["unexposed"] > 0

    def test_outcomes_missing_in_one_arm_hold(self):
        exp = experiment()
        exposures, outcomes = records(exp, **GOOD)
        arm = {e.unit: e.variant for e in exposures.records}
        kept = [o for i, o in enumerate(outcomes.records)
                if o.metric == "conflict_rate" or arm[o.unit] == "baseline" or i % 6]  # fmt: skip
        result = verdict(exp, exposures, online.Log(kept))
        assert result["status"] == "held"
        assert "units with compliance_at_1" in result["reasons"][0]

    def test_a_unit_in_the_wrong_arm_holds(self):
        exp = experiment()
        exposures, outcomes = records(exp, **GOOD)
        last = exposures.records[-1]
        other = {"baseline": "candidate", "candidate": "baseline"}[last.variant]
        exposures.records.append(online.Exposure(
            experiment_id=exp.experiment_id, unit=last.unit, request_id="again", at=last.at,
            variant=other, model_version=online.version_of(exp, other)))  # fmt: skip
        result = verdict(exp, exposures, outcomes)
        assert result["status"] == "held" and result["exposures"]["crossed_units"] == 1
        assert result["reasons"] == ["broken assignment: 1 crossed units"]

    def test_another_model_holds(self):
        exp = experiment()
        exposures, outcomes = records(exp, **GOOD)
        exposures.records[0].model_version = "v0"
        result = verdict(exp, exposures, outcomes)
        assert result["status"] == "held" and result["exposures"]["misnamed_requests"] == 1

    def test_harm_rolls_back_in_doubt_too(self):
        exp = experiment()
        exposures, outcomes = records(exp, **GOOD | {"compliance_at_1": (0.7, 0.4)})
        exposures.records[0].model_version = "v0"
        result = verdict(exp, exposures, outcomes)
        assert result["verdict"] == "rollback" and "broken assignment" in result["reasons"][-1]

    def test_outcomes_that_do_not_belong_are_counted(self):
        exp = experiment()
        exposures, outcomes = records(exp, units=300, **GOOD)
        clean = verdict(exp, exposures, outcomes)
        outcome = lambda **fields: online.Outcome(**{
            "experiment_id": exp.experiment_id, "unit": "u1", "request_id": "r1-0", "value": 1e6,
            "metric": "compliance_at_1", "at": START + datetime.timedelta(days=1)} | fields)  # fmt: skip
        outcomes.records.extend([
            outcome(request_id="nobody"), outcome(unit="u2"), outcome(at=START), outcome(metric="other")
        ])  # fmt: skip
        result = verdict(exp, exposures, outcomes)
        assert result["metrics"] == clean["metrics"]
        assert result["outcomes"] == {"records": 604, "duplicates": 0, "unexposed": 2, "before_exposure": 1,
                                      "other_metrics": 1, "not_shown": 0}  # fmt: skip


class TestUnits:
    def test_a_unit_counts_once(self):
        """Many requests of a unit that always says the same are one observation."""
        exp = experiment()
        one = verdict(exp, *records(exp, units=600, **GOOD))
        exposures, outcomes = records(exp, units=600, **GOOD)
        for record in [exposures, outcomes]:
            for i, old in enumerate(list(record.records)):
                fields = {name: getattr(old, name) for name in old.__struct_fields__}
                record.records.append(
                    type(old)(**fields | {"request_id": f"again {i // (1 + (record is outcomes))}"})
                )
        again = verdict(exp, exposures, outcomes)
        assert again["metrics"] == one["metrics"]
        assert again["exposures"]["requests"] == 2 * one["exposures"]["requests"]

    def test_ratio_is_that_of_sums(self):
        exp = experiment(metrics={"conflict_rate": {"kind": "ratio"}})
        exposures, outcomes = records(exp, units=2000, **GOOD)
        rng = np.random.default_rng(0)
        for outcome in outcomes.records:
            if outcome.metric == "conflict_rate":
                outcome.denominator = float(rng.integers(1, 5))
        arm = {e.unit: e.variant for e in exposures.records}
        row = verdict(exp, exposures, outcomes)["metrics"]["conflict_rate"]
        for name in ("baseline", "candidate"):
            mine = [o for o in outcomes.records if o.metric == "conflict_rate" and arm[o.unit] == name]
            assert row[name] == pytest.approx(sum(o.value for o in mine) / sum(o.denominator for o in mine))
        assert row["difference"]["value"] == pytest.approx(row["candidate"] - row["baseline"], abs=0.01)

    def test_a_pre_period_narrows_the_interval(self):
        exp = experiment()
        exposures, outcomes = records(exp, **GOOD)
        rng = np.random.default_rng(1)
        before = {f"u{i}": float(x) for i, x in enumerate(rng.normal(size=3500))}
        for outcome in outcomes.records:
            outcome.value += 2 * before.get(outcome.unit, 0.0)
        plain, cuped = (verdict(exp, exposures, outcomes, before=b) for b in (None, before))
        width = lambda result: float(np.diff(result["metrics"]["compliance_at_1"]["difference"]["ci"])[0])
        assert width(cuped) < 0.4 * width(plain)
        assert cuped["preperiod_units"] == 3500


class TestShadow:
    def test_line(self):
        exp = experiment(mode="shadow")
        line = json.loads(online.shadow_line(exp, "u", "r", START, list("abcd"), list("abxy"), k=3))
        assert line["variant"] == "baseline" and line["model_version"] == "v1"
        assert line["shadow"] == {"model_version": "v2", "top_k": 3, "top_k_overlap": 2 / 3, "same_top": True}
        with pytest.raises(InputError, match="mode shadow"):
            online.shadow_line(exp, "u", "r", START, [], ["a"])
        with pytest.raises(InputError, match="zone"):
            online.shadow_line(exp, "u", "r", START.replace(tzinfo=None), ["a"], ["a"])

    def test_agreement_is_told_and_nothing_decided(self, tmp_path):
        exp = experiment(mode="shadow")
        path = tmp_path / "shadow.jsonl"
        rankings = [list("abcd"), list("bacd")]
        path.write_bytes(b"".join(
            online.shadow_line(exp, f"u{i}", f"r{i}", START, list("abcd"), rankings[i % 2], k=1)
            for i in range(500)
        ))  # fmt: skip
        result = verdict(exp, online.read_exposures(path, exp), online.Log([]))
        assert result["shadow"] == {"requests": 500, "top_k_overlap": 0.5, "same_top": 0.5}
        assert result["verdict"] == "continue" and result["reasons"][0].startswith("shadow")
        assert result["status"] == "running"


class TestInterleaving:
    @pytest.mark.parametrize(("best", "expected"), [("x", "promote"), ("a", "rollback")])
    def test_clicks_decide(self, best, expected):
        exp = experiment(mode="interleave", promotion_criteria=[{"metric": "interleaving", "at_least": 0.05}],
                         rollback_criteria=[{"metric": "interleaving", "at_most": -0.05}])  # fmt: skip
        exposures, outcomes = [], []
        for i in range(1000):
            shown = interleaving.team_draft(list("abcd"), list("xyab"), exp.salt, f"r{i}", 4)
            exposures.append(online.exposure(exp, f"u{i}", f"r{i}", START, shown=shown))
            for item in (best, "not there") if i % 3 else ():
                outcomes.append(online.Outcome(
                    experiment_id=exp.experiment_id, unit=f"u{i}", request_id=f"r{i}", at=START,
                    metric="click", value=1.0, item=item))  # fmt: skip
        result = verdict(exp, online.Log(exposures), online.Log(outcomes))
        assert result["verdict"] == expected
        assert result["metrics"]["interleaving"]["difference"]["n"] == 1000
        assert result["outcomes"]["not_shown"] >= 666
        exposures[0].teams[0] = {"baseline": "candidate", "candidate": "baseline"}[exposures[0].teams[0]]
        doubted = verdict(exp, online.Log(exposures), online.Log(outcomes))
        assert doubted["exposures"]["crossed_units"] == 1


@functools.cache
def _written(**rates) -> str:
    """What `analyze` writes, as JSON."""
    exp = experiment(metrics={"complaints": {"higher_is_better": False, "margin": 0.05}})
    result = ab.analyse(exp, *records(exp, **dict(rates))).result
    inputs = {name: {"file": name, "sha256": "0a" * 32} for name in ("experiment", "exposures", "outcomes")}
    return json.dumps(result | {"inputs": inputs})


def written(complaints=(0.1, 0.1), **rates):
    return json.loads(_written(**GOOD | rates, complaints=complaints))


class TestReadVerdict:
    def test_what_analyze_writes_is_read(self):
        assert ab.read_verdict(written()) == ("v1", "v2", "promote", "")
        assert ab.read_verdict(written(compliance_at_1=(0.7, 0.5))).verdict == "rollback"
        assert ab.read_verdict(written(complaints=(0.1, 0.3))).verdict == "rollback"
        undecided = ab.read_verdict(written(compliance_at_1=(0.6, 0.6)))
        assert undecided.verdict == "continue" and "not shown: compliance_at_1" in undecided.held
        exp = experiment(mode="shadow")
        shadow = ab.analyse(exp, online.Log([]), online.Log([])).result | {"inputs": written()["inputs"]}
        assert ab.read_verdict(files.finite(shadow)).held.startswith("shadow")

    @pytest.mark.parametrize(
        ("path", "value", "field"),
        [
            ("checks promotion", [], "checks.promotion"), ("checks", ..., "checks"),
            ("checks promotion 0 met", False, r"checks.promotion\[0\].met"),
            ("checks promotion 1 ci", [-0.1, 0.1], r"checks.promotion\[1\].met"),
            ("checks promotion 0 ci", None, r"checks.promotion\[0\].met"),
            ("checks guardrails", [], "checks.guardrails"), ("status", "running", "status"),
            ("verdict", "continue", "status"), ("verdict", "rollback", "checks.rollback"),
            ("verdict", "ship it", "verdict"), ("mode", "shadow", "mode"),
            ("promotion_criteria", [{"metric": "compliance_at_1", "at_least": -1}], "promotion_criteria"),
            ("promotion_criteria", [{"metric": "compliance_at_1", "at_least": 0}], "checks.promotion"),
            ("sample_ratio p", 1e-5, "sample_ratio"), ("sample_ratio p", None, "sample_ratio"),
            ("metrics conflict_rate sample_ratio_p", 1e-5, "sample_ratio"),
            ("exposures crossed_units", 1, "sample_ratio"),
            ("inputs outcomes sha256", "abc", "inputs.outcomes.sha256"), ("inputs", ..., "inputs"),
            ("candidate_version", "", "candidate_version"), ("metrics", 3, "metrics"),
        ],
    )  # fmt: skip
    def test_a_verdict_that_does_not_follow_is_refused(self, path, value, field):
        content = written()
        *parents, last = [int(step) if step.isdigit() else step for step in path.split()]
        place = functools.reduce(lambda found, step: found[step], parents, content)
        if value is ...:
            del place[last]
        else:
            place[last] = value
        with pytest.raises(InputError, match=f"field `{field}"):
            ab.read_verdict(content)

    def test_three_words_are_no_verdict(self):
        with pytest.raises(InputError, match="missing required field"):
            ab.read_verdict({"baseline_version": "v1", "candidate_version": "v2", "verdict": "promote"})

    @few
    @given(st.data())
    def test_garbage_gets_an_input_error(self, data):
        content = spoil(data, written())
        with contextlib.suppress(InputError):
            found = ab.read_verdict(content)
            assert found[:2] == (content["baseline_version"], content["candidate_version"])
        for junk in ([], 3, None, {"metrics": []}):
            with pytest.raises(InputError):
                ab.read_verdict(junk)


class TestLauncher:
    def run(self, *arguments, fails=0):
        found = subprocess.run([sys.executable, "-m", "experiments.ab", *map(str, arguments)], cwd=ROOT,
                               capture_output=True, text=True, check=False)  # fmt: skip
        assert found.returncode == fails, found.stderr
        return found.stdout + found.stderr

    def test_assign_and_analyze(self, tmp_path):
        exp = experiment()
        (tmp_path / "e.json").write_text(json.dumps(STEP4 | {"planned_units": 4000}))
        (tmp_path / "units.txt").write_text("".join(f"u{i}\n" for i in range(50)) + '{"unit": "u3"}\n')
        self.run("assign", f"--experiment={tmp_path / 'e.json'}", f"--units={tmp_path / 'units.txt'}",
                 f"--output={tmp_path / 'assigned.jsonl'}")  # fmt: skip
        lines = [json.loads(line) for line in (tmp_path / "assigned.jsonl").read_text().splitlines()]
        assert [line["unit"] for line in lines] == [f"u{i}" for i in range(50)]
        assert all(line["variant"] == online.assign(exp, line["unit"]) for line in lines)

        exposures, outcomes = records(exp, units=3000, **GOOD)
        for name, log in {"exposures": exposures, "outcomes": outcomes}.items():
            (tmp_path / f"{name}.jsonl").write_bytes(b"".join(map(online.to_line, log.records)))
        arguments = [f"--{name}={tmp_path / name}.jsonl" for name in ("exposures", "outcomes")]
        output = tmp_path / "report"
        said = self.run("analyze", f"--experiment={tmp_path / 'e.json'}", *arguments, f"--output={output}")
        result = json.loads((output / "experiment.json").read_text())
        assert f"{result['verdict']} ({result['status']})" in said
        assert result["verdict"] == "promote" and "experiments.registry promote" in said
        assert ab.read_verdict(result).verdict == "promote"
        assert result["inputs"]["outcomes"]["sha256"] == files.sha256(tmp_path / "outcomes.jsonl")
        text = (output / "experiment.md").read_text()
        assert "# cotrr-v2: promote" in text and "| compliance_at_1 |" in text
        events = EventAccumulator(str(output / "tensorboard"))
        events.Reload()
        low = events.Scalars("compliance_at_1/low")
        assert low[-1].step == 3000
        assert low[-1].value == pytest.approx(result["metrics"]["compliance_at_1"]["difference"]["ci"][0])
        assert events.Scalars("sample_ratio/p")[-1].value == pytest.approx(result["sample_ratio"]["p"])

    def test_refused(self, tmp_path):
        (tmp_path / "e.json").write_text(json.dumps(STEP4))
        said = self.run("assign", f"--experiment={tmp_path / 'e.json'}", "--output=x", fails=2)
        assert "--units is required" in said

    def test_neither_definition_nor_training_is_overwritten(self, tmp_path):
        text = json.dumps(STEP4)
        (tmp_path / "experiment.json").write_text(text)
        (tmp_path / "log").write_text("")
        logs = [f"--{name}={tmp_path / 'log'}" for name in ("exposures", "outcomes")]
        call = ["analyze", f"--experiment={tmp_path / 'experiment.json'}", *logs]
        assert "would replace --experiment" in self.run(*call, f"--output={tmp_path}", fails=2)
        assert (tmp_path / "experiment.json").read_text() == text
        (tmp_path / "run" / "tensorboard").mkdir(parents=True)
        (tmp_path / "run" / "config.json").write_text("{}")
        assert "this is a training folder" in self.run(*call, f"--output={tmp_path / 'run'}", fails=2)
        assert (tmp_path / "run" / "tensorboard").exists()
