"""Gradient-boosted trees as people would use them here: tuned on the same rows as our model.

Their features are what our model sees: attributes (missing stays missing), the words of the constraints,
principal components of the picture's embedding.  Settings and the number of trees are chosen on an inner
split of the rows they may learn from, by query and picture, by the nDCG@10 of its held-out part.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from cotrr.data.lists import Lists
from cotrr.data.splits import unit_hash
from cotrr.evaluate.ranking import per_query
from cotrr.ranker import encoding, features

COMPONENTS = 16
TREES = (25, 50, 100, 200, 400)
SETTINGS = tuple({"learning_rate": rate, "max_depth": depth} for rate in (0.03, 0.1) for depth in (3, 5))


class Peer(NamedTuple):
    """A ranker of a library: `fit(x, grade, group, settings)` gives `predict(x, trees)`.

    With `matches` it also sees our features of how well an image matches the wanted words.
    """

    name: str
    fit: Callable[
        [np.ndarray, np.ndarray, np.ndarray, dict[str, Any]], Callable[[np.ndarray, int], np.ndarray]
    ]
    matches: bool = False


def lightgbm_ranker(
    x: np.ndarray, grade: np.ndarray, group: np.ndarray, settings: dict[str, Any]
) -> Callable:
    """LambdaMART with gains linear in the grade."""
    import lightgbm

    model = lightgbm.LGBMRanker(
        n_estimators=max(TREES), label_gain=list(range(11)), min_child_samples=10, subsample=0.8,
        subsample_freq=1, colsample_bytree=0.8, random_state=0, n_jobs=1, verbose=-1, **settings,
    )  # fmt: skip
    model.fit(x, grade, group=group)
    return lambda x, trees: np.asarray(model.booster_.predict(x, num_iteration=trees))


def xgboost_ranker(objective: str) -> Callable:
    """XGBoost's `rank:pairwise` or `rank:ndcg`."""

    def fit(x: np.ndarray, grade: np.ndarray, group: np.ndarray, settings: dict[str, Any]) -> Callable:
        import xgboost

        exponential = {} if objective == "rank:pairwise" else {"ndcg_exp_gain": False}
        model = xgboost.XGBRanker(
            objective=objective, n_estimators=max(TREES), subsample=0.8, colsample_bytree=0.8, random_state=0,
            n_jobs=1, **exponential, **settings,
        )  # fmt: skip
        model.fit(x, grade, group=group)
        return lambda x, trees: model.predict(x, iteration_range=(0, trees))

    return fit


PEERS = (
    Peer("LightGBM lambdarank", lightgbm_ranker),
    Peer("LightGBM, our matches", lightgbm_ranker, matches=True),
    Peer("XGBoost pairwise", xgboost_ranker("rank:pairwise")),
    Peer("XGBoost ndcg", xgboost_ranker("rank:ndcg")),
)


def develop(peer: Peer, lists: Lists, canonical_id: np.ndarray, where: np.ndarray) -> np.ndarray:
    """[Q, n] scores of all candidates by a peer that is tuned on and learns from `where` [Q, n] alone."""
    learn, judge = _inner(lists, canonical_id, where)
    best = max(_tried(peer, lists, learn, judge), key=lambda tried: tried[0])
    return _scores(peer, lists, where, best[1])(best[2])


def _tried(
    peer: Peer, lists: Lists, learn: np.ndarray, judge: np.ndarray
) -> Iterator[tuple[float, dict, int]]:
    """nDCG@10 on the inner held-out rows of each setting and number of trees."""
    held = lists._replace(where=judge)
    for settings in SETTINGS:
        scores = _scores(peer, lists, learn, settings)
        for trees in TREES:
            yield float(np.nanmean(per_query(scores(trees), held)["ndcg@10"])), settings, trees


def _inner(lists: Lists, canonical_id: np.ndarray, where: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows to learn from and to judge by: two thirds of queries and pictures, and the other third of both."""
    share = lambda kind, ids: unit_hash(kind, ids, "peers") < 1 / 3
    query = share("query_id", lists.query_id)[:, None]
    picture = share("canonical_id", canonical_id.ravel()).reshape(where.shape)
    return where & ~query & ~picture, where & query & picture


def _scores(
    peer: Peer, lists: Lists, where: np.ndarray, settings: dict[str, Any]
) -> Callable[[int], np.ndarray]:
    words = encoding.vocabulary(lists)
    wants = np.asarray(encoding.encode(lists, words).wants)
    mean, axes = features.principal_axes(np.unique(lists.image[where], axis=0), COMPONENTS)
    image = (np.nan_to_num(lists.image) - mean) @ axes
    wanted = np.broadcast_to(wants[:, None], (*where.shape, wants.shape[1]))
    parts = [lists.attributes, wanted, image]
    if peer.matches:
        kept = lists._replace(where=where).take(np.flatnonzero(where.any(axis=1)))
        fitted = features.fit(kept, words, features.Settings(COMPONENTS, 0))
        seen = jax.vmap(features.featurize, in_axes=(None, 0))(fitted, encoding.encode(lists, words))
        parts.append(np.asarray(seen.match))
    x = np.concatenate(parts, axis=-1).astype(np.float32)
    kept = where & lists.labelled
    grade = np.rint(10 * lists.compliance[kept]).astype(int)
    group = kept.sum(axis=1)
    predict = peer.fit(x[kept], grade, group[group > 0], settings)
    return lambda trees: predict(x.reshape(-1, x.shape[-1]), trees).reshape(where.shape)
