r"""How fast runs are read and datasets become arrays, beside other readers, in one run on this machine.

    pip install -r benchmarks/requirements.txt
    python -m benchmarks.ingest --output=ingest.json

Lines hold two embeddings of 512 floats, a query's candidates repeat its text embedding, as Step 4's do.
`ours` checks everything that the contract asks for, finds duplicates and contradictions, and ends in a
table; `unlike` reads lines none of which repeats an embedding, and `alone` stands for one process.
DuckDB gets explicit columns (its reader's fastest way) and two threads, polars finds the columns out, and
orjson with `np.array` is the loop that one would write; none of them checks values, keys or lengths.
What no reader that rests on simdjson can beat is told as well, for one process: the lines of `unlike`
taken from the file, and these lines parsed, with nothing done with what they say.

A dataset's embeddings become matrices of all rows, or the padded lists that training takes (to which the
text embedding of a query goes once); both check the file's SHA-256, as training does, `unchecked` does
not.  `of lists` are the same rows in a file of lists of floats with zstd, unchecked.

A round runs every reader once, and a ratio is the median of the rounds' ratios: the machine's other work
disturbs it less than it does the megabytes.  Less still does it disturb the time that the reader's threads
and processes spent on the cores, together.
"""

import collections
import functools
import json
import pathlib
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from absl import flags

from cotrr import files, shards
from cotrr.config import launch
from cotrr.data import dataset, runs
from cotrr.data.lists import to_lists
from cotrr.data.rows import EMBEDDINGS, Piece, embedding_matrix, lines_of
from experiments.terminal import say

FLAGS = flags.FLAGS
DIM = 512


def define_flags() -> None:
    """Flags of this benchmark."""
    flags.DEFINE_integer("megabytes", 400, "Size of the run.", lower_bound=1)
    flags.DEFINE_integer("rounds", 5, "Rounds, of which the medians are told.", lower_bound=1)
    flags.DEFINE_string("output", None, "JSON file for the figures.")


def main() -> None:
    """Writes a run, reads it in every way, and tells the medians."""
    with tempfile.TemporaryDirectory() as folder:
        like, unlike = (pathlib.Path(folder, f"{name}.jsonl") for name in ("like", "unlike"))
        write_run(like, FLAGS.megabytes, candidates=50)
        write_run(unlike, FLAGS.megabytes, candidates=1)
        facts: dict[str, Any] = {"cores": shards.cores(), "megabytes": FLAGS.megabytes}
        facts["jsonl"] = race(readers(like, unlike), FLAGS.megabytes, "MB/s", against="duckdb")
        table = runs.read_run(like).table
        arrays = array_readers(table, pathlib.Path(folder, "data"))
        facts["parquet"] = race(*arrays, "MB/s of embeddings", "of lists")
    if FLAGS.output:
        files.write_json(FLAGS.output, facts)


def write_run(path: pathlib.Path, megabytes: float, candidates: int) -> None:
    """A bare run of about this size; embeddings are written as float32 mostly are, with 9 digits."""
    random, size, query = np.random.default_rng(0), 0, 0
    pool = [_numbers(random) for _ in range(1000)]
    with open(path, "w") as out:
        while size < 1e6 * megabytes:
            text = pool[query % len(pool)]
            for item in range(candidates):
                picture = int(random.integers(len(pool)))
                fields = {"query_id": f"q{query}", "query": f"query {query}", "domain": f"d{query % 9}",
                          "constraints": {"color": "pink", "glass": "coupe"}, "id": f"p{picture}-{item}",
                          "canonical_id": f"p{picture}", "url": f"https://pictures/{picture}.jpg",
                          "subject_ratio": 0.37, "object_area": 0.21, "color_delta_e": 12.25, "contrast": 0.5,
                          "compliance_score": 0.61, "conflict_score": 0.4, "conflict_prob": 0.25,
                          "conflicts": [{"type": "ice", "severity": "soft", "confidence": 0.8}],
                          "dual_score": 0.71, "clip_score": 0.31,
                          "review": {"compliance": 0.65, "conflict": 0, "conflict_types": []}}  # fmt: skip
                start = json.dumps(fields)[:-1]
                size += out.write(
                    f'{start}, "text_embedding": {text}, "image_embedding": {pool[picture]}}}\n'
                )
            query += 1


def _numbers(random: np.random.Generator) -> str:
    vector = random.normal(size=DIM)
    return json.dumps([float(f"{x:.9g}") for x in (vector / np.linalg.norm(vector))])


def readers(like: pathlib.Path, unlike: pathlib.Path) -> dict[str, Callable[[], object]]:
    """Ways to read a run, by name."""
    found = {
        "ours": lambda: runs.read_run(like, workers=shards.cores()),
        "ours alone": lambda: runs.read_run(like, workers=1),
        "unlike": lambda: runs.read_run(unlike, workers=shards.cores()),
        "unlike alone": lambda: runs.read_run(unlike, workers=1),
        "lines": lambda: _exhaust(_lines(unlike)),
        "simdjson": lambda: _exhaust(map(_simdjson_parser(), _lines(unlike))),
        "orjson": functools.partial(_orjson, like),
        "duckdb": functools.partial(_duckdb, like),
        "polars": functools.partial(_polars, like),
    }
    return {name: work for name, work in found.items() if name not in PEERS or _there(name)}


PEERS = ("simdjson", "orjson", "duckdb", "polars")


def _there(name: str) -> bool:
    try:
        __import__(name)
        return True
    except ImportError:
        say(f"{name} is not installed: skipped")
        return False


def _lines(path: pathlib.Path) -> Iterator[bytes]:
    return lines_of(Piece(str(path), 0, path.stat().st_size))


def _simdjson_parser() -> Callable[[bytes], object]:
    import simdjson

    return simdjson.Parser().parse


def _exhaust(items: Iterable[object]) -> None:
    collections.deque(items, maxlen=0)


def _orjson(path: pathlib.Path) -> list[tuple[dict, np.ndarray, np.ndarray]]:
    import orjson

    rows = []
    with open(path, "rb") as stream:
        for line in stream:
            row = orjson.loads(line)
            image, text = (np.array(row.pop(f"{name}_embedding"), np.float32) for name in ("image", "text"))
            rows.append((row, image, text))
    return rows


def _duckdb(path: pathlib.Path) -> pa.Table:
    import duckdb

    number, vector = "DOUBLE", "FLOAT[]"
    columns = {name: "VARCHAR" for name in ("query_id", "query", "domain", "id", "canonical_id", "url")}
    columns |= dict.fromkeys(("subject_ratio", "object_area", "color_delta_e", "contrast",
                              "compliance_score", "conflict_score", "conflict_prob", "dual_score",
                              "clip_score"), number)  # fmt: skip
    columns |= {
        "constraints": "JSON",
        "conflicts": "STRUCT(type VARCHAR, severity VARCHAR, confidence DOUBLE)[]",
        "review": "STRUCT(compliance DOUBLE, conflict TINYINT, conflict_types VARCHAR[])",
        "image_embedding": vector,
        "text_embedding": vector,
    }
    with duckdb.connect(config={"threads": shards.cores()}) as connection:
        found = connection.read_json(str(path), format="newline_delimited", columns=columns)
        return found.to_arrow_table()


def _polars(path: pathlib.Path) -> Any:
    import polars

    return polars.read_ndjson(path)


def array_readers(table: pa.Table, folder: pathlib.Path) -> tuple[dict[str, Callable[[], object]], float]:
    """Ways from a dataset to arrays, and the megabytes of the embeddings of its rows."""
    table, _ = dataset.prepare(table, (1.0, 0.0, 0.0), 0.7, "", "strict")
    place, as_lists = folder / "train.parquet", folder / "lists.parquet"
    dataset.write(table, folder, {}, {})
    pq.write_table(dataset.load(place), as_lists, compression="zstd")
    matrices = lambda table: [embedding_matrix(table, name) for name in EMBEDDINGS]
    return {
        "matrices": lambda: matrices(dataset.read(folder, "train")),
        "padded lists": lambda: to_lists(dataset.read(folder, "train")),
        "unchecked": lambda: matrices(dataset.load(place)),
        "of lists": lambda: matrices(dataset.load(as_lists)),
    }, 2 * 4 * DIM * len(table) / 1e6


def race(
    contenders: dict[str, Callable[[], object]], megabytes: float, unit: str, against: str
) -> dict[str, dict[str, float]]:
    """Median rate of each contender, and the medians of its ratios to one of them, by clock and by cores."""
    spent: dict[str, list[np.ndarray]] = {name: [] for name in contenders}
    for number in range(FLAGS.rounds + 1):
        for name, work in contenders.items():
            start = _seconds()
            work()
            if number:  # the first round fills caches
                spent[name].append(_seconds() - start)
    facts = {}
    for name, ours in spent.items():
        facts[name] = {"rate": megabytes / statistics.median(clock for clock, _ in ours)}
        if against in spent:
            by_clock, by_cores = np.median(np.divide(spent[against], ours), axis=0).tolist()
            facts[name] |= {f"ratio to {against}": by_clock, "by cores": by_cores}
        say(f"  {name:<18}" + "  ".join(f"{key} {value:8.2f}" for key, value in facts[name].items()))
    say(f"  ({unit})")
    return facts


def _seconds() -> np.ndarray:
    """[2]: of the clock, and of cores that this process and its children, ended ones, have had."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return np.array([time.perf_counter(), sum(each.ru_utime + each.ru_stime for each in used)])


if __name__ == "__main__":
    launch(main, define_flags)
