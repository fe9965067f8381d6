r"""The canary: does a version do on a new run what it did when it was registered?  Needs no labels.

    python -m experiments.canary --run=runs/latest --registry=registry --output=reports/canary
    python -m experiments.canary --run=runs/latest --registry=registry --version=challenger \
        --trigger=model_change --probe=data/probe --output=reports/canary

Writes canary.json, canary.md and TensorBoard logs, and logs the verdict in the registry.  Ends with
status 0 for pass or warning, 1 for critical, 3 for hold.
"""

import getpass
import pathlib
import sys
import time
from typing import Annotated, Any

import msgspec
import numpy as np
from absl import flags
from msgspec import Meta

from cotrr import files
from cotrr.config import launch
from cotrr.data import dataset, runs
from cotrr.data.lists import Lists, to_lists
from cotrr.data.rows import explain
from cotrr.deploy import canary, policy, sketches
from cotrr.deploy.canary import CanaryPolicy, Probe, Seen
from cotrr.deploy.registry import Registry, State, Version
from cotrr.deploy.scorer import Scorer, of_list
from cotrr.deploy.store import open_store
from cotrr.errors import InputError
from cotrr.evaluate.ranking import per_query
from cotrr.ranker import artifact, model_files
from cotrr.ranker.artifact import Model
from cotrr.ranker.calibrators import Scored
from cotrr.ranker.model_files import Contents
from cotrr.summaries import SummaryWriter
from experiments import loop
from experiments.terminal import done, reading_progress, say, tell_reading, warn

FLAGS = flags.FLAGS
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
    flags.DEFINE_string("policy", "experiments/policies/canary.json", "Thresholds.")
    flags.DEFINE_enum("trigger", "scheduled", canary.TRIGGERS, "What this canary was called for.")
    flags.DEFINE_string("probe", None, "Dataset folder; its test split is labelled queries that no version "
                                       "has learned from.")  # fmt: skip
    flags.DEFINE_string("latencies", None, 'Requests served by the version, JSONL of {"ms": 0.41}; unset: '
                                           "measured here, one query a call.")  # fmt: skip
    flags.DEFINE_string("baseline_latencies", None, "Requests that the champion served at the same time.")
    flags.DEFINE_integer("calls", 2000, "Calls to measure; 0: none, which holds.", lower_bound=0)
    flags.DEFINE_string("actor", None, "Who does it; your user name unless given.")
    flags.mark_flags_as_required(["run", "registry", "output"])


def main() -> None:
    """Reads, scores, judges, writes, logs; rolls back where the policy says so."""
    thresholds, output = policy.read(FLAGS.policy, CanaryPolicy), pathlib.Path(FLAGS.output)
    runs.refuse_own_files(runs.find_run(FLAGS.run), [output / "canary.json"])
    registry, actor = Registry(open_store(FLAGS.registry), FLAGS.name), FLAGS.actor or getpass.getuser()
    state = registry.state()
    version = state.version(FLAGS.version)
    content = registry.files(version)
    ours, champion = model_files.parse(content, version.label), _champion(registry, state, version)
    model = artifact.assemble(ours)
    reading = runs.read_run(FLAGS.run, progress=reading_progress(FLAGS.run))
    tell_reading(reading.summary)
    lists, notices = to_lists(reading.table), list[str]()
    scored = _score(model, lists, version.label, notices)
    theirs = _score(artifact.assemble(champion), lists, state.champion, notices) if champion else None
    served = _read_latencies(FLAGS.latencies), _read_latencies(FLAGS.baseline_latencies)
    if not (FLAGS.latencies or notices):
        served = _measure(ours, champion, lists)
        notices.append("latencies were measured here, by whatever else this computer does")
    seen = Seen(
        lists=lists,
        scored=scored,
        reference=sketches.read(content["reference.json"]) if "reference.json" in content else None,
        champion=theirs,
        latencies=served[0],
        baseline_latencies=served[1],
        probe=_probe(registry, state, model, thresholds) if FLAGS.probe else None,
    )
    checks = canary.judge(seen, thresholds)
    facts = {"run": _run_name(reading.summary), "version": version.label, "model": model.version,
             "champion": state.champion, "reading": reading.summary, "notices": notices}  # fmt: skip
    result = canary.report(checks, thresholds, FLAGS.trigger, seen.probe, files.finite(facts))
    event = canary.record(registry, version.label, result, actor)
    _write(result, output, event.number)
    say("\n" + canary.markdown(result))
    if result["block"]["rolls_back"] and registry.state().champion == version.label:
        registry.rollback(actor, reason=f"the canary of event {event.number} was critical")
        say(f"rolled back from {version.label}; live: {registry.state().champion or 'nothing of ours'}")
    there = f"--registry={FLAGS.registry} --name={FLAGS.name}"
    done({"report": output / "canary.md", "as data": output / "canary.json", "event": event.number,
          "tensorboard": f"tensorboard --logdir={output / 'tensorboard'}"},
         [f"python -m experiments.registry show {there} --version={version.label}"])  # fmt: skip
    sys.exit(STATUS[result["status"]])


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
            row[call] = 1e3 * (time.perf_counter() - start)  # what warms up is overwritten
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
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise InputError("no such file", file=path) from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        reason, field = explain(error)
        raise InputError(reason, file=path, line=number, field=field) from None
    return np.array(found)


def _probe(registry: Registry, state: State, model: Model, thresholds: CanaryPolicy) -> Probe:
    """Compliance@1 of the probe's queries, now and in earlier canaries."""
    table = dataset.read(FLAGS.probe, "test")
    loop.refuse_overlap(model, FLAGS.version, table, FLAGS.probe)
    lists, _ = loop.labelled_lists(table, FLAGS.probe, "test")
    values = per_query(artifact.score(model, lists).logit, lists)["compliance@1"]
    now = {str(query): float(value) for query, value in zip(lists.query_id, values, strict=True)}
    return Probe(now, canary.earlier_probes(registry, state, thresholds.rolling_window))


def _run_name(summary: dict[str, Any]) -> str:
    return summary["manifest"]["run_id"] if summary["manifest"] else summary["input"]


def _write(result: dict[str, Any], output: pathlib.Path, step: int) -> None:
    files.write_json(output / "canary.json", result)
    with files.replacing(output / "canary.md") as temporary:
        temporary.write_text(canary.markdown(result))
    files.remove(output, ["tensorboard"])
    with SummaryWriter(output / "tensorboard") as writer:
        tag = lambda c: "/".join(
            [c["name"], c.get("domain", "all"), *([c["feature"]] if "feature" in c else [])]
        )
        writer.scalars({tag(c): c["value"] for c in result["checks"] if c["value"] is not None}, step)
        writer.scalars({"status": canary.ORDER.index(result["status"])}, step)
        writer.text("canary", canary.markdown(result), step)


if __name__ == "__main__":
    launch(main, define_flags)
