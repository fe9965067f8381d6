"""The finished model: all that scoring needs, as JSON and plain arrays in a folder.

`model.json` holds settings, vocabulary, calibration and provenance; `weights.npz` the parameters of
the L members and the statistics; `trained_on.npz` the hashes of what the model has seen.
"""

import json
import pathlib
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cotrr import files
from cotrr.data.contract import ATTRIBUTES, InputError
from cotrr.data.lists import Lists
from cotrr.data.splits import unit_hash
from cotrr.ranker import features
from cotrr.ranker.calibration import Calibration, Platt
from cotrr.ranker.model import Params, Reranker, Scores

FORMAT = 1
SCORING_BATCH = 32  # queries scored at once: bounds memory


class Model(NamedTuple):
    """A trained ensemble of L lanes: final members, and those of the cross-validation folds."""

    name: str
    config: dict[str, Any]
    vocabulary: features.Vocabulary
    statistics: features.Statistics
    params: Params  # each leaf [L, ...]
    final: np.ndarray  # [L] bool: the members whose mean is the score; all L give its spread
    calibration: Calibration
    provenance: dict[str, Any]  # data certificate, epochs, validation figures
    seen: dict[str, np.ndarray]  # hashes of the `query_id` and `canonical_id` learned from
    version: str = ""  # the name and the hash of the weights; a model gets it by being saved


class Scored(NamedTuple):
    """Calibrated scores of [Q, n] candidates; padding is 0."""

    score: np.ndarray  # expected label in [0, 1]
    std: np.ndarray  # spread of the lanes' expected labels
    low: np.ndarray  # 95 % interval of the label
    high: np.ndarray
    p_conflict: np.ndarray
    logit: np.ndarray  # the mean rank logit that orders candidates


def hashes(kind: str, ids: np.ndarray) -> np.ndarray:
    """Sorted distinct hashes of ids: enough to see an overlap, without the ids themselves."""
    return np.unique(unit_hash(kind, sorted(set(ids)), "seen"))


def overlap(model: Model, kind: str, ids: np.ndarray) -> int:
    """How many of the distinct ids the model has learned from."""
    return int(np.isin(hashes(kind, ids), model.seen[kind]).sum())


@partial(jax.jit, static_argnames="hidden")
def lane_scores(params: Params, inputs: features.Features, *, hidden: int) -> Scores:
    """Logits [L, Q, n] of each of L lanes for Q lists."""
    every_lane = jax.vmap(Reranker(hidden=hidden).apply, in_axes=(0, None))
    batch = min(SCORING_BATCH, inputs.where.shape[0])
    scores = jax.lax.map(partial(every_lane, params), inputs, batch_size=batch)
    return Scores(*(jnp.moveaxis(part, 1, 0) for part in scores))


featurize_all = jax.jit(jax.vmap(features.featurize, in_axes=(None, 0, None)))


def inputs_of(model: Model, lists: Lists) -> features.Features:
    """The model's input for lists: a batch [Q, ...] of features."""
    mask = features.group_mask(model.config["groups"].split(","))
    encoded = features.encode(lists, model.vocabulary)
    return featurize_all(model.statistics, encoded, mask)


def score(model: Model, lists: Lists) -> Scored:
    """Scores lists whose embeddings have the length that the model was trained on.

    Raises InputError for another length.
    """
    expected = len(model.statistics.image_mean), len(model.statistics.text_mean)
    given = lists.image.shape[-1], lists.text.shape[-1]
    if any(length not in (0, wanted) for length, wanted in zip(given, expected, strict=True)):
        raise InputError(
            f"image and text embeddings of {given} numbers, the model was trained on {expected}",
            remedy="Score runs of the encoder that the model was trained with",
        )
    if expected != given:  # a run without embeddings of a kind: all of them are missing
        full = lambda part, length: (
            part if part.shape[-1] else np.full((*part.shape[:-1], length), np.nan, np.float32)
        )
        lists = lists._replace(image=full(lists.image, expected[0]), text=full(lists.text, expected[1]))
    if not len(lists.query_id):
        return Scored(*(np.zeros(lists.where.shape) for _ in Scored._fields))
    lanes = lane_scores(model.params, inputs_of(model, lists), hidden=model.config["hidden"])
    rank, conflict = (np.asarray(part, np.float64) for part in lanes)
    calibration = model.calibration
    logit = rank[model.final].mean(axis=0)
    expected_label = calibration.rank(logit)
    inside = lambda values: np.where(lists.where, np.clip(values, 0.0, 1.0), 0.0)
    return Scored(
        score=inside(expected_label),
        std=inside(calibration.rank(rank).std(axis=0)),
        low=inside(expected_label - calibration.radius),
        high=inside(expected_label + calibration.radius),
        p_conflict=inside(calibration.conflict(conflict[model.final].mean(axis=0))),
        logit=np.where(lists.where, logit, -np.inf),
    )


def save(model: Model, folder: str | pathlib.Path) -> None:
    """Writes the model folder; `model.json` last, so that a folder with it is complete."""
    folder = pathlib.Path(folder)
    arrays = {f"statistics/{k}": v for k, v in model.statistics._asdict().items()}
    for path, value in jax.tree_util.tree_leaves_with_path(model.params):
        arrays["/".join(str(key.key) for key in path)] = value
    arrays["final"] = model.final
    tables = {"weights.npz": arrays, "trained_on.npz": model.seen}
    for name, table in tables.items():
        with files.replacing(folder / name) as temporary, open(temporary, "wb") as out:
            np.savez(out, allow_pickle=False, **{key: np.asarray(value) for key, value in table.items()})
    files.write_json(folder / "model.json", {
        "format": FORMAT,
        "name": model.name,
        "version": f"{model.name}-{files.sha256(folder / 'weights.npz')[:12]}",
        "config": model.config,
        "attributes": list(ATTRIBUTES),
        "vocabulary": model.vocabulary._asdict(),
        "calibration": {
            "rank": model.calibration.rank._asdict(), "conflict": model.calibration.conflict._asdict(),
            "radius": model.calibration.radius, "queries": model.calibration.queries,
        },
        "provenance": model.provenance,
        "files": {name: files.sha256(folder / name) for name in tables},
    })  # fmt: skip


def load(folder: str | pathlib.Path) -> Model:
    """The model in a folder; raises InputError where it is none, or its files were changed."""
    folder = pathlib.Path(folder)
    try:
        facts = json.loads((folder / "model.json").read_text())
        for name, expected in facts["files"].items():
            if files.sha256(folder / name) != expected:
                raise InputError("not the file that was saved with the model", file=folder / name)
        weights, seen = (dict(np.load(folder / name)) for name in ("weights.npz", "trained_on.npz"))
        if facts["format"] != FORMAT or facts["attributes"] != list(ATTRIBUTES):
            raise InputError("saved by another version of cotrr", file=folder / "model.json")
        return _assemble(facts, weights, seen)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(
            "no finished model here",
            file=error.filename,
            remedy="Train one: python -m experiments.train --help",
        ) from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"no model of cotrr ({error!r})", file=folder / "model.json") from None


def version(folder: str | pathlib.Path) -> str:
    """The version of a saved model: its name and the hash of its weights."""
    return json.loads((pathlib.Path(folder) / "model.json").read_text())["version"]


def _assemble(facts: dict[str, Any], weights: dict, seen: dict) -> Model:
    params: dict[str, Any] = {}
    for path in weights:
        *parents, leaf = path.split("/")
        if parents[:1] == ["params"]:
            place = params
            for parent in parents:
                place = place.setdefault(parent, {})
            place[leaf] = weights[path]
    calibration = facts["calibration"]
    return Model(
        name=facts["name"],
        config=facts["config"],
        vocabulary=features.Vocabulary(*(tuple(facts["vocabulary"][k]) for k in ("domains", "constraints"))),
        statistics=features.Statistics(*(weights[f"statistics/{k}"] for k in features.Statistics._fields)),
        params=params,
        final=weights["final"],
        calibration=Calibration(
            rank=_platt(calibration["rank"]),
            conflict=_platt(calibration["conflict"]),
            radius=float(calibration["radius"]),
            queries=int(calibration["queries"]),
        ),
        provenance=facts["provenance"],
        seen=seen,
        version=facts["version"],
    )  # fmt: skip


def _platt(facts: dict[str, Any]) -> Platt:
    return Platt(float(facts["slope"]), float(facts["offset"]))
