"""The acceptance table: a criterion is met, not met, or not decided by this many queries."""

from typing import Any

Figure = dict[str, Any]


def judge(figure: Figure | None, threshold: float, at_least: bool = True) -> str:
    """The verdict of an interval against a threshold: decided only where all of it lies on one side."""
    if not figure or figure["value"] is None:
        return "not measured"
    if not figure["ci"]:
        return "not decided"
    low, high = figure["ci"] if at_least else (-figure["ci"][1], -figure["ci"][0])
    limit = threshold if at_least else -threshold
    return "met" if low >= limit else "not met" if high < limit else "not decided"


def table(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The acceptance criteria of CoTRR-lite on the other figures of a report."""
    deltas = report["gains"].get("CLIP-only", {})
    conflict = report["conflict"]["systems"].get("reranker", {})
    rows = [
        ("Compliance@1 over CLIP-only", "compliance@1", deltas.get("compliance@1"), 0.03, True, "points"),
        ("nDCG@10 over CLIP-only", "ndcg@10", deltas.get("ndcg@10"), 0.06, True, "points"),
        ("Conflict AUC", "conflict AUC", conflict.get("auc"), 0.90, True, ""),
        ("Conflict ECE", "ECE", conflict.get("ece"), 0.05, False, ""),
        ("Latency p95 of one query", "latency", report["latency"].get("p95_ms"), 1.0, False, "ms"),
    ]  # fmt: skip
    return [
        {
            "criterion": f"{name} {'≥' if at_least else '≤'} {_text(threshold, unit)}",
            "metric": metric,
            "figure": figure,
            "unit": unit,
            "threshold": threshold,
            "verdict": judge(figure, threshold, at_least),
            "why": (figure or {}).get("why", "" if figure else "not measured here"),
        }
        for name, metric, figure, threshold, at_least, unit in rows
    ]


def _text(threshold: float, unit: str) -> str:
    return f"+{threshold * 100:g} points" if unit == "points" else f"{threshold:g} {unit}".strip()
