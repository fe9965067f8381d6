"""The data certificate: what was counted, and every leak that was looked for, on what was written."""

import collections
import contextlib
import hashlib
import heapq
import itertools
import pathlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.optimize import isotonic_regression

from cotrr import files
from cotrr.data.contract import ATTRIBUTES
from cotrr.data.labels import GOLD, SILVER, numbers
from cotrr.data.rows import EMBEDDINGS, embedding_matrix
from cotrr.data.splits import SPLITS

KEYS = ("canonical_id", "query_id")  # that no two splits may share
NEAR_DUPLICATE = 0.98  # cosine between image embeddings of different pictures
UNASKED = "not looked for: --nonear_duplicates"
UNSEEN = "not looked for: no picture has an embedding"
DETERMINED = 0.999  # share of y's variance that one feature may not explain
BLOCK = 1024  # pictures of either split that are compared at once: bounds memory
_WORDS = ("query_id", "canonical_id", "domain", "label")  # recur, so they are held as numbers
_COLUMNS = (*_WORDS, *ATTRIBUTES, "y")


def certify(
    splits: Mapping[str, Iterable[pa.Table]],
    dropped: int,
    settings: dict[str, Any],
    summary: dict[str, Any],
    *,
    near_duplicates: bool = True,
    folder: str | pathlib.Path | None = None,
) -> dict[str, Any]:
    """The certificate of a dataset given as the tables of each split; `dropped` rows went to no split.

    Tables are read one after another: of a row some 150 bytes stay in memory, of each picture its ids and,
    in a file without a name in `folder`, its embedding.
    """
    with contextlib.ExitStack() as stack:
        aside = lambda: Pictures(stack.enter_context(tempfile.TemporaryFile(dir=folder)), near_duplicates)
        read = {name: _read(tables, aside()) for name, tables in splits.items()}
        pictures = {name: split.pictures for name, split in read.items() if len(split.table)}
        near = compare(pictures) if near_duplicates else {"pairs": None, "why": UNASKED, "examples": []}
    everything = pa.concat_tables(split.table for split in read.values()).unify_dictionaries()
    rows = max(len(everything), 1)
    missing = lambda name: sum(split.missing[name] for split in read.values()) / rows
    return {
        "counts": {name: _counts(split) for name, split in read.items()},
        "rows_read": len(everything) + dropped,
        "rows_dropped": dropped,
        "overlap": {
            key: {f"{a}/{b}": _overlap(read[a].table, read[b].table, key)
                  for a, b in itertools.combinations(read, 2)}
            for key in KEYS
        },
        "near_duplicates": {"cosine_above": NEAR_DUPLICATE} | near,
        "label_leakage": label_leakage(everything),
        "missing": {name: float(np.isnan(numbers(everything, name)).mean()) for name in ATTRIBUTES}
        | {name: missing(name) for name in (*EMBEDDINGS, "constraints")},
        "labels": _label_shares(everything),
        "settings": settings,
        "settings_hash": files.digest({k: v for k, v in settings.items() if k != "split"}),
        "input": summary,
    }  # fmt: skip


class _Split(NamedTuple):
    """What is kept of a split that was read."""

    table: pa.Table  # _COLUMNS
    missing: collections.Counter[str]  # rows without an embedding, or constraints
    pictures: "Pictures"


def _read(tables: Iterable[pa.Table], pictures: "Pictures") -> _Split:
    kept: list[pa.Table] = []
    missing: collections.Counter[str] = collections.Counter()
    for table in tables:
        missing.update({name: table[name].null_count for name in (*EMBEDDINGS, "constraints")})
        pictures.add(table)
        columns = {name: table[name].dictionary_encode() if name in _WORDS else table[name]
                   for name in _COLUMNS}  # fmt: skip
        _append(kept, pa.table(columns))
    return _Split(pa.concat_tables(kept).unify_dictionaries(), missing, pictures)


def _append(kept: list[pa.Table], table: pa.Table) -> None:
    """Puts a table behind others, which grow together: many small ones would take more than their rows."""
    kept.append(table)
    while len(kept) > 1 and len(kept[-1]) >= len(kept[-2]):
        kept[-2:] = [pa.concat_tables(kept[-2:]).unify_dictionaries().combine_chunks()]


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


def _counts(split: _Split) -> dict[str, int]:
    distinct = lambda name: len(split.table[name].unique())
    return {"rows": len(split.table), "queries": distinct("query_id"),
            "pictures": distinct("canonical_id"), "domains": distinct("domain")}  # fmt: skip


def _overlap(a: pa.Table, b: pa.Table, key: str) -> int:
    return len(set(a[key].unique().to_pylist()) & set(b[key].unique().to_pylist()))


def _label_shares(table: pa.Table) -> dict[str, float]:
    counts = {row["values"]: row["counts"] for row in pc.value_counts(table["label"]).to_pylist()}
    return {name: counts.get(kind, 0) / max(len(table), 1)
            for name, kind in ((GOLD, GOLD), (SILVER, SILVER), ("none", None))}  # fmt: skip


class Pictures:
    """Unit embeddings of distinct (canonical_id, id), in a file: they may be more than memory holds."""

    def __init__(self, file: BinaryIO, wanted: bool = True) -> None:
        self.ids: list[str] = []  # canonical
        self._seen: set[int] = set()  # hashes
        self._file, self._wanted, self._dim = file, wanted, 0

    def add(self, table: pa.Table) -> None:
        """Takes those pictures of a table that have an embedding and were not there before, if wanted."""
        if not self._wanted:
            return
        there = np.flatnonzero(table["image_embedding"].is_valid().to_numpy())
        keys = zip(*(table[name].take(there).to_pylist() for name in ("canonical_id", "id")), strict=True)
        new = []
        for row, key in zip(there, keys, strict=True):
            known = int.from_bytes(hashlib.blake2b("\0".join(key).encode(), digest_size=8).digest())
            if known not in self._seen:
                self._seen.add(known)
                self.ids.append(key[0])
                new.append(row)
        if new:
            vectors = embedding_matrix(table.select(["image_embedding"]).take(new), "image_embedding")
            self._dim = vectors.shape[1]
            self._file.write((vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).data)

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """The vectors [≤ BLOCK, d], each block with the number of its first."""
        for start in range(0, len(self.ids), BLOCK):
            count = min(BLOCK, len(self.ids) - start)
            self._file.seek(4 * self._dim * start)
            found = np.frombuffer(self._file.read(4 * self._dim * count), np.float32)
            yield start, found.reshape(count, self._dim)


def compare(splits: dict[str, Pictures], examples: int = 5) -> dict[str, Any]:
    """Pairs of different pictures in different splits whose image embeddings nearly coincide.

    `pairs` is None, with a reason, where no picture of a split has an embedding.  Every picture of a
    split is compared with every one of the others.
    """
    blind = [name for name, pictures in splits.items() if not pictures.ids]
    if blind:
        why = UNSEEN if len(blind) == len(splits) else f"{UNSEEN} in {', '.join(blind)}"
        return {"pairs": None, "why": why, "examples": []}
    count, closest = 0, []
    for a, b in itertools.combinations(splits, 2):
        for cosine, one, other in _close(splits[a], splits[b]):
            count += len(cosine)
            found = [{a: one[i], b: other[i], "cosine": float(cosine[i])}
                     for i in np.argsort(-cosine, kind="stable")[:examples]]  # fmt: skip
            closest = heapq.nlargest(examples, closest + found, key=lambda pair: pair["cosine"])
    return {"pairs": count, "examples": closest}


def _close(a: Pictures, b: Pictures) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Cosines, and the ids of both pictures, of all pairs that nearly coincide, block by block."""
    ids_a, ids_b = np.array(a.ids, object), np.array(b.ids, object)
    for first, mine in a.blocks():
        for second, theirs in b.blocks():
            cosine = mine @ theirs.T
            i, j = np.nonzero(cosine > NEAR_DUPLICATE)
            one, other = ids_a[first + i], ids_b[second + j]
            apart = one != other
            yield cosine[i, j][apart], one[apart], other[apart]


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
