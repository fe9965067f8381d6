r"""Evaluate models on the test split of a dataset, against CLIP-only and Step 4's own scores.

    python -m experiments.evaluate --model=checkpoints/cotrr_lite_v1 --data=data/cotrr \
        --output=reports/cotrr_lite_v1

Give --model again to compare several: the report is about the first.  Writes report.json, report.md,
report.html and TensorBoard logs.  Refuses rows that a model has learned from.
"""

import datetime
import os
import pathlib
import time
from typing import NamedTuple

# Read when NumPy is imported: latency is measured as a serving process has it, one thread a product.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import pyarrow as pa
from absl import flags

from cotrr import files
from cotrr.config import launch
from cotrr.data import certificate, dataset, labels
from cotrr.data.lists import Lists, clusters
from cotrr.deploy.scorer import Scorer, of_list
from cotrr.errors import InputError
from cotrr.evaluate import acceptance, evaluation, failures, figures, plots, probabilities, report, systems
from cotrr.evaluate.figures import Engine
from cotrr.evaluate.ranking import System
from cotrr.ranker import artifact, encoding, model_files
from cotrr.summaries import SummaryWriter
from experiments import loop
from experiments.terminal import done, say, warn

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Flags of this launcher."""
    flags.DEFINE_multi_string("model", None, "Model folder, from train; again for each model to compare.")
    flags.DEFINE_string("data", None, "Dataset folder, from generate_training_data.")
    flags.DEFINE_string("output", None, "Folder for the report.")
    flags.DEFINE_enum("split", "test", ["test", "validation", "train"], "Split to evaluate on.")
    flags.DEFINE_string("baseline", "clip", "What differences are shown to: "
                        f"{', '.join(systems.BASELINES)}, or a --model folder.")  # fmt: skip
    flags.DEFINE_string("cluster_by", None, "Column whose values name clusters of queries that are "
                        "resampled together, such as cluster_id; unset: each query alone.")  # fmt: skip
    flags.DEFINE_integer("resamples", 10_000, "Bootstrap resamples.", lower_bound=1000)
    flags.DEFINE_integer("seed", 0, "Seed of the bootstrap.", lower_bound=0, upper_bound=2**32 - 1)
    flags.DEFINE_bool("quick", False, "1,000 resamples, no latency.")
    flags.DEFINE_bool("allow_overlap", False, "Evaluate even on rows that a model has learned "
                                              "from; the report says so loudly.")  # fmt: skip
    flags.mark_flags_as_required(["model", "data", "output"])


class Contender(NamedTuple):
    """A model to evaluate: the system that it is in the report, and its scores."""

    system: str
    folder: str
    model: artifact.Model
    scored: artifact.Scored


def main() -> None:
    """Scores, measures, writes the report."""
    if (pathlib.Path(FLAGS.output) / "config.json").exists():  # its TensorBoard logs would be replaced
        raise InputError("this is a training folder", file=FLAGS.output, remedy="Name another --output")
    models = {folder: artifact.load(folder) for folder in dict.fromkeys(FLAGS.model)}
    passport = dataset.read_certificate(FLAGS.data)
    table = dataset.read(FLAGS.data, FLAGS.split)
    notices = [f"Data: {breach}." for breach in certificate.breaches(passport)]
    for folder, model in models.items():
        notices += _check_overlap(folder, model, table)
    lists, kind = loop.labelled_lists(table, FLAGS.data, FLAGS.split)
    if kind == labels.SILVER:
        notices.insert(0, "Labels are silver: Step 4's own scores, not a reviewer's. Agreement with "
                          "them says nothing about people.")  # fmt: skip
    for notice in notices:
        warn(notice)
    resamples = 1000 if FLAGS.quick else FLAGS.resamples
    unit = clusters(table, lists, FLAGS.cluster_by or "query_id")
    engine = figures.engine(len(lists.query_id), FLAGS.seed, resamples, unit)
    say(f"scoring {lists.labelled.sum():,} candidates of {len(lists.query_id):,} queries")
    start = time.perf_counter()
    contenders = _contenders(models, lists)
    seconds = {"scoring": round(time.perf_counter() - start, 3)}
    result = _measure(engine, table, lists, contenders, seconds)
    result |= {
        "notices": notices,
        "data": _data_facts(passport, lists, kind),
        "model": _model_facts(contenders[0].model),
        "models": [{"system": c.system, "path": c.folder, "version": c.model.version} for c in contenders],
        "bootstrap": {"queries": len(lists.query_id), "units": engine.draw.units, "unit": engine.unit_name,
                      "seed": engine.seed, "resamples": engine.resamples},
        "seconds": seconds,
    }  # fmt: skip
    result["acceptance"] = acceptance.table(result)
    _write(result, lists, contenders)
    _tell(result)
    output, source = pathlib.Path(FLAGS.output), passport["input"]["input"]
    done({"report": output / "report.html", "as text": output / "report.md",
          "as data": output / "report.json", "tensorboard": f"tensorboard --logdir={output / 'tensorboard'}"},
         [f"python -m experiments.rerank --model={FLAGS.model[0]} --input={source} "
          "--output=reranked.jsonl --top_m=0"] if pathlib.Path(source).exists() else [])  # fmt: skip


def _contenders(models: dict[str, artifact.Model], lists: Lists) -> list[Contender]:
    """The models with their scores; the first is +Reranker, others add their folder's name."""
    found: list[Contender] = []
    for folder, model in models.items():
        name = pathlib.Path(folder).name
        if any(pathlib.Path(other).name == name for other in models if other != folder):
            name = folder
        name = f"+Reranker {name}" if found else "+Reranker"
        found.append(Contender(name, folder, model, artifact.score(model, lists)))
    return found


def _check_overlap(folder: str, model: artifact.Model, table: pa.Table) -> list[str]:
    if not FLAGS.allow_overlap:
        loop.refuse_overlap(model, folder, table, FLAGS.data)
    what = artifact.learned_from(model, table)
    return [f"{folder} HAS LEARNED FROM {what} of this split: its figures are optimistic."] if what else []


def _measure(
    engine: Engine, table: pa.Table, lists: Lists, contenders: list[Contender], seconds: dict[str, float]
) -> dict:
    """All figures of the report; `seconds` is told how long each part took."""
    model, scored = contenders[0].model, contenders[0].scored
    rungs = systems.ladder(model, lists)
    rungs += [System(c.system, c.model.version, c.scored.logit) for c in contenders]
    say(f"{engine.resamples:,} resamples of {engine.draw.units:,} {engine.unit_name}")
    clock = time.perf_counter()

    def lap(part: str) -> None:
        nonlocal clock
        seconds[part], clock = round(time.perf_counter() - clock, 3), time.perf_counter()

    result = {
        "title": pathlib.Path(FLAGS.model[0]).name,
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commands": [_command(engine)],
        **evaluation.measure(engine, rungs, _conflict(contenders, lists), scored, lists,
                             _baseline(rungs, contenders), contenders[0].system),
    }  # fmt: skip
    lap("statistics")
    found = failures.analyse(model, table, lists, scored)
    result |= {"examples": found.pop("examples"), "failures": found}
    lap("failures")
    result["latency"] = {} if FLAGS.quick else _latency(contenders[0].folder, lists)
    lap("latency")
    return result


def _latency(folder: str, lists: Lists) -> dict:
    """Of the scorer that serves."""
    scorer = Scorer(model_files.parse(model_files.read_files(folder), folder))
    return systems.latency(lambda q: scorer.score(*of_list(lists, q)), lists, "NumPy")


def _command(engine: Engine) -> str:
    models = " ".join(f"--model={folder}" for folder in FLAGS.model)
    clusters = f"--cluster_by={FLAGS.cluster_by} " if FLAGS.cluster_by else ""
    return (f"python -m experiments.evaluate {models} --data={FLAGS.data} --split={FLAGS.split} "
            f"--baseline={FLAGS.baseline} {clusters}--resamples={engine.resamples} --seed={engine.seed} "
            f"--output={FLAGS.output}")  # fmt: skip


def _baseline(rungs: list[System], contenders: list[Contender]) -> str:
    """The name of the system that --baseline means."""
    by_folder = {c.folder.rstrip("/"): c.system for c in contenders}
    name = systems.BASELINES.get(FLAGS.baseline) or by_folder.get(FLAGS.baseline.rstrip("/"))
    if name not in [rung.name for rung in rungs]:
        there = [short for short, rung in systems.BASELINES.items() if rung in [r.name for r in rungs]]
        raise InputError(f"--baseline={FLAGS.baseline}: expected {', '.join([*there, *by_folder])}")
    return name


def _conflict(contenders: list[Contender], lists: Lists) -> dict[str, np.ndarray]:
    """Conflict probabilities [Q, n] by system: the models', and Step 4's where it has them."""
    step4 = lists.attributes[..., encoding.NAMES.index("conflict_prob")]
    known = {} if np.isnan(step4[lists.where]).all() else {"step 4": step4}
    first, *others = contenders
    return {"reranker": first.scored.p_conflict, **{c.system: c.scored.p_conflict for c in others}, **known}


def _write(result: dict, lists: Lists, contenders: list[Contender]) -> None:
    output = pathlib.Path(FLAGS.output)
    report.write_report(result, output)
    files.remove(output, ["tensorboard"])
    with SummaryWriter(output / "tensorboard") as writer:
        plots.log_report(writer, result, probabilities.curves(_conflict(contenders, lists), lists))


def _data_facts(passport: dict, lists: Lists, kind: str) -> dict:
    sizes = lists.labelled.sum(axis=1)
    return {
        "dataset": str(FLAGS.data), "split": FLAGS.split, "label": kind,
        "queries": len(lists.query_id), "candidates": int(sizes.sum()),
        "candidates_per_query": {"min": int(sizes.min()), "median": float(np.median(sizes)),
                                 "max": int(sizes.max())},
        "compliance_weight": passport["settings"]["compliance_weight"],
        "fractions": passport["settings"]["fractions"],
        "split_method": passport["settings"]["split"]["method"],
        "rows_dropped_by_split": passport["rows_dropped"],
        "certificate": files.digest(passport),
    }  # fmt: skip


def _model_facts(model: artifact.Model) -> dict:
    return {
        "version": model.version,
        "members": int(model.final.sum()),
        "lanes": len(model.final),
        "best_epoch": model.provenance["best_epoch"],
        "validation_loss": model.provenance["validation_loss"],
        "configurations_looked_at": model.provenance.get("configurations", 1),
        "trained_on_certificate": model.provenance["certificate"],
        "trained_on_labels": model.provenance["labels"],
        "calibrators": {head: choice.kind for head, choice in model.calibration.choices.items()},
        "calibrated_on_queries": model.calibration.queries,
        "config": model.config,
    }


def _tell(result: dict) -> None:
    say()
    for row in result["ladder"]:
        cells = [report.figure_text(row["metrics"][m]) for m in ("compliance@1", "ndcg@10")]
        say(f"  {row['system']:<18} C@1 {cells[0]:<24} nDCG@10 {cells[1]}")
    say()
    for row in result["acceptance"]:
        say(f"  {row['verdict']:<12} {row['criterion']:<38} {report.figure_text(row['figure'], row['unit'])}")


if __name__ == "__main__":
    launch(main, define_flags)
