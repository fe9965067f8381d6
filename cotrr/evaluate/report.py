"""Writes an evaluation report (a plain dict) as JSON, Markdown and one self-contained page."""

from __future__ import annotations

import base64
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import jinja2
from markupsafe import Markup

from cotrr import files

Dict = Mapping[str, Any]
BASELINE = "CLIP-only"
HEADLINE = "compliance@1"
NO_INTERVAL = "no interval"
PICTURE_LIMIT = 500_000  # bytes; larger pictures would make the page slow to open
UNITS = {"": (1, ".3f", ""), "points": (100, "+.1f", " pt"), "%": (100, ".0f", " %")}
MARKS = {"met": "✓", "not met": "✗", "not decided": "?", "not measured": "\N{EN DASH}"}
STEMS = {
    "compliance": "Compliance",
    "ndcg": "nDCG",
    "ndcg_y": "nDCG-y",
    "conflict_rate": "Conflict rate",
}
MAGIC = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif", b"RIFF": "webp"}


class Parts(NamedTuple):
    """The words of one figure; `interval` carries the unit, as it stands last."""

    value: str
    interval: str
    why: str


class Axis(NamedTuple):
    """A linear scale from `low` to `high` with its ticks."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def at(self, value: float) -> float:
        """Position of `value` in percent of the width; 5 % stay free on both sides."""
        return round(5 + 90 * (value - self.low) / (self.high - self.low), 3)


def number(value: float, unit: str = "", spec: str | None = None) -> str:
    """A number in its unit with a true minus sign; what rounds to zero has no sign."""
    scale, default, _ = UNITS.get(unit, (1, ".3f", ""))
    text = format(round(value * scale, 9), spec or default)
    return (text.lstrip("+-") if float(text) == 0 else text).replace("-", "\N{MINUS SIGN}")


def parts(figure: Dict | None, unit: str = "") -> Parts:
    """What a figure says: its value, its interval with the unit, and why either is missing."""
    if not figure:
        return Parts("not reported", "", "")
    why = str(figure.get("why") or "")
    if figure.get("undefined"):
        why = "; ".join(part for part in (why, f"undefined in {figure['undefined']} resamples") if part)
    if figure.get("value") is None:
        return Parts("undefined", "", why)
    suffix = UNITS.get(unit, (1, "", f" {unit}"))[2]
    if interval(figure) is None:
        return Parts(number(figure["value"], unit) + suffix, NO_INTERVAL, why)
    low, high = (number(bound, unit) for bound in figure["ci"])
    return Parts(number(figure["value"], unit), f"[{low}, {high}]{suffix}", why)


def figure_text(figure: Dict | None, unit: str = "") -> str:
    """One line for a figure: `0.781 [0.742, 0.820]` or `+12.3 [+8.1, +16.4] pt`."""
    value, bounds, why = parts(figure, unit)
    comma = "," if bounds == NO_INTERVAL else ""
    return f"{value}{comma} {bounds}".strip() + (f" ({why})" if why else "")


def interval(figure: Dict | None) -> tuple[float, float] | None:
    """The interval of a figure, or None where it has none."""
    bounds = (figure or {}).get("ci")
    return None if bounds is None or None in bounds else (bounds[0], bounds[1])


def metric_name(metric: str) -> str:
    """A metric as people write it: `ndcg@10` is nDCG@10."""
    stem, at, rank = metric.partition("@")
    return STEMS.get(stem, stem) + at + rank


def basis(figures: Iterable[Dict | None]) -> str:
    """What figures rest on: the range of their n and the kinds of interval."""
    present = [figure for figure in figures if figure and figure.get("value") is not None]
    counts = sorted({figure["n"] for figure in present if figure.get("n") is not None})
    kinds = sorted({str(f["kind"]) for f in present if interval(f) and f.get("kind")})
    n = f"n = {counts[0]}" + (f" to {counts[-1]}" if len(counts) > 1 else "") if counts else ""
    return ", ".join(part for part in (n, *kinds) if part)


def nice_axis(values: Iterable[float], count: int = 4) -> Axis:
    """An axis over `values`; its ticks are about `count` multiples of 1, 2, 2.5 or 5 · 10^k."""
    found = list(values) or [0.0, 1.0]
    low, high = min(found), max(found)
    if high - low < 1e-9:
        low, high = low - max(0.05, abs(low) / 10), high + max(0.05, abs(high) / 10)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * (1 - 1e-9))
    span = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    return Axis(low, high, tuple(round(k * step, 12) for k in span))


def extent(figures: Iterable[Dict | None]) -> list[float]:
    """All numbers that a plot of `figures` must hold."""
    present = [figure for figure in figures if figure and figure.get("value") is not None]
    return [x for figure in present for x in (figure["value"], *(interval(figure) or ()))]


def panel(
    title: str, figures: Mapping[str, Dict], unit: str, lines: Dict, axis: Axis | None = None
) -> dict[str, Any]:
    """Geometry of dots with intervals, one row a figure; a difference is solid if it excludes 0."""
    axis = axis or nice_axis([*extent(figures.values()), *lines.values()])
    rows = []
    for label, figure in figures.items():
        value, ci = (figure or {}).get("value"), interval(figure)
        x = None if value is None else axis.at(value)
        ends = [axis.at(bound) for bound in ci] if ci and x is not None else None
        solid = unit != "points" or (ci is not None and not ci[0] <= 0 <= ci[1])
        bare = parts(figure, unit)
        text = f"{bare.value} {bare.interval}".strip()
        rows.append({"label": label, "text": text, "x": x, "ends": ends, "solid": solid})
    ticks = [{"x": axis.at(t), "text": number(t, unit, "g")} for t in axis.ticks]
    marks = [{"label": label, "x": axis.at(x)} for label, x in lines.items()]
    return {"title": title, "rows": rows, "ticks": ticks, "lines": marks}


def thresholds(report: Dict) -> dict[str, float]:
    """Thresholds in points by metric: `metric` of a criterion, else the metric it begins with."""
    found: dict[str, float] = {}
    for row in report.get("acceptance") or []:
        words = row["criterion"].casefold().replace(" ", "_")
        named = [str(m) for m in report.get("metrics") or {} if words.startswith(m)]
        metric = row.get("metric") or max(named, key=len, default="")
        if metric and row.get("unit") == "points" and row.get("threshold") is not None:
            found.setdefault(metric, row["threshold"])
    return found


def panels(rows: Mapping[str, Dict], lines: Dict, shared: bool = False) -> list[dict[str, Any]]:
    """One panel a metric of {row: {metric: figure}}; `shared`: differences, all on one scale."""
    metrics = dict.fromkeys(metric for figures in rows.values() for metric in figures)
    lines = {metric: {"zero": 0.0} | lines.get(metric, {}) for metric in metrics} if shared else lines
    drawn = [x for metric in metrics for x in lines.get(metric, {}).values()]
    every = extent(figure for figures in rows.values() for figure in figures.values())
    axis = nice_axis([*every, *drawn]) if shared else None
    found = []
    for metric in metrics:
        present = {name: figures[metric] for name, figures in rows.items() if metric in figures}
        unit = "points" if shared else ""
        found.append(panel(metric, present, unit, lines.get(metric, {}), axis))
    return found


def baseline(report: Dict) -> str:
    """The name of the system that differences are taken to."""
    return report.get("baseline") or BASELINE


def model_system(report: Dict) -> str:
    """The name of the model's own system: the last one unless told."""
    return report.get("model_system") or next(reversed(report.get("deltas") or {"": {}}))


def p_text(p: float | None, resamples: int | None = None) -> str:
    """A p-value to two digits; the least that so many resamples can show is a bound.

    >>> p_text(0.0123), p_text(1 / 1001, 1000), p_text(None)
    ('0.012', '≤ 0.001', '–')
    """
    if p is None:
        return MARKS["not measured"]
    bound = "≤ " if resamples and p <= 1.0001 / (resamples + 1) else ""
    return bound + (f"{p:.2f}" if p >= 0.1 else f"{float(f'{p:.2g}'):.9f}".rstrip("0"))


def view(report: Dict) -> dict[str, Any]:
    """What the templates show beside the report itself: the sentence and the plots."""
    ladder = {row["system"]: row.get("metrics") or {} for row in report.get("ladder") or []}
    slices = {name: row.get("deltas") or {} for name, row in (report.get("slices") or {}).items()}
    base = {m: f["value"] for m, f in ladder.get(baseline(report), {}).items() if extent([f])}
    limits = {metric: {"threshold": limit} for metric, limit in thresholds(report).items()}
    return {
        "verdict": verdict(report),
        "models": {m["system"]: f"{m['path']} ({m['version']})" for m in report.get("models") or []},
        "deltas": panels(report.get("deltas") or {}, limits, shared=True),
        "ladder": panels(ladder, {metric: {"baseline": value} for metric, value in base.items()}),
        "slices": panels(slices, limits, shared=True),
    }


def verdict(report: Dict) -> str:
    """The report in one sentence: criteria by verdict, then the headline metric."""
    tally = Counter(row["verdict"] for row in report.get("acceptance") or [])
    others = [f"{tally[word]} {word}" for word in MARKS if word != "met" and tally[word]]
    share = f"{tally['met']} of {tally.total()} acceptance criteria met"
    criteria = ", ".join([share, *others]) if tally else "No acceptance criteria were set"
    figure = figure_text((report.get("metrics") or {}).get(HEADLINE))
    system, reference = model_system(report), baseline(report)
    over = (report.get("deltas") or {}).get(system) or {}
    against = f"no difference to {reference} is known"
    if extent([over.get(HEADLINE)]):
        against = f"there {system} is {figure_text(over[HEADLINE], 'points')} over {reference}"
        for rule, gains in list((report.get("gains") or {}).items())[1:][-1:]:
            against += f" and {figure_text(gains.get(HEADLINE), 'points')} over {rule}"
    return f"{criteria}; {metric_name(HEADLINE)} is {figure}; {against}."


def facts(mapping: Dict | None, prefix: str = "") -> list[tuple[str, str]]:
    """Flat (name, text) pairs of a nested mapping; figures as figures, null as `none`."""
    pairs: list[tuple[str, str]] = []
    for key, value in (mapping or {}).items():
        name = prefix + key.removesuffix("_ms").replace("_", " ")
        if isinstance(value, Mapping) and "value" in value:
            pairs.append((name, figure_text(value, "ms" if key.endswith("_ms") else "")))
        elif isinstance(value, Mapping):
            pairs += facts(value, f"{name} · ")
        elif isinstance(value, list):
            pairs.append((name, ", ".join(map(str, value)) or "none"))
        else:
            pairs.append((name, "none" if value is None else str(value)))
    return pairs


def picture(url: str | None) -> str | None:
    """A data URI of a local PNG, JPEG, GIF or WebP below 500 kB, else None."""
    try:
        where = urlsplit(url or "")
        path = Path(unquote(where.path) if where.scheme == "file" else url or "")
        if where.scheme not in ("", "file") or where.netloc or not path.is_file():
            return None
        data = path.read_bytes() if path.stat().st_size < PICTURE_LIMIT else b""
    except (OSError, ValueError):
        return None
    kind = next((kind for magic, kind in MAGIC.items() if data.startswith(magic)), None)
    return kind and f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def plain(value: object) -> str:
    """Text made safe inside a Markdown line or table cell; Markup passes unchanged."""
    if isinstance(value, Markup):
        return str(value)
    text = " ".join(str(value).split())
    for mark in "\\`*|":
        text = text.replace(mark, "\\" + mark)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("](", "]\\(")


def _render(report: Dict, name: str, **options: Any) -> str:
    """A template filled with a checked copy of the report: NaN is refused, tuples become lists."""
    report = json.loads(json.dumps(report, allow_nan=False))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
        undefined=jinja2.ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        **options,
    )
    environment.globals.update(marks=MARKS, baseline=baseline(report), extent=extent, panel=panel)
    for filter_ in (number, parts, figure_text, metric_name, basis, facts, picture, p_text):
        environment.filters[filter_.__name__] = filter_
    return environment.get_template(name).render(report=report, view=view(report))


def render_html(report: Dict) -> str:
    """One self-contained page; reads nothing but the local pictures that the examples name."""
    return _render(report, "report.html.j2", autoescape=True)


def render_markdown(report: Dict) -> str:
    """The report as GitHub-flavoured Markdown, with every plot as its table."""
    text = _render(report, "report.md.j2", finalize=plain, keep_trailing_newline=True)
    return re.sub(r"\n{3,}", "\n\n", text)  # absent parts leave their blank lines


def write_report(report: Dict, folder: str | os.PathLike[str]) -> Path:
    """Writes report.json, report.md and report.html, each atomically; returns the page's path."""
    texts = {
        "report.json": json.dumps(report, indent=1, allow_nan=False, ensure_ascii=False) + "\n",
        "report.md": render_markdown(report),
        "report.html": render_html(report),
    }
    target = Path(folder)
    for name, text in texts.items():
        with files.replacing(target / name) as draft:
            draft.write_bytes(text.encode("utf-8", "backslashreplace"))
    return target / "report.html"
