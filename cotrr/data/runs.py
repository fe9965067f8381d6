"""Reading a Step 4 run: a folder or a bare JSONL file becomes one Arrow table, or a clear error."""

import base64
import collections
import functools
import itertools
import pathlib
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, NamedTuple

import msgspec
import pyarrow as pa
import pyarrow.compute as pc

from cotrr import files, shards
from cotrr.data import rows
from cotrr.data.contract import ATTRIBUTES, Manifest
from cotrr.data.rows import Line, Piece, explain, key_of
from cotrr.errors import InputError

PIECE = 2**24  # bytes of a shard that are read at once
WORTH_WORKERS = 2**25  # bytes of a run above which another process saves more time than it costs


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
    """The run at a path or URL: a run folder (or a link to one) or a bare `.jsonl[.gz]` file.

    Raises InputError where there is nothing to read, or a run is not `completed`.
    """
    path = files.place(path)
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
    if not isinstance(run.path, pathlib.Path):
        return  # nothing here stands inside what is far away
    home = run.path.resolve()
    for output in outputs:
        place = output.resolve()
        if place == home or (home.is_dir() and place.is_relative_to(home)):
            raise InputError("the output would stand inside the run that is read", file=output)


def read_lines(run: Run, progress: Callable[[int], None] | None = None) -> Iterator[Line]:
    """Every non-blank line of the run, in order; `progress` gets the number of bytes of each."""
    for shard in run.shards:
        number = 0
        try:
            for number, content in enumerate(rows.lines_of(_whole(shard)), 1):
                if progress:
                    progress(len(content))
                if not content.isspace():
                    yield Line(str(shard), number, content)
        except rows.GZIP_ERRORS as error:
            raise rows.broken_gzip(shard, number, error) from None


def pieces(run: Run, size: int, *, whole_queries: bool = False) -> list[Piece]:
    """The run cut into pieces of about `size` bytes, in order; a gzip shard is one piece.

    With `whole_queries` a cut is made only where the next line belongs to another query.
    """
    found = []
    for shard in map(_whole, run.shards):
        step = max(shard.stop, 1) if shard.file.endswith(".gz") else size
        cuts = list(range(step, shard.stop, step))
        if whole_queries:
            cuts = sorted({cut for cut in (_next_query(shard.file, at) for at in cuts) if cut < shard.stop})
        found += itertools.starmap(
            functools.partial(Piece, shard.file), itertools.pairwise([0, *cuts, shard.stop])
        )
    return found


def _next_query(file: str, at: int) -> int:
    """Where the first line behind a byte begins whose query is not that of the line before it."""
    with files.reading(file) as stream:
        stream.seek(at - 1)
        at += len(stream.readline()) - 1
        query = None
        for content in stream:
            found = rows.query_of(content)
            if query is not None and found not in (None, query):
                return at
            query = query or found
            at += len(content)
    return at


def _whole(shard: pathlib.Path) -> Piece:
    return Piece(str(shard), 0, shard.stat().st_size)


@rows.without_collections()
def read_run(
    path: str | pathlib.Path,
    *,
    quarantine: pathlib.Path | None = None,
    keep_lines: bool = False,
    progress: Callable[[int], None] | None = None,
    workers: int | None = None,
) -> Reading:
    """Reads a whole run, validated, as one Arrow table with a row per candidate.

    A bad line raises InputError, or with `quarantine` is written there with its reason and counted.
    `keep_lines` adds the column `line_json`: the line as it came, without its embeddings.  Large runs
    are read by `workers` processes (unset: one a core), which changes nothing but the time.
    """
    run = find_run(path)
    ledger = Ledger(run.manifest.embedding_dim if run.manifest else None, stop_at_bad=quarantine is None)
    todo = pieces(run, PIECE)
    if workers is None:
        large = sum(p.stop - p.start for p in todo) >= WORTH_WORKERS
        workers = shards.cores() if large else 1
    with shards.local(min(workers, len(todo))) as runner:
        blocks = runner(_reading(ledger.dim, keep_lines), todo)
        for piece, block in zip(todo, blocks, strict=True):
            if ledger.dim and block.dim not in (None, ledger.dim):  # it took its own first for the run's
                block = rows.read_block(piece, ledger.dim, keep_lines)
            ledger.add(piece, block)
            if progress:
                progress(piece.stop - piece.start)
    if quarantine is not None:
        quarantine.unlink(missing_ok=True)  # what an earlier reading put there is not this one's
        if ledger.bad:
            with files.replacing(quarantine) as temporary, open(temporary, "wb") as out:
                out.writelines(quarantine_lines(ledger.bad))
    if not ledger.seen:
        aside = f" ({len(ledger.bad)} lines in quarantine)" if ledger.bad else ""
        raise InputError(f"the run has no candidates{aside}", file=run.path)
    if run.manifest:
        _check_manifest(run, ledger.seen.keys(), [line for line, _ in ledger.bad])
    table = ledger.table()
    summary = summarise(
        run,
        rows=len(table),
        queries=len(ledger.queries),
        embedding_dim=ledger.dim,
        unknown_fields=dict(sorted(ledger.unknown.items())),
        absent_fields=absent(stated(table, ledger)),
        quarantined=len(ledger.bad),
        quarantine=str(quarantine) if ledger.bad else None,
    )
    return Reading(table, summary)


def _reading(dim: int | None, keep_lines: bool) -> Callable[[Piece], rows.Block]:
    return functools.partial(rows.read_block, dim=dim, keep_lines=keep_lines)


class Ledger:
    """Puts blocks together, in order, and checks what a line alone cannot show.

    No two lines have one key, and what belongs to a query is the same wherever its lines state it.
    """

    def __init__(self, dim: int | None, stop_at_bad: bool, lines_before: int = 0):
        self.dim = dim
        self.seen: dict[tuple[str, str], tuple[str, int]] = {}  # file and line of each key
        self.queries: dict[str, list[tuple[int, rows.Facts]]] = {}  # unlike facts, each with its first line
        self.unknown: collections.Counter[str] = collections.Counter()
        self.states_clip = False
        self.bad: list[tuple[Line, InputError]] = []
        self._stop_at_bad = stop_at_bad
        self.lines_before = lines_before  # of a single shard, that nobody read
        self.lines: collections.Counter[str] = collections.Counter()  # that were read, by shard
        self._tables: list[pa.Table] = []

    def add(self, piece: Piece, block: rows.Block) -> None:
        """Takes the next block; raises InputError where it breaks off, or has a bad line to stop at."""
        before = self.lines_before + self.lines[piece.file]
        self.lines[piece.file] += block.lines
        self.dim = self.dim or block.dim
        column = block.table.column_names.index("line")
        table = block.table.set_column(column, "line", pc.add(block.table["line"], before))
        wrong = self._disagreeing(piece.file, table, block)
        bad = [(line._replace(number=line.number + before), _moved(error, before))
               for line, error in block.bad]  # fmt: skip
        if self._stop_at_bad and (bad or wrong):
            raise min([*wrong.values(), *(error for _, error in bad)], key=lambda error: error.line or 0)
        unknown, states_clip = block.unknown, block.states_clip
        if wrong:
            bad += _with_lines(piece, before, wrong.values())
            good = [row not in wrong for row in range(len(table))]
            table = table.filter(pa.array(good))
            unknown = list(itertools.compress(unknown, good))
            states_clip = list(itertools.compress(states_clip, good))
        self.bad += sorted(bad, key=lambda pair: pair[0].number)
        self.states_clip |= any(states_clip)
        self.unknown.update(itertools.chain.from_iterable(unknown))
        self._tables.append(table)
        if block.end:
            raise block.end

    def table(self) -> pa.Table:
        """All good rows."""
        kind = pa.list_(pa.float32(), self.dim or 1)
        for i, table in enumerate(self._tables):  # a block without embeddings did not know their length
            for name in rows.EMBEDDINGS:
                if table.schema.field(name).type != kind:
                    at = table.column_names.index(name)
                    self._tables[i] = table = table.set_column(at, name, pa.nulls(len(table), kind))
        return pa.concat_tables(self._tables)

    def _disagreeing(self, file: str, table: pa.Table, block: rows.Block) -> dict[int, InputError]:
        """What is wrong with rows of a block, by row; the others are entered."""
        wrong, verdicts = {}, dict[int, tuple[str, int] | None]()
        columns = (table[name].to_pylist() for name in ("query_id", "id", "line"))
        for row, (query, item, line, fact) in enumerate(zip(*columns, block.fact, strict=True)):
            reason, field = None, "id"
            if first := self.seen.get((query, item)):
                reason = f"({query!r}, {item!r}) was there already on {first[0]}, line {first[1]}"
            else:
                if fact not in verdicts:
                    verdicts[fact] = self._contradiction(block.facts[fact], line)
                if verdict := verdicts[fact]:
                    field, before = verdict
                    reason = f"differs from what query {query!r} had on line {before}"
            if reason:
                wrong[row] = InputError(reason, file=file, line=line, field=field, remedy=rows.FIX)
            else:
                self.seen[query, item] = file, line
        return wrong

    def _contradiction(self, facts: rows.Facts, line: int) -> tuple[str, int] | None:
        """The field in which a line differs from what was said of its query, and on which line."""
        known = self.queries.setdefault(facts.query_id, [])
        if any(facts == other for _, other in known):
            return None
        for field, value in facts._asdict().items() if known else ():
            said = ((at, getattr(other, field)) for at, other in known)
            first, earlier = next((pair for pair in said if pair[1] is not None), (line, value))
            if value is not None and earlier != value:
                return field, first
        known.append((line, facts))
        return None


def _moved(error: InputError, lines: int) -> InputError:
    """The error of a line whose number counted from the piece's first, `lines` behind the shard's."""
    number = (error.line or 0) + lines
    return InputError(error.reason, file=error.file, line=number, field=error.field, remedy=rows.FIX)


def _with_lines(piece: Piece, before: int, errors: Collection[InputError]) -> list[tuple[Line, InputError]]:
    """Errors of good lines of a piece with those lines, which are read again: there are few."""
    errors_at = {error.line: error for error in errors}
    numbered = itertools.starmap(
        functools.partial(Line, piece.file), enumerate(rows.lines_of(piece), before + 1)
    )
    wanted = (line for line in numbered if line.number in errors_at)
    # No further than needed: behind them a gzip stream may break.
    return [(line, errors_at[line.number]) for line in itertools.islice(wanted, len(errors_at))]


def summarise(run: Run, **counts: Any) -> dict[str, Any]:
    """What a certificate tells of the run that was read, and the `counts` of what was found in it."""
    return {
        "input": str(run.path),
        "shards": [shard.name for shard in run.shards],
        "manifest": msgspec.structs.asdict(run.manifest) | {"items_by_stage": {
            stage: len(items) for stage, items in run.manifest.items_by_stage.items()
        }} if run.manifest else None,
        **counts,
    }  # fmt: skip


def stated(table: pa.Table, ledger: Ledger) -> list[str]:
    """The attributes and embeddings that at least one line states."""
    found = [name for name in (*ATTRIBUTES, *rows.EMBEDDINGS) if table[name].null_count < len(table)]
    return [name for name in found if name != "clip_score" or ledger.states_clip]  # else it was filled in


def absent(stated: Collection[str]) -> list[str]:
    """The attributes and embeddings that no line states."""
    return sorted({*ATTRIBUTES, *rows.EMBEDDINGS} - {*stated})


def quarantine_lines(bad: list[tuple[Line, InputError]]) -> Iterator[bytes]:
    """A JSON line for each bad line: where it was, what is wrong with it, and the line itself."""
    for line, error in bad:
        record: dict[str, Any] = {
            "file": line.file, "line": line.number, "field": error.field, "reason": error.reason,
        }  # fmt: skip
        try:
            record["content"] = line.content.decode().rstrip("\n")
        except UnicodeDecodeError:
            record["content_base64"] = base64.b64encode(line.content).decode()
        yield msgspec.json.encode(record) + b"\n"


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
