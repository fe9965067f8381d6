r"""Governance: exit status 0 where every rule holds, 1 with a list of breaches, 2 for bad input.

    python -m experiments.governance --data=data/cotrr --model=checkpoints/cotrr_lite_v1 \
        [--registry=registry] [--run=runs/latest] [--waive=photographers,broken_urls]

Measured again on the files themselves are leakage, labels, quotas and the point values of a report about
--data.  A report's intervals, tests and latencies, and what the gate once measured, are only compared
with what rests on them.  What cannot be told, such as who took the pictures of a run whose lines name
nobody, is unchecked, and no pass unless --waive names the rule; a breach cannot be waived.  RULES in
cotrr/deploy/rules.py say how each rule is read.
"""

import pathlib
import sys
from typing import Any

from absl import flags

from cotrr import files
from cotrr.config import launch
from cotrr.deploy import governance, policy
from cotrr.deploy.governance import Data
from cotrr.deploy.quotas import Quotas, check_run, read_sights
from cotrr.deploy.registry import Registry
from cotrr.deploy.rules import OF_REGISTRY, OF_REPORT, OF_RUN, RULES, Breach, unchecked
from cotrr.errors import InputError
from cotrr.evaluate.report import plain
from cotrr.ranker import artifact
from cotrr.store import open_store
from experiments.terminal import done, say, warn

FLAGS = flags.FLAGS
POLICIES = pathlib.Path(__file__).parent / "policies"
KINDS = {"breaches": ("breach:", say), "unchecked": ("unchecked:", say), "waived": ("WAIVED:", warn)}


def define_flags() -> None:
    """Flags of this launcher."""
    flags.DEFINE_string("data", None, "Dataset folder, from generate_training_data.")
    flags.DEFINE_string("model", None, "Model folder, beside what the registry has live and as challenger.")
    flags.DEFINE_string("registry", None, "Registry: a folder, or a URL that fsspec knows.")
    flags.DEFINE_string("name", "cotrr", "Name of the model in the registry.")
    flags.DEFINE_string("run", None, "Run that the data were made of; unset: where the certificate says.")
    flags.DEFINE_string("previous", None, "Earlier run, or dataset: what is in it is not new.")
    flags.DEFINE_string("policy", str(POLICIES / "governance.json"), "Quotas and rates of a run.")
    flags.DEFINE_string("policies", str(POLICIES), "Folder of the promotion policies.")
    flags.DEFINE_list("waive", [], "Rules that need not be checked where their data are missing: "
                                   f"{', '.join(RULES)}.")  # fmt: skip
    flags.DEFINE_string("output", None, "Folder for governance.json and governance.md.")
    flags.mark_flags_as_required(["data"])


def main() -> None:
    """Checks, tells, and ends with the status."""
    waived = {rule for rule in FLAGS.waive if rule}
    if strange := sorted(waived - RULES.keys()):
        raise InputError(f"--waive={','.join(strange)}: no such rule", remedy=f"Rules: {', '.join(RULES)}")
    if not (FLAGS.model or FLAGS.registry):
        raise InputError("give --model, --registry or both")
    wanted = policy.read(FLAGS.policy, Quotas)
    registry = Registry(open_store(FLAGS.registry), FLAGS.name) if FLAGS.registry else None
    data, found = governance.read_data(FLAGS.data)
    found += governance.check_data(data) + _check_run(data, wanted) + _check_models(data, registry)
    if registry:
        found += governance.check_registry(registry, data, FLAGS.policies)
    result = _result(found, waived, {*RULES} - ({*OF_REGISTRY} if not registry else set()))
    _tell(result)
    sys.exit(0 if result["passed"] else 1)


def _check_run(data: Data, wanted: Quotas) -> list[Breach]:
    """The rules about the run that the data were made of; unchecked where it is not there any more."""
    run = FLAGS.run or data.passport["input"].get("input")
    if not FLAGS.run and not (run and pathlib.Path(run).exists()):
        return unchecked(OF_RUN, data.folder, "the run is not there; name it by --run")
    earlier = read_sights(FLAGS.previous) if FLAGS.previous else []
    found = governance.check_origin(run, data)
    return found + check_run(run, read_sights(run), earlier, wanted)


def _check_models(data: Data, registry: Registry | None) -> list[Breach]:
    """The rules about --model, and about what is live and what challenges it, or the newest version."""
    found, content = [], governance.read_model(FLAGS.model) if FLAGS.model else {}
    model = artifact.parse(content, FLAGS.model).version if FLAGS.model else ""
    try:
        subjects = _registered(registry, model) if registry else {}
    except InputError as error:  # check_registry says what is broken
        subjects, found = {}, unchecked(["learned_from_test", *OF_REPORT], FLAGS.registry, str(error))
    if model and not any(version == model for version, _ in subjects.values()):
        subjects[FLAGS.model] = model, content
        found += governance.check_card(FLAGS.model, content)
    if not subjects:
        found += unchecked(["missing_card", "learned_from_test", *OF_REPORT], FLAGS.registry, "no version")
    for where, (_, content) in subjects.items():
        found += governance.check_model(where, content, data)
    return found


def _registered(registry: Registry, model: str) -> dict[str, tuple[str, dict[str, bytes]]]:
    """Model and files of the versions that are asked about, by where; check_registry sees their cards."""
    state = registry.state()
    ours = [version for version in state.versions if version.folder]
    live = {state.aliases.get("champion"), state.aliases.get("challenger")}
    chosen = [v for v in ours if v.model == model or v.label in live] or ([] if model else ours[-1:])
    return {f"{registry.name}/{v.label}": (v.model, registry.files(v)) for v in chosen}


def _result(found: list[Breach], waived: set[str], asked: set[str]) -> dict[str, Any]:
    """What was found, as JSON; only what is unchecked can be waived."""
    told: dict[str, list[dict[str, str]]] = {kind: [] for kind in KINDS}
    for breach in dict.fromkeys(found):
        kind = "breaches" if breach.checked else "waived" if breach.rule in waived else "unchecked"
        told[kind].append({"rule": breach.rule, "where": breach.where, "what": breach.what,
                           "remedy": RULES[breach.rule].remedy})  # fmt: skip
    lost = {breach.rule for breach in found}
    return {"passed": not (told["breaches"] or told["unchecked"]), **told,
            "held": [rule for rule in RULES if rule in asked - lost],
            "not_asked": [rule for rule in RULES if rule not in asked]}  # fmt: skip


def _tell(result: dict[str, Any]) -> None:
    for kind, (mark, tell) in KINDS.items():
        for row in result[kind]:
            tell(f"{mark} {row['where']}: {row['rule']}: {row['what']}. {row['remedy']}")
    counts = ", ".join(f"{len(result[kind])} {kind}" for kind in KINDS)
    say(f"{'passed' if result['passed'] else 'FAILED'}: {counts}, {len(result['held'])} rules hold")
    if FLAGS.output:
        output = pathlib.Path(FLAGS.output)
        files.write_json(output / "governance.json", result)
        with files.replacing(output / "governance.md") as temporary:
            temporary.write_text(_markdown(result))
        done({"result": output / "governance.md", "as data": output / "governance.json"}, [])


def _markdown(result: dict[str, Any]) -> str:
    lines = [f"# Governance: {'passed' if result['passed'] else 'FAILED'}"]
    for kind in KINDS:
        if result[kind]:
            lines += ["", f"## {kind.capitalize()}", ""]
            lines += ["| Rule | Where | What | Remedy |", "|---|---|---|---|"]
            lines += [f"| {' | '.join(map(plain, row.values()))} |" for row in result[kind]]
    lines += ["", "## Held", "", *(f"- **{rule}**: {RULES[rule].reading}" for rule in result["held"])]
    return "\n".join([*lines, "", f"Not asked: {', '.join(result['not_asked']) or 'nothing'}", ""])


if __name__ == "__main__":
    launch(main, define_flags)
