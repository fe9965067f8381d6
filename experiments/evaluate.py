r"""Evaluate a model on the test split of a dataset, against CLIP-only and Step 4's own scores.

    python -m experiments.evaluate --model=checkpoints/cotrr_lite_v1 --data=data/cotrr \
        --output=reports/cotrr_lite_v1

Writes report.json, report.md and report.html.  Refuses rows that the model has learned from.
"""

import datetime
import pathlib

import numpy as np
import pyarrow as pa
from absl import flags

from cotrr import files
from cotrr.config import launch
from cotrr.data import certificate, dataset, labels
from cotrr.data.lists import Lists, to_lists
from cotrr.errors import InputError
from cotrr.evaluate import acceptance, evaluation, failures, report, systems
from cotrr.evaluate.evaluation import Engine
from cotrr.ranker import artifact, features
from experiments.terminal import done, say, warn

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Flags of this launcher."""
    flags.DEFINE_string("model", None, "Model folder, from train.")
    flags.DEFINE_string("data", None, "Dataset folder, from generate_training_data.")
    flags.DEFINE_string("output", None, "Folder for the report.")
    flags.DEFINE_enum("split", "test", ["test", "validation", "train"], "Split to evaluate on.")
    flags.DEFINE_integer("resamples", 10_000, "Bootstrap resamples.", lower_bound=1000)
    flags.DEFINE_integer("seed", 0, "Seed of the bootstrap.")
    flags.DEFINE_bool("quick", False, "1,000 resamples, no latency.")
    flags.DEFINE_bool("allow_overlap", False, "Evaluate even on rows that the model has learned "
                                              "from; the report says so loudly.")  # fmt: skip
    flags.mark_flags_as_required(["model", "data", "output"])


def main() -> None:
    """Scores, measures, writes the report."""
    model = artifact.load(FLAGS.model)
    passport = dataset.read_certificate(FLAGS.data)
    table = dataset.read(FLAGS.data, FLAGS.split)
    notices = [f"Data: {breach}." for breach in certificate.breaches(passport)]
    notices += _check_overlap(model, table)
    lists, kind = _labelled_lists(table)
    if kind == labels.SILVER:
        notices.insert(0, "Labels are silver: Step 4's own scores, not a reviewer's. Agreement with "
                          "them says nothing about people.")  # fmt: skip
    for notice in notices:
        warn(notice)
    say(f"scoring {lists.labelled.sum():,} candidates of {len(lists.query_id):,} queries")
    scored = artifact.score(model, lists)
    engine = Engine(len(lists.query_id), FLAGS.seed, 1000 if FLAGS.quick else FLAGS.resamples)
    say(f"bootstrap with {engine.resamples:,} resamples")
    result = _measure(model, engine, table, lists, scored)
    result |= {"notices": notices, "data": _data_facts(passport, lists, kind),
               "model": _model_facts(model), "bootstrap": engine._asdict()}  # fmt: skip
    result["acceptance"] = acceptance.table(result)
    report.write_report(result, FLAGS.output)
    _tell(result)
    output = pathlib.Path(FLAGS.output)
    done({"report": output / "report.html", "as text": output / "report.md",
          "as data": output / "report.json"},
         [f"python -m experiments.rerank --model={FLAGS.model} --input={passport['input']['input']} "
          "--output=reranked.jsonl --top_m=0"])  # fmt: skip


def _check_overlap(model: artifact.Model, table: pa.Table) -> list[str]:
    shared = {key: artifact.overlap(model, key, table[key].to_numpy(zero_copy_only=False))
              for key in ("query_id", "canonical_id")}  # fmt: skip
    if not any(shared.values()):
        return []
    what = " and ".join(f"{count} {key}" for key, count in shared.items())
    if not FLAGS.allow_overlap:
        raise InputError(
            f"the model has learned from {what} of this split",
            file=FLAGS.data,
            remedy="Evaluate on data it has not seen, or set --allow_overlap to see optimistic figures",
        )
    return [f"THE MODEL HAS LEARNED FROM {what} of this split: every figure is optimistic."]


def _labelled_lists(table: pa.Table) -> tuple[Lists, str]:
    """The queries with labels of one kind: gold where there is any, else silver; never both."""
    kinds = set(table["label"].to_pylist())
    kind = labels.GOLD if labels.GOLD in kinds else labels.SILVER
    lists = to_lists(table, kind)
    judged = np.flatnonzero(lists.labelled.any(axis=1))
    if not len(judged):
        raise InputError(
            f"the {FLAGS.split} split has no labelled rows",
            file=FLAGS.data,
            remedy=f"Generate the dataset with a {FLAGS.split} fraction above 0, from a run with reviews",
        )
    if len(judged) < len(lists.query_id):
        warn(f"{len(lists.query_id) - len(judged)} queries without {kind} labels are left out")
    return lists.take(judged), kind


def _measure(model, engine: Engine, table, lists: Lists, scored: artifact.Scored) -> dict:
    rungs = systems.ladder(model, lists, scored)
    step4 = lists.attributes[..., features.NAMES.index("conflict_prob")]
    probabilities = {"reranker": scored.p_conflict}
    if not np.isnan(step4[lists.where]).all():
        probabilities["step 4"] = step4
    return {
        "title": pathlib.Path(FLAGS.model).name,
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commands": [f"python -m experiments.evaluate --model={FLAGS.model} --data={FLAGS.data} "
                     f"--split={FLAGS.split} --resamples={engine.resamples} --seed={engine.seed} "
                     f"--output={FLAGS.output}"],
        "conventions": evaluation.CONVENTIONS,
        **evaluation.ranking(engine, rungs, lists),
        "conflict": evaluation.conflicts(engine, probabilities, lists),
        "uncertainty": evaluation.coverage(engine, scored.low, scored.high, lists),
        **evaluation.counts(rungs, lists),
        "examples": failures.largest(table, lists, scored.logit, scored),
        "latency": {} if FLAGS.quick else systems.latency(model, lists),
    }  # fmt: skip


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
        "trained_on_certificate": model.provenance["certificate"],
        "trained_on_labels": model.provenance["labels"],
        "interval_radius": model.calibration.radius,
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
