"""Reranked candidates as the lines that go back to Step 4: of lists in memory, or of a run part by part."""

import base64
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pyarrow as pa

from cotrr import files, shards
from cotrr.data import runs
from cotrr.data.lists import Lists, to_lists
from cotrr.data.rows import Piece
from cotrr.deploy.reranker import arrange
from cotrr.deploy.scorer import Query, Scorer
from cotrr.deploy.store import open_store
from cotrr.errors import InputError
from cotrr.ranker import model_files
from cotrr.ranker.calibrators import Scored

KEPT = ("query_id", "domain", "id", "canonical_id")


class Job(NamedTuple):
    """What all parts of a batch share."""

    model: str  # its folder
    version: str
    top_m: int
    quarantine: bool  # bad lines are put aside; else the first ends the job
    output: str  # a folder, or a URL such as s3://bucket/path
    part_bytes: int

    @property
    def settings(self) -> dict[str, Any]:
        """What the bytes of the output depend on, besides the input."""
        return {k: v for k, v in self._asdict().items() if k not in ("model", "output")}


def left_behind(lists: Lists, scored: Scored, top_m: int) -> int:
    """Queries whose highest score stands behind the first `top_m` candidates, so it stays there."""
    return int((scored.logit.argmax(axis=1) >= top_m).sum()) if top_m else 0


def lines(table: pa.Table, lists: Lists, scored: Scored, top_m: int, version: str) -> Iterator[bytes]:
    """One JSON line per candidate, queries in input order and their candidates by rank.

    Each holds the scored line as it came, without its embeddings (`table` was read with
    `keep_lines`), its keys in full, and what the contract adds.  `original_rank` is the place among
    the query's lines; `rerank_std` is null where a model has a single lane.
    """
    decode = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
    content = table["line_json"].to_pylist()
    keys = table.select(KEPT).to_pylist()
    number = lambda value: round(float(value), 6) if np.isfinite(value) else None
    for q in range(len(lists.query_id)):
        for rank, i in enumerate(arrange(scored.logit[q][lists.where[q]], top_m=top_m), 1):
            row = int(lists.row[q, i])
            added = {
                "rerank_score": number(scored.score[q, i]),
                "rerank_std": number(scored.std[q, i]),
                "rerank_low": number(scored.low[q, i]),
                "rerank_high": number(scored.high[q, i]),
                "p_conflict": number(scored.p_conflict[q, i]),
                "rank": rank,
                "original_rank": int(i) + 1,
                "model_version": version,
            }
            yield msgspec.json.encode(decode(content[row]) | keys[row] | added) + b"\n"


def rerank_run(
    run: runs.Run, job: Job, runner: shards.Runner, progress: Callable[[int], None]
) -> dict[str, Any]:
    """Reranks a run in parts of whole queries, each scored and committed once; returns the manifest.

    Memory holds a few parts, 8 bytes a query, and the ids in the run's manifest.  A job that is killed
    and started again ends with the same bytes.  Raises InputError where a query's lines are not together,
    and for what `read_run` raises it.
    """
    store, plan = open_store(job.output), runs.pieces(run, job.part_bytes, whole_queries=True)
    shards.put_same(store, "job.json", msgspec.json.encode(job.settings))
    work = functools.partial(rerank_part, job, run.manifest.embedding_dim if run.manifest else None)
    parts, queries = [], []
    for piece, record in zip(plan, runner(work, enumerate(plan)), strict=True):
        progress(piece.stop - piece.start)
        queries.append(np.frombuffer(base64.b64decode(record.result.pop("queries")), np.uint64))
        parts.append({"files": record.files, **record.result})
    _check_apart(queries, plan)
    _check_items(run, parts)
    total = {name: sum(part[name] for part in parts) for name in ("rows", "quarantined", "left_behind")}
    manifest = {
        "status": "completed",
        "queries": sum(map(len, queries)),
        **total,
        **job.settings,
        "parts": parts,
    }
    shards.put_same(store, "manifest.json", msgspec.json.format(msgspec.json.encode(manifest), indent=1))
    return manifest


def rerank_part(job: Job, dim: int | None, part: tuple[int, Piece]) -> shards.Record:
    """Scores the lines of one piece and commits its part of the output; a pure function of both."""
    number, piece = part
    name, digest = f"part-{number:06d}", hashlib.sha256()
    with open(piece.file, "rb") as stream:
        stream.seek(piece.start)
        for at in range(piece.start, piece.stop, 2**20):
            digest.update(stream.read(min(2**20, piece.stop - at)))
    key = files.digest([job.settings, dim, digest.hexdigest()])
    return shards.once(open_store(job.output), name, key, lambda: _make_part(job, dim, piece, name))


def _make_part(job: Job, dim: int | None, piece: Piece, name: str) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The files of a part, and what is known of it."""
    ledger = runs.read_piece(piece, dim, stop_at_bad=not job.quarantine)
    made, table, behind = {f"{name}.jsonl": b""}, ledger.table(), 0
    if len(table):
        lists = to_lists(table)
        scored = score(load(job.model, job.version), lists)
        made = {f"{name}.jsonl": b"".join(lines(table, lists, scored, job.top_m, job.version))}
        behind = left_behind(lists, scored, job.top_m)
    if ledger.bad:
        made[f"{name}.quarantine.jsonl"] = b"".join(runs.quarantine_lines(ledger.bad))
    return made, {
        "rows": len(table),
        "quarantined": len(ledger.bad),
        "left_behind": behind,
        "unknown_fields": dict(sorted(ledger.unknown.items())),
        "items": _sums(ledger.seen),
        "queries": base64.b64encode(_hashes(ledger.queries).tobytes()).decode(),
    }


@functools.cache
def load(folder: str, version: str) -> Scorer:
    """The scorer of a model folder, once a process; raises InputError where it holds another version."""
    scorer = Scorer(model_files.parse(model_files.read_files(folder), folder))
    if scorer.version != version:
        raise InputError(f"the model is {scorer.version}, not {version}", file=folder)
    return scorer


def score(scorer: Scorer, lists: Lists) -> Scored:
    """What `artifact.score` says of lists, without JAX; it raises what that raises."""
    for field, given, wanted in (
        ("image_embedding", lists.image.shape[-1], scorer.image_dim),
        ("text_embedding", lists.text.shape[-1], scorer.text_dim),
    ):
        if given and wanted and given != wanted:
            raise InputError(f"{given} numbers where the model was trained on {wanted}", field=field,
                             remedy="Score runs of the encoder that the model was trained with")  # fmt: skip
    scored = Scored(*(np.zeros(lists.where.shape) for _ in Scored._fields))
    for q, where in enumerate(lists.where):
        query = Query(lists.text[q], lists.domain[q], lists.constraints[q])
        found = scorer.score(query, lists.image[q, where], lists.attributes[q, where])
        for whole, part in zip(scored, found, strict=True):
            whole[q, where] = part
        if not np.isfinite(scored.logit[q]).all():
            raise InputError(f"candidates of query {lists.query_id[q]!r} have no finite score")
    return scored


def _hashes(names: Iterable[str]) -> np.ndarray:
    """[N] uint64."""
    digest = lambda name: hashlib.blake2b(name.encode(), digest_size=8).digest()
    return np.frombuffer(b"".join(map(digest, names)), np.uint64)


def _sums(keys: Iterable[tuple[str, str]]) -> list[int]:
    """Hashes of items added up, modulo 2^64: the same in any order; of `query_id/id`, and of `id` alone."""
    keys = list(keys)
    return [int(_hashes(names).sum()) for names in (map("/".join, keys), (key[1] for key in keys))]


def _check_apart(queries: list[np.ndarray], plan: list[Piece]) -> None:
    """Raises InputError where a query is in two pieces."""
    whole, part = np.concatenate(queries), np.repeat(np.arange(len(plan)), list(map(len, queries)))
    order = np.argsort(whole, kind="stable")
    twice = np.flatnonzero(np.diff(whole[order]) == 0)
    if len(twice):
        first, again = (plan[part[order[twice[0] + i]]] for i in (0, 1))
        raise InputError(
            f"a query has lines behind byte {first.start:,} of {first.file} and again here, behind byte "
            f"{again.start:,}",
            file=again.file,
            remedy="In parts, a query's lines must stand together: sort the run, or name a file as --output",
        )


def _check_items(run: runs.Run, parts: list[dict[str, Any]]) -> None:
    """The manifest's scored items and the lines must agree; a quarantined line counts as present."""
    if not run.manifest:
        return
    listed = run.manifest.items_by_stage["scored"]
    found, bad = (sum(part[name] for part in parts) for name in ("rows", "quarantined"))
    sums = [sum(part["items"][form] for part in parts) % 2**64 for form in (0, 1)]
    agree = int(_hashes(listed).sum()) in sums
    if not (agree or (bad and found <= len(listed) <= found + bad)):
        raise InputError(
            f"the manifest lists {len(listed)} scored items, the lines have {found}, and they disagree",
            file=run.path / "manifest.json", field="items_by_stage.scored",
            remedy="The run is incomplete or mixed up: have Step 4 write it again",
        )  # fmt: skip
