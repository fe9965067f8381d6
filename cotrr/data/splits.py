"""Splits without leakage: a keyed hash sends each picture and each query to one split."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from cotrr.errors import InputError

SPLITS = ("train", "validation", "test")
DROPPED = -1
METHODS = ("auto", "strict", "components")
# Components are "small enough" when the largest holds at most this share of the rows: then the
# realised fractions stay close to the wanted ones.
LARGEST_COMPONENT = 0.05


def unit_hash(kind: str, ids: Iterable[str], salt: str) -> np.ndarray:
    """[N] float64 in [0, 1): a keyed blake2b hash, the same on every machine and in any order."""
    key = hashlib.blake2b(salt.encode(), digest_size=32).digest()
    digest = lambda item: hashlib.blake2b(
        item.encode(), digest_size=8, key=key, person=kind.encode()[:16]
    ).digest()
    words = np.frombuffer(b"".join(map(digest, ids)), ">u8")
    return (words >> 11).astype(np.float64) / 2.0**53


def choose(unit: np.ndarray, fractions: Sequence[float]) -> np.ndarray:
    """[N] index of the part that each number in [0, 1) falls into; parts have the given sizes."""
    return np.searchsorted(np.cumsum(fractions)[:-1], unit, side="right")


def parse_fractions(words: Sequence[str]) -> tuple[float, ...]:
    """Train, validation and test shares, each ≥ 0, adding up to 1; raises InputError otherwise."""
    try:
        shares = tuple(float(word) for word in words)
    except ValueError:
        shares = ()
    if len(shares) != 3 or not (min(shares) >= 0 and abs(sum(shares) - 1) < 1e-6):
        raise InputError(
            f"--fractions={','.join(words)}: expected train,validation,test, each at least 0, "
            "adding up to 1, e.g. 0.7,0.15,0.15"
        )
    return shares


def split_rows(
    query_ids: pa.ChunkedArray,
    canonical_ids: pa.ChunkedArray,
    fractions: Sequence[float],
    salt: str,
    method: str = "auto",
) -> tuple[np.ndarray, dict[str, Any]]:
    """[N] split of each row (index into SPLITS, or DROPPED) and what the choice cost.

    `strict` hashes queries and pictures apart and drops a row whose two splits differ;
    `components` keeps connected components of shared queries and pictures whole and drops nothing;
    `auto` takes components where all of them are small, else strict.
    """
    queries, query = _numbered(query_ids)
    pictures, picture = _numbered(canonical_ids)
    component = components(query, picture)
    largest = float(np.bincount(component).max() / len(query))
    if method == "auto":
        method = "components" if largest <= LARGEST_COMPONENT else "strict"
    unit = unit_hash("canonical_id", pictures, salt)
    if method == "components":
        # A component goes where its smallest hash goes: independent of the order of rows.
        smallest = np.full(component.max() + 1, np.inf)
        np.minimum.at(smallest, component, unit[picture])
        # The smallest of n uniform numbers is not uniform: hash it once more.
        split = choose(unit_hash("component", [f"{u:.17g}" for u in smallest], salt), fractions)[component]
    else:
        by_query = choose(unit_hash("query_id", queries, salt), fractions)[query]
        by_picture = choose(unit, fractions)[picture]
        split = np.where(by_query == by_picture, by_query, DROPPED)
    dropped = int((split == DROPPED).sum())
    return split, {
        "method": method,
        "fractions": list(fractions),
        "salt": salt,
        "rows_dropped": dropped,
        "share_dropped": dropped / len(split),
        "largest_component_share": largest,
    }


def _numbered(ids: pa.ChunkedArray) -> tuple[list[str], np.ndarray]:
    """The distinct ids, and for each row [N] which it has."""
    column = ids.dictionary_encode().unify_dictionaries().combine_chunks()
    return column.dictionary.to_pylist(), column.indices.to_numpy()


def components(query: np.ndarray, picture: np.ndarray) -> np.ndarray:
    """[N] connected component of each row in the bipartite graph of queries and pictures, numbered from 0."""
    queries = int(query.max(initial=-1)) + 1
    nodes = queries + int(picture.max(initial=-1)) + 1
    edges = coo_array((np.ones(len(query), np.int8), (query, queries + picture)), (nodes, nodes))
    return connected_components(edges.tocsr(), directed=False)[1][query]
