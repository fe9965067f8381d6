"""Features of one query's list, as pure functions of statistics that were fitted on training rows.

`encode` turns words into numbers (NumPy, at the edge); `fit` estimates the statistics;
`featurize` is for one list, and callers vmap it.
"""

from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cotrr.data.contract import ATTRIBUTES, GROUPS
from cotrr.data.lists import Lists
from cotrr.errors import InputError

Leaf = Any  # of a tree: an array of NumPy or JAX, or a tracer
NAMES = tuple(ATTRIBUTES)
# Step 4's own rule: its weights of the attributes, in their own units.
RULE = {"clip_score": 0.2, "compliance_score": 0.7, "conflict_prob": -0.3}
WINSOR = 4.0  # standardised attributes are held within ± this many deviations
_CONFLICT_PROB = NAMES.index("conflict_prob")


class Vocabulary(NamedTuple):
    """The words of the training split; a word that is not here has no number of its own."""

    domains: tuple[str, ...]
    constraints: tuple[str, ...]  # `key` and `key=value`


class Encoded(NamedTuple):
    """One list as numbers, before any statistics; missing is NaN."""

    domain: Leaf  # [] int32 index into Vocabulary.domains; their number where unseen
    wants: Leaf  # [V] float32 multi-hot of Vocabulary.constraints
    text: Leaf  # [d]
    image: Leaf  # [n, d]
    attributes: Leaf  # [n, A] in the order of NAMES
    where: Leaf  # [n] bool


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


class Features(NamedTuple):
    """Model input of one list of n candidates."""

    query: Leaf  # [1 + p' + V]: a constant, text components, what is wanted
    image: Leaf  # [n, p]
    attributes: Leaf  # [n, 2A]: standardised, then their missing-value indicators
    base: Leaf  # [n, 2]: Step 4's rule, and the logit of its conflict probability
    where: Leaf  # [n] bool


def vocabulary(lists: Lists) -> Vocabulary:
    """The domains and constraint words of the lists."""
    tokens = {token for tokens in lists.constraints for token in tokens}
    keys = {token.split("=", 1)[0] for token in tokens}
    return Vocabulary(tuple(sorted(set(lists.domain))), tuple(sorted(tokens | keys)))


def encode(lists: Lists, words: Vocabulary) -> Encoded:
    """The lists' words as numbers: a batch [Q, ...] of `Encoded`."""
    domains = {name: i for i, name in enumerate(words.domains)}
    tokens = {name: i for i, name in enumerate(words.constraints)}
    wants = np.zeros((len(lists.query_id), len(tokens)), np.float32)
    for row, wanted in enumerate(lists.constraints):
        for token in {*wanted, *(token.split("=", 1)[0] for token in wanted)} & tokens.keys():
            wants[row, tokens[token]] = 1
    domain = np.array([domains.get(name, len(domains)) for name in lists.domain], np.int32)
    return Encoded(domain, wants, lists.text, lists.image, lists.attributes, lists.where)


def group_mask(groups: Collection[str]) -> np.ndarray:
    """[A] bool: the attributes of the chosen groups; raises InputError for an unknown group."""
    if unknown := set(groups) - set(GROUPS):
        raise InputError(f"--groups: unknown {sorted(unknown)}, expected some of {','.join(GROUPS)}")
    return np.array([group in groups for group in ATTRIBUTES.values()])


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


def principal_axes(vectors: np.ndarray, components: int, size: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean [d] and the leading axes [d, min(p, d)] of `vectors` [N, d] (NaN rows left out).

    The axes keep their proportions; together they are scaled so that the projections of `vectors`
    have the root mean square `size`: how much the penalty lets them count.  Axes that the vectors do
    not span are zero.
    """
    vectors = vectors[~np.isnan(vectors).any(axis=1)].astype(np.float64)
    if not vectors.size or not components:
        return np.zeros(vectors.shape[1]), np.zeros((vectors.shape[1], min(components, vectors.shape[1])))
    mean = vectors.mean(axis=0)
    _, values, axes = np.linalg.svd(vectors - mean, full_matrices=False)
    kept = values[:components] > 1e-6 * max(values[0], 1e-12)
    scale = size / np.sqrt(np.mean(values[:components][kept] ** 2) / len(vectors)) if kept.any() else 0.0
    padded = np.zeros((vectors.shape[1], min(components, vectors.shape[1])))
    padded[:, : kept.sum()] = axes[:components][kept].T * scale
    return mean, padded


class Settings(NamedTuple):
    """How the embeddings become features."""

    image_components: int
    text_components: int
    image_size: float
    text_size: float


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
    fitted = Statistics(
        mean, scale, np.isnan(values).mean(axis=0),
        np.where(np.isfinite(label_scale[:, 0]), label_scale[:, 0], 1.0),
        *principal_axes(images, settings.image_components, settings.image_size),
        *principal_axes(texts, settings.text_components, settings.text_size),
        rule.mean(), rule.std() if rule.std() > 1e-6 else 1.0,
    )  # fmt: skip
    return Statistics(*(np.asarray(value, np.float32) for value in fitted))


def rule_score(attributes: Leaf, names: Collection[str]) -> Leaf:
    """[...] Step 4's rule from attributes [..., A] in their own units, its terms in `names` alone."""
    weights = np.array([RULE.get(name, 0.0) if name in names else 0.0 for name in NAMES], np.float32)
    return attributes @ weights


def fill(statistics: Statistics, encoded: Encoded) -> jax.Array:
    """[n, A] attributes in their own units; a missing value is its domain's training mean."""
    mean = jnp.asarray(statistics.mean)[encoded.domain]
    return jnp.where(jnp.isnan(encoded.attributes), mean, encoded.attributes)


def featurize(statistics: Statistics, encoded: Encoded, mask: jax.Array) -> Features:
    """Model input of one list; attributes outside `mask` [A] bool are taken out everywhere.

    Without the clip group (its `clip_score` masked) the embeddings are out as well.
    """
    statistics = jax.tree.map(jnp.asarray, statistics)
    mean, scale = statistics.mean[encoded.domain][None], statistics.scale[encoded.domain][None]
    # What training never saw has no weight: it must not move a score once it appears.
    seen = statistics.missing < 1
    raw = jnp.where(mask & seen, fill(statistics, encoded), mean)
    standard = jnp.clip((raw - mean) / scale, -WINSOR, WINSOR)
    varies = (statistics.missing > 0) & (statistics.missing < 1)
    indicator = jnp.where(mask & varies, jnp.isnan(encoded.attributes) - statistics.missing[None], 0.0)
    base = (rule_score(raw, NAMES) - statistics.rule_mean) / statistics.rule_scale
    probability = jnp.clip(raw[:, _CONFLICT_PROB], 0.01, 0.99)
    inside = lambda values: jnp.where(encoded.where[:, None], values, 0.0)
    project = lambda x, centre, axes: jnp.nan_to_num(x - jnp.broadcast_to(centre, x.shape)) @ axes
    image = project(encoded.image, statistics.image_mean, statistics.image_axes)
    text = project(encoded.text, statistics.text_mean, statistics.text_axes)
    clip = mask[NAMES.index("clip_score")]
    return Features(
        query=jnp.concatenate([jnp.ones(1), text * clip, encoded.wants]),
        image=inside(image * clip),
        attributes=inside(jnp.concatenate([standard, indicator], axis=1)),
        base=inside(jnp.stack([base, jax.scipy.special.logit(probability) * seen[_CONFLICT_PROB]], axis=1)),
        where=encoded.where,
    )
