"""A dataset of a run that may be larger than memory: the rows, splits and labels that reading at once gives.

Each part of the run is read once and kept as Parquet; with the ids of all of them the split is made;
then each part is written again, split by split.  Both are pure functions of a part, committed by
put-if-absent in a folder beside the output, so processes or machines share them, and a job that was
killed goes on where it was.  The dataset appears whole, by the folder's being renamed.

Behind the reading, memory holds some 150 bytes of a row, the ids of distinct queries and pictures, and
the items in the run's manifest.
"""

import contextlib
import functools
import hashlib
import io
import itertools
import pathlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cotrr import files, shards
from cotrr.data import certificate, dataset, parts, rows, runs, splits
from cotrr.data.rows import Piece
from cotrr.errors import InputError
from cotrr.store import ASIDE, open_store

# In the folder where parts are committed: the dataset that becomes the output, parts as they were read.
MADE, READ, LOCK = "dataset", "read", ".lock"
_KEYS = ["query_id", "canonical_id"]


class Job(NamedTuple):
    """What all parts of a dataset share."""

    output: str  # folder that every worker sees
    part_bytes: int  # of the run
    fractions: tuple[float, ...]
    compliance_weight: float
    split_salt: str
    split_method: str
    near_duplicates: bool = True  # are looked for

    @property
    def settings(self) -> dict[str, Any]:
        """What the certificate tells of them."""
        own = ("output", "part_bytes", "near_duplicates")
        return {k: v for k, v in self._asdict().items() if k not in own}

    @property
    def aside(self) -> pathlib.Path:
        """Where parts are committed, until the dataset is whole."""
        return pathlib.Path(f"{self.output}.parts")


class Reread(NamedTuple):
    """A part that was read, and what is known of it only now."""

    number: int
    sha256: str
    split: bytes  # [N] int8 index into SPLITS, or DROPPED
    lines_before: int  # in the shard, that its line numbers lack
    dim: int | None  # of the run's embeddings


def generate(
    run: runs.Run,
    job: Job,
    quarantine: pathlib.Path | None,
    runner: shards.Runner,
    progress: Callable[[int], None],
) -> dict[str, Any]:
    """Writes the dataset and its certificate, which it returns; `progress` gets the bytes of each part read.

    Raises InputError for a bad line, unless they go to `quarantine`; where a query's lines are not together
    or the output is something else; and for what `read_run` raises it.
    """
    hashes = dataset.hash_files(run)
    with files.locked(job.aside / LOCK):
        made = _made(job, hashes, quarantine)
        if not made:
            made = _generate(run, job, quarantine, runner, progress, hashes)
            ready = job.aside / MADE
            files.flush(ready / dataset.CERTIFICATE, ready)
            ready.rename(job.output)
            files.flush(job.aside.parent)
        files.remove(job.aside, (MADE, READ, "records", ASIDE, LOCK))
        with contextlib.suppress(OSError):  # of another's files in it
            job.aside.rmdir()
    return made


def _generate(
    run: runs.Run,
    job: Job,
    quarantine: pathlib.Path | None,
    runner: shards.Runner,
    progress: Callable[[int], None],
    hashes: dict[str, str],
) -> dict[str, Any]:
    plan, dim = parts.plan(run, job.part_bytes), parts.dim(run)
    records = []
    for part, record in zip(
        plan, runner(functools.partial(read_part, job, dim), enumerate(plan)), strict=True
    ):
        progress(part.stop - part.start)
        if not quarantine:
            parts.refuse_bad(part, dim, record.result)
        records.append(record)
    found = [record.result for record in records]
    queries = parts.check(run, plan, found)
    split, cost = _split(job, len(plan))
    dim = next((part["dim"] for part in found if part["dim"]), None)
    todo = _reread(plan, records, split, dim)
    written = {pathlib.Path(name).name: sha256 for record in runner(functools.partial(write_part, job), todo)
               for name, sha256 in record.files.items()}  # fmt: skip
    bad = _gather_quarantine(job, records, quarantine) if quarantine else 0
    unknown = sum((Counter(part["unknown_fields"]) for part in found), Counter())
    summary = runs.summarise(
        run,
        rows=sum(part["rows"] for part in found),
        queries=queries,
        embedding_dim=dim,
        unknown_fields=dict(sorted(unknown.items())),
        absent_fields=runs.absent({name for part in found for name in part["stated"]}),
        quarantined=bad,
        quarantine=str(quarantine) if bad else None,
    )
    dropped = int((split == splits.DROPPED).sum())
    return dataset.certify(
        job.aside / MADE,
        written,
        dropped,
        job.settings | {"split": cost},
        summary | {"hashes": hashes},
        near_duplicates=job.near_duplicates,
    )


def _made(job: Job, hashes: dict[str, str], quarantine: pathlib.Path | None) -> dict[str, Any] | None:
    """The certificate of this very dataset; None where nothing is there yet."""
    folder = pathlib.Path(job.output)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    made = dataset.read_certificate(folder)
    settings = {k: v for k, v in made["settings"].items() if k != "split"}
    same = settings == files.finite(job.settings) and made["input"].get("hashes") == hashes
    looked = job.near_duplicates == (made["near_duplicates"].get("why") != certificate.UNASKED)
    if not (same and looked and (quarantine or not made["input"]["quarantined"])):
        raise InputError("the dataset there has other input or other settings", file=folder,
                         remedy="Name another --output, or remove it")  # fmt: skip
    for split in splits.SPLITS:
        for name in dataset.files_of(folder, split):
            if not (folder / name).is_file():
                raise InputError("this file of the dataset is missing", file=folder / name,
                                 remedy="Remove the folder, and call this again")  # fmt: skip
    return made


def read_part(job: Job, dim: int | None, part: tuple[int, Piece]) -> shards.Record:
    """Reads the lines of one part and commits the good ones as Parquet; a pure function of part and dim."""
    number, piece = part

    def work() -> tuple[dict[str, bytes], parts.Facts]:
        ledger = parts.read(piece, dim, quarantine=True, keep_lines=False)
        table = ledger.table()
        name = _part(number)
        return {name: _parquet(table)} | parts.quarantined(ledger, name), parts.facts(ledger, table)

    return shards.once(open_store(str(job.aside)), f"read-{number:06d}", parts.key(piece, dim), work)


def write_part(job: Job, part: Reread) -> shards.Record:
    """Commits the rows of one part, with their labels, by split; a pure function of both."""
    known = part._asdict() | {"split": hashlib.sha256(part.split).hexdigest()}
    key = files.digest([parts.FORMAT, job.settings, known])

    def work() -> tuple[dict[str, bytes], None]:
        table = dataset.load(job.aside / _part(part.number))
        split = np.frombuffer(part.split, np.int8)
        labelled = dataset.with_labels(_completed(table, part), split, job.compliance_weight)
        made = {}
        for index, name in enumerate(splits.SPLITS):
            # Every split has a file, if an empty one, and it is the first part's.
            if (split == index).any() or part.number == 0:
                chosen = dataset.group_by_query(labelled.filter(pa.array(split == index)))
                made[f"{MADE}/{name}-{part.number:06d}.parquet"] = _parquet(chosen)
        return made, None

    return shards.once(open_store(str(job.aside)), f"write-{part.number:06d}", key, work)


def _part(number: int) -> str:
    return f"{READ}/{number:06d}.parquet"


def _parquet(table: pa.Table) -> bytes:
    dataset.save(table, out := io.BytesIO())
    return out.getvalue()


def _completed(table: pa.Table, part: Reread) -> pa.Table:
    """The rows with lines numbered from the shard's first, and embeddings of the run's length."""
    line = pc.add(table["line"], part.lines_before)
    table = table.set_column(table.column_names.index("line"), "line", line)
    kind = pa.list_(pa.float32(), part.dim or 1)
    for name in rows.EMBEDDINGS:
        if table.schema.field(name).type != kind:  # no line of the part has one
            table = table.set_column(table.column_names.index(name), name, pa.nulls(len(table), kind))
    return table


def _split(job: Job, count: int) -> tuple[np.ndarray, dict[str, Any]]:
    """[N] the split of each row of all parts, and what the choice cost."""
    read = lambda number: pq.read_table(job.aside / _part(number), columns=_KEYS, read_dictionary=_KEYS,
                                        memory_map=True)  # fmt: skip
    ids = pa.concat_tables(map(read, range(count)))
    split, cost = splits.split_rows(
        ids["query_id"], ids["canonical_id"], job.fractions, job.split_salt, job.split_method
    )
    return split.astype(np.int8), cost


def _reread(
    plan: list[Piece], records: list[shards.Record], split: np.ndarray, dim: int | None
) -> Iterator[Reread]:
    """What `write_part` needs to know of each part."""
    row, lines = 0, Counter[str]()
    for number, (piece, record) in enumerate(zip(plan, records, strict=True)):
        facts, stop = record.result, row + record.result["rows"]
        before = lines[piece.file] - facts["lines_before"]
        yield Reread(number, record.files[_part(number)], split[row:stop].tobytes(), before, dim)
        row, lines[piece.file] = stop, lines[piece.file] + facts["lines"]


def _gather_quarantine(job: Job, records: list[shards.Record], place: pathlib.Path) -> int:
    """Puts the parts' bad lines one after another; how many there are."""
    place.unlink(missing_ok=True)  # what an earlier reading put there is not this one's
    bad = sum(record.result["quarantined"] for record in records)
    if bad:
        with files.replacing(place) as temporary, open(temporary, "wb") as out:
            for name in itertools.chain.from_iterable(record.files for record in records):
                if name.endswith(parts.QUARANTINE):
                    out.write((job.aside / name).read_bytes())
    return bad
