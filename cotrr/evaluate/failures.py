"""The queries with the largest regret: what was shown, what should have been, and why."""

from collections import Counter, defaultdict
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from cotrr.data.color import hex_of_lab
from cotrr.data.contract import ATTRIBUTES
from cotrr.data.lists import Lists
from cotrr.evaluate import attribution
from cotrr.evaluate.attribution import Explanation
from cotrr.evaluate.intervals import wilson
from cotrr.ranker.artifact import Model, Scored

REASONS = 12  # beyond these they are told together
FEWEST, SHARE = 5, 0.1  # queries, and of all regret: a smaller reason suggests no fix
GOOD = 0.8  # a recall or precision that may be as high needs no fix


class Reason(NamedTuple):
    """Why a query failed; `kind` is missed, false_alarm, outweighed, unnamed or other."""

    kind: str
    type: str | None = None  # the conflict that it is about
    attribute: str | None = None  # what pushed the shown candidate ahead

    def __str__(self) -> str:
        conflict = (self.type or "").replace("_", " ")
        return {
            "missed": f"{conflict} that Step 4 did not see",
            "false_alarm": f"the best one wrongly accused of {conflict}",
            "outweighed": f"{conflict} seen, but outweighed by {self.attribute}",
            "unnamed": f"no conflict named; {self.attribute} favoured the shown one",
            "other": "other reasons",
        }[self.kind]


def regret(scores: np.ndarray, lists: Lists) -> np.ndarray:
    """[Q] best reachable minus reached Compliance@1; NaN for a query without labels."""
    shown, best = shown_and_best(scores, lists)
    compliance = lambda at: np.take_along_axis(lists.compliance, at[:, None], axis=1)[:, 0]
    return np.where(lists.labelled.any(axis=1), compliance(best) - compliance(shown), np.nan)


def shown_and_best(scores: np.ndarray, lists: Lists) -> tuple[np.ndarray, np.ndarray]:
    """[Q] the first-ranked candidate, and of the most compliant the one with the highest score."""
    scores = np.where(lists.labelled, scores, -np.inf)
    compliance = np.where(lists.labelled, lists.compliance, -np.inf)
    most = compliance == compliance.max(axis=1, keepdims=True)
    return scores.argmax(axis=1), np.where(most, scores, -np.inf).argmax(axis=1)


def analyse(model: Model, table: pa.Table, lists: Lists, scored: Scored, count: int = 8) -> dict[str, Any]:
    """Every query with regret explained, reasons with counts, and the `count` largest as examples."""
    lost = regret(scored.logit, lists)
    failed = np.flatnonzero(np.nan_to_num(lost) > 0)
    failed = failed[np.argsort(-lost[failed], kind="stable")]
    shown, best = (part[failed] for part in shown_and_best(scored.logit, lists))
    rows = table.drop_columns([name for name in table.column_names if name.endswith("_embedding")])
    row = lambda q, i: rows.slice(int(lists.row[q, i]), 1).to_pylist()[0]
    pairs = [(row(q, i), row(q, j)) for q, i, j in zip(failed, shown, best, strict=True)]
    reasons, examples = [], []
    if len(failed):
        explained = attribution.explain(model, lists, failed, shown, best)
        reasons = [_reason(pair[0], pair[1], explained, k) for k, pair in enumerate(pairs)]
        examples = [
            _example(
                lists, scored, q, (shown[k], best[k]), pairs[k], reasons[k], _why(explained, k, pairs[k])
            )
            | {"regret": float(lost[q])}
            for k, q in enumerate(failed[:count])
        ]
    detection = detect(table, lists)
    known = np.isfinite(lost)
    return {
        "queries": int(known.sum()),
        "with_regret": len(failed),
        "total_regret": float(lost[failed].sum()),
        "mean_regret": float(lost[known].mean()) if known.any() else None,
        "reasons": _clusters(lists.query_id[failed], reasons, lost[failed], detection, int(known.sum())),
        "detection": detection,
        "examples": examples,
    }


def _types(row: dict[str, Any]) -> tuple[set[str], set[str]]:
    """The types of conflict of a candidate by the reviewer and by Step 4."""
    return set(row.get("review_conflict_types") or ()), {c["type"] for c in row.get("conflicts") or ()}


def _reason(shown: dict, best: dict, explained: Explanation, k: int) -> Reason:
    """One reason: first what Step 4 could not tell, then what it told wrongly, then the model's weighing.

    A conflict that the best candidate has as well is no reason.
    """
    (reviewed, accused), (best_reviewed, best_accused) = _types(shown), _types(best)
    violated = sorted(reviewed - best_reviewed)
    push = max(explained.attributes, key=lambda name: explained.attributes[name][k])
    if missed := [kind for kind in violated if kind not in accused]:
        return Reason("missed", missed[0])
    reviewed_best = best.get("review_conflict_types") is not None
    if reviewed_best and (wrong := sorted(best_accused - best_reviewed - accused)):
        return Reason("false_alarm", wrong[0])
    return Reason("outweighed", violated[0], push) if violated else Reason("unnamed", None, push)


def _clusters(
    ids: np.ndarray, reasons: list[Reason], lost: np.ndarray, detection: list[dict], queries: int
) -> list[dict[str, Any]]:
    """Reasons with counts and their shares of the regret, the largest first; a tail is told together."""
    members: dict[Reason, list[int]] = defaultdict(list)
    for k, reason in enumerate(reasons):
        members[reason].append(k)
    ranked = sorted(members, key=lambda reason: -lost[members[reason]].sum())
    kept, tail = ranked[:REASONS], ranked[REASONS:]
    if tail:
        members[Reason("other")] = [k for reason in tail for k in members[reason]]
        kept.append(Reason("other"))
    rows = []
    for reason in kept:
        at = members[reason]
        share = float(lost[at].sum() / lost.sum())
        rows.append({
            "reason": str(reason), **reason._asdict(), "count": len(at), "regret": float(lost[at].sum()),
            "share": share, "queries": [str(ids[k]) for k in at[:5]],
            "fix": _fix(reason, detection, lost[at].sum() / queries)
            if len(at) >= FEWEST and share >= SHARE else None,
        })  # fmt: skip
    return rows


def _fix(reason: Reason, detection: list[dict], lost: float) -> str | None:
    """What the data says would help; None where it does not. `lost` is in Compliance@1."""
    row = next((row for row in detection if row["type"] == reason.type), None)
    conflict = (reason.type or "").replace("_", " ")
    told = {"missed": ("recall", "finds {} of the reviewer's cases of " + conflict),
            "false_alarm": ("precision", "is right in {} of its accusations of " + conflict)}  # fmt: skip
    if row is None or reason.kind not in told:
        return None
    measure, text = told[reason.kind]
    if row[measure] is None or row[measure][2] >= GOOD:
        return None
    value, low, high = (round(100 * number) for number in row[measure])
    found = f"Step 4 {text.format(f'{value} % [{low}, {high}]')}"
    return f"{found}: better detection could win back up to {100 * lost:.1f} points of Compliance@1."


def detect(table: pa.Table, lists: Lists) -> list[dict[str, Any]]:
    """Recall and precision of Step 4's `conflicts` against the reviewer's, by type, with Wilson intervals.

    Of the labelled candidates on which both have spoken.
    """
    columns = {"review_conflict_types", "conflicts"}
    if not columns <= set(table.column_names):
        return []
    rows = table.select(sorted(columns)).take(lists.row[lists.labelled]).to_pylist()
    reviewed, accused, both = Counter(), Counter(), Counter()
    for row in rows:
        if row["review_conflict_types"] is None or row["conflicts"] is None:
            continue
        by_reviewer, by_step4 = _types(row)
        reviewed.update(by_reviewer)
        accused.update(by_step4)
        both.update(by_reviewer & by_step4)

    def share(hits: int, of: int) -> list[float] | None:
        return [hits / of, *wilson(np.array(hits), np.array(of)).tolist()] if of else None

    return [
        {
            "type": kind,
            "reviewed": reviewed[kind],
            "found": both[kind],
            "recall": share(both[kind], reviewed[kind]),
            "accused": accused[kind],
            "right": both[kind],
            "precision": share(both[kind], accused[kind]),
        }
        for kind in sorted(reviewed | accused)
    ]


def _example(
    lists: Lists,
    scored: Scored,
    q: int,
    at: tuple[int, int],
    rows: tuple[dict[str, Any], dict[str, Any]],
    reason: Reason,
    why: dict[str, Any],
) -> dict[str, Any]:
    """One query with both candidates `at` [2] and their `rows` of the table."""
    asked, (reviewed, accused) = _by_key(lists.constraints[q]), _types(rows[0])
    named = lambda key: any(kind.startswith(key) for kind in reviewed | accused)
    held = [scored.low[q, i] <= scored.score[q, j] <= scored.high[q, i] for i, j in (at, at[::-1])]
    return {
        "query": lists.query[q], "query_id": lists.query_id[q], "domain": lists.domain[q],
        "constraints": asked,
        "reason": str(reason),
        "within_uncertainty": bool(all(held)),
        "violates": {"by_reviewer": sorted(reviewed), "by_step4": sorted(accused),
                     "asked": {key: value for key, value in asked.items() if named(key)}},
        "why": why,
        "shown": _candidate(rows[0], lists, scored, q, at[0]),
        "best": _candidate(rows[1], lists, scored, q, at[1]),
    }  # fmt: skip


def _why(explained: Explanation, k: int, rows: tuple[dict[str, Any], dict[str, Any]]) -> dict[str, Any]:
    """Pair k of an explanation, the largest push first, with what both candidates measure."""
    raw = lambda name, row: row[name] if name in ATTRIBUTES else None
    groups = [{"name": name, "value": float(values[k])} for name, values in explained.groups.items()]
    attributes = [
        {"name": name, "value": float(values[k]), "shown": raw(name, rows[0]), "best": raw(name, rows[1])}
        for name, values in explained.attributes.items()
    ]
    largest = lambda row: -abs(row["value"])
    return {
        "margin": float(explained.margin[k]),
        "groups": sorted(groups, key=largest),
        "attributes": sorted(attributes, key=largest),
    }


def _by_key(tokens: tuple[str, ...]) -> dict[str, str]:
    """What is asked, by key; several values of one key stand in one text."""
    asked: dict[str, str] = {}
    for token in tokens:
        key, value = token.split("=", 1)
        asked[key] = f"{asked[key]} or {value}" if key in asked else value
    return asked


def _candidate(row: dict[str, Any], lists: Lists, scored: Scored, q: int, i: int) -> dict[str, Any]:
    std = float(scored.std[q, i])
    return {
        "id": row["id"],
        "url": row["url"],
        "compliance": float(lists.compliance[q, i]),
        "score": float(scored.score[q, i]),
        "score_low": float(scored.low[q, i]),
        "score_high": float(scored.high[q, i]),
        "std": std if np.isfinite(std) else None,
        "p_conflict": float(scored.p_conflict[q, i]),
        "conflicts": row["review_conflict_types"] or [],
        "attributes": {name: row[name] for name in ATTRIBUTES if row[name] is not None},
        "palette": [hex_of_lab(color) for color in row.get("palette_lab") or ()],
    }
