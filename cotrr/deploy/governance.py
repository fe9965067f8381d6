"""Governance: the rules that a release must hold, measured again on the files themselves.

Each check gives the breaches that it finds.  What cannot be told is a finding too: unchecked, which is
no pass.  Counts and rates whose data are missing in part are ranges: a rule holds where all of the
range does, is broken where none of it does, and is unchecked between.
"""

import collections
import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, NamedTuple
from urllib.parse import unquote, urlsplit

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from msgspec import Meta

from cotrr import files
from cotrr.data import certificate, dataset, labels, runs, splits
from cotrr.data.contract import picture_of
from cotrr.data.labels import GOLD
from cotrr.data.rows import embedding_matrix
from cotrr.deploy import card, policy
from cotrr.deploy.registry import Event, Registry, State, Version
from cotrr.errors import InputError
from cotrr.ranker import artifact

CLAIMS = ("counts", "rows_read", "overlap", "missing", "labels")  # the same bits on every machine
KEPT = ("certificate.json", "report.json", "card.json", "card.md")  # beside a model, of its evidence
GARBLED = (InputError, ValueError, KeyError, TypeError, AttributeError)


class Rule(NamedTuple):
    """How a rule is read, and what to do about a breach."""

    reading: str
    remedy: str


RULES = {
    "certificate": Rule("files and run are those that the certificate was made of, and say what it says",
                        "Generate the dataset again"),
    "leakage": Rule("no canonical_id and no query_id is in two splits", "Generate the dataset again"),
    "near_duplicates": Rule(f"no pictures of two splits have a cosine above {certificate.NEAR_DUPLICATE}",
                            "Give near-identical pictures one canonical_id"),
    "label_leakage": Rule("no attribute alone determines y", "Take labels from reviewers, or leave it out"),
    "silver_labels": Rule("labels follow from their rows; the test split has gold ones, reports no others",
                          "Have reviewers judge the test split, and evaluate again"),
    "domain_cap": Rule("a run has at most so many sources by domain: field `source`, else the URL's host",
                       "Leave some of the sources to another run"),
    "photographers": Rule("a run has at least so many photographers by domain: field `photographer`",
                          "Add pictures by others, or have the lines name `photographer`"),
    "broken_urls": Rule("at most this share of the new pictures' URLs is broken: no such file (relative to "
                        "the run), or `http_status`, else `url_status`, outside 200-399",
                        "Remove these pictures, or have the lines state `http_status`"),
    "duplicates": Rule("at most this share of the new pictures is there under another canonical_id too: by "
                       "URL, or by image embedding", "Give one picture one canonical_id"),
    "missing_card": Rule("the model and each version have card.json and card.md",
                         "Register it with its report: python -m experiments.registry register"),
    "card_evidence": Rule("both cards are what the model, certificate.json and report.json beside them give",
                          "Register the model again, with its report"),
    "learned_from_test": Rule("the model has learned from no query or picture of the test split",
                              "Test it on data that it has not seen"),
    "broken_chain": Rule("every byte of the registry is as it was written", "Restore it from a copy"),
    "champion_evidence": Rule("what is live was promoted on a judgement PROMOTE of this very version, on "
                              "gold labels and data without leakage", "Roll back, or promote it by the gate"),
    "policy_changed": Rule("policies of one name, in the log and in the folder, say the same",
                           "Give the changed policy a new name"),
}  # fmt: skip
MEASURED = ("leakage", "near_duplicates", "label_leakage", "silver_labels")
OF_RUN = ("domain_cap", "photographers", "broken_urls", "duplicates")
OF_REGISTRY = ("broken_chain", "champion_evidence", "policy_changed")
Share = Annotated[float, Meta(ge=0, le=1)]


class Quotas(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The numbers of the rules about a run."""

    name: Annotated[str, Meta(min_length=1)]
    description: str
    domain_cap_per_run: Annotated[int, Meta(ge=1)]
    min_photographers_per_domain: Annotated[int, Meta(ge=0)]
    max_broken_url_rate_new: Share
    max_duplicate_rate_new: Share


class Breach(NamedTuple):
    """A rule that does not hold, or with `checked` False: of which nothing can be told."""

    rule: str
    where: str
    what: str
    checked: bool = True


def unchecked(rules: Iterable[str], where: str, why: str) -> list[Breach]:
    """That nothing can be told of rules."""
    return [Breach(rule, where, why, checked=False) for rule in rules]


def difference(found: Any, wanted: Any, path: str = "") -> str:
    """The first place where two JSON values differ, in words; empty: nowhere.

    >>> difference({"metrics": {"n": 3}}, {"metrics": {"n": 4}})
    'metrics.n is 3, but the evidence gives 4'
    """
    if isinstance(found, dict) and isinstance(wanted, dict):
        pairs = [(str(k), found.get(k), wanted.get(k)) for k in {**wanted, **found}]
    elif isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        pairs = [(str(i), *pair) for i, pair in enumerate(zip(found, wanted, strict=True))]
    elif type(found) is type(wanted) and found == wanted:
        return ""
    else:
        said = [text if len(text) < 80 else text[:76] + " ..." for text in map(json.dumps, (found, wanted))]
        return f"{path} is {said[0]}, but the evidence gives {said[1]}"
    inside = (difference(a, b, f"{path}.{key}" if path else key) for key, a, b in pairs)
    return next(filter(None, inside), "")


class Data(NamedTuple):
    """A dataset that was read: its certificate, and its tables by split; none where one is not certified."""

    folder: str
    passport: dict[str, Any]
    tables: dict[str, pa.Table]


def read_data(folder: str) -> tuple[Data, list[Breach]]:
    """A dataset, and what is wrong with its files; raises InputError where there is no certificate."""
    passport, tables, found = dataset.read_certificate(folder), {}, []
    for split in splits.SPLITS:
        try:
            tables[split] = dataset.read(folder, split)
        except InputError as error:
            found.append(Breach("certificate", str(error.file), error.reason))
    return Data(folder, passport, {} if found else tables), found


def check_data(data: Data) -> list[Breach]:
    """Leakage of all kinds, measured on the Parquet files, and whether the certificate says the same."""
    if not data.tables:
        return unchecked(MEASURED, data.folder, "the files cannot be measured")
    try:
        return _check_certificate(data) + _check_labels(data)
    except GARBLED as error:
        broken = Breach("certificate", data.folder, f"cannot be measured as it says ({error!r})")
        return [broken, *unchecked(MEASURED, data.folder, "the files cannot be measured")]


def _check_certificate(data: Data) -> list[Breach]:
    found, told, tables, claimed = [], data.passport, data.tables, CLAIMS
    if told["near_duplicates"]["pairs"] is None:  # features that people chose stand where embeddings would
        found = unchecked(["near_duplicates"], data.folder, str(told["near_duplicates"].get("why")))
        claimed = [name for name in CLAIMS if name != "missing"]
        tables = {name: table.drop_columns("image_embedding").append_column(
                      "image_embedding", table["text_embedding"])
                  for name, table in tables.items()}  # fmt: skip
    measured = certificate.certify(tables, told["rows_dropped"], told["settings"], told["input"])
    said, true = ({name: facts[name] for name in claimed} for facts in (told, files.finite(measured)))
    if what := difference(said, true):
        found.append(Breach("certificate", data.folder, what))
    return found + leaks(measured, data.folder)


def leaks(passport: dict[str, Any], where: str) -> list[Breach]:
    """The breaches that a certificate tells of leakage, by rule."""
    parts = {"leakage": "overlap", "near_duplicates": "near_duplicates", "label_leakage": "label_leakage"}
    nothing = {"overlap": {}, "near_duplicates": {"pairs": 0}, "label_leakage": {}}
    return [
        Breach(rule, where, what)
        for rule, part in parts.items()
        for what in certificate.leaks(nothing | {part: passport[part]})
    ]


def _check_labels(data: Data) -> list[Breach]:
    found, weight = [], data.passport["settings"]["compliance_weight"]
    for split, table in data.tables.items():
        marks = labels.label(table, weight)
        other = table["label"].to_numpy(zero_copy_only=False) != marks.kind
        other |= ~np.isclose(labels.numbers(table, "y"), marks.y, rtol=0, atol=1e-9, equal_nan=True)
        if other.any():
            found.append(Breach("silver_labels", f"{data.folder}/{split}.parquet",
                                f"{other.sum()} labels do not follow from what the rows say"))  # fmt: skip
    kinds = set(data.tables["test"]["label"].to_pylist()) - {None}
    if not kinds:
        return found + unchecked(["silver_labels"], data.folder, "the test split has no labels")
    if GOLD not in kinds:
        found.append(Breach("silver_labels", data.folder, "all labels of the test split are silver"))
    return found


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


def check_origin(run: str, data: Data) -> list[Breach]:
    """Whether a run is the one that the data were made of."""
    known = data.passport["input"].get("hashes")
    if not known:
        return unchecked(["certificate"], run, "the certificate does not say what the data were made of")
    same = dataset.hash_files(runs.find_run(run)) == known
    return [] if same else [Breach("certificate", run, f"not the run that {data.folder} was made of")]


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
        return not os.path.isfile(home / unquote(url.path))
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


def read_model(folder: str) -> dict[str, bytes]:
    """The files of a model folder, and the evidence beside them, by name."""
    beside = [pathlib.Path(folder) / name for name in KEPT]
    return artifact.read_files(folder) | {p.name: p.read_bytes() for p in beside if p.is_file()}


def check_card(where: str, content: Mapping[str, bytes]) -> list[Breach]:
    """Whether there is a card, and follows field by field from the files beside it."""
    if absent := [name for name in ("card.json", "card.md") if name not in content]:
        missing = [Breach("missing_card", where, f"no {' and no '.join(absent)}")]
        return missing + unchecked(["card_evidence"], where, "there is no card")
    broken = lambda what: [Breach("card_evidence", where, what)]
    try:
        found = json.loads(content["card.json"])
        if (written := found["format"]) != card.FORMAT:
            return unchecked(["card_evidence"], where, f"the card has format {written}, not {card.FORMAT}")
        report = json.loads(content["report.json"]) if "report.json" in content else None
        wanted = card.build(artifact.parse(content, where), json.loads(content["certificate.json"]), report)
        if what := difference(found, wanted):
            return broken(f"card.json: {what}")
        return [] if content["card.md"].decode() == card.markdown(found) else broken("card.md is another's")
    except GARBLED as error:
        return broken(f"the evidence gives no card ({error!r})")


def check_model(where: str, content: Mapping[str, bytes], data: Data) -> list[Breach]:
    """Whether a model has learned from the test rows, and its report is of gold labels."""
    if not data.tables:
        return unchecked(["learned_from_test"], where, "the test split cannot be read")
    try:
        learned = artifact.learned_from(artifact.parse(content, where), data.tables["test"])
        report = json.loads(content.get("report.json", b"null"))
        told = _told_by_report(report["data"], data) if report else ""
    except GARBLED as error:
        return unchecked(["learned_from_test", "silver_labels"], where, f"cannot be read ({error!r})")
    found = {"learned_from_test": learned and f"{learned} of {data.folder}", "silver_labels": told}
    return [Breach(rule, where, what) for rule, what in found.items() if what]


def _told_by_report(about: dict[str, Any], data: Data) -> str:
    """What is wrong with the labels of a report, if anything."""
    if about["label"] != GOLD:
        return f"the figures of its report are of {about['label']} labels"
    if about["certificate"] != files.digest(data.passport):
        return ""
    gold = pc.sum(pc.equal(data.tables[about["split"]]["label"], GOLD)).as_py() or 0
    counted = about["candidates"]
    return "" if counted == gold else f"its report counts {counted} candidates, where {gold} have gold labels"


class _Judgement(msgspec.Struct):
    """What the gate has kept of a decision, as far as it is read here."""

    verdict: str
    candidate: dict[str, str]
    policy: dict[str, Any]
    policy_hash: str
    labels: str
    certificate: str
    checks: list[dict[str, Any]]


def check_registry(registry: Registry, data: Data, policies: str) -> list[Breach]:
    """The chain, the card of each version, the champion's evidence, the policies."""
    found = [Breach("broken_chain", registry.name, problem) for problem in registry.verify()[0]]
    try:
        state = registry.state()
    except InputError:
        rules = ("missing_card", "card_evidence", "champion_evidence", "policy_changed")
        return found + unchecked(rules, registry.name, "the log cannot be read")
    if not state.events:  # a wrong place or name, more likely than a new registry
        return found + unchecked(OF_REGISTRY, registry.name, "the registry is empty")
    for version in state.versions:
        if version.folder:
            where = f"{registry.name}/{version.label}"
            try:
                found += check_card(where, registry.files(version))
            except InputError as error:
                found += unchecked(["card_evidence"], where, str(error))
    if state.champion and (version := state.version("champion")).folder:
        wrong = _wrong_with_champion(registry, state, version, data)
        found += [Breach("champion_evidence", f"{registry.name}/{version.label}", what) for what in wrong]
    return found + _check_policies(registry, state, policies)


def _judgement(registry: Registry, event: Event) -> _Judgement:
    """The judgement of an event; raises InputError where it is missing, changed or none."""
    if "judgement" not in event.evidence:
        raise InputError(f"event {event.number} names no judgement")
    try:
        return msgspec.convert(registry.evidence(event.evidence["judgement"]), _Judgement)
    except msgspec.ValidationError as error:
        raise InputError(f"event {event.number} rests on no judgement: {error}") from None


def _wrong_with_champion(registry: Registry, state: State, version: Version, data: Data) -> list[str]:
    """What the evidence of a champion lacks; one that was rolled back to had been promoted before."""
    promoted = [e for e in state.events if e.kind == "promote" and e.version == version.label]
    if not promoted:
        return ["no event has promoted it"]
    event = promoted[-1]
    try:
        judged, kept = _judgement(registry, event), event.evidence.get("certificate")
        known = [data.passport, *([registry.evidence(kept)] if kept else [])]
        passport = next((p for p in known if files.digest(p) == judged.certificate), None)
        leaked = [b.what for b in leaks(passport, "")] if passport else ["their certificate is not kept"]
    except GARBLED as error:
        return [str(error)]
    failed = [str(check.get("check")) for check in judged.checks if check.get("verdict") != "pass"]
    about = tuple(judged.candidate.get(name, "?") for name in ("label", "model"))
    wrong = {
        f"the verdict of event {event.number} is {judged.verdict}": judged.verdict != "PROMOTE",
        f"event {event.number} judged {' '.join(about)}": about != (version.label, version.model),
        f"it was judged on {judged.labels} labels": judged.labels != GOLD,
        f"not passed: {', '.join(failed) or 'there are no checks'}": failed or not judged.checks,
    }
    return [what for what, holds in wrong.items() if holds] + [f"its test data: {what}" for what in leaked]


class _Named(msgspec.Struct):
    name: str = ""


def _check_policies(registry: Registry, state: State, folder: str) -> list[Breach]:
    """Policies of one name must have one hash, in all judgements and in the folder of policies."""
    found, places = [], collections.defaultdict(dict)  # name → hash → where it was first seen
    for event in state.events:
        try:
            judged = _judgement(registry, event) if event.kind in ("promote", "judge") else None
        except InputError as error:
            found += unchecked(["policy_changed"], registry.name, str(error))
            continue
        if judged:
            where, name = f"{registry.name}, event {event.number}", str(judged.policy.get("name"))
            places[name].setdefault(judged.policy_hash, where)
            if files.digest(judged.policy) != judged.policy_hash:
                found.append(Breach("policy_changed", where, f"the hash is not that of policy {name!r}"))
    if not pathlib.Path(folder).is_dir():
        raise InputError("no folder of policies", file=folder, remedy="Name it by --policies")
    for path in sorted(pathlib.Path(folder).glob("*.json")):
        if (name := policy.read(path, _Named).name) in places:
            places[name].setdefault(policy.read(path, policy.Policy).digest, str(path))
    for name, hashes in places.items():
        first, *others = hashes.values()
        found += [Breach("policy_changed", where, f"{name!r} says something else than in {first}")
                  for where in others]  # fmt: skip
    return found
