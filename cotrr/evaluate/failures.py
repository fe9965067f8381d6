"""The queries with the largest regret: what was shown, what should have been, and why.

A table is looked at by itself, with its embeddings; what was found in several is merged, and analysed
with no more than their labels and scores.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
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

EXAMPLES = 8
BLOCK = 32  # queries explained at once: a new number of them would be compiled anew
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


class Types(NamedTuple):
    """Candidates by type of conflict: as the reviewer has it, as Step 4 has it, and where both have it.

    Of the labelled candidates on which both have spoken.
    """

    reviewed: dict[str, int]
    accused: dict[str, int]
    both: dict[str, int]


class Failures(NamedTuple):
    """What was found in a table, or in several, one behind the other; plain JSON types."""

    reasons: list[Reason]  # of each query with regret, in the order of the lists
    examples: list[dict[str, Any]]  # the largest regrets first
    types: Types


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


def look(model: Model, table: pa.Table, lists: Lists, scored: Scored, count: int = EXAMPLES) -> Failures:
    """A reason for every query with regret, and the `count` largest as examples."""
    lost = regret(scored.logit, lists)
    failed = _failed(lost)
    shown, best = (part[failed] for part in shown_and_best(scored.logit, lists))
    rows = table.drop_columns([name for name in table.column_names if name.endswith("_embedding")])
    row = lambda q, i: rows.slice(int(lists.row[q, i]), 1).to_pylist()[0]
    pairs = [(row(q, i), row(q, j)) for q, i, j in zip(failed, shown, best, strict=True)]
    reasons, examples = [], []
    if len(failed):
        explained = _explain(model, lists, failed, shown, best)
        reasons = [_reason(*pair, explained, k) for k, pair in enumerate(pairs)]
        for k in _largest_first(lost[failed])[:count]:
            at, why = (shown[k], best[k]), _why(explained, k, pairs[k])
            example = _example(lists, scored, failed[k], at, pairs[k], reasons[k], why)
            examples.append(example | {"regret": float(lost[failed[k]])})
    return Failures(reasons, examples, count_types(table, lists))


def merge(parts: Sequence[Failures], count: int = EXAMPLES) -> Failures:
    """What was found in several tables, as if they were one."""
    examples = sorted((example for part in parts for example in part.examples), key=lambda e: -e["regret"])
    counted = zip(*(part.types for part in parts), strict=True)
    return Failures(
        [reason for part in parts for reason in part.reasons],
        examples[:count],
        Types(*(sum(map(Counter, counts), Counter()) for counts in counted)),
    )


def analyse(found: Failures, lists: Lists, scored: Scored) -> dict[str, Any]:
    """What was found in lists, for the report: reasons with counts, detection by type, examples."""
    lost = regret(scored.logit, lists)
    failed, known, detection = _failed(lost), np.isfinite(lost), detect(found.types)
    order = _largest_first(lost[failed])
    failed, reasons = failed[order], [found.reasons[k] for k in order]
    return {
        "queries": int(known.sum()),
        "with_regret": len(failed),
        "total_regret": float(lost[failed].sum()),
        "mean_regret": float(lost[known].mean()) if known.any() else None,
        "reasons": _clusters(lists.query_id[failed], reasons, lost[failed], detection, int(known.sum())),
        "detection": detection,
        "examples": found.examples,
    }


def _failed(lost: np.ndarray) -> np.ndarray:
    """The queries with regret, by index."""
    return np.flatnonzero(np.nan_to_num(lost) > 0)


def _largest_first(values: np.ndarray) -> np.ndarray:
    return np.argsort(-values, kind="stable")


def _explain(
    model: Model, lists: Lists, query: np.ndarray, first: np.ndarray, second: np.ndarray
) -> Explanation:
    """`attribution.explain` in blocks of one shape, the last filled up with its last pair."""
    blocks = []
    for start in range(0, len(query), BLOCK):
        at = np.minimum(np.arange(start, start + BLOCK), len(query) - 1)
        own = lists.take(query[at])
        blocks.append(attribution.explain(model, own, np.arange(BLOCK), first[at], second[at]))
    join = lambda values: np.concatenate(values)[: len(query)]
    by_name = lambda dicts: {name: join([values[name] for values in dicts]) for name in dicts[0]}
    return Explanation(
        join([block.margin for block in blocks]),
        by_name([block.groups for block in blocks]),
        by_name([block.attributes for block in blocks]),
    )


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


def count_types(table: pa.Table, lists: Lists) -> Types:
    """What the columns `review_conflict_types` and `conflicts` have; nothing where one is missing."""
    columns = ("conflicts", "review_conflict_types")
    there = {*columns} <= {*table.column_names}
    rows = table.select(columns).take(lists.row[lists.labelled]).to_pylist() if there else []
    reviewed, accused, both = Counter[str](), Counter[str](), Counter[str]()
    for row in rows:
        if row["review_conflict_types"] is None or row["conflicts"] is None:
            continue
        by_reviewer, by_step4 = _types(row)
        reviewed.update(by_reviewer)
        accused.update(by_step4)
        both.update(by_reviewer & by_step4)
    return Types(reviewed, accused, both)


def detect(types: Types) -> list[dict[str, Any]]:
    """Recall and precision of Step 4's conflicts against the reviewer's, by type, with Wilson intervals."""

    def share(hits: int, of: int) -> list[float] | None:
        return [hits / of, *wilson(np.array(hits), np.array(of)).tolist()] if of else None

    reviewed, accused, both = map(Counter, types)
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
