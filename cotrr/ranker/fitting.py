"""From labelled lists to a finished model: statistics, lanes, epochs, calibration."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from cotrr.data.lists import Lists
from cotrr.errors import InputError
from cotrr.ranker import artifact, calibration, features, training
from cotrr.ranker.training import Lanes, State, TrainConfig, Trainer

PAIRS_LIMIT = 8e9  # bytes of pair matrices in one step


class Development(NamedTuple):
    """The lists that a model is developed on, and where each row came from."""

    lists: Lists
    canonical_id: np.ndarray  # [Q, n] object
    validation: np.ndarray  # [Q] bool: queries of the validation split


class Setup(NamedTuple):
    """A training run that is ready to start, with L lanes."""

    config: TrainConfig
    development: Development
    vocabulary: features.Vocabulary
    statistics: features.Statistics  # leaves [L, ...]: each lane's, from the rows it learns from
    encoded: features.Encoded  # leaves [Q, ...]
    mask: np.ndarray  # [A] bool
    lanes: Lanes
    trainer: Trainer


def set_up(development: Development, config: TrainConfig, metric: Callable[..., jax.Array]) -> Setup:
    """Fits each lane's statistics on the rows it learns from and builds the trainer.

    Raises InputError where there is nothing to learn from or nothing held out.
    """
    lists = development.lists
    lanes = training.make_lanes(lists, development.canonical_id, development.validation, config)
    _check(lanes, config)
    _check_memory(lists, lanes, config)
    mask = features.group_mask(config.groups.split(","))
    words = features.vocabulary(_rows(lists, lanes.train[-1]))
    settings = features.Settings(
        config.image_components, config.text_components, config.image_size, config.text_size
    )
    # Members of one fold learn from the same rows, and stand together.
    fitted = [features.fit(_rows(lists, rows), words, settings) for rows in lanes.train[:: config.members]]
    stack = lambda *parts: np.repeat(np.stack(parts), config.members, axis=0)
    statistics = features.Statistics(*map(stack, *fitted))
    encoded = features.encode(lists, words)
    inputs = featurize_lanes(statistics, encoded, mask)
    scale = statistics.label_scale[:, encoded.domain]
    examples = training.make_examples(lists, inputs, scale, lanes)
    hparams = training.hyperparameters(config, len(lanes.final))
    trainer = training.make_train(config, examples, hparams, metric)
    return Setup(config, development, words, statistics, encoded, mask, lanes, trainer)


# [L, Q, ...] features of each query by each lane's statistics
featurize_lanes = jax.jit(
    jax.vmap(jax.vmap(features.featurize, in_axes=(None, 0, None)), in_axes=(0, None, None))
)


def _rows(lists: Lists, where: np.ndarray) -> Lists:
    """The lists with no other candidates than `where` [Q, n], and no query without any."""
    return lists._replace(where=where).take(np.flatnonzero(where.any(axis=1)))


def _check(lanes: Lanes, config: TrainConfig) -> None:
    empty = ~lanes.train.any(axis=(1, 2))
    if empty.any():
        raise InputError(
            f"{empty.sum()} of {len(empty)} lanes have no labelled rows to learn from",
            field="y",
            remedy="Give more data, or fewer --folds",
        )
    idle = ~lanes.held_out.any(axis=(1, 2)) & (~lanes.final if config.folds else True)
    if idle.any():
        raise InputError(
            f"{idle.sum()} of {len(idle)} lanes have no labelled rows held out for validation",
            field="y",
            remedy="Without a validation split use --folds=5; with little data fewer folds",
        )


def _check_memory(lists: Lists, lanes: Lanes, config: TrainConfig) -> None:
    """The pair matrices of one step must fit: all lists of a batch are padded to the longest."""
    queries, longest = lists.where.shape
    size = 3 * 4 * len(lanes.final) * min(config.batch_queries, queries) * longest**2
    if size > PAIRS_LIMIT:
        query = lists.query_id[lists.where.sum(axis=1).argmax()]
        raise InputError(
            f"a step would need about {size / 1e9:.0f} GB for pairs of candidates: query {query!r} has "
            f"{longest:,}",
            field="query_id",
            remedy="Set a smaller --batch_queries, or fewer --folds",
        )


def finish(setup: Setup, state: State, name: str, provenance: dict[str, Any]) -> artifact.Model:
    """Calibrates on held-out rows and assembles the model.

    A held-out row's logit is the mean over the lanes that hold it out, none of which has learned
    from its query or its picture.
    """
    lists, config = setup.development.lists, dataclasses.asdict(setup.config)
    scores = artifact.lane_scores(
        state.best_params, setup.statistics, setup.encoded, setup.mask, hidden=setup.config.hidden
    )
    held_out = setup.lanes.held_out
    rows = held_out.any(axis=0)
    count = np.maximum(held_out.sum(axis=0), 1)
    mean = lambda part: (np.where(held_out, np.asarray(part, np.float64), 0).sum(axis=0) / count)[rows]
    query = np.nonzero(rows)[0]
    fold = held_out.argmax(axis=0)[rows] if setup.config.folds else query % 2
    fitted = calibration.fit(
        mean(scores.rank), mean(scores.conflict),
        lists.y[rows].astype(np.float64), lists.conflict[rows].astype(np.float64), query, fold,
    )  # fmt: skip
    kinds = lists.gold[rows]
    provenance = provenance | {"calibrated_on": "gold" if kinds.all() else "silver"}
    learned = lists.labelled
    seen = {
        "query_id": artifact.hashes("query_id", lists.query_id[learned.any(axis=1)]),
        "canonical_id": artifact.hashes("canonical_id", setup.development.canonical_id[learned]),
    }
    return artifact.Model(name, config, setup.vocabulary, setup.statistics, state.best_params,
                          setup.lanes.final, fitted, provenance, seen)  # fmt: skip
