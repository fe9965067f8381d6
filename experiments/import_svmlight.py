r"""Turn published learning-to-rank data (svmlight lines) into a dataset for train and evaluate.

    python -m experiments.import_svmlight --train=S2.txt,S3.txt,S4.txt --validation=S5.txt --test=S1.txt \
        --output=data/ohsumed1

The splits are the ones that are given.  A line's features take the place of `image_embedding`, its grade
that of the reviewer's compliance.
"""

import pathlib

import numpy as np
from absl import flags

from cotrr import files
from cotrr.config import launch
from cotrr.data import certificate, dataset, splits, svmlight
from cotrr.errors import InputError
from experiments.terminal import done, say, warn

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Flags of this launcher."""
    flags.DEFINE_list("train", None, "Files to learn from, plain or .gz.")
    flags.DEFINE_list("validation", [], "Files to choose the epoch on; may be empty.")
    flags.DEFINE_list("test", [], "Files to evaluate on; may be empty.")
    flags.DEFINE_string("output", None, "Folder for the dataset.")
    flags.DEFINE_enum("gain", "linear", svmlight.GAINS,
                      "linear: y = grade / max; exponential: y = (2^grade − 1) / (2^max − 1).")  # fmt: skip
    flags.DEFINE_enum("normalize", "query", svmlight.NORMALIZATIONS,
                      "query: each feature from 0 to 1 in each query, as LETOR does; none: as they are, and "
                      "the largest units count most.")  # fmt: skip
    flags.DEFINE_list("group_files", [], "Group sizes, one file for each of --train, --validation and --test "
                      "in this order, where lines have no qid; unset: <file>.query beside each.")  # fmt: skip
    flags.mark_flags_as_required(["train", "output"])


def main() -> None:
    """Reads, writes, certifies."""
    output = pathlib.Path(FLAGS.output)
    if output.exists() and not output.is_dir():
        raise InputError("a file is in the way", file=output, remedy="Name a folder")
    sources = _read()
    table = svmlight.to_table(sources, FLAGS.gain, FLAGS.normalize)
    result = svmlight.write(table, output, _settings(sources), _summary(sources))
    for name, counts in result["counts"].items():
        say(f"  {name:<10} {counts['rows']:>8,} rows {counts['queries']:>7,} queries")
    for breach in certificate.breaches(result):
        warn(breach)
    done({"dataset": output, "certificate": output / dataset.CERTIFICATE},
         [f"python -m experiments.train --data={output} --workdir=checkpoints/{output.name} "
          "--flagfile=experiments/recipes/published.flags"])  # fmt: skip


def _read() -> list[svmlight.Source]:
    """All files, each named by its split, and by its number where the split has several."""
    if not FLAGS.train:
        raise InputError("--train=: expected at least one file")
    given = [(split, i, path) for split in splits.SPLITS for i, path in enumerate(FLAGS[split].value, 1)]
    groups = FLAGS.group_files or [None] * len(given)
    if len(groups) != len(given):
        raise InputError(
            f"--group_files={','.join(groups)}: {len(groups)} for {len(given)} files; expected one for each"
        )
    sources = []
    for (split, i, path), sizes in zip(given, groups, strict=True):
        say(f"reading {path}")
        name = split if len(FLAGS[split].value) == 1 else f"{split}{i}"
        table = svmlight.read(path, name, sizes)
        sources.append(svmlight.Source(split, name, pathlib.Path(path), table))
    return sources


def _settings(sources: list[svmlight.Source]) -> dict:
    """The settings that train and evaluate look for; the shares are those of the files that were given."""
    rows = np.array([sum(len(s.table.grade) for s in sources if s.split == name) for name in splits.SPLITS])
    shares = (rows / rows.sum()).tolist()
    cost = {"method": "given", "fractions": shares, "salt": None, "rows_dropped": 0, "share_dropped": 0.0,
            "largest_component_share": None}  # fmt: skip
    return {
        "compliance_weight": 1.0, "split_salt": None, "split_method": "given", "fractions": shares,
        "gain": FLAGS.gain, "normalize": FLAGS.normalize,
        "max_grade": max(float(s.table.grade.max()) for s in sources), "split": cost,
    }  # fmt: skip


def _summary(sources: list[svmlight.Source]) -> dict:
    return {
        "input": ",".join(str(s.path) for s in sources),
        "shards": [s.path.name for s in sources],
        "rows": sum(len(s.table.grade) for s in sources),
        "queries": sum(len(set(s.table.query)) for s in sources),
        "embedding_dim": max(s.table.features.shape[1] for s in sources),
        "hashes": {str(s.path): files.sha256(s.path) for s in sources},
    }


if __name__ == "__main__":
    launch(main, define_flags)
