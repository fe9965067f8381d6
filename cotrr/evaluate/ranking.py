"""Figures of rankings: metrics, paired differences with tests, slices, risk and coverage.

All systems, metrics, differences and slices are ratios of one engine, so they share its resamples.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from cotrr.data.lists import Lists
from cotrr.evaluate import comparisons, metrics
from cotrr.evaluate.figures import Engine, Estimates, Figure, Ratio, mean

METRICS = (
    *(f"compliance@{k}" for k in (1, 3, 5)),
    *("ndcg@10", "ndcg_y@10"),
    *(f"conflict_rate@{k}" for k in (1, 3, 5)),
)
NOISE = 1e-6  # of a metric in float32


class System(NamedTuple):
    """A ranking to evaluate: its scores [Q, n] (higher is better), and what it is."""

    name: str
    describes: str
    scores: np.ndarray | None  # None: the system cannot be formed from this data
    why: str = ""


@jax.jit
@jax.vmap
def _measure(scores, compliance, y, conflict, where):
    at = partial(metrics.mean_at, scores, where=where)
    gain = partial(metrics.ndcg, scores, where=where, k=10)
    return {
        **{f"compliance@{k}": at(compliance, k=k) for k in (1, 3, 5)},
        "ndcg@10": gain(compliance),
        "ndcg_y@10": gain(y),
        **{f"conflict_rate@{k}": at(conflict, k=k) for k in (1, 3, 5)},
        "ties": metrics.depends_on_ties(scores, compliance, where=where, k=10),
    }


def measure(scores: np.ndarray, lists: Lists) -> dict[str, np.ndarray]:
    """[Q] values of METRICS (NaN where undefined), and `ties`: whether they decide the first ten."""
    where = lists.labelled
    zero = lambda values: np.where(where, values, 0.0).astype(np.float32)
    values = _measure(zero(scores), zero(lists.compliance), zero(lists.y), zero(lists.conflict), where)
    return {name: np.asarray(value, np.float64) for name, value in values.items()}


def per_query(scores: np.ndarray, lists: Lists) -> dict[str, np.ndarray]:
    """[Q] values of every ranking metric; NaN where it is undefined for a query."""
    values = measure(scores, lists)
    return {name: values[name] for name in METRICS}


class Measured(NamedTuple):
    """Ratios by path, what resampling made of them, and their figures."""

    ratios: dict[tuple[str, ...], Ratio]
    estimates: Estimates
    figures: list[Figure]

    def row(self, *path: str) -> int:
        """Where a path stands in `estimates` and `figures`."""
        return list(self.ratios).index(path)

    def figures_of(self, *path: str, why: str = "") -> dict[str, Figure]:
        """The figure of each metric under a path; `why` explains what has no value."""
        found = {metric: self.figures[self.row(*path, metric)] for metric in METRICS}
        return {m: f | {"why": why} if f["value"] is None and why else f for m, f in found.items()}


def ranking(
    engine: Engine, systems: list[System], lists: Lists, baseline: str = "", model: str = ""
) -> dict[str, Any]:
    """`metrics`, `ladder`, `deltas`, `gains`, `slices` and `comparisons` of the report.

    `deltas` are the other systems' differences to `baseline` (the first system unless named),
    `gains` the differences of `model` (the last one) to each other system.
    """
    baseline, model = baseline or systems[0].name, model or systems[-1].name
    names, absent = [s.name for s in systems], {s.name: s.why for s in systems if s.scores is None}
    undefined = dict.fromkeys(METRICS, np.full(len(lists.query_id), np.nan))
    values = {s.name: undefined if s.scores is None else per_query(s.scores, lists) for s in systems}
    over_baseline = [(name, baseline) for name in names if name != baseline]
    over_each = [(model, name) for name in names if name != model]
    measured = _measured(
        engine, values, {*over_baseline, *over_each, (model, baseline)}, lists, baseline, model
    )

    why = lambda *pair: next((absent[name] for name in pair if name in absent), "")
    difference = lambda pair: measured.figures_of("difference", *pair, why=why(*pair))
    present = lambda pairs: [pair for pair in pairs if not absent.keys() & set(pair)]
    families = {f"over {baseline}": present(over_baseline), f"{model} over each": present(over_each)}
    slices = sorted(set(lists.domain))
    return {
        "baseline": baseline,
        "model_system": model,
        "metrics": measured.figures_of("value", model, why=why(model)),
        "ladder": [{"system": s.name, "describes": s.describes,
                    "metrics": measured.figures_of("value", s.name, why=why(s.name))} for s in systems],
        "deltas": {pair[0]: difference(pair) for pair in over_baseline},
        "gains": {pair[1]: difference(pair) for pair in over_each},
        "slices": {d: {"metrics": measured.figures_of("slice", d, why=why(model)),
                       "deltas": measured.figures_of("slice difference", d, why=why(model, baseline))}
                   for d in slices},
        "comparisons": [{"family": title, **_family(engine, measured, values, pairs)}
                        for title, pairs in families.items() if pairs],
    }  # fmt: skip


def _measured(
    engine: Engine,
    values: dict[str, dict[str, np.ndarray]],
    pairs: set[tuple[str, str]],
    lists: Lists,
    baseline: str,
    model: str,
) -> Measured:
    """Every metric of every system and domain, and the differences of every pair, in one pass."""
    ratios: dict[tuple[str, ...], Ratio] = {}
    inside = {d: np.where(lists.domain == d, 1.0, np.nan) for d in sorted(set(lists.domain))}
    for metric in METRICS:
        for name, by_metric in values.items():
            ratios["value", name, metric] = mean(by_metric[metric], (0, 1))
        for a, b in sorted(pairs):
            ratios["difference", a, b, metric] = mean(_apart(values, a, b, metric), (-1, 1))
        for domain, here in inside.items():
            ratios["slice", domain, metric] = mean(values[model][metric] * here, (0, 1))
            apart = _apart(values, model, baseline, metric)
            ratios["slice difference", domain, metric] = mean(apart * here, (-1, 1))
    estimates = engine.estimate(list(ratios.values()))
    return Measured(ratios, estimates, engine.figures(list(ratios.values()), estimates))


def _apart(values: dict[str, dict[str, np.ndarray]], a: str, b: str, metric: str) -> np.ndarray:
    """[Q] by how much system a is ahead of b; what float32 may make of the same order is no difference."""
    apart = values[a][metric] - values[b][metric]
    return np.where(np.abs(apart) < NOISE, 0.0, apart)


def _family(
    engine: Engine,
    measured: Measured,
    values: dict[str, dict[str, np.ndarray]],
    pairs: list[tuple[str, str]],
) -> dict[str, Any]:
    """Paired differences that are tested together: every metric of every pair."""
    hypotheses = [(a, b, metric) for a, b in pairs for metric in METRICS]
    differences = [_apart(values, *path) for path in hypotheses]
    stacked = np.nan_to_num(np.stack(differences, axis=1))
    single, joint = comparisons.sign_flip(engine.draw, engine.by_unit(stacked))
    held, at = comparisons.holm(single), [measured.row("difference", *path) for path in hypotheses]
    factor = comparisons.simultaneous(measured.estimates.pivots[at])
    rows = []
    for i, (a, b, metric) in enumerate(hypotheses):
        figure = measured.figures[at[i]]
        centre, error = measured.estimates.value[at[i]], measured.estimates.error[at[i]]
        zero_one = all(np.isin(values[name][metric], (0, 1)).all() for name in (a, b))
        told = figure["ci"] and not np.isinf(measured.estimates.pivots[at[i]]).any()
        rows.append({
            "system": a, "reference": b, "metric": metric, "difference": figure,
            "simultaneous": np.clip([centre - factor * error, centre + factor * error], -1, 1).tolist()
            if told else None,
            "p": float(single[i]), "p_max_t": float(joint[i]), "p_holm": float(held[i]),
            "mcnemar": comparisons.mcnemar(differences[i])
            if zero_one and engine.unit_name == "queries" else None,
            "detectable": float(comparisons.detectable(error)) if figure["ci"] else None,
        })  # fmt: skip
    return {"hypotheses": len(rows), "resamples": engine.resamples, "rows": rows}


HEADLINES = {"compliance@1": "Compliance@1", "ndcg@10": "nDCG@10"}


def power(ranked: dict[str, Any], queries: int) -> dict[str, Any]:
    """What so many queries could have shown of the model against the baseline, in one sentence."""
    tested = f"over {ranked['baseline']}"
    rows = [row for family in ranked["comparisons"] if family["family"] == tested for row in family["rows"]]
    found = {row["metric"]: row["detectable"] for row in rows if row["system"] == ranked["model_system"]}
    told = [f"{100 * found[m]:.1f} points in {name}" for m, name in HEADLINES.items() if found.get(m)]
    if not told:
        return {"text": f"{queries} queries cannot say what they could show: too few, or without a baseline."}
    shown = f"{queries} queries show a true difference to {ranked['baseline']} of {' or '.join(told)}"
    return {"text": f"{shown} four times out of five; smaller ones may well be missed."}


def risk_coverage(engine: Engine, logit: np.ndarray, score: np.ndarray, lists: Lists) -> dict[str, Any]:
    """1 − Compliance@1 of the queries whose shown candidate has the highest calibrated score.

    `logit` [Q, n] orders candidates, `score` [Q, n] is the expected label of each (El-Yaniv & Wiener 2010).
    """
    risk = 1 - per_query(logit, lists)["compliance@1"]
    known = ~np.isnan(risk)
    shown = np.where(lists.labelled, logit, -np.inf).argmax(axis=1)
    confidence = np.take_along_axis(score, shown[:, None], axis=1)[:, 0]
    place = np.argsort(np.argsort(np.where(known, -confidence, np.inf), kind="stable"), kind="stable")
    kept = [(place < -(-level * known.sum() // 10)).astype(float) for level in range(1, 11)]
    weight = np.mean([k / max(k.sum(), 1) for k in kept], axis=0)
    ratios = [Ratio(np.where(k > 0, risk, 0.0) * k, k, (0, 1)) for k in (*kept, weight)]
    *curve, area = engine.figures(ratios)
    half, whole = curve[len(curve) // 2 - 1], curve[-1]
    return {
        "risk": "1 − Compliance@1",
        "confidence": "calibrated score of the shown candidate",
        "curve": [{"coverage": level / 10, "queries": int(k.sum()), "risk": figure}
                  for level, (k, figure) in enumerate(zip(kept, curve, strict=True), 1)],
        "area": area | {"n": int(known.sum())},
        "text": "" if half["value"] is None else
                f"On the half of the queries that the model is surest of, the risk is {half['value']:.3f}; "
                f"on all of them {whole['value']:.3f}.",
    }  # fmt: skip


def counts(systems: list[System], lists: Lists) -> dict[str, Any]:
    """What is left out of the metrics, and the queries whose top 10 depend on tied scores."""
    where = lists.labelled
    labels = np.where(where, lists.compliance, 0.0)
    return {
        "skipped": {
            "without any gain (left out of nDCG)": int((where.any(axis=1) & ~(labels > 0).any(axis=1)).sum()),
            "with a single labelled candidate (kept)": int((where.sum(axis=1) == 1).sum()),
        },
        "ties": {s.name: int(measure(s.scores, lists)["ties"].sum())
                 for s in systems if s.scores is not None},
    }  # fmt: skip
