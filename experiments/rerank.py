r"""Rerank a run, labelled or not, with a trained model.

    python -m experiments.rerank --model=checkpoints/cotrr_lite_v1 --input=runs/latest \
        --output=reranked.jsonl

Writes the contract's lines, queries in input order, each query's candidates by their new rank: the
scored line as it came, without its two embeddings, and what the contract adds.
"""

import pathlib
import time

from absl import flags

from cotrr import files
from cotrr.config import launch
from cotrr.data import runs
from cotrr.data.lists import to_lists
from cotrr.deploy import rerank
from cotrr.errors import InputError
from cotrr.ranker import artifact
from experiments.terminal import done, reading_progress, say, tell_reading, warn

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Flags of this launcher."""
    flags.DEFINE_string("model", None, "Model folder, from train.")
    flags.DEFINE_string("input", None, "Run folder (or a link to one), or a bare JSONL file.")
    flags.DEFINE_string("output", None, "File for the reranked lines.")
    flags.DEFINE_integer("top_m", 20, "Rerank the first M lines of each query (the file's order is taken "
                                      "as Step 4's); the rest stay behind in order. 0 reranks all.",
                         lower_bound=0)  # fmt: skip
    flags.DEFINE_enum("on_bad_line", "fail", ["fail", "quarantine"],
                      "What to do with a line that breaks the contract.")  # fmt: skip
    flags.mark_flags_as_required(["model", "input", "output"])


def main() -> None:
    """Reads, scores, writes."""
    output = pathlib.Path(FLAGS.output)
    if output.is_dir() or not output.name:
        raise InputError(f"--output={FLAGS.output}: expected a file, not a folder")
    model = artifact.load(FLAGS.model)
    quarantine = output.with_name(output.name + ".quarantine.jsonl")
    runs.refuse_own_files(runs.find_run(FLAGS.input), (output, quarantine))
    say(f"reading {FLAGS.input}")
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
    behind = rerank.left_behind(lists, scored, FLAGS.top_m)
    if behind:
        warn(f"in {behind} of {len(lists.query_id)} queries the highest rerank_score stands behind line "
             f"{FLAGS.top_m} and stays there: --top_m=0 reranks whole lists, as evaluate does")  # fmt: skip
    done({"reranked": f"{output}  (model {model.version})"}, [])


if __name__ == "__main__":
    launch(main, define_flags)
