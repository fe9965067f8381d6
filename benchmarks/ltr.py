r"""Published ranking data: our ranker beside boosted trees and what others published.

    python -m benchmarks.ltr --data=../shared/ltr [--quick] [--output=runs/ltr.json]

OHSUMED comes in five parts; LETOR's fold i is tested on S(i), validated on S(i-1) and learns from the other
three.  It is reported twice, of the same models.  LETOR's protocol: the validation part alone (21 queries)
chooses, and is not learned from.  Cross-validated: each of the four parts that are not tested is held out
once, their 85 queries together choose, and the mean of the four models scores the test part.  These are the
data that LETOR grants a fold, but the validation part is learned from too, which is not to the letter.
LightGBM's example has no validation part: its training queries are cut into five and cross-validated alike.

So few queries can hardly tell one setting from another.  Each learner therefore has two rows: its best
setting, and the mean of its best quarter of settings (each query's scores standardised).  How many epochs or
trees is part of a setting.  Our figure is the cross-validated best quarter, named before the test queries
were scored.  Held-out queries are not pooled over LETOR's folds: those of one are the test part of another.
They were, when the settings worth trying were listed, for us and for the trees: every part was then held out
from models that did not learn from it, so no query is new to these lists.
"""

import dataclasses
import itertools
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
from cotrr.ranker import artifact, encoding, fitting, training
from cotrr.ranker.lanes import TrainConfig, make_lanes
from experiments.terminal import say

FLAGS = flags.FLAGS
FOLDS = 5
EPOCHS = (5, 10, 20)
TREES = (10, 20, 40, 80, 160, 320)
EXAMPLE = {
    "n_estimators": 100, "learning_rate": 0.1, "leaves": 31, "child": 50, "min_child_weight": 5.0,
    "subsample": 0.9, "max_bin": 255,
}  # fmt: skip
BASE = TrainConfig(
    folds=0, groups="clip", image_components=300, text_components=0, image_size=1.0,
    epochs=max(EPOCHS), learning_rate=0.02, batch_queries=32, pointwise_weight=0.0, conflict_weight=0.0,
)  # fmt: skip
OURS = "ours"
MODEL = f"{OURS}, best quarter"  # the system whose differences are reported
Systems = dict[str, np.ndarray]  # [Q, n] scores by name


class Collection(NamedTuple):
    """Q lists of a published collection, and how its nDCG@10 is counted."""

    lists: Lists
    canonical_id: np.ndarray  # [Q, n] object
    part: np.ndarray  # [Q] object: the file that a query is in
    letor: bool  # ranks 1 and 2 discounted alike, and a query without gain is 0 instead of left out


class Round(NamedTuple):
    """Which queries are learned from, which choose, and which are tested on; [Q] bool.

    Rounds that test the same queries choose together, and the mean of their models scores these.
    """

    learn: np.ndarray
    judge: np.ndarray
    test: np.ndarray


class Tried(NamedTuple):
    """What S settings made of the same queries to learn from."""

    scores: np.ndarray  # [S, Q, n] standardised
    ndcg: np.ndarray  # [S, Q]: only that of judging queries is looked at


def define_flags() -> None:
    """Flags of this benchmark."""
    flags.DEFINE_string("data", None, "Folder with ohsumed/ and lightgbm/.")
    flags.DEFINE_string("output", None, "JSON file for the figures.")
    flags.DEFINE_bool("quick", False, "Few settings.")
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
    """Linear lanes first, plain RankNet before all; then hidden layers, by ListNet's loss alone."""
    both = {"lambda_power": 1.0, "ranknet_weight": 0.5, "softmax_weight": 0.5}
    listnet = {"ranknet_weight": 0.0, "softmax_weight": 1.0}
    small = {"hidden": 16, "members": 2}
    large = {"hidden": 32, "members": 3, "dropout": 0.4, "pointwise_weight": 1.0, "penalty": 0.003}
    penalties = (0.003, 0.03, 0.3, 1.0)
    kinds: list[dict[str, Any]] = [kind | {"penalty": p} for kind in ({}, both) for p in penalties]
    kinds += [listnet | {"penalty": p} for p in (0.003, 0.03, 0.1, 0.3, 1.0, 3.0)]
    pairs = itertools.product((0.003, 0.03), (0.01, 0.03))
    kinds += [listnet | small | {"penalty": p, "learning_rate": rate} for p, rate in pairs]
    kinds += [listnet | large | {"learning_rate": rate} for rate in (0.05, 0.08)]
    configs = [dataclasses.replace(BASE, **kind) for kind in kinds]
    return configs[::4] if quick else configs


def ours(data: Collection, learn: np.ndarray, quick: bool) -> Iterator[np.ndarray]:
    """[Q, n] scores by our settings after each of EPOCHS; those of one form are lanes of one program."""
    # Training wants something to validate on: one query, which chooses nothing here.
    kept = np.append(np.flatnonzero(learn), np.flatnonzero(~learn)[0])
    development = fitting.Development(data.lists.take(kept), data.canonical_id[kept], ~learn[kept])
    form = lambda config: (config.hidden, config.ranknet_weight)
    for _, group in itertools.groupby(our_settings(quick), key=form):
        configs = list(group)
        setup = fitting.set_up(development, configs[0], lambda scores, y, where: jnp.float32(0))
        lanes = make_lanes(configs)
        state = training.init_lanes(setup.train, lanes)
        for first, last in itertools.pairwise((0, *EPOCHS)):
            state = training.run_epochs(setup.train, state, lanes, first, last)
            yield from score_lanes(setup, state, configs, data.lists)


def score_lanes(
    setup: fitting.Setup, state: training.State, configs: list[TrainConfig], lists: Lists
) -> Iterator[np.ndarray]:
    """[Q, n] mean score of each config's members, of lanes as they stand."""
    params = jax.tree.map(lambda part: part[:, 0], state.params)  # of the only view
    statistics = jax.tree.map(lambda part: np.repeat(part, len(state.key), axis=0), setup.statistics)
    encoded = encoding.encode(lists, setup.vocabulary)
    mask = encoding.mask_of(dataclasses.asdict(configs[0]))
    scores = artifact.lane_scores(params, statistics, encoded, mask, hidden=configs[0].hidden)
    last = np.cumsum([config.members for config in configs])
    for members in np.split(np.asarray(scores.rank), last[:-1]):
        yield members.mean(axis=0)


def trees(fit: Callable[..., Callable], sizes: tuple[int, ...], children: tuple[float, ...]) -> Callable:
    """Boosted trees of every setting, with every number of trees."""

    def learner(data: Collection, learn: np.ndarray, quick: bool) -> Iterator[np.ndarray]:
        settings = list(itertools.product((0.03, 0.1), sizes, children))
        for rate, size, child in settings[:2] if quick else settings:
            predict = fit(*rows(data, learn), size, child, n_estimators=max(TREES), learning_rate=rate,
                          subsample=0.8, colsample_bytree=0.8)  # fmt: skip
            yield from (spread(data, partial(predict, count=count)) for count in TREES)

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


def combine(rounds: list[Round], tried: dict[bytes, Tried]) -> Systems:
    """[Q, n] test scores by the best and the best quarter of the settings; `tried` by `learn`, as bytes."""
    found: dict[str, Any] = {"best setting": 0.0, "best quarter": 0.0}
    for test in {at.test.tobytes(): at.test for at in rounds}.values():
        folds = [(at.judge, tried[at.learn.tobytes()]) for at in rounds if (at.test == test).all()]
        held = np.concatenate([models.ndcg[:, judge] for judge, models in folds], axis=1)
        order = np.argsort(-np.nanmean(held, axis=1), kind="stable")
        for name, count in (("best setting", 1), ("best quarter", -(-len(order) // 4))):
            mean = np.mean([models.scores[order[:count]].mean(axis=0) for _, models in folds], axis=0)
            found[name] = found[name] + np.where(test[:, None], mean, 0)
    return found


def compete(data: Collection, protocols: dict[str, list[Round]], quick: bool) -> dict[str, Systems]:
    """[Q, n] test scores of every system, by protocol; what several rounds learn from is learned once."""
    learned = {at.learn.tobytes(): at.learn for rounds in protocols.values() for at in rounds}
    systems: dict[str, Systems] = {protocol: {} for protocol in protocols}
    plain = len(EPOCHS) * sum(config.ranknet_weight == 1 for config in our_settings(quick))
    start, done = time.monotonic(), 0
    for name, learner in LEARNERS.items():
        tried = {}
        for key, learn in learned.items():
            scores = [standardise(scores, data.lists.where) for scores in learner(data, learn, quick)]
            tried[key] = Tried(np.stack(scores), np.stack([measure(values, data) for values in scores]))
            done += 1
            left = (time.monotonic() - start) / done * (len(LEARNERS) * len(learned) - done)
            say(f"  {name}, {len(tried)} of {len(learned)}, about {left:.0f} s left")
        for protocol, rounds in protocols.items():
            if name == OURS:
                linear = {key: Tried(*(part[:plain] for part in models)) for key, models in tried.items()}
                systems[protocol]["our linear RankNet"] = combine(rounds, linear)["best setting"]
            found = combine(rounds, tried)
            systems[protocol] |= {f"{name}, {which}": scores for which, scores in found.items()}
    return systems


def report(title: str, systems: Systems, data: Collection, test: np.ndarray) -> dict[str, Any]:
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
    """The five folds of LETOR by both protocols, beside what was published."""
    names = [f"S{i}" for i in range(1, FOLDS + 1)]
    data = read({name: folder / f"{name}.txt.gz" for name in names}, "query", letor=True)
    part = [data.part == name for name in names]
    pair = lambda judge, test: Round(~part[judge] & ~part[test], part[judge], part[test])
    protocols = {"cross-validated": [pair(j, i) for i in range(FOLDS) for j in range(FOLDS) if i != j],
                 "LETOR's protocol": [pair(i - 1, i) for i in range(FOLDS)]}  # fmt: skip
    convention = ("gain 2^grade − 1, discount 1, 1, 1/log2(3), …, "
                  "a query without relevant documents counts 0")  # fmt: skip
    results = {
        protocol: report(f"OHSUMED, {protocol}; {convention}", systems, data, np.ones(len(data.part), bool))
        for protocol, systems in compete(data, protocols, quick).items()
    }
    table = pyarrow.csv.read_csv(folder / "reference_algorithms.csv").to_pylist()
    published = {row["algorithm"]: row["ndcg@10"] for row in table if row["fold"] == "mean"}
    say("  published: " + ", ".join(f"{name} {value:.4f}" for name, value in published.items()))
    return results | {"published": published}


def example(folder: pathlib.Path, quick: bool) -> dict[str, Any]:
    """LightGBM's own example, cross-validated, beside LightGBM with the settings that come with it."""
    data = read({name: folder / f"rank.{name}.gz" for name in ("train", "test")}, "none", letor=False)
    test = data.part == "test"
    fold = (unit_hash("query_id", data.lists.query_id, "ltr") * FOLDS).astype(int)
    rounds = [Round(~test & (fold != k), ~test & (fold == k), test) for k in range(FOLDS)]
    systems = compete(data, {"cross-validated": rounds}, quick)["cross-validated"]
    systems["LightGBM, the example's settings"] = spread(data, fit_lightgbm(*rows(data, ~test), **EXAMPLE))
    title = ("LightGBM's example, cross-validated; gain 2^grade − 1, discount 1/log2(rank + 1), "
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
