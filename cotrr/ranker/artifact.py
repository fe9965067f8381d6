"""The finished model: all that scoring needs, saved as the plain files of `model_files`."""

import os
import pathlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
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


class Pace(NamedTuple):
    """How lists pass through a kind of device: what bounds memory, however many there are."""

    candidates: int  # of a batch
    under_way: int  # batches at once on each device: one is copied while another is computed


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


def overlap(seen: Mapping[str, np.ndarray], kind: str, ids: np.ndarray) -> int:
    """How many of the distinct ids are `seen`, which is what a model has learned from."""
    return int(np.isin(hashes(kind, ids), seen[kind]).sum())


def learned_from(seen: Mapping[str, np.ndarray], table: pa.Table) -> str:
    """What of a table is `seen`, in words; empty: nothing."""
    shared = {key: overlap(seen, key, table[key].to_numpy(zero_copy_only=False))
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
    """Logits [L, Q, n] of each of L lanes for Q lists; so many are worked on at once as a batch holds."""
    network, gates = Reranker(hidden=hidden), features.make_gates(mask)

    def one_query(query: Encoded) -> Any:
        one_lane = lambda params, fitted: network.apply(params, features.featurize(fitted, query), gates)
        return jax.vmap(one_lane)(params, statistics)

    batch = min(_queries_at_once(encoded.where.shape[1]), encoded.where.shape[0])
    with jax.default_matmul_precision("highest"):  # else a GPU rounds what a CPU does not
        scores = jax.lax.map(one_query, encoded, batch_size=batch)
    return Scores(*(jnp.moveaxis(part, 1, 0) for part in scores))


def score(model: Model, lists: Lists) -> Scored:
    """Scores lists whose embeddings have the length that the model was trained on.

    A kind of embedding that either side lacks counts as missing.  Raises InputError for another
    length, or where a score comes out undefined.  The same lists give the same bits on the same kind
    of device; elsewhere among others, or beside a longer one, a list's last bits may differ.
    """
    scored = Scored(*(np.zeros(lists.where.shape) for _ in Scored._fields))

    def keep(piece: slice, rank: np.ndarray, conflict: np.ndarray) -> None:
        where = lists.where[piece]
        _check_finite(lists.query_id[piece], where, rank, conflict)
        found = conclude(model.calibration, rank, conflict, model.final, where)
        for whole, part in zip(scored, found, strict=True):
            whole[piece] = part

    _stream(model, lists, keep)
    return scored


def logits(model: Model, lists: Lists) -> tuple[np.ndarray, np.ndarray]:
    """[L, Q, n] rank and conflict logits of each lane, before any calibration."""
    found = np.zeros((2, len(model.final), *lists.where.shape))

    def keep(piece: slice, rank: np.ndarray, conflict: np.ndarray) -> None:
        found[:, :, piece] = rank, conflict

    _stream(model, lists, keep)
    return found[0], found[1]


def _stream(model: Model, lists: Lists, keep: Callable[[slice, np.ndarray, np.ndarray], None]) -> None:
    """Calls `keep` with each slice of the lists and its logits [L, q, n], as they come.

    Every batch has one shape, which the longest list alone decides, so that no other number of
    queries is compiled for.  Devices take batches in turn; few are under way, each in a thread.
    """
    length, devices = lists.where.shape[1], jax.local_devices()
    width = _roomy(length)
    size = _queries_at_once(width)
    batches = list(enumerate(range(0, len(lists.where), size)))
    copies = [jax.device_put((model.params, model.statistics), d) for d in devices[: len(batches)]]
    mask, hidden = mask_of(model.config), model.config["hidden"]

    def one(batch: tuple[int, int]) -> None:
        number, start = batch
        at, piece = number % len(devices), slice(start, start + size)
        encoded = encode(model, Lists(**{name: part[piece] for name, part in lists._asdict().items()}))
        there = jax.device_put(_filled_up(encoded, size, width), devices[at])
        scores = lane_scores(*copies[at], there, mask, hidden=hidden)
        shape = np.s_[:, : len(encoded.where), :length]
        rank, conflict = (np.asarray(part)[shape].astype(np.float64) for part in scores)
        keep(piece, rank, conflict)

    with ThreadPoolExecutor(pace().under_way * len(devices)) as pool:
        list(pool.map(one, batches))


def pace() -> Pace:
    """On a CPU a batch stays in the cache of its core; an accelerator wants large ones."""
    if jax.default_backend() == "cpu":
        return Pace(2**10, 1 + (os.cpu_count() or 1) // jax.local_device_count())
    return Pace(2**15, 3)


def _queries_at_once(length: int) -> int:
    """Queries of a batch of lists of this length."""
    return max(1, pace().candidates // max(1, length))


def _roomy(length: int) -> int:
    """The next of a few lengths, a multiple of 4 or an eighth apart, so that few are compiled for."""
    step = max(4, 2 ** (length.bit_length() - 4))
    return max(1, -(-length // step)) * step


def _filled_up(encoded: Encoded, queries: int, length: int) -> Encoded:
    """The lists with empty candidates and queries behind them, which change nobody's score."""

    def fill(part: np.ndarray, *shape: int) -> np.ndarray:
        if part.shape[: len(shape)] == shape:
            return part
        filled = np.zeros((*shape, *part.shape[len(shape) :]), part.dtype)
        filled[tuple(slice(n) for n in part.shape[: len(shape)])] = part
        return filled

    by_query = {name: fill(getattr(encoded, name), queries) for name in ("domain", "wants", "text")}
    by_candidate = {
        name: fill(getattr(encoded, name), queries, length) for name in ("image", "attributes", "where")
    }
    return Encoded(**by_query, **by_candidate)


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


def _check_finite(query_id: np.ndarray, where: np.ndarray, *logits: np.ndarray) -> None:
    broken = np.argwhere(~np.isfinite(np.stack(logits)).all(axis=(0, 1)) & where)
    if len(broken):
        raise InputError(f"candidates of query {query_id[broken[0][0]]!r} have no finite score")


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
