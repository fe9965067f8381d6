"""From lines to rows: each line is decoded and checked, all of them become one Arrow table."""

import collections
import json
import math
import pathlib
import re
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pyarrow as pa

from cotrr.data.contract import ATTRIBUTES, FIELDS, Candidate
from cotrr.errors import InputError

# Carried along for evaluation and the report; a dataset may lack them.
SHOWN = {"cluster_id": pa.string(), "palette_lab": pa.list_(pa.list_(pa.float64()))}
_CONFLICT = pa.struct([("type", pa.string()), ("severity", pa.string()), ("confidence", pa.float64())])
KEYS = ("query_id", "query", "domain", "id", "canonical_id", "url")
_FIX = "Mend the line, or set --on_bad_line=quarantine to put bad lines aside"
_decode = msgspec.json.Decoder(Candidate).decode
_split_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class Line(NamedTuple):
    file: str
    number: int
    content: bytes


def explain(error: Exception) -> tuple[str, str | None]:
    """Splits msgspec's message into the reason and the field that it names."""
    match = re.fullmatch(r"(.*?)(?: - at `\$\.?(.*)`)?", str(error), re.DOTALL)
    reason, field = (match[1], match[2]) if match else (str(error), None)
    if missing := re.search(r"missing required field `(\w+)`", reason):
        field = f"{field}.{missing[1]}" if field else missing[1]
    return reason.replace("Expected", "expected").replace("Number", "number"), field


def _non_finite_field(value: Any, path: str = "") -> str | None:
    """The path of the first NaN or infinity inside decoded JSON."""
    if isinstance(value, float) and not math.isfinite(value):
        return path
    items = (
        value.items() if isinstance(value, dict) else
        enumerate(value) if isinstance(value, list) else ()
    )  # fmt: skip
    for key, item in items:
        step = f"[{key}]" if isinstance(value, list) else f".{key}" if path else str(key)
        if (found := _non_finite_field(item, path + step)) is not None:
            return found
    return None


def parse(line: Line) -> Candidate:
    """One candidate from one line; raises InputError naming file, line, field and expectation."""

    def bad(reason: str, field: str | None = None) -> InputError:
        return InputError(reason, file=line.file, line=line.number, field=field, remedy=_FIX)

    if line.content.startswith(b"\xef\xbb\xbf"):
        raise bad("begins with a byte-order mark; save the file as UTF-8 without one")
    if line.content.startswith(b"\x1f\x8b"):
        raise bad("this is gzip; the file's name must end in .gz")
    try:
        line.content.decode()
        return _decode(line.content)
    except msgspec.ValidationError as error:
        raise bad(*explain(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        try:
            field = _non_finite_field(json.loads(line.content))
        except (ValueError, RecursionError):
            raise bad(f"broken JSON: {error}") from None
        if field is None:
            raise bad(f"broken JSON: {error}") from None
        raise bad("NaN or infinity where a finite number was expected", field) from None
    except RecursionError:
        raise bad("broken JSON: nested too deeply") from None


class Reader:
    """Turns candidates into columns and checks what one line alone cannot show."""

    def __init__(self, embedding_dim: int | None, keep_lines: bool):
        self.dim = embedding_dim
        self.keep_lines = keep_lines
        self.columns: dict[str, list] = collections.defaultdict(list)
        self.vectors: dict[str, list[np.ndarray | None]] = collections.defaultdict(list)
        self.seen: dict[tuple[str, str], str] = {}
        self.queries: dict[str, dict[str, tuple[str, Any]]] = {}
        self.unknown: collections.Counter[str] = collections.Counter()

    def add(self, line: Line) -> None:
        row = parse(line)
        vectors = {name: self._vector(row, name, line) for name in ("image_embedding", "text_embedding")}
        self._check_key(row, line)
        self._check_query(row, vectors["text_embedding"], line)
        self.seen[row.key] = f"{line.file}, line {line.number}"
        fields = _split_fields(line.content)
        self.unknown.update(fields.keys() - FIELDS)
        self._append(row, vectors, line)
        if self.keep_lines:
            rest = {k: v for k, v in fields.items() if not k.endswith("_embedding")}
            self.columns["line_json"].append(msgspec.json.encode(rest))

    def _vector(self, row: Candidate, name: str, line: Line) -> np.ndarray | None:
        values = getattr(row, name)
        if values is None:
            return None
        if self.dim is None:
            self.dim = len(values)
        with np.errstate(over="ignore"):
            vector = np.asarray(values, np.float32)
            norm = float(np.linalg.norm(values))
        reason = None
        if len(values) != self.dim:
            reason = f"{len(values)} numbers where this run has {self.dim}"
        elif not vector.any():
            reason = "all zeros, so its cosine is undefined"
        elif not 1e-6 <= norm <= 1e6:
            reason = f"a vector of length {norm:g}; expected an embedding, of length 1e-6 to 1e6"
        if reason:
            raise InputError(reason, file=line.file, line=line.number, field=name, remedy=_FIX)
        return vector

    def _check_key(self, row: Candidate, line: Line) -> None:
        if first := self.seen.get(row.key):
            raise InputError(
                f"({row.query_id!r}, {row.id!r}) was there already on {first}",
                file=line.file, line=line.number, field="id", remedy=_FIX,
            )  # fmt: skip

    def _check_query(self, row: Candidate, text: np.ndarray | None, line: Line) -> None:
        """What belongs to the query must be the same wherever its lines state it."""
        facts: dict[str, Any] = {"query": row.query, "domain": row.domain}
        if row.constraints is not None:
            facts["constraints"] = row.constraints
        if row.cluster_id is not None:
            facts["cluster_id"] = row.cluster_id
        if text is not None:
            facts["text_embedding"] = text.tobytes()
        known = self.queries.setdefault(row.key[0], {})
        for field, value in facts.items():
            place, first = known.setdefault(field, (f"line {line.number}", value))
            if value != first:
                raise InputError(
                    f"differs from what query {row.query_id!r} had on {place}",
                    file=line.file, line=line.number, field=field, remedy=_FIX,
                )  # fmt: skip

    def _append(self, row: Candidate, vectors: dict[str, np.ndarray | None], line: Line) -> None:
        put = lambda name, value: self.columns[name].append(value)
        for name in KEYS:
            put(name, getattr(row, name))
        put("constraints", None if row.constraints is None else json.dumps(row.constraints, sort_keys=True))
        for name in ATTRIBUTES:
            if name not in ("strong_conflicts", "soft_conflicts"):
                put(name, getattr(row, name))
        for severity in ("strong", "soft"):
            found = row.conflicts
            put(f"{severity}_conflicts",
                None if found is None else float(sum(c.severity == severity for c in found)))  # fmt: skip
        put("conflicts", None if row.conflicts is None else msgspec.to_builtins(row.conflicts))
        put("dual_score", row.dual_score)
        for name in SHOWN:
            put(name, getattr(row, name))
        review = row.review
        put("review_compliance", review and review.compliance)
        put("review_conflict", review and review.conflict)
        put("review_conflict_types", review and review.conflict_types)
        put("file", pathlib.Path(line.file).name)
        put("line", line.number)
        for name, vector in vectors.items():
            self.vectors[name].append(vector)

    def table(self) -> pa.Table:
        types: dict[str, pa.DataType] = {name: pa.string() for name in (*KEYS, "constraints")}
        types |= {name: pa.float64() for name in (*ATTRIBUTES, "dual_score", "review_compliance")}
        types |= {"conflicts": pa.list_(_CONFLICT), "review_conflict": pa.int8(),
                  "review_conflict_types": pa.list_(pa.string()),
                  "file": pa.string(), "line": pa.int64(), "line_json": pa.binary()} | SHOWN  # fmt: skip
        columns = {name: pa.array(values, types[name]) for name, values in self.columns.items()}
        for name, vectors in self.vectors.items():
            columns[name] = _vectors_to_arrow(vectors, self.dim or 1)
        return _fill_clip_score(pa.table(columns))


def _vectors_to_arrow(vectors: list[np.ndarray | None], dim: int) -> pa.Array:
    absent = np.zeros(dim, np.float32)
    flat = np.concatenate([absent if v is None else v for v in vectors])
    mask = pa.array(np.array([v is None for v in vectors]))
    return pa.FixedSizeListArray.from_arrays(pa.array(flat), dim, mask=mask)


def embedding_matrix(table: pa.Table, name: str) -> np.ndarray:
    """[N, d] float32 of an embedding column; NaN rows where a line had none."""
    array = table[name].combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    dim = array.type.list_size
    missing = np.asarray(array.is_null())
    values = np.asarray(array.values)[array.offset * dim : (array.offset + len(array)) * dim]
    matrix = values.astype(np.float32, copy=True).reshape(-1, dim)
    matrix[missing] = np.nan
    return matrix


def _fill_clip_score(table: pa.Table) -> pa.Table:
    """`clip_score` is the cosine of the two embeddings where a line does not state it."""
    image, text = embedding_matrix(table, "image_embedding"), embedding_matrix(table, "text_embedding")
    dot = lambda a, b: np.einsum("nd,nd->n", a, b, dtype=np.float64)
    cosine = dot(image, text) / np.sqrt(dot(image, image) * dot(text, text))
    given = table["clip_score"].to_numpy(zero_copy_only=False)
    score = np.where(np.isnan(given), cosine, given)
    column = pa.array(score, pa.float64(), mask=np.isnan(score))
    return table.set_column(table.column_names.index("clip_score"), "clip_score", column)


def key_of(line: Line) -> tuple[str, str] | None:
    """(query_id, id) of a quarantined line, as far as it can be read."""
    try:
        fields = _split_fields(line.content)
        keys = {name: fields[name] for name in KEYS if name in fields}
        keys.setdefault("query", keys.get("query_id", msgspec.Raw(b"null")))
        return _decode(msgspec.json.encode(keys)).key
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
