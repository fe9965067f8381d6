"""Models of realistic size with random weights, for benchmarks that need no training."""

import pathlib
from typing import Any

import jax
import numpy as np

from cotrr.data.contract import ATTRIBUTES
from cotrr.data.lists import Lists
from cotrr.ranker import artifact, encoding, features, fitting, model_files
from cotrr.ranker.calibrators import Calibration, Choice, Intervals, Platt
from cotrr.ranker.model import Reranker

WORDS = {"color": 11, "glass": 8, "garnish": 8, "ice": 4}  # values of each key
CALIBRATION = Calibration(
    Platt(1.0, 0.0), Platt(1.0, 0.0),
    Intervals((0.2, 0.5, 0.8), (0.1, 0.3, 0.6), (0.4, 0.7, 0.95)), 100,
    {head: Choice("platt", {"platt": 0.5}) for head in ("rank", "conflict")},
)  # fmt: skip

UNTRAINED: dict[str, Any] = {"certificate": "", "settings": {}, "labels": {}, "best_epoch": 0,
                             "validation_loss": None}  # fmt: skip


def random_lists(queries: int, candidates: int, dim: int = 512, seed: int = 0) -> Lists:
    """Lists of unit embeddings, uniform attributes of which a tenth is missing, and uniform labels."""
    rng, shape = np.random.default_rng(seed), (queries, candidates)
    unit = lambda x: (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)
    attributes = rng.random((*shape, len(ATTRIBUTES)))
    names = lambda stem: np.array([f"{stem}{q}" for q in range(queries)], object)
    value = lambda: rng.random(shape).astype(np.float32)
    return Lists(
        query_id=names("q"), query=names("query "),
        domain=np.array([f"d{q % 4}" for q in range(queries)], object),
        constraints=tuple(tuple(f"{key}={rng.integers(count)}" for key, count in WORDS.items())
                          for _ in range(queries)),
        text=unit(rng.normal(size=(queries, dim))), image=unit(rng.normal(size=(*shape, dim))),
        attributes=np.where(rng.random(attributes.shape) < 0.1, np.nan, attributes).astype(np.float32),
        y=value(), compliance=value(), conflict=np.round(value()), dual_score=value(),
        gold=np.ones(shape, bool), row=np.arange(queries * candidates).reshape(shape),
        where=np.ones(shape, bool),
    )  # fmt: skip


def random_model(dim: int = 512, members: int = 1, folds: int = 5, hidden: int = 0) -> artifact.Model:
    """A model whose lanes differ in all weights: as in training, `members` of each fold, and final ones.

    The members of a fold share its statistics.
    """
    lists, lanes = random_lists(120, 10, dim), (folds + 1) * members
    words, fold = encoding.vocabulary(lists), np.arange(120) % folds
    learned = [*(lists.take(np.flatnonzero(fold != view)) for view in range(folds)), lists]
    fitted = [features.fit(part, words, features.Settings(64, 16)) for part in learned]
    view = np.repeat(np.arange(folds + 1), members)
    statistics = features.Statistics(*(np.stack(part)[view] for part in zip(*fitted, strict=True)))
    inputs = fitting.featurize_views(
        jax.tree.map(lambda part: part[:1], statistics), encoding.encode(lists, words)
    )
    gates = features.make_gates(encoding.make_mask(encoding.GROUPS))
    one, key = jax.tree.map(lambda x: x[0, 0], inputs), jax.random.key(0)
    shapes = jax.eval_shape(Reranker(hidden=hidden).init, key, one, gates)
    rng = np.random.default_rng(1)
    draw = lambda leaf: (0.05 * rng.normal(size=(lanes, *leaf.shape))).astype(np.float32)
    config: dict[str, Any] = {"groups": "clip,so,conflict", "without": "", "hidden": hidden}
    none = {name: np.zeros(0) for name in ("query_id", "canonical_id")}
    return artifact.Model("random", config, words, statistics, jax.tree.map(draw, shapes),
                          view == folds, CALIBRATION, UNTRAINED, none)  # fmt: skip


def save(model: artifact.Model, folder: pathlib.Path) -> model_files.Contents:
    """Writes a model and gives its files' contents."""
    artifact.save(model, folder)
    return model_files.parse(model_files.read_files(folder), folder)
