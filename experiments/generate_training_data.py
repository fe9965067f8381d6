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
from experiments import options
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
    flags.DEFINE_bool("near_duplicates", True,
                      "Look for near duplicates: every picture of a split is compared with every one of the "
                      "others, which takes the product of their numbers; without, the certificate says that "
                      "nobody looked.")  # fmt: skip
    options.define_part_mb(None)
    options.define_workers()
    flags.mark_flags_as_required(["input", "output"])


def main() -> None:
    """Reads, splits, writes, certifies."""
    output = options.local_output(FLAGS.output)
    as_lines = output.suffix == ".jsonl"
    if output.suffix == ".gz" or not output.name:
        raise InputError(f"--output={FLAGS.output}: expected a folder, or a file that ends in .jsonl")
    if as_lines:
        options.refuse_parts("lines are not written in parts", "Name a folder as --output")
    elif not FLAGS.part_mb:
        options.refuse_parts("the run is read at once", "Set --part_mb to read it in parts")
    fractions = splits.parse_fractions(FLAGS.fractions)
    beside = output.with_name(output.name + ".quarantine.jsonl")
    quarantine = beside if FLAGS.on_bad_line == "quarantine" else None
    run = runs.find_run(FLAGS.input)
    runs.refuse_own_files(run, (output, *filter(None, [quarantine])))
    if as_lines == output.is_dir() and output.exists():
        raise InputError("a file or folder of the other kind is in the way", file=output)
    output.parent.mkdir(parents=True, exist_ok=True)
    say(f"reading {FLAGS.input}")
    make = _lines if as_lines else _in_parts if FLAGS.part_mb else _at_once
    result = make(run, output, fractions, quarantine)
    place = output.with_name(output.name + ".certificate.json") if as_lines else output / dataset.CERTIFICATE
    _report(result)
    train = (f"python -m experiments.train --data={output} --workdir=checkpoints/{output.name} "
             "--flagfile=experiments/recipes/cotrr_lite.flags")  # fmt: skip
    done({"lines" if as_lines else "dataset": output, "certificate": place}, [] if as_lines else [train])


Fractions = tuple[float, ...]
Quarantine = pathlib.Path | None  # the file for bad lines, where the first does not end the reading


def _in_parts(run: runs.Run, output: pathlib.Path, fractions: Fractions, quarantine: Quarantine) -> dict:
    """The certificate of a dataset, of which a few parts were in memory."""
    job = generation.Job(
        output=str(output.absolute()),
        part_bytes=round(1e6 * FLAGS.part_mb),
        fractions=fractions,
        compliance_weight=FLAGS.compliance_weight,
        split_salt=FLAGS.split_salt,
        split_method=FLAGS.split_method,
        near_duplicates=FLAGS.near_duplicates,
    )
    runs.refuse_own_files(run, [job.aside])
    run = runs.find_run(run.path.absolute())
    with shards.RUNNERS[FLAGS.runner](FLAGS.workers or shards.cores()) as runner:
        result = generation.generate(run, job, quarantine, runner, reading_progress(FLAGS.input))
    tell_reading(result["input"])
    return result


def _at_once(run: runs.Run, output: pathlib.Path, fractions: Fractions, quarantine: Quarantine) -> dict:
    """The certificate of a dataset whose rows were all in memory."""
    table, settings, summary = _prepared(run, fractions, quarantine)
    return dataset.write(table, output, settings, summary, near_duplicates=FLAGS.near_duplicates)


def _lines(run: runs.Run, output: pathlib.Path, fractions: Fractions, quarantine: Quarantine) -> dict:
    """The certificate of the run's own lines with their labels."""
    table, settings, summary = _prepared(run, fractions, quarantine)
    counts = dataset.write_lines(run, table, output)
    parts = {name: [table.filter(pc.equal(table["split"], name))] for name in splits.SPLITS}
    result = certificate.certify(
        parts, counts["dropped"], settings, summary, near_duplicates=FLAGS.near_duplicates
    )
    files.write_json(output.with_name(output.name + ".certificate.json"), result)
    return result


def _prepared(
    run: runs.Run, fractions: Fractions, quarantine: Quarantine
) -> tuple[pa.Table, dict[str, Any], dict[str, Any]]:
    """The labelled rows of a run, and the settings and the summary for their certificate."""
    reading = runs.read_run(FLAGS.input, quarantine=quarantine, progress=reading_progress(FLAGS.input))
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
