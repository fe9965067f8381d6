"""Scores the candidates of one query in NumPy: what `ranker.artifact` does in JAX, arranged for one list.

Nothing but the hidden layer and the words' shares bends, so the query is multiplied into the weights
first: what is left for a candidate is one product with its embedding and one with its other features.
What rests on statistics alone is done once a view, for all lanes that learned from the same rows, and what
a domain and constraints decide is kept for the next query that says the same.

Shapes: L lanes, V views; A attributes, f features of a candidate; d numbers of an embedding, p components
of it; q numbers of a query; w words of k keys; h hidden units.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cotrr.ranker.calibrators import Scored, clip, conclude
from cotrr.ranker.encoding import CONFLICT_PROB, NAMES, RULE, RULE_COLUMNS, WINSOR, encode_wants, mask_of
from cotrr.ranker.model_files import Contents

if TYPE_CHECKING:
    from cotrr.data.lists import Lists

PROBABILITIES = (0.01, 0.99)  # a conflict probability is held inside, so that its logit is finite
# A candidate's features: its attributes, which of them are there, the terms of Step 4's rule, the logit of
# its conflict probability, a 1; behind them, by key, how far the wanted words are met, then their shares.
_VALUES = slice(0, len(NAMES))
_THERE = slice(_VALUES.stop, 2 * len(NAMES))
_TERMS = slice(_THERE.stop, _THERE.stop + len(RULE))
_CONFLICT, _ONE, _MATCHES = range(_TERMS.stop, _TERMS.stop + 3)
_COLUMNS = list(RULE_COLUMNS)

Arrays = dict[str, np.ndarray]


class Query(NamedTuple):
    """What is asked for."""

    text: np.ndarray  # [d] or [0]: no embedding
    domain: str
    constraints: Sequence[str]  # tokens `key=value`


class Domain(NamedTuple):
    """What is known of a domain."""

    mean: np.ndarray  # [A, V, 1]
    scale: np.ndarray  # [A, V, 1] 1 / deviation; 0 where training never saw it, or it never varies
    usual: np.ndarray  # [V, 1] logit of the mean conflict probability
    weights: np.ndarray  # [L, 2 (f + p)] of Step 4's own view, and the bias


class Words(NamedTuple):
    """The words of some keys."""

    axes: np.ndarray  # [w V, d + 1]
    of_key: np.ndarray  # [k, w] 0 or 1
    features: np.ndarray  # [2 k] where their matches stand


class Wish(NamedTuple):
    """What a domain and constraints decide, whatever the text and the candidates."""

    weights: np.ndarray  # [L, 2 (f + p) + h] of features and components, and for the hidden layer
    keys: tuple[int, ...]  # k that are asked for
    wanted: np.ndarray  # [2 k, w] by key: the weight of each of their words, then 1 where it is wanted
    count: np.ndarray  # [k, 1] how many words are wanted


class Hidden(NamedTuple):
    """The hidden layer, but for what it has of the query."""

    weights: np.ndarray  # [h L, f]
    axes: np.ndarray  # [h L, d + 1]
    heads: np.ndarray  # [L, 2, h]


class Candidates(NamedTuple):
    """What is known of n candidates."""

    pictures: np.ndarray  # [d + 1, n]
    features: np.ndarray  # [V, f, n] as each view sees them


class Scorer:
    """A model for one list at a time; any number of threads may share it.

    Candidates stand last in every array, so that what is done for all of them runs over memory in order.
    """

    def __init__(self, contents: Contents):
        """Arranges the weights of a model's files."""
        w, config = contents.weights, contents.facts["config"]
        s = {k.removeprefix("statistics/"): v for k, v in w.items() if k.startswith("statistics/")}
        mask = mask_of(config).astype(np.float32)
        self.version: str = contents.facts["version"]
        self.image_dim, self.text_dim = s["image_mean"].shape[1], s["text_mean"].shape[1]
        self._final, self._fitted = w["final"], contents.calibration
        self._rows = {name: row for row, name in enumerate(contents.vocabulary.domains)}
        self._tokens = {name: place for place, name in enumerate(contents.vocabulary.constraints)}
        self._view, first = _views(s)
        v = {name: of_lane[first] for name, of_lane in s.items()}
        self._text_centre, self._text_axes = _centred(v["text_mean"], v["text_axes"].swapaxes(1, 2))
        self._image_centre, image_axes = _centred(v["image_mean"], v["image_axes"].swapaxes(1, 2))
        _, word_axes = _centred(v["image_mean"], v["word_axes"])
        # Where views have differently many lanes, each lane gets its view's arrays for itself.
        even = len({*np.bincount(self._view).tolist()}) == 1
        self._shared = slice(None) if even else self._view
        self._image_axes = image_axes[self._shared]
        by_key = v["word_key"][0]
        self._count = _MATCHES + 2 * len(by_key)
        self._domains = _domains(s, w, mask, first)
        of_words, self._of_text = np.split(_of_query(s, w, mask), [1 + len(self._tokens)], axis=1)
        self._hidden = _hidden(s, w, mask, self._image_axes) if config["hidden"] else None
        # What these keep is never changed, so threads may share it.  Queries ask for few sets of keys.
        own = [domain.weights for domain in self._domains]
        self._wish = functools.lru_cache(maxsize=128)(functools.partial(_wish, of_words, own, by_key))
        self._words = functools.lru_cache(maxsize=8)(functools.partial(_words, word_axes, by_key))

    def score(self, query: Query, image: np.ndarray, attributes: np.ndarray) -> Scored:
        """Calibrated scores of n candidates: `image` [n, d] (NaN or d = 0: missing), `attributes` [n, A]."""
        logits = self.logits(query, image, attributes).astype(np.float64)  # [L, 2, n]
        return conclude(self._fitted, logits[:, 0], logits[:, 1], self._final, np.ones(len(image), bool))

    def logits(self, query: Query, image: np.ndarray, attributes: np.ndarray) -> np.ndarray:
        """[L, 2, n] rank and conflict logits of each lane."""
        row = self._rows.get(query.domain, -1)  # the last one is of all domains
        wants = np.zeros(len(self._tokens), np.float32)
        encode_wants(query.constraints, self._tokens, wants)
        wish = self._wish(row, wants.tobytes())  # not by the words: a caller's may be of any length
        seen = self._seen(self._domains[row], wish, image, attributes)
        mixed, inside = self._mixed(wish, query.text)
        axes = _times(mixed[:, self._count :], self._image_axes)
        logits = self._weigh(mixed[:, : self._count], axes, seen)
        if self._hidden is not None:
            inside = inside[..., None] + self._weigh(self._hidden.weights, self._hidden.axes, seen)
            logits += self._hidden.heads @ _gelu(inside)
        return logits

    def _mixed(self, wish: Wish, text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[2 L, f + p] weights of features and components, [L, h] what the hidden layer has of the query."""
        components = self._text_axes @ _apart(text[None], self._text_centre).T  # [V, p, 1]
        mixed = (components[self._view].swapaxes(1, 2) @ self._of_text)[:, 0] + wish.weights
        width = self._domains[0].weights.shape[1]
        return mixed[:, :width].reshape(2 * len(mixed), -1), mixed[:, width:]

    def _seen(self, domain: Domain, wish: Wish, image: np.ndarray, attributes: np.ndarray) -> Candidates:
        pictures = _apart(image, self._image_centre).T
        features = self._features(domain, attributes)
        if wish.keys:
            words = self._words(wish.keys)
            shape = len(words.features), *features.shape[1:]
            features[words.features] = _matches(words, wish, pictures).reshape(shape)
        return Candidates(pictures, features[:, self._shared].swapaxes(0, 1))

    def _features(self, domain: Domain, attributes: np.ndarray) -> np.ndarray:
        """[f, V, n] features of the candidates as each view sees them, their matches with words still 0."""
        values = np.ascontiguousarray(attributes.T, np.float32)
        missing = np.isnan(values)
        features = np.empty((self._count, len(domain.usual), len(attributes)), np.float32)
        features[_THERE] = ~missing[:, None]
        apart = features[_VALUES]
        np.subtract(np.where(missing, np.float32(0), values)[:, None], domain.mean, out=apart)
        apart *= features[_THERE]
        features[_TERMS] = apart[_COLUMNS]
        apart *= domain.scale
        clip(apart, -WINSOR, WINSOR, out=apart)
        clash = _logit(values[CONFLICT_PROB]) - domain.usual
        features[_CONFLICT] = np.where(missing[CONFLICT_PROB], 0, clash)
        features[_ONE] = 1
        features[_MATCHES:] = 0
        return features

    def _weigh(self, weights: np.ndarray, axes: np.ndarray, seen: Candidates) -> np.ndarray:
        """[L, k, n]: weights [k L, f] of the features, and what lies along axes [k L, d + 1]."""
        total = _times(weights, seen.features)
        total += axes @ seen.pictures
        return total.reshape(len(self._view), len(total) // len(self._view), total.shape[1])


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


def _views(s: Arrays) -> tuple[np.ndarray, np.ndarray]:
    """[L] the view of each lane, [V] the first lane of each: neighbours of the same statistics share one."""
    lanes = np.arange(len(s["missing"]))
    other = lambda lane: any((values[lane] != values[lane - 1]).any() for values in s.values())
    first = np.array([lane for lane in lanes if lane == 0 or other(lane)])
    return np.searchsorted(first, lanes, side="right") - 1, first


def _centred(mean: np.ndarray, axes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[d] a centre, [V, k, d + 1] axes [V, k, d] from each view's mean [V, d], for vectors as of `_apart`.

    Vectors are centred once; what is left of each view's own mean is small, so that no digits cancel.
    """
    centre = mean.mean(axis=0)
    offset = axes @ (centre - mean)[..., None]
    return centre, np.ascontiguousarray(np.concatenate([axes, offset], axis=2))


def _apart(vectors: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """[n, d + 1] vectors [n, d] less a centre, and a 1; all 0 where one is missing."""
    d = len(centre)
    if vectors.shape[1] != d:  # none is given, or the model knows none
        return np.zeros((len(vectors), d + 1), np.float32)
    apart = np.empty((len(vectors), d + 1), np.float32)
    np.subtract(vectors, centre, out=apart[:, :d])
    apart[:, d] = 1
    there = np.isfinite(apart[:, 0])
    if not there.all():
        apart[~there] = 0
    return apart


def _domains(s: Arrays, w: Arrays, mask: np.ndarray, first: np.ndarray) -> list[Domain]:
    """What is known of each domain; `first` [V] is a lane of each view.

    Step 4's own view is its rule, and the logit of its conflict probability.
    """
    known, size = s["missing"] < 1, w["params/base_scale"]
    counts, terms = mask[:-1] * known, np.array(list(RULE.values()), np.float32)
    width = _MATCHES + s["match_scale"].shape[1] + s["image_axes"].shape[2]
    found = []
    for mean, scale in zip(s["mean"].swapaxes(0, 1), s["scale"].swapaxes(0, 1), strict=True):
        rule = (mean[:, _COLUMNS] @ terms - s["rule_mean"]) / s["rule_scale"]
        usual = _logit(mean[:, CONFLICT_PROB])
        base = np.stack([rule, usual * known[:, CONFLICT_PROB]], axis=1)
        weights = np.zeros((len(mean), 2, width), np.float32)
        weights[:, 0, _TERMS] = size[:, :1] * counts[:, _COLUMNS] * terms / s["rule_scale"][:, None]
        weights[:, 1, _CONFLICT] = size[:, 1] * counts[:, CONFLICT_PROB]
        weights[..., _ONE] = size * base + w["params/bias"]
        inverse = np.where(known & np.isfinite(scale), 1 / scale, np.float32(0))
        of_view = lambda of_lane: of_lane[first].T[..., None]
        found.append(Domain(of_view(mean), of_view(inverse), of_view(usual), weights.reshape(len(mean), -1)))
    return found


def _of_query(s: Arrays, w: Arrays, mask: np.ndarray) -> np.ndarray:
    """[L, q, 2 (f + p) + h] what each number of a query weighs."""
    weights = _arranged(w["params/query_weights"].swapaxes(2, 3), s, mask)
    weights[..., _ONE] += w["params/query_offset"]
    weights = weights.reshape(*weights.shape[:2], -1)
    if "params/query_hidden" in w:
        weights = np.concatenate([weights, w["params/query_hidden"]], axis=2)
    weights[:, 1 + s["word_key"].shape[2] :] *= mask[-1]
    return weights


def _hidden(s: Arrays, w: Arrays, mask: np.ndarray, image_axes: np.ndarray) -> Hidden:
    weights = _arranged(w["params/candidate_hidden"].swapaxes(1, 2), s, mask)
    weights = weights.reshape(-1, weights.shape[2])
    features, components = np.split(weights, [weights.shape[1] - image_axes.shape[1]], axis=1)
    return Hidden(features, _times(components, image_axes), w["params/heads"].swapaxes(1, 2))


def _arranged(weights: np.ndarray, s: Arrays, mask: np.ndarray) -> np.ndarray:
    """[L, ..., f + p] weights [L, ..., c] of what training calls a candidate's features, in our order.

    What scales a feature, and what of it is the same for every candidate, belongs to the weights here.
    """
    wide = lambda of_lane: of_lane.reshape(len(of_lane), *[1] * (weights.ndim - 2), -1)
    missing, components = s["missing"], s["image_axes"].shape[2]
    varies = (missing > 0) & (missing < 1)
    inverse = np.where(np.isfinite(s["match_scale"]), 1 / s["match_scale"], np.float32(0))
    ends = np.cumsum([len(mask) - 1, len(mask) - 1, components])
    values, lost, shown, matched = np.split(weights, ends, axis=-1)
    there = lost * wide(-mask[:-1] * varies)  # 1 less the indicator of training
    usual = -(there * wide(1 - missing)).sum(axis=-1, keepdims=True)
    own = np.zeros((*weights.shape[:-1], len(RULE) + 1), np.float32)  # of Step 4's view: see `Domain`
    matched, shown = matched * wide(inverse) * mask[-1], shown * mask[-1]
    return np.concatenate([values * mask[:-1], there, own, usual, matched, shown], axis=-1)


def _wish(of_words: np.ndarray, own: list[np.ndarray], by_key: np.ndarray, row: int, wants: bytes) -> Wish:
    """Of the domain in a row of `own`, and float32 weights [W] of the vocabulary's words."""
    weight = np.frombuffer(wants, np.float32)
    weights = np.append(np.float32(1), weight) @ of_words
    weights[:, : own[row].shape[1]] += own[row]
    asked = by_key * weight
    keys = np.flatnonzero(asked.any(axis=1))
    wanted = asked[keys][:, by_key[keys].any(axis=0)]
    count = (wanted > 0).sum(axis=1, keepdims=True, dtype=np.float32)
    return Wish(weights, tuple(keys.tolist()), np.concatenate([wanted, wanted > 0]), count)


def _words(axes: np.ndarray, by_key: np.ndarray, keys: tuple[int, ...]) -> Words:
    """The words of these keys, of axes [V, W, d + 1] and which of them each key has [K, W]."""
    of_key = by_key[list(keys)]
    place = of_key.any(axis=0)
    own = axes[:, place].swapaxes(0, 1).reshape(-1, axes.shape[2])
    features = _MATCHES + np.array([*keys, *(key + len(by_key) for key in keys)])
    return Words(np.ascontiguousarray(own), of_key[:, place], features)


def _matches(words: Words, wish: Wish, pictures: np.ndarray) -> np.ndarray:
    """[2 k, V n] by key: how far its wanted words are met, and the logs of their shares among all of its."""
    along = (words.axes @ pictures).reshape(words.of_key.shape[1], -1)  # [w, V n]
    found = wish.wanted @ along
    most = along.max(axis=0)
    along -= most
    # The floor is that of `features.match_words`, for a key whose words all lie far below another's.
    total = np.log(np.maximum(words.of_key @ np.exp(along, out=along), 1e-30)) + most
    found[len(total) :] -= wish.count * total
    return found


def _times(weights: np.ndarray, shared: np.ndarray) -> np.ndarray:
    """[r, n] products of weights [r, c] with arrays [V, c, n], each of which as many rows in turn share."""
    views, c, n = shared.shape
    return (weights.reshape(views, len(weights) // views, c) @ shared).reshape(len(weights), n)


def _logit(p: np.ndarray) -> np.ndarray:
    p = clip(p, *PROBABILITIES)
    return np.log(p / (1 - p))


def _gelu(x: np.ndarray) -> np.ndarray:
    """The tanh form of the Gaussian error linear unit (Hendrycks & Gimpel 2016)."""
    return 0.5 * x * (1 + np.tanh(np.float32(0.7978845608) * (x + np.float32(0.044715) * (x * x * x))))
