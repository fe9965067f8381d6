"""From labelled lists to a finished model: statistics, views, calibration."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from cotrr.data.lists import Lists
from cotrr.errors import InputError
from cotrr.ranker import artifact, calibration, calibrators, encoding, features, training
from cotrr.ranker.lanes import TrainConfig
from cotrr.ranker.training import State, Train
from cotrr.ranker.views import Views, make_examples, make_views


class Development(NamedTuple):
    """The lists that a model is developed on, and where each row came from."""

    lists: Lists
    canonical_id: np.ndarray  # [Q, n] object
    validation: np.ndarray  # [Q] bool: queries of the validation split


class Setup(NamedTuple):
    """What lanes of one development are trained on, as F views."""

    config: TrainConfig
    development: Development
    vocabulary: encoding.Vocabulary
    statistics: features.Statistics  # leaves [F, ...]: each view's, from the rows it learns from
    encoded: encoding.Encoded  # leaves [Q, ...]
    views: Views
    train: Train


def set_up(
    development: Development,
    config: TrainConfig,
    metric: Callable[..., jax.Array],
    mesh: Mesh | None = None,
) -> Setup:
    """Fits each view's statistics on the rows it learns from, and prepares the training of lanes.

    Raises InputError where there is nothing to learn from or nothing held out.
    """
    lists = development.lists
    views = make_views(lists, development.canonical_id, development.validation, config.folds)
    _check(views, config)
    words = encoding.vocabulary(_rows(lists, views.train[-1]))
    settings = features.Settings(config.image_components, config.text_components)
    fitted = [features.fit(_rows(lists, rows), words, settings) for rows in views.train]
    statistics = features.Statistics(*map(lambda *parts: np.stack(parts), *fitted))
    encoded = encoding.encode(lists, words)
    scale = statistics.label_scale[:, encoded.domain]
    examples = make_examples(lists, featurize_views(statistics, encoded), scale, views)
    train = training.make_train(config, examples, metric, mesh)
    return Setup(config, development, words, statistics, encoded, views, train)


def seen(development: Development) -> dict[str, np.ndarray]:
    """Hashes of the queries and pictures that a model of a development learns from."""
    learned = development.lists.labelled
    return {
        "query_id": artifact.hashes("query_id", development.lists.query_id[learned.any(axis=1)]),
        "canonical_id": artifact.hashes("canonical_id", development.canonical_id[learned]),
    }


# [F, Q, ...] features of each query by each view's statistics
featurize_views = jax.jit(jax.vmap(jax.vmap(features.featurize, in_axes=(None, 0)), in_axes=(0, None)))


def _rows(lists: Lists, where: np.ndarray) -> Lists:
    """The lists with no other candidates than `where` [Q, n], and no query without any."""
    return lists._replace(where=where).take(np.flatnonzero(where.any(axis=1)))


def _check(views: Views, config: TrainConfig) -> None:
    empty = ~views.train.any(axis=(1, 2))
    if empty.any():
        raise InputError(
            f"{empty.sum()} of {len(empty)} views have no labelled rows to learn from",
            field="y",
            remedy="Give more data, or fewer --folds",
        )
    idle = ~views.held_out.any(axis=(1, 2))[: config.folds or 1]
    if idle.any():
        raise InputError(
            f"{idle.sum()} of {len(idle)} views have no labelled rows held out for validation",
            field="y",
            remedy="Without a validation split use --folds=5; with little data fewer folds",
        )


class HeldOut(NamedTuple):
    """The N held-out rows by a model that has seen neither their query nor their picture."""

    rank: np.ndarray  # [N] logit of each head, mean over the members
    conflict: np.ndarray  # [N]
    y: np.ndarray  # [N]
    is_conflict: np.ndarray  # [N] NaN where unknown
    query: np.ndarray  # [N] int
    fold: np.ndarray  # [N] int


def held_out(setup: Setup, model: artifact.Model) -> HeldOut:
    """Each held-out row as the members of the view that holds it out score it."""
    lists, rows = setup.development.lists, setup.views.held_out.any(axis=0)
    scores = artifact.lane_scores(
        model.params, model.statistics, setup.encoded, encoding.mask_of(model.config),
        hidden=model.config["hidden"],
    )  # fmt: skip
    view = setup.views.held_out.argmax(axis=0)[rows]
    query, place = np.nonzero(rows)

    def of_rows(part: jax.Array) -> np.ndarray:
        by_view = np.asarray(part, np.float64).reshape(len(setup.views.held_out), -1, *rows.shape)
        return by_view.mean(axis=1)[view, query, place]

    return HeldOut(
        of_rows(scores.rank), of_rows(scores.conflict),
        lists.y[rows].astype(np.float64), lists.conflict[rows].astype(np.float64),
        query, view if setup.config.folds else query % 2,
    )  # fmt: skip


def finish(
    setup: Setup, state: State, config: TrainConfig, name: str, provenance: dict[str, Any]
) -> artifact.Model:
    """The model of one config from the states [V] of its members, calibrated on held-out rows."""
    lists, members, views = setup.development.lists, len(state.best), len(setup.views.train)
    size = lambda axes, by: np.asarray(axes) * np.float32(by)
    statistics = setup.statistics._replace(
        image_axes=size(setup.statistics.image_axes, config.image_size),
        text_axes=size(setup.statistics.text_axes, config.text_size),
        match_scale=setup.statistics.match_scale / np.float32(config.match_size or 1e-30),
    )
    judged = setup.views.held_out.any(axis=0)
    model = artifact.Model(
        name=name,
        config=dataclasses.asdict(config),
        vocabulary=setup.vocabulary,
        # Members of one view stand together.
        statistics=jax.tree.map(lambda part: np.repeat(part, members, axis=0), statistics),
        params=jax.tree.map(lambda part: np.concatenate(np.asarray(part).swapaxes(0, 1)), state.best_params),
        final=np.arange(views * members) >= (views - 1) * members,
        calibration=calibrators.NONE,
        provenance=provenance | {"calibrated_on": "gold" if lists.gold[judged].all() else "silver"},
        seen=seen(setup.development),
    )
    return model._replace(calibration=calibration.fit(*held_out(setup, model)))
