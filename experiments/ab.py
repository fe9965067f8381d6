r"""Assign units to the models of an experiment, and judge what came of it.

    python -m experiments.ab assign --experiment=experiment.json --units=units.txt --output=assigned.jsonl
    python -m experiments.ab analyze --experiment=experiment.json --exposures=exposures.jsonl \
        --outcomes=outcomes.jsonl --output=reports/experiment

Look as often as you like: the intervals hold at all times together.  `analyze` writes experiment.json
(the verdict and what it rests on), experiment.md and TensorBoard curves.
"""

import datetime
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import flags

from cotrr import files
from cotrr.config import launch
from cotrr.deploy import ab
from cotrr.deploy import experiment as online
from cotrr.errors import InputError
from cotrr.summaries import SummaryWriter
from experiments.terminal import done, say, warn

FLAGS = flags.FLAGS
POINTS = 200  # of a curve in TensorBoard


def define_flags() -> None:
    """Flags of this launcher."""
    flags.DEFINE_string("experiment", None, "The experiment, a JSON file in Step 4's shape.")
    flags.DEFINE_string("units", None, "assign: a text file, one unit a line; or JSONL with a field `unit`.")
    flags.DEFINE_string("exposures", None, "analyze: JSONL, a line per served request.")
    flags.DEFINE_string("outcomes", None, "analyze: JSONL, a line per request and metric.")
    flags.DEFINE_string("preperiod", None, "analyze: JSONL of {unit, value} from before the experiment, "
                                           "which narrows the intervals.")  # fmt: skip
    flags.DEFINE_string("output", None, "assign: a JSONL file; analyze: a folder.")
    flags.mark_flags_as_required(["experiment", "output"])


def main(command: str) -> None:
    """Assigns or analyzes."""
    {"assign": assign, "analyze": analyze}[command]()


def assign() -> None:
    """Writes {experiment_id, unit, variant} of each unit, in the order of the input."""
    _require("units")
    if pathlib.Path(FLAGS.output).resolve() == pathlib.Path(FLAGS.units).resolve():
        raise InputError("--output would replace --units", file=FLAGS.units)
    experiment = online.read_experiment(FLAGS.experiment)
    units = _units(FLAGS.units)
    variants = online.variants(experiment, units)
    with files.replacing(FLAGS.output) as temporary, open(temporary, "w") as out:
        for unit, variant in zip(units, variants, strict=True):
            line = {"experiment_id": experiment.experiment_id, "unit": unit, "variant": variant}
            out.write(json.dumps(line, ensure_ascii=False) + "\n")
    say("  ".join(f"{name} {variants.count(name):,}" for name in sorted(set(variants))))
    done({"assigned": FLAGS.output}, [])


def analyze() -> None:
    """Reads the logs, judges, writes."""
    _require("exposures", "outcomes")
    output = pathlib.Path(FLAGS.output)
    if (output / "experiment.json").resolve() == pathlib.Path(FLAGS.experiment).resolve():
        raise InputError("--output would replace --experiment", file=FLAGS.experiment,
                         remedy="Name another folder")  # fmt: skip
    if (output / "config.json").exists():  # its TensorBoard logs would be replaced
        raise InputError("this is a training folder", file=output, remedy="Name another --output")
    experiment = online.read_experiment(FLAGS.experiment)
    exposures = online.read_exposures(FLAGS.exposures, experiment)
    outcomes = online.read_outcomes(FLAGS.outcomes, experiment)
    before = online.read_before(FLAGS.preperiod) if FLAGS.preperiod else None
    analysis = ab.analyse(experiment, exposures, outcomes, before, datetime.datetime.now(datetime.UTC))
    inputs = {name: getattr(FLAGS, name) for name in ("experiment", "exposures", "outcomes", "preperiod")}
    result = analysis.result | {
        "inputs": {
            name: {"file": path, "sha256": files.sha256(path)} for name, path in inputs.items() if path
        }
    }
    files.write_json(output / "experiment.json", result)
    with files.replacing(output / "experiment.md") as temporary:
        temporary.write_text(summary(result))
    files.remove(output, ["tensorboard"])
    with SummaryWriter(output / "tensorboard") as writer:
        log(writer, analysis)
    if result["status"] == "held":
        warn(f"held: {'; '.join(result['reasons'])}")
    say(f"{result['verdict']} ({result['status']})")
    for reason in result["reasons"]:
        say(f"  {reason}")
    done({"experiment": output / "experiment.json", "as text": output / "experiment.md",
          "tensorboard": f"tensorboard --logdir={output / 'tensorboard'}"},
         [f"python -m experiments.registry promote --registry=REGISTRY --data=DATA "
          f"--version={experiment.candidate_version} --experiment={output / 'experiment.json'}"]
         if result["verdict"] == "promote" else [])  # fmt: skip


def summary(result: Mapping[str, Any]) -> str:
    """The result as Markdown."""
    ratio, exposed, shadow = result["sample_ratio"], result["exposures"], result["shadow"]
    lines = [
        f"# {result['experiment_id']}: {result['verdict']} ({result['status']})", "",
        f"Candidate {result['candidate_version']} against baseline {result['baseline_version']}, "
        f"mode {result['mode']}, as of {result['analysed_at']}. Intervals of {100 * result['level']:g} %, "
        "which hold at all times together.", "",
        *(f"- {reason}" for reason in result["reasons"]), "",
        "| metric | baseline | candidate | difference | relative | units |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, row in result["metrics"].items():
        cells = [name.replace("|", "\\|"), *(_number(row.get(arm)) for arm in ratio["units"]),
                 _figure(row["difference"]), _figure(row["relative"]),
                 f"{sum(row['units'].values()):,}"]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    split = " to ".join(f"{count:,}" for count in ratio["units"].values())
    lines += ["", f"{exposed['requests']:,} requests of {exposed['units']:,} units; sample ratio {split}, "
                  f"p = {_number(ratio['p'])}."]  # fmt: skip
    left_out = {name: count for name, count in [*exposed.items(), *result["outcomes"].items()]
                if count and name not in ("requests", "units", "records")}  # fmt: skip
    lines += [f"- {count:,} {name.replace('_', ' ')}" for name, count in left_out.items()]
    if shadow:
        lines += ["", f"Shadow: in {shadow['requests']:,} requests the top lists share "
                      f"{shadow['top_k_overlap']:.3f}, and {shadow['same_top']:.3f} have the same best "
                      "item."]  # fmt: skip
    return "\n".join(lines) + "\n"


def log(writer: SummaryWriter, analysis: ab.Analysis) -> None:
    """The sequences as curves over the number of units."""
    for name, effect in analysis.effects.items():
        for i in _spread(len(effect.units)):
            band = {part: getattr(effect.change, part)[i] for part in effect.change._fields}
            writer.scalars({f"{name}/{part}": value for part, value in band.items()}, int(effect.units[i]))
    for i in _spread(len(analysis.sample_ratio)):
        writer.scalars({"sample_ratio/p": analysis.sample_ratio[i]}, int(i) + 1)


def _spread(count: int) -> np.ndarray:
    """At most POINTS of `count` positions, the last one included."""
    return np.unique(np.linspace(0, count - 1, POINTS).astype(int)) if count else np.empty(0, int)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _figure(figure: Mapping[str, Any]) -> str:
    """Value and interval, as far as there are any."""
    if figure["ci"] is None:
        return _number(figure["value"])
    return "{:+.4g} [{:+.4g}, {:+.4g}]".format(figure["value"], *figure["ci"])


def _require(*names: str) -> None:
    for name in names:
        if not getattr(FLAGS, name):
            raise InputError(f"--{name} is required. See --help")


def _units(path: str) -> list[str]:
    """Units of a text file or of JSONL lines, each once."""
    units: dict[str, None] = {}
    with open(path, "rb") as stream:
        for number, content in enumerate(stream, 1):
            try:
                text = content.decode().strip()
                unit = json.loads(text)["unit"] if text.startswith("{") else text
                if not isinstance(unit, str):
                    raise ValueError
                unit.encode()
            except (ValueError, KeyError, RecursionError):
                raise InputError(
                    "expected a unit, or JSON with a text `unit`", file=path, line=number
                ) from None
            if unit:
                units[unit] = None
    return list(units)


if __name__ == "__main__":
    launch(main, define_flags, commands=("assign", "analyze"))
