r"""What each part of CoTRR-lite is worth: every ablation is a lane of one program, judged on the test split.

    python -m experiments.ablate --data=data/cotrr --workdir=checkpoints/ablation \
        --flagfile=experiments/recipes/cotrr_lite.flags

Rows: Step 4's own ladder; trained on CLIP alone, +SO, +SO+Conflict; without each group and each attribute;
other losses; without each head.  Each is compared with the full model on the same resamples, all together by
max-T.  Writes ablation.json, ablation.md and TensorBoard logs.
"""

import dataclasses
import pathlib
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
from absl import flags

from cotrr import devices, files
from cotrr.config import launch
from cotrr.data import certificate, dataset
from cotrr.data.contract import ATTRIBUTES, GROUPS
from cotrr.data.lists import Lists
from cotrr.evaluate import figures, probabilities, ranking, systems
from cotrr.evaluate.ranking import System
from cotrr.evaluate.report import figure_text, metric_name, p_text
from cotrr.ranker import artifact, encoding, fitting, search, training
from cotrr.ranker.encoding import names
from cotrr.ranker.lanes import TrainConfig, make_lanes
from cotrr.ranker.training import State
from cotrr.summaries import SummaryWriter
from experiments import judging, training_folder
from experiments.loop import Loop
from experiments.terminal import done, say

FLAGS = flags.FLAGS
QUICK = {"folds": 3, "epochs": 8, "members": 1}
FULL = "full"
SHOWN = ("compliance@1", "compliance@3", "ndcg@10")
LOSSES = {
    "pairs weigh by their gap in y": {"pair_power": 1.0},
    "LambdaRank (ΔnDCG)": {"lambda_power": 1.0},
    "softmax instead of pairs": {"ranknet_weight": 0.0, "softmax_weight": 1.0},
    "softmax and pairs": {"softmax_weight": 1.0},
}
HEADS = {
    "no conflict head": {"conflict_weight": 0.0},
    "no pointwise loss": {"pointwise_weight": 0.0},
    "pointwise loss alone": {"ranknet_weight": 0.0},
}


def define_flags() -> None:
    """Flags of this launcher."""
    training_folder.define_flags("Few epochs, 1,000 resamples.")
    flags.DEFINE_integer("resamples", 10_000, "Bootstrap resamples.", lower_bound=1000)


def variants(config: TrainConfig, lists: Lists) -> dict[str, TrainConfig]:
    """The ablations of a config by name; attributes that no row has are left out."""
    groups, without = names(config.groups), names(config.without)
    column = dict(zip(ATTRIBUTES, np.moveaxis(lists.attributes[lists.where], -1, 0), strict=True))
    known = {name: group for name, group in ATTRIBUTES.items() if not np.isnan(column[name]).all()}
    if lists.image.shape[-1]:
        known[encoding.EMBEDDINGS] = "clip"
    changes: dict[str, dict[str, Any]] = {FULL: {}}
    ladder = [group for group in GROUPS if group in groups]
    changes |= {f"trained on {' + '.join(ladder[:k])}": {"groups": ",".join(ladder[:k])}
                for k in range(1, len(ladder))}  # fmt: skip
    changes |= {f"without {group}": {"groups": ",".join(g for g in ladder if g != group)}
                for group in ladder[:-1]}  # fmt: skip
    changes |= {f"without {name}": {"without": ",".join([*without, name])}
                for name, group in known.items() if group in groups and name not in without}  # fmt: skip
    changes |= LOSSES | HEADS
    return {name: dataclasses.replace(config, **change) for name, change in changes.items()}


def folder_names(ablations: Iterable[str]) -> list[str]:
    """For each ablation's name one that a folder can have."""
    plain = lambda name: re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")
    return [f"{number:02d}-{plain(name)}" for number, name in enumerate(ablations)]


def main() -> None:
    """Trains all ablations, judges them, writes the tables."""
    workdir, config = pathlib.Path(FLAGS.workdir), training_folder.config_from_flags(QUICK)
    test = dataset.read(FLAGS.data, "test")
    judged, kind = judging.labelled_lists(test, FLAGS.data, "test")
    check = lambda development: judging.refuse_overlap(
        "every ablation learns", artifact.learned_from(fitting.seen(development), test), FLAGS.data
    )
    with training_folder.opened("ablate", config, check) as (setup, passport):
        configs = variants(config, setup.development.lists)
        say(f"{len(configs)} ablations as lanes of {len(setup.views.train)} views; judged on {kind} labels "
            f"of {len(judged.query_id)} queries of the test split")  # fmt: skip
        with Loop(workdir, list(configs.values()), FLAGS.checkpoint_every, folder_names(configs)) as epochs:
            states = train(setup, configs, epochs)
            facts = {"labels": kind, "breaches": certificate.breaches(passport),
                     "settings": dataclasses.asdict(config)}  # fmt: skip
            text = devices.first_alone(
                lambda: write(judge(setup, configs, states, judged) | facts, epochs.writer)
            )
    if not text:
        return
    say("\n" + text)
    done({"table": workdir / "ablation.md", "figures": workdir / "ablation.json",
          "tensorboard": f"tensorboard --logdir={workdir / 'tensorboard'}"},
         ["read the differences with their intervals: one that holds 0 shows nothing"])  # fmt: skip


def train(setup: fitting.Setup, configs: dict[str, TrainConfig], epochs: Loop) -> list[State]:
    """The members [V] of each ablation, all trained together."""
    lanes, members = make_lanes(list(configs.values())), setup.config.members
    state, first = epochs.begin(training.init_lanes(setup.train, lanes))
    state = epochs.run(setup, lanes, state, first, setup.config.epochs)
    return [search.take(state, range(k * members, (k + 1) * members)) for k in range(len(configs))]


def judge(
    setup: fitting.Setup, configs: dict[str, TrainConfig], states: list[State], lists: Lists
) -> dict[str, Any]:
    """What lists of the test split show of every ablation's model, and of Step 4's own ladder."""
    models = {name: fitting.finish(setup, state, config, name, {})
              for state, (name, config) in zip(states, configs.items(), strict=True)}  # fmt: skip
    scored = {name: artifact.score(model, lists) for name, model in models.items()}
    resamples = training_folder.unless_quick("resamples", 1000)
    return measure(lists, systems.ladder(models[FULL], lists), scored, resamples, setup.config.seed)


def write(table: dict[str, Any], writer: SummaryWriter) -> str:
    """Writes the table where people and programs look for it; returns it as text."""
    workdir, text = pathlib.Path(FLAGS.workdir), markdown(table)
    writer.text("ablation", text)
    files.write_json(workdir / "ablation.json", table)
    with files.replacing(workdir / "ablation.md") as temporary:
        temporary.write_text(text)
    return text


def measure(
    lists: Lists, rules: list[System], scored: dict[str, artifact.Scored], resamples: int, seed: int
) -> dict[str, Any]:
    """Every ablation's figures, and its paired differences to the full model, tested together."""
    engine = figures.engine(len(lists.query_id), seed, resamples)
    ablations = [System(name, "", values.logit) for name, values in scored.items()]
    ranked = ranking.ranking(engine, [*rules, *ablations], lists, baseline=FULL, model=FULL)
    conflict = probabilities.conflicts(engine, {n: v.p_conflict for n, v in scored.items()}, lists)["systems"]
    of = lambda name: {f"conflict_{part}": conflict.get(name, {}).get(part) for part in ("auc", "ece")}
    rows = [row | of(row["system"]) for row in ranked["ladder"]]
    return {"rows": rows, "differences": ranked["comparisons"][0]}


def markdown(table: dict[str, Any]) -> str:
    """The ablation table: values, then differences to the full model with simultaneous intervals."""
    found = {(row["system"], row["metric"]): row for row in table["differences"]["rows"]}
    head = [*(metric_name(m) for m in SHOWN), *(f"Δ {metric_name(m)}, points" for m in SHOWN), "conflict AUC"]
    lines = ["| ablation | " + " | ".join(head) + " |", "|---|" + "---:|" * len(head)]
    for row in table["rows"]:
        name = row["system"]
        cells = [figure_text(row["metrics"][m]) for m in SHOWN]
        cells += [_difference(found.get((name, m)), table["differences"]["resamples"]) for m in SHOWN]
        auc = row["conflict_auc"]
        lines.append(f"| {name} | " + " | ".join([*cells, figure_text(auc) if auc else ""]) + " |")
    tests = table["differences"]["hypotheses"]
    text = (
        f"By {table['labels']} labels. Differences to `{FULL}`, resampled by query: intervals that all hold "
        f"together with 95 % (none where a few queries decide), p by max-T over {tests} tests. What is "
        "taken out stands at its domain's mean."
    )
    lines += ["", text]
    return "\n".join(lines) + "\n"


def _difference(row: dict[str, Any] | None, resamples: int) -> str:
    if row is None or row["difference"]["value"] is None:
        return ""
    bounds = row["simultaneous"]
    interval = f" [{100 * bounds[0]:+.1f}, {100 * bounds[1]:+.1f}]" if bounds else ""
    p = p_text(row["p_max_t"], resamples)
    return f"{100 * row['difference']['value']:+.1f}{interval}, p {p}"


if __name__ == "__main__":
    launch(main, define_flags)
