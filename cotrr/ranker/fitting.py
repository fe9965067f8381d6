"""From labelled lists to a finished model: statistics, lanes, epochs, calibration."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from cotrr.data.contract import InputError
from cotrr.data.lists import Lists
from cotrr.ranker import artifact, calibration, features, training
from cotrr.ranker.training import Lanes, State, TrainConfig, Trainer


class Development(NamedTuple):
    """The lists that a model is developed on, and where each row came from."""

    lists: Lists
    canonical_id: np.ndarray  # [Q, n] object
    validation: np.ndarray  # [Q] bool: queries of the validation split


class Setup(NamedTuple):
    """A training run that is ready to start."""

    config: TrainConfig
    development: Development
    vocabulary: features.Vocabulary
    statistics: features.Statistics
    inputs: features.Features
    lanes: Lanes
    trainer: Trainer


def set_up(development: Development, config: TrainConfig, metric: Callable[..., jax.Array]) -> Setup:
    """Fits the statistics on the rows to learn from and builds the trainer.

    Raises InputError where there is nothing to learn from or nothing held out.
    """
    lists = development.lists
    lanes = training.make_lanes(lists, development.canonical_id, development.validation, config)
    _check(lanes, config)
    learned = lanes.train[lanes.final].any(axis=0)
    training_lists = lists._replace(where=learned).take(np.flatnonzero(learned.any(axis=1)))
    words = features.vocabulary(training_lists)
    settings = features.Settings(
        config.image_components, config.text_components, config.image_size, config.text_size
    )
    statistics = features.fit(training_lists, words, settings)
    encoded = features.encode(lists, words)
    mask = features.group_mask(config.groups.split(","))
    inputs = artifact.featurize_all(statistics, encoded, mask)
    examples = training.make_examples(lists, inputs, statistics.label_scale[encoded.domain])
    trainer = training.make_train(config, examples, lanes, metric)
    return Setup(config, development, words, statistics, inputs, lanes, trainer)


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


def finish(setup: Setup, state: State, name: str, provenance: dict[str, Any]) -> artifact.Model:
    """Calibrates on held-out rows and assembles the model.

    A held-out row's logit is the mean over the lanes that hold it out, none of which has learned
    from its query or its picture.
    """
    lists, config = setup.development.lists, dataclasses.asdict(setup.config)
    lanes = artifact.lane_scores(state.best_params, setup.inputs, hidden=setup.config.hidden)
    held_out = setup.lanes.held_out
    any_held = held_out.any(axis=0)
    count = np.maximum(held_out.sum(axis=0), 1)
    mean = lambda part: (np.where(held_out, np.asarray(part, np.float64), 0).sum(axis=0) / count)[any_held]
    query = np.broadcast_to(np.arange(len(lists.query_id))[:, None], any_held.shape)[any_held]
    fitted = calibration.fit(mean(lanes.rank), mean(lanes.conflict),
                             lists.y[any_held].astype(np.float64),
                             lists.conflict[any_held].astype(np.float64), query)  # fmt: skip
    learned = lists.labelled
    seen = {
        "query_id": artifact.hashes("query_id", lists.query_id[learned.any(axis=1)]),
        "canonical_id": artifact.hashes("canonical_id", setup.development.canonical_id[learned]),
    }
    return artifact.Model(name, config, setup.vocabulary, setup.statistics, state.best_params,
                          setup.lanes.final, fitted, provenance, seen)  # fmt: skip
