r"""How well the recipe ranks unseen photographs for unseen queries, by nested cross-validation.

    python -m benchmarks.photos --input=runs/photos --flagfile=experiments/recipes/cotrr_lite.flags

Pictures (by canonical_id) and queries are cut into K folds each.  Of the K × K models, each is developed
(statistics, inner folds, settings, epoch, calibration) without one fold of either, and scores just the
rows of that fold pair.  Together they score every row, so complete lists are ranked out of fold.
"""

import dataclasses
import json
import time
from functools import partial

import numpy as np
from absl import flags

from benchmarks import peers
from cotrr import files
from cotrr.config import dataclass_from_flags, flags_from_dataclass, launch
from cotrr.data import dataset, runs
from cotrr.data.lists import Lists, to_lists
from cotrr.data.splits import unit_hash
from cotrr.evaluate import figures, probabilities, ranking
from cotrr.evaluate.metrics import ndcg
from cotrr.evaluate.ranking import System
from cotrr.evaluate.report import figure_text
from cotrr.ranker import artifact, encoding, features, fitting, search, training
from cotrr.ranker.lanes import TrainConfig, make_lanes
from experiments.terminal import say

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Flags of this benchmark."""
    flags.DEFINE_string("input", None, "Run folder.")
    flags.DEFINE_string("output", None, "JSON file for the figures.")
    flags.DEFINE_integer("outer_folds", 3, "Folds of pictures and of queries.", lower_bound=2)
    flags.DEFINE_float("compliance_weight", 0.7, "λ of the label that our model learns (peers: compliance).")
    flags.DEFINE_integer("configurations", 1, "How many to look at inside each outer fold, on inner folds "
                         "alone, the given one first.", lower_bound=1)  # fmt: skip
    flags.DEFINE_string("salt", "photos", "Key of the outer folds: another salt, other folds.")
    flags.DEFINE_bool("quick", False, "Two outer folds and ten epochs.")
    flags.DEFINE_bool("peers", False, "Boosted trees too, with the same folds (benchmarks/requirements.txt).")
    flags_from_dataclass(TrainConfig)
    flags.mark_flag_as_required("input")


def develop(lists: Lists, canonical_id: np.ndarray, where: np.ndarray, config: TrainConfig) -> artifact.Model:
    """A model from the rows in `where` [Q, n] alone."""
    kept = np.flatnonzero(where.any(axis=1))
    part = lists._replace(where=where, y=np.where(where, lists.y, np.nan)).take(kept)
    setup = fitting.set_up(
        fitting.Development(part, canonical_id[kept], np.zeros(len(kept), bool)), config, partial(ndcg, k=10)
    )
    train, end = setup.train, config.epochs
    if FLAGS.configurations == 1:
        lanes = make_lanes([config])
        state = training.run_epochs(train, training.init_lanes(train, lanes), lanes, 0, end)
        return fitting.finish(setup, state, config, "fold", {})
    run = lambda stage, state, first: training.run_epochs(
        train, state, make_lanes(stage.configs), first, stage.last
    )
    found = search.tune(train, search.draw(config, FLAGS.configurations), run, members=config.members)
    return fitting.finish(setup, found.state, found.config, "fold", {})


def main() -> None:
    """Scores every row out of fold and reports."""
    config, outer = dataclass_from_flags(TrainConfig), FLAGS.outer_folds
    if FLAGS.quick:
        config, outer = dataclasses.replace(config, epochs=10, patience=10), 2
    table, _ = dataset.prepare(
        runs.read_run(FLAGS.input).table, (1.0, 0.0, 0.0), FLAGS.compliance_weight, "", "strict"
    )
    lists = to_lists(table)
    canonical_id = np.where(lists.where, table["canonical_id"].to_numpy(zero_copy_only=False)[lists.row], "")
    fold = lambda kind, ids: (unit_hash(kind, ids, FLAGS.salt) * outer).astype(int)
    picture, query = fold("canonical_id", canonical_id.ravel()), fold("query_id", lists.query_id)[:, None]
    picture = picture.reshape(lists.where.shape)
    scored = {name: np.full(lists.where.shape, -np.inf) for name in artifact.Scored._fields}
    rivals = {peer: np.full(lists.where.shape, -np.inf) for peer in (peers.PEERS if FLAGS.peers else ())}
    start = time.monotonic()
    for i in range(outer):
        for j in range(outer):
            learn = lists.where & (picture != i) & (query != j)
            judge = lists.where & (picture == i) & (query == j)
            values = artifact.score(develop(lists, canonical_id, learn, config), lists)
            for name, value in values._asdict().items():
                scored[name][judge] = value[judge]
            for peer, scores in rivals.items():
                scores[judge] = peers.develop(peer, lists, canonical_id, learn)[judge]
            done = i * outer + j + 1
            left = (time.monotonic() - start) / done * (outer**2 - done)
            say(f"  model {done} of {outer**2}, {left:.0f} s left")
    report(lists, scored, {peer.name: scores for peer, scores in rivals.items()})


def report(lists: Lists, scored: dict[str, np.ndarray], rivals: dict[str, np.ndarray]) -> None:
    """The figures, with intervals over queries (which leave out that queries share pictures)."""
    engine = figures.engine(len(lists.query_id), 0, 10_000)
    raw = np.nan_to_num(lists.attributes)
    systems = [
        System("CLIP-only", "", features.rule_score(raw, ("clip_score",))),
        System("Step 4's rule", "", features.rule_score(raw, encoding.NAMES)),
        *(System(name, "", scores) for name, scores in rivals.items()),
        System("reranker", "", scored["logit"]),
    ]
    ranked = ranking.ranking(engine, systems, lists)
    conflict = probabilities.conflicts(engine, {"reranker": scored["p_conflict"]}, lists)
    coverage = probabilities.coverage(engine, scored["low"], scored["high"], lists)
    for row in ranked["ladder"]:
        cells = [f"{m} {figure_text(row['metrics'][m])}" for m in ("compliance@1", "ndcg@10")]
        say(f"{row['system']:<20} {'   '.join(cells)}")
    for row in ranked["comparisons"][-1]["rows"]:
        if row["metric"] in ("compliance@1", "ndcg@10"):
            gain = figure_text(row["difference"], "points")
            say(f"reranker over {row['reference']}, {row['metric']}: {gain}, p (max-T) {row['p_max_t']:.4f}")
    say(f"conflict AUC {figure_text(conflict['auc'])}   ECE {figure_text(conflict['ece'])}")
    held, width = (figure_text(coverage[name]) for name in ("coverage", "width"))
    say(f"95 % interval holds the label in {held}, mean width {width}")
    if FLAGS.output:
        files.write_json(FLAGS.output, ranked | {"conflict": conflict, "uncertainty": coverage})
        say(json.dumps({"wrote": FLAGS.output}))


if __name__ == "__main__":
    launch(main, define_flags)
