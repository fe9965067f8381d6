"""Reading a Step 4 run: a folder or a bare JSONL file becomes one Arrow table, or a clear error."""

import base64
import collections
import gzip
import pathlib
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, NamedTuple

import msgspec
import pyarrow as pa

from cotrr import files
from cotrr.data.contract import ATTRIBUTES, Manifest
from cotrr.data.rows import Line, Reader, explain, key_of
from cotrr.errors import InputError


class Run(NamedTuple):
    """Where a run is: its shards in reading order, and its manifest where it has one."""

    path: pathlib.Path
    shards: tuple[pathlib.Path, ...]
    manifest: Manifest | None


class Reading(NamedTuple):
    """A run that was read: one row per candidate, and what was noticed on the way."""

    table: pa.Table
    summary: dict[str, Any]


def find_run(path: str | pathlib.Path) -> Run:
    """The run at `path`: a run folder (or a link to one) or a bare `.jsonl[.gz]` file.

    Raises InputError where there is nothing to read, or a run is not `completed`.
    """
    path = pathlib.Path(path)
    if path.is_file():
        return Run(path, (path,), None)
    if not path.is_dir():
        raise InputError("no such run", file=path, remedy="Name a run folder or a JSONL file")
    manifest = _read_manifest(path / "manifest.json")
    return Run(path, _find_shards(path, manifest), manifest)


def _read_manifest(path: pathlib.Path) -> Manifest:
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
    except FileNotFoundError:
        raise InputError(
            "a run folder needs its manifest",
            file=path,
            remedy="Wait for the run to end, or name its JSONL file itself",
        ) from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        reason, field = explain(error)
        raise InputError(reason, file=path, field=field) from None
    if manifest.status != "completed":
        raise InputError(
            f"status is {manifest.status!r}, not 'completed'",
            file=path,
            field="status",
            remedy="Only completed runs are read",
        )
    if "scored" not in manifest.items_by_stage:
        raise InputError("the stage `scored` is missing", file=path, field="items_by_stage")
    return manifest


def _find_shards(folder: pathlib.Path, manifest: Manifest) -> tuple[pathlib.Path, ...]:
    if manifest.scored_path:
        named = folder / manifest.scored_path.replace("\0", "")
        if not named.resolve().is_relative_to(folder.resolve()):
            raise InputError(
                f"{manifest.scored_path!r} leads out of the run folder",
                file=folder / "manifest.json",
                field="scored_path",
            )
        if not named.is_file():
            raise InputError(
                f"{manifest.scored_path!r} is not there", file=folder / "manifest.json", field="scored_path"
            )
        return (named,)
    patterns = ("scored.jsonl", "scored.jsonl.gz", "scored-*.jsonl", "scored-*.jsonl.gz")
    shards = tuple(sorted(shard for pattern in patterns for shard in folder.glob(pattern)))
    if not shards:
        raise InputError("no scored.jsonl, scored-*.jsonl or their .gz here", file=folder)
    stems = collections.Counter(shard.name.removesuffix(".gz") for shard in shards)
    for stem, count in stems.items():
        if count > 1:
            raise InputError(
                "the shard is there both plain and gzipped", file=folder / stem, remedy="Keep one"
            )
    return shards


def refuse_own_files(run: Run, outputs: Iterable[pathlib.Path]) -> None:
    """Raises InputError where an output would overwrite the run, or stand inside its folder."""
    home = run.path.resolve()
    for output in outputs:
        place = output.resolve()
        if place == home or (home.is_dir() and place.is_relative_to(home)):
            raise InputError("the output would stand inside the run that is read", file=output)


def read_lines(run: Run, progress: Callable[[int], None] | None = None) -> Iterator[Line]:
    """Every non-blank line of the run, in order; `progress` gets the number of bytes of each."""
    for shard in run.shards:
        opener = gzip.open if shard.suffix == ".gz" else open
        number = 0
        try:
            with opener(shard, "rb") as stream:
                for number, content in enumerate(stream, 1):
                    if progress:
                        progress(len(content))
                    if not content.isspace():
                        yield Line(str(shard), number, content)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise InputError(
                f"the gzip stream breaks after line {number} ({error})",
                file=shard,
                remedy="Copy the file again",
            ) from None


def read_run(
    path: str | pathlib.Path,
    *,
    quarantine: pathlib.Path | None = None,
    keep_lines: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Reading:
    """Reads a whole run, validated, as one Arrow table with a row per candidate.

    A bad line raises InputError, or with `quarantine` is written there with its reason and counted.
    `keep_lines` adds the column `line_json`: the line as it came, without its embeddings.
    """
    run = find_run(path)
    reader = Reader(run.manifest.embedding_dim if run.manifest else None, keep_lines)
    bad: list[tuple[Line, InputError]] = []
    for line in read_lines(run, progress):
        try:
            reader.add(line)
        except InputError as error:
            if quarantine is None:
                raise
            bad.append((line, error))
    if quarantine is not None:
        quarantine.unlink(missing_ok=True)  # what an earlier reading put there is not this one's
        if bad:
            _write_quarantine(quarantine, bad)
    if not reader.seen:
        aside = f" ({len(bad)} lines in quarantine)" if bad else ""
        raise InputError(f"the run has no candidates{aside}", file=run.path)
    if run.manifest:
        _check_manifest(run, reader.seen.keys(), [line for line, _ in bad])
    return Reading(reader.table(), _summarise(run, reader, bad, quarantine))


def _summarise(run: Run, reader: Reader, bad: list, quarantine: pathlib.Path | None) -> dict[str, Any]:
    absent = [name for name, values in reader.columns.items()
              if name in ATTRIBUTES and all(v is None for v in values)]  # fmt: skip
    absent += [name for name, vectors in reader.vectors.items() if all(v is None for v in vectors)]
    return {
        "input": str(run.path),
        "shards": [shard.name for shard in run.shards],
        "manifest": msgspec.structs.asdict(run.manifest) | {"items_by_stage": {
            stage: len(items) for stage, items in run.manifest.items_by_stage.items()
        }} if run.manifest else None,
        "rows": len(reader.seen),
        "queries": len(reader.queries),
        "embedding_dim": reader.dim,
        "unknown_fields": dict(sorted(reader.unknown.items())),
        "absent_fields": sorted(absent),
        "quarantined": len(bad),
        "quarantine": str(quarantine) if bad else None,
    }  # fmt: skip


def _write_quarantine(path: pathlib.Path, bad: list[tuple[Line, InputError]]) -> None:
    with files.replacing(path) as temporary, open(temporary, "wb") as out:
        for line, error in bad:
            record: dict[str, Any] = {
                "file": line.file, "line": line.number, "field": error.field, "reason": error.reason,
            }  # fmt: skip
            try:
                record["content"] = line.content.decode().rstrip("\n")
            except UnicodeDecodeError:
                record["content_base64"] = base64.b64encode(line.content).decode()
            out.write(msgspec.json.encode(record) + b"\n")


def _check_manifest(run: Run, rows: Collection[tuple[str, str]], bad: list[Line]) -> None:
    """The manifest's scored items and the lines must agree; a quarantined line counts as present."""
    assert run.manifest
    listed = run.manifest.items_by_stage["scored"]
    aside = [key for key in map(key_of, bad) if key]
    unreadable = len(bad) - len(aside)
    # Items are named `query_id/id` or `id` alone; the form with fewer strangers is the one meant.
    # A bare id stands once, or once for each query that has it.
    pairs, ids = ["/".join(key) for key in rows], [key[1] for key in rows]
    name, found = min(
        ((lambda key: "/".join(key), pairs), (lambda key: key[1], ids)),
        key=lambda form: len(set(form[1]) ^ set(listed)),
    )
    extra = set(found) - set(listed)
    missing = set(listed) - set(found) - {name(key) for key in aside}
    twice = collections.Counter(listed) - collections.Counter(ids if found is ids else pairs)
    if extra:
        example, state = min(extra), "only in the lines"
    elif len(missing) > unreadable:
        example, state = min(missing), "only in the manifest"
    elif not bad and len(set(listed)) < len(listed) and twice:
        example, state = min(twice), "listed more often than it is there"
    else:
        return
    raise InputError(
        f"the manifest lists {len(listed)} scored items, the lines have {len(rows)}; "
        f"first example {state}: {example!r}",
        file=run.path / "manifest.json",
        field="items_by_stage.scored",
        remedy="The run is incomplete or mixed up: have Step 4 write it again",
    )
