"""The evaluation of ranked lists: every figure of the report, with its interval.

All systems, metrics, differences and slices are columns of one matrix [Q, C] of per-query values;
one pass of the bootstrap over queries gives all their intervals.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import rankdata

from cotrr.data.lists import Lists
from cotrr.evaluate import bootstrap, calibration, metrics

Figure = dict[str, Any]
Number = float | np.ndarray  # a number, or an array of shape []
KIND = "percentile bootstrap over queries"
FEWEST = 10  # queries: at 5, a nominal 95 % percentile interval of a mean covers 84 % or less
CONVENTIONS = {
    "compliance@1": "Mean compliance of the best-ranked candidate, mean over queries.",
    "compliance@3": "Mean compliance of the 3 best-ranked candidates (all, where there are fewer).",
    "compliance@5": "Mean compliance of the 5 best-ranked candidates (all, where there are fewer).",
    "ndcg@10": "Linear gain = compliance, discount 1/log2(rank + 1), ideal over all labelled "
    "candidates of the query; a query without any gain is left out and counted.",
    "ndcg_y@10": "As nDCG@10, with gain = y, the label that the model learns.",
    "conflict_rate@1": "Share of best-ranked candidates that the reviewer calls conflicts.",
    "ties": "Every ranking metric is its expected value over the orders of tied scores.",
    "conflict AUC": "Pooled over candidates, ties count one half, undefined with one class.",
    "ECE": "15 equal-width bins [a, b), the last one closed. The plug-in estimate is biased upwards "
    "where candidates are few; its basic (reflected) interval takes the bias off, and may lie below it.",
    "interval": "95 % percentile interval (ECE: basic) of a bootstrap that resamples queries; all systems "
    "and metrics share the resamples, so differences are paired. None on fewer than 10 queries.",
    "candidates": "Only candidates with a label of the kind evaluated are ranked and counted.",
}  # fmt: skip


class System(NamedTuple):
    """A ranking to evaluate: its scores [Q, n] (higher is better), and what it is."""

    name: str
    describes: str
    scores: np.ndarray | None  # None: the system cannot be formed from this data
    why: str = ""


class Column(NamedTuple):
    """Where the figures of one [Q] column of per-query values belong."""

    path: tuple[str, ...]
    values: np.ndarray


@jax.jit
@jax.vmap
def _measure(scores, compliance, y, conflict, where):
    at = partial(metrics.mean_at, scores, where=where)
    gain = partial(metrics.ndcg, scores, where=where, k=10)
    return {
        **{f"compliance@{k}": at(compliance, k=k) for k in (1, 3, 5)},
        "ndcg@10": gain(compliance),
        "ndcg_y@10": gain(y),
        "conflict_rate@1": at(conflict, k=1),
    }


def per_query(scores: np.ndarray, lists: Lists) -> dict[str, np.ndarray]:
    """[Q] values of every ranking metric; NaN where it is undefined for a query."""
    where = lists.labelled
    zero = lambda values: np.where(where, values, 0.0).astype(np.float32)
    values = _measure(zero(scores), zero(lists.compliance), zero(lists.y), zero(lists.conflict), where)
    return {name: np.asarray(value, np.float64) for name, value in values.items()}


def figure(
    value: Number,
    low: Number,
    high: Number,
    n: int,
    why: str = "",
    *,
    undefined: Number = 0,
    queries: int | None = None,
    kind: str = KIND,
) -> Figure:
    """A figure of the report; undefined numbers are null and say why.

    `undefined` resamples had no value.  Fewer than FEWEST `queries` behind the value have no
    interval, since it would be much too narrow; nor has a value that no resample changes.
    """
    if queries is not None and queries < FEWEST:
        low, high, undefined = np.nan, np.nan, 0
        why = why or (f"{queries} of at least {FEWEST} queries for an interval" if queries else "")
    elif high - low < 1e-6:
        low, high = np.nan, np.nan
        why = why or "all resamples agree, so the bootstrap cannot tell"
    known, bounded = bool(np.isfinite(value)), bool(np.isfinite(low) and np.isfinite(high))
    result: Figure = {
        "value": float(value) if known else None,
        "ci": [float(low), float(high)] if known and bounded else None,
        "n": int(n),
        "kind": kind,
    }
    if queries is not None and queries != n:
        result["queries"] = queries  # n counts candidates, and this what was resampled
    if not known:
        result["why"] = why or "no query defines it"
    elif not bounded:
        result["why"] = why or "too few resamples define it"
    if undefined:
        result["undefined"] = int(undefined)
    return result


class Engine(NamedTuple):
    """Point values and bootstrap intervals on the queries of one evaluation."""

    queries: int
    seed: int
    resamples: int

    def _intervals(self, statistic: Any, data: Any) -> bootstrap.Interval:
        data = jax.tree.map(jnp.asarray, data)
        return bootstrap.intervals(statistic, data, self.queries, seed=self.seed, resamples=self.resamples)

    def means(self, columns: list[Column]) -> dict[tuple[str, ...], Figure]:
        """The mean of each column over the queries that define it."""
        values = np.stack([column.values for column in columns], axis=1)
        found = self._intervals(bootstrap.weighted_means, values.astype(np.float32))
        n = (~np.isnan(values)).sum(axis=0)
        mean = np.where(n > 0, np.nansum(values, axis=0) / np.maximum(n, 1), np.nan)
        rows = zip(columns, mean, found.low, found.high, n, found.undefined, strict=True)
        return {
            column.path: figure(value, low, high, count, undefined=undefined, queries=count)
            for column, value, low, high, count, undefined in rows
        }

    def shares(self, sums: np.ndarray, totals: np.ndarray) -> list[Figure]:
        """Σ sums / Σ totals over candidates, for each column of `sums` [Q, C]; `totals` [Q]."""
        data = np.concatenate([sums, totals[:, None]], axis=1).astype(np.float32)
        found = self._intervals(_weighted_shares, data)
        total = totals.sum()
        value = sums.sum(axis=0) / total if total else np.full(sums.shape[1], np.nan)
        queries = int(np.count_nonzero(totals))
        return [figure(mean, low, high, int(total), undefined=undefined, queries=queries)
                for mean, low, high, undefined in zip(value, *found, strict=True)]  # fmt: skip

    def auc(self, query: np.ndarray, score: np.ndarray, positive: np.ndarray) -> Figure:
        """Pooled AUC of N candidates."""
        if positive.all() or not positive.any():
            return figure(np.nan, np.nan, np.nan, len(score), "all candidates are of one class")
        items = bootstrap.sort_items(query, score, positive)
        found = self._intervals(bootstrap.weighted_auc, items)
        rank, positives = rankdata(score), positive.sum()  # in float64, ties at their mean rank
        wins = rank[positive].sum() - positives * (positives + 1) / 2
        value = wins / (positives * (len(score) - positives))
        return figure(value, found.low, found.high, len(score),
                      undefined=found.undefined, queries=len(np.unique(query)))  # fmt: skip

    def ece(self, query: np.ndarray, probability: np.ndarray, outcome: np.ndarray) -> Figure:
        """ECE with 15 bins of N candidates."""
        sums = calibration.bin_sums(query, probability, outcome, self.queries)
        found = self._intervals(bootstrap.weighted_ece, sums.astype(np.float32))
        value = calibration.ece(sums.sum(axis=0))
        # Resampling adds to the plug-in ECE the bias that sampling has added already: where the
        # percentile interval doubles it, the reflected one takes it off.
        low, high = np.maximum(0.0, 2 * value - found.high), np.maximum(0.0, 2 * value - found.low)
        return figure(value, low, high, len(probability), undefined=found.undefined,
                      queries=len(np.unique(query)), kind="basic bootstrap over queries")  # fmt: skip


def _weighted_shares(counts: jax.Array, data: jax.Array) -> jax.Array:
    summed = jnp.matmul(counts.astype(jnp.float32), data, precision="highest")
    total = summed[-1]
    return jnp.where(total > 0, summed[:-1] / jnp.where(total > 0, total, 1.0), jnp.nan)


def ranking(engine: Engine, systems: list[System], lists: Lists) -> dict[str, Any]:
    """`metrics`, `ladder`, `deltas`, `gains` and `slices` of the report.

    The first system is the baseline of `deltas`, the last one the model; `gains` are the model's
    differences to each other system.
    """
    undefined = dict.fromkeys(CONVENTIONS_OF_METRICS, np.full(engine.queries, np.nan))
    values = {s.name: undefined if s.scores is None else per_query(s.scores, lists) for s in systems}
    baseline, model = systems[0].name, systems[-1].name
    columns = []
    for name, by_metric in values.items():
        for metric, value in by_metric.items():
            columns.append(Column(("value", name, metric), value))
            if name != baseline:
                columns.append(Column(("delta", name, metric), value - values[baseline][metric]))
            if name != model:
                columns.append(Column(("gain", name, metric), values[model][metric] - value))
    for domain in sorted(set(lists.domain)):
        inside = np.where(lists.domain == domain, 1.0, np.nan)
        for metric, value in values[model].items():
            columns.append(Column(("slice", domain, metric), value * inside))
            difference = value - values[baseline][metric]
            columns.append(Column(("slice delta", domain, metric), difference * inside))
    figures = engine.means(columns)
    pick = lambda kind, name: {m: figures[kind, name, m] for m in CONVENTIONS_OF_METRICS}
    return {
        "metrics": pick("value", model),
        "ladder": [{"system": s.name, "describes": s.describes, "metrics": _why(pick("value", s.name), s.why)}
                   for s in systems],
        "deltas": {s.name: _why(pick("delta", s.name), s.why or systems[0].why) for s in systems[1:]},
        "gains": {s.name: _why(pick("gain", s.name), s.why) for s in systems[:-1]},
        "slices": {d: {"metrics": pick("slice", d), "deltas": _why(pick("slice delta", d), systems[0].why)}
                   for d in sorted(set(lists.domain))},
    }  # fmt: skip


CONVENTIONS_OF_METRICS = tuple(name for name in CONVENTIONS if "@" in name)


def _why(figures: dict[str, Figure], why: str) -> dict[str, Figure]:
    return {k: f | {"why": why} if f["value"] is None and why else f for k, f in figures.items()}


def conflicts(engine: Engine, probabilities: dict[str, np.ndarray], lists: Lists) -> dict[str, Any]:
    """AUC, ECE, Brier score and reliability of conflict probabilities [Q, n] by system.

    The first system is the model, whose AUC and ECE stand in front as well.
    Candidates without a probability (NaN) are left out and counted by n.  A silver label is itself
    a probability: it counts as a conflict from one half on.
    """
    labelled = lists.labelled & ~np.isnan(lists.conflict)
    result: dict[str, Any] = {"systems": {}, "n": int(labelled.sum())}
    for name, probability in probabilities.items():
        known = labelled & ~np.isnan(probability)
        query, p = np.nonzero(known)[0], probability[known].astype(np.float64)
        outcome = (lists.conflict[known] >= 0.5).astype(np.float64)
        per_list = lambda x, query=query: np.bincount(query, x, minlength=engine.queries)
        brier = engine.shares(per_list((p - outcome) ** 2)[:, None], per_list(np.ones_like(p)))
        result["systems"][name] = {
            "auc": engine.auc(query, p, outcome > 0),
            "ece": engine.ece(query, p, outcome),
            "brier": brier[0],
            "reliability": reliability(engine, query, p, outcome),
        }
    model = next(iter(result["systems"].values()))
    result |= {"auc": model["auc"], "ece": model["ece"]}
    positive = np.where(labelled, lists.conflict >= 0.5, 0).sum(axis=1)
    result["positive_rate"] = engine.shares(positive[:, None].astype(float), labelled.sum(axis=1))[0]
    return result


def reliability(
    engine: Engine, query: np.ndarray, probability: np.ndarray, outcome: np.ndarray
) -> list[dict[str, Any]]:
    """The bins behind the ECE: what was predicted, what was observed, and its interval."""
    sums = calibration.bin_sums(query, probability, outcome, engine.queries)
    found = engine._intervals(_observed, sums.astype(np.float32))
    rows = []
    filled = np.count_nonzero(sums[..., 0], axis=0)
    for i, (count, predicted, observed) in enumerate(sums.sum(axis=0)):
        row = {"low": i / calibration.BINS, "high": (i + 1) / calibration.BINS, "n": int(count)}
        if count:
            bounds = figure(0.0, found.low[i], found.high[i], int(count), queries=filled[i])["ci"]
            row |= {"predicted": predicted / count, "observed": observed / count, "ci": bounds}
        else:
            row |= {"predicted": None, "observed": None, "ci": None}
        rows.append(row)
    return rows


def _observed(counts: jax.Array, sums: jax.Array) -> jax.Array:
    summed = jnp.einsum("q,qbs->bs", counts.astype(jnp.float32), sums, precision="highest")
    return jnp.where(summed[:, 0] > 0, summed[:, 2] / jnp.maximum(summed[:, 0], 1.0), jnp.nan)


def coverage(engine: Engine, low: np.ndarray, high: np.ndarray, lists: Lists) -> dict[str, Any]:
    """How often the 95 % interval [Q, n] of the calibrated score holds the label, and its width."""
    where = lists.labelled
    y = np.where(where, lists.y, 0.0)
    inside = np.where(where, (low <= y) & (y <= high), 0).sum(axis=1)
    width = np.where(where, high - low, 0.0).sum(axis=1)
    held, wide = engine.shares(np.stack([inside, width], axis=1), where.sum(axis=1))
    return {"coverage": held, "width": wide, "nominal": 0.95}


def counts(systems: list[System], lists: Lists) -> dict[str, Any]:
    """What is left out of the metrics, and the queries whose top 10 depend on tied scores."""
    where = lists.labelled
    labels = np.where(where, lists.compliance, 0.0)
    tied = jax.jit(jax.vmap(partial(metrics.depends_on_ties, k=10)))
    return {
        "skipped": {
            "without any gain (left out of nDCG)": int((where.any(axis=1) & ~(labels > 0).any(axis=1)).sum()),
            "with a single labelled candidate (kept)": int((where.sum(axis=1) == 1).sum()),
        },
        "ties": {s.name: int(tied(s.scores.astype(np.float32), labels, where=where).sum())
                 for s in systems if s.scores is not None},
    }  # fmt: skip
