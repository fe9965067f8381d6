"""From lines to rows: each line is decoded and checked, all of them become one Arrow table."""

import collections
import contextlib
import functools
import gc
import gzip
import hashlib
import json
import math
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pyarrow as pa

from cotrr import files
from cotrr.data.contract import ATTRIBUTES, FIELDS, Candidate, Vector
from cotrr.errors import InputError

try:
    import simdjson
except ImportError:  # no wheel for this Python: msgspec reads the same numbers, at a third of the speed
    simdjson = None

# Carried along for evaluation and the report; a dataset may lack them.
SHOWN = {"cluster_id": pa.string(), "palette_lab": pa.list_(pa.list_(pa.float64()))}
_CONFLICT = pa.struct([("type", pa.string()), ("severity", pa.string()), ("confidence", pa.float64())])
KEYS = ("query_id", "query", "domain", "id", "canonical_id", "url")
EMBEDDINGS = ("image_embedding", "text_embedding")
COUNTS = ("strong_conflicts", "soft_conflicts")
FLOATS = (*(name for name in ATTRIBUTES if name not in COUNTS), "dual_score")
# In their order in a table, before the embeddings.
_TYPES: dict[str, pa.DataType] = {
    **dict.fromkeys((*KEYS, "constraints"), pa.string()),
    **dict.fromkeys((*FLOATS[:-1], *COUNTS), pa.float64()),
    "conflicts": pa.list_(_CONFLICT), "dual_score": pa.float64(), **SHOWN,
    "review_compliance": pa.float64(), "review_conflict": pa.int8(),
    "review_conflict_types": pa.list_(pa.string()),
    "file": pa.string(), "line": pa.int64(), "line_json": pa.binary(),
}  # fmt: skip
STAND_IN = [8.25e-300]  # for an embedding that is parsed apart
_STAND_IN = json.dumps(STAND_IN).encode()
GZIP_ERRORS = (EOFError, zlib.error, gzip.BadGzipFile)
NOTHING: frozenset[str] = frozenset()


class _Known(Candidate, forbid_unknown_fields=True):
    """A candidate whose line holds nothing else."""


class _Query(msgspec.Struct):
    query: str | None = None
    query_id: str | None = None


FIX = "Mend the line, or set --on_bad_line=quarantine to put bad lines aside"
_decode = msgspec.json.Decoder(Candidate).decode
_decode_known = msgspec.json.Decoder(_Known).decode
_basename = functools.cache(os.path.basename)
_decode_query = msgspec.json.Decoder(_Query).decode
_split_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_CLIP_SCORE = Candidate.__struct_fields__.index("clip_score")


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
        return InputError(reason, file=line.file, line=line.number, field=field, remedy=FIX)

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


class Facts(NamedTuple):
    """What a line says of its query; None where it leaves something out."""

    query_id: str
    query: str
    domain: str
    constraints: dict[str, Any] | None
    cluster_id: str | None
    text_embedding: bytes | None  # a digest


class Embedding(msgspec.Struct, frozen=True, gc=False):
    """An embedding as it was read."""

    name: str
    vector: np.ndarray  # [d] float32
    flaw: str | None  # what is wrong with it
    digest: bytes | None  # of the vector, where it is the query's
    text: bytes  # in the line


class Piece(NamedTuple):
    """The lines of a shard that begin at its bytes [start, stop), or all of a gzip shard."""

    file: str
    start: int
    stop: int


class Block(NamedTuple):
    """What the lines of a piece say, each checked by itself; their numbers count from its first line."""

    table: pa.Table  # [N] the lines that keep the contract
    dim: int | None  # of the embeddings; None where no line has one
    lines: int
    facts: list[Facts]
    fact: list[int]  # [N] index into `facts`
    unknown: list[frozenset[str]]  # [N] names of unknown fields
    states_clip: list[bool]  # [N] whether a line states its `clip_score`
    bad: list[tuple[Line, InputError]]  # the lines that break it
    end: InputError | None  # why the piece cannot be read to its end


@contextlib.contextmanager
def without_collections() -> Iterator[None]:
    """No search for cyclic garbage: lines make none, and the search takes a tenth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@without_collections()
def read_block(piece: Piece, dim: int | None, keep_lines: bool) -> Block:
    """Reads and checks the lines of a piece; `dim` is the length of embeddings, where that is known."""
    reader, number, end = Reader(dim, keep_lines), 0, None
    bad: list[tuple[Line, InputError]] = []
    try:
        with np.errstate(over="ignore"):
            for number, content in enumerate(lines_of(piece), 1):
                line = Line(piece.file, number, content)
                try:
                    if not content.isspace():
                        reader.add(line)
                except InputError as error:
                    bad.append((line, error))
    except GZIP_ERRORS as error:
        end = broken_gzip(piece.file, number, error)
    states_clip = [candidate[_CLIP_SCORE] is not None for candidate in reader.candidates]
    return Block(
        reader.table(), reader.dim, number, reader.facts, reader.fact, reader.unknown, states_clip, bad, end
    )


def lines_of(piece: Piece) -> Iterator[bytes]:
    """The lines of a piece, blank ones included; raises GZIP_ERRORS where a stream is broken."""
    if piece.file.endswith(".gz"):
        with files.reading(piece.file) as packed, gzip.open(packed) as stream:
            yield from stream
        return
    with files.reading(piece.file) as stream:
        at = piece.start
        if at:  # a line that begins before belongs to the piece before
            stream.seek(at - 1)
            at += len(stream.readline()) - 1
        while at < piece.stop and (line := stream.readline()):
            at += len(line)
            yield line


def lines_before(piece: Piece) -> int:
    """The lines of the shard before a piece that begins with a line."""
    count, left = 0, piece.start
    with files.reading(piece.file) as stream:
        while chunk := stream.read(min(left, 2**24)):
            count, left = count + chunk.count(b"\n"), left - len(chunk)
    return count


def broken_gzip(file: object, line: int, error: Exception) -> InputError:
    """The error of a gzip shard that cannot be read on."""
    return InputError(
        f"the gzip stream breaks after line {line} ({error})", file=file, remedy="Copy the file again"
    )


class Reader:
    """Turns lines into columns, each checked by itself."""

    def __init__(self, embedding_dim: int | None, keep_lines: bool):
        self.dim = embedding_dim
        self.columns: dict[str, Any] = collections.defaultdict(list, file=[], line=[])
        if keep_lines:
            self.columns["line_json"] = []
        self.vectors: dict[str, list[np.ndarray | None]] = collections.defaultdict(list)
        self.facts: list[Facts] = []
        self.fact: list[int] = []
        self.unknown: list[frozenset[str]] = []
        self._keep_lines = keep_lines
        self.candidates: list[tuple] = []  # the values of their fields
        self._parse_floats = _float_parser()
        # By name, the latest: candidates of a query stand together and repeat its text embedding.
        self._latest: dict[str, Embedding] = {}

    def add(self, line: Line) -> None:
        """Reads one line; raises InputError, and adds nothing, where it breaks the contract."""
        rest = line.content
        try:
            rest, texts = cut_embeddings(rest)
            row = _decode_rest(rest, texts)
            embeddings = {name: self._read(name, text) for name, text in texts.items()}
        except (ValueError, TypeError, RecursionError, RuntimeError):
            rest, row = line.content, parse(line)  # tells what is wrong, if anything is
            given = ((name, getattr(row, name)) for name in EMBEDDINGS)
            embeddings = {name: _embedding(name, np.array(values)) for name, values in given if values}
        image, text = map(embeddings.get, EMBEDDINGS)
        for embedding in (image, text):
            if embedding and (embedding.flaw or len(embedding.vector) != self.dim):
                self._check_embedding(embedding, line)
        self._append(row, image, text)
        self.columns["file"].append(_basename(line.file))
        self.columns["line"].append(line.number)
        self.unknown.append(NOTHING if type(row) is _Known else frozenset(_split_fields(rest)) - FIELDS)
        if self._keep_lines:
            self.columns["line_json"].append(_without_embeddings(rest))

    def _read(self, name: str, text: bytes) -> Embedding:
        if name not in self._latest or self._latest[name].text != text:
            self._latest[name] = _embedding(name, self._parse_floats(text), text)
        return self._latest[name]

    def _check_embedding(self, embedding: Embedding, line: Line) -> None:
        """Raises InputError for what is wrong with it; the first of all tells the length of the others."""
        self.dim = self.dim or len(embedding.vector)
        reason = embedding.flaw
        if len(embedding.vector) != self.dim:
            reason = f"{len(embedding.vector)} numbers where this run has {self.dim}"
        if reason:
            raise InputError(reason, file=line.file, line=line.number, field=embedding.name, remedy=FIX)

    def _append(self, row: Candidate, image: Embedding | None, text: Embedding | None) -> None:
        self.vectors["image_embedding"].append(image.vector if image else None)
        self.vectors["text_embedding"].append(text.vector if text else None)
        digest = text.digest if text else None
        facts = row.key[0], row.query, row.domain, row.constraints, row.cluster_id, digest
        if not self.facts or facts != self.facts[-1]:
            self.facts.append(Facts(*facts))
        self.fact.append(len(self.facts) - 1)
        self.candidates.append(msgspec.structs.astuple(row))

    def table(self) -> pa.Table:
        """The columns as a table; embeddings are float32 lists of one length."""
        if len(self.candidates) == len(self.columns["line"]):  # else columns were given as such
            self.columns |= _columns_of(self.candidates)
        columns = {name: pa.array(self.columns[name], kind) for name, kind in _TYPES.items()
                   if name in self.columns}  # fmt: skip
        for name in EMBEDDINGS:
            columns[name] = _vectors_to_arrow(self.vectors[name], self.dim or 1)
        return _fill_clip_score(pa.table(columns))


def _decode_rest(rest: bytes, texts: dict[str, bytes]) -> Candidate:
    """What a line says but for its embeddings; raises ValueError where what was cut out is none."""
    rest.decode()
    try:
        row = _decode_known(rest)
    except msgspec.ValidationError:
        row = _decode(rest)
    for name in EMBEDDINGS:
        if getattr(row, name) != (STAND_IN if name in texts else None):
            raise ValueError("what was cut out is no embedding of the line")
    return row


def _columns_of(candidates: list[tuple]) -> dict[str, Sequence]:
    """The columns of N candidates, each given as the values of its fields."""
    names = Candidate.__struct_fields__
    columns: dict[str, Sequence] = dict.fromkeys(names, ())
    columns |= zip(names, zip(*candidates, strict=True), strict=False)  # of no candidates there are none
    columns["constraints"] = [None if found is None else _sort_keys(msgspec.json.encode(found))
                              for found in columns["constraints"]]  # fmt: skip
    severities = [None if found is None else [conflict.severity for conflict in found]
                  for found in columns["conflicts"]]  # fmt: skip
    for severity in ("strong", "soft"):
        columns[f"{severity}_conflicts"] = [None if found is None else float(found.count(severity))
                                            for found in severities]  # fmt: skip
    columns["conflicts"] = msgspec.to_builtins(columns["conflicts"])
    for name in ("compliance", "conflict", "conflict_types"):
        columns[f"review_{name}"] = [review and getattr(review, name) for review in columns["review"]]
    return columns


@functools.lru_cache(1000)
def _sort_keys(text: bytes) -> str:
    """A JSON object with its keys sorted; many queries ask for the same."""
    return json.dumps(json.loads(text), sort_keys=True)


def _without_embeddings(line: bytes) -> bytes:
    fields = _split_fields(line).items()
    return msgspec.json.encode({name: value for name, value in fields if not name.endswith("_embedding")})


def cut_embeddings(content: bytes) -> tuple[bytes, dict[str, bytes]]:
    """A line with stand-ins for what look like its embeddings, and the text of each by name.

    Numbers are most of a line, and other parsers are several times faster at them than at the rest.

    >>> cut_embeddings(b'{"id": "a", "text_embedding": [1, 2]}')
    (b'{"id": "a", "text_embedding": [8.25e-300]}', {'text_embedding': b'[1, 2]'})
    """
    kept, texts, done, search = [], {}, 0, 0
    while (at := content.find(b'_embedding"', search)) >= 0:
        search = at + len(b'_embedding"')
        start = content.find(b"[", search)
        if start < 0 or content[search:start].strip() != b":":
            continue  # null, or no key
        stop = content.find(b"]", start) + 1 or len(content)
        name = content[content.rfind(b'"', done, at) + 1 : search - 1].decode()
        if name in texts:
            raise ValueError(f"{name} is there twice")
        texts[name] = content[start:stop]
        kept += content[done:start], _STAND_IN
        done = search = stop
    return b"".join([*kept, content[done:]]), texts


def _embedding(name: str, numbers: np.ndarray, text: bytes = b"") -> Embedding:
    """From float64 [d]; raises ValueError where there is none."""
    if not len(numbers):
        raise ValueError("nothing is in it")
    vector, norm, flaw = numbers.astype(np.float32), math.sqrt(numbers.dot(numbers)), None
    if not 1e-6 <= norm <= 1e6:
        flaw = (
            f"a vector of length {norm:g}; expected an embedding, of length 1e-6 to 1e6"
            if vector.any() else "all zeros, so its cosine is undefined"
        )  # fmt: skip
    digest = hashlib.sha256(vector.data).digest() if name == "text_embedding" else None
    return Embedding(name, vector, flaw, digest, text)


def _float_parser() -> Callable[[bytes], np.ndarray]:
    """A function from the text of a JSON array to float64 [d]; ValueError or TypeError for another text."""
    if simdjson is None:
        decode = msgspec.json.Decoder(Vector).decode
        return lambda text: np.array(decode(text))
    parse = simdjson.Parser().parse
    return lambda text: np.frombuffer(parse(text).as_buffer(of_type="d"))


def _vectors_to_arrow(vectors: list[np.ndarray | None], dim: int) -> pa.Array:
    absent = np.zeros(dim, np.float32)
    missing = np.array([v is None for v in vectors], bool)
    flat = np.concatenate([absent, *(absent if v is None else v for v in vectors)])[dim:]
    mask = pa.array(missing) if missing.any() else None
    return pa.FixedSizeListArray.from_arrays(pa.array(flat), dim, mask=mask)


def embedding_matrix(table: pa.Table, name: str) -> np.ndarray:
    """[N, d] float32 of an embedding column; NaN rows where a line had none.

    It may be the table's own memory, which cannot be written to.
    """
    parts = list(embedding_parts(table, name))
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def embedding_parts(table: pa.Table, name: str) -> Iterator[np.ndarray]:
    """The matrix of an embedding column chunk by chunk, each without a copy where nothing is missing."""
    kind = table.schema.field(name).type
    for chunk in table[name].chunks or [pa.array([], kind)]:
        values = np.asarray(chunk.values)[chunk.offset * kind.list_size :][: len(chunk) * kind.list_size]
        matrix = values.astype(np.float32, copy=False).reshape(-1, kind.list_size)
        missing = np.asarray(chunk.is_null())[:, None]
        yield np.where(missing, np.float32(np.nan), matrix) if chunk.null_count else matrix


def to_bytes(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column of lists of d float32 as one of 4 d bytes each, without a copy."""
    kind = pa.binary(4 * column.type.list_size)

    def convert(chunk: pa.Array) -> pa.Array:
        data = chunk.values.buffers()[1].slice(4 * chunk.values.offset)
        return pa.Array.from_buffers(kind, len(chunk), [chunk.buffers()[0], data], offset=chunk.offset)

    return pa.chunked_array(map(convert, column.chunks), kind)


def from_bytes(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """What `to_bytes` was given; a column of lists stays as it is."""
    if not pa.types.is_fixed_size_binary(column.type):
        return column
    kind = pa.list_(pa.float32(), column.type.byte_width // 4)

    def convert(chunk: pa.Array) -> pa.Array:
        count = (chunk.offset + len(chunk)) * kind.list_size
        floats = pa.Array.from_buffers(pa.float32(), count, [None, chunk.buffers()[1]])
        validity = [chunk.buffers()[0]]
        return pa.Array.from_buffers(kind, len(chunk), validity, offset=chunk.offset, children=[floats])

    return pa.chunked_array(map(convert, column.chunks), kind)


def _fill_clip_score(table: pa.Table) -> pa.Table:
    """`clip_score` is the cosine of the two embeddings where a line does not state it."""
    if not table["clip_score"].null_count:
        return table
    image, text = (embedding_matrix(table, name) for name in EMBEDDINGS)
    dot = lambda a, b: np.einsum("nd,nd->n", a, b, dtype=np.float64)
    with np.errstate(invalid="ignore"):
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


def query_of(content: bytes) -> str | None:
    """The key of a line's query; None where it cannot be read."""
    try:
        row = _decode_query(cut_embeddings(content)[0])
    except (ValueError, RecursionError):
        return None
    return row.query_id or row.query
