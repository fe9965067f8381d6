"""A simulated world: drinks, pictures, encoder, detectors, judges; `simulator` states the model."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.random import Generator

from cotrr.config import check_settings, setting
from cotrr.data.color import delta_e_2000
from cotrr.errors import InputError

Array = np.ndarray

# Colour words with their CIE Lab prototypes (D65).
PROTOTYPE = {
    "red": (44, 60, 36), "pink": (72, 36, 6), "orange": (68, 36, 64), "yellow": (84, 2, 68),
    "green": (58, -38, 42), "blue": (48, -4, -44), "purple": (36, 40, -40), "brown": (38, 20, 34),
    "clear": (76, -1, 4), "white": (92, 1, 8),
}  # fmt: skip
# The first STEMMED glasses are one family, the others another.
GLASSES = ("coupe", "martini", "wine", "flute", "highball", "rocks", "mug", "hurricane")
STEMMED = 4
GARNISHES = ("citrus", "cherry", "mint", "flower", "berry", "pineapple")
ICES = ("none", "cubes", "crushed", "sphere")
WORDS = {"color": tuple(PROTOTYPE), "glass": GLASSES, "garnish": GARNISHES, "ice": ICES}
# What a domain's people like: these words are 5 times as likely as others.
DOMAINS = {
    "blue_tropical": {"blue", "green", "hurricane", "highball", "pineapple", "crushed"},
    "pink_elegant": {"pink", "red", "coupe", "flute", "flower", "none"},
    "golden_classic": {
        "orange",
        "brown",
        "rocks",
        "martini",
        "cherry",
        "citrus",
        "sphere",
        "cubes",
    },
    "green_garden": {"green", "clear", "highball", "wine", "mint", "berry", "cubes"},
    "creamy_dessert": {"white", "brown", "mug", "martini", "berry", "none"},
    "purple_night": {"purple", "red", "coupe", "rocks", "flower", "citrus", "crushed"},
}
ASKED = {"color": 0.9, "glass": 0.8, "garnish": 0.65, "ice": 0.45}
TASTE_WEIGHT = {"color": 0.45, "glass": 0.15, "garnish": 0.10, "ice": 0.30}
STRENGTH = {"color": 1.0, "glass": 0.7, "garnish": 0.6, "ice": 0.5, "style": 0.6, "scene": 0.6}
RULES = {
    "subject_missing": "strong", "color_mismatch": "strong", "glass_mismatch": "soft",
    "garnish_missing": "soft", "temperature_conflict": "soft", "clarity_conflict": "soft",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Simulation:
    """Settings of a simulated run; InputError where they make no sense."""

    queries: int = setting(200, "queries of the run")
    candidates: int = setting(60, "candidates retrieved for each query")
    pictures: int = setting(3000, "pictures in the catalogue all queries share")
    embedding_dim: int = setting(64, "dimensions D of the joint embedding space")
    seed: int = setting(0, "seed of queries, pictures, detectors and reviewers")
    encoder_seed: int = setting(0, "seed of the encoder: runs that share it share the space")
    domains: int = setting(4, f"number of domains, the first of {', '.join(DOMAINS)}")
    frames: int = setting(3, "most pictures of one shoot")
    no_drink_rate: float = setting(0.04, "share of pictures without a drink")
    embedding_noise: float = setting(0.3, "sd of the encoder's error in an attribute")
    scene_noise: float = setting(0.8, "norm of an image embedding's white noise")
    modality_gap: float = setting(1.0, "norm of the offset of each modality")
    retrieval_noise: float = setting(0.02, "sd of the retrieval index's error in the cosine")
    detector_error: float = setting(0.1, "error rate of glass, ice, garnish and area detectors")
    pixel_error: float = setting(0.8, "strength of what disturbs the pixels' colour; 0: none")
    reviewer_noise: float = setting(0.08, "sd of the reviewer's compliance")
    reviewer_error: float = setting(0.02, "share of a reviewer's conflict verdicts that are wrong")
    missing_rate: float = setting(0.02, "share of each optional field that is missing")
    unreviewed_rate: float = setting(0.0, "share of rows without a review")
    brightness_shift: float = setting(0.0, "drift: added to the brightness of every picture")
    color_cast: float = setting(0.0, "drift: added to b* of every picture's pixels, in Lab units")
    created_at: str = setting("2026-01-01T00:00:00+00:00", "the manifest's time stamp (ISO 8601)")

    def __post_init__(self) -> None:
        check_settings(self)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            share = field.name.endswith(("_rate", "_error")) and field.name != "pixel_error"
            if share and not 0 <= value <= 1:
                raise InputError(f"--{field.name}={value}: expected a share in [0, 1]")
            if field.name.endswith(("_noise", "seed", "pixel_error")) and value < 0:
                raise InputError(f"--{field.name}={value}: expected at least 0")
        if min(self.queries, self.candidates, self.embedding_dim, self.frames) < 1:
            raise InputError("queries, candidates, embedding_dim and frames must be at least 1")
        if self.candidates > self.pictures:
            raise InputError(f"{self.candidates} candidates asked of {self.pictures} pictures")
        if not 1 <= self.domains <= len(DOMAINS):
            raise InputError(f"domains must be 1 to {len(DOMAINS)}, not {self.domains}")

    @property
    def run_id(self) -> str:
        """A name that tells settings apart."""
        settings = msgspec.json.encode(dataclasses.asdict(self))
        return f"simulated_{hashlib.blake2b(settings, digest_size=5).hexdigest()}"


class Drinks(NamedTuple):
    """What pictures show, true or detected."""

    lab: Array  # [P, 3]
    glass: Array  # [P], index into GLASSES, -1 without a drink
    garnish: Array  # [P, len(GARNISHES)], bool
    ice: Array  # [P], index into ICES
    prominence: Array  # [P], share of the picture, 0 without a drink
    haze: Array  # [P] in [0, 1]


class Catalogue(NamedTuple):
    """All pictures, in memory; queries are streamed."""

    shoot: Array  # [P]
    true: Drinks
    seen: Drinks
    confidence: Array  # [P, len(RULES)]
    pixels: dict[str, Array]  # brightness, contrast, saturation, object_area, each [P]
    embedding: Array  # [P, D], as written
    encoded: list[msgspec.Raw]  # the same as JSON, for a picture is written many times


class Query(NamedTuple):
    """A query's intent: indices into WORDS, -1 where nothing is asked."""

    number: int
    domain: int
    want: dict[str, int]
    embedding: Array  # [D]

    @property
    def domain_name(self) -> str:
        """The word for the domain."""
        return list(DOMAINS)[self.domain]


def _tastes(simulation: Simulation, kind: str) -> Array:
    """Probabilities [domains, words] of the words of one kind."""
    domains = list(DOMAINS.values())[: simulation.domains]
    odds = np.array([[5.0 if word in liked else 1.0 for word in WORDS[kind]] for liked in domains])
    return odds / odds.sum(axis=1, keepdims=True)


def _draw(rng: Generator, probabilities: Array) -> Array:
    """One index [n] for each row of probabilities [n, words]."""
    return (rng.random((len(probabilities), 1)) > probabilities.cumsum(axis=1)[:, :-1]).sum(axis=1)


def _one_hot(index: Array, size: int) -> Array:
    return (np.asarray(index)[:, None] == np.arange(size)).astype(float)


# ---- the encoder


def _code(color: Array, glass: Array, garnish: Array, ice: Array, style: Array, scene: Array) -> Array:
    """Codes [n, c] of colour [n, colours], garnish [n, garnishes], scene [n, 2] and others [n]."""
    parts = {
        "color": color, "glass": _one_hot(glass, len(GLASSES)), "garnish": garnish,
        "ice": _one_hot(ice, len(ICES)), "style": _one_hot(style, len(DOMAINS)), "scene": scene,
    }  # fmt: skip
    return np.concatenate([STRENGTH[name] * part for name, part in parts.items()], axis=1)


def _embed(simulation: Simulation, code: Array, modality: int, noise: Array | float = 0.0) -> Array:
    """Unit embeddings [n, D] of codes [n, c], rounded as they will be written."""
    rng, dim = np.random.default_rng([simulation.encoder_seed, 1]), simulation.embedding_dim
    offsets = rng.normal(size=(2, dim)) / np.sqrt(dim)
    encoder = rng.normal(size=(code.shape[1], dim)) / np.sqrt(dim)
    raw = code @ encoder + simulation.modality_gap * offsets[modality] + noise
    return np.round(raw / np.linalg.norm(raw, axis=1, keepdims=True), 6)


# ---- pictures


def make_catalogue(simulation: Simulation) -> Catalogue:
    """The pictures, what detectors make of them, and their embeddings."""
    rng, count = np.random.default_rng([simulation.seed, 1]), simulation.pictures
    sizes = rng.integers(1, simulation.frames + 1, count)
    shoot = np.repeat(np.arange(count), sizes)[:count]
    style = rng.integers(simulation.domains, size=count)[shoot]
    true, background, light = _make_drinks(simulation, rng, shoot, style)
    brightness = np.clip(light + rng.normal(0, 0.05, count) + simulation.brightness_shift, 0, 1)
    seen, confidence = _detect(simulation, rng, true, background, brightness - 0.5)
    haze, chroma = true.haze, np.hypot(seen.lab[:, 1], seen.lab[:, 2])
    pixels = {
        "brightness": brightness,
        "contrast": np.clip(0.55 - 0.2 * haze + rng.normal(0, 0.1, count), 0, 1),
        "saturation": np.clip(chroma / 100 + rng.normal(0, 0.05, count), 0, 1),
        "object_area": np.clip(seen.prominence + 0.5 * rng.beta(1, 4, count), 0, 1),
    }
    embedding = _embed_pictures(simulation, rng, shoot, style, true, brightness - 0.5)
    encoded = [msgspec.Raw(msgspec.json.encode(row.tolist())) for row in embedding]
    return Catalogue(shoot, true, seen, confidence, pixels, embedding, encoded)


def _make_drinks(
    simulation: Simulation, rng: Generator, shoot: Array, style: Array
) -> tuple[Drinks, Array, Array]:
    """True drinks, their backgrounds' Lab [P, 3] and the shoots' brightness [P]."""
    count = len(shoot)
    # Drawn for every picture and then shared through the shoot's index, so that frames agree.
    word = _draw(rng, _tastes(simulation, "color")[style])[shoot]
    glass = _draw(rng, _tastes(simulation, "glass")[style])[shoot]
    ice = _draw(rng, _tastes(simulation, "ice")[style])[shoot]
    garnish = (rng.random((count, len(GARNISHES))) < 1.5 * _tastes(simulation, "garnish")[style])[shoot]
    lab = np.array(list(PROTOTYPE.values()), float)[word]
    lab = lab + rng.normal(0, 7, (count, 3))[shoot] + rng.normal(0, 2, (count, 3))
    cloudy = np.select(
        [word == WORDS["color"].index("clear"), word == WORDS["color"].index("white")],
        [0.1, 0.9],
        0.4,
    )
    haze = rng.beta(4 * cloudy, 4 * (1 - cloudy))[shoot]
    light = rng.beta(5, 5, count)[shoot]
    background = np.stack([100 * light, *rng.normal(0, 12, (2, count))[:, shoot]], axis=1)
    drink = (rng.random(count) >= simulation.no_drink_rate)[shoot]
    prominence = np.where(drink, 0.04 + 0.8 * rng.beta(1.5, 4, count), 0)
    glass, ice, garnish = (
        np.where(drink, glass, -1),
        np.where(drink, ice, 0),
        garnish & drink[:, None],
    )
    return Drinks(lab, glass, garnish, ice, prominence, haze), background, light


def _detect(
    simulation: Simulation, rng: Generator, true: Drinks, background: Array, exposure: Array
) -> tuple[Drinks, Array]:
    """Detected drinks and the confidence [P, rules] of each rule's detector."""
    count, error = len(true.glass), simulation.detector_error

    def confuse(index: Array, words: tuple[str, ...]) -> Array:
        wrong = (index + rng.integers(1, len(words), count)) % len(words)
        return np.where((rng.random(count) < error) & (index >= 0), wrong, index)

    glass, ice = confuse(true.glass, GLASSES), confuse(true.ice, ICES)
    chance = rng.random(true.garnish.shape)
    garnish = np.where(true.garnish, chance >= 2 * error, chance < error / 4)
    area = np.clip(true.prominence * np.exp(2 * error * rng.normal(size=count)), 0, 1)
    prominence = np.where(rng.random(count) < error / 4, 0, area)
    haze = np.clip(true.haze + 2 * error * rng.normal(size=count), 0, 1)
    leak = ((1 - true.prominence) * rng.random(count))[:, None]
    disturbance = leak * (background - true.lab) + rng.normal(0, 12, (count, 3))
    lab = true.lab + simulation.pixel_error * (disturbance + np.outer(exposure, (40, 0, 0)))
    lab[:, 2] += simulation.color_cast
    right = [
        (prominence > 0) == (true.prominence > 0), delta_e_2000(lab, true.lab) < 10,
        glass == true.glass, (garnish == true.garnish).all(axis=1), ice == true.ice,
        (haze > 0.5) == (true.haze > 0.5),
    ]  # fmt: skip
    sure, unsure = rng.beta(8, 2, (count, len(right))), rng.beta(4, 4, (count, len(right)))
    confidence = np.where(np.stack(right, axis=1), sure, unsure)
    return Drinks(lab, glass, garnish, ice, prominence, haze), confidence


def _embed_pictures(
    simulation: Simulation,
    rng: Generator,
    shoot: Array,
    style: Array,
    true: Drinks,
    exposure: Array,
) -> Array:
    """Embeddings [P, D] of the pictures, from what they truly show."""
    count, prototypes = len(shoot), np.array(list(PROTOTYPE.values()), float)
    likeness = np.exp(-delta_e_2000(true.lab[:, None], prototypes) / 8)
    color = likeness / likeness.sum(axis=1, keepdims=True) * (true.prominence[:, None] > 0)
    scene = np.stack([np.sqrt(true.prominence), exposure], axis=1)
    code = _code(color, true.glass, true.garnish, true.ice, style, scene)
    errors = rng.normal(size=(2, *code.shape))
    code = code + simulation.embedding_noise * np.sqrt(0.5) * (errors[0][shoot] + errors[1])
    white = rng.normal(size=(count, simulation.embedding_dim)) / np.sqrt(simulation.embedding_dim)
    return _embed(simulation, code, 0, simulation.scene_noise * white)


# ---- queries


def make_query(simulation: Simulation, rng: Generator, number: int) -> Query:
    """One intent and its text embedding."""
    domain = int(rng.integers(simulation.domains))
    want = {kind: int(_draw(rng, _tastes(simulation, kind)[[domain]])[0]) for kind in WORDS}
    asked = rng.random(len(WORDS)) < np.array(list(ASKED.values()))
    asked[0] |= not asked.any()
    want = {kind: word if on else -1 for (kind, word), on in zip(want.items(), asked, strict=True)}
    color, glass, garnish, ice = (np.array([want[kind]]) for kind in WORDS)
    scene = np.array([[0.6, 0.0]])
    code = _code(
        _one_hot(color, len(PROTOTYPE)),
        glass,
        _one_hot(garnish, len(GARNISHES)),
        ice,
        np.array([domain]),
        scene,
    )
    return Query(number, domain, want, _embed(simulation, code, 1)[0])


def constraints(query: Query) -> dict[str, str]:
    """What the query asks for, in words."""
    return {kind: WORDS[kind][index] for kind, index in query.want.items() if index >= 0}


def query_text(query: Query) -> str:
    """The query in English."""
    said = constraints(query)
    text = f"{said.get('color', '')} cocktail".strip()
    text += f" in a {said['glass']} glass" if "glass" in said else ""
    text += f" with {said['garnish']}" if "garnish" in said else ""
    ice = {
        "none": "without ice",
        "cubes": "on ice cubes",
        "crushed": "on crushed ice",
        "sphere": "on an ice sphere",
    }
    return f"{text} {ice[said['ice']]}" if "ice" in said else text


def color_difference(query: Query, drinks: Drinks) -> Array:
    """CIEDE2000 [n] to the colour asked for; 0 where none is."""
    if query.want["color"] < 0:
        return np.zeros(len(drinks.glass))
    return delta_e_2000(drinks.lab, np.array(list(PROTOTYPE.values()), float)[query.want["color"]])


def clarity_wanted(query: Query) -> float | None:
    """The haze a colour word implies, if it implies one."""
    return {"clear": 0.0, "white": 1.0}.get(constraints(query).get("color", ""))


def conflicts_by_rule(query: Query, drinks: Drinks) -> Array:
    """Which of RULES each drink breaks [n, len(RULES)]; a missing subject hides the others."""
    want, visible = query.want, drinks.prominence >= 0.03
    none = np.zeros(len(visible), bool)
    clarity = clarity_wanted(query)
    broken = [
        color_difference(query, drinks) > 30,
        ((drinks.glass < STEMMED) != (want["glass"] < STEMMED)) if want["glass"] >= 0 else none,
        ~drinks.garnish[:, want["garnish"]] if want["garnish"] >= 0 else none,
        ((drinks.ice == 0) != (want["ice"] == 0)) if want["ice"] >= 0 else none,
        np.abs(drinks.haze - clarity) > 0.5 if clarity is not None else none,
    ]
    return np.stack([~visible, *(visible & rule for rule in broken)], axis=1)


def true_compliance(query: Query, drinks: Drinks) -> Array:
    """What a reviewer without noise says [n], in [0, 1]."""
    want = query.want
    family = (drinks.glass < STEMMED) == (want["glass"] < STEMMED)
    iced = (drinks.ice > 0) & (want["ice"] > 0)
    credit = {
        "color": 1 / (1 + np.exp((color_difference(query, drinks) - 18) / 4)),
        "glass": np.where(drinks.glass == want["glass"], 1.0, 0.4 * family),
        "garnish": drinks.garnish[:, want["garnish"]].astype(float),
        "ice": np.where(drinks.ice == want["ice"], 1.0, 0.6 * iced),
    }
    weight = {kind: TASTE_WEIGHT[kind] for kind, index in want.items() if index >= 0}
    presence = np.minimum(1, drinks.prominence / 0.25)
    mean = np.sum([weight[kind] * credit[kind] for kind in weight], axis=0) / sum(weight.values())
    return presence * mean


def step4_compliance(query: Query, drinks: Drinks) -> Array:
    """Step 4's own rule [n], in [0, 1]: every credit counts alike, ice does not count."""
    want = query.want
    credit = {
        "color": np.clip(1.3 - color_difference(query, drinks) / 40, 0, 1),
        "glass": (drinks.glass == want["glass"]).astype(float),
        "garnish": drinks.garnish[:, want["garnish"]].astype(float),
    }
    asked = [credit[kind] for kind in credit if want[kind] >= 0] or [np.ones(len(drinks.glass))]
    presence = np.where(drinks.prominence > 0, np.minimum(1, 0.4 + 2 * drinks.prominence), 0)
    return presence * np.mean(asked, axis=0)
