"""Features of one query's list, as pure functions of statistics that were fitted on training rows.

`fit` estimates the statistics; `featurize` is for one list, and callers vmap it.
"""

from collections.abc import Collection
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cotrr.data.lists import Lists
from cotrr.ranker.encoding import (
    CONFLICT_PROB,
    NAMES,
    RULE,
    RULE_COLUMNS,
    WINSOR,
    Encoded,
    Leaf,
    Vocabulary,
    encode,
)

RIDGE = 1.0  # queries' worth of doubt about what a word means
SHARPNESS = 3.0  # spread of the images along a word's axis, in logits of the word's share


class Statistics(NamedTuple):
    """What is fitted on training rows: D domains, A attributes, d → p principal components."""

    mean: Leaf  # [D + 1, A]; the last row is global, for an unseen domain
    scale: Leaf  # [D + 1, A]; infinite where an attribute never varies
    missing: Leaf  # [A] share of missing values
    label_scale: Leaf  # [D + 1] deviation of y
    image_mean: Leaf  # [d]
    image_axes: Leaf  # [d, p]
    text_mean: Leaf  # [d]
    text_axes: Leaf  # [d, p']
    rule_mean: Leaf  # []
    rule_scale: Leaf  # []
    word_axes: Leaf  # [V, d] what a constraint's word adds to a query's embedding
    word_key: Leaf  # [K, V] 0 or 1: the words of each key
    match_scale: Leaf  # [2K]


class Features(NamedTuple):
    """Model input of one list of n candidates, before any mask."""

    wants: Leaf  # [1 + V]: a constant, what is wanted
    text: Leaf  # [p']
    image: Leaf  # [n, p]
    match: Leaf  # [n, 2K]: how well the image matches the wanted word of each key
    attributes: Leaf  # [n, 2A]: standardised, then their missing-value indicators
    rule: Leaf  # [n, 3]: the terms of Step 4's rule, from their domain's mean
    conflict: Leaf  # [n]: logit of Step 4's conflict probability, from that of its domain's mean
    centre: Leaf  # [2]: the rule, and the logit of the conflict probability, at the domain's mean
    where: Leaf  # [n] bool


class Gates(NamedTuple):
    """What of the features counts, and how much: a mask and the sizes of the embeddings' paths."""

    attributes: Leaf  # [A] 0 or 1: what is out stands at its domain's mean
    image: Leaf  # []
    text: Leaf  # []
    match: Leaf  # []


def make_gates(mask: Leaf, image: Leaf = 1.0, text: Leaf = 1.0, match: Leaf = 1.0) -> Gates:
    """Gates of a mask [A + 1] and the sizes (root mean squares) of what comes from the embeddings."""
    mask = jnp.asarray(mask, jnp.float32)
    return Gates(mask[:-1], *(mask[-1] * size for size in (image, text, match)))


def shrink(estimate: np.ndarray, variance: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """[D, A] empirical-Bayes estimates: each pulled to `centre` [A] by its own uncertainty.

    The spread between domains is DerSimonian & Laird's (1986) moment estimate; an infinite
    `variance` (a domain without data) gives the centre itself.
    """
    weight = 1 / variance
    total = np.maximum(weight.sum(axis=0), 1e-300)
    known = np.where(np.isfinite(variance), estimate - centre, 0.0)
    excess = (weight * known**2).sum(axis=0) - (np.isfinite(variance).sum(axis=0) - 1)
    spread = np.maximum(excess, 0) / np.maximum(total - (weight**2).sum(axis=0) / total, 1e-12)
    keep = np.where(np.isfinite(variance), spread / (spread + variance), 0.0)
    return centre + keep * known


def domain_moments(values: np.ndarray, domain: np.ndarray, domains: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation [D + 1, A] by domain, shrunk to the global ones in the last row.

    `values` [N, A] with NaN for missing, `domain` [N].  An attribute that never varies gets an
    infinite deviation, so that it standardises to 0 whatever comes later.
    """
    there = ~np.isnan(values)
    sums = lambda x: np.stack([x[domain == d].sum(axis=0) for d in range(domains)])
    count, x = sums(there.astype(float)), np.where(there, values, 0.0)
    n = np.maximum(count.sum(axis=0), 1)
    centre = x.sum(axis=0) / n
    total = (np.where(there, (values - centre) ** 2, 0.0)).sum(axis=0) / n
    varies = total > 1e-12 * np.maximum(centre**2, 1e-12)
    total = np.where(varies, total, 1.0)
    mean = sums(x) / np.maximum(count, 1)
    within = np.where(there, (values - mean[domain]) ** 2, 0.0)
    variance = np.maximum(sums(within) / np.maximum(count - 1, 1), 1e-3 * total)
    enough = count > 1
    mean = shrink(mean, np.where(enough, total / np.maximum(count, 1), np.inf), centre)
    log_scale = shrink(
        np.log(variance), np.where(enough, 2 / np.maximum(count - 1, 1), np.inf), np.log(total)
    )
    scale = np.where(varies, np.exp(log_scale / 2), np.inf)
    everyone = np.where(varies, np.sqrt(total), np.inf)
    return np.vstack([mean, centre]), np.vstack([scale, everyone])


def principal_axes(vectors: np.ndarray, components: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean [d] and the leading axes [d, min(p, d)] of `vectors` [N, d] (NaN rows left out).

    The axes keep their proportions; together they are scaled so that the projections of `vectors`
    have the root mean square 1.  Axes that the vectors do not span are zero.
    """
    vectors = vectors[~np.isnan(vectors).any(axis=1)].astype(np.float64)
    if not vectors.size or not components:
        return np.zeros(vectors.shape[1]), np.zeros((vectors.shape[1], min(components, vectors.shape[1])))
    mean = vectors.mean(axis=0)
    _, values, axes = np.linalg.svd(vectors - mean, full_matrices=False)
    kept = values[:components] > 1e-6 * max(values[0], 1e-12)
    scale = np.sqrt(len(vectors) / np.mean(values[:components][kept] ** 2)) if kept.any() else 0.0
    padded = np.zeros((vectors.shape[1], min(components, vectors.shape[1])))
    padded[:, : kept.sum()] = axes[:components][kept].T * scale
    return mean, padded


class Settings(NamedTuple):
    """How many components the embeddings become."""

    image_components: int
    text_components: int


def fit(lists: Lists, words: Vocabulary, settings: Settings) -> Statistics:
    """The statistics of training lists, and of nothing else."""
    where = lists.where
    domain = np.broadcast_to(encode(lists, words).domain[:, None], where.shape)[where]
    values = lists.attributes[where].astype(np.float64)
    domains = len(words.domains)
    mean, scale = domain_moments(values, domain, domains)
    _, label_scale = domain_moments(lists.y[where].astype(np.float64)[:, None], domain, domains)
    images = np.unique(lists.image[where], axis=0)
    texts = np.unique(lists.text, axis=0)
    rule = rule_score(np.where(np.isnan(values), mean[domain], values), NAMES)
    image_mean, image_axes = principal_axes(images, settings.image_components)
    fitted = Statistics(
        mean, scale, np.isnan(values).mean(axis=0),
        np.where(np.isfinite(label_scale[:, 0]), label_scale[:, 0], 1.0),
        image_mean, image_axes,
        *principal_axes(texts, settings.text_components),
        rule.mean(), rule.std() if rule.std() > 1e-6 else 1.0,
        *_word_statistics(lists, words, image_mean),
    )  # fmt: skip
    return Statistics(*(np.asarray(value, np.float32) for value in fitted))


def _word_statistics(lists: Lists, words: Vocabulary, image_mean: np.ndarray) -> tuple[np.ndarray, ...]:
    """`word_axes`, `word_key` and `match_scale`, in units in which images spread by SHARPNESS."""
    axes, by_key = word_axes(lists, words)
    image = (
        np.nan_to_num(lists.image - image_mean)[lists.where]
        if len(by_key)
        else np.zeros((0, len(image_mean)))
    )
    spread = np.sqrt(np.mean((image @ axes[by_key.any(axis=0)].T) ** 2)) if len(by_key) else 1.0
    axes = axes * (SHARPNESS / max(spread, 1e-9))
    wants = np.broadcast_to(encode(lists, words).wants[:, None], (*lists.where.shape, axes.shape[0]))[
        lists.where
    ]
    one = jax.vmap(lambda image, wants: match_words(image[None], wants, axes, by_key)[0])
    size = np.sqrt(np.mean(np.asarray(one(image, wants)) ** 2, axis=0)) if len(by_key) else np.zeros(0)
    return (
        axes,
        by_key,
        np.where(size > 1e-3, size, np.inf),
    )  # a key of one word: its share is 1, but for rounding


def word_axes(lists: Lists, words: Vocabulary) -> tuple[np.ndarray, np.ndarray]:
    """`word_axes` [V, d] and `word_key` [K, V]; K is 0 where the embeddings share no space.

    What "pink" means is learned from what it adds to the queries' embeddings (ridge regression over
    distinct queries), and looked for in the images: no label is needed for it.
    """
    d = lists.image.shape[-1]
    values = [token for token in words.constraints if "=" in token]
    keys = sorted({token.split("=", 1)[0] for token in values}) if d == lists.text.shape[-1] and d else []
    by_key = np.array([[token.startswith(f"{key}=") for token in words.constraints] for key in keys], float)
    by_key = by_key.reshape(len(keys), len(words.constraints))
    text, first = np.unique(lists.text, axis=0, return_index=True)
    stated = ~np.isnan(text).any(axis=1)
    if not keys or not stated.any():
        return np.zeros((len(words.constraints), d)), by_key
    wanted = (encode(lists, words).wants[first][stated] > 0) * by_key.sum(axis=0)
    centred = text[stated].astype(np.float64) - text[stated].mean(axis=0, dtype=np.float64)
    gram = wanted.T @ wanted + RIDGE * np.eye(wanted.shape[1])
    return np.linalg.solve(gram, wanted.T @ centred), by_key


def match_words(image: Leaf, wants: Leaf, word_axes: Leaf, word_key: Leaf) -> jax.Array:
    """[n, 2K] by key: how far images [n, d] lie along the wanted word, and the log of the word's share
    among all words of its key."""
    along = image @ word_axes.T  # [n, V]
    most = jnp.max(along, axis=1, keepdims=True, initial=0.0)
    total = jnp.log(jnp.maximum(jnp.exp(along - most) @ word_key.T, 1e-30)) + most  # [n, K]
    # A label is a mean over the constraints, so the first half is weighed by `wants`; a conflict is any
    # one of them, so the second is not.
    there = along @ (word_key * wants[None]).T
    wanted = word_key * (wants > 0)[None]
    share = along @ wanted.T - total * jnp.sum(wanted, axis=1)[None]
    return jnp.concatenate([there, share], axis=1)


def rule_score(attributes: Leaf, names: Collection[str]) -> Leaf:
    """[...] Step 4's rule from attributes [..., A] in their own units, its terms in `names` alone."""
    weights = np.array([RULE.get(name, 0.0) if name in names else 0.0 for name in NAMES], np.float32)
    return attributes @ weights


def fill(statistics: Statistics, encoded: Encoded) -> jax.Array:
    """[n, A] attributes in their own units; a missing value is its domain's training mean."""
    mean = jnp.asarray(statistics.mean)[encoded.domain]
    return jnp.where(jnp.isnan(encoded.attributes), mean, encoded.attributes)


def featurize(statistics: Statistics, encoded: Encoded) -> Features:
    """Model input of one list; a missing value stands at its domain's training mean."""
    statistics = jax.tree.map(jnp.asarray, statistics)
    mean, scale = statistics.mean[encoded.domain], statistics.scale[encoded.domain][None]
    # What training never saw has no weight: it must not move a score once it appears.
    seen = statistics.missing < 1
    raw = jnp.where(seen, fill(statistics, encoded), mean)
    standard = jnp.clip((raw - mean[None]) / scale, -WINSOR, WINSOR)
    varies = (statistics.missing > 0) & seen
    indicator = jnp.where(varies, jnp.isnan(encoded.attributes) - statistics.missing[None], 0.0)
    weights = np.array(list(RULE.values()), np.float32)
    rule = (raw - mean[None])[:, RULE_COLUMNS] * weights[None] / statistics.rule_scale
    centre = (jnp.sum(mean[jnp.array(RULE_COLUMNS)] * weights) - statistics.rule_mean) / statistics.rule_scale
    logit = lambda p: jax.scipy.special.logit(jnp.clip(p, 0.01, 0.99)) * seen[CONFLICT_PROB]
    usual = logit(mean[CONFLICT_PROB])
    inside = lambda values: jnp.where(encoded.where[:, None], values, 0.0)
    centred = lambda x, centre: jnp.nan_to_num(x - jnp.broadcast_to(centre, x.shape))
    image = centred(encoded.image, statistics.image_mean)
    match = match_words(image, encoded.wants, statistics.word_axes, statistics.word_key)
    return Features(
        wants=jnp.concatenate([jnp.ones(1), encoded.wants]),
        text=centred(encoded.text, statistics.text_mean) @ statistics.text_axes,
        image=inside(image @ statistics.image_axes),
        match=inside(match / statistics.match_scale[None]),
        attributes=inside(jnp.concatenate([standard, indicator], axis=1)),
        rule=inside(rule),
        conflict=jnp.where(encoded.where, logit(raw[:, CONFLICT_PROB]) - usual, 0.0),
        centre=jnp.stack([centre, usual]),
        where=encoded.where,
    )


def base_logits(features: Features, gates: Gates) -> jax.Array:
    """[n, 2] Step 4's own view of a list: its rule, and the logit of its conflict probability."""
    rule = features.rule @ gates.attributes[jnp.array(RULE_COLUMNS)]
    conflict = features.conflict * gates.attributes[CONFLICT_PROB]
    return jnp.stack([rule, conflict], axis=1) + features.centre[None]
