"""Scores the candidates of one query in NumPy: what `ranker.artifact` does in JAX, arranged for one list.

Nothing but the hidden layer and the words' shares bends, so the query is multiplied into the weights
first: what is left for a candidate is one product with its embedding and one with its attributes.  The
weights of all L lanes stand side by side, so an ensemble is one product too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cotrr.ranker.calibrators import Calibration, Scored, conclude
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

    mean: np.ndarray  # [L, A]
    scale: np.ndarray  # [L, A] 1 / deviation; 0 where training never saw it, or it never varies
    rule: np.ndarray  # [L, 3] weights of the rule's terms
    usual: np.ndarray  # [L] logit of the conflict probability at the mean
    base: np.ndarray  # [L, 2] base logits of a candidate at the mean


class Words(NamedTuple):
    """The words of one key of constraints: v of them."""

    place: np.ndarray  # [v] where they stand in the vocabulary
    axes: np.ndarray  # [d, L v]
    offset: np.ndarray  # [L v] of the mean image


class Scorer:
    """A model for one list at a time; it changes nothing, so any number of threads may share it."""

    def __init__(self, contents: Contents):
        """Arranges the weights of a model's files."""
        w, config = contents.weights, contents.facts["config"]
        statistics = {k.removeprefix("statistics/"): v for k, v in w.items() if k.startswith("statistics/")}
        self.version: str = contents.facts["version"]
        self.domains: dict[str, int] = {name: i for i, name in enumerate(contents.vocabulary.domains)}
        self.image_dim, self.text_dim = statistics["image_mean"].shape[1], statistics["text_mean"].shape[1]
        self._final, self._fitted = w["final"], contents.calibration
        self._tokens = {name: i for i, name in enumerate(contents.vocabulary.constraints)}
        mask = mask_of(config).astype(np.float32)
        self._attribute_gate, self._embedding_gate = mask[:-1], mask[-1]
        self._set_statistics(statistics, w)
        self._set_weights(w, statistics, config["hidden"])

    @property
    def calibration(self) -> Calibration:
        """How scores become labels and probabilities."""
        return self._fitted

    def _set_statistics(self, s: dict[str, np.ndarray], w: dict[str, np.ndarray]) -> None:
        seen = s["missing"] < 1
        self._missing, self._varies = s["missing"], (s["missing"] > 0) & seen
        self._text_mean, self._text_axes = s["text_mean"], s["text_axes"]
        self._image_mean, self._image_axes = s["image_mean"], s["image_axes"]
        self._base_scale = w["params/base_scale"]
        weights = np.array(list(RULE.values()), np.float32)
        gated = weights * self._attribute_gate[list(RULE_COLUMNS)] * self._base_scale[:, :1]
        self._domain = []
        for d in range(s["mean"].shape[1]):
            mean, scale = s["mean"][:, d], s["scale"][:, d]
            usual = _logit(mean[:, CONFLICT_PROB]) * seen[:, CONFLICT_PROB]
            rule = (mean[:, RULE_COLUMNS] @ weights - s["rule_mean"]) / s["rule_scale"]
            self._domain.append(
                Domain(
                    mean,
                    np.where(seen & np.isfinite(scale), 1 / scale, 0.0).astype(np.float32),
                    gated / s["rule_scale"][:, None] * seen[:, RULE_COLUMNS],
                    usual,
                    self._base_scale * np.stack([rule, usual], axis=1),
                )
            )
        self._conflict = self._base_scale[:, 1] * self._attribute_gate[CONFLICT_PROB] * seen[:, CONFLICT_PROB]

    def _set_weights(self, w: dict[str, np.ndarray], s: dict[str, np.ndarray], hidden: int) -> None:
        words, parts = s["word_axes"].shape[1], 2 * s["word_key"].shape[1]
        components, text = s["image_axes"].shape[2], s["text_axes"].shape[2]
        gate, a = self._embedding_gate, self._attribute_gate
        query_gate = np.concatenate([np.ones(1 + words), np.full(text, gate)]).astype(np.float32)
        candidate_gate = np.concatenate([a, a, np.full(components + parts, gate)]).astype(np.float32)
        # The size of a match is taken out of its weights rather than out of every match.
        with np.errstate(divide="ignore"):
            inverse = np.where(np.isfinite(s["match_scale"]), 1 / s["match_scale"], 0.0)
        size = np.concatenate([np.ones((len(inverse), 2 * len(a) + components)), inverse], axis=1)
        scaled = (candidate_gate * size).astype(np.float32)  # [L, c]
        weights = w["params/query_weights"] * query_gate[:, None, None] * scaled[:, None, :, None]
        self._weights = weights.reshape(*weights.shape[:2], -1)  # [L, q, c · 2]
        self._offset = w["params/query_offset"] * query_gate[:, None]
        self._bias = w["params/bias"]
        self._split = np.cumsum([len(a), len(a), components])
        self._words = [self._key(s, key) for key in range(s["word_key"].shape[1])]
        self._hidden = None
        if hidden:
            of_query = w["params/query_hidden"] * query_gate[:, None]
            of_candidate = w["params/candidate_hidden"] * scaled[:, :, None]
            self._hidden = of_query, of_candidate, w["params/heads"]

    def _key(self, s: dict[str, np.ndarray], key: int) -> Words:
        place = np.flatnonzero(s["word_key"][0, key])
        axes = s["word_axes"][:, place]  # [L, v, d]
        offset = np.einsum("lvd,ld->lv", axes, s["image_mean"], dtype=np.float64)
        flat = np.ascontiguousarray(axes.transpose(2, 0, 1).reshape(axes.shape[2], -1))
        return Words(place, flat, offset.ravel().astype(np.float32))

    def score(self, query: Query, image: np.ndarray, attributes: np.ndarray) -> Scored:
        """Calibrated scores of n candidates: `image` [n, d] (NaN or d = 0: missing), `attributes` [n, A]."""
        logits = self.logits(query, image, attributes).astype(np.float64)  # [L, n, 2]
        return conclude(self._fitted, logits[..., 0], logits[..., 1], self._final, np.ones(len(image), bool))

    def logits(self, query: Query, image: np.ndarray, attributes: np.ndarray) -> np.ndarray:
        """[L, n, 2] rank and conflict logits of each lane."""
        domain = self._domain[self.domains.get(query.domain, len(self.domains))]
        wants = np.zeros(len(self._tokens), np.float32)
        encode_wants(query.constraints, self._tokens, wants)
        asked = self._asked(query.text, wants)  # [L, q]
        mixed = (asked[:, None] @ self._weights).reshape(len(asked), -1, 2)  # [L, c, 2]
        offset = (asked[:, None] @ self._offset) + (self._bias + domain.base)[:, None]
        known = attributes.astype(np.float32, copy=False)
        standard, indicator, base = self._attributes(domain, known)
        seen, lost, shown, _ = np.split(mixed, self._split, axis=1)
        logits = standard @ seen + indicator @ lost + offset + base
        pictures = self._pictures(image)
        logits += self._along(pictures, self._image_axes @ shown)
        matches = self._matches(pictures, wants)
        half = len(self._words)
        for key, there, share in matches:
            at = self._split[-1] + key
            logits += there[..., None] * mixed[:, None, at] + share[..., None] * mixed[:, None, at + half]
        if self._hidden is not None:
            logits += self._bent(asked, standard, indicator, pictures, matches)
        return logits

    def _asked(self, text: np.ndarray, wants: np.ndarray) -> np.ndarray:
        """[L, q] the query as each lane sees it: a constant, what is wanted, components of its text."""
        lanes = len(self._text_mean)
        centred = np.zeros_like(self._text_mean)
        if len(text) == self.text_dim:
            centred = np.nan_to_num(text - self._text_mean)
        components = (centred[:, None] @ self._text_axes)[:, 0]
        return np.concatenate(
            [np.ones((lanes, 1), np.float32), np.broadcast_to(wants, (lanes, len(wants))), components], axis=1
        )

    def _attributes(self, domain: Domain, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """[L, n, A] standardised values and missing-value indicators, and [L, n, 2] base logits."""
        missing = np.isnan(values)
        apart = np.where(missing, 0.0, values - domain.mean[:, None])
        standard = np.clip(apart * domain.scale[:, None], -WINSOR, WINSOR)
        indicator = np.where(self._varies[:, None], missing - self._missing[:, None], np.float32(0))
        rule = (apart[..., RULE_COLUMNS] @ domain.rule[..., None])[..., 0]
        raw = apart[..., CONFLICT_PROB] + domain.mean[:, None, CONFLICT_PROB]
        conflict = self._conflict[:, None] * (_logit(raw) - _logit(domain.mean[:, None, CONFLICT_PROB]))
        return standard, indicator, np.stack([rule, conflict], axis=-1)

    def _pictures(self, image: np.ndarray) -> Pictures:
        """The images, with those marked that are missing."""
        if image.shape[1] != self.image_dim:  # none is given, or the model knows none
            image = np.full((len(image), self.image_dim), np.nan, np.float32)
        there = np.asarray(np.isfinite(image[:, :1]).all(axis=1))
        whole = bool(there.all())
        vectors = image if whole else np.where(there[:, None], image, 0.0)
        return Pictures(vectors.astype(np.float32, copy=False), None if whole else there)

    def _along(self, pictures: Pictures, axes: np.ndarray) -> np.ndarray:
        """[L, n, k] images less their mean, along axes [L, d, k]; 0 for a missing one."""
        lanes, d, k = axes.shape
        flat = pictures.vectors @ axes.transpose(1, 0, 2).reshape(d, lanes * k)
        flat -= np.einsum("ld,ldk->lk", self._image_mean, axes).ravel()
        if pictures.there is not None:
            flat *= pictures.there[:, None]
        return flat.reshape(-1, lanes, k).transpose(1, 0, 2)

    def _matches(self, pictures: Pictures, wants: np.ndarray) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """By wanted key [L, n]: how far images lie along the wanted word, and the log of its share."""
        found = []
        for key, words in enumerate(self._words):
            weight = wants[words.place]
            if not weight.any():
                continue
            flat = pictures.vectors @ words.axes
            flat -= words.offset
            if pictures.there is not None:
                flat *= pictures.there[:, None]
            along = flat.reshape(len(flat), len(self._bias), len(weight))  # [n, L, v]
            most = along.max(axis=2)
            total = np.log(np.exp(along - most[..., None]).sum(axis=2)) + most
            wanted = (weight > 0).astype(np.float32)
            share = along @ wanted - total * wanted.sum()
            found.append((key, (along @ weight).T, share.T))
        return found

    def _bent(
        self,
        asked: np.ndarray,
        standard: np.ndarray,
        indicator: np.ndarray,
        pictures: Pictures,
        matches: list[tuple[int, np.ndarray, np.ndarray]],
    ) -> np.ndarray:
        """[L, n, 2] what the hidden layer adds."""
        assert self._hidden is not None
        of_query, of_candidate, heads = self._hidden
        seen, lost, shown, matched = np.split(of_candidate, self._split, axis=1)
        inside = standard @ seen + indicator @ lost + asked[:, None] @ of_query
        inside += self._along(pictures, self._image_axes @ shown)
        for key, there, share in matches:
            inside += there[..., None] * matched[:, None, key]
            inside += share[..., None] * matched[:, None, key + len(self._words)]
        return _gelu(inside) @ heads


def score_list(scorer: Scorer, lists: Lists, q: int) -> Scored:
    """The scores of the candidates of one of the lists."""
    query, where = Query(lists.text[q], lists.domain[q], lists.constraints[q]), lists.where[q]
    return scorer.score(query, lists.image[q][where], lists.attributes[q][where])


def largest_difference(scorer: Scorer, scored: Scored, lists: Lists) -> float:
    """Between the scores of lists [Q, n] and what the scorer says of each query, over all that it says."""
    worst = 0.0
    for q, where in enumerate(lists.where):
        found = score_list(scorer, lists, q)
        for ours, theirs in zip(found, scored, strict=True):
            apart = np.abs(ours - theirs[q][where])
            both_undefined = np.isnan(ours) & np.isnan(theirs[q][where])
            worst = max(worst, float(np.where(both_undefined, 0.0, apart).max(initial=0.0)))
    return worst


class Pictures(NamedTuple):
    """Image embeddings; those that are missing are 0."""

    vectors: np.ndarray  # [n, d]
    there: np.ndarray | None  # [n] bool; None: all are


def _logit(p: np.ndarray) -> np.ndarray:
    p = np.clip(p, *PROBABILITIES)
    return np.log(p / (1 - p))


def _gelu(x: np.ndarray) -> np.ndarray:
    """The tanh form of the Gaussian error linear unit (Hendrycks & Gimpel 2016)."""
    return 0.5 * x * (1 + np.tanh(np.float32(0.7978845608) * (x + np.float32(0.044715) * x**3)))
