"""A request as arrays: what is wrong with a candidate is said, and stops no other.

A request comes as mappings of the contract's fields or as arrays; over a wire, arrays come as a line of
JSON (`Head`) and the numbers behind it.
"""

import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np
from msgspec import Meta

from cotrr.data.contract import ATTRIBUTES, Candidate, constraint_tokens
from cotrr.deploy.scorer import Query
from cotrr.errors import InputError

NAMES = tuple(ATTRIBUTES)
COUNTED = {"strong_conflicts": "strong", "soft_conflicts": "soft"}  # of `conflicts`; the last of NAMES
STATED = tuple(name for name in NAMES if name not in COUNTED)
LENGTHS = (1e-6, 1e6)  # of an embedding, as the reader takes it
MISSING = (None,) * len(NAMES)
_CLIP = NAMES.index("clip_score")
_TYPES = typing.get_type_hints(Candidate, include_extras=True)


def _contract(name: str, *fields: str, **defaults: Any) -> Any:
    """A struct of some of the contract's fields, with its types and bounds."""
    return msgspec.defstruct(name, [(field, _TYPES[field], defaults.get(field)) for field in fields])


Asked = _contract("Asked", "domain", "constraints", domain="default")
Features = _contract("Features", *STATED, "conflict_probability", "conflicts")


def _bounds(name: str) -> tuple[float, float]:
    if name in COUNTED:
        return 0, 1e6
    number, _ = typing.get_args(_TYPES[name])  # Annotated[float, Meta(...)] | None
    return number.__metadata__[0].ge, number.__metadata__[0].le


LOW, HIGH = np.array([_bounds(name) for name in NAMES]).T  # [A] what the contract allows


class Parsed(NamedTuple):
    """n candidates; what is wrong with those that are bad, by index."""

    image: np.ndarray  # [n, d] float32, NaN where missing or bad
    attributes: np.ndarray  # [n, A] float32, NaN where missing or bad
    reasons: dict[int, str]


def parse_query(query: Mapping[str, Any], text_dim: int) -> Query:
    """The query of a request; raises InputError for a field that breaks the contract."""
    try:
        asked = _convert(query, Asked)
        text = _text(query.get("text_embedding"), text_dim)
        return Query(text, asked.domain, constraint_tokens(asked.constraints))
    except ValueError as error:
        raise InputError(f"query: {_words(error)}") from None


def parse(candidates: Sequence[Any], query: Query, image_dim: int) -> Parsed:
    """The features of candidates in the contract's fields, each checked by itself."""
    image = np.full((len(candidates), image_dim), np.nan, np.float32)
    rows, reasons = [], {}
    for i, candidate in enumerate(candidates):
        try:
            row = _numbers(candidate)
            vector = candidate.get("image_embedding") if image_dim else None
            if vector is not None:
                image[i] = _vector(vector, image_dim, "image_embedding")
        except Exception as error:  # whatever a mapping of the caller's may do
            row, reasons[i] = MISSING, _words(error)
        rows.append(row)
    return _checked(image, np.array(rows, np.float64).reshape(-1, len(NAMES)), query, reasons)


def parse_arrays(image: Any, attributes: Any, query: Query, image_dim: int) -> Parsed:
    """As `parse`, of images [n, d] (d may be 0) and attributes [n, A] in the order of NAMES; NaN is missing.

    Raises InputError for shapes that cannot be meant.
    """
    with np.errstate(over="ignore"):
        image, attributes = np.asarray(image, np.float32), np.asarray(attributes, np.float32)
    if attributes.ndim != 2 or attributes.shape[1] != len(NAMES):
        raise InputError(f"attributes have the shape {attributes.shape}, not (n, {len(NAMES)})")
    wanted = (len(attributes), image_dim)
    if image_dim == 0 or image.shape == (len(attributes), 0):
        image = np.full(wanted, np.nan, np.float32)
    if image.shape != wanted:
        raise InputError(f"images have the shape {image.shape}, not {wanted}")
    return _checked(image, attributes, query, {})


def _numbers(candidate: Mapping[str, Any]) -> tuple[float | None, ...]:
    """[A] attributes of a candidate, None where missing; ValueError says what is wrong."""
    *stated, probability, conflicts = msgspec.structs.astuple(_convert(candidate, Features))
    at = STATED.index("conflict_prob")
    if probability is not None and stated[at] not in (None, probability):
        raise ValueError("conflict_probability: both spellings are there and differ")
    stated[at] = stated[at] if probability is None else probability
    if conflicts is None:
        return *stated, None, None
    found = [conflict.severity for conflict in conflicts]
    return *stated, *(float(found.count(severity)) for severity in COUNTED.values())


def _convert(fields: Any, kind: Any) -> Any:
    """What the contract says of the fields; ValueError where they break it."""
    if not isinstance(fields, Mapping):
        raise ValueError("not a mapping of the contract's fields")
    try:
        return msgspec.convert(fields, kind)
    except msgspec.ValidationError:  # which NumPy's numbers are a reason for
        plain = {k: v.item() if isinstance(v, np.generic) else v for k, v in fields.items()}
        return msgspec.convert(plain, kind)


def _words(error: Exception) -> str:
    """What an error says, the field in front."""
    if not isinstance(error, ValueError):
        return f"cannot be read: {type(error).__name__}"
    reason, _, place = str(error).partition(" - at `$.")
    reason = reason.replace("Expected", "expected").replace("Number", "number")
    return f"{place.rstrip('`')}: {reason}" if place else reason


def _vector(value: Any, length: int, field: str) -> np.ndarray:
    """[length] float32; ValueError for another length, and for what is no number."""
    vector = np.asarray(value)
    if vector.dtype.kind not in "fiu":
        raise ValueError(f"{field}: expected a list of numbers")
    if vector.shape != (length,):
        raise ValueError(f"{field}: {vector.size} numbers where the model was trained on {length}")
    with np.errstate(over="ignore"):
        return vector.astype(np.float32)


def _text(value: Any, length: int) -> np.ndarray:
    """[length] or, where it is missing or the model knows none, [0]; ValueError says what is wrong."""
    if value is None or not length or not np.size(value):
        return np.zeros(0, np.float32)
    vector = _vector(value, length, "text_embedding")
    if np.isnan(vector).all():
        return vector[:0]
    if _odd(vector[None])[0]:
        raise ValueError(_ODD.format("text_embedding"))
    return vector


_ODD = f"{{}}: not a finite vector of length {LENGTHS[0]:g} to {LENGTHS[1]:g}"


def _odd(vectors: np.ndarray) -> np.ndarray:
    """[n] bool: which of the vectors [n, d] are no embeddings; one that is all NaN is missing."""
    size = np.einsum("nd,nd->n", vectors, vectors)
    odd = ~((size >= LENGTHS[0] ** 2) & (size <= LENGTHS[1] ** 2))  # so also where it is NaN
    return odd & ~np.isnan(vectors).all(axis=1) if odd.any() else odd


def _checked(image: np.ndarray, attributes: np.ndarray, query: Query, reasons: dict[int, str]) -> Parsed:
    """The arrays with what is bad taken out, and `clip_score` filled in."""
    with np.errstate(invalid="ignore", over="ignore"):
        outside, odd = (attributes < LOW) | (attributes > HIGH), _odd(image)
    for i, a in np.argwhere(outside).tolist():
        what = f"{NAMES[a]}: {attributes[i, a]:g} is not within [{LOW[a]:g}, {HIGH[a]:g}]"
        reasons.setdefault(i, what)
    for i in np.flatnonzero(odd).tolist():
        reasons.setdefault(i, _ODD.format("image_embedding"))
    if reasons:
        bad = np.isin(np.arange(len(image)), list(reasons))[:, None]
        image, attributes = np.where(bad, np.float32(np.nan), image), np.where(bad, np.nan, attributes)
    attributes = _with_clip_score(attributes, image, query.text)
    return Parsed(image, attributes.astype(np.float32, copy=False), reasons)


def _with_clip_score(attributes: np.ndarray, image: np.ndarray, text: np.ndarray) -> np.ndarray:
    """`clip_score` is the cosine of the two embeddings where a candidate does not state it."""
    unstated = np.isnan(attributes[:, _CLIP])
    if not len(text) or len(text) != image.shape[1] or not unstated.any():
        return attributes
    attributes = attributes.copy()
    a, b = image[unstated].astype(np.float64), text.astype(np.float64)
    attributes[unstated, _CLIP] = (a @ b) / np.sqrt(np.einsum("nd,nd->n", a, a) * (b @ b))
    return attributes


Count = Annotated[int, Meta(ge=0, le=10**6)]


class Head(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """The first line of a body of arrays.

    Behind its newline stand little-endian float32 numbers: the text embedding [text_dim], the image
    embeddings [candidates, image_dim], the attributes [candidates, len(attributes)].  NaN is missing.
    """

    candidates: Count
    attributes: list[str] = []  # the columns, in any order; those that are left out are missing
    image_dim: Count = 0
    text_dim: Count = 0
    query: dict[str, Any] = {}
    top_m: Count | None = None
    request_id: str = ""
    unit: str = ""


class Unpacked(NamedTuple):
    """What a body of arrays holds."""

    query: dict[str, Any]
    image: np.ndarray  # [n, d]
    attributes: np.ndarray  # [n, A]


def read_head(body: bytes) -> tuple[Head, bytes]:
    """The first line of a body of arrays, and what is behind it; ValueError where it is none."""
    line, newline, numbers = body.partition(b"\n")
    if not newline:
        raise ValueError("expected a line of JSON, a newline, and numbers behind it")
    return msgspec.json.decode(line, type=Head), numbers


def unpack(head: Head, numbers: bytes) -> Unpacked:
    """The arrays of a body; raises InputError where there are more or fewer numbers than its head says."""
    if len({*head.attributes} & {*NAMES}) < len(head.attributes):
        raise InputError("a name is unknown, or twice there", field="attributes",
                         remedy=f"Known are {', '.join(NAMES)}")  # fmt: skip
    n, d, columns = head.candidates, head.image_dim, len(head.attributes)
    if len(numbers) != (wanted := 4 * (head.text_dim + n * (d + columns))):
        raise InputError(f"{len(numbers):,} bytes of numbers where the head makes it {wanted:,}")
    values = np.frombuffer(numbers, "<f4")
    text, image, given = np.split(values, [head.text_dim, head.text_dim + n * d])
    attributes = np.full((n, len(NAMES)), np.nan, np.float32)
    attributes[:, [NAMES.index(name) for name in head.attributes]] = given.reshape(n, columns)
    return Unpacked(head.query | {"text_embedding": text}, image.reshape(n, d), attributes)


def pack(query: Mapping[str, Any], image: np.ndarray, attributes: np.ndarray, **more: Any) -> bytes:
    """A body of arrays: `unpack` gives back the query, images [n, d] and attributes [n, A]."""
    fields = dict(query)
    given = fields.pop("text_embedding", None)
    text = np.zeros(0, "<f4") if given is None else np.asarray(given, "<f4")
    head = Head(len(attributes), list(NAMES), image.shape[1], len(text), fields, **more)
    numbers = (text, np.asarray(image, "<f4"), np.asarray(attributes, "<f4"))
    return msgspec.json.encode(head) + b"\n" + b"".join(part.tobytes() for part in numbers)
