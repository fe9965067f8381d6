"""What a version remembers of the data it was registered with, and how far a later run is from it.

Candidates of one query hang together, and so do pictures that recur, so two samples of one population
lie further apart than independent rows would.  How far is measured: the reference is split again and
again into two parts that share neither a query nor a picture.
"""

from typing import Any, NamedTuple

import msgspec
import numpy as np
from scipy.special import rel_entr
from scipy.stats import f

from cotrr.data.contract import ATTRIBUTES
from cotrr.data.lists import Lists
from cotrr.data.rows import explain
from cotrr.errors import InputError
from cotrr.ranker.calibrators import Scored

FORMAT = 1
POINTS = 51  # that stand for a sample; a smaller one is kept as it is
BINS = 10  # at most, of equal shares of the reference
FEWEST = 5  # queries with a value, for a spread between them
SPLITS = 100
SAME = 1e-6  # of the largest value: a smaller spread is rounding
SCORES = ("rerank_score", "p_conflict")
EMBEDDINGS = ("image_embedding", "text_embedding")  # only whether they are there


class Null(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A squared distance between parts of the reference, over 1/n + 1/m of their numbers of queries."""

    mean: float
    sd: float
    freedom: float  # degrees of freedom that the mean was estimated with

    def limit(self, queries: int, others: int, level: float) -> float:
        """What it stays below with probability `level`, of `queries` here and `others` in a new run.

        A quadratic form of normal variables is a scaled χ² (Satterthwaite 1946), and its scale was
        itself estimated, which makes the ratio an F.
        """
        own = 2 * self.mean**2 / self.sd**2 if self.sd > 0 else np.inf
        return self.mean * (1 / queries + 1 / others) * float(f.isf(1 - level, own, self.freedom))


class Feature(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One number of every candidate, in a domain or over all."""

    queries: int  # with a value
    candidates: int  # with a value
    missing: float  # share of the candidates
    missing_sd: float  # between queries, of their share
    mean: float | None = None
    sd: float | None = None
    unit: float | None = None  # of distances: the sd over all domains, as a domain's own may be tiny
    points: list[float] = []  # at most POINTS values of equal weight that stand for all
    edges: list[float] = []  # upper ends of all bins but the last
    shares: list[float] = []  # of the bins
    wasserstein: Null | None = None  # of the square, in squared units
    jensen_shannon: Null | None = None  # in bits
    why: str = ""  # there is no distance


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The queries of a domain, or all."""

    queries: int
    features: dict[str, Feature]


class Reference(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`reference.json` of a version."""

    format: int
    overall: Part
    domains: dict[str, Part]

    @property
    def parts(self) -> dict[str, Part]:
        """All parts by domain; "" is over all."""
        return {"": self.overall, **self.domains}


class Drift(NamedTuple):
    """Distances of a new sample from the reference, and what they stay below where nothing changed."""

    wasserstein: float  # W1, in units of the feature
    wasserstein_limit: float
    jensen_shannon: float  # bits
    jensen_shannon_limit: float
    psi: float  # bias-corrected; told, and never judged by


def columns(lists: Lists, scored: Scored) -> dict[str, np.ndarray]:
    """[Q, n] numbers by name, NaN where missing; of an embedding only whether it is there, as 1."""
    there = {"image_embedding": lists.image, "text_embedding": lists.text[:, None]}
    shape = lists.where.shape
    found = {name: lists.attributes[..., i].astype(float) for i, name in enumerate(ATTRIBUTES)}
    found |= dict(zip(SCORES, (scored.score, scored.p_conflict), strict=True))
    for name, vectors in there.items():
        known = np.isfinite(vectors).all(axis=-1) & (vectors.shape[-1] > 0)
        found[name] = np.broadcast_to(np.where(known, 1.0, np.nan), shape)
    return {name: np.where(lists.where & np.isfinite(part), part, np.nan) for name, part in found.items()}


def sketch(
    lists: Lists, scored: Scored, canonical_id: np.ndarray | None = None, seed: int = 0
) -> dict[str, Any]:
    """`Reference` as plain data, of lists that the model has not learned from and its scores of them.

    `canonical_id` [rows of the lists' table] says which pictures are of one shoot; without it only
    pictures of one embedding are known to be the same, and limits are too narrow where shoots matter.
    """
    found, rng, domain = columns(lists, scored), np.random.default_rng(seed), lists.domain.astype(str)
    parts = {name: domain == name for name in sorted(set(domain))}
    units = {name: _sd(values[~np.isnan(values)]) for name, values in found.items()}
    picture = _pictures(lists) if canonical_id is None else _shoots(lists, canonical_id)

    def part(chosen: np.ndarray) -> Part:
        where = lists.where[chosen]
        halves = _halves(np.nonzero(where)[0], picture[chosen][where], rng)
        features = {name: _feature(values[chosen], where, halves, units[name])
                    for name, values in found.items()}  # fmt: skip
        return Part(int(chosen.sum()), features)

    everything = part(np.ones(len(domain), bool))
    made = Reference(FORMAT, everything, {name: part(chosen) for name, chosen in parts.items()})
    return msgspec.to_builtins(made)


def read(content: bytes, name: object = "reference.json") -> Reference:
    """The reference in a file; raises InputError where it is none."""
    try:
        found = msgspec.json.decode(content, type=Reference)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        reason, field = explain(error)
        raise InputError(reason, file=name, field=field) from None
    if found.format != FORMAT:
        raise InputError(f"format {found.format}, not {FORMAT}", file=name, field="format")
    return found


def drift(feature: Feature, values: np.ndarray, level: float) -> Drift | str:
    """Distances of values [Q, n] (NaN: missing) from a feature, or in words why there are none."""
    queries, values = int((~np.isnan(values)).any(axis=1).sum()), values[~np.isnan(values)]
    if feature.wasserstein is None or feature.jensen_shannon is None or not feature.unit:
        return feature.why or "the reference has no distances"
    if queries < FEWEST:
        return f"{queries} of at least {FEWEST} queries have a value"
    shares = bin_shares(values, np.array(feature.edges))
    reference, limit = np.array(feature.shares), (feature.queries, queries, level)
    return Drift(
        wasserstein(np.array(feature.points), values) / feature.unit,
        float(np.sqrt(feature.wasserstein.limit(*limit))),
        float(jensen_shannon(reference, shares)),
        feature.jensen_shannon.limit(*limit),
        stability_index(reference, shares, feature.candidates, len(values)),
    )


def wasserstein(first: np.ndarray, second: np.ndarray) -> float:
    """W1 of two samples in their own unit: the area between their distribution functions.

    >>> wasserstein(np.array([0.0, 1.0]), np.array([3.0]))
    2.5
    """
    points = np.sort(np.concatenate([first, second]))
    below = lambda sample: np.searchsorted(np.sort(sample), points[:-1], side="right") / len(sample)
    return float(np.abs(below(first) - below(second)) @ np.diff(points))


def jensen_shannon(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """[...] divergence in bits, in [0, 1], of shares [..., K] (Lin 1991)."""
    middle = (p + q) / 2
    bits = (rel_entr(p, middle) + rel_entr(q, middle)).sum(axis=-1) / (2 * np.log(2))
    return np.clip(bits, 0.0, 1.0)


def stability_index(p: np.ndarray, q: np.ndarray, n: int, m: int) -> float:
    """PSI of shares [K] of samples of n and m, less what these differ by chance; never below 0.

    Half a count is added to each bin; chance alone gives (K − 1)(1/n + 1/m) (Yurdakul 2018).
    """
    bins = len(p)
    p, q = ((share * size + 0.5) / (size + bins / 2) for share, size in ((p, n), (q, m)))
    return max(float((p - q) @ np.log(p / q)) - (bins - 1) * (1 / n + 1 / m), 0.0)


def bin_shares(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """[K + 1] shares of values [N] in the bins that end at edges [K], each end inside its bin."""
    return np.bincount(np.searchsorted(edges, values), minlength=len(edges) + 1) / len(values)


def missing_share(values: np.ndarray, where: np.ndarray) -> tuple[float, float]:
    """Share of the candidates of [Q, n] without a value, and the sd between queries of their share."""
    by_query = (np.isnan(values) & where).sum(axis=1)[where.any(axis=1)] / where.sum(axis=1)[
        where.any(axis=1)
    ]
    share = (np.isnan(values) & where).sum() / max(where.sum(), 1)
    return float(share), float(np.std(by_query, ddof=1)) if len(by_query) > 1 else 0.0


def _sd(values: np.ndarray) -> float:
    """The standard deviation; 0 where it is rounding, or there are no values."""
    sd = float(values.std()) if len(values) else 0.0
    return sd if sd > SAME * np.abs(values).max(initial=0.0) else 0.0


def _feature(values: np.ndarray, where: np.ndarray, halves: np.ndarray, unit: float) -> Feature:
    """The sketch of values [Q, n]; `halves` [2, SPLITS, N] marks the rows of either part of each split."""
    there = ~np.isnan(values[where])
    rows, queries = values[where][there], int((~np.isnan(values)).any(axis=1).sum())
    base = (queries, len(rows), *missing_share(values, where))
    if not len(rows):
        return Feature(*base, why="missing everywhere in the reference")
    points, inner = _quantiles(rows, POINTS), np.unique(_quantiles(rows, BINS + 1)[1:-1])
    edges, sd = inner[inner < rows.max()], _sd(rows)
    told = dict(mean=float(rows.mean()), sd=sd, unit=unit, points=points.tolist(), edges=edges.tolist(),
                shares=bin_shares(rows, edges).tolist())  # fmt: skip
    if not sd:
        return Feature(*base, **told, why="constant in the reference")
    if queries < FEWEST:
        return Feature(*base, **told, why=f"{queries} of at least {FEWEST} queries have a value")
    area, bits = _null(rows, halves[..., there], points, edges)
    scale = queries / 4  # the inverse of 1/n + 1/m, with half of the queries on either side
    freedom = _freedom(np.nansum(values - rows.mean(), axis=1), queries)
    null = lambda squares: Null(float(squares.mean() * scale), float(squares.std() * scale), freedom)
    return Feature(*base, **told, wasserstein=null((area / unit) ** 2), jensen_shannon=null(bits))


def _freedom(residuals: np.ndarray, queries: int) -> float:
    """Degrees of freedom of a variance from [Q] residuals, few where few queries make up most of it.

    2 / (relative variance of the variance), by moments; n for normal residuals.
    """
    squares = residuals**2
    return float(np.clip(3 * squares.sum() ** 2 / (squares**2).sum(), 1.0, queries - 1.0))


def _quantiles(values: np.ndarray, count: int) -> np.ndarray:
    """At most `count` values of the sample that stand for equal shares of it, in order."""
    ordered = np.sort(values)
    if len(ordered) <= count:
        return ordered
    return ordered[((np.arange(count) + 0.5) / count * len(ordered)).astype(int)]


def _null(
    rows: np.ndarray, halves: np.ndarray, points: np.ndarray, edges: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """[S] W1 and Jensen–Shannon between the parts of each split; W1 on the grid of the points."""
    grid = np.unique(np.concatenate([points, edges, [rows.min(), rows.max()]]))
    cell = np.searchsorted(grid, rows)
    inside = np.zeros((len(rows), len(grid)), np.float32)
    inside[np.arange(len(rows)), cell] = 1
    counts = halves.astype(np.float32) @ inside  # [2, S, K]
    counts = counts[:, (counts.sum(axis=-1) > 0).all(axis=0)]
    shares = counts / counts.sum(axis=-1, keepdims=True, dtype=float)
    below = np.cumsum(shares, axis=-1)
    area = np.abs(below[0] - below[1])[:, :-1] @ np.diff(grid)
    ends = below[..., np.searchsorted(grid, edges)]
    binned = np.diff(ends, axis=-1, prepend=0.0, append=1.0)
    return area, jensen_shannon(*np.maximum(binned, 0.0))


def _halves(query: np.ndarray, picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """[2, SPLITS, N] bool: rows whose query and picture both fall on the first, or the second, side."""

    def side(group: np.ndarray) -> np.ndarray:
        group = np.unique(group, return_inverse=True)[1]
        order = np.tile(np.arange(group.max(initial=-1) + 1) % 2, (SPLITS, 1))
        return rng.permuted(order, axis=1)[:, group] == 1

    queries, pictures = side(query), side(picture)
    return np.stack([queries & pictures, ~queries & ~pictures])


def _shoots(lists: Lists, canonical_id: np.ndarray) -> np.ndarray:
    """[Q, n] a number for each distinct canonical_id."""
    return np.unique(canonical_id.astype(str), return_inverse=True)[1][lists.row]


def _pictures(lists: Lists) -> np.ndarray:
    """[Q, n] a number for each distinct image embedding; a candidate without one is its own picture."""
    alone = np.arange(lists.where.size).reshape(lists.where.shape)
    known = lists.where & np.isfinite(lists.image).all(axis=-1) & (lists.image.shape[-1] > 0)
    if not known.any():
        return alone
    vectors = np.ascontiguousarray(lists.image[known])
    same = np.unique(vectors.view(f"V{vectors.dtype.itemsize * vectors.shape[1]}"), return_inverse=True)[1]
    alone[known] = lists.where.size + same.ravel()
    return alone
