"""A run in parts of whole queries: each is read by itself; what only all of them show is checked behind."""

import base64
import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa

from cotrr import files
from cotrr.data import rows
from cotrr.data.rows import Piece
from cotrr.data.runs import Ledger, Run, pieces, quarantine_lines, stated
from cotrr.errors import InputError

QUARANTINE = ".quarantine.jsonl"
Facts = dict[str, Any]  # what is known of a part that was read, in plain JSON types


def plan(run: Run, size: int) -> list[Piece]:
    """The run cut into parts of about `size` bytes, where the next line belongs to another query."""
    return pieces(run, size, whole_queries=True)


def dim(run: Run) -> int | None:
    """The length of the embeddings, where the run's manifest tells it."""
    return run.manifest.embedding_dim if run.manifest else None


def digest(part: Piece) -> str:
    """SHA-256 of the bytes of a part."""
    found = hashlib.sha256()
    with files.reading(part.file) as stream:
        stream.seek(part.start)
        for at in range(part.start, part.stop, 2**20):
            found.update(stream.read(min(2**20, part.stop - at)))
    return found.hexdigest()


def read(part: Piece, dim: int | None, *, quarantine: bool, keep_lines: bool) -> Ledger:
    """A part read by itself; its lines are numbered from `lines_before`, which is told where one is bad.

    All checks are made that `read_run` makes, within the part; the first bad line raises InputError,
    unless they go to `quarantine`.
    """
    block, trouble = rows.read_block(part, dim, keep_lines), False
    ledger = Ledger(dim, stop_at_bad=not quarantine)
    try:
        ledger.add(part, block)
    except InputError:
        trouble = True
    if trouble or ledger.bad:  # only then are the lines before it worth counting
        ledger = Ledger(dim, not quarantine, rows.lines_before(part))
        ledger.add(part, block)
    return ledger


def quarantined(ledger: Ledger, name: str) -> dict[str, bytes]:
    """The file of a part's bad lines, by name; none where all are good."""
    return {name + QUARANTINE: b"".join(quarantine_lines(ledger.bad))} if ledger.bad else {}


def facts(ledger: Ledger, table: pa.Table) -> Facts:
    """What is worth knowing of a part behind its reading: 11 bytes a query, and no row."""
    return {
        "rows": len(table),
        "lines": sum(ledger.lines.values()),
        "lines_before": ledger.lines_before,
        "quarantined": len(ledger.bad),
        "dim": ledger.dim,
        "stated": stated(table, ledger),
        "unknown_fields": dict(sorted(ledger.unknown.items())),
        "items": _sums(ledger.seen),
        "queries": base64.b64encode(_hashes(ledger.queries).tobytes()).decode(),
    }


def check(run: Run, plan: list[Piece], found: list[Facts]) -> int:
    """The number of queries in all parts; raises InputError where the parts are not those of one run.

    That is where a query is in two of them, embeddings have two lengths, nothing is there, or the
    manifest lists other items.
    """
    queries = [np.frombuffer(base64.b64decode(part["queries"]), np.uint64) for part in found]
    _check_apart(queries, plan)
    _check_length(plan, [part["dim"] for part in found])
    count, bad = (sum(part[name] for part in found) for name in ("rows", "quarantined"))
    if not count:
        aside = f" ({bad} lines in quarantine)" if bad else ""
        raise InputError(f"the run has no candidates{aside}", file=run.path)
    _check_items(run, found, count, bad)
    return sum(map(len, queries))


def _hashes(names: Iterable[str]) -> np.ndarray:
    """[N] uint64."""
    digest = lambda name: hashlib.blake2b(name.encode(), digest_size=8).digest()
    return np.frombuffer(b"".join(map(digest, names)), np.uint64)


def _sums(keys: Iterable[tuple[str, str]]) -> list[int]:
    """Hashes of items added up, modulo 2^64: the same in any order; of `query_id/id`, and of `id` alone."""
    keys = list(keys)
    return [int(_hashes(names).sum()) for names in (map("/".join, keys), (key[1] for key in keys))]


def _check_apart(queries: list[np.ndarray], plan: list[Piece]) -> None:
    """Raises InputError where a query is in two parts."""
    whole, part = np.concatenate(queries), np.repeat(np.arange(len(plan)), list(map(len, queries)))
    order = np.argsort(whole, kind="stable")
    twice = np.flatnonzero(np.diff(whole[order]) == 0)
    if len(twice):
        first, again = (plan[part[order[twice[0] + i]]] for i in (0, 1))
        raise InputError(
            f"a query has lines behind byte {first.start:,} of {first.file} and again here, behind byte "
            f"{again.start:,}",
            file=again.file,
            remedy="In parts, a query's lines must stand together: sort the run, or read it at once",
        )


def _check_length(plan: list[Piece], dims: list[int | None]) -> None:
    known = [(dim, part) for dim, part in zip(dims, plan, strict=True) if dim]
    for dim, part in known:
        if dim != known[0][0]:
            raise InputError(
                f"embeddings have {dim} numbers behind byte {part.start:,} where this run has {known[0][0]}",
                file=part.file, remedy="A run holds embeddings of one encoder: have Step 4 write it again",
            )  # fmt: skip


def _check_items(run: Run, parts: list[Facts], found: int, bad: int) -> None:
    """The manifest's scored items and the lines must agree; a quarantined line counts as present."""
    if not run.manifest:
        return
    listed = run.manifest.items_by_stage["scored"]
    sums = [sum(part["items"][form] for part in parts) % 2**64 for form in (0, 1)]
    agree = int(_hashes(listed).sum()) in sums
    if not (agree or (bad and found <= len(listed) <= found + bad)):
        raise InputError(
            f"the manifest lists {len(listed)} scored items, the lines have {found}, and they disagree",
            file=run.path / "manifest.json", field="items_by_stage.scored",
            remedy="The run is incomplete or mixed up: have Step 4 write it again",
        )  # fmt: skip
