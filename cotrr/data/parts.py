"""A run in parts of whole queries: each is read by itself; what only all of them show is checked behind."""

import base64
import hashlib
from collections.abc import Collection, Iterable
from typing import Any

import numpy as np
import pyarrow as pa

from cotrr import files
from cotrr.data import rows
from cotrr.data.rows import Piece
from cotrr.data.runs import Ledger, Run, pieces, quarantine_lines, stated
from cotrr.errors import InputError

QUARANTINE = ".quarantine.jsonl"
BEGINNING = 2**20  # bytes of a run
FORMAT = 1  # of what is committed; it changes with anything that a part's results depend on
FORMS = ("query_id/id", "id")  # in which a manifest names its items
Facts = dict[str, Any]  # what is known of a part that was read, in plain JSON types


def plan(run: Run, size: int) -> list[Piece]:
    """The run cut into parts of about `size` bytes, where the next line belongs to another query."""
    return pieces(run, size, whole_queries=True)


def dim(run: Run) -> int | None:
    """The length of the run's embeddings, which its manifest tells, or its first lines; else None."""
    if run.manifest:
        return run.manifest.embedding_dim
    first = run.shards[0]
    if first.suffix == ".gz":
        return None
    return rows.read_block(Piece(str(first), 0, min(BEGINNING, first.stat().st_size)), None, False).dim


def key(part: Piece, *settings: Any) -> str:
    """What tells all that the results of a part depend on."""
    found = hashlib.sha256()
    with files.reading(part.file) as stream:
        stream.seek(part.start)
        for at in range(part.start, part.stop, 2**20):
            found.update(stream.read(min(2**20, part.stop - at)))
    return files.digest([FORMAT, *settings, found.hexdigest()])


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


def refuse_bad(part: Piece, dim: int | None, facts: Facts) -> None:
    """Raises the InputError of the first bad line of a part that has one."""
    if facts["quarantined"]:
        read(part, dim, quarantine=False, keep_lines=False)


def quarantined(ledger: Ledger, name: str) -> dict[str, bytes]:
    """The file of a part's bad lines, by name; none where all are good."""
    return {name + QUARANTINE: b"".join(quarantine_lines(ledger.bad))} if ledger.bad else {}


def facts(ledger: Ledger, table: pa.Table) -> Facts:
    """What is worth knowing of a part behind its reading: hashes of its queries and items, and no row."""
    bad = [known for line, _ in ledger.bad if (known := rows.key_of(line))]
    return {
        "rows": len(table),
        "lines": sum(ledger.lines.values()),
        "lines_before": ledger.lines_before,
        "quarantined": len(ledger.bad),
        "dim": ledger.dim,
        "stated": stated(table, ledger),
        "unknown_fields": dict(sorted(ledger.unknown.items())),
        "unreadable": len(ledger.bad) - len(bad),
        "queries": _written(ledger.queries),
        "items": _named(ledger.seen),
        "bad_items": _named(bad),
    }


def told(facts: Facts) -> Facts:
    """The facts that are worth telling, without the hashes."""
    return {name: value for name, value in facts.items() if name not in ("queries", "items", "bad_items")}


def check(run: Run, plan: list[Piece], found: list[Facts]) -> int:
    """The number of queries in all parts; raises InputError where the parts are not those of one run.

    That is where a query is in two of them, embeddings have two lengths, nothing is there, or the
    manifest lists other items.
    """
    queries = [_read_hashes(part["queries"]) for part in found]
    _check_apart(queries, plan)
    _check_length(plan, [part["dim"] for part in found])
    count, bad = (sum(part[name] for part in found) for name in ("rows", "quarantined"))
    if not count:
        aside = f" ({bad} lines in quarantine)" if bad else ""
        raise InputError(f"the run has no candidates{aside}", file=run.path)
    if run.manifest:
        _check_items(run, found)
    return sum(map(len, queries))


def _hashes(names: Iterable[str]) -> np.ndarray:
    """[N] uint64."""
    digest = lambda name: hashlib.blake2b(name.encode(), digest_size=8).digest()
    return np.frombuffer(b"".join(map(digest, names)), np.uint64)


def _written(names: Iterable[str]) -> str:
    return base64.b64encode(_hashes(names).tobytes()).decode()


def _read_hashes(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), np.uint64)


def _named(keys: Collection[tuple[str, str]]) -> dict[str, str]:
    """The hashes of items by each form of their names."""
    return dict(zip(FORMS, (_written(map("/".join, keys)), _written(key[1] for key in keys)), strict=True))


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


def _check_items(run: Run, parts: list[Facts]) -> None:
    """As `read_run` does: the manifest and the lines must agree; a quarantined line counts as present."""
    assert run.manifest
    names = run.manifest.items_by_stage["scored"]
    listed = _hashes(names)
    gather = lambda field, form: np.concatenate([_read_hashes(part[field][form]) for part in parts])
    form = min(FORMS, key=lambda form: len(np.setxor1d(gather("items", form), listed)))
    found, aside = gather("items", form), gather("bad_items", form)
    missing = np.setdiff1d(listed, np.concatenate([found, aside]))
    unreadable = sum(part["unreadable"] for part in parts)
    if extra := len(np.setdiff1d(found, listed)):
        state = f"{extra} are only in the lines"
    elif len(missing) > unreadable:
        state = f"{len(missing)} only in the manifest, as {names[np.isin(listed, missing).argmax()]!r} is"
    elif not (len(aside) or unreadable) and _repeats(listed, found):
        state = "one is listed more often than it is there"
    else:
        return
    raise InputError(
        f"the manifest lists {len(listed)} scored items, the lines have {len(found)}; {state}",
        file=run.path / "manifest.json", field="items_by_stage.scored",
        remedy="The run is incomplete or mixed up: have Step 4 write it again",
    )  # fmt: skip


def _repeats(listed: np.ndarray, found: np.ndarray) -> bool:
    """Whether something is listed twice, and more often than it was found."""
    (item, count), (other, there) = (np.unique(part, return_counts=True) for part in (listed, found))
    again = count > 1
    return bool((count[again] > there[np.searchsorted(other, item[again])]).any())
