"""The figures of a report as pictures, and all of them in TensorBoard."""

import io
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from cotrr.evaluate import report as reports
from cotrr.summaries import SummaryWriter

Dict = Mapping[str, Any]


def forest(report: Dict) -> bytes:
    """PNG of the paired differences to the baseline: a row a system and metric, a bar an interval."""

    def draw(axes: Any) -> None:
        rows = [(system, metric, figure) for system, figures in report["deltas"].items()
                for metric, figure in figures.items() if figure["value"] is not None]  # fmt: skip
        for place, (_, _, figure) in enumerate(rows):
            low, high = figure["ci"] or (figure["value"], figure["value"])
            axes.plot([100 * low, 100 * high], [place, place], color="tab:blue")
            axes.plot(100 * figure["value"], place, "o", color="tab:blue")
        axes.axvline(0, color="gray", linewidth=1)
        axes.set_yticks(range(len(rows)), [f"{s} {reports.metric_name(m)}" for s, m, _ in rows], fontsize=7)
        axes.invert_yaxis()
        axes.set_xlabel(f"points over {report.get('baseline', reports.BASELINE)}, 95 % intervals")

    count = sum(len(figures) for figures in report["deltas"].values())
    return _png(draw, 7, 1 + 0.18 * max(count, 4))


def reliability(bins: list[Dict], title: str) -> bytes:
    """PNG of observed shares against predicted probabilities, with intervals and consistency bands."""

    def draw(axes: Any) -> None:
        filled = [row for row in bins if row["n"]]
        axes.plot([0, 1], [0, 1], ":", color="gray")
        for row in filled:
            if row.get("band"):
                axes.fill_between(
                    [row["low"], row["high"]], *row["band"], color="gray", alpha=0.25, linewidth=0
                )
            if row["ci"]:
                axes.plot([row["predicted"]] * 2, row["ci"], color="tab:blue", linewidth=1)
        size = np.array([row["n"] for row in filled])  # by their area: a bin of one says little
        axes.scatter([row["predicted"] for row in filled], [row["observed"] for row in filled],
                     s=6 + 74 * size / size.max(initial=1), color="tab:blue", zorder=3)  # fmt: skip
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="predicted", ylabel="observed", title=title, aspect="equal")

    return _png(draw, 4.5, 4.5)


def risk_coverage(found: Dict) -> bytes:
    """PNG of the risk of the queries that the model is surest of, by their share."""

    def draw(axes: Any) -> None:
        points = [p for p in found["curve"] if p["risk"]["value"] is not None]
        share = [p["coverage"] for p in points]
        bounds = np.array([p["risk"]["ci"] or [p["risk"]["value"]] * 2 for p in points]).reshape(-1, 2)
        axes.fill_between(share, *bounds.T, color="tab:blue", alpha=0.2, linewidth=0)
        axes.plot(share, [p["risk"]["value"] for p in points], color="tab:blue")
        axes.set(xlabel="share of queries, the surest first", ylabel=found["risk"], ylim=(0, None))

    return _png(draw, 5, 3.5)


def _png(draw: Callable[[Any], None], width: float, height: float) -> bytes:
    # Here, since drawing is the only use of it, and importing takes longer than the statistics.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure.add_subplot())
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return out.getvalue()


def log_report(
    writer: SummaryWriter, report: Dict, curves: Mapping[str, tuple[np.ndarray, np.ndarray]], step: int = 0
) -> None:
    """Scalars, precision–recall curves, pictures and the acceptance table of a report.

    `curves` holds outcomes [N] bool and probabilities [N] by system.
    """
    writer.scalars(scalars(report), step)
    for system, (labels, probabilities) in curves.items():
        if len(labels):
            writer.pr_curve(f"conflict/{system}", labels, probabilities, step)
    writer.image("differences", forest(report), step)
    for system, row in report["conflict"]["systems"].items():
        if row["reliability"]:
            writer.image(f"reliability/{system}", reliability(row["reliability"], system), step)
    if report.get("score_calibration"):
        bins = report["score_calibration"]["reliability"]
        writer.image("reliability/score", reliability(bins, "score as expected label"), step)
    if report.get("risk_coverage"):
        writer.image("risk_coverage", risk_coverage(report["risk_coverage"]), step)
    writer.text("acceptance", acceptance_table(report), step)


def scalars(report: Dict) -> dict[str, float]:
    """The defined values by tag: `evaluation/<system>/<metric>`, `conflict/<system>/<measure>`."""
    found = {f"evaluation/{row['system']}/{metric}": figure
             for row in report["ladder"] for metric, figure in row["metrics"].items()}  # fmt: skip
    for system, row in report["conflict"]["systems"].items():
        found |= {f"conflict/{system}/{name}": figure for name, figure in row.items()
                  if isinstance(figure, Mapping) and "value" in figure}  # fmt: skip
    return {tag: figure["value"] for tag, figure in found.items() if figure["value"] is not None}


def acceptance_table(report: Dict) -> str:
    """The acceptance criteria as a Markdown table."""
    rows = [f"| {row['verdict']} | {row['criterion']} | {reports.figure_text(row['figure'], row['unit'])} |"
            for row in report["acceptance"]]  # fmt: skip
    return "\n".join(["| verdict | criterion | measured |", "|---|---|---:|", *rows])
