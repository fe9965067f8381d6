"""Words as numbers, and the names that a model's arrays go by; NumPy alone."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cotrr.data.contract import ATTRIBUTES, GROUPS
from cotrr.errors import InputError

if TYPE_CHECKING:
    from cotrr.data.lists import Lists

Leaf = Any  # of a tree: an array of NumPy or JAX, or a tracer
NAMES = tuple(ATTRIBUTES)
# Step 4's own rule: its weights of the attributes, in their own units.
RULE = {"clip_score": 0.2, "compliance_score": 0.7, "conflict_prob": -0.3}
USUAL = 2.0  # constraints of a query: so many have weight 1 each
WINSOR = 4.0  # standardised attributes are held within ± this many deviations
EMBEDDINGS = "embeddings"  # what a mask calls the image and text embeddings, behind the attributes
MASKED = (*NAMES, EMBEDDINGS)
CONFLICT_PROB = NAMES.index("conflict_prob")
RULE_COLUMNS = tuple(NAMES.index(name) for name in RULE)


class Vocabulary(NamedTuple):
    """The words of the training split; a word that is not here has no number of its own."""

    domains: tuple[str, ...]
    constraints: tuple[str, ...]  # `key` and `key=value`


class Encoded(NamedTuple):
    """One list as numbers, before any statistics; missing is NaN."""

    domain: Leaf  # [] int32 index into Vocabulary.domains; their number where unseen
    wants: Leaf  # [V] float32 of Vocabulary.constraints: USUAL / their number where wanted, else 0
    text: Leaf  # [d]
    image: Leaf  # [n, d]
    attributes: Leaf  # [n, A] in the order of NAMES
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
        encode_wants(wanted, tokens, wants[row])
    domain = np.array([domains.get(name, len(domains)) for name in lists.domain], np.int32)
    return Encoded(domain, wants, lists.text, lists.image, lists.attributes, lists.where)


def encode_wants(wanted: Sequence[str], tokens: dict[str, int], wants: np.ndarray) -> None:
    """Writes the weights of a query's constraint tokens, and of their keys, into `wants` [V]."""
    for token in {*wanted, *(token.split("=", 1)[0] for token in wanted)} & tokens.keys():
        # A label is a mean over the constraints, so each of many counts less.
        wants[tokens[token]] = USUAL / len(wanted)


def make_mask(groups: Collection[str], without: Collection[str] = ()) -> np.ndarray:
    """[A + 1] bool, in the order of MASKED: the chosen groups but for what is in `without`.

    The embeddings belong to the clip group.  Raises InputError for an unknown name.
    """
    if unknown := set(groups) - set(GROUPS):
        raise InputError(f"--groups: unknown {sorted(unknown)}, expected some of {','.join(GROUPS)}")
    if unknown := set(without) - set(MASKED):
        raise InputError(f"--without: unknown {sorted(unknown)}, expected some of {','.join(MASKED)}")
    group_of = {**ATTRIBUTES, EMBEDDINGS: "clip"}
    return np.array([group_of[name] in groups and name not in without for name in MASKED])


def names(text: str) -> tuple[str, ...]:
    """The names in a flag's comma-separated list."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def mask_of(config: dict[str, Any]) -> np.ndarray:
    """[A + 1] bool: what a model with these settings looks at, in the order of MASKED."""
    return make_mask(names(config["groups"]), names(config["without"]))
