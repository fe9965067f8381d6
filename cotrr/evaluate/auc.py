"""The pooled AUC under resampling: exact weighted counts of the pairs that are ordered rightly."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cotrr.compilation import WIDE
from cotrr.evaluate import bootstrap
from cotrr.evaluate.bootstrap import Draw, all_weights, counts, over_devices

PAIRED = 512  # units: up to here their matrix of pairs is cheaper than a pass over the items
UNROLLED = 64  # items in one unrolled step of such a pass: their counts stay exact in float32


class Items(NamedTuple):
    """N labelled candidates by ascending score, made ready for `weighted_wins`.

    The negatives of a run of equal scores that holds both classes stand half before its positives
    and half behind them: so a tie counts one half.
    """

    unit: np.ndarray  # [N] int32
    negative: np.ndarray  # [N] float32: 0, ½ or 1
    positive: np.ndarray  # [N] float32: 0 or 1


def sort_items(unit: np.ndarray, score: np.ndarray, positive: np.ndarray) -> Items:
    """Sorts candidates of the given units [N], scores [N] and classes [N] bool, once for all replicates."""
    _, run = np.unique(score, return_inverse=True)
    both = (np.bincount(run, positive) > 0) & (np.bincount(run, ~positive) > 0)
    tied = both[run] & ~positive
    # Within a run: first halves of the negatives, positives, second halves.
    order = np.lexsort((np.r_[np.where(tied, 0, 1), np.full(tied.sum(), 2)], np.r_[run, run[tied]]))
    negative = np.r_[np.where(positive, 0.0, np.where(tied, 0.5, 1.0)), np.full(tied.sum(), 0.5)]
    twice = lambda values, second: np.r_[values, second][order]
    return Items(
        twice(unit, unit[tied]).astype(np.int32),
        negative[order].astype(np.float32),
        twice(positive, np.zeros(tied.sum())).astype(np.float32),
    )


def weighted_wins(draw: Draw, items: Items) -> np.ndarray:
    """[B] pairs in which a positive candidate outscores a negative one, ties ½, weighted and exact.

    Divided by (weighted positives · weighted negatives) they are the AUC of each replicate.
    """
    if draw.small and draw.units <= PAIRED:
        drawn = all_weights(draw, counts).astype(np.float64)
        return np.einsum("bu,bu->b", drawn @ pair_wins(items, draw.units), drawn)
    columns = min(256, draw.resamples)
    # A GPU wants many blocks at once, a CPU none that leave its cache.
    width = UNROLLED * (1 if bootstrap.on_cpu() else 1024)
    padded = [
        np.pad(part, (0, -len(part) % width)).reshape(-1, width // UNROLLED, UNROLLED) for part in items
    ]
    program = partial(_win_chunk, jnp.uint32(draw.seed), units=draw.units, rows=columns)
    return np.concatenate(over_devices(program, draw.resamples, columns, tuple(padded)))


@partial(jax.jit, static_argnames=("units", "rows"), compiler_options=WIDE)
def _win_chunk(
    seed: jax.Array,
    start: jax.Array,
    unit: jax.Array,
    negative: jax.Array,
    positive: jax.Array,
    *,
    units: int,
    rows: int,
) -> jax.Array:
    """[rows] float64 weighted wins of the replicates from `start` on; items are [steps, m, block].

    Inside a block float32 is exact; what lies below the block is added in float64.
    """
    drawn = counts(jnp, seed, start + jnp.arange(rows, dtype=jnp.uint32), units).astype(jnp.float32).T

    def step(carry: tuple[jax.Array, jax.Array], items: tuple) -> tuple:
        below, wins = carry
        unit, negative, positive = items
        weight = drawn[unit]  # [m, block, rows]
        inside = won = winners = jnp.zeros((len(unit), rows), jnp.float32)
        for i in range(unit.shape[1]):
            inside = inside + negative[:, i, None] * weight[:, i]
            ups = positive[:, i, None] * weight[:, i]
            won, winners = won + ups * inside, winners + ups
        inside = inside.astype(jnp.float64)
        under = below[None] + jnp.cumsum(inside, axis=0) - inside
        wins = wins + jnp.sum(won.astype(jnp.float64) + winners.astype(jnp.float64) * under, axis=0)
        return (below + jnp.sum(inside, axis=0), wins), None

    nothing = jnp.zeros(rows, jnp.float64)
    (_, wins), _ = jax.lax.scan(step, (nothing, nothing), (unit, negative, positive))
    return wins


def pair_wins(items: Items, units: int) -> np.ndarray:
    """[U, U] float64 wins of the positives of one unit over the negatives of another.

    The weighted wins are a quadratic form of the counts with this matrix.  Below a block of items
    whole histograms are multiplied; inside it pairs are counted.
    """
    pad = -len(items.unit) % UNROLLED
    unit, negative, positive = (
        np.pad(part, (0, pad)).reshape(-1, UNROLLED).astype(np.float64) for part in items
    )
    unit = unit.astype(np.int64)
    place = np.arange(len(unit))[:, None] * units + unit
    of = lambda weight: np.bincount(place.ravel(), weight.ravel(), len(unit) * units).reshape(-1, units)
    negatives = of(negative)
    won = of(positive).T @ (np.cumsum(negatives, axis=0) - negatives)
    earlier = np.tri(UNROLLED)
    for start in range(0, len(unit), 256):  # so that the pairs of few blocks are held at once
        u, n, p = (part[start : start + 256] for part in (unit, negative, positive))
        pairs = (p[:, :, None] * n[:, None] * earlier[None]).ravel()
        won += np.bincount((u[:, :, None] * units + u[:, None]).ravel(), pairs, units**2).reshape(
            units, units
        )
    return won


def wins_without(items: Items, units: int) -> np.ndarray:
    """[U] float64 wins (ties ½) among the items of all other units: the jackknife of the AUC."""
    items = items._replace(
        negative=items.negative.astype(np.float64), positive=items.positive.astype(np.float64)
    )
    below, above = np.cumsum(items.negative), items.positive.sum() - np.cumsum(items.positive)
    total = lambda weight: np.bincount(items.unit, weight, minlength=units)
    lost = total(items.positive * below) + total(items.negative * above)
    # Pairs inside a unit were counted from both sides.
    order = np.argsort(items.unit, kind="stable")
    unit, negative = items.unit[order], items.negative[order]
    before = np.r_[0.0, np.cumsum(np.bincount(unit, negative, minlength=units))][unit]
    inside = np.bincount(unit, items.positive[order] * (np.cumsum(negative) - before), minlength=units)
    return float(items.positive @ below) - lost + inside
