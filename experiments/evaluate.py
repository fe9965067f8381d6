r"""Evaluate models on the test split of a dataset, against CLIP-only and Step 4's own scores.

    python -m experiments.evaluate --model=checkpoints/cotrr_lite_v1 --data=data/cotrr \
        --output=reports/cotrr_lite_v1

Give --model again to compare several: the report is about the first.  Writes report.json, report.md,
report.html and TensorBoard logs.  Refuses rows that a model has learned from.

A split of several files is scored file by file, each a part, by --workers processes or on a Ray cluster
(--runner=ray), and only what `cotrr.evaluate.scoring` keeps of each row stays in memory.  What is done
is kept in the folder `.parts-of-evaluation` of --output until the report is written: killed and called
again, it goes on where it was.
"""

import contextlib
import datetime
import functools
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

# Read when NumPy is imported: latency is measured as a serving process has it, one thread a product.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import numpy as np
import pyarrow as pa
from absl import flags

from cotrr import files, shards
from cotrr.config import launch
from cotrr.data import certificate, dataset, labels
from cotrr.data.lists import Lists, clusters
from cotrr.deploy.scorer import Scorer, of_list
from cotrr.errors import InputError
from cotrr.evaluate import (
    acceptance,
    evaluation,
    failures,
    figures,
    plots,
    probabilities,
    report,
    scoring,
    systems,
)
from cotrr.evaluate.figures import Engine
from cotrr.evaluate.ranking import System
from cotrr.evaluate.scoring import Glance, Job, Kept, Part
from cotrr.ranker import artifact, encoding, model_files
from cotrr.store import LocalStore
from cotrr.summaries import SummaryWriter
from experiments import judging, options
from experiments.terminal import done, progress, say, warn

FLAGS = flags.FLAGS
SCRATCH = ".parts-of-evaluation"  # the folder of what is done


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
    options.define_workers("one a core, or a single one where there is an accelerator")
    flags.mark_flags_as_required(["model", "data", "output"])


class Contender(NamedTuple):
    """A model to evaluate: the system that it is in the report, and its scores."""

    system: str
    folder: str
    model: artifact.Model
    scored: artifact.Scored


def main() -> None:
    """Scores part by part, measures, writes the report."""
    output = options.local_output(FLAGS.output)
    if (output / "config.json").exists():  # its TensorBoard logs would be replaced
        raise InputError("this is a training folder", file=output, remedy="Name another --output")
    with contextlib.ExitStack() as held:
        result, passport = _evaluate(held)
    _tell(result)
    source = passport["input"]["input"]
    done({"report": output / "report.html", "as text": output / "report.md",
          "as data": output / "report.json", "tensorboard": f"tensorboard --logdir={output / 'tensorboard'}"},
         [f"python -m experiments.rerank --model={FLAGS.model[0]} --input={source} "
          "--output=reranked.jsonl --top_m=0"] if pathlib.Path(source).exists() else [])  # fmt: skip


def _evaluate(held: contextlib.ExitStack) -> tuple[dict, dict]:
    """The report, which is written, and the data's certificate; what is held, is until that is done."""
    contents = {folder: model_files.parse(model_files.read_files(folder), folder) for folder in FLAGS.model}
    passport, parts = dataset.read_certificate(FLAGS.data), scoring.split_parts(FLAGS.data, FLAGS.split)
    with shards.RUNNERS[FLAGS.runner](_workers(len(parts))) as runner:
        # Here JAX starts, and not before: Ray forks.
        models = {folder: artifact.assemble(found) for folder, found in contents.items()}
        job, glances = _look(models, parts, runner)
        notices = _notices(models, passport, job, glances)
        for notice in notices:
            warn(notice)
        if job.store:
            held.enter_context(_scratch())
        start = time.perf_counter()
        kept = scoring.score(job, parts, runner, _progress(job, parts, glances))
    lists, seconds = kept.lists, {"scoring": round(time.perf_counter() - start, 3)}
    judging.check_labelled(lists, kept.left_out, job.label, FLAGS.data, FLAGS.split)
    say(f"scored {lists.labelled.sum():,} candidates of {len(lists.query_id):,} queries")
    contenders = _contenders(models, kept.scored)
    unit = clusters(kept.named, lists, job.cluster_by)
    engine = figures.engine(len(lists.query_id), FLAGS.seed, 1000 if FLAGS.quick else FLAGS.resamples, unit)
    result = _measure(engine, kept, contenders, lambda: _latency(job, parts), seconds)
    result |= {
        "notices": notices,
        "data": _data_facts(passport, lists, job.label),
        "model": _model_facts(contenders[0].model),
        "models": [{"system": c.system, "path": c.folder, "version": c.model.version} for c in contenders],
        "bootstrap": {"queries": len(lists.query_id), "units": engine.draw.units, "unit": engine.unit_name,
                      "seed": engine.seed, "resamples": engine.resamples},
        "seconds": seconds,
    }  # fmt: skip
    result["acceptance"] = acceptance.table(result)
    _write(result, lists, contenders)
    return result, passport


@contextlib.contextmanager
def _scratch() -> Iterator[None]:
    """Holds the folder of what is done alone, and removes it when all went well."""
    with files.locked(pathlib.Path(FLAGS.output) / SCRATCH / "lock"):
        yield
        files.remove(FLAGS.output, [SCRATCH])


def _workers(parts: int) -> int:
    """How many parts are worked on at once."""
    alone = FLAGS.runner == "local" and jax.default_backend() != "cpu"  # its memory is one process's
    return min(parts, FLAGS.workers or (1 if alone else shards.cores()))


def _look(
    models: dict[str, artifact.Model], parts: list[Part], runner: shards.Runner
) -> tuple[Job, list[Glance]]:
    """What is to be done, from a glance at every part."""
    absolute = lambda path: str(pathlib.Path(path).absolute())
    data, named = absolute(FLAGS.data), tuple((absolute(path), m.version) for path, m in models.items())
    glances = list(runner(functools.partial(scoring.glance, data, named), parts))
    label = scoring.label_of(frozenset().union(*(glance.labels for glance in glances)))
    store = LocalStore(pathlib.Path(FLAGS.output) / SCRATCH) if len(parts) > 1 else None
    return Job(data, named, label, FLAGS.cluster_by or scoring.ALONE, store), glances


def _notices(models: dict[str, artifact.Model], passport: dict, job: Job, glances: list[Glance]) -> list[str]:
    """What must not be overlooked; raises InputError for rows that a model has learned from."""
    silver = ("Labels are silver: Step 4's own scores, not a reviewer's. Agreement with them says nothing "
              "about people.")  # fmt: skip
    notices = [silver] if job.label == labels.SILVER else []
    notices += [f"Data: {breach}." for breach in certificate.breaches(passport)]
    ids = pa.concat_tables([glance.learned for glance in glances])
    for folder, model in models.items():
        learned = artifact.learned_from(model.seen, ids)
        if not FLAGS.allow_overlap:
            judging.refuse_overlap(f"{folder} has learned", learned, FLAGS.data,
                                   ", or set --allow_overlap to see optimistic figures")  # fmt: skip
        if learned:
            notices.append(f"{folder} HAS LEARNED FROM {learned} of this split: its figures are optimistic.")
    return notices


def _progress(job: Job, parts: list[Part], glances: list[Glance]) -> Callable[[Part], None]:
    """A callback for parts that are scored: shows their rows and the time left."""
    rows = {part: glance.rows for part, glance in zip(parts, glances, strict=True)}
    ready = scoring.committed(job, parts)
    if ready:
        say(f"{len(ready)} of {len(parts)} parts were scored before")
    say(f"scoring {sum(rows[part] for part in parts if part not in ready):,} rows")
    advance = progress(sum(rows.values()), "rows scored", sum(rows[part] for part in ready))
    return lambda part: None if part in ready else advance(rows[part])


def _contenders(models: dict[str, artifact.Model], scored: Sequence[artifact.Scored]) -> list[Contender]:
    """The models with their scores; the first is +Reranker, others add their folder's name."""
    found: list[Contender] = []
    for (folder, model), scores in zip(models.items(), scored, strict=True):
        name = pathlib.Path(folder).name
        if any(pathlib.Path(other).name == name for other in models if other != folder):
            name = folder
        name = f"+Reranker {name}" if found else "+Reranker"
        found.append(Contender(name, folder, model, scores))
    return found


def _measure(
    engine: Engine,
    kept: Kept,
    contenders: list[Contender],
    latency: Callable[[], dict],
    seconds: dict[str, float],
) -> dict:
    """All figures of the report; `seconds` is told how long each step took."""
    lists, scored = kept.lists, contenders[0].scored
    rungs = systems.ladder(contenders[0].model, lists)
    rungs += [System(c.system, c.model.version, c.scored.logit) for c in contenders]
    say(f"{engine.resamples:,} resamples of {engine.draw.units:,} {engine.unit_name}")
    clock = time.perf_counter()

    def lap(step: str) -> None:
        nonlocal clock
        seconds[step], clock = round(time.perf_counter() - clock, 3), time.perf_counter()

    result = {
        "title": pathlib.Path(FLAGS.model[0]).name,
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commands": [_command(engine)],
        **evaluation.measure(engine, rungs, _conflict(contenders, lists), scored, lists,
                             _baseline(rungs, contenders), contenders[0].system),
    }  # fmt: skip
    lap("statistics")
    found = failures.analyse(kept.failures, lists, scored)
    result |= {"examples": found.pop("examples"), "failures": found}
    lap("failures")
    result["latency"] = {} if FLAGS.quick else latency()
    lap("latency")
    return result


def _latency(job: Job, parts: list[Part]) -> dict:
    """Of the scorer that serves, on the queries of the first part with labels, which is read once more."""
    folder, _ = job.models[0]
    scorer = Scorer(model_files.parse(model_files.read_files(folder), folder))
    sample = next(found for part in parts if len((found := scoring.read(job, part)[1]).query_id))
    return systems.latency(lambda q: scorer.score(*of_list(sample, q)), sample, "NumPy")


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
        "configurations_looked_at": model.config.get("looked_at", 1),
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
