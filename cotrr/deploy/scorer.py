"""Scores the candidates of one query in NumPy: what `ranker.artifact` does in JAX, arranged for one list.

Nothing but the hidden layer and the words' shares bends, so the query is multiplied into the weights
first: what is left for a candidate is one product with its embedding and one with its attributes.  The
weights of all L lanes stand side by side, so an ensemble is one product too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cotrr.ranker.calibrators import Scored, conclude
from cotrr.ranker.encoding import CONFLICT_PROB, RULE, RULE_COLUMNS, WINSOR, encode_wants, mask_of
from cotrr.ranker.model_files import Contents

if TYPE_CHECKING:
    from cotrr.data.lists import Lists

PROBABILITIES = (0.01, 0.99)  # a conflict probability is held inside, so that its logit is finite


class Query(NamedTuple):
    """What is asked for."""

    text: np.ndarray  # [d] or [0]: no embedding
    domain: str
    constraints: Sequence[str]  # tokens `key=value`


class Domain(NamedTuple):
    """What the lanes know of a domain: L lanes, A attributes."""

    mean: np.ndarray  # [L, A, 1]
    scale: np.ndarray  # [L, A, 1] 1 / deviation; 0 where training never saw it, or it never varies
    rule: np.ndarray  # [L, 1, 3] weights of the rule's terms
    base: np.ndarray  # [L, 2] base logits of a candidate at the mean


class Words(NamedTuple):
    """The words of one key of constraints: v of them."""

    place: np.ndarray  # [v] where they stand in the vocabulary
    axes: np.ndarray  # [L v, d]
    offset: np.ndarray  # [L v, 1] of the mean image


class Match(NamedTuple):
    """How well n images match the wanted words of a key, [L, 1, n] each."""

    key: int
    there: np.ndarray  # how far they lie along the wanted word
    share: np.ndarray  # the log of its share among all words of the key


class Scorer:
    """A model for one list at a time; it changes nothing, so any number of threads may share it.

    Candidates stand last in every array, so that what is done for all of them runs over memory in order.
    """

    def __init__(self, contents: Contents):
        """Arranges the weights of a model's files."""
        w, config = contents.weights, contents.facts["config"]
        s = {k.removeprefix("statistics/"): v for k, v in w.items() if k.startswith("statistics/")}
        self.version: str = contents.facts["version"]
        self.image_dim, self.text_dim = s["image_mean"].shape[1], s["text_mean"].shape[1]
        self._final, self._fitted = w["final"], contents.calibration
        self._domains = {name: i for i, name in enumerate(contents.vocabulary.domains)}
        self._tokens = {name: i for i, name in enumerate(contents.vocabulary.constraints)}
        self._text_mean, self._text_axes = s["text_mean"], s["text_axes"]
        # Images are centred once; what is left of each lane's own mean is small, so no digits cancel.
        self._centre = s["image_mean"].mean(axis=0)
        self._image_mean = (s["image_mean"] - self._centre)[..., None]  # [L, d, 1]
        self._image_axes = np.ascontiguousarray(s["image_axes"].transpose(0, 2, 1))  # [L, p, d]
        self._words = [self._key(s, key) for key in range(s["word_key"].shape[1])]
        mask = mask_of(config).astype(np.float32)
        self._set_base(s, w["params/base_scale"], mask)
        self._set_weights(s, w, mask, config["hidden"])

    def _set_base(self, s: dict[str, np.ndarray], size: np.ndarray, mask: np.ndarray) -> None:
        """Step 4's own view: its rule, and the logit of its conflict probability."""
        seen, columns = s["missing"] < 1, list(RULE_COLUMNS)
        terms = np.array(list(RULE.values()), np.float32)
        gated = terms * mask[columns] * seen[:, columns] * size[:, :1] / s["rule_scale"][:, None]
        self._conflict = (size[:, 1] * mask[CONFLICT_PROB] * seen[:, CONFLICT_PROB])[:, None]
        self._domain = []
        for mean, scale in zip(s["mean"].swapaxes(0, 1), s["scale"].swapaxes(0, 1), strict=True):
            rule = (mean[:, columns] @ terms - s["rule_mean"]) / s["rule_scale"]
            usual = _logit(mean[:, CONFLICT_PROB]) * seen[:, CONFLICT_PROB]
            base = size * np.stack([rule, usual], axis=1)
            inverse = np.where(seen & np.isfinite(scale), 1 / scale, np.float32(0))
            self._domain.append(Domain(mean[..., None], inverse[..., None], gated[:, None], base))

    def _set_weights(
        self, s: dict[str, np.ndarray], w: dict[str, np.ndarray], mask: np.ndarray, hidden: int
    ) -> None:
        """Weights with the masks, and what else is the same for every list, multiplied in."""
        words, parts = s["word_axes"].shape[1], 2 * len(self._words)
        lanes, components, text = len(s["missing"]), s["image_axes"].shape[2], s["text_axes"].shape[2]
        gate = lambda *sizes: np.concatenate(
            [np.broadcast_to(np.float32(size), width) for size, width in sizes]
        )
        query_gate = gate((1, 1 + words), (mask[-1], text))
        candidate_gate = np.concatenate([mask[:-1], mask[:-1], gate((mask[-1], components + parts))])
        # What divides a match, and which indicators vary, belongs to the weights as well.
        varies = (s["missing"] > 0) & (s["missing"] < 1)
        inverse = np.where(np.isfinite(s["match_scale"]), 1 / s["match_scale"], 0)
        size = np.concatenate([np.ones_like(varies), varies, np.ones((lanes, components)), inverse], axis=1)
        size = (size * candidate_gate).astype(np.float32)  # [L, c]
        weights = w["params/query_weights"].transpose(0, 1, 3, 2) * query_gate[:, None, None]
        self._weights = (weights * size[:, None, None]).reshape(lanes, len(query_gate), -1)  # [L, q, 2 c]
        self._offset = w["params/query_offset"] * query_gate[:, None]
        self._bias, self._missing = w["params/bias"], s["missing"][..., None]
        count = len(mask) - 1
        self._split = [count, 2 * count, 2 * count + components]
        self._hidden = None
        if hidden:
            of_query = w["params/query_hidden"] * query_gate[:, None]
            of_candidate = (w["params/candidate_hidden"] * size[..., None]).transpose(0, 2, 1)
            self._hidden = of_query, of_candidate, w["params/heads"].transpose(0, 2, 1)

    def _key(self, s: dict[str, np.ndarray], key: int) -> Words:
        place = np.flatnonzero(s["word_key"][0, key])
        axes = s["word_axes"][:, place]  # [L, v, d]
        return Words(place, axes.reshape(-1, axes.shape[2]), (axes @ self._image_mean).reshape(-1, 1))

    def score(self, query: Query, image: np.ndarray, attributes: np.ndarray) -> Scored:
        """Calibrated scores of n candidates: `image` [n, d] (NaN or d = 0: missing), `attributes` [n, A]."""
        logits = self.logits(query, image, attributes).astype(np.float64)  # [L, 2, n]
        return conclude(self._fitted, logits[:, 0], logits[:, 1], self._final, np.ones(len(image), bool))

    def logits(self, query: Query, image: np.ndarray, attributes: np.ndarray) -> np.ndarray:
        """[L, 2, n] rank and conflict logits of each lane."""
        domain = self._domain[self._domains.get(query.domain, -1)]  # the last one is of all domains
        wants = np.zeros(len(self._tokens), np.float32)
        encode_wants(query.constraints, self._tokens, wants)
        asked = self._asked(query.text, wants)
        pictures, values = self._pictures(image), attributes.astype(np.float32, copy=False).T
        missing = np.isnan(values)
        apart = np.where(missing, np.float32(0), values - domain.mean)  # [L, A, n]
        seen = Seen(
            np.clip(apart * domain.scale, -WINSOR, WINSOR), missing, pictures, self._matches(pictures, wants)
        )
        mixed = (asked @ self._weights).reshape(len(self._bias), 2, -1)  # [L, 2, c]
        logits = self._weigh(mixed, seen)
        logits += (asked @ self._offset).transpose(0, 2, 1) + (self._bias + domain.base)[..., None]
        logits[:, 0] += (domain.rule @ apart[:, RULE_COLUMNS])[:, 0]
        mean = domain.mean[:, CONFLICT_PROB]
        logits[:, 1] += self._conflict * (_logit(apart[:, CONFLICT_PROB] + mean) - _logit(mean))
        if self._hidden is not None:
            of_query, of_candidate, heads = self._hidden
            inside = self._weigh(of_candidate, seen) + (asked @ of_query).transpose(0, 2, 1)
            logits += heads @ _gelu(inside)
        return logits

    def _weigh(self, weights: np.ndarray, seen: Seen) -> np.ndarray:
        """[L, k, n] products of weights [L, k, c] with all features of the candidates."""
        values, lost, shown, matched = np.split(weights, self._split, axis=2)
        lanes, k, _ = weights.shape
        total = values @ seen.attributes
        indicator = lost.reshape(lanes * k, -1) @ seen.missing.astype(np.float32)
        total += indicator.reshape(lanes, k, -1) - lost @ self._missing
        total += self._along(seen.pictures, shown @ self._image_axes)
        for match in seen.matches:
            total += matched[:, :, match.key, None] * match.there
            total += matched[:, :, match.key + len(self._words), None] * match.share
        return total

    def _along(self, pictures: Pictures, axes: np.ndarray) -> np.ndarray:
        """[L, k, n] images less their mean, along axes [L, k, d]; 0 for a missing one."""
        lanes, k, d = axes.shape
        flat = axes.reshape(lanes * k, d) @ pictures.vectors
        flat -= (axes @ self._image_mean).reshape(lanes * k, 1)
        if pictures.there is not None:
            flat *= pictures.there
        return flat.reshape(lanes, k, -1)

    def _asked(self, text: np.ndarray, wants: np.ndarray) -> np.ndarray:
        """[L, 1, q] the query as each lane sees it: a constant, what is wanted, components of its text."""
        known = self.text_dim and len(text) == self.text_dim and np.isfinite(text[0])  # all of it, or nothing
        centred = text - self._text_mean if known else np.zeros_like(self._text_mean)
        components = centred[:, None] @ self._text_axes
        same = np.concatenate([np.ones(1, np.float32), wants])
        return np.concatenate([np.broadcast_to(same, (len(centred), 1, len(same))), components], axis=2)

    def _pictures(self, image: np.ndarray) -> Pictures:
        """The images, with those marked that are missing."""
        if image.shape[1] != self.image_dim:  # none is given, or the model knows none
            image = np.full((len(image), self.image_dim), np.nan, np.float32)
        vectors = (image.astype(np.float32, copy=False) - self._centre).T
        there = np.asarray(np.isfinite(vectors[:1]).all(axis=0))
        return Pictures(vectors, None) if there.all() else Pictures(np.where(there, vectors, 0), there)

    def _matches(self, pictures: Pictures, wants: np.ndarray) -> list[Match]:
        """What is wanted of each key and how far it is met; a key that is not asked for has no match."""
        found = []
        for key, words in enumerate(self._words):
            weight = wants[words.place]
            wanted = np.flatnonzero(weight)
            if not len(wanted):
                continue
            flat = words.axes @ pictures.vectors
            flat -= words.offset
            if pictures.there is not None:
                flat *= pictures.there
            along = flat.reshape(len(self._bias), len(weight), -1)  # [L, v, n]
            most = along.max(axis=1, keepdims=True)
            total = np.log(np.exp(along - most).sum(axis=1, keepdims=True)) + most
            of_wanted = along[:, wanted]
            there = (weight[wanted, None] * of_wanted).sum(axis=1, keepdims=True)
            share = of_wanted.sum(axis=1, keepdims=True) - len(wanted) * total
            found.append(Match(key, there, share))
        return found


class Pictures(NamedTuple):
    """Image embeddings; those that are missing are 0."""

    vectors: np.ndarray  # [d, n]
    there: np.ndarray | None  # [n] bool; None: all are


class Seen(NamedTuple):
    """The features of n candidates, as each of L lanes sees them."""

    attributes: np.ndarray  # [L, A, n] standardised
    missing: np.ndarray  # [A, n] bool
    pictures: Pictures
    matches: list[Match]


def of_list(lists: Lists, q: int) -> tuple[Query, np.ndarray, np.ndarray]:
    """What `Scorer.score` takes, of one of the lists."""
    query, where = Query(lists.text[q], lists.domain[q], lists.constraints[q]), lists.where[q]
    return query, lists.image[q][where], lists.attributes[q][where]


def largest_difference(scorer: Scorer, logits: tuple[np.ndarray, np.ndarray], lists: Lists) -> float:
    """Between the scorer's logits and those of `artifact.logits`, absolute below 1 and relative above.

    What follows the logits is the same code for both.
    """
    worst, theirs = 0.0, np.stack(logits, axis=1)  # [L, 2, Q, n]
    for q, where in enumerate(lists.where):
        wanted = theirs[:, :, q, where]
        apart = np.abs(scorer.logits(*of_list(lists, q)) - wanted) / np.maximum(np.abs(wanted), 1)
        worst = max(worst, float(apart.max(initial=0.0)))
    return worst


def _logit(p: np.ndarray) -> np.ndarray:
    p = np.clip(p, *PROBABILITIES)
    return np.log(p / (1 - p))


def _gelu(x: np.ndarray) -> np.ndarray:
    """The tanh form of the Gaussian error linear unit (Hendrycks & Gimpel 2016)."""
    return 0.5 * x * (1 + np.tanh(np.float32(0.7978845608) * (x + np.float32(0.044715) * x**3)))
