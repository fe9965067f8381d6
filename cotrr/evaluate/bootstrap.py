"""Resampling with exact sums: how often each unit is drawn, and what is summed by it.

A unit is a query or a cluster of queries; U units, B replicates.  How often replicate b draws unit u
depends on (seed, b, u) alone, so all metrics, systems and slices are resampled together and their
differences are paired.  Values are held as whole numbers of three 11-bit digits: every sum is a
whole number that float32 holds exactly, so NumPy and JAX, any chunk and any number of devices give
the same bits.  `xp` is `numpy` or `jax.numpy`: both run the same code.
"""

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import poisson

from cotrr.compilation import WIDE

SPREAD = 3.5  # deviations that the Poisson total is kept below U
DIGITS, BITS = 3, 11  # a value is a whole number of 2^-33 of its column's size
BLOCK = 4096  # units: so many digits, each drawn twice on average, still add up to less than 2^24
SMALL = 2**21  # counts: up to here NumPy is done before a compiler would be
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_FLIPS = 2**31  # stream of `flips`; even streams are Poisson counts by attempt, 1 their top-up


class Draw(NamedTuple):
    """B resamples of U units; `backend` is numpy, jax, or auto: NumPy where the work is small."""

    seed: int
    resamples: int
    units: int
    backend: str = "auto"

    @property
    def small(self) -> bool:
        """Whether NumPy does the work."""
        if self.backend != "auto":
            return self.backend == "numpy"
        return self.resamples * self.units <= SMALL


Weights = Callable[[Any, Any, Any, int], Any]  # (xp, seed, replicates [c], units) → [c, U] int32


def threefry(xp: Any, key: tuple[Any, ...], x0: Any, x1: Any) -> tuple[Any, Any]:
    """Two random uint32 words of the counters `x0`, `x1`: Threefry-2x32-20 (Salmon et al. 2011).

    All are uint32 arrays, so that additions wrap.
    """
    keys = (*key, key[0] ^ key[1] ^ xp.uint32(0x1BD11BDA))
    x0, x1 = x0 + keys[0], x1 + keys[1]
    for turn in range(5):
        for rotation in _ROTATIONS[turn % 2]:
            x0 = x0 + x1
            x1 = x0 ^ ((x1 << xp.uint32(rotation)) | (x1 >> xp.uint32(32 - rotation)))
        x0 = x0 + keys[(turn + 1) % 3]
        x1 = x1 + (keys[(turn + 2) % 3] + xp.uint32(turn + 1))
    return x0, x1


def _words(xp: Any, seed: Any, stream: Any, replicates: Any, width: int) -> Any:
    """[c, width] uint32, each from its own (seed, stream, replicate, column)."""
    row = xp.asarray(replicates, xp.uint32)[:, None]
    column = xp.arange(-(-width // 2), dtype=xp.uint32)[None]
    key = tuple(xp.zeros((1, 1), xp.uint32) + xp.uint32(part) for part in (seed, stream))
    pair = threefry(xp, key, column + xp.zeros_like(row), row + xp.zeros_like(column))
    return xp.concatenate(pair, axis=1)[:, :width]


def counts(xp: Any, seed: Any, replicates: Any, units: int) -> Any:
    """[c, U] int32: how often each replicate draws each unit, exact multinomial counts.

    Independent Poisson counts of a total just below U are multinomial given their total; what is
    missing is drawn one by one.  A row whose total is off by too much (once in 10^4) is drawn anew.
    """
    rate = max(0.0, 1 - SPREAD / math.sqrt(units))
    extra = min(units, math.ceil(2 * SPREAD * math.sqrt(units)))
    law = np.ceil(poisson(rate).cdf(np.arange(40)) * 2.0**32) if rate else np.array([2.0**32])
    limits = law[law < 2**32].astype(np.uint32)

    def attempt(number: Any) -> Any:
        words = _words(xp, seed, 2 * number, replicates, units) if len(limits) else None
        count = xp.zeros((len(replicates), units), xp.int32)
        for limit in limits:
            count = count + (words >= limit).astype(xp.int32)
        return count

    def unfit(count: Any) -> Any:
        missing = units - count.sum(axis=1)
        return (missing < 0) | (missing > extra)

    def redo(state: tuple[Any, Any]) -> tuple[Any, Any]:
        count, number = state
        return xp.where(unfit(count)[:, None], attempt(number), count), number + xp.uint32(1)

    loop = _while if xp is np else jax.lax.while_loop
    count, _ = loop(lambda state: unfit(state[0]).any(), redo, (attempt(xp.uint32(0)), xp.uint32(1)))
    return _top_up(xp, seed, replicates, count, extra)


def _while(condition: Callable, body: Callable, state: Any) -> Any:
    while condition(state):
        state = body(state)
    return state


def _top_up(xp: Any, seed: Any, replicates: Any, count: Any, extra: int) -> Any:
    """Adds to each row of counts the draws that it lacks, at most `extra`."""
    rows, units = count.shape
    drawn = _index(xp, _words(xp, seed, 1, replicates, extra), units)
    lacking = units - count.sum(axis=1)
    wanted = (xp.arange(extra)[None] < lacking[:, None]).astype(xp.int32)
    place = (xp.arange(rows)[:, None] * units + drawn).ravel()
    if xp is np:
        added = np.bincount(place[wanted.ravel() > 0], minlength=rows * units)
        return count + added.reshape(rows, units).astype(np.int32)
    flat = count.ravel().at[place].add(wanted.ravel(), mode="promise_in_bounds")
    return flat.reshape(rows, units)


def _index(xp: Any, words: Any, units: int) -> Any:
    """⌊word · U / 2^32⌋ in 32-bit arithmetic: uniform over 0 … U − 1 up to 2^-32."""
    half, low, high = xp.uint32(16), xp.uint32(units & 0xFFFF), xp.uint32(units >> 16)
    first, last = words >> half, words & xp.uint32(0xFFFF)
    middle = first * low + ((last * low) >> half)
    carry = (middle & xp.uint32(0xFFFF)) + last * high
    return (first * high + (middle >> half) + (carry >> half)).astype(xp.int32)


def flips(xp: Any, seed: Any, replicates: Any, units: int) -> Any:
    """[c, U] int32 of 0 and 1, each equally likely: whose sign a sign-flip test changes."""
    words = _words(xp, seed, _FLIPS, replicates, -(-units // 32))
    if xp is jnp:  # else each bit is fused with a making of its whole word
        words = jax.lax.optimization_barrier(words)
    bits = [(words >> xp.uint32(bit)) & xp.uint32(1) for bit in range(32)]
    return xp.concatenate(bits, axis=1)[:, :units].astype(xp.int32)


def fixed_point(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Digits [3, U, C] float32 and sizes [C] of values [U, C]: each is Σ digit · 2^(11 i) · size.

    The largest value of a column is held to 2^-33 of itself.
    """
    largest = np.maximum(values.max(axis=0, initial=0.0), -values.min(axis=0, initial=0.0))
    size = 2.0 ** (np.ceil(np.log2(np.where(largest > 0, largest, 1.0))) - DIGITS * BITS)
    digits = np.empty((len(values), DIGITS, values.shape[1]), np.float32)
    for start in range(0, len(values), BLOCK):  # 64-bit numbers of all units would be thrice the digits
        piece = slice(start, start + BLOCK)
        whole = np.rint(values[piece] / size).astype(np.int64)
        for place in range(DIGITS - 1):
            digits[piece, place] = whole & ((1 << BITS) - 1)
            whole >>= BITS
        digits[piece, -1] = whole
    return digits.transpose(1, 0, 2), size


def weighted_sums(draw: Draw, values: np.ndarray, weights: Weights = counts) -> np.ndarray:
    """[C, B] Σ_u weight[b, u] · values[u, c], exact for values [U, C] rounded to 2^-33 of their column.

    Beside the values, their digits are held (12 bytes a value) and some rows of weights (`_rows`).
    Raises ValueError for values that are not finite: what is undefined needs a weight of its own.
    """
    if not np.isfinite(values).all():
        raise ValueError("values to sum must be finite")
    digits, size = fixed_point(np.asarray(values, np.float64))
    units, columns = values.shape
    flat = digits.transpose(1, 0, 2).reshape(units, -1)
    total = _sums_numpy(draw, flat, weights) if draw.small else _sums_jax(draw, flat, weights)
    scale = 2.0 ** (BITS * np.arange(DIGITS))
    return np.tensordot(scale, total.reshape(DIGITS, columns, -1), axes=1) * size[:, None]


def flipped_sums(draw: Draw, values: np.ndarray) -> np.ndarray:
    """[C, B] sums of values [U, C] after each unit has kept or changed its sign at random."""
    return values.sum(axis=0)[:, None] - 2 * weighted_sums(draw, values, weights=flips)


@lru_cache(maxsize=2)
def all_weights(draw: Draw, weights: Weights) -> np.ndarray:
    """[B, U] float32: small enough to be kept for the next sums."""
    rows = max(1, 2**16 // draw.units)  # so that a chunk stays in the cache
    ids = np.arange(draw.resamples, dtype=np.uint32)
    chunks = [ids[i : i + rows] for i in range(0, len(ids), rows)]
    return np.concatenate([weights(np, draw.seed, c, draw.units).astype(np.float32) for c in chunks])


def _sums_numpy(draw: Draw, digits: np.ndarray, weights: Weights) -> np.ndarray:
    drawn, total = all_weights(draw, weights), np.zeros((digits.shape[1], draw.resamples))
    for start in range(0, draw.units, BLOCK):
        block = slice(start, start + BLOCK)
        total += digits[block].T @ drawn[:, block].T
    return total


def _sums_jax(draw: Draw, digits: np.ndarray, weights: Weights) -> np.ndarray:
    blocks = draw.units // BLOCK
    whole, rest = np.split(digits, [blocks * BLOCK])
    data = (whole.reshape(blocks, BLOCK, digits.shape[1]), rest[None])
    share = -(-draw.resamples // max(-(-draw.resamples // 1024), _threads()))
    rows = min(_rows(draw.units), share)
    shape = {"units": draw.units, "rows": rows, "calls": -(-share // rows)}
    program = partial(_sum_chunk, jnp.uint32(draw.seed), weights=weights, **shape)
    return np.concatenate(over_devices(program, draw.resamples, rows * shape["calls"], data), axis=1)


def _rows(units: int) -> int:
    """Replicates whose weights are held at once.

    On a CPU they stay in its cache; elsewhere large products are wanted.  Of many units some rows
    share each pass over the digits, which would take longer than drawing them.
    """
    return max(8, (2**18 if on_cpu() else 2**26) // units)


@partial(jax.jit, static_argnames=("weights", "units", "rows", "calls"), compiler_options=WIDE)
def _sum_chunk(
    seed: jax.Array,
    start: jax.Array,
    whole: jax.Array,
    rest: jax.Array,
    *,
    weights: Weights,
    units: int,
    rows: int,
    calls: int,
) -> jax.Array:
    """[3C, rows · calls] float64 sums of the replicates from `start` on.

    The digits are `whole` [blocks, BLOCK, 3C] and those of the units behind them, `rest` [1, r, 3C].
    """
    blocks, width, columns = whole.shape

    def product(drawn: jax.Array, digits: jax.Array) -> jax.Array:
        drawn = drawn.reshape(rows, *digits.shape[:2])
        return jnp.einsum("rbu,buc->brc", drawn, digits, precision="highest")

    def chunk(first: jax.Array) -> jax.Array:
        drawn = weights(jnp, seed, first + jnp.arange(rows, dtype=jnp.uint32), units).astype(jnp.float32)
        inside, behind = jnp.split(drawn, [blocks * width], axis=1)
        exact = jnp.concatenate([product(inside, whole), product(behind, rest)])
        return jnp.sum(exact.astype(jnp.float64), axis=0)

    firsts = start + jnp.uint32(rows) * jnp.arange(calls, dtype=jnp.uint32)
    return jax.lax.map(chunk, firsts).reshape(-1, columns).T


def on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def _threads() -> int:
    """How many programs run side by side: one for each device, or core of a CPU."""
    return max(jax.local_device_count(), (os.cpu_count() or 1) if on_cpu() else 1)


def over_devices(program: Callable, resamples: int, rows: int, data: tuple) -> list[np.ndarray]:
    """What `program(start, *data)` gives for every `rows` replicates [..., rows], devices in turn.

    float64 is switched on around it: what is exact in float32 is added up there.
    """
    devices = jax.local_devices()
    with jax.enable_x64(True):
        copies = [jax.device_put(data, device) for device in devices]

    def one(task: tuple[int, int]) -> np.ndarray:
        number, start = task
        with jax.enable_x64(True):  # a setting of the thread
            part = program(jnp.uint32(start), *copies[number % len(devices)])
            return np.asarray(part)[..., : resamples - start]

    tasks = list(enumerate(range(0, resamples, rows)))
    with ThreadPoolExecutor(min(_threads(), len(tasks))) as pool:
        return list(pool.map(one, tasks))
