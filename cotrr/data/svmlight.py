"""Published learning-to-rank data: svmlight lines `grade qid:17 1:0.5 3:0.25 # comment` as our table.

The format is Joachims' SVMlight with LETOR's `qid`; LightGBM keeps the queries in a file of group sizes.
"""

import array
import collections
import pathlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cotrr import files
from cotrr.data import certificate, dataset, labels, rows, runs, splits
from cotrr.data.contract import ATTRIBUTES
from cotrr.errors import InputError

DOMAIN = "svmlight"
GAINS = ("linear", "exponential")
NORMALIZATIONS = ("none", "query")
LARGEST = 2**30  # numbers in a dense matrix: 4 GiB of float32
_NUMBER = rb"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?"
_QUERY = rb"qid:([^\s:]+)"
_PAIR = rb"\d{1,9}:" + _NUMBER
_LINE = re.compile(rb"\s*(%b)(?:\s+%b)?((?:\s+%b)*)\s*" % (_NUMBER, _QUERY, _PAIR))
_DOCID = re.compile(r"docid\s*=\s*(\S+)")
_FIX = "Mend the line: grade qid:<query> <index>:<number> … # comment"


class Table(NamedTuple):
    """N rows of d features, each query's together; a feature that a line leaves out is 0."""

    grade: np.ndarray  # [N] float64, at least 0
    query: np.ndarray  # [N] object: the qid as it is written
    features: np.ndarray  # [N, d] float32; d is the largest index
    comment: np.ndarray  # [N] object: what follows `#`, or ""
    line: np.ndarray  # [N] int64: line number in the file


class Source(NamedTuple):
    """One file that was read: the split it belongs to, and a name that no other file has."""

    split: str
    name: str
    path: pathlib.Path
    table: Table


class _Raw(NamedTuple):
    """What the lines of a file say, before it is checked; numbers are index, value, index, …"""

    grade: list[float]
    query: list[str | None]
    count: list[int]
    comment: list[str]
    line: list[int]
    numbers: array.array


def read(
    path: str | pathlib.Path, name: str | None = None, groups: str | pathlib.Path | None = None
) -> Table:
    """Reads svmlight lines, `.gz` as well; raises InputError naming file, line and field.

    svmlight writes no zeros: absent features are 0.  Without `qid`s, the queries are `<name>-1`, … of
    the sizes in `groups`, or else in `<path>.query`.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise InputError("no such file", file=path)
    raw = _parse(path)
    if not raw.line:
        raise InputError("no rows: the file is empty, or holds comments alone", file=path)
    features = _densify(raw, path)
    if groups is not None and any(raw.query):
        raise InputError(
            "the lines have their own qid, so group sizes are not for this file",
            file=path,
            remedy="Leave it out of --group_files",
        )
    if any(raw.query):
        query = _check_contiguous(raw, path)
    else:
        query = _group(raw, path, name or path.name.removesuffix(".gz"), groups)
    return Table(np.array(raw.grade), query, features, np.array(raw.comment, object), np.array(raw.line))


def _parse(path: pathlib.Path) -> _Raw:
    raw = _Raw([], [], [], [], [], array.array("d"))
    for line in runs.read_lines(runs.Run(path, (path,), None)):
        head, _, comment = line.content.partition(b"#")
        if not head.strip():
            continue
        match = _LINE.fullmatch(head)
        if match is None or not 0 <= (grade := float(match[1])) < np.inf:
            raise _explain(head, line)
        numbers = match[3].replace(b":", b" ").split()
        raw.grade.append(grade)
        raw.query.append(_decode(match[2], line) if match[2] else None)
        raw.count.append(len(numbers) // 2)
        raw.comment.append(comment.decode(errors="replace").strip())
        raw.line.append(line.number)
        raw.numbers.extend(map(float, numbers))
    return raw


def _decode(qid: bytes, line: rows.Line) -> str:
    try:
        return qid.decode()
    except UnicodeDecodeError:
        raise InputError("not UTF-8", file=line.file, line=line.number, field="qid", remedy=_FIX) from None


def _explain(head: bytes, line: rows.Line) -> InputError:
    """The first thing that is wrong with a line that is not as it should be."""

    def bad(reason: str, field: str | None = None, remedy: str | None = _FIX) -> InputError:
        return InputError(reason, file=line.file, line=line.number, field=field, remedy=remedy)

    if head.startswith(b"\xef\xbb\xbf"):
        return bad("begins with a byte-order mark", remedy="Save the file as UTF-8 without one")
    if head.startswith(b"\x1f\x8b"):
        return bad("this is gzip", remedy="Let the file's name end in .gz")
    grade, *tokens = head.split()
    if (value := _number(grade)) is None:
        return bad(f"{_show(grade)} is not a number", "grade")
    if not np.isfinite(value):
        return bad(f"{_show(grade)} is not a finite number", "grade")
    if value < 0:
        return bad(f"{_show(grade)} is negative", "grade", "Grades count from 0, the worst")
    if tokens and re.fullmatch(_QUERY, tokens[0]):
        del tokens[0]
    token = next(token for token in tokens if not re.fullmatch(_PAIR, token))
    index, colon, number = token.partition(b":")
    if index == b"qid":
        return bad(f"{_show(token)}: expected qid:<query>, once, right after the grade", "qid")
    if not colon or not re.fullmatch(rb"\d{1,9}", index):
        return bad(f"{_show(token)}: expected <index>:<number>, the index from 1 to 999999999", "feature")
    reason = "is not a number" if _number(number) is None else "is not a finite number"
    return bad(f"{_show(number)} {reason}", f"feature {int(index)}")


def _number(token: bytes) -> float | None:
    """A number, or one of the words for what is none; None for anything else."""
    if re.fullmatch(_NUMBER, token) or re.fullmatch(rb"(?i)[-+]?(nan|inf|infinity)", token):
        return float(token)
    return None


def _show(token: bytes) -> str:
    text = token.decode(errors="replace")
    return repr(text if len(text) <= 40 else text[:40] + "…")


def _densify(raw: _Raw, path: pathlib.Path) -> np.ndarray:
    """[N, d] float32; raises InputError for an index out of order or a number float32 cannot hold."""
    pairs = np.array(raw.numbers, np.float64).reshape(-1, 2)
    row, index = np.repeat(np.arange(len(raw.line)), raw.count), pairs[:, 0].astype(np.int64)
    with np.errstate(over="ignore"):
        value = pairs[:, 1].astype(np.float32)
    before = np.where(np.diff(row, prepend=-1) == 0, np.roll(index, 1), 0)  # 0: first of its line
    wrong = np.flatnonzero((index <= before) | ~np.isfinite(value))
    if len(wrong):
        at = wrong[0]
        reason = (
            "is not a finite number in float32" if index[at] > before[at] else
            "indices count from 1" if index[at] < 1 else
            f"comes after feature {before[at]}: indices must increase, each of them once"
        )  # fmt: skip
        raise InputError(reason, file=path, line=raw.line[row[at]], field=f"feature {index[at]}", remedy=_FIX)
    width = int(index.max(initial=0))
    if len(raw.line) * width > LARGEST:
        line = raw.line[row[np.argmax(index)]]
        raise _too_large(len(raw.line), width, path, line)
    features = np.zeros((len(raw.line), width), np.float32)
    features[row, index - 1] = value
    return features


def _too_large(
    count: int, width: int, path: pathlib.Path | None = None, line: int | None = None
) -> InputError:
    return InputError(
        f"{count:,} rows of {width:,} features are too many for a dense matrix",
        file=path, line=line, field=f"feature {width}", remedy="Number the features without gaps",
    )  # fmt: skip


def _check_contiguous(raw: _Raw, path: pathlib.Path) -> np.ndarray:
    """[N] object: the queries, if each line has one and each query's lines stand together."""
    ended, previous = set(), None
    for qid, number in zip(raw.query, raw.line, strict=True):
        if qid is None:
            raise InputError(
                "no qid, though other lines of this file have one", file=path, line=number, field="qid",
                remedy=_FIX,
            )  # fmt: skip
        if qid != previous:
            if qid in ended:
                raise InputError(
                    f"query {qid!r} begins again after others", file=path, line=number, field="qid",
                    remedy="Put the lines of each query together",
                )  # fmt: skip
            ended.add(qid)
            previous = qid
    return np.array(raw.query, object)


def _group(raw: _Raw, path: pathlib.Path, name: str, groups: str | pathlib.Path | None) -> np.ndarray:
    """[N] object: the queries `<name>-1`, … of the sizes that the file of groups gives."""
    plain = path.with_name(path.name.removesuffix(".gz") + ".query")
    places = [pathlib.Path(groups)] if groups is not None else [plain, plain.with_name(plain.name + ".gz")]
    there = [place for place in places if place.is_file()]
    if not there:
        raise InputError(
            f"no qid, and no group sizes: {' and '.join(map(str, places))} not there",
            file=path, line=raw.line[0], field="qid",
            remedy="Write qid:<query> after each grade, or name the group sizes with --group_files",
        )  # fmt: skip
    sizes = _read_sizes(there[0])
    if sum(sizes) != len(raw.line):
        raise InputError(
            f"the group sizes add up to {sum(sizes):,}, but {path} has {len(raw.line):,} rows",
            file=there[0], remedy="Take both files from the same place",
        )  # fmt: skip
    return np.repeat(np.array([f"{name}-{i + 1}" for i in range(len(sizes))], object), sizes)


def _read_sizes(path: pathlib.Path) -> list[int]:
    sizes = []
    for line in runs.read_lines(runs.Run(path, (path,), None)):
        if not re.fullmatch(rb"\s*0*[1-9]\d{0,8}\s*", line.content):
            raise InputError(
                f"{_show(line.content.strip())}: expected the number of rows of one query, at least 1",
                file=path, line=line.number, remedy="Write one group size a line",
            )  # fmt: skip
        sizes.append(int(line.content))
    return sizes


def relevance(grade: np.ndarray, best: float, gain: str) -> np.ndarray:
    """[N] in [0, 1]: grade / best, or (2^grade − 1) / (2^best − 1); `best` is above 0."""
    if gain == "linear":
        return grade / best
    # The fraction times 2^-best: no grade is too large for that.
    return (np.exp2(grade - best) - np.exp2(-best)) / -np.expm1(-best * np.log(2))


def normalize_by_query(features: np.ndarray, query: np.ndarray) -> np.ndarray:
    """[N, d] float32: each feature from 0 to 1 within each query, 0 where it is constant there (LETOR)."""
    new = np.append(True, query[1:] != query[:-1])
    start, of = np.flatnonzero(new), np.cumsum(new) - 1
    low = np.minimum.reduceat(features, start).astype(np.float64)
    width = np.maximum.reduceat(features, start) - low
    return ((features - low[of]) / np.where(width > 0, width, 1)[of]).astype(np.float32)


def check_queries(sources: Sequence[Source]) -> None:
    """Raises InputError where two files have a query in common."""
    home: dict[str, Source] = {}
    for source in sources:
        for query in dict.fromkeys(source.table.query):
            first = home.setdefault(query, source)
            if first is source:
                continue
            why = "leakage" if first.split != source.split else "a query stands in one file"
            raise InputError(
                f"query {query!r} is in {first.split} ({first.path}) and in {source.split}: {why}",
                file=source.path,
                line=int(source.table.line[np.argmax(source.table.query == query)]),
                field="qid",
                remedy="Give each query to one split and one file",
            )


def to_table(sources: Sequence[Source], gain: str, normalization: str) -> pa.Table:
    """The candidates of all files as a dataset holds them: features as `image_embedding`, gold labels.

    λ is 1: y is the reviewer's compliance, the grade by `gain`.  Raises InputError where a query is in two
    files, or there is nothing to learn from.
    """
    check_queries(sources)
    tables = [source.table for source in sources]
    best = max(table.grade.max() for table in tables)
    if not best:
        raise InputError("every grade is 0, so no order is better than another", field="grade")
    count, width = sum(len(table.grade) for table in tables), max(table.features.shape[1] for table in tables)
    if not width:
        raise InputError("no line has a feature", field="feature")
    if count * width > LARGEST:
        raise _too_large(count, width)
    reader = rows.Reader(width, keep_lines=False)
    for source in sources:
        _add(reader, source, relevance(source.table.grade, best, gain), normalization)
    found = reader.table()
    marks = labels.label(found, 1.0)
    split = np.repeat([source.split for source in sources], [len(table.grade) for table in tables])
    columns = {"split": pa.array(split, pa.string()), "y": pa.array(marks.y), "label": pa.array(marks.kind)}
    for name, values in columns.items():
        found = found.append_column(name, values)
    return found


def write(table: pa.Table, folder: pathlib.Path, settings: dict[str, Any], summary: dict[str, Any]) -> dict:
    """Writes `to_table`'s rows as dataset.write does, and certifies them without comparing pictures.

    Features that people chose are alike for unlike documents, so near duplicates are not looked for;
    the certificate says so (`pairs` is null).
    """
    for name in splits.SPLITS:
        with files.replacing(folder / f"{name}.parquet") as temporary:
            pq.write_table(table.filter(pc.equal(table["split"], name)), temporary, compression="zstd")
    written = {name: pq.read_table(folder / f"{name}.parquet") for name in splits.SPLITS}
    at = table.column_names.index("image_embedding")
    blank = {name: [part.set_column(at, "image_embedding", part["text_embedding"])]
             for name, part in written.items()}  # fmt: skip
    result = certificate.certify(blank, 0, settings, summary)
    result["missing"]["image_embedding"] = 0.0
    result["near_duplicates"] |= {"pairs": None, "why": "not looked for: the features show no picture"}
    result["files"] = {f"{name}.parquet": files.sha256(folder / f"{name}.parquet") for name in written}
    files.write_json(folder / dataset.CERTIFICATE, result)
    return result


def _add(reader: rows.Reader, source: Source, compliance: np.ndarray, normalization: str) -> None:
    """Appends a file's rows to the columns of a reader, which knows the schema."""
    table, count = source.table, len(source.table.grade)
    features = table.features
    if normalization == "query":
        features = normalize_by_query(features, table.query)
    features = np.pad(features, ((0, 0), (0, (reader.dim or 0) - features.shape[1])))
    ids, canonical_ids = _identify(source)
    unknown = [None] * count
    facts = (*rows.KEYS, "constraints", *ATTRIBUTES, "conflicts", "dual_score", *rows.SHOWN)
    columns = dict.fromkeys(facts, unknown) | {
        "query_id": table.query.tolist(), "query": table.query.tolist(), "domain": [DOMAIN] * count,
        "id": ids, "canonical_id": canonical_ids,
        "review_compliance": compliance.tolist(), "review_conflict": unknown,  # nobody has judged it
        "review_conflict_types": [[]] * count,
        "file": [source.path.name] * count, "line": table.line.tolist(),
    }  # fmt: skip
    for name, values in columns.items():
        reader.columns[name].extend(values)
    reader.vectors["image_embedding"].extend(features)
    reader.vectors["text_embedding"].extend(unknown)


def _identify(source: Source) -> tuple[list[str], list[str]]:
    """`id` and `canonical_id` of each row: by `docid` where the comment has one that is new to its query.

    The features are those of a query and a document together, so a document is another candidate in
    each query: the query is part of its `canonical_id`.
    """
    seen: collections.Counter[tuple[str, str]] = collections.Counter()
    ids, canonical_ids = [], []
    table = source.table
    for query, comment, line in zip(table.query, table.comment, table.line, strict=True):
        document = match[1] if (match := _DOCID.search(comment)) else ""
        seen[query, document] += 1
        place = f"{source.name}:{line}"
        named = document and seen[query, document] == 1
        ids.append(document if named else place)
        canonical_ids.append(f"{query}/{document}" if named else place)
    return ids, canonical_ids
