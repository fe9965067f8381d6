"""Governance: the rules that a release must hold, as far as files can tell.

Each check gives the breaches that it finds.  What cannot be told is a finding too: unchecked, which is
no pass.  Leakage, labels and a report's point values are measured again; its intervals, its tests and its
latencies are not, nor is what the gate once measured.
"""

import collections
import functools
import json
import operator
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jinja2
import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.stats import rankdata

from cotrr import files
from cotrr.data import certificate, dataset, labels, runs, splits
from cotrr.data.labels import GOLD
from cotrr.data.lists import to_lists
from cotrr.deploy import card, policy
from cotrr.deploy.registry import Event, Registry, State, Version
from cotrr.deploy.rules import MEASURED, OF_REGISTRY, OF_REPORT, Breach, unchecked
from cotrr.errors import InputError
from cotrr.evaluate import ranking
from cotrr.ranker import artifact, model_files
from cotrr.ranker.artifact import Model

CLAIMS = ("counts", "rows_read", "overlap", "missing", "labels")  # the same bits on every machine
KEPT = ("certificate.json", "report.json", "card.json", "card.md")  # beside a model, of its evidence
TOLERANCE = 1e-4  # between figures of the same scores on two machines
GARBLED = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError,
           jinja2.TemplateError)  # fmt: skip


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
    if told["near_duplicates"]["pairs"] is None:  # features that people chose may stand in their place
        claimed = [name for name in CLAIMS if name != "missing"]
        tables = {name: _without_pictures(table) for name, table in tables.items()}
    measured = certificate.certify(
        {name: [table] for name, table in tables.items()},
        told["rows_dropped"],
        told["settings"],
        told["input"],
    )
    if measured["near_duplicates"]["pairs"] is None:
        why = told["near_duplicates"].get("why") or measured["near_duplicates"]["why"]
        found += unchecked(["near_duplicates"], data.folder, str(why))
    said, true = ({name: facts[name] for name in claimed} for facts in (told, files.finite(measured)))
    if what := difference(said, true):
        found.append(Breach("certificate", data.folder, what))
    return found + leaks(measured, data.folder)


def _without_pictures(table: pa.Table) -> pa.Table:
    at, kind = table.column_names.index("image_embedding"), table.schema.field("image_embedding").type
    return table.set_column(at, "image_embedding", pa.chunked_array([pa.nulls(len(table), kind)]))


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


def check_origin(run: str, data: Data) -> list[Breach]:
    """Whether a run is the one that the data were made of."""
    known = data.passport["input"].get("hashes")
    if not known:
        return unchecked(["certificate"], run, "the certificate does not say what the data were made of")
    same = dataset.hash_files(runs.find_run(run)) == known
    return [] if same else [Breach("certificate", run, f"not the run that {data.folder} was made of")]


def read_model(folder: str) -> dict[str, bytes]:
    """The files of a model folder, and the evidence beside them, by name."""
    beside = [pathlib.Path(folder) / name for name in KEPT]
    return model_files.read_files(folder) | {p.name: p.read_bytes() for p in beside if p.is_file()}


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
    """Whether a model has learned from the test rows, and its report has gold labels and its figures."""
    if not data.tables:
        return unchecked(["learned_from_test", *OF_REPORT], where, "the test split cannot be read")
    try:
        model = artifact.parse(content, where)
        learned = artifact.learned_from(model.seen, data.tables["test"])
    except GARBLED as error:
        return unchecked(["learned_from_test", *OF_REPORT], where, f"cannot be read ({error!r})")
    found = [Breach("learned_from_test", where, f"{learned} of {data.folder}")] if learned else []
    try:
        told = _check_report(where, content["report.json"], model, data) if "report.json" in content else []
    except GARBLED as error:
        told = unchecked(OF_REPORT, where, f"its report cannot be read ({error!r})")
    return found + told


def _check_report(where: str, content: bytes, model: Model, data: Data) -> list[Breach]:
    """The labels of a report, and its point values against those of the model's scores."""
    report = json.loads(content)
    about = report["data"]
    if about["label"] != GOLD:
        what = f"the figures of its report are of {about['label']} labels"
        return [Breach("silver_labels", where, what), *unchecked(["report_evidence"], where, what)]
    if about["certificate"] != files.digest(data.passport):
        return unchecked(OF_REPORT, where, f"its report is about other data than {data.folder}")
    table, counted = data.tables[about["split"]], about["candidates"]
    gold = pc.sum(pc.equal(table["label"], GOLD)).as_py() or 0
    miscounted = f"its report counts {counted} candidates, where {gold} have gold labels"
    found = [Breach("silver_labels", where, miscounted)] if counted != gold else []
    wrong = [f"{'.'.join(path)} is {said}, but the model's scores give {value}"
             for path, value in point_values(model, table).items()
             if not _close(said := _find(report, path)["value"], value)]  # fmt: skip
    differ = [Breach("report_evidence", where, f"{wrong[0]} ({len(wrong)} differ)")] if wrong else []
    return found + differ


def point_values(model: Model, table: pa.Table) -> dict[tuple[str, ...], float]:
    """What a report says of a model's gold rankings and conflicts, by path, from the rows themselves."""
    lists = to_lists(table, GOLD)
    lists = lists.take(np.flatnonzero(lists.labelled.any(axis=1)))
    scored = artifact.score(model, lists)
    known = lists.labelled & ~np.isnan(lists.conflict)
    conflict = _auc(scored.p_conflict[known], lists.conflict[known] >= 0.5)
    found: dict[tuple[str, ...], float] = {
        ("conflict", "auc"): conflict,
        ("conflict", "systems", "reranker", "auc"): conflict,
    }
    domains = {("slices", str(name)): lists.domain == name for name in sorted(set(lists.domain))}
    for metric, values in ranking.per_query(scored.logit, lists).items():
        known = ~np.isnan(values)
        for place, inside in {(): known, **domains}.items():
            chosen = values[inside & known]
            found[*place, "metrics", metric] = float(chosen.mean()) if len(chosen) else np.nan
    return found


def _auc(score: np.ndarray, positive: np.ndarray) -> float:
    """Mann & Whitney's: the share of pairs in the right order, ties one half; NaN with one class."""
    count = int(positive.sum())
    pairs = count * (len(positive) - count)
    return float((rankdata(score)[positive].sum() - count * (count + 1) / 2) / pairs) if pairs else np.nan


def _find(report: Any, path: tuple[str, ...]) -> Any:
    return functools.reduce(operator.getitem, path, report)


def _close(said: Any, value: float) -> bool:
    return np.isnan(value) if said is None else abs(said - value) <= TOLERANCE


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
        rules = ("missing_card", "card_evidence", "champion_evidence", "policy_changed", "policy_unknown")
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
        found += _check_champion(registry, state, version, data)
    return found + _check_policies(registry, state, policies)


def _judgement(registry: Registry, event: Event) -> _Judgement:
    """The judgement of an event; raises InputError where it is missing, changed or none."""
    if "judgement" not in event.evidence:
        raise InputError(f"event {event.number} names no judgement")
    try:
        return msgspec.convert(registry.evidence(event.evidence["judgement"]), _Judgement)
    except msgspec.ValidationError as error:
        raise InputError(f"event {event.number} rests on no judgement: {error}") from None


def _check_champion(registry: Registry, state: State, version: Version, data: Data) -> list[Breach]:
    """What the evidence of a champion lacks; one that was rolled back to had been promoted before."""
    breach = lambda what, checked=True: Breach(
        "champion_evidence", f"{registry.name}/{version.label}", what, checked
    )
    promoted = [e for e in state.events if e.kind == "promote" and e.version == version.label]
    if not promoted:
        return [breach("no event has promoted it")]
    event = promoted[-1]
    try:
        judged, kept = _judgement(registry, event), event.evidence.get("certificate")
        known = [data.passport, *([registry.evidence(kept)] if kept else [])]
        passport = next((p for p in known if files.digest(p) == judged.certificate), None)
        leaked = [b.what for b in leaks(passport, "")] if passport else ["their certificate is not kept"]
        untold = certificate.unchecked(passport) if passport else []
    except GARBLED as error:
        return [breach(str(error))]
    failed = [str(check.get("check")) for check in judged.checks if check.get("verdict") != "pass"]
    about = tuple(judged.candidate.get(name, "?") for name in ("label", "model"))
    wrong = {
        f"the verdict of event {event.number} is {judged.verdict}": judged.verdict != "PROMOTE",
        f"event {event.number} judged {' '.join(about)}": about != (version.label, version.model),
        f"it was judged on {judged.labels} labels": judged.labels != GOLD,
        f"not passed: {', '.join(failed) or 'there are no checks'}": failed or not judged.checks,
        **{f"its test data: {what}": True for what in leaked},
    }
    return [*(breach(what) for what, holds in wrong.items() if holds),
            *(breach(f"its test data: {what}", checked=False) for what in untold)]  # fmt: skip


class _Named(msgspec.Struct):
    name: str = ""


def _check_policies(registry: Registry, state: State, folder: str) -> list[Breach]:
    """Policies of one name must have one hash, in log and folder; what is live was judged by one of these."""
    found, places = [], collections.defaultdict(dict)  # name → hash → where it was first seen
    live: _Judgement | None = None  # by which the champion was promoted
    for event in state.events:
        try:
            judged = _judgement(registry, event) if event.kind in ("promote", "judge") else None
        except InputError as error:
            found += unchecked(["policy_changed", "policy_unknown"], registry.name, str(error))
            continue
        if judged:
            where, name = f"{registry.name}, event {event.number}", str(judged.policy.get("name"))
            places[name].setdefault(judged.policy_hash, where)
            live = judged if event.kind == "promote" and event.version == state.champion else live
            if files.digest(judged.policy) != judged.policy_hash:
                found.append(Breach("policy_changed", where, f"the hash is not that of policy {name!r}"))
    if not pathlib.Path(folder).is_dir():
        raise InputError("no folder of policies", file=folder, remedy="Name it by --policies")
    known = set()
    for path in sorted(pathlib.Path(folder).glob("*.json")):
        if (name := policy.read(path, _Named).name) in places:
            known.add(digest := policy.read(path, policy.Policy).digest)
            places[name].setdefault(digest, str(path))
    if live and live.policy_hash not in known:
        what = f"policy {live.policy.get('name')!r} that promoted it is no file of {folder}"
        found.append(Breach("policy_unknown", f"{registry.name}/{state.champion}", what))
    for name, hashes in places.items():
        first, *others = hashes.values()
        found += [Breach("policy_changed", where, f"{name!r} says something else than in {first}")
                  for where in others]  # fmt: skip
    return found
