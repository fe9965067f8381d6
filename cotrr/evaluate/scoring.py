"""A split scored part by part, a part being one of its files: what an evaluation needs of it is kept.

Memory holds the parts that are being scored, embeddings and all, and to the end what is kept: 98 bytes of
labels and attributes for each row and 48 of every model's scores, lists padded to the longest, and about
1 KB of words for each query.  At its peak, while the statistics are made, about 540 bytes a row were
measured.  With a store a part is committed once it is scored, so an evaluation that was killed and
starts again scores what is left.
"""

import functools
import hashlib
import io
import itertools
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cotrr import files, shards
from cotrr.data import dataset
from cotrr.data.labels import GOLD, SILVER
from cotrr.data.lists import Lists, clusters, to_lists
from cotrr.errors import InputError
from cotrr.evaluate import failures
from cotrr.evaluate.failures import Failures
from cotrr.ranker import artifact
from cotrr.ranker.artifact import Model, Scored

if TYPE_CHECKING:
    from cotrr.store import Store

FORMAT = 1  # of what is committed; it changes with anything that the figures of a part depend on
IDS = ("query_id", "canonical_id")
ALONE = "query_id"  # the column by which every query is a cluster of its own
PADDING = {"gold": False, "row": -1, "where": False, "logit": -np.inf}


class Part(NamedTuple):
    """A file of a split, whose queries stand in no other."""

    file: str
    sha256: str  # that was certified


class Job(NamedTuple):
    """What all parts of an evaluation share."""

    data: str  # the dataset's folder
    models: tuple[tuple[str, str], ...]  # folder and version; failures are those of the first
    label: str  # gold or silver
    cluster_by: str  # a column
    store: "Store | None"  # for parts that are done; None: nothing is committed


class Glance(NamedTuple):
    """What a part's ids and labels tell before anything is scored."""

    rows: int
    labels: frozenset[str | None]
    learned: pa.Table  # the part's ids where a model has learned from any of them, else none


class Kept(NamedTuple):
    """What is kept of the queries with labels, of a part or of parts one behind the other."""

    lists: Lists  # without embeddings; `row` counts through all parts
    scored: tuple[Scored, ...]  # of each model
    failures: Failures  # of the first model
    named: pa.Table  # [rows] the column that names clusters; no column where each query is alone
    rows: int
    left_out: int  # queries without labels


def split_parts(data: str, split: str) -> list[Part]:
    """The parts of a split, in order."""
    certified = dataset.read_certificate(data)["files"]
    return [Part(name, certified.get(name, "")) for name in dataset.files_of(data, split)]


def glance(data: str, models: Sequence[tuple[str, str]], part: Part) -> Glance:
    """Reads three columns of a part; raises InputError where it cannot be read."""
    table = _columns(data, part, [*IDS, "label"])
    ids, kinds = table.select(IDS), table["label"].unique().to_pylist()
    learned = any(artifact.learned_from(load(*model).seen, ids) for model in models)
    return Glance(len(table), frozenset(kinds), ids if learned else ids.schema.empty_table())


def _columns(data: str, part: Part, names: list[str]) -> pa.Table:
    try:
        return pq.read_table(pathlib.Path(data) / part.file, columns=names).select(names)
    except (OSError, KeyError, pa.ArrowException):
        return dataset.read_part(data, part.file).select(names)  # says what is wrong with it


def label_of(kinds: Iterable[str | None]) -> str:
    """The labels to evaluate by where there are such: gold if there is any, else silver; never both."""
    return GOLD if GOLD in kinds else SILVER


def labelled(table: pa.Table, label: str) -> tuple[Lists, int]:
    """The queries with labels of a kind, and how many have none."""
    lists = to_lists(table, label)
    judged = np.flatnonzero(lists.labelled.any(axis=1))
    left_out = len(lists.query_id) - len(judged)
    return lists.take(judged) if left_out else lists, left_out  # taking copies the embeddings


def score(job: Job, parts: Sequence[Part], runner: shards.Runner, progress: Callable[[Part], None]) -> Kept:
    """Scores the parts, in any order and each once, and joins what is kept of them.

    Raises InputError for a part that is not the certified one, for a query in two of them, and for what
    `artifact.score` and `clusters` raise it.
    """
    kept = []
    for part, found in zip(parts, runner(functools.partial(score_part, job), parts), strict=True):
        progress(part)
        kept.append(found)
    _refuse_twice(job, parts, kept)
    return join(kept)


def committed(job: Job, parts: Sequence[Part]) -> set[Part]:
    """The parts that the store has already."""
    there = set(job.store.keys("records")) if job.store else set()
    return {part for part in parts if f"records/{_place(part, _key(job, part))}.json" in there}


def score_part(job: Job, part: Part) -> Kept:
    """What is kept of a part, a function of both but for the last bits, which processors round differently.

    With a store it is what was committed of the part first, to the bit.
    """
    if job.store is None:
        return _score(job, part)
    key = _key(job, part)
    place = _place(part, key)
    record = shards.once(job.store, place, key, lambda: _pack(_score(job, part), place))
    (name,) = record.files
    return _unpack(job.store.get(name, shards.LARGEST), record.result, len(job.models))


def _key(job: Job, part: Part) -> str:
    """What tells all that a part's results depend on."""
    versions = [version for _, version in job.models]
    by = [FORMAT, jax.__version__, jax.devices()[0].device_kind]
    return files.digest([*by, versions, part.sha256, job.label, job.cluster_by, failures.EXAMPLES])


def _place(part: Part, key: str) -> str:
    """The name of a part's results, short enough that a hash may follow."""
    return f"{pathlib.Path(part.file).stem}-{key[:32]}"


def read(job: Job, part: Part) -> tuple[pa.Table, Lists, int]:
    """The rows of a part, its queries with labels, and how many have none."""
    table = dataset.read_part(job.data, part.file)
    return table, *labelled(table, job.label)


def _score(job: Job, part: Part) -> Kept:
    table, lists, left_out = read(job, part)
    clusters(table, lists, job.cluster_by)  # what it refuses, it refuses before the time is spent
    models = [load(*model) for model in job.models]
    scored = tuple(artifact.score(model, lists) for model in models)
    found = failures.look(models[0], table, lists, scored[0])
    named = table.select([] if job.cluster_by == ALONE else [job.cluster_by])
    empty = lambda values: np.zeros((*values.shape[:-1], 0), np.float32)
    bare = lists._replace(text=empty(lists.text), image=empty(lists.image))
    return Kept(bare, scored, found, named, len(table), left_out)


@functools.cache
def load(folder: str, version: str) -> Model:
    """The model of a folder, once a process; raises InputError where it holds another version."""
    model = artifact.load(folder)
    if model.version != version:
        raise InputError(f"the model is {model.version}, not {version}", file=folder,
                         remedy="Start again: it was replaced, or a worker sees another one")  # fmt: skip
    return model


def _refuse_twice(job: Job, parts: Sequence[Part], kept: Sequence[Kept]) -> None:
    """Raises InputError where a query is in two parts."""
    home: dict[str, str] = {}
    for part, found in zip(parts, kept, strict=True):
        for query in found.lists.query_id:
            if (first := home.setdefault(query, part.file)) != part.file:
                raise InputError(f"query {query!r} is in two files of the split, {first} and {part.file}",
                                 file=job.data, field="query_id",
                                 remedy="Generate the dataset again: a file holds whole queries")  # fmt: skip


def join(kept: Sequence[Kept]) -> Kept:
    """Parts, one behind the other, as the one part that they would be."""
    before = np.cumsum([0, *(part.rows for part in kept[:-1])])
    lists = [
        part.lists._replace(row=np.where(part.lists.where, part.lists.row + start, -1))
        for part, start in zip(kept, before, strict=True)
    ]
    by_model = zip(*(part.scored for part in kept), strict=True)
    return Kept(
        Lists(**_join(lists)),
        tuple(Scored(**_join(scored, 0.0)) for scored in by_model),
        failures.merge([part.failures for part in kept]),
        pa.concat_tables([part.named for part in kept], promote_options="default"),
        sum(part.rows for part in kept),
        sum(part.left_out for part in kept),
    )


def _join(tuples: Sequence[Any], padding: float = np.nan) -> dict[str, Any]:
    """The fields of several `Lists` or `Scored`, joined along their queries."""
    values = {name: [getattr(one, name) for one in tuples] for name in tuples[0]._fields}
    return {name: _stack(parts, PADDING.get(name, padding)) for name, parts in values.items()}


def _stack(values: Sequence[Any], padding: Any) -> Any:
    """Arrays [Q, n, ...] one behind the other, padded to the longest n; arrays [Q] and tuples as they are."""
    if isinstance(values[0], tuple):
        return tuple(itertools.chain(*values))
    if values[0].ndim == 1:
        return np.concatenate(values)
    longest = max(part.shape[1] for part in values)
    whole = np.full((sum(map(len, values)), longest, *values[0].shape[2:]), padding, values[0].dtype)
    start = 0
    for part in values:
        whole[start : start + len(part), : part.shape[1]] = part
        start += len(part)
    return whole


class _Words(NamedTuple):
    """What of `Kept` is no array of numbers."""

    texts: dict[str, list[str | None]]
    constraints: tuple[tuple[str, ...], ...]
    failures: Failures
    named: dict[str, list[Any]]
    rows: int
    left_out: int


def _pack(kept: Kept, place: str) -> tuple[dict[str, bytes], Any]:
    """A file of arrays, and the rest in plain JSON types.

    Its name tells its content: another processor's, left without a record by who was killed, has another.
    """
    lists = {key: value for key, value in kept.lists._asdict().items() if key != "constraints"}
    texts = {key: value.tolist() for key, value in lists.items() if value.dtype == object}
    arrays = {f"lists/{key}": value for key, value in lists.items() if key not in texts}
    for number, scored in enumerate(kept.scored):
        arrays |= {f"scored/{number}/{key}": value for key, value in scored._asdict().items()}
    np.savez(sink := io.BytesIO(), allow_pickle=False, **arrays)
    rest = _Words(texts, kept.lists.constraints, kept.failures, kept.named.to_pydict(), kept.rows,
                  kept.left_out)  # fmt: skip
    content = sink.getvalue()
    name = f"{place}-{hashlib.sha256(content).hexdigest()[:16]}.npz"
    return {name: content}, msgspec.to_builtins(rest)


def _unpack(content: bytes, words: Any, models: int) -> Kept:
    rest = msgspec.convert(words, _Words)
    with np.load(io.BytesIO(content), allow_pickle=False) as found:
        arrays = dict(found)
    under = lambda place: {key.removeprefix(place): v for key, v in arrays.items() if key.startswith(place)}
    texts = {key: np.array(value, object) for key, value in rest.texts.items()}
    return Kept(
        Lists(**under("lists/"), **texts, constraints=rest.constraints),
        tuple(Scored(**under(f"scored/{number}/")) for number in range(models)),
        rest.failures, pa.table(rest.named), rest.rows, rest.left_out,
    )  # fmt: skip
