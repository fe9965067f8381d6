r"""The canary: does a version do on a new run what it did when it was registered?  Needs no labels.

    python -m experiments.canary --run=runs/latest --registry=registry --output=reports/canary
    python -m experiments.canary --run=runs/latest --registry=registry --version=challenger \
        --trigger=model_change --probe=data/probe --output=reports/canary

Writes canary.json, canary.md and TensorBoard logs, which go on from one canary to the next, and logs the
verdict in the registry.  A run that cannot be read holds.  Ends with status 0 for pass or warning, 1 for
critical, 3 for hold.
"""

import os
import pathlib
import sys
import time
from typing import Annotated, Any

# Read when NumPy is imported: latency is measured as a serving process has it, one thread a product.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import msgspec
import numpy as np
from absl import flags
from msgspec import Meta

from cotrr import files
from cotrr.config import launch
from cotrr.data import dataset, labels, runs
from cotrr.data.lists import Lists, to_lists
from cotrr.data.rows import explain
from cotrr.data.runs import Reading
from cotrr.deploy import canary, policy, sketches
from cotrr.deploy.canary import CanaryPolicy, Probe, Seen
from cotrr.deploy.registry import Registry, State, Version
from cotrr.deploy.scorer import Scorer, of_list
from cotrr.errors import InputError
from cotrr.evaluate.ranking import per_query
from cotrr.ranker import artifact
from cotrr.ranker.artifact import Model
from cotrr.ranker.calibrators import Scored
from cotrr.ranker.model_files import Contents
from cotrr.store import open_store
from cotrr.summaries import SummaryWriter
from experiments import judging
from experiments.terminal import actor, done, reading_progress, say, tell_reading, warn

FLAGS = flags.FLAGS
POLICY = pathlib.Path(__file__).parent / "policies" / "canary.json"
WARM_UP = 20  # calls
STATUS = {"pass": 0, "warning": 0, "critical": 1, "hold": 3}


class Request(msgspec.Struct):
    """One line of --latencies."""

    ms: Annotated[float, Meta(ge=0)]


def define_flags() -> None:
    """Flags of this launcher."""
    flags.DEFINE_string("run", None, "Run folder (or a link to one), or a bare JSONL file.")
    flags.DEFINE_string("registry", None, "Registry: a folder, or a URL that fsspec knows.")
    flags.DEFINE_string("output", None, "Folder for what is written.")
    flags.DEFINE_string("name", "cotrr", "Name of the model in the registry.")
    flags.DEFINE_string("version", "champion", "Version: v3, champion, challenger, shadow, or a model's.")
    flags.DEFINE_string("policy", str(POLICY), "Thresholds.")
    flags.DEFINE_enum("trigger", "scheduled", canary.TRIGGERS, "What this canary was called for.")
    flags.DEFINE_string("probe", None, "Dataset folder; its test split is queries with gold labels that no "
                                       "version has learned from.")  # fmt: skip
    flags.DEFINE_string("latencies", None, 'Requests served by the version, JSONL of {"ms": 0.41}; unset: '
                                           "measured here, one query a call.")  # fmt: skip
    flags.DEFINE_string("baseline_latencies", None, "Requests that the champion served at the same time.")
    flags.DEFINE_integer("calls", 2000, "Calls to measure; 0: none, which holds.", lower_bound=0)
    flags.DEFINE_string("actor", None, "Who does it; your user name unless given.")
    flags.mark_flags_as_required(["run", "registry", "output"])


def main() -> None:
    """Looks, judges, logs; rolls back where the policy says so; then writes."""
    thresholds, output = policy.read(FLAGS.policy, CanaryPolicy), pathlib.Path(FLAGS.output)
    if (output / "config.json").exists():  # its TensorBoard logs would be mixed with ours
        raise InputError("this is a training folder", file=output, remedy="Name another --output")
    if FLAGS.baseline_latencies and not FLAGS.latencies:
        raise InputError("--baseline_latencies is of no use without --latencies")
    registry, who = Registry(open_store(FLAGS.registry), FLAGS.name), actor(FLAGS.actor)
    state = registry.state()
    state.refuse_changed_policy(thresholds.name, thresholds.digest)
    version, notices = state.version(FLAGS.version), list[str]()
    facts = {"run": FLAGS.run, "version": version.label, "model": version.model, "champion": state.champion,
             "reading": None, "notices": notices}  # fmt: skip
    reading, seen, made = _read_run(output), None, ""
    if isinstance(reading, InputError):
        checks = [canary.hold("run", f"it cannot be read: {reading}")]
    else:
        seen = _look(registry, state, version, reading, thresholds, notices)
        checks, made = canary.judge(seen, thresholds), canary.run_time(reading.summary["manifest"])
        facts |= {"run": _run_name(reading.summary), "reading": reading.summary}
    probe = seen.probe if seen else None
    result = canary.report(checks, thresholds, FLAGS.trigger, probe, files.finite(facts))
    event = canary.record(registry, version.label, result, who, made)
    if result["block"]["rolls_back"] and event.champion == version.label:  # before a full disk ends this
        _roll_back(registry, version.label, who, event.number)
    _write(result, output, event.number)
    say("\n" + canary.markdown(result))
    there = f"--registry={FLAGS.registry} --name={FLAGS.name}"
    done({"report": output / "canary.md", "as data": output / "canary.json", "event": event.number,
          "tensorboard": f"tensorboard --logdir={output / 'tensorboard'}"},
         [f"python -m experiments.registry show {there} --version={version.label}"])  # fmt: skip
    sys.exit(STATUS[result["status"]])


def _read_run(output: pathlib.Path) -> Reading | InputError:
    """The run, or why it cannot be read: a finding too, unless nothing at all is there."""
    if not os.path.lexists(FLAGS.run):
        raise InputError("no such run", file=FLAGS.run, remedy="Name a run folder or a JSONL file")
    try:
        found = runs.find_run(FLAGS.run)
    except InputError as error:
        return error
    runs.refuse_own_files(found, [output / "canary.json"])
    try:
        return runs.read_run(FLAGS.run, progress=reading_progress(FLAGS.run))
    except InputError as error:
        return error


def _look(
    registry: Registry,
    state: State,
    version: Version,
    reading: Reading,
    thresholds: CanaryPolicy,
    notices: list[str],
) -> Seen:
    """All that is judged."""
    tell_reading(reading.summary)
    ours, champion = registry.contents(version), _champion(registry, state, version)
    model, lists, run = artifact.assemble(ours), to_lists(reading.table), _run_name(reading.summary)
    scored = _score(model, lists, version.label, notices)
    theirs = _score(artifact.assemble(champion), lists, state.champion, notices) if champion else None
    served = _read_latencies(FLAGS.latencies), _read_latencies(FLAGS.baseline_latencies)
    if not (FLAGS.latencies or notices):
        served = _measure(ours, champion, lists)
        notices.append("latencies were measured here, by whatever else this computer does")
    reference = registry.files(version).get("reference.json")
    return Seen(
        lists=lists,
        scored=scored,
        reference=sketches.read(reference) if reference else None,
        champion=theirs,
        latencies=served[0],
        baseline_latencies=served[1],
        probe=_probe(registry, state, model, thresholds, run) if FLAGS.probe else None,
    )


def _roll_back(registry: Registry, label: str, who: str, number: int) -> None:
    """Back from a version, unless another is live by now."""
    try:
        registry.rollback(who, reason=f"the canary of event {number} was critical", expected=label)
    except InputError as error:
        warn(f"not rolled back: {error}")
    else:
        say(f"rolled back from {label}; live: {registry.state().champion or 'nothing of ours'}")


def _champion(registry: Registry, state: State, version: Version) -> Contents | None:
    """What is live, where that is another version and one of ours."""
    if state.champion in ("", version.label) or not state.version("champion").folder:
        return None
    return registry.contents(state.version("champion"))


def _score(model: Model, lists: Lists, label: str, notices: list[str]) -> Scored:
    """The scores; all undefined where the model refuses the run, which no check lets pass."""
    try:
        return artifact.score(model, lists)
    except InputError as error:
        notices.append(f"{label} cannot score this run: {error}")
        warn(notices[-1])
        return Scored(*(np.full(lists.where.shape, np.nan) for _ in Scored._fields))


def _measure(ours: Contents, theirs: Contents | None, lists: Lists) -> tuple[np.ndarray | None, ...]:
    """Milliseconds of calls of the scorer that serves, one query each: version and champion in turn."""
    scorers = [Scorer(contents) for contents in (ours, theirs) if contents]
    times = np.zeros((len(scorers), FLAGS.calls))
    for call in range(-WARM_UP if FLAGS.calls else 0, FLAGS.calls):
        for scorer, row in zip(scorers, times, strict=True):
            start = time.perf_counter()
            scorer.score(*of_list(lists, call % len(lists.query_id)))
            row[max(call, 0)] = 1e3 * (time.perf_counter() - start)  # what warms up is overwritten
    return (*times, None)[:2] if FLAGS.calls else (None, None)


def _read_latencies(path: str | None) -> np.ndarray | None:
    """[N] milliseconds of a JSONL file."""
    if not path:
        return None
    found, number = list[float](), 0
    try:
        for line in pathlib.Path(path).read_bytes().splitlines():
            number += 1
            if line.strip():
                found.append(msgspec.json.decode(line, type=Request).ms)
    except IsADirectoryError:
        raise InputError('a folder, not a JSONL file of {"ms": 0.41}', file=path) from None
    except (FileNotFoundError, NotADirectoryError):
        raise InputError("no such file", file=path) from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        reason, field = explain(error)
        raise InputError(reason, file=path, line=number, field=field) from None
    return np.array(found)


def _probe(registry: Registry, state: State, model: Model, thresholds: CanaryPolicy, run: str) -> Probe:
    """Compliance@1 of the probe's queries, now and in earlier canaries."""
    table = dataset.read(FLAGS.probe, "test")
    learned = artifact.learned_from(model.seen, table)
    judging.refuse_overlap(f"{model.version} has learned", learned, FLAGS.probe)
    lists, kind = judging.labelled_lists(table, FLAGS.probe, "test")
    if kind != labels.GOLD:
        raise InputError(f"its labels are {kind}: Step 4's own scores say nothing about people",
                         file=FLAGS.probe, remedy="Name a dataset with gold labels")  # fmt: skip
    values = per_query(artifact.score(model, lists).logit, lists)["compliance@1"]
    now = {str(query): float(value) for query, value in zip(lists.query_id, values, strict=True)}
    return Probe(now, canary.earlier_probes(registry, state, thresholds.rolling_window, run))


def _run_name(summary: dict[str, Any]) -> str:
    return summary["manifest"]["run_id"] if summary["manifest"] else summary["input"]


def _write(result: dict[str, Any], output: pathlib.Path, step: int) -> None:
    files.write_json(output / "canary.json", result)
    with files.replacing(output / "canary.md") as temporary:
        temporary.write_text(canary.markdown(result))
    with SummaryWriter(output / "tensorboard") as writer:
        tag = lambda c: "/".join(
            [c["name"], c.get("domain", "all"), *([c["feature"]] if "feature" in c else [])]
        )
        writer.scalars({tag(c): c["value"] for c in result["checks"] if c["value"] is not None}, step)
        writer.scalars({"status": canary.ORDER.index(result["status"])}, step)
        writer.text("canary", canary.markdown(result), step)


if __name__ == "__main__":
    launch(main, define_flags)
