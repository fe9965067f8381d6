"""Tests of the report: its words, its plots' geometry, and the page in a real browser."""

from __future__ import annotations

import copy
import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from cotrr.evaluate import report as rendering

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
METRICS = (
    "compliance@1",
    "compliance@3",
    "compliance@5",
    "ndcg@10",
    "ndcg_y@10",
    "conflict_rate@1",
)
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000d4944415478da"
    "63648878f70f000415023f9a1e0d3e0000000049454e44ae426082"
)


def fig(value: float | None, half: float = 0.04, **more: Any) -> dict[str, Any]:
    """A figure with an interval of `half` to both sides."""
    ci = None if value is None else [round(value - half, 4), round(value + half, 4)]
    return {"value": value, "ci": ci, "n": 90, "kind": "studentised"} | more


def row(base: float, half: float = 0.03) -> dict[str, Any]:
    """All metrics, spread around `base`, with the conflict rate falling as the rest rises."""
    values = {m: round(base + 0.013 * i, 4) for i, m in enumerate(METRICS)}
    values["conflict_rate@1"] = round(1.02 - base - 0.1, 4)
    return {metric: fig(value, half) for metric, value in values.items()}


def deltas(gain: float, half: float = 0.03) -> dict[str, Any]:
    """Differences of all metrics around `gain`."""
    values = {m: round(gain - 0.011 * i, 4) for i, m in enumerate(METRICS)}
    return {m: fig(-v if m.startswith("conflict") else v, half) for m, v in values.items()}


def bins(shift: float) -> list[dict[str, Any]]:
    """Fifteen reliability bins, the last empty."""
    found = []
    for i in range(15):
        low, high, n = round(i / 15, 4), round((i + 1) / 15, 4), 400 // (i + 1) if i < 14 else 0
        p = round((low + high) / 2, 4)
        seen = round(min(1.0, max(0.0, p + shift * (p - 0.4))), 4)
        wide = min(0.2, 1.2 / (n + 1) ** 0.5)
        ci = [round(max(0.0, seen - wide), 4), round(min(1.0, seen + wide), 4)]
        filled = {"predicted": p, "observed": seen, "ci": ci}
        empty = {"predicted": None, "observed": None, "ci": None}
        found.append({"low": low, "high": high, "n": n} | (filled if n else empty))
    return found


def criterion(text: str, unit: str, verdict: str, figure: dict[str, Any], **more: Any) -> dict:
    """One line of the acceptance table."""
    return {"criterion": text, "unit": unit, "verdict": verdict, "figure": figure} | more


def candidate(name: str, compliance: float, score: float, color: str, **more: Any) -> dict:
    """One side of an example."""
    found = {"id": name, "url": f"https://pictures.example/{name}.jpg?size=large"}
    found |= {"compliance": compliance, "score": score, "attributes": {"color": color}}
    return found | {"score_low": score - 0.11, "score_high": score + 0.09, "conflicts": []} | more


def comparison(metric: str, **more: Any) -> dict[str, Any]:
    """One tested difference."""
    row = {"system": "+Reranker", "reference": "CLIP-only", "metric": metric, "difference": fig(0.1234)}
    tests = {"simultaneous": [0.02, 0.2], "p": 1 / 10001, "p_max_t": 0.0123, "p_holm": 0.34}
    return row | tests | {"mcnemar": None, "detectable": 0.0456} | more


def statistics() -> dict[str, Any]:
    """The parts of a report about tests, calibration, risk and reasons."""
    consistency = {"p": 1 / 1001, "p_by_query": 0.021, "expected": [0.019, 0.027], "resamples": 1000,
                   "verdict": "miscalibrated"}  # fmt: skip
    curve = [{"coverage": k / 4, "queries": 22 * k, "risk": fig(0.1 + 0.03 * k)} for k in range(1, 5)]
    reason = {"reason": "colour mismatch that Step 4 did not see", "kind": "missed", "type": "colour",
              "attribute": None, "count": 9, "regret": 4.2, "share": 0.7, "queries": ["q_0017"],
              "fix": "Step 4 finds 41 % [35, 47] of them"}  # fmt: skip
    return {
        "baseline": "CLIP-only",
        "model_system": "+Reranker",
        "models": [{"system": "+Reranker", "path": "checkpoints/v1", "version": "v1-0123"},
                   {"system": "+Reranker v2", "path": "checkpoints/v2", "version": "v2-4567"}],
        "power": {"text": "90 queries show a true difference of 4.6 points"},
        "comparisons": [{"family": "over CLIP-only", "hypotheses": 2, "resamples": 10000, "rows": [
            comparison("compliance@1"),
            comparison("conflict_rate@1", mcnemar={"better": 12, "worse": 3, "p": 0.035}, simultaneous=None),
        ]}],
        "consistency": consistency,
        "bootstrap": {"queries": 90, "units": 90, "unit": "queries", "seed": 0, "resamples": 10000},
        "score_calibration": {"reliability": bins(0.1), "ece": fig(0.023, 0.01), "n": 2700},
        "risk_coverage": {"risk": "1 − Compliance@1", "confidence": "calibrated score", "curve": curve,
                          "area": fig(0.17), "text": "On half of the queries the risk is 0.160."},
        "failures": {"queries": 90, "with_regret": 12, "total_regret": 6.0, "mean_regret": 0.067,
                     "reasons": [reason], "detection": [
                         {"type": "colour", "reviewed": 100, "found": 41, "recall": [0.41, 0.35, 0.47],
                          "accused": 0, "right": 0, "precision": None}]},
        "seconds": {"scoring": 0.5, "statistics": 0.4},
        "degenerate": ["2 queries without any gain (left out of nDCG)"],
    }  # fmt: skip


def conflicts(consistency: dict[str, Any]) -> dict[str, Any]:
    """The probabilities of two systems."""
    calibrated = {"debiased_ece": fig(0.025, 0.02), "consistency": consistency,
                  "smooth_ece": fig(0.029, ci=None, why="a point estimate")}  # fmt: skip
    return {
        "systems": {
            "reranker": {
                "auc": fig(0.912, 0.02),
                "ece": fig(0.031, 0.012),
                "brier": fig(0.088, 0.01),
                "reliability": [b | {"band": [b["low"], b["high"]]} for b in bins(0.05)],
                **calibrated,
            },
            "step 4": {
                "auc": fig(0.843, 0.03),
                "ece": fig(0.112, 0.021),
                "brier": fig(None, why="no probability in 12 rows"),
                "reliability": bins(0.4),
            },
        },
        "n": 2700,
        "positive_rate": fig(0.183, 0.02),
    }


def failures() -> list[dict[str, Any]]:
    """Two failing queries: one with all that can be told, one hostile."""
    why = {"margin": 0.57,
           "groups": [{"name": "so", "value": 1.1}, {"name": "clip", "value": -0.53}],
           "attributes": [{"name": "color_delta_e", "value": 1.1, "shown": 12.3, "best": 40.0},
                          {"name": "image_embedding", "value": -0.53}]}  # fmt: skip
    first = candidate("img_00412", 0.3, 0.71, "blue", conflicts=["color_mismatch"])
    first["attributes"]["glass"] = "coupe"
    ask = {"color": "pink", "glass": "coupe", "garnish": "flower"}
    hostile = "<script>alert('x')</script> | a *bold* [link](https://evil.example) & more"
    return [
        {
            "query": "pink drink in a coupe with a flower",
            "query_id": "q_0017",
            "domain": "floral",
            "regret": 0.6,
            "constraints": ask,
            "shown": first | {"std": 0.021, "palette": ["#112233", "#aabbcc"]},
            "best": candidate("img_00977", 0.9, 0.64, "pink"),
            "reason": "colour mismatch that Step 4 did not see",
            "within_uncertainty": True,
            "violates": {"by_reviewer": ["colour_mismatch"], "by_step4": [], "asked": {"color": "pink"}},
            "why": why,
        },
        {
            "query": hostile,
            "query_id": "q_0002",
            "domain": "blue_tropical",
            "regret": 0.41,
            "constraints": {},
            "shown": candidate("a|b", 0.5, 0.55, "blue", score_low=None, score_high=None),
            "best": candidate("img_2", 0.91, 0.5, "blue"),
        },
    ]


def acceptance() -> list[dict[str, Any]]:
    """A criterion of each status."""
    return [
        criterion(
            "Compliance@1 over CLIP-only ≥ +3 points",
            "points",
            "met",
            fig(0.1234, threshold=0.03),
            threshold=0.03,
            why="the whole interval lies above the threshold",
        ),
        criterion("nDCG@10 ≥ 0.85", "", "not decided", fig(0.853), threshold=0.85),
        criterion("Conflict ECE ≤ 0.05", "", "not met", fig(0.091, 0.02), threshold=0.05),
        criterion(
            "p95 latency ≤ 1 ms",
            "ms",
            "not measured",
            fig(None, why="the engine was not run"),
            threshold=1.0,
        ),
    ]


def origin() -> dict[str, Any]:
    """What a report says of its data, its model and its speed."""
    return {
        "data": {
            "dataset": "runs/latest",
            "split": "test",
            "queries": 90,
            "candidates": 2700,
            "candidates_per_query": {"min": 12, "median": 30, "max": 48},
            "label": "silver",
            "certificate": "9f2c" * 16,
            "fractions": [0.7, 0.15, 0.15],
            "salt": "cotrr",
        },
        "model": {
            "name": "cotrr_lite",
            "version": "v1",
            "members": 8,
            "config": {"widths": [64, 32], "learning_rate": 0.003, "dropout": None},
            "trained_on": "ab12" * 16,
            "epochs": 40,
        },
        "latency": {"p50_ms": fig(0.412, 0.02), "p95_ms": fig(0.655, 0.05), "engine": "JAX CPU"},
    }


def sample() -> dict[str, Any]:
    """A full report of invented numbers."""
    more = statistics()
    return {
        "title": "cotrr_lite_v1",
        "created_at": "2026-02-03T10:11:12Z",
        "commands": ["python -m experiments.evaluate --input=runs/latest --out=reports/v1"],
        "conventions": {
            "compliance@1": "mean reviewed compliance of the best-ranked candidate, over queries",
            "ndcg@10": "linear gain = review.compliance, discount 1/log2(rank + 1)",
        },
        "notices": ["Labels are silver: they are functions of features that the model reads."],
        "acceptance": acceptance(),
        "metrics": row(0.85),
        "ladder": [
            {
                "system": "CLIP-only",
                "describes": "cosine of text and image",
                "metrics": row(0.7266),
            },
            {"system": "+SO", "describes": "plus subject-object features", "metrics": row(0.76)},
            {"system": "+SO+Conflict", "describes": "plus conflicts", "metrics": row(0.79)},
            {"system": "+Reranker", "describes": "the trained model", "metrics": row(0.85)},
        ],
        "deltas": {
            "+SO": deltas(0.0334),
            "+SO+Conflict": deltas(0.0634),
            "+Reranker": deltas(0.1234, 0.041),
        },
        "conflict": conflicts(more.pop("consistency")),
        "slices": {
            "blue_tropical": {"metrics": row(0.83), "deltas": {"compliance@1": fig(0.071, 0.06)}},
            "black_charcoal": {"metrics": row(0.79), "deltas": {"compliance@1": fig(0.02, 0.05)}},
            "a_domain_with_a_very_long_name": {
                "metrics": row(0.8),
                "deltas": {"compliance@1": fig(0.2, ci=None, why="3 queries only")},
            },
        },
        "ties": {"+Reranker": 0, "CLIP-only": 3},
        "skipped": {"no_gain": 2, "single_candidate": 0},
        "uncertainty": {
            "coverage": fig(0.931, 0.02),
            "width": fig(0.214),
            "by_label": fig(0.928),
            "nominal": 0.95,
        },
        "examples": failures(),
        **origin(),
        **more,
    }


def bare() -> dict[str, Any]:
    """What is left where next to nothing could be measured."""
    why = "no clip_score and no embeddings"
    nothing = fig(None, why=why)
    return {
        "title": "nothing known",
        "acceptance": [criterion("Compliance@1 up", "points", "not measured", nothing)],
        "metrics": {"compliance@1": fig(0.5, ci=None, why="one query")},
        "ladder": [{"system": "CLIP-only", "metrics": {"compliance@1": nothing}}],
        "deltas": {"+Reranker": {"compliance@1": nothing}},
        "conflict": None,
        "notices": None,
    }


def figures(node: Any) -> list[dict[str, Any]]:
    """All figures inside a report."""
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else []
    own = [node] if isinstance(node, dict) and {"value", "n"} <= node.keys() else []
    return own + [found for child in children for found in figures(child)]


def words(page: str) -> str:
    """The text of a page: without markup, spaces joined."""
    body = re.sub(r"<(style|script)>.*?</\1>", "", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", body)).split())


def cells(line: str) -> int:
    """How many cells a Markdown table's line has; an escaped pipe is no border."""
    return len(re.findall(r"(?<!\\)\|", line)) - 1


def test_figures_are_written_with_their_interval_unit_and_sign() -> None:
    assert rendering.figure_text(fig(0.781, 0.039)) == "0.781 [0.742, 0.820]"
    points = fig(0.123, ci=[0.081, 0.164])
    assert rendering.figure_text(points, "points") == "+12.3 [+8.1, +16.4] pt"
    assert rendering.figure_text(fig(-0.021, 0.03), "points") == "~2.1 [~5.1, +0.9] pt".replace(
        "~", "\N{MINUS SIGN}"
    )
    assert rendering.figure_text(fig(0.4, 0.1), "ms") == "0.400 [0.300, 0.500] ms"
    assert rendering.number(-0.0001, "points") == "0.0"


def test_what_is_undefined_says_so_and_why() -> None:
    assert rendering.figure_text(fig(None, why="one class")) == "undefined (one class)"
    alone = fig(0.5, ci=None, why="one query")
    assert rendering.figure_text(alone) == "0.500, no interval (one query)"
    assert rendering.figure_text(alone, "points").startswith("+50.0 pt, no interval")
    assert rendering.figure_text(None) == "not reported"


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0.0, 1.0], (0.0, 0.25, 0.5, 0.75, 1.0)),
        ([-0.02, 0.17], (0.0, 0.05, 0.1, 0.15)),
        ([0.95, 1.0], (0.96, 0.98, 1.0)),
        ([], (0.0, 0.25, 0.5, 0.75, 1.0)),
    ],
)
def test_ticks_are_round_and_hold_the_values(values: list[float], ticks: tuple[float, ...]) -> None:
    assert rendering.nice_axis(values).ticks == ticks


@pytest.mark.parametrize("values", [[0.3], [0.0], [7.0, 7.0], [1e-7, 3e-7], [-4e5, 9e5]])
def test_every_value_lies_on_its_axis(values: list[float]) -> None:
    axis = rendering.nice_axis(values)
    assert all(5 <= axis.at(value) <= 95 for value in values)
    assert 2 <= len(axis.ticks) <= 7


def test_dots_are_solid_only_where_the_interval_leaves_out_zero() -> None:
    rows = {"a": fig(0.05, 0.02), "b": fig(0.01, 0.02), "c": fig(None, why="none")}
    drawn = rendering.panel("m", rows, "points", {"zero": 0.0})
    assert [dot["solid"] for dot in drawn["rows"]] == [True, False, False]
    assert drawn["rows"][0]["ends"][0] > drawn["lines"][0]["x"]
    assert drawn["rows"][2]["x"] is None


def test_a_criterion_finds_its_metric_by_key_or_by_its_first_words() -> None:
    assert rendering.thresholds(sample()) == {"compliance@1": 0.03}
    named = {"criterion": "better", "metric": "ndcg@10", "unit": "points", "threshold": 0.01}
    assert rendering.thresholds({"acceptance": [named]}) == {"ndcg@10": 0.01}


def test_all_figures_appear_in_both_forms() -> None:
    report = sample()
    page, text = words(rendering.render_html(report)), rendering.render_markdown(report)
    units = {id(row["figure"]): row["unit"] for row in report["acceptance"]}
    units |= {id(f): "points" for f in figures(report["deltas"])}
    units |= {id(f): "points" for s in report["slices"].values() for f in figures(s["deltas"])}
    units |= {id(f): "points" for f in figures(report["comparisons"])}
    units |= {id(f): "ms" for f in figures(report["latency"])}
    assert len(figures(report)) > 70
    for figure in figures(report):
        unit = units.get(id(figure), "")
        value, bounds, why = rendering.parts(figure, unit)
        if why == "a point estimate":  # by its nature: the number alone is shown
            assert value in page and value in text
            continue
        assert f"{value} {bounds}".strip() in page and why in page
        assert rendering.figure_text(figure, unit) in text


def test_every_fact_criterion_notice_and_command_appears() -> None:
    report = sample()
    page = words(rendering.render_html(report))
    said = [*report["notices"], *report["commands"], *report["conventions"].values()]
    said += [row["criterion"] for row in report["acceptance"]]
    said += [row["describes"] for row in report["ladder"]]
    said += ["9f2c" * 16, "config · learning rate0.003", "no gain2", "CLIP-only3"]
    assert [text for text in said if text not in page] == []
    assert "1 of 4 acceptance criteria met, 1 not met, 1 not decided, 1 not measured" in page
    assert "there +Reranker is +12.3 [+8.2, +16.4] pt over CLIP-only" in page


def test_tests_calibration_risk_and_reasons_appear() -> None:
    page, text = words(rendering.render_html(sample())), rendering.render_markdown(sample())
    said = ["≤ 0.0001", "0.012", "0.34", "0.035", "4.6 pt", "[+2.0, +20.0] pt", "miscalibrated", "0.019",
            "colour mismatch that Step 4 did not see", "Step 4 finds 41 % [35, 47] of them", "41 [35, 47] %",
            "2 queries without any gain", "90 queries show a true difference of 4.6 points",
            "On half of the queries the risk is 0.160", "25 %", "checkpoints/v2 (v2-4567)"]  # fmt: skip
    assert [part for part in said if part not in page] == []
    assert [part for part in said if part not in text] == []
    for part in (
        "12 up, 3 down",
        "each score lies in the other’s interval",
        "12.30 / 40.00",
        "−0.53",
        "by Step 4: nothing",
    ):
        assert part in page, part
    assert "so +1.10, clip −0.53" in text


def test_every_kind_of_interval_appears() -> None:
    report = sample()
    report["metrics"]["ndcg@10"] |= {"intervals": {"percentile": [0.811, 0.889], "bca": [0.812, 0.888]}}
    page = words(rendering.render_html(report))
    assert "[0.811, 0.889]" in page and "[0.812, 0.888]" in page and "bca" in page


def test_colours_stand_in_for_a_picture_that_is_not_there() -> None:
    page = rendering.render_html(sample())
    assert '<span style="background: #112233"></span><span style="background: #aabbcc"></span>' in page
    assert page.count("no picture in this page") == 3


def test_the_baseline_is_the_reports_own() -> None:
    report = sample() | {"baseline": "+SO"}
    page = words(rendering.render_html(report))
    assert "Differences to +SO" in page and "pt over +SO and" in page.replace("over +SO.", "over +SO and")


def test_foreign_text_is_escaped() -> None:
    page, text = rendering.render_html(sample()), rendering.render_markdown(sample())
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page
    assert page.count("<script") == 1
    assert "<script" not in text and "](https" not in text


def test_nothing_is_loaded_from_elsewhere() -> None:
    page = rendering.render_html(sample())
    assert not re.search(r"(src|href|action|data|poster)\s*=\s*[\"']?\s*(https?:)?//", page)
    assert not re.search(r"@import|url\(", page)
    assert "default-src 'none'" in page


def test_a_small_local_picture_is_embedded_and_nothing_else_is(tmp_path: Path) -> None:
    for name, data in [("a b.png", PNG), ("big.png", PNG + bytes(500_000)), ("notes.txt", b"key")]:
        (tmp_path / name).write_bytes(data)
    report = sample()
    report["examples"][0]["shown"]["url"] = (tmp_path / "a b.png").as_uri()
    assert rendering.render_html(report).count('src="data:image/png;base64,iVBOR') == 1
    assert rendering.picture(str(tmp_path / "a b.png"))
    elsewhere = ["big.png", "notes.txt", "absent.png", "\0", "http://[", "a" * 5000]
    assert [rendering.picture(str(tmp_path / name)) for name in elsewhere[:3]] == [None] * 3
    assert [rendering.picture(url) for url in [*elsewhere[3:], None, "", "//h/x"]] == [None] * 6


def test_a_report_without_baseline_or_values_still_renders() -> None:
    page, text = words(rendering.render_html(bare())), rendering.render_markdown(bare())
    assert "No difference to CLIP-only can be shown. no clip_score and no embeddings" in page
    assert "no difference to CLIP-only is known" in page
    assert "0.500 no interval one query" in page
    for form in (page, text):
        assert "undefined" in form and "Conflict probability was not measured" in form
        assert "None" not in form and "nan" not in form.casefold().split()
    assert "0 of 1" in page


@pytest.mark.parametrize("key", sorted(sample()))
def test_any_part_may_be_missing_or_null(key: str) -> None:
    full = sample()
    without = {name: value for name, value in full.items() if name != key}
    for report in (without, without | {key: None}, without | {"unknown": 1}):
        assert rendering.render_html(report) and rendering.render_markdown(report)


@pytest.mark.parametrize("report", [sample(), bare()], ids=["full", "bare"])
def test_markdown_tables_are_well_formed(report: dict[str, Any]) -> None:
    text = rendering.render_markdown(report)
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert blocks
    for lines in blocks:
        assert re.fullmatch(r"\|(-{3}:?\|)+", lines[1]), lines[:2]
        assert {cells(line) for line in lines} == {cells(lines[1])}, lines
    assert not re.search(r"^\|.*\n(?!\||\n|$)", text, flags=re.MULTILINE)
    assert "\n\n\n" not in text


def test_write_report_keeps_the_dict_and_leaves_no_drafts(tmp_path: Path) -> None:
    report = sample() | {"title": "snowman ☃ and half a pair \ud83d"}
    page = rendering.write_report(report, tmp_path / "new")
    assert sorted(path.name for path in page.parent.iterdir()) == [
        "report.html",
        "report.json",
        "report.md",
    ]
    assert json.loads((page.parent / "report.json").read_text("utf-8")) == report
    assert "☃" in page.read_text("utf-8")


def test_nan_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    report = sample()
    report["metrics"]["compliance@1"]["value"] = float("nan")
    with pytest.raises(ValueError, match="JSON"):
        rendering.write_report(report, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_rendering_is_pure() -> None:
    report = sample()
    before = copy.deepcopy(report)
    assert rendering.render_html(report) == rendering.render_html(report)
    assert report == before


def browse(page: Path, tmp_path: Path, width: int, *more: str) -> subprocess.CompletedProcess[str]:
    """The page in headless Chromium; skips where none is installed."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no Chromium is installed")
    quiet = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
    quiet += " --disable-background-networking --disable-component-update"
    options = [*quiet.split(), f"--user-data-dir={tmp_path / 'profile'}", *more]
    options += [f"--window-size={width},900", "--enable-logging=stderr", "--v=0"]
    command = [browser, *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)


PROBE = """
<body><script>
const phone = document.createElement("iframe");
phone.addEventListener("load", (event) => {
  const page = event.target.contentDocument, root = page.documentElement;
  const view = event.target.contentWindow, found = { inner: view.innerWidth };
  found.scroll = root.scrollWidth;
  const table = page.querySelector("#acceptance table");
  const column = () => [...table.tBodies[0].rows].map((row) => row.cells[2].dataset.sort);
  table.querySelectorAll("button")[2].click();
  found.up = column();
  table.querySelectorAll("button")[2].click();
  found.down = column();
  found.sorted = table.querySelectorAll("th")[2].getAttribute("aria-sort");
  found.boxes = [...page.querySelectorAll("svg text")].filter((text) => {
    const box = text.getBoundingClientRect(); return box.left < -1 || box.right > 401; }).length;
  document.body.append(Object.assign(document.createElement("pre"), {
    id: "found", textContent: JSON.stringify(found) }));
});
Object.assign(phone, { src: "report.html", width: 400, height: 800, frameBorder: 0 });
document.body.append(phone);
</script>
"""


def test_a_browser_shows_the_page_on_a_phone_without_errors(tmp_path: Path) -> None:
    page = rendering.write_report(sample(), tmp_path)
    probe = tmp_path / "probe.html"
    probe.write_text(PROBE)
    done = browse(probe, tmp_path, 800, "--allow-file-access-from-files", "--dump-dom")
    assert "CONSOLE" not in done.stderr, done.stderr
    found = json.loads(html.unescape(done.stdout.split('<pre id="found">')[1].split("</pre>")[0]))
    assert found["scroll"] <= found["inner"] == 400
    assert found["boxes"] == 0
    assert found["up"] == ["0.091", "0.1234", "0.853", ""]
    assert found["down"] == ["0.853", "0.1234", "0.091", ""]
    assert found["sorted"] == "descending"
    done = browse(page, tmp_path, 1400, "--dump-dom")
    assert "CONSOLE" not in done.stderr, done.stderr
