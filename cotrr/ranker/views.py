"""Which rows are learned from and which are held out: cross-validation folds, and all rows."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from cotrr.data.lists import Lists
from cotrr.data.splits import unit_hash
from cotrr.ranker.encoding import Leaf
from cotrr.ranker.features import Features


class Views(NamedTuple):
    """Which rows each of F views learns from, and which it is validated on."""

    train: Leaf  # [F, Q, n] bool
    held_out: Leaf  # [F, Q, n] bool; with folds the last view, the final one, holds out nothing


class Examples(NamedTuple):
    """Q lists as F views see them: what training needs of the data."""

    features: Features  # [F, Q, ...] by the view's own statistics
    gap: Leaf  # [F, Q, n] y in the view's deviations of its domain: RankNet's labels
    train: Leaf  # [F, Q, n] bool: rows to learn from
    held_out: Leaf  # [F, Q, n] bool: rows to validate on
    y: Leaf  # [Q, n]
    conflict: Leaf  # [Q, n] 0 or 1, or a probability where silver


# Views differ in these; the labels themselves are shared.
BY_VIEW = Examples(features=0, gap=0, train=0, held_out=0, y=None, conflict=None)  # type: ignore[arg-type]


def make_views(lists: Lists, canonical_id: np.ndarray, validation: np.ndarray, folds: int) -> Views:
    """Rows by view; `canonical_id` [Q, n] object, `validation` [Q] bool: queries of that split.

    View k of the folds holds out the labelled rows whose query and picture are both in fold k and
    learns from those where neither is (folds go by keyed hashes, like splits); behind them stands
    the final view, which learns from every row.  Without folds the final view is alone and holds out
    the validation split.  Held-out rows are gold where there is any gold: they choose the epoch and
    calibrate, and gold and silver are never judged together.
    """
    labelled = lists.labelled
    judged = labelled & lists.gold if (labelled & lists.gold).any() else labelled
    if not folds:
        return Views((labelled & ~validation[:, None])[None], (judged & validation[:, None])[None])
    fold = lambda kind, ids: (unit_hash(kind, ids, "folds") * folds).astype(int)
    by_query = fold("query_id", lists.query_id)[:, None]
    by_picture = np.full(lists.where.shape, -1)
    by_picture[lists.where] = fold("canonical_id", canonical_id[lists.where])
    by_picture = np.where(_recurs(lists, canonical_id), by_picture, by_query)
    train = [labelled & (by_query != k) & (by_picture != k) for k in range(folds)] + [labelled]
    held_out = [judged & (by_query == k) & (by_picture == k) for k in range(folds)]
    return Views(np.stack(train), np.stack([*held_out, np.zeros_like(labelled)]))


def _recurs(lists: Lists, canonical_id: np.ndarray) -> np.ndarray:
    """[Q, n] bool: pictures of several queries; one of a single query goes where its query goes."""
    query, place = np.nonzero(lists.where)
    _, picture = np.unique(canonical_id[lists.where], return_inverse=True)
    pairs = np.unique(np.stack([picture, query]), axis=1)
    recurs = np.zeros(lists.where.shape, bool)
    recurs[query, place] = (np.bincount(pairs[0]) > 1)[picture]
    return recurs


def make_examples(lists: Lists, features: Features, label_scale: Leaf, views: Views) -> Examples:
    """What training needs of labelled lists; `label_scale` [F, Q] is the deviation of y by query.

    Dividing by it normalises y inside its domain: monotone, so no pair changes its order.
    """
    gap = lists.y / np.asarray(label_scale)[:, :, None]
    return Examples(features, gap, views.train, views.held_out, lists.y, lists.conflict)


def by_view(function: Callable[[int, Any], Any], examples: Examples) -> Examples:
    """Applies `function(axis of the queries, part)`: behind the views, or in front of all."""
    return Examples(*(function(0 if views is None else 1, part)
                      for views, part in zip(BY_VIEW, examples, strict=True)))  # fmt: skip
