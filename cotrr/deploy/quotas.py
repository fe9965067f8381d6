"""Quotas and rates of a run: sources, photographers, broken URLs, pictures that are there twice.

Counts and rates whose data are missing in part are ranges: a rule holds where all of the range does, is
broken where none of it does, and is unchecked between.
"""

import collections
import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple
from urllib.parse import unquote, urlsplit

import msgspec
import pyarrow as pa
from msgspec import Meta

from cotrr.data import dataset, runs, splits
from cotrr.data.contract import Share, picture_of
from cotrr.data.rows import embedding_matrix
from cotrr.deploy.rules import Breach


class Quotas(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The numbers of the rules about a run."""

    name: Annotated[str, Meta(min_length=1)]
    description: str
    domain_cap_per_run: Annotated[int, Meta(ge=1)]
    min_photographers_per_domain: Annotated[int, Meta(ge=0)]
    max_broken_url_rate_new: Share
    max_duplicate_rate_new: Share


class Sight(NamedTuple):
    """What one line shows of a picture."""

    picture: str  # canonical_id
    domain: str
    url: str | None
    embedding: bytes | None  # its hash
    fields: dict[str, Any]  # the line, unknown fields included

    def told(self, field: str) -> str | None:
        """A field that names somebody, however it is spelled; None where it does not."""
        value = self.fields.get(field)
        return " ".join(value.split()).casefold() or None if isinstance(value, str) else None


def sights(table: pa.Table) -> list[Sight]:
    """The rows of a run, or of a dataset, whose lines are not kept."""
    vectors = embedding_matrix(table, "image_embedding")
    there = table["image_embedding"].is_valid().to_pylist()
    marks = [hashlib.blake2b(v.tobytes(), digest_size=16).digest() if known else None
             for v, known in zip(vectors, there, strict=True)]  # fmt: skip
    lines = table["line_json"].to_pylist() if "line_json" in table.column_names else [b"{}"] * len(table)
    columns = (table[name].to_pylist() for name in ("canonical_id", "domain", "url"))
    return [Sight(*row) for row in zip(*columns, marks, map(json.loads, lines), strict=True)]


def read_sights(path: str) -> list[Sight]:
    """All that a run shows, or a dataset folder: without the rows that its split dropped."""
    if (pathlib.Path(path) / dataset.CERTIFICATE).exists():
        return sights(pa.concat_tables([dataset.read(path, split) for split in splits.SPLITS]))
    with tempfile.TemporaryDirectory() as aside:  # a run that was read with bad lines put aside has some
        quarantine = pathlib.Path(aside) / "quarantine.jsonl"
        return sights(runs.read_run(path, quarantine=quarantine, keep_lines=True).table)


def check_run(run: str, now: list[Sight], earlier: list[Sight], quotas: Quotas) -> list[Breach]:
    """Sources and photographers by domain; broken URLs and duplicates among what is new."""
    found, by_domain = [], collections.defaultdict(list)
    for sight in now:
        by_domain[sight.domain].append(sight)
    for domain, seen in sorted(by_domain.items()):
        found += _bounded("domain_cap", run, f"sources in {domain}", *_distinct(seen, _source),
                          quotas.domain_cap_per_run)  # fmt: skip
        found += _bounded("photographers", run, f"photographers in {domain}",
                          *_distinct(seen, lambda sight: sight.told("photographer")),
                          quotas.min_photographers_per_domain, at_least=True)  # fmt: skip
    known = {sight.picture for sight in earlier}
    new = [sight for sight in now if sight.picture not in known]
    found += _bounded("broken_urls", run, "share of broken URLs among the new",
                      *_broken(new, pathlib.Path(run)), quotas.max_broken_url_rate_new)  # fmt: skip
    return found + _bounded("duplicates", run, "share of duplicates among the new",
                            *_duplicates(new, earlier), quotas.max_duplicate_rate_new)  # fmt: skip


def _bounded(
    rule: str, where: str, what: str, low: float, high: float, limit: float, at_least: bool = False
) -> list[Breach]:
    """A number that lies in [low, high] against its limit."""
    if low >= limit if at_least else high <= limit:
        return []
    broken = high < limit if at_least else low > limit
    number = f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}, as some lines do not tell"
    bound = f"at {'least' if at_least else 'most'} {limit:g}"
    return [Breach(rule, where, f"{what}: {number}; must be {bound}", checked=broken)]


def _distinct(seen: list[Sight], what: Callable[[Sight], str | None]) -> tuple[int, int]:
    """How many values there are, and may be: a picture that tells none may have one of its own."""
    told = collections.defaultdict(set)
    for sight in seen:
        told[sight.picture] |= {what(sight)} - {None}
    known = len(set().union(*told.values()))
    return known, known + sum(not values for values in told.values())


def _source(sight: Sight) -> str | None:
    try:
        return sight.told("source") or urlsplit(sight.url or "").hostname
    except ValueError:  # no URL at all
        return None


def _broken(new: list[Sight], run: pathlib.Path) -> tuple[float, float]:
    """The least and the largest share of broken URLs."""
    home, state = run if run.is_dir() else run.parent, dict[str, set[bool | None]]()
    for sight in new:
        if sight.url:
            state.setdefault(sight.url, set()).add(_is_broken(sight, home))
    broken = sum(True in said for said in state.values())
    untold = sum(said == {None} for said in state.values())
    count = max(len(state), 1)
    return broken / count, (broken + untold) / count


def _is_broken(sight: Sight, home: pathlib.Path) -> bool | None:
    try:
        url = urlsplit(sight.url or "")
    except ValueError:
        return True
    if url.scheme in ("", "file"):
        # A run may be anybody's: what lies outside of its folder is not told, not even whether it is there.
        path = pathlib.Path(os.path.abspath(home / unquote(url.path)))
        inside = not url.netloc and path.is_relative_to(os.path.abspath(home))
        return not path.is_file() if inside else None
    status = sight.fields.get("http_status", sight.fields.get("url_status"))
    return None if status is None else status not in range(200, 400)


def _duplicates(new: list[Sight], earlier: list[Sight]) -> tuple[float, float]:
    """The least and the largest share of new pictures that are there as another picture too."""
    owners, told = collections.defaultdict(set), collections.defaultdict(bool)
    for sight in [*earlier, *new]:
        for mark in (sight.url and picture_of(sight.url), sight.embedding):
            if mark:
                owners[mark].add(sight.picture)
    for sight in new:
        told[sight.picture] |= bool(sight.url or sight.embedding)
    twice = set().union(*(group for group in owners.values() if len(group) > 1)) & told.keys()
    count, untold = max(len(told), 1), len(told) - sum(told.values())
    return len(twice) / count, (len(twice) + untold) / count
