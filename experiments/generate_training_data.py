r"""Turn a Step 4 run into training data: Parquet by split, and a certificate of what was measured.

    python -m experiments.generate_training_data --input=runs/latest --output=data/cotrr

With an --output that ends in .jsonl, the run's own lines are written with `split`, `y` and `label`
added instead.
"""

import pathlib

from absl import flags

from cotrr.config import launch
from cotrr.data import certificate, dataset, runs, splits
from experiments.terminal import done, reading_progress, say, warn

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
    fractions = splits.parse_fractions(FLAGS.fractions)
    quarantine = output.with_name(output.name + ".quarantine.jsonl")
    say(f"reading {FLAGS.input}")
    reading = runs.read_run(
        FLAGS.input,
        quarantine=quarantine if FLAGS.on_bad_line == "quarantine" else None,
        progress=reading_progress(FLAGS.input),
    )
    _tell(reading.summary)
    settings = {name: FLAGS[name].value
                for name in ("compliance_weight", "split_salt", "split_method")}  # fmt: skip
    table, cost = dataset.prepare(
        reading.table, fractions, FLAGS.compliance_weight, FLAGS.split_salt, FLAGS.split_method
    )
    settings |= {"fractions": fractions, "split": cost}
    summary = reading.summary | {"hashes": dataset.hash_shards(runs.find_run(FLAGS.input))}
    if as_lines:
        counts = dataset.write_lines(runs.find_run(FLAGS.input), table, output)
        say(", ".join(f"{count} {name}" for name, count in counts.items()))
        done({"lines": output}, [])
        return
    result = dataset.write(table, output, settings, summary)
    _report(result, cost)
    done(
        {"dataset": output, "certificate": output / dataset.CERTIFICATE},
        [f"python -m experiments.train --data={output} --workdir=checkpoints/cotrr_lite_v1 "
         "--flagfile=experiments/recipes/cotrr_lite.flags"],
    )  # fmt: skip


def _tell(summary: dict) -> None:
    if summary["manifest"] is None:
        warn("a bare file without a manifest: nothing says whether it is complete")
    if summary["quarantined"]:
        warn(f"{summary['quarantined']} bad lines are in {summary['quarantine']}")
    for field, count in summary["unknown_fields"].items():
        warn(f"unknown field `{field}` on {count} lines: not used")
    if summary["absent_fields"]:
        say(f"missing everywhere: {', '.join(summary['absent_fields'])}")


def _report(result: dict, cost: dict) -> None:
    for name, counts in result["counts"].items():
        say(f"  {name:<10} {counts['rows']:>8,} rows {counts['queries']:>7,} queries "
            f"{counts['pictures']:>7,} pictures")  # fmt: skip
    say(f"  split by {cost['method']}: {result['rows_dropped']:,} rows dropped "
        f"({cost['share_dropped']:.1%})")  # fmt: skip
    for breach in certificate.breaches(result):
        warn(breach)


def run() -> None:
    """Console entry."""
    launch(main, define_flags)


if __name__ == "__main__":
    run()
