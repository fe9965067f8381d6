"""A request's candidates as arrays: what is wrong with one of them is said, and stops no other."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np

from cotrr.data.contract import ATTRIBUTES, Candidate, constraint_tokens
from cotrr.deploy.scorer import Query
from cotrr.errors import InputError

COUNTS = {"strong_conflicts": "strong", "soft_conflicts": "soft"}  # taken from `conflicts`
NAMES = tuple(ATTRIBUTES)
LENGTHS = (1e-6, 1e6)  # of an embedding


def _bounds() -> np.ndarray:
    """[2, A] what the contract allows of each attribute."""
    fields = {field.name: field.type for field in msgspec.inspect.type_info(Candidate).fields}  # type: ignore[attr-defined]
    ends = []
    for name in NAMES:
        kinds = getattr(fields.get(name), "types", ())
        number = next((kind for kind in kinds if isinstance(kind, msgspec.inspect.FloatType)), None)
        low, high = (number.ge, number.le) if number else (0, None)
        ends.append((-math.inf if low is None else low, math.inf if high is None else high))
    return np.array(ends).T


BOUNDS = _bounds()
_CLIP = NAMES.index("clip_score")


class Parsed(NamedTuple):
    """n candidates; what is wrong with those that are bad, by index."""

    image: np.ndarray  # [n, d] float32, NaN where missing
    attributes: np.ndarray  # [n, A] float32, NaN where missing
    reasons: dict[int, str]


def parse_query(query: Mapping[str, Any], text_dim: int) -> Query:
    """The query of a request; raises InputError for a field that breaks the contract."""
    if not isinstance(query, Mapping):
        raise InputError("a query is a mapping of the contract's fields", field="query")
    domain, constraints = query.get("domain", "default"), query.get("constraints")
    if not isinstance(domain, str) or not domain:
        raise InputError("expected a name", field="domain")
    if constraints is not None and not isinstance(constraints, Mapping):
        raise InputError("expected an object such as {'color': 'pink'}", field="constraints")
    try:
        text = _embedding(query.get("text_embedding"), text_dim)
    except ValueError as error:
        raise InputError(str(error), field="text_embedding") from None
    text = np.zeros(0, np.float32) if text is None else text
    return Query(text, domain, constraint_tokens(dict(constraints or {})))


def parse(candidates: Sequence[Mapping[str, Any]], query: Query, image_dim: int) -> Parsed:
    """The candidates' features, each checked by itself."""
    image = np.full((len(candidates), image_dim), np.nan, np.float32)
    values = np.full((len(candidates), len(NAMES)), np.nan)
    reasons: dict[int, str] = {}
    for i, candidate in enumerate(candidates):
        try:
            values[i] = _numbers(candidate)
            vector = _embedding(candidate.get("image_embedding"), image_dim)
            if vector is not None:
                image[i] = vector
        except ValueError as error:
            reasons[i] = str(error)
    with np.errstate(invalid="ignore"):
        outside = (values < BOUNDS[0]) | (values > BOUNDS[1]) | np.isinf(values)
    for i, a in np.argwhere(outside):
        reasons.setdefault(
            int(i), f"{NAMES[a]}: {values[i, a]:g} is not within [{BOUNDS[0, a]:g}, {BOUNDS[1, a]:g}]"
        )
    values[list(reasons)], image[list(reasons)] = np.nan, np.nan
    _fill_clip_score(values, image, query.text)
    return Parsed(image, values.astype(np.float32), reasons)


def _numbers(candidate: Mapping[str, Any]) -> list[float]:
    """The attributes of a candidate, NaN where missing; ValueError says what is wrong."""
    if not isinstance(candidate, Mapping):
        raise ValueError("not a mapping of the contract's fields")
    row = []
    for name in NAMES:
        value = candidate.get(name)
        if name == "conflict_prob" and value is None:
            value = candidate.get("conflict_probability")
        elif name in COUNTS:
            value = _count(candidate.get("conflicts"), COUNTS[name])
        if value is None:
            row.append(math.nan)
        elif isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool):
            number = float(value)
            if math.isnan(number):
                raise ValueError(f"{name}: not a finite number")
            row.append(number)
        else:
            raise ValueError(f"{name}: {type(value).__name__} where a number was expected")
    return row


def _count(conflicts: Any, severity: str) -> float | None:
    if conflicts is None:
        return None
    try:
        return float(sum(conflict["severity"] == severity for conflict in conflicts))
    except (TypeError, KeyError):
        raise ValueError("conflicts: expected a list of {type, severity, confidence}") from None


def _embedding(value: Any, length: int) -> np.ndarray | None:
    """[d] float32, or None where it is missing or the model knows none; ValueError says what is wrong."""
    if value is None or not length:
        return None
    try:
        with np.errstate(over="ignore"):
            vector = np.asarray(value, np.float32)
    except (TypeError, ValueError, OverflowError):
        raise ValueError("embedding: expected numbers") from None
    if vector.shape != (length,):
        raise ValueError(f"embedding: {vector.size} numbers where the model was trained on {length}")
    if not LENGTHS[0] <= float(np.linalg.norm(vector.astype(np.float64))) <= LENGTHS[1]:  # also if not finite
        raise ValueError("embedding: not a finite vector of length 1e-6 to 1e6")
    return vector


def _fill_clip_score(values: np.ndarray, image: np.ndarray, text: np.ndarray) -> None:
    """`clip_score` is the cosine of the two embeddings where a candidate does not state it."""
    unstated = np.isnan(values[:, _CLIP])
    if len(text) == image.shape[1] and unstated.any():
        a, b = image[unstated].astype(np.float64), text.astype(np.float64)
        values[unstated, _CLIP] = (a @ b) / np.sqrt(np.einsum("nd,nd->n", a, a) * (b @ b))
