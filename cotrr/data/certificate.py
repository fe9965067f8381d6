"""The data certificate: what was counted, and every leak that was looked for, on what was written."""

import itertools
from typing import Any

import numpy as np
import pyarrow as pa
from scipy.optimize import isotonic_regression

from cotrr import files
from cotrr.data.contract import ATTRIBUTES
from cotrr.data.labels import GOLD, SILVER, numbers
from cotrr.data.rows import embedding_matrix
from cotrr.data.splits import SPLITS

KEYS = ("canonical_id", "query_id")  # that no two splits may share
NEAR_DUPLICATE = 0.98  # cosine between image embeddings of different pictures
UNSEEN = "not looked for: no picture has an embedding"
DETERMINED = 0.999  # share of y's variance that one feature may not explain


def certify(
    tables: dict[str, pa.Table], dropped: int, settings: dict[str, Any], summary: dict[str, Any]
) -> dict[str, Any]:
    """The certificate of a dataset given as one table by split; `dropped` rows went to no split."""
    everything = pa.concat_tables(tables.values())
    return {
        "counts": {name: _counts(table) for name, table in tables.items()},
        "rows_read": len(everything) + dropped,
        "rows_dropped": dropped,
        "overlap": {
            key: {f"{a}/{b}": _overlap(tables[a], tables[b], key)
                  for a, b in itertools.combinations(tables, 2)}
            for key in KEYS
        },
        "near_duplicates": {"cosine_above": NEAR_DUPLICATE} | near_duplicates(tables),
        "label_leakage": label_leakage(everything),
        "missing": {name: float(np.isnan(numbers(everything, name)).mean()) for name in ATTRIBUTES}
        | {name: everything[name].null_count / max(len(everything), 1)
           for name in ("image_embedding", "text_embedding", "constraints")},
        "labels": _label_shares(everything),
        "settings": settings,
        "settings_hash": files.digest({k: v for k, v in settings.items() if k != "split"}),
        "input": summary,
    }  # fmt: skip


def leaks(certificate: dict[str, Any]) -> list[str]:
    """What is in two splits at once, and what gives the label away."""
    found = [
        f"{count} {key} in both {pair.replace('/', ' and ')}"
        for key, pairs in certificate["overlap"].items()
        for pair, count in pairs.items()
        if count
    ]
    near = certificate["near_duplicates"]
    if near.get("pairs"):
        found.append(
            f"{near['pairs']} pairs of different pictures across splits with cosine above "
            f"{near['cosine_above']}"
        )
    determined = certificate["label_leakage"].items()
    return found + [f"{name} alone determines y ({how})" for name, how in determined]


def unchecked(certificate: dict[str, Any]) -> list[str]:
    """What was not looked for, so that no leak of this kind is told and none is excluded."""
    counted, near = certificate["overlap"], certificate["near_duplicates"]
    found = [
        f"not counted: {key} in both {a} and {b}"
        for key in KEYS
        for a, b in itertools.combinations(SPLITS, 2)
        if counted.get(key, {}).get(f"{a}/{b}") is None
    ]
    unseen = certificate.get("missing", {}).get("image_embedding") == 1
    if near.get("pairs") is None or unseen:
        found.append(f"near duplicates: {near.get('why') or (UNSEEN if unseen else 'not looked for')}")
    return found


def breaches(certificate: dict[str, Any]) -> list[str]:
    """What a reader of the certificate must be told before believing any figure from the data."""
    found = leaks(certificate) + unchecked(certificate)
    if certificate["input"].get("manifest", "") is None:
        found.append("the input was a bare file: no manifest says whether it is complete")
    shares = certificate["labels"]
    if shares[SILVER]:
        found.append(
            f"{shares[SILVER]:.1%} of the rows have silver labels: functions of the features, so a "
            "model learns its own input"
        )
    if shares["none"]:
        found.append(f"{shares['none']:.1%} of the rows have no label")
    return found


def _counts(table: pa.Table) -> dict[str, int]:
    distinct = lambda name: len(table[name].unique())
    return {"rows": len(table), "queries": distinct("query_id"),
            "pictures": distinct("canonical_id"), "domains": distinct("domain")}  # fmt: skip


def _overlap(a: pa.Table, b: pa.Table, key: str) -> int:
    return len(set(a[key].to_pylist()) & set(b[key].to_pylist()))


def _label_shares(table: pa.Table) -> dict[str, float]:
    kinds = table["label"].to_pylist()
    total = max(len(kinds), 1)
    return {GOLD: kinds.count(GOLD) / total, SILVER: kinds.count(SILVER) / total,
            "none": kinds.count(None) / total}  # fmt: skip


def near_duplicates(tables: dict[str, pa.Table], examples: int = 5) -> dict[str, Any]:
    """Pairs of different pictures in different splits whose image embeddings nearly coincide.

    `pairs` is None, with a reason, where no picture of a split has an embedding.
    """
    pictures = {name: _unit_pictures(table) for name, table in tables.items()}
    blind = [name for name, (ids, _) in pictures.items() if len(tables[name]) and not len(ids)]
    if blind:
        every = len(blind) == sum(len(table) > 0 for table in tables.values())
        why = UNSEEN if every else f"{UNSEEN} in {', '.join(blind)}"
        return {"pairs": None, "why": why, "examples": []}
    count, closest = 0, []
    for a, b in itertools.combinations(pictures, 2):
        (ids_a, unit_a), (ids_b, unit_b) = pictures[a], pictures[b]
        for start in range(0, len(ids_a), 1024):  # blocks: memory stays bounded
            cosine = unit_a[start : start + 1024] @ unit_b.T
            cosine[ids_a[start : start + 1024, None] == ids_b[None, :]] = 0
            count += int((cosine > NEAR_DUPLICATE).sum())
            for at in np.argsort(-cosine, axis=None)[:examples]:
                i, j = np.unravel_index(at, cosine.shape)
                if cosine[i, j] > NEAR_DUPLICATE:
                    closest.append({a: ids_a[start + i], b: ids_b[j], "cosine": float(cosine[i, j])})
    return {"pairs": count, "examples": sorted(closest, key=lambda pair: -pair["cosine"])[:examples]}


def _unit_pictures(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Ids and unit embeddings of the distinct (canonical_id, id) of a split."""
    if not len(table):
        return np.array([]), np.zeros((0, table["image_embedding"].type.list_size), np.float32)
    names = np.array(list(zip(*(table[k].to_pylist() for k in ("canonical_id", "id")), strict=True)))
    _, first = np.unique(names, axis=0, return_index=True)
    vectors = embedding_matrix(table.take(first), "image_embedding")
    there = ~np.isnan(vectors).any(axis=1)
    vectors = vectors[there]
    return names[first[there], 0], vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def label_leakage(table: pa.Table) -> dict[str, str]:
    """The single features that determine y, each with how: by order, or by value."""
    y = numbers(table, "y")
    found = {}
    for name in ATTRIBUTES:
        x = numbers(table, name)
        known = ~(np.isnan(x) | np.isnan(y))
        if how := _determines(x[known], y[known]):
            found[name] = how
    return found


def _determines(x: np.ndarray, y: np.ndarray) -> str | None:
    """Whether y is a monotone function of x, or is fixed by x wherever a value of x recurs."""
    if len(np.unique(y)) < 2 or len(np.unique(x)) < 2:
        return None
    group = np.unique(x, return_inverse=True)[1]
    count = np.bincount(group)
    mean = np.bincount(group, y) / count
    total = float(np.var(y)) * len(y)
    for increasing in (True, False):
        fit = isotonic_regression(mean, weights=count, increasing=increasing).x
        if 1 - np.sum((y - fit[group]) ** 2) / total >= DETERMINED:
            return "y rises with it" if increasing else "y falls with it"
    again = count[group] > 1
    if again.mean() < 0.5 or len(np.unique(y[again])) < 2:
        return None
    within = np.sum((y - mean[group])[again] ** 2)
    spread = float(np.var(y[again])) * again.sum()
    return "each value of it has one y" if 1 - within / spread >= DETERMINED else None
