r"""The registry: what versions there are, what is live, on what evidence, and the way back.

    python -m experiments.registry register --registry=registry --model=checkpoints/cotrr_lite_v1 \
        --data=data/cotrr --report=reports/cotrr_lite_v1
    python -m experiments.registry promote --registry=registry --version=v1 --data=data/cotrr \
        --policy=experiments/policies/standard.json
    python -m experiments.registry rollback --registry=registry --reason="complaints"

register  a model folder becomes the next version, v1, v2, …; it never changes again
list      versions and what is live
show      one version: files, facts, what happened to it
promote   judges a version against the champion on a frozen test set; live only if the policy says so
alias     names a version `challenger` or `shadow` (--alias), or takes the name away (no --version)
rollback  makes what was live before live again, or --version among what was live before
history   what happened, or what was live at a moment: --at=2026-11-24T14:03
verify    reads every byte: exit status 1 where anything is wrong
export    writes Step 4's model_registry.json and deployments.json to --output
import    reads Step 4's --model_registry and --deployments into the log
mirror    pushes versions and aliases to an MLflow server, --tracking_uri

Promote ends with status 0 for PROMOTE, 1 for REJECT, 3 for HOLD.
"""

import datetime
import json
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

# Read when NumPy is imported: latency is measured as a serving process has it, one thread a product.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import msgspec
from absl import flags

from cotrr import files
from cotrr.config import launch
from cotrr.data import certificate, dataset
from cotrr.data.lists import Lists, to_lists
from cotrr.data.rows import explain
from cotrr.deploy import card, gate, mirror, policy, sketches, step4
from cotrr.deploy.registry import ALIASES, Draft, Event, Registry, State
from cotrr.deploy.scorer import Scorer, largest_difference
from cotrr.errors import InputError
from cotrr.evaluate.report import figure_text
from cotrr.ranker import artifact, model_files
from cotrr.store import open_store
from experiments import judging
from experiments.terminal import actor, done, say, warn

FLAGS = flags.FLAGS
POLICIES = pathlib.Path(__file__).parent / "policies"
STATUS = {"PROMOTE": 0, "REJECT": 1, "HOLD": 3}
LEFT_OUT = ("per_query", "units")  # of a judgement: evidence, too long to read
PARITY = 1e-5  # between the scorer that serves and the one that was evaluated


def define_flags() -> None:
    """Flags of this launcher."""
    flags.DEFINE_string("registry", None, "Registry: a folder, or a URL that fsspec knows.")
    flags.DEFINE_string("name", "cotrr", "Name of the model in the registry.")
    flags.DEFINE_string("version", None, "Version: v3, champion, challenger, shadow, or a model's version.")
    flags.DEFINE_string("model", None, "register: model folder, from train.")
    flags.DEFINE_string("data", None, "register, promote: dataset folder; its test split is the frozen test "
                                      "set, and what drift is measured against.")  # fmt: skip
    flags.DEFINE_string("report", None, "register: report folder of the model, from evaluate.")
    flags.DEFINE_string("description", "", "register: a sentence about the version.")
    flags.DEFINE_string("policy", str(POLICIES / "standard.json"), "promote: what must hold.")
    flags.DEFINE_string("experiment", None, "promote: experiment.json of an A/B test, from ab analyze.")
    flags.DEFINE_integer("seed", 0, "promote: seed of the bootstrap.", lower_bound=0,
                         upper_bound=2**32 - 1)  # fmt: skip
    flags.DEFINE_integer("resamples", 10_000, "promote: bootstrap resamples.", lower_bound=1000)
    flags.DEFINE_bool("quick", False, "promote: 1,000 resamples.")
    flags.DEFINE_enum("alias", None, ALIASES[1:], "alias: the name to set.")
    flags.DEFINE_string("reason", "", "rollback: why.")
    flags.DEFINE_string("expected", None, "rollback: only if this version is live.")
    flags.DEFINE_string("at", None, "history: a moment, ISO 8601; without a zone it is local time.")
    flags.DEFINE_string("output", None, "export: folder; promote: also write the judgement there.")
    flags.DEFINE_string("overlay_version", "none", "export: Step 4's overlay that serves.")
    flags.DEFINE_string("model_registry", None, "import: Step 4's model_registry.json.")
    flags.DEFINE_string("deployments", None, "import: Step 4's deployments.json.")
    flags.DEFINE_string("tracking_uri", None, "mirror: the MLflow server.")
    flags.DEFINE_string("actor", None, "Who does it; your user name unless given.")
    flags.mark_flags_as_required(["registry"])


def main(command: str) -> None:
    """Runs one command."""
    _needed("registry")
    COMMANDS[command](Registry(open_store(FLAGS.registry), FLAGS.name))


def register(registry: Registry) -> None:
    """Puts a model, its data certificate, drift reference, report and card into the registry."""
    folder, data = _needed("model"), _needed("data")
    content = model_files.read_files(folder)
    found = model_files.parse(content, folder)
    model, scorer = artifact.assemble(found), Scorer(found)
    passport, evaluation = dataset.read_certificate(data), _report(model)
    for breach in certificate.breaches(passport):
        warn(breach)
    table = dataset.read(data, "test")
    if what := artifact.learned_from(model.seen, table):
        raise InputError(f"{folder} has learned from {what} of the test split", file=data,
                         remedy="Name the dataset that it was trained on")  # fmt: skip
    lists = to_lists(table)
    say(f"sketching {lists.where.sum():,} candidates of {len(lists.query_id):,} queries")
    shoots = table["canonical_id"].to_numpy(zero_copy_only=False)
    reference = sketches.sketch(lists, artifact.score(model, lists), shoots)
    made = card.build(model, passport, evaluation)
    texts = {"certificate.json": passport, "reference.json": reference, "card.json": made,
             **({"report.json": evaluation} if evaluation else {})}  # fmt: skip
    content |= {name: _json(value) for name, value in texts.items()}
    content["card.md"] = card.markdown(made).encode()
    facts = {"description": FLAGS.description, "certificate": files.digest(passport),
             "config": model.config, "metrics": _metrics(evaluation),
             "numpy_parity": _parity(scorer, model, lists)}  # fmt: skip
    version = registry.register(content, facts, _actor())
    say(f"{version.label} is {version.model}")
    there = f"--registry={FLAGS.registry} --name={FLAGS.name} --version={version.label}"
    done({"version": version.label, "folder": f"{FLAGS.registry}/{FLAGS.name}/versions/{version.folder}"},
         [f"python -m experiments.registry promote {there} --data={data}"])  # fmt: skip


def list_versions(registry: Registry) -> None:
    """One line a version."""
    state = registry.state()
    for version in state.versions:
        marks = [alias for alias, label in state.aliases.items() if label == version.label]
        marks += ["blocked"] * (version.label in state.blocked) + ["Step 4's own"] * (not version.folder)
        say(f"{version.label:<5} {version.model:<32} {version.event.at[:19]}  {', '.join(marks)}".rstrip())
    _tell_live(state)


def show(registry: Registry) -> None:
    """All that is known of one version."""
    state = registry.state()
    version = state.version(_needed("version"))
    say(f"{version.label}  {version.model}")
    if version.folder:
        manifest = registry.manifest(version)
        for name, file in manifest.files.items():
            say(f"  {file.sha256[:16]}  {file.size:>12,}  {name}")
        for metric, figure in manifest.facts.get("metrics", {}).items():
            say(f"  {metric:<18} {figure_text(figure)}")
    for event in state.events:
        if version.label in (event.version, event.champion):
            _tell_event(event)


def promote(registry: Registry) -> None:
    """The gate: judges, logs the look, and moves the champion where all checks pass."""
    wanted, data = policy.read(FLAGS.policy, policy.Policy), _needed("data")
    table = dataset.read(data, "test")
    lists, label = judging.labelled_lists(table, data, "test")
    experiment = _read(pathlib.Path(FLAGS.experiment)) if FLAGS.experiment else None
    say(f"judging {_needed('version')} by {wanted.name} on {len(lists.query_id):,} queries")
    event, judgement = gate.promote(
        registry, FLAGS.version, gate.HeldOut(table, lists, label, dataset.read_certificate(data)),
        wanted, _actor(), experiment, FLAGS.seed, 1000 if FLAGS.quick else FLAGS.resamples,
    )  # fmt: skip
    _tell_judgement(judgement)
    wrote: dict[str, object] = {"event": event.number, "evidence": event.evidence["judgement"]}
    if FLAGS.output:
        path = pathlib.Path(FLAGS.output) / "judgement.json"
        files.write_json(path, judgement)
        wrote["judgement"] = str(path)
    _tell_live(registry.state())
    done(wrote, [f"python -m experiments.registry history --registry={FLAGS.registry} --name={FLAGS.name}"])
    sys.exit(STATUS[judgement["verdict"]])


def alias(registry: Registry) -> None:
    """Names a version challenger or shadow; without --version takes the name away."""
    name = _needed("alias")

    def draft(state: State) -> Draft:
        label = state.version(FLAGS.version).label if FLAGS.version else ""
        return Draft(kind="alias", actor=_actor(), version=label, facts={"alias": name})

    registry.append(draft)
    say(f"{name} is {registry.state().aliases.get(name, 'no version')}")


def rollback(registry: Registry) -> None:
    """What was live before is live again."""
    event = registry.rollback(_actor(), FLAGS.version, FLAGS.reason, FLAGS.expected)
    say(f"rolled back from {event.champion}")
    _tell_live(registry.state_after(event))


def history(registry: Registry) -> None:
    """What happened, or what was live at a moment."""
    state = registry.state()
    if FLAGS.at:
        try:
            moment = datetime.datetime.fromisoformat(FLAGS.at).astimezone()
        except (ValueError, OverflowError):
            raise InputError(f"--at={FLAGS.at}: expected a moment such as 2026-11-24T14:03") from None
        label = registry.live_at(moment)
        say(f"at {moment.isoformat()} {_live(state, label)}")
        return
    for event in state.events:
        _tell_event(event)
    _tell_live(state)


def verify(registry: Registry) -> None:
    """Reads every byte; exit status 1 where anything is wrong."""
    problems, notes = registry.verify()
    for note in notes:
        say(f"note: {note}")
    for problem in problems:
        say(f"WRONG {problem}")
    if problems:
        say(f"{len(problems)} problems")
        sys.exit(1)
    state = registry.state()
    say(f"all of {len(state.versions)} versions and {len(state.events)} events is as it was written")
    say(
        f"head {state.head or 'none'}: keep it elsewhere; only it shows whether the newest events are missing"
    )
    _tell_live(state)


def export(registry: Registry) -> None:
    """Writes Step 4's files."""
    folder = pathlib.Path(_needed("output"))
    step4.export(registry, FLAGS.overlay_version, folder)
    done({"versions": folder / "model_registry.json", "deployments": folder / "deployments.json"}, [])


def import_step4(registry: Registry) -> None:
    """Reads Step 4's files."""
    before = len(registry.state().events)
    step4.import_files(registry, _needed("model_registry"), _needed("deployments"), _actor())
    say(f"{len(registry.state().events) - before} events written")
    _tell_live(registry.state())


def push(registry: Registry) -> None:
    """Pushes to MLflow."""
    mirror.push(registry, _needed("tracking_uri"))
    say(f"{len(registry.state().versions)} versions are at {FLAGS.tracking_uri}")


COMMANDS: dict[str, Callable[[Registry], None]] = {
    "register": register, "list": list_versions, "show": show, "promote": promote, "alias": alias,
    "rollback": rollback, "history": history, "verify": verify, "export": export, "import": import_step4,
    "mirror": push,
}  # fmt: skip


def _needed(flag: str) -> str:
    value = getattr(FLAGS, flag)
    if not value:
        raise InputError(f"--{flag} is required here", remedy="See --help")
    return value


def _actor() -> str:
    return actor(FLAGS.actor)


def _json(value: Any) -> bytes:
    return (json.dumps(files.finite(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


class _Headline(msgspec.Struct):
    auc: dict[str, Any]
    ece: dict[str, Any]


class _About(msgspec.Struct):
    version: str


class _Report(msgspec.Struct):
    """The parts of a report that others rely on."""

    model: _About
    metrics: dict[str, dict[str, Any]]
    conflict: _Headline
    latency: dict[str, Any]


def _read(path: pathlib.Path, kind: Any = dict[str, Any]) -> Any:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise InputError("not there", file=path) from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        reason, field = explain(error)
        raise InputError(reason, file=path, field=field) from None


def _report(model: artifact.Model) -> dict[str, Any] | None:
    """The report that --report names, which must be about this model."""
    if not FLAGS.report:
        warn("without --report the card has no figures")
        return None
    path = pathlib.Path(FLAGS.report) / "report.json"
    about = _read(path, _Report).model.version
    if about != model.version:
        raise InputError(f"is about {about}, not {model.version}", file=path, field="model.version")
    return _read(path)


def _parity(scorer: Scorer, model: artifact.Model, lists: Lists) -> float:
    """The largest difference between the logits of NumPy and JAX; raises InputError above PARITY."""
    worst = largest_difference(scorer, artifact.logits(model, lists), lists)
    if not worst <= PARITY:
        raise InputError(f"the NumPy scorer is off by {worst:.2g}, more than {PARITY:g}", file=FLAGS.model)
    return worst


def _metrics(report: dict[str, Any] | None) -> dict[str, Any]:
    """A report's figures by the names that policies use."""
    if not report:
        return {}
    conflict = report["conflict"]
    latency = report["latency"].get("p95_ms")
    return {**report["metrics"], "conflict_auc": conflict["auc"], "conflict_ece": conflict["ece"],
            **({"latency_p95_ms": latency} if latency else {})}  # fmt: skip


def _tell_judgement(judgement: dict[str, Any]) -> None:
    incumbent = judgement["incumbent"]
    say(f"\nagainst {incumbent['label'] or 'no champion:'} {judgement['incumbent_system']}")
    say(f"  {'':<52} {'value':>9} {'bound':>9}")
    number = lambda value: "" if value is None else f"{value:.0f}" if value >= 1 else f"{value:+.4f}"
    for check in judgement["checks"]:
        more = f"; {check['more_queries']} more would decide it" if check["more_queries"] else ""
        line = (f"  {check['verdict']:<5} {check['check']:<46} {number(check['value']):>9} "
                f"{number(check['bound']):>9}  {check['why']}{more}")  # fmt: skip
        say(line.rstrip())
    say(f"\n{judgement['verdict']}")


def _tell_event(event: Event) -> None:
    short = lambda value: value[:12] if isinstance(value, str) and len(value) == 64 else value  # hashes
    facts = " ".join(f"{key}={short(value)}" for key, value in event.facts.items()
                     if isinstance(value, str | bool) and value)  # fmt: skip
    before = f" (live before: {event.champion or 'nothing'})" if event.kind in ("promote", "rollback") else ""
    say(f"{event.number:>4} {event.at[:19]}  {event.actor:<10} {event.kind:<9} {event.version or '-':<5}"
        f"{before} {facts}".rstrip())  # fmt: skip


def _live(state: State, label: str) -> str:
    return f"{label} was live ({state.version(label).model})" if label else "nothing of ours was live"


def _tell_live(state: State) -> None:
    label = state.champion
    say(
        f"live: {label} ({state.version(label).model})"
        if label
        else "live: nothing of ours; Step 4's own order"
    )


if __name__ == "__main__":
    launch(main, define_flags, commands=tuple(COMMANDS))
