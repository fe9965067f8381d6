"""The Step 4 contract as types: one scored line and its manifest."""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

Share = Annotated[float, Meta(ge=0, le=1)]
# Bounds far beyond any real score, so that float32 holds what a model computes from it.
Amount = Annotated[float, Meta(ge=0, le=1e6)]
Score = Annotated[float, Meta(ge=-1e6, le=1e6)]
Name = Annotated[str, Meta(min_length=1)]
Vector = Annotated[list[float], Meta(min_length=1)]
Chroma = Annotated[float, Meta(ge=-200, le=200)]  # a* or b*
Lab = tuple[Annotated[float, Meta(ge=0, le=100)], Chroma, Chroma]


class Conflict(msgspec.Struct, frozen=True):
    """One conflict that Step 4 found between a query and a picture."""

    type: Name
    severity: Literal["strong", "soft"]
    confidence: Share


class Review(msgspec.Struct, frozen=True):
    """A reviewer's verdict: the gold label."""

    compliance: Share
    conflict: Literal[0, 1]
    conflict_types: list[str] = []


class Candidate(msgspec.Struct, kw_only=True):
    """One scored line: one candidate picture of one query.

    After decoding, the keys are complete (`query_id`, `domain`, `id`, `canonical_id` take their
    documented defaults) and `conflict_prob` holds either of its two spellings.
    """

    query: Name
    query_id: Name | None = None
    domain: Name = "default"
    id: Name | None = None
    canonical_id: Name | None = None
    url: Name | None = None
    cluster_id: Name | None = None  # of the query: a session or campaign, for evaluation by cluster
    constraints: dict[str, Any] | None = None

    image_embedding: Vector | None = None
    text_embedding: Vector | None = None
    clip_score: Score | None = None

    subject_ratio: Share | None = None
    object_area: Share | None = None
    glass_ratio: Share | None = None
    garnish_ratio: Share | None = None
    ice_ratio: Share | None = None
    color_delta_e: Amount | None = None
    brightness: Share | None = None
    contrast: Share | None = None
    saturation: Share | None = None
    compliance_score: Share | None = None

    conflict_score: Amount | None = None
    conflict_prob: Share | None = None
    conflict_probability: Share | None = None
    conflict_calibrated: Share | None = None
    temperature_conflict: Share | None = None
    clarity_conflict: Share | None = None
    conflicts: list[Conflict] | None = None

    dual_score: Score | None = None
    palette_lab: Annotated[list[Lab], Meta(max_length=8)] | None = None  # shown, never a feature
    review: Review | None = None

    def __post_init__(self) -> None:
        if self.id is None and self.canonical_id is None and self.url is None:
            raise ValueError("one of `id`, `canonical_id`, `url` must be there - at `$.id`")
        if self.conflict_probability is not None:
            if self.conflict_prob not in (None, self.conflict_probability):
                raise ValueError(
                    "both spellings are there and differ: "
                    f"conflict_prob is {self.conflict_prob} - at `$.conflict_probability`"
                )
            self.conflict_prob = self.conflict_probability
        self.query_id = self.query_id or self.query
        if self.canonical_id is None:
            # One per distinct picture; without a URL the candidate's own id is all there is.
            self.canonical_id = picture_of(self.url) if self.url else self.id
        self.id = self.id or self.canonical_id

    @property
    def key(self) -> tuple[str, str]:
        """(query_id, id): no two lines of a run share it."""
        return self.query_id or "", self.id or ""


class Manifest(msgspec.Struct, kw_only=True):
    """`manifest.json` of a run folder."""

    manifest_id: str
    run_id: str
    model_version: str
    overlay_version: str
    created_at: str
    status: str
    items_by_stage: dict[str, list[str]]
    metrics: dict[str, Any] = {}
    embedding_dim: Annotated[int, Meta(ge=1)] | None = None
    scored_path: str | None = None


# Every field that a line may hold: anything else is unknown, kept out of the features and counted.
FIELDS = frozenset(Candidate.__struct_fields__)

# The numeric attributes that may become features, with their group.  The two counts are taken from
# `conflicts`; `dual_score` is a baseline and `review` a label, so neither is here.
ATTRIBUTES: dict[str, str] = {
    "clip_score": "clip",
    "subject_ratio": "so",
    "object_area": "so",
    "glass_ratio": "so",
    "garnish_ratio": "so",
    "ice_ratio": "so",
    "color_delta_e": "so",
    "brightness": "so",
    "contrast": "so",
    "saturation": "so",
    "compliance_score": "so",
    "conflict_score": "conflict",
    "conflict_prob": "conflict",
    "conflict_calibrated": "conflict",
    "temperature_conflict": "conflict",
    "clarity_conflict": "conflict",
    "strong_conflicts": "conflict",
    "soft_conflicts": "conflict",
}
GROUPS = ("clip", "so", "conflict")


def picture_of(url: str) -> str:
    """The picture that a URL shows: the URL without its query string and fragment."""
    return url.split("#", 1)[0].split("?", 1)[0] or url


def constraint_tokens(constraints: dict[str, Any] | None) -> tuple[str, ...]:
    """`key=value` for each constraint; a list of values gives one token each.

    >>> constraint_tokens({"glass": "coupe", "color": ["pink", "red"]})
    ('color=pink', 'color=red', 'glass=coupe')
    """
    tokens = set()
    for key, value in (constraints or {}).items():
        values = value if isinstance(value, list) else [value]
        tokens.update(f"{key}={item}" for item in values if item is not None)
    return tuple(sorted(tokens))
