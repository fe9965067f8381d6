r"""Rerank a run, labelled or not, with a trained model.

    python -m experiments.rerank --model=checkpoints/cotrr_lite_v1 --input=runs/latest \
        --output=reranked.jsonl

Writes the contract's lines, queries in input order, each query's candidates by their new rank: the
scored line as it came, without its two embeddings, and what the contract adds.

With an --output that does not end in .jsonl (a folder, or a URL such as s3://bucket/path) a run of any
size is reranked in parts of whole queries, whose lines must stand together, by --workers processes or on
a Ray cluster (--runner=ray).  Killed and called again, it goes on where it was, and the parts, one after
another, are the same bytes.
"""

import pathlib
import time

from absl import flags

from cotrr import files, shards
from cotrr.config import launch
from cotrr.data import runs
from cotrr.data.lists import to_lists
from cotrr.deploy import rerank
from cotrr.errors import InputError
from cotrr.ranker import model_files
from experiments import options
from experiments.terminal import done, reading_progress, say, tell_reading, warn

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Flags of this launcher."""
    flags.DEFINE_string("model", None, "Model folder, from train.")
    flags.DEFINE_string("input", None, "Run folder (or a link to one), or a bare JSONL file.")
    flags.DEFINE_string("output", None, "A .jsonl file for the reranked lines, or a folder for their parts.")
    flags.DEFINE_integer("top_m", 20, "Rerank the first M lines of each query (the file's order is taken "
                                      "as Step 4's); the rest stay behind in order. 0 reranks all.",
                         lower_bound=0)  # fmt: skip
    flags.DEFINE_enum("on_bad_line", "fail", ["fail", "quarantine"],
                      "What to do with a line that breaks the contract.")  # fmt: skip
    options.define_part_mb(32)
    options.define_workers()
    flags.mark_flags_as_required(["model", "input", "output"])


def main() -> None:
    """Reads, scores, writes."""
    output = pathlib.Path(FLAGS.output)
    quarantine = output.with_name(output.name + ".quarantine.jsonl") if output.name else output
    as_lines = output.suffix == ".jsonl"
    if as_lines and options.local_output(FLAGS.output).is_dir():
        raise InputError(f"--output={FLAGS.output}: expected a file, not a folder")
    if not output.name:
        raise InputError(f"--output={FLAGS.output}: expected a file or a folder")
    if as_lines:
        options.refuse_parts("one file is not written in parts", "Name a folder as --output")
    version = model_files.parse(model_files.read_files(FLAGS.model), FLAGS.model).facts["version"]
    runs.refuse_own_files(runs.find_run(FLAGS.input), (output, quarantine))
    say(f"reading {FLAGS.input}")
    queries, behind = _at_once(output, quarantine) if as_lines else _in_parts(version)
    if behind:
        warn(f"in {behind} of {queries} queries the highest rerank_score stands behind line "
             f"{FLAGS.top_m} and stays there: --top_m=0 reranks whole lists, as evaluate does")  # fmt: skip
    done({"reranked": f"{FLAGS.output}  (model {version})"}, [])


def _at_once(output: pathlib.Path, quarantine: pathlib.Path) -> tuple[int, int]:
    """Queries, and those whose highest score was left behind; the run is in memory as a whole."""
    from cotrr.ranker import artifact  # and with it JAX, of which parts need nothing

    model = artifact.load(FLAGS.model)
    reading = runs.read_run(
        FLAGS.input,
        quarantine=quarantine if FLAGS.on_bad_line == "quarantine" else None,
        keep_lines=True,
        progress=reading_progress(FLAGS.input),
    )
    tell_reading(reading.summary)
    lists = to_lists(reading.table)
    start = time.monotonic()
    scored = artifact.score(model, lists)
    say(f"scored {lists.where.sum():,} candidates of {len(lists.query_id):,} queries "
        f"in {time.monotonic() - start:.1f} s")  # fmt: skip
    with files.replacing(output) as temporary, open(temporary, "wb") as out:
        out.writelines(rerank.lines(reading.table, lists, scored, FLAGS.top_m, model.version))
    return len(lists.query_id), rerank.left_behind(lists, scored, FLAGS.top_m)


def _in_parts(version: str) -> tuple[int, int]:
    """Queries, and those whose highest score was left behind; a few parts are in memory."""
    output = FLAGS.output if "://" in FLAGS.output else str(pathlib.Path(FLAGS.output).absolute())
    job = rerank.Job(str(pathlib.Path(FLAGS.model).absolute()), version, FLAGS.top_m,
                     FLAGS.on_bad_line == "quarantine", output, round(1e6 * FLAGS.part_mb))  # fmt: skip
    run = runs.find_run(files.place(FLAGS.input).absolute())
    start = time.monotonic()
    with shards.RUNNERS[FLAGS.runner](FLAGS.workers or shards.cores()) as runner:
        made = rerank.rerank_run(run, job, runner, reading_progress(FLAGS.input))
    say(f"scored {made['rows']:,} candidates of {made['queries']:,} queries in {len(made['parts']):,} parts "
        f"in {time.monotonic() - start:.1f} s")  # fmt: skip
    if made["quarantined"]:
        warn(f"{made['quarantined']} bad lines are in the parts' .quarantine.jsonl")
    return made["queries"], made["left_behind"]


if __name__ == "__main__":
    launch(main, define_flags)
