"""The finished model: all that scoring needs, saved as the plain files of `model_files`."""

import pathlib
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa

from cotrr import files
from cotrr.data.contract import ATTRIBUTES
from cotrr.data.lists import Lists
from cotrr.data.splits import unit_hash
from cotrr.errors import InputError
from cotrr.ranker import calibrators, features, model_files
from cotrr.ranker.calibrators import Calibration, Scored, conclude
from cotrr.ranker.encoding import Encoded, Vocabulary, mask_of
from cotrr.ranker.encoding import encode as encode_words
from cotrr.ranker.model import Params, Reranker, Scores
from cotrr.ranker.model_files import FORMAT, TABLES, read_files, version_of

SCORING_BATCH = 32  # queries scored at once: bounds memory


class Model(NamedTuple):
    """A trained ensemble of L lanes: final members, and those of the cross-validation folds."""

    name: str
    config: dict[str, Any]
    vocabulary: Vocabulary
    statistics: features.Statistics  # leaves [L, ...]
    params: Params  # each leaf [L, ...]
    final: np.ndarray  # [L] bool: the members whose mean is the score; all L give its spread
    calibration: Calibration
    provenance: dict[str, Any]  # data certificate, epochs, validation figures
    seen: dict[str, np.ndarray]  # hashes of the `query_id` and `canonical_id` learned from
    version: str = ""  # the name and the hash of the weights; a model gets it by being saved


def hashes(kind: str, ids: np.ndarray) -> np.ndarray:
    """Sorted distinct hashes of ids: enough to see an overlap, without the ids themselves."""
    return np.unique(unit_hash(kind, sorted(set(ids)), "seen"))


def overlap(model: Model, kind: str, ids: np.ndarray) -> int:
    """How many of the distinct ids the model has learned from."""
    return int(np.isin(hashes(kind, ids), model.seen[kind]).sum())


def learned_from(model: Model, table: pa.Table) -> str:
    """What of a table a model has learned from, in words; empty: nothing."""
    shared = {key: overlap(model, key, table[key].to_numpy(zero_copy_only=False))
              for key in ("query_id", "canonical_id")}  # fmt: skip
    return " and ".join(f"{count} {key}" for key, count in shared.items()) if any(shared.values()) else ""


@partial(jax.jit, static_argnames="hidden")
def lane_scores(
    params: Params,
    statistics: features.Statistics,
    encoded: Encoded,
    mask: jax.Array,
    *,
    hidden: int,
) -> Scores:
    """Logits [L, Q, n] of each of L lanes for Q lists; memory is bounded by SCORING_BATCH."""
    network, gates = Reranker(hidden=hidden), features.make_gates(mask)

    def one_query(query: Encoded) -> Any:
        one_lane = lambda params, fitted: network.apply(params, features.featurize(fitted, query), gates)
        return jax.vmap(one_lane)(params, statistics)

    batch = min(SCORING_BATCH, encoded.where.shape[0])
    scores = jax.lax.map(one_query, encoded, batch_size=batch)
    return Scores(*(jnp.moveaxis(part, 1, 0) for part in scores))


def score(model: Model, lists: Lists) -> Scored:
    """Scores lists whose embeddings have the length that the model was trained on.

    A kind of embedding that either side lacks counts as missing.  Raises InputError for another
    length, or where a score comes out undefined.
    """
    if not len(lists.query_id):
        return Scored(*(np.zeros(lists.where.shape) for _ in Scored._fields))
    rank, conflict = logits(model, lists)
    _check_finite(lists, rank, conflict)
    return conclude(model.calibration, rank, conflict, model.final, lists.where)


def logits(model: Model, lists: Lists) -> tuple[np.ndarray, np.ndarray]:
    """[L, Q, n] rank and conflict logits of each lane, before any calibration."""
    encoded = encode(model, lists)
    scores = lane_scores(
        model.params, model.statistics, encoded, mask_of(model.config), hidden=model.config["hidden"]
    )
    rank, conflict = (np.asarray(part, np.float64) for part in scores)
    return rank, conflict


def encode(model: Model, lists: Lists) -> Encoded:
    """The lists as the model's numbers, their embeddings of the lengths that it was trained on."""
    lists = lists._replace(
        image=_fitted(lists.image, model.statistics.image_mean.shape[-1], "image_embedding"),
        text=_fitted(lists.text, model.statistics.text_mean.shape[-1], "text_embedding"),
    )
    return encode_words(lists, model.vocabulary)


def _fitted(embeddings: np.ndarray, length: int, field: str) -> np.ndarray:
    """Embeddings [..., d] of the wanted length; all missing where one side has none."""
    given = embeddings.shape[-1]
    if given in (0, length):
        return embeddings if given else np.full((*embeddings.shape[:-1], length), np.nan, np.float32)
    if not length:
        return embeddings[..., :0]
    raise InputError(
        f"{given} numbers where the model was trained on {length}",
        field=field,
        remedy="Score runs of the encoder that the model was trained with",
    )


def _check_finite(lists: Lists, *logits: np.ndarray) -> None:
    broken = np.argwhere(~np.isfinite(np.stack(logits)).all(axis=(0, 1)) & lists.where)
    if len(broken):
        query = lists.query_id[broken[0][0]]
        raise InputError(f"{len(broken)} candidates have no finite score, the first of query {query!r}")


def save(model: Model, folder: str | pathlib.Path) -> None:
    """Writes the model folder; `model.json` last, so that a folder with it is complete."""
    folder = pathlib.Path(folder)
    arrays = {f"statistics/{k}": v for k, v in model.statistics._asdict().items()}
    for path, value in jax.tree_util.tree_leaves_with_path(model.params):
        arrays["/".join(str(key.key) for key in path)] = value
    arrays["final"] = model.final
    tables = dict(zip(TABLES, (arrays, model.seen), strict=True))
    for name, table in tables.items():
        with files.replacing(folder / name) as temporary, open(temporary, "wb") as out:
            np.savez(out, allow_pickle=False, **{key: np.asarray(value) for key, value in table.items()})
    facts = {
        "format": FORMAT,
        "name": model.name,
        "config": model.config,
        "attributes": list(ATTRIBUTES),
        "vocabulary": model.vocabulary._asdict(),
        "calibration": calibrators.pack(model.calibration),
        "provenance": model.provenance,
        "files": {name: files.sha256(folder / name) for name in tables},
    }
    files.write_json(folder / "model.json", facts | {"version": version_of(facts)})


def load(folder: str | pathlib.Path) -> Model:
    """The model in a folder; raises InputError where it is none, or its files were changed."""
    return parse(read_files(folder), folder)


def parse(content: Mapping[str, bytes], folder: str | pathlib.Path) -> Model:
    """The model that `model_files.FILES` hold; raises InputError, naming `folder`, where they do not."""
    return assemble(model_files.parse(content, folder))


def assemble(found: model_files.Contents) -> Model:
    """The model that parsed files are; raises InputError where parts of it are missing."""
    params: dict[str, Any] = {}
    try:
        for path, weights in found.weights.items():
            *parents, leaf = path.split("/")
            if parents[:1] == ["params"]:
                place = params
                for parent in parents:
                    place = place.setdefault(parent, {})
                place[leaf] = jnp.asarray(weights)  # on the device once, not at every call
        statistics = (jnp.asarray(found.weights[f"statistics/{k}"]) for k in features.Statistics._fields)
        return Model(
            name=found.facts["name"],
            config=found.facts["config"],
            vocabulary=found.vocabulary,
            statistics=features.Statistics(*statistics),
            params=params,
            final=found.weights["final"],
            calibration=found.calibration,
            provenance=found.facts["provenance"],
            seen=found.seen,
            version=found.facts["version"],
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"no model of cotrr ({error!r})", file=found.folder / "model.json") from None
