r"""Turn a Step 4 run into training data: Parquet by split, and a certificate of what was measured.

    python -m experiments.generate_training_data --input=runs/latest --output=data/cotrr

With an --output that ends in .jsonl, the run's own lines are written with `split`, `y` and `label`
added instead.

With --part_mb the run is read and written in parts of whole queries, whose lines must stand together, by
--workers processes or on a Ray cluster (--runner=ray): for runs that are larger than memory.  Killed and
called again, it goes on where it was; the rows, their splits and labels are the same as at once.
"""

import pathlib
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from absl import flags

from cotrr import files, shards
from cotrr.config import launch
from cotrr.data import certificate, dataset, generation, runs, splits
from cotrr.errors import InputError
from experiments.terminal import done, reading_progress, say, tell_reading, warn

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Flags of this launcher."""
    flags.DEFINE_string("input", None, "Run folder (or a link to one), or a bare JSONL file.")
    flags.DEFINE_string("output", None, "Folder for the dataset, or a file that ends in .jsonl.")
    flags.DEFINE_list("fractions", ["0.7", "0.15", "0.15"],
                      "Shares of train, validation, test; validation and test may be 0.")  # fmt: skip
    flags.DEFINE_float("compliance_weight", 0.7, "λ in y = λ·compliance + (1-λ)·(1-p_conflict).")
    flags.DEFINE_string("split_salt", "cotrr", "Key of the hash that splits; another salt, another split.")
    flags.DEFINE_enum("split_method", "auto", splits.METHODS,
                      "strict drops rows whose query and picture fall apart; components keeps "
                      "connected ones together; auto takes components where all are small.")  # fmt: skip
    flags.DEFINE_enum("on_bad_line", "fail", ["fail", "quarantine"],
                      "What to do with a line that breaks the contract.")  # fmt: skip
    flags.DEFINE_float("part_mb", None, "Megabytes of the run that are read at once, a worker's memory being "
                                        "some ten times that; unset: all.", lower_bound=0.001)  # fmt: skip
    flags.DEFINE_enum("runner", "local", sorted(shards.RUNNERS), "What works on the parts: processes of this "
                      "machine, or the Ray cluster at RAY_ADDRESS (unset: one of this machine).")  # fmt: skip
    flags.DEFINE_integer("workers", None, "Parts that are worked on at once; unset: one a core.",
                         lower_bound=1)  # fmt: skip
    flags.mark_flags_as_required(["input", "output"])


def main() -> None:
    """Reads, splits, writes, certifies."""
    output = pathlib.Path(FLAGS.output)
    as_lines = output.suffix == ".jsonl"
    if output.suffix == ".gz" or not output.name:
        raise InputError(f"--output={FLAGS.output}: expected a folder, or a file that ends in .jsonl")
    fractions = splits.parse_fractions(FLAGS.fractions)
    quarantine = output.with_name(output.name + ".quarantine.jsonl")
    run = runs.find_run(FLAGS.input)
    runs.refuse_own_files(run, (output, quarantine))
    if as_lines == output.is_dir() and output.exists():
        raise InputError("a file or folder of the other kind is in the way", file=output)
    output.parent.mkdir(parents=True, exist_ok=True)
    if as_lines and FLAGS.part_mb:
        raise InputError("--part_mb: lines are not written in parts", remedy="Name a folder as --output")
    say(f"reading {FLAGS.input}")
    make = _lines if as_lines else _in_parts if FLAGS.part_mb else _at_once
    result = make(run, output, fractions, quarantine)
    place = output.with_name(output.name + ".certificate.json") if as_lines else output / dataset.CERTIFICATE
    _report(result)
    train = (f"python -m experiments.train --data={output} --workdir=checkpoints/{output.name} "
             "--flagfile=experiments/recipes/cotrr_lite.flags")  # fmt: skip
    done({"lines" if as_lines else "dataset": output, "certificate": place}, [] if as_lines else [train])


Fractions = tuple[float, ...]


def _in_parts(run: runs.Run, output: pathlib.Path, fractions: Fractions, quarantine: pathlib.Path) -> dict:
    """The certificate of a dataset, of which a few parts were in memory."""
    job = generation.Job(
        output=str(output.absolute()),
        part_bytes=round(1e6 * FLAGS.part_mb),
        quarantine=FLAGS.on_bad_line == "quarantine",
        fractions=fractions,
        compliance_weight=FLAGS.compliance_weight,
        split_salt=FLAGS.split_salt,
        split_method=FLAGS.split_method,
    )
    run = runs.find_run(run.path.absolute())
    with shards.RUNNERS[FLAGS.runner](FLAGS.workers or shards.cores()) as runner:
        result = generation.generate(run, job, quarantine, runner, reading_progress(FLAGS.input))
    tell_reading(result["input"])
    return result


def _at_once(run: runs.Run, output: pathlib.Path, fractions: Fractions, quarantine: pathlib.Path) -> dict:
    """The certificate of a dataset whose rows were all in memory."""
    table, settings, summary = _prepared(run, fractions, quarantine)
    return dataset.write(table, output, settings, summary)


def _lines(run: runs.Run, output: pathlib.Path, fractions: Fractions, quarantine: pathlib.Path) -> dict:
    """The certificate of the run's own lines with their labels."""
    table, settings, summary = _prepared(run, fractions, quarantine)
    counts = dataset.write_lines(run, table, output)
    parts = {name: [table.filter(pc.equal(table["split"], name))] for name in splits.SPLITS}
    result = certificate.certify(parts, counts["dropped"], settings, summary)
    files.write_json(output.with_name(output.name + ".certificate.json"), result)
    return result


def _prepared(
    run: runs.Run, fractions: Fractions, quarantine: pathlib.Path
) -> tuple[pa.Table, dict[str, Any], dict[str, Any]]:
    """The labelled rows of a run, and the settings and the summary for their certificate."""
    aside = quarantine if FLAGS.on_bad_line == "quarantine" else None
    reading = runs.read_run(FLAGS.input, quarantine=aside, progress=reading_progress(FLAGS.input))
    tell_reading(reading.summary)
    table, cost = dataset.prepare(
        reading.table, fractions, FLAGS.compliance_weight, FLAGS.split_salt, FLAGS.split_method
    )
    settings = {name: FLAGS[name].value for name in ("compliance_weight", "split_salt", "split_method")}
    settings |= {"fractions": fractions, "split": cost}
    return table, settings, reading.summary | {"hashes": dataset.hash_files(run)}


def _report(result: dict) -> None:
    cost = result["settings"]["split"]
    for name, counts in result["counts"].items():
        say(f"  {name:<10} {counts['rows']:>8,} rows {counts['queries']:>7,} queries "
            f"{counts['pictures']:>7,} pictures")  # fmt: skip
    for name, share in zip(splits.SPLITS, cost["fractions"], strict=True):
        if share and not result["counts"][name]["rows"]:
            warn(f"the {name} split is empty: too few queries and pictures for a share of {share:g}")
    share = f"{result['rows_dropped']:,} rows ({cost['share_dropped']:.1%})"
    say(f"  split by {cost['method']}: {share} dropped, "
        "whose query and picture fall into different splits")  # fmt: skip
    for breach in certificate.breaches(result):
        warn(breach)


if __name__ == "__main__":
    launch(main, define_flags)
