r"""Published ranking data: our ranker beside boosted trees and what others published.

    python -m benchmarks.ltr --data=../shared/ltr [--quick] [--output=runs/ltr.json]

OHSUMED keeps LETOR's protocol to the letter: fold i is tested on S(i), validated on S(i-1), and learns from
the other three; its validation part alone (21 queries) chooses for it.  LightGBM's example has no validation
part: its training queries are cut into five folds, the pooled held-out queries choose, and the mean of the
five folds' models scores the test.  The number of epochs or trees is chosen on held-out queries too.

So few queries can hardly tell one setting from another.  Each learner therefore has two rows: its best
setting, and the mean of its best quarter of settings (each query's scores standardised).  Validation parts
are not pooled over OHSUMED's folds: the one of fold i + 1 is the test part of fold i.  (They were, when the
settings worth trying were listed, for us and for the trees.)
"""

import dataclasses
import itertools
import operator
import pathlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.csv
from absl import flags

from cotrr import files
from cotrr.config import launch
from cotrr.data import svmlight
from cotrr.data.lists import Lists, to_lists
from cotrr.data.splits import unit_hash
from cotrr.errors import InputError
from cotrr.evaluate import comparisons, figures
from cotrr.evaluate.metrics import ndcg
from cotrr.evaluate.report import figure_text, parts
from cotrr.ranker import artifact, fitting, training
from cotrr.ranker.lanes import TrainConfig, make_lanes
from experiments.terminal import say

FLAGS = flags.FLAGS
FOLDS = 5
TREES = (10, 20, 40, 80, 160, 320)
EXAMPLE = {
    "n_estimators": 100, "learning_rate": 0.1, "leaves": 31, "child": 50, "min_child_weight": 5.0,
    "subsample": 0.9, "max_bin": 255,
}  # fmt: skip
BASE = TrainConfig(
    folds=0, groups="clip", image_components=300, text_components=0, image_size=1.0, epochs=30,
    learning_rate=0.02, batch_queries=43, pointwise_weight=0.0, conflict_weight=0.0,
)  # fmt: skip
LOGGED = partial(ndcg, k=10)
OURS = "ours"
MODEL = f"{OURS}, best quarter"  # the system whose differences are reported


class Collection(NamedTuple):
    """Q lists of a published collection, and how its nDCG@10 is counted."""

    lists: Lists
    canonical_id: np.ndarray  # [Q, n] object
    part: np.ndarray  # [Q] object: the file that a query is in
    letor: bool  # ranks 1 and 2 discounted alike, and a query without gain is 0 instead of left out


class Round(NamedTuple):
    """Which queries are learned from, which choose, and which are tested on; [Q] bool."""

    learn: np.ndarray
    judge: np.ndarray
    test: np.ndarray


def define_flags() -> None:
    """Flags of this benchmark."""
    flags.DEFINE_string("data", None, "Folder with ohsumed/ and lightgbm/.")
    flags.DEFINE_string("output", None, "JSON file for the figures.")
    flags.DEFINE_bool("quick", False, "Few settings, few epochs.")
    flags.mark_flag_as_required("data")


def read(paths: dict[str, pathlib.Path], normalization: str, letor: bool) -> Collection:
    """The files of a collection; labels are (2^grade − 1) / (2^best − 1)."""
    sources = [svmlight.Source(name, name, path, svmlight.read(path, name)) for name, path in paths.items()]
    table = svmlight.to_table(sources, "exponential", normalization)
    lists = to_lists(table)
    column = lambda name: table[name].to_numpy(zero_copy_only=False)
    canonical_id = np.where(lists.where, column("canonical_id")[lists.row], "")
    return Collection(lists, canonical_id, column("split")[lists.row[:, 0]], letor)


@partial(jax.jit, static_argnames="letor")
def _measure(scores: jax.Array, y: jax.Array, where: jax.Array, letor: bool) -> jax.Array:
    return jax.vmap(lambda s, gains, w: ndcg(s, gains, where=w, k=10, letor=letor))(scores, y, where)


def measure(scores: np.ndarray, data: Collection) -> np.ndarray:
    """[Q] nDCG@10 by the collection's convention; NaN leaves a query out."""
    where = data.lists.where
    zero = lambda values: np.where(where, values, 0).astype(np.float32)
    values = np.asarray(_measure(zero(scores), zero(data.lists.y), where, data.letor), np.float64)
    return np.nan_to_num(values) if data.letor else values


def standardise(scores: np.ndarray, where: np.ndarray) -> np.ndarray:
    """[Q, n] scores with mean 0 and deviation 1 in each query; padding is 0."""
    count = where.sum(axis=1, keepdims=True)
    centred = np.where(where, scores - np.where(where, scores, 0).sum(axis=1, keepdims=True) / count, 0)
    return centred / np.sqrt((centred**2).sum(axis=1, keepdims=True) / count + 1e-12)


def our_settings(quick: bool) -> list[TrainConfig]:
    """Linear lanes first, plain RankNet before all; then hidden layers, held loosely and tightly."""
    order, both = {"lambda_power": 1.0}, {"lambda_power": 1.0, "ranknet_weight": 0.5, "softmax_weight": 0.5}
    small = {"hidden": 16, "members": 2, "penalty": 0.003}
    large = both | {"hidden": 32, "members": 3, "dropout": 0.4, "pointwise_weight": 1.0}
    kinds: list[dict[str, Any]] = [
        kind | {"penalty": p} for kind in ({}, order, both) for p in (0.003, 0.03, 0.3, 1.0)
    ]
    kinds += [small | kind | {"learning_rate": rate} for kind in (order, both) for rate in (0.01, 0.03)]
    kinds += [large | {"penalty": p, "learning_rate": rate} for p in (0.001, 0.003) for rate in (0.05, 0.08)]
    configs = [dataclasses.replace(BASE, **kind) for kind in kinds]
    return [dataclasses.replace(config, epochs=3) for config in configs[::6]] if quick else configs


def ours(data: Collection, at: Round, quick: bool) -> Iterator[np.ndarray]:
    """[Q, n] scores by each of our settings; those of one width are lanes of one program."""
    kept = np.flatnonzero(at.learn | at.judge)
    development = fitting.Development(data.lists.take(kept), data.canonical_id[kept], at.judge[kept])
    for _, group in itertools.groupby(our_settings(quick), key=lambda config: config.hidden):
        configs = list(group)
        setup = fitting.set_up(development, configs[0], LOGGED)
        lanes = make_lanes(configs)
        state = training.init_lanes(setup.train, lanes)
        for number in range(configs[0].epochs):
            state, _ = training.run_epoch(setup.train, state, jnp.asarray(number), lanes)
        last = 0
        for config in configs:
            first, last = last, last + config.members
            members = jax.tree.map(operator.itemgetter(slice(first, last)), state)
            yield artifact.score(fitting.finish(setup, members, config, "lane", {}), data.lists).logit


def trees(fit: Callable[..., Callable], sizes: tuple[int, ...], children: tuple[float, ...]) -> Callable:
    """Boosted trees of every setting, each with the number of trees that suits the judging queries best."""

    def learner(data: Collection, at: Round, quick: bool) -> Iterator[np.ndarray]:
        settings = list(itertools.product((0.02, 0.05, 0.1), sizes, children))
        for rate, size, child in settings[:2] if quick else settings:
            predict = fit(*rows(data, at.learn), size, child, n_estimators=max(TREES), learning_rate=rate,
                          subsample=0.8, colsample_bytree=0.8)  # fmt: skip
            scores = [spread(data, partial(predict, count=count)) for count in TREES]
            yield max(scores, key=lambda tried: np.nanmean(measure(tried, data)[at.judge]))

    return learner


def rows(data: Collection, learn: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features, grades and group sizes of some queries."""
    where, y = data.lists.where[learn], data.lists.y[learn]
    first = np.nanmin(np.where(data.lists.y > 0, data.lists.y, np.nan))  # y of grade 1
    return data.lists.image[learn][where], np.rint(np.log2(1 + y[where] / first)), where.sum(axis=1)


def spread(data: Collection, predict: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """[Q, n] predictions for all candidates."""
    scores = np.zeros(data.lists.where.shape)
    scores[data.lists.where] = predict(data.lists.image[data.lists.where])
    return scores


def fit_lightgbm(x, grade, group, leaves: int, child: int, **settings: Any) -> Callable:
    """LambdaMART with its own gain, 2^grade − 1."""
    import lightgbm

    model = lightgbm.LGBMRanker(num_leaves=leaves, min_child_samples=child, subsample_freq=1, random_state=0,
                                n_jobs=1, verbose=-1, **settings).fit(x, grade, group=group)  # fmt: skip
    return lambda x, count=None: np.asarray(model.booster_.predict(x, num_iteration=count))


def fit_xgboost(x, grade, group, depth: int, child: float, **settings: Any) -> Callable:
    """XGBoost's `rank:ndcg` with its own gain, 2^grade − 1."""
    import xgboost

    model = xgboost.XGBRanker(objective="rank:ndcg", max_depth=depth, min_child_weight=child, random_state=0,
                              n_jobs=1, **settings).fit(x, grade, group=group)  # fmt: skip
    return lambda x, count: model.predict(x, iteration_range=(0, count))


LEARNERS = {
    OURS: ours,
    "LightGBM lambdarank": trees(fit_lightgbm, (4, 8, 16), (20, 80)),
    "XGBoost rank:ndcg": trees(fit_xgboost, (2, 3, 4), (0.1, 1.0)),
}


def combine(data: Collection, rounds: list[Round], tried: np.ndarray, pool: bool) -> dict[str, np.ndarray]:
    """[Q, n] test scores by the best and by the best quarter of the settings, of `tried` [R, S, Q, n].

    A round's own judging queries choose for it; with `pool`, those of all rounds choose for all.
    """
    held = [np.stack([measure(scores, data)[at.judge] for scores in of_round])
            for at, of_round in zip(rounds, tried, strict=True)]  # fmt: skip
    if pool:
        held = [np.concatenate(held, axis=1)] * len(rounds)
    result = {"best setting": np.zeros(tried.shape[2:]), "best quarter": np.zeros(tried.shape[2:])}
    for at, scores, values in zip(rounds, tried, held, strict=True):
        order = np.argsort(-np.nanmean(values, axis=1), kind="stable")
        for name, count in (("best setting", 1), ("best quarter", -(-len(order) // 4))):
            result[name][at.test] += scores[order[:count]].mean(axis=0)[at.test]
    return result


def compete(data: Collection, rounds: list[Round], pool: bool, quick: bool) -> dict[str, np.ndarray]:
    """[Q, n] test scores of every system."""
    systems, start, done = {}, time.monotonic(), 0
    for name, learner in LEARNERS.items():
        tried = []
        for at in rounds:
            tried.append([standardise(scores, data.lists.where) for scores in learner(data, at, quick)])
            done += 1
            left = (time.monotonic() - start) / done * (len(LEARNERS) * len(rounds) - done)
            say(f"  {name}, round {len(tried)} of {len(rounds)}, about {left:.0f} s left")
        if name == OURS:
            plain = sum(not (c.lambda_power or c.softmax_weight) for c in our_settings(quick))
            linear = combine(data, rounds, np.array(tried)[:, :plain], pool)
            systems["our linear RankNet"] = linear["best setting"]
        combined = combine(data, rounds, np.array(tried), pool)
        systems |= {f"{name}, {which}": scores for which, scores in combined.items()}
    return systems


def report(title: str, systems: dict[str, np.ndarray], data: Collection, test: np.ndarray) -> dict[str, Any]:
    """nDCG@10 of every system, and how far our best quarter is ahead of each; intervals over queries."""
    engine = figures.engine(int(test.sum()), 0, 10_000)
    values = {name: measure(scores, data)[test] for name, scores in systems.items()}
    others = [name for name in values if name != MODEL]
    apart = [values[MODEL] - values[name] for name in others]
    one, joint = comparisons.sign_flip(engine.draw, np.stack(apart, axis=1))
    level = engine.figures([figures.mean(value, (0, 1)) for value in values.values()])
    gain = engine.figures([figures.mean(value, (-1, 1)) for value in apart])
    say(f"{title}: nDCG@10 of {test.sum()} queries, {np.isnan(values[MODEL]).sum()} of them left out")
    for name, figure in zip(values, level, strict=True):
        say(f"  {name:<36} {figure['value']:.4f} {parts(figure, '')[1]}")
    say(f"{MODEL}, paired difference over")
    for name, figure, *p in zip(others, gain, one, joint, strict=True):
        say(f"  {name:<36} {figure_text(figure, 'points')}, p {p[0]:.4f}, max-T {p[1]:.4f}")
    paired = [{"over": name, "difference": figure, "p": float(p), "p_max_t": float(q)}
              for name, figure, p, q in zip(others, gain, one, joint, strict=True)]  # fmt: skip
    return {"convention": title, "systems": dict(zip(values, level, strict=True)), "ours": paired}


def ohsumed(folder: pathlib.Path, quick: bool) -> dict[str, Any]:
    """The five folds of LETOR, beside what was published."""
    names = [f"S{i}" for i in range(1, FOLDS + 1)]
    data = read({name: folder / f"{name}.txt.gz" for name in names}, "query", letor=True)
    parts_of = [(data.part == names[i - 1], data.part == name) for i, name in enumerate(names)]
    rounds = [Round(~judge & ~test, judge, test) for judge, test in parts_of]
    systems = compete(data, rounds, pool=False, quick=quick)
    title = ("OHSUMED, five folds; gain 2^grade − 1, discount 1, 1, 1/log2(3), …, "
             "a query without relevant documents counts 0")  # fmt: skip
    result = report(title, systems, data, np.ones(len(data.part), bool))
    table = pyarrow.csv.read_csv(folder / "reference_algorithms.csv").to_pylist()
    published = {row["algorithm"]: row["ndcg@10"] for row in table if row["fold"] == "mean"}
    say("  published: " + ", ".join(f"{name} {value:.4f}" for name, value in published.items()))
    return result | {"published": published}


def example(folder: pathlib.Path, quick: bool) -> dict[str, Any]:
    """LightGBM's own example, beside LightGBM with the settings that come with it."""
    data = read({name: folder / f"rank.{name}.gz" for name in ("train", "test")}, "none", letor=False)
    test = data.part == "test"
    fold = (unit_hash("query_id", data.lists.query_id, "ltr") * FOLDS).astype(int)
    rounds = [Round(~test & (fold != k), ~test & (fold == k), test) for k in range(FOLDS)]
    systems = compete(data, rounds, pool=True, quick=quick)
    systems["LightGBM, the example's settings"] = spread(data, fit_lightgbm(*rows(data, ~test), **EXAMPLE))
    title = ("LightGBM's example; gain 2^grade − 1, discount 1/log2(rank + 1), "
             "a query without gain is left out")  # fmt: skip
    return report(title, systems, data, test)


def main() -> None:
    """Trains, chooses, tests, reports."""
    folder = pathlib.Path(FLAGS.data)
    if not folder.is_dir():
        raise InputError("no such folder", file=folder, remedy="Name one that holds ohsumed/ and lightgbm/")
    results = {"ohsumed": ohsumed(folder / "ohsumed", FLAGS.quick),
               "lightgbm": example(folder / "lightgbm", FLAGS.quick)}  # fmt: skip
    if FLAGS.output:
        files.write_json(FLAGS.output, results)
        say(f"wrote {FLAGS.output}")


if __name__ == "__main__":
    launch(main, define_flags)
