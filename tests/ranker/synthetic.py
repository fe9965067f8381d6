"""Small synthetic lists, built directly, whose labels need the embeddings."""

import jax
import numpy as np
from scipy.special import expit

from cotrr.data.contract import ATTRIBUTES
from cotrr.data.lists import Lists
from cotrr.ranker.fitting import Development

NAMES = tuple(ATTRIBUTES)


def development(queries: int = 24, n: int = 8, d: int = 6, pictures: int = 60, seed: int = 0) -> Development:
    """Lists of n, n - 1 and n - 2 candidates in turn; the last third of the queries validates.

    y follows one direction of the picture's embedding, which no attribute knows of.
    """
    rng = np.random.default_rng(seed)
    gallery = rng.normal(size=(pictures, d)).astype(np.float32)
    direction = rng.normal(size=d) / np.sqrt(max(d, 1))
    size = n - np.arange(queries) % 3
    where = np.arange(n) < size[:, None]
    picture = np.stack([rng.choice(pictures, n, replace=False) for _ in range(queries)])
    noise = rng.normal(size=where.shape) * 0.3
    y = expit(2 * gallery[picture] @ direction + noise)
    inside = lambda values: np.where(where, values, np.nan).astype(np.float32)
    table = np.arange(where.sum())
    row = np.full(where.shape, -1)
    row[where] = table
    lists = Lists(
        query_id=np.array([f"q{i}" for i in range(queries)], object),
        query=np.array([f"query {i}" for i in range(queries)], object),
        domain=np.array([f"d{i % 2}" for i in range(queries)], object),
        constraints=tuple(("color=pink",) if i % 3 else ("glass=coupe",) for i in range(queries)),
        text=rng.normal(size=(queries, d)).astype(np.float32),
        image=np.where(where[..., None], gallery[picture], np.float32(np.nan)),
        attributes=np.where(where[..., None], rng.uniform(size=(queries, n, len(NAMES))), np.nan).astype(
            np.float32
        ),
        y=inside(y),
        compliance=inside(y),
        conflict=inside(rng.uniform(size=where.shape) < 0.4 * (1 - y)),
        dual_score=inside(rng.uniform(size=where.shape)),
        gold=where.copy(),
        row=row,
        where=where,
    )
    ids = np.array([f"shoot{i}" for i in range(pictures)], object)
    return Development(lists, np.where(where, ids[picture], None), np.arange(queries) >= queries * 2 // 3)


def padded(lists: Lists, extra: int, garbage: float = np.nan) -> Lists:
    """The same lists with `extra` more columns of padding that hold `garbage`."""

    def pad(name: str, values):
        if values is lists.constraints or values.ndim < 2 or name == "text":
            return values
        fill = {"where": False, "gold": False, "row": -1}.get(name, garbage)
        width = [(0, 0), (0, extra)] + [(0, 0)] * (values.ndim - 2)
        return np.pad(values, width, constant_values=fill)

    return Lists(*(pad(name, values) for name, values in lists._asdict().items()))


def without(lists: Lists, masked, seed: int = 0) -> Lists:
    """The lists with noise and holes for the attributes (and embeddings) that `masked` [A + 1] marks."""
    rng = np.random.default_rng(seed)
    off = np.asarray(masked, bool)
    noise = rng.normal(size=lists.attributes.shape) * 3
    noise[rng.uniform(size=noise.shape) < 0.2] = np.nan
    lists = lists._replace(attributes=np.where(off[:-1], noise, lists.attributes).astype(np.float32))
    if not off[-1]:
        return lists
    other = lambda values: (rng.normal(size=values.shape) * 3).astype(np.float32)
    return lists._replace(image=other(lists.image), text=other(lists.text))


def randomised(params, seed: int = 1):
    """Parameters of the same shapes with random numbers: at initialisation most are zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda value: rng.normal(size=value.shape).astype(np.float32), params)


def assert_same_bits(one, other) -> None:
    """Two trees of arrays are equal to the last bit, NaN included."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(numbers(a), numbers(b))


def assert_close(one, other, atol: float = 1e-5) -> None:
    """Two trees of arrays agree, NaN included; keys to the last bit."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(numbers(a), numbers(b), rtol=1e-5, atol=atol)


def numbers(value) -> np.ndarray:
    """The array, of a typed key its data: slicing a key is using it up."""
    is_key = jax.dtypes.issubdtype(getattr(value, "dtype", float), jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(value) if is_key else value)
