"""Reranked candidates as the lines that go back to Step 4: of lists in memory, or of a run part by part."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pyarrow as pa

from cotrr import shards
from cotrr.data import parts, runs
from cotrr.data.lists import Lists, to_lists
from cotrr.data.rows import Piece
from cotrr.deploy.reranker import arrange
from cotrr.deploy.scorer import Query, Scorer
from cotrr.errors import InputError
from cotrr.ranker import model_files
from cotrr.ranker.calibrators import Scored
from cotrr.store import open_store

KEPT = ("query_id", "domain", "id", "canonical_id")


class Job(NamedTuple):
    """What all parts of a batch share."""

    model: str  # its folder
    version: str
    top_m: int
    quarantine: bool  # bad lines are put aside; else the first of them ends the job
    output: str  # a folder, or a URL such as s3://bucket/path
    part_bytes: int

    @property
    def settings(self) -> dict[str, Any]:
        """What the bytes of the output depend on, besides the input."""
        return {k: v for k, v in self._asdict().items() if k not in ("model", "output", "quarantine")}


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

    Memory holds a few parts, hashes of queries and items, and the items in the run's manifest.  A job that
    is killed and started again ends with the same bytes.  Raises InputError for a bad line, unless those are
    put aside; where a query's lines are not together; and for what `read_run` raises it.
    """
    store, plan = open_store(job.output), parts.plan(run, job.part_bytes)
    shards.put_same(store, "job.json", msgspec.json.encode(job.settings))
    work, made = functools.partial(rerank_part, job, dim := parts.dim(run)), []
    for piece, record in zip(plan, runner(work, enumerate(plan)), strict=True):
        progress(piece.stop - piece.start)
        if not job.quarantine:
            parts.refuse_bad(piece, dim, record.result)
        made.append(record)
    queries = parts.check(run, plan, [record.result for record in made])
    told = [{"files": record.files, **parts.told(record.result)} for record in made]
    total = {name: sum(part[name] for part in told) for name in ("rows", "quarantined", "left_behind")}
    manifest = {"status": "completed", "queries": queries, **total, **job.settings, "parts": told}
    shards.put_same(store, "manifest.json", msgspec.json.format(msgspec.json.encode(manifest), indent=1))
    return manifest


def rerank_part(job: Job, dim: int | None, part: tuple[int, Piece]) -> shards.Record:
    """Scores the lines of one piece and commits its part of the output; a pure function of both."""
    number, piece = part
    name = f"part-{number:06d}"
    key = parts.key(piece, job.settings, dim)
    return shards.once(open_store(job.output), name, key, lambda: _make_part(job, dim, piece, name))


def _make_part(job: Job, dim: int | None, piece: Piece, name: str) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The files of a part, and what is known of it."""
    ledger = parts.read(piece, dim, quarantine=True, keep_lines=True)
    made, table, behind = {f"{name}.jsonl": b""}, ledger.table(), 0
    if len(table):
        lists = to_lists(table)
        scored = score(load(job.model, job.version), lists)
        made = {f"{name}.jsonl": b"".join(lines(table, lists, scored, job.top_m, job.version))}
        behind = left_behind(lists, scored, job.top_m)
    made |= parts.quarantined(ledger, name)
    return made, parts.facts(ledger, table) | {"left_behind": behind}


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
