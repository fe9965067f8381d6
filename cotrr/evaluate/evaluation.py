"""The whole evaluation of a model on labelled lists: all parts of the report that are figures."""

from typing import Any

import numpy as np

from cotrr.data.lists import Lists
from cotrr.evaluate import probabilities, ranking
from cotrr.evaluate.figures import Engine
from cotrr.evaluate.ranking import System
from cotrr.ranker.artifact import Scored

CONVENTIONS = {
    "compliance@1": "Mean compliance of the best-ranked candidate, mean over queries.",
    "compliance@3": "Mean compliance of the 3 best-ranked candidates (all, where there are fewer).",
    "compliance@5": "Mean compliance of the 5 best-ranked candidates (all, where there are fewer).",
    "ndcg@10": (
        "Linear gain = compliance, discount 1/log2(rank + 1), ideal over all labelled candidates of the "
        "query; a query without any gain is left out and counted."
    ),
    "ndcg_y@10": "As nDCG@10, with gain = y, the label that the model learns.",
    "conflict_rate@1": (
        "Share of best-ranked candidates that the reviewer calls conflicts; lower is better."
    ),
    "conflict_rate@3": "Share of the 3 best-ranked that the reviewer calls conflicts; lower is better.",
    "conflict_rate@5": "Share of the 5 best-ranked that the reviewer calls conflicts; lower is better.",
    "ties": "Every ranking metric is its expected value over the orders of tied scores.",
    "conflict AUC": "Pooled over candidates, ties count one half, undefined with one class.",
    "ECE": (
        "15 equal-width bins [a, b), the last one closed. The plug-in estimate is biased upwards where "
        "candidates are few; its interval is the percentile one, moved by what resampling adds on average."
    ),
    "debiased ECE": (
        "L2 calibration error in 15 bins of equal mass, less what chance alone adds (Kumar et al. 2019); "
        "its interval is that of its square, moved alike."
    ),
    "smooth ECE": "Without bins (Błasiok & Nakkiran 2023).",
    "is it calibrated?": (
        "p-values of the ECE: against outcomes drawn independently from the probabilities, and against "
        "residuals whose signs are flipped query by query, which allows for outcomes of one query that "
        "hang together. The second decides."
    ),
    "interval": (
        "95 %, from resampling queries (or clusters of them); all systems and metrics share the "
        "resamples, so differences are paired. Means and shares: studentised; Wilson where a 0/1 metric "
        "has fewer than 10 successes or failures; AUC: percentile. None on fewer than 10 queries or "
        "clusters."
    ),
    "p": (
        "Sign flips of paired differences, by query or cluster; max-T adjusts for all systems and metrics "
        "of a family (Westfall & Young 1993). McNemar's exact test where a metric is 0 or 1."
    ),
    "simultaneous interval": "All intervals of a family together hold with 95 % (max-T of the pivots).",
    "detectable": (
        "The smallest true difference that a two-sided 5 % test on as many queries shows four times out "
        "of five."
    ),
    "candidates": "Only candidates with a label of the kind evaluated are ranked and counted.",
}


def measure(
    engine: Engine,
    systems: list[System],
    conflict: dict[str, np.ndarray],
    scored: Scored,
    lists: Lists,
    baseline: str,
    model: str,
) -> dict[str, Any]:
    """Every figure of `model`, whose scores are `scored`, against `baseline` and the other systems.

    `conflict` holds conflict probabilities [Q, n] by system, the model's first.
    """
    ranked = ranking.ranking(engine, systems, lists, baseline, model)
    report = {
        "conventions": CONVENTIONS,
        **ranked,
        "power": ranking.power(ranked, len(lists.query_id)),
        "conflict": probabilities.conflicts(engine, conflict, lists),
        "uncertainty": probabilities.coverage(engine, scored.low, scored.high, lists),
        "score_calibration": probabilities.score_calibration(engine, scored.score, lists),
        "risk_coverage": ranking.risk_coverage(engine, scored.logit, scored.score, lists),
        **ranking.counts(systems, lists),
    }
    return report | {"degenerate": degenerate(report)}


def degenerate(report: dict[str, Any]) -> list[str]:
    """What a reader could otherwise overlook: figures without value or interval, queries left out."""
    told = [f"{count} queries {why}" for why, count in report["skipped"].items() if count]
    told += [f"{count} queries of {name} depend on the order of tied scores; every value is the expected one."
             for name, count in report["ties"].items() if count]  # fmt: skip
    for metric, figure in report["metrics"].items():
        if figure.get("why"):
            told.append(f"{metric}: {figure['why']}")
    for name, row in report["conflict"]["systems"].items():
        if row["auc"].get("why"):
            told.append(f"conflict AUC of {name}: {row['auc']['why']}")
    return told
