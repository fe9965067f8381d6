"""A dataset folder: Parquet by split, and the certificate of what was measured on it.

In the files an embedding is FIXED_LEN_BYTE_ARRAY, its float32 numbers in little-endian order, which
`np.frombuffer(value, "<f4")` reads: lists of floats take ten times as long.  `text_embedding` has a
dictionary, so a query's is stored once.
"""

import functools
import io
import itertools
import json
import pathlib
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cotrr import files
from cotrr.data import certificate, labels, rows, runs, splits
from cotrr.data.contract import ATTRIBUTES
from cotrr.errors import InputError

CERTIFICATE = "certificate.json"
ROW_GROUP = 2**15  # rows: what a streaming reader holds at once


def prepare(
    table: pa.Table, fractions: tuple[float, ...], compliance_weight: float, salt: str, method: str
) -> tuple[pa.Table, dict[str, Any]]:
    """Adds `split`, `y` and `label`; rows dropped by the split have split null."""
    split, cost = splits.split_rows(table["query_id"], table["canonical_id"], fractions, salt, method)
    return with_labels(table, split, compliance_weight), cost


def with_labels(table: pa.Table, split: np.ndarray, compliance_weight: float) -> pa.Table:
    """Adds `split` (of indices [N] into SPLITS, or DROPPED), `y` and `label`."""
    marks = labels.label(table, compliance_weight)
    names = np.array([*splits.SPLITS, None], object)[split]
    table = table.append_column("split", pa.array(names, pa.string()))
    table = table.append_column("y", pa.array(marks.y, pa.float64(), mask=np.isnan(marks.y)))
    return table.append_column("label", pa.array(marks.kind, pa.string()))


def write(
    table: pa.Table,
    folder: pathlib.Path,
    settings: dict[str, Any],
    summary: dict[str, Any],
    *,
    near_duplicates: bool = True,
) -> dict[str, Any]:
    """Writes `train|validation|test.parquet` and their certificate, measured on what was written."""
    for name in splits.SPLITS:
        chosen = np.flatnonzero(table["split"].to_numpy(zero_copy_only=False) == name)
        with files.replacing(folder / f"{name}.parquet") as temporary:
            save(group_by_query(table.take(chosen)), temporary)
    written = {f"{name}.parquet": files.sha256(folder / f"{name}.parquet") for name in splits.SPLITS}
    dropped = table["split"].null_count
    made = certify(folder, written, dropped, settings, summary, near_duplicates=near_duplicates)
    there = [path.name for path in folder.iterdir()]
    stale = {name for split in splits.SPLITS for name in _of_split(split, there)} - {*written}
    files.remove(folder, stale)  # of a dataset in parts that was there
    return made


def certify(
    folder: pathlib.Path,
    written: dict[str, str],
    dropped: int,
    settings: dict[str, Any],
    summary: dict[str, Any],
    *,
    near_duplicates: bool = True,
) -> dict[str, Any]:
    """Writes and returns the certificate of the files in a folder, whose SHA-256 is told by name."""
    tables = {
        split: itertools.chain.from_iterable(_stream(folder / name) for name in _of_split(split, written))
        for split in splits.SPLITS
    }
    result = certificate.certify(
        tables, dropped, settings, summary, near_duplicates=near_duplicates, folder=folder
    ) | {"files": written}
    files.write_json(folder / CERTIFICATE, result)
    return result


def _of_split(split: str, names: Iterable[str]) -> list[str]:
    return sorted(filter(re.compile(rf"{split}(-\d+)?\.parquet").fullmatch, names))


def save(table: pa.Table, path: pathlib.Path | BinaryIO) -> None:
    """Writes a table as Parquet, its embeddings as bytes."""
    for name in rows.EMBEDDINGS:
        table = _replace(table, name, rows.to_bytes(table[name]))
    leaves = _leaves(table.schema)
    pq.write_table(
        table,
        path,
        row_group_size=ROW_GROUP,
        compression=dict.fromkeys(leaves - {*rows.EMBEDDINGS}, "zstd"),  # floats would shrink by 7 %
        use_dictionary=sorted(leaves - {"image_embedding"}),
        dictionary_pagesize_limit=2**28,
    )


@functools.lru_cache
def _leaves(schema: pa.Schema) -> frozenset[str]:
    """The paths of the columns that Parquet makes of a schema; kept, since asking leaves garbage behind."""
    pq.write_table(schema.empty_table(), sink := io.BytesIO())
    return frozenset(column.path for column in pq.ParquetFile(sink).schema)


def load(path: pathlib.Path) -> pa.Table:
    """The table in a Parquet file, its embeddings as lists; raises pa.ArrowException where it is none."""
    return _with_lists(pq.read_table(path, memory_map=True))


def _stream(path: pathlib.Path) -> Iterator[pa.Table]:
    """What `load` gives, by row groups; at least one table."""
    with pq.ParquetFile(path, memory_map=True) as file:
        yield _with_lists(file.schema_arrow.empty_table())
        for group in range(file.num_row_groups):
            yield _with_lists(file.read_row_group(group))


def _with_lists(table: pa.Table) -> pa.Table:
    for name in {*rows.EMBEDDINGS} & {*table.column_names}:
        table = _replace(table, name, rows.from_bytes(table[name]))
    return table


def _replace(table: pa.Table, name: str, column: pa.ChunkedArray) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, column)


def hash_files(run: runs.Run) -> dict[str, str]:
    """SHA-256 of every file of a run, its manifest included, by file name."""
    manifest = [run.path / "manifest.json"] if run.manifest else []
    return {path.name: files.sha256(path) for path in (*manifest, *run.shards)}


def group_by_query(table: pa.Table) -> pa.Table:
    """The rows with each query's together; queries and rows keep their order of appearance."""
    _, first, query = np.unique(
        table["query_id"].to_numpy(zero_copy_only=False), return_index=True, return_inverse=True
    )
    return table.take(np.argsort(first[query], kind="stable")) if len(table) else table


class _Certificate(msgspec.Struct):
    """The parts of a certificate that others rely on, to check what was read."""

    files: dict[str, str]
    settings: dict[str, Any]
    counts: dict[str, dict[str, int]]
    overlap: dict[str, dict[str, int]]
    near_duplicates: dict[str, Any]
    label_leakage: dict[str, str]
    labels: dict[str, float]
    input: dict[str, Any]
    rows_dropped: int


def read_certificate(folder: str | pathlib.Path) -> dict[str, Any]:
    """The certificate of a dataset folder; raises InputError where there is none."""
    path = pathlib.Path(folder) / CERTIFICATE
    try:
        content = path.read_bytes()
        msgspec.json.decode(content, type=_Certificate)
        return json.loads(content)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            "no certificate, so this is no dataset",
            file=path,
            remedy="Make one: python -m experiments.generate_training_data --help",
        ) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"no certificate of cotrr: {error}", file=path) from None


def files_of(folder: str | pathlib.Path, split: str) -> list[str]:
    """The names of a split's files, in order: one, or many where the dataset was made in parts."""
    return _of_split(split, read_certificate(folder)["files"]) or [f"{split}.parquet"]


def read(folder: str | pathlib.Path, split: str) -> pa.Table:
    """One split; raises InputError where a file is missing or not the one that was certified."""
    return pa.concat_tables([read_part(folder, name) for name in files_of(folder, split)])


def read_part(folder: str | pathlib.Path, name: str) -> pa.Table:
    """One file of a split, whose queries stand in no other; raises InputError as `read` does."""
    path = pathlib.Path(folder) / name
    certified = read_certificate(folder)["files"].get(name)
    if not path.is_file():
        raise InputError("this split is missing", file=path, remedy="Generate the dataset again")
    with ThreadPoolExecutor(1) as aside:  # hashing takes as long as reading
        digest = aside.submit(files.sha256, path)
        try:
            table, problem = load(path), None
        except pa.ArrowException as error:
            table, problem = pa.table({}), InputError(f"not Parquet: {error}", file=path)
    if digest.result() != certified:
        raise InputError(
            "the file is not the one that the certificate was made for",
            file=path,
            remedy="Generate the dataset again",
        )
    if problem:
        raise problem
    if absent := {*rows.KEYS, *ATTRIBUTES, "y", "label", "image_embedding"} - set(table.column_names):
        raise InputError(f"columns are missing: {', '.join(sorted(absent))}", file=path)
    return table


def write_lines(run: runs.Run, table: pa.Table, path: pathlib.Path) -> dict[str, int]:
    """Writes the run's own lines with `split` and `y` added; dropped rows have split null.

    Lines in quarantine are left out, as they are from the table.  Returns the counts by split.
    """
    columns = (table[name].to_pylist() for name in ("file", "line", "split", "y", "label"))
    marks = {(file, number): rest for file, number, *rest in zip(*columns, strict=True)}
    counts: dict[str, int] = {name: 0 for name in (*splits.SPLITS, "dropped")}
    decode = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
    with files.replacing(path) as temporary, open(temporary, "wb") as out:
        for line in runs.read_lines(run):
            mark = marks.get((pathlib.Path(line.file).name, line.number))
            if mark is None:
                continue
            split, y, kind = mark
            added = decode(line.content) | {"split": split, "y": y, "label": kind}
            out.write(msgspec.json.encode(added) + b"\n")
            counts[split or "dropped"] += 1
    return counts
