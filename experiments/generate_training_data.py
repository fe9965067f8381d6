r"""Turn a Step 4 run into training data: Parquet by split, and a certificate of what was measured.

    python -m experiments.generate_training_data --input=runs/latest --output=data/cotrr

With an --output that ends in .jsonl, the run's own lines are written with `split`, `y` and `label`
added instead.
"""

import pathlib

import pyarrow.compute as pc
from absl import flags

from cotrr import files
from cotrr.config import launch
from cotrr.data import certificate, dataset, runs, splits
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
    say(f"reading {FLAGS.input}")
    reading = runs.read_run(
        FLAGS.input,
        quarantine=quarantine if FLAGS.on_bad_line == "quarantine" else None,
        progress=reading_progress(FLAGS.input),
    )
    tell_reading(reading.summary)
    table, cost = dataset.prepare(
        reading.table, fractions, FLAGS.compliance_weight, FLAGS.split_salt, FLAGS.split_method
    )
    settings = {name: FLAGS[name].value for name in ("compliance_weight", "split_salt", "split_method")}
    settings |= {"fractions": fractions, "split": cost}
    summary = reading.summary | {"hashes": dataset.hash_files(run)}
    if as_lines:
        counts = dataset.write_lines(run, table, output)
        parts = {name: table.filter(pc.equal(table["split"], name)) for name in splits.SPLITS}
        result = certificate.certify(parts, counts["dropped"], settings, summary)
        place = output.with_name(output.name + ".certificate.json")
        files.write_json(place, result)
    else:
        result = dataset.write(table, output, settings, summary)
        place = output / dataset.CERTIFICATE
    _report(result, cost)
    train = (f"python -m experiments.train --data={output} --workdir=checkpoints/{output.name} "
             "--flagfile=experiments/recipes/cotrr_lite.flags")  # fmt: skip
    done({"lines" if as_lines else "dataset": output, "certificate": place}, [] if as_lines else [train])


def _report(result: dict, cost: dict) -> None:
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
