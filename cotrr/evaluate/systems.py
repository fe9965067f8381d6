"""The systems that an evaluation compares, and how long the model takes."""

import time
from collections.abc import Callable

import jax
import numpy as np

from cotrr.data.lists import Lists
from cotrr.evaluate.ranking import System
from cotrr.ranker import encoding, features
from cotrr.ranker.artifact import Model

BASELINES = {"clip": "CLIP-only", "so": "+SO", "rule": "+SO+Conflict", "dual": "Step 4 dual_score"}
STEPS = {
    "CLIP-only": ("clip_score",),
    "+SO": ("clip_score", "compliance_score"),
    "+SO+Conflict": ("clip_score", "compliance_score", "conflict_prob"),
}


def ladder(model: Model, lists: Lists) -> list[System]:
    """CLIP-only → +SO → +SO+Conflict (Step 4's rule), and its `dual_score` where it is there.

    A missing value is its domain's mean among what `model` learned from; a missing `dual_score`
    ranks last.
    """
    encoded = encoding.encode(lists, model.vocabulary)
    everyone = jax.tree.map(lambda part: part[model.final.argmax()], model.statistics)
    filled = np.asarray(jax.vmap(features.fill, in_axes=(None, 0))(everyone, encoded))
    column = {name: i for i, name in enumerate(encoding.NAMES)}
    systems = []
    for name, terms in STEPS.items():
        absent = [t for t in terms if np.isnan(lists.attributes[..., column[t]][lists.where]).all()]
        weights = " + ".join(f"{encoding.RULE[t]:g}·{t}" for t in terms).replace("+ -", "- ")
        scores = np.asarray(features.rule_score(filled, terms))
        why = f"{', '.join(absent)} is missing everywhere" if absent else ""
        systems.append(System(name, weights, None if absent else scores, why))
    if not np.isnan(lists.dual_score[lists.where]).all():
        dual = np.where(np.isnan(lists.dual_score), -np.inf, lists.dual_score)
        systems.append(System("Step 4 dual_score", "Step 4's fused score as it is", dual))
    return systems


def latency(one: Callable[[int], object], lists: Lists, engine: str, calls: int = 300) -> dict:
    """Milliseconds that `one(q)` takes to score query q, features included; `engine` says with what."""
    one(0)
    times = []
    for call in range(calls):
        start = time.perf_counter()
        one(call % len(lists.query_id))
        times.append(1e3 * (time.perf_counter() - start))
    ordered = np.sort(times)

    def quantile(share: float) -> dict:
        # Distribution-free interval of a quantile: order statistics at ± 1.96 binomial deviations.
        spread = 1.96 * np.sqrt(calls * share * (1 - share))
        low, high = (int(np.clip(calls * share + s, 0, calls - 1)) for s in (-spread, spread))
        bounds = [float(ordered[low]), float(ordered[high])]
        value = float(np.quantile(ordered, share))
        return {"value": value, "ci": bounds, "n": calls, "kind": "order statistics"}

    return {"p50_ms": quantile(0.5), "p95_ms": quantile(0.95),
            "engine": f"{engine}, one query a call",
            "candidates": float(np.median(lists.where.sum(axis=1)))}  # fmt: skip
