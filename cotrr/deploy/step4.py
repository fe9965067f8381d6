"""Step 4's own files: its model registry and its deployments, written from the log and read into it.

`model_registry.json` is `{version_id: record}`, `deployments.json` is `{deployment_id: record}`.  Read
are also a bare list of records, and a list under `versions`, `models` or `deployments`.  Records of
Step 4's own keep every field, known here or not.

Of what is promoted the deployment with the latest `deployed_at` is live, and of those in shadow likewise.
One that was superseded keeps its status; one that was rolled back or withdrawn is `rolled_back`, and what
is live again gets a deployment of its own.
"""

import datetime
import json
import math
import pathlib
from collections.abc import Iterable
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Meta

from cotrr import files
from cotrr.data.rows import explain
from cotrr.deploy.registry import Draft, Event, Registry, State, Version
from cotrr.errors import InputError
from cotrr.store import FsspecStore, LocalStore

Name = Annotated[str, Meta(min_length=1, max_length=500)]
Record = dict[str, Any]
RECORD_LIMIT = 2**17  # bytes of a version's record, which becomes part of an event
MODELS, DEPLOYMENTS = "model_registry.json", "deployments.json"
REMEDY = "If Step 4 is right, `rollback` here first; if the log is, `export`"
METRICS = {  # Step 4's names and ours
    "compliance_at_1": "compliance@1",
    "compliance_at_3": "compliance@3",
    "compliance_at_5": "compliance@5",
    "ndcg_at_10": "ndcg@10",
    "conflict_rate": "conflict_rate@1",
    "conflict_auc": "conflict_auc",
    "conflict_ece": "conflict_ece",
}


class BaselineMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """Figures of a model version; None where undefined or not measured."""

    compliance_at_1: float | None = None
    compliance_at_3: float | None = None
    compliance_at_5: float | None = None
    ndcg_at_10: float | None = None
    conflict_rate: float | None = None
    conflict_auc: float | None = None
    conflict_ece: float | None = None


class ModelVersion(msgspec.Struct, frozen=True, kw_only=True):
    """A record of Step 4's model registry."""

    version_id: Name  # what reranked lines carry as `model_version`
    model_name: str
    model_path: str
    created_at: str
    creator: str
    description: str
    baseline_metrics: BaselineMetrics = BaselineMetrics()

    def __post_init__(self) -> None:
        _check_moment(self.created_at, "created_at")
        if not self.version_id.isprintable():
            raise ValueError("not printable - at `$.version_id`")


class Deployment(msgspec.Struct, frozen=True, kw_only=True):
    """A record of Step 4's deployments."""

    deployment_id: Name
    model_version: Name
    overlay_version: str
    status: Literal["shadow", "promoted", "rolled_back", "failed"]
    deployed_at: str
    metrics: dict[str, Any] = {}
    rollback_target: str | None = None  # the model version that a rollback makes live

    def __post_init__(self) -> None:
        _check_moment(self.deployed_at, "deployed_at")


def export(registry: Registry, overlay_version: str, folder: str | pathlib.Path) -> list[pathlib.Path]:
    """Writes both files; `overlay_version` is that of deployments whose event tells no other."""
    state = registry.state()
    records = {
        MODELS: models(registry, state),
        DEPLOYMENTS: _replay(registry, state, overlay_version).records,
    }
    for name, content in records.items():  # versions first: no deployment may name one that is not there
        files.write_json(pathlib.Path(folder) / name, content)
    return [pathlib.Path(folder) / name for name in records]


def import_files(
    registry: Registry, model_registry: str | pathlib.Path, deployments: str | pathlib.Path, actor: str
) -> list[Event]:
    """Takes over the versions and deployments that are new, and what Step 4 has live; returns the events.

    Raises InputError, before anything is written, for a record that breaks the contract, for a version
    that was changed since it was imported, and where files and log disagree on what of ours is live.
    """
    versions = _read(model_registry, ModelVersion, "version_id", ("versions", "models"))
    records = _read(deployments, Deployment, "deployment_id", ("deployments",))
    state = registry.state()
    new = _new_versions(state, versions, model_registry)
    _check_named(state, versions, records, deployments)
    plan = _plan(registry, state, records, deployments)
    events = [registry.append(partial(_import, record=record, actor=actor)) for record in new]
    if plan.news:
        draft = partial(_take_over, registry=registry, records=records, file=deployments, actor=actor)
        events.append(registry.append(draft))
    return events


def models(registry: Registry, state: State) -> dict[str, Record]:
    """Step 4's record of every version, by model version."""
    return {version.model: _model(registry, version) for version in state.versions}


def live(records: Iterable[Record]) -> Record | None:
    """The deployment that is live: of those promoted the latest, of several at once the last."""
    promoted = [record for record in records if record["status"] == "promoted"]
    return max(reversed(promoted), key=lambda record: _moment(record["deployed_at"]), default=None)


def location(registry: Registry, version: Version) -> str:
    """The folder or the URL where a version's files are."""
    key, store = f"{registry.name}/versions/{version.folder}", registry.store
    if isinstance(store, LocalStore):
        return str(store._folder / key)
    if isinstance(store, FsspecStore):
        return store._system.unstrip_protocol(f"{store._root}/{key}")
    return key


class _Plan(NamedTuple):
    """What an import of deployments does."""

    news: list[Record]  # Step 4's own that the log lacks or has otherwise
    model: str | None = None  # what the log has to call live; "" nothing, None no change
    deployment: str = ""  # that made it live


class _Replay:
    """Deployments by id, as the log goes on; `ours` are those that it made, the others were imported."""

    def __init__(self, registry: Registry, overlay_version: str):
        self.records: dict[str, Record] = {}
        self.ours: set[str] = set()
        self._registry, self._overlay_version = registry, overlay_version
        self._live: list[list[str]] = [[]]  # what made each of `State.past`, and the champion, live
        self._shadows: list[str] = []
        self._latest = "0001-01-01"

    def follow(self, event: Event, before: State, now: State) -> None:
        """One more event, the state before it and the one after."""
        if "deployments" in event.evidence:
            for record in self._registry.evidence(event.evidence["deployments"]):
                self._put(record)
        if event.kind in ("promote", "adopt"):
            self._live.append([])
            self._deploy(event, now, "promoted", self._live[-1])
        elif event.kind == "rollback":
            kept = len(now.past) + 1
            for group in self._live[kept:]:
                self._end(group)
            del self._live[kept:]
            self._deploy(event, now, "promoted", self._live[-1])
        elif now.aliases.get("shadow") != before.aliases.get("shadow"):
            if not event.version:
                self._end(self._shadows)
            self._deploy(event, now, "shadow", self._shadows)

    def _deploy(self, event: Event, now: State, status: Any, group: list[str]) -> None:
        """A further deployment of a group, or the one of Step 4's that an event adopts; none of nothing."""
        adopted = event.facts.get("deployment") if event.kind == "adopt" else None
        if adopted in self.records:
            group.append(adopted)
        elif event.version:
            # The hash keeps it apart from those of another registry that were imported here.
            name = f"deploy_{event.number}_{event.digest[:8]}"
            self.ours.add(name)
            self._put(self._record(event, now, name, status))
            group.append(name)

    def _record(self, event: Event, now: State, name: str, status: Any) -> Record:
        model = {version.label: version.model for version in now.versions}
        judgement = event.evidence.get("judgement")
        figures = self._registry.evidence(judgement).get("figures") if judgement else None
        return msgspec.to_builtins(
            Deployment(
                deployment_id=name,
                model_version=model[event.version],
                overlay_version=event.facts.get("overlay_version", self._overlay_version),
                status=status,
                # Step 4's clock may be ahead of ours: what is live must not look older than what was.
                deployed_at=max(self._latest, event.at, key=_moment),
                metrics=_values(figures) if figures else {},
                rollback_target=model.get(now.past[-1]) if status == "promoted" else None,
            )
        )

    def _put(self, record: Record) -> None:
        self.records[record["deployment_id"]] = record
        self._latest = max(self._latest, record["deployed_at"], key=_moment)

    def _end(self, names: list[str]) -> None:
        for name in names:
            self.records[name] = {**self.records[name], "status": "rolled_back"}
        names.clear()


def _replay(registry: Registry, state: State, overlay_version: str = "") -> _Replay:
    """All deployments up to a state: Step 4's own as they were imported, and those that the log made."""
    found, now = _Replay(registry, overlay_version), State()
    for event in state.events:
        before, now = now, now.step(event)
        found.follow(event, before, now)
    return found


def _model(registry: Registry, version: Version) -> Record:
    if not version.folder:
        return version.event.facts["external"]
    facts = registry.manifest(version).facts
    return msgspec.to_builtins(
        ModelVersion(
            version_id=version.model,
            model_name=registry.name,
            model_path=location(registry, version),
            created_at=version.event.at,
            creator=version.event.actor,
            description=str(facts.get("description", "")),
            baseline_metrics=BaselineMetrics(**_values(facts.get("metrics", {}))),
        )
    )


def _values(figures: dict[str, Any]) -> dict[str, float | None]:
    """The values of our figures under Step 4's names; what is absent stays undefined."""
    return {theirs: (figures.get(ours) or {}).get("value") for theirs, ours in METRICS.items()}


def _new_versions(state: State, versions: dict[str, Record], file: object) -> list[Record]:
    """The records of versions that the log lacks; those of versions registered here are ours to write."""
    known = {version.model: version for version in state.versions}
    for name in versions.keys() & known.keys():
        if not known[name].folder and known[name].event.facts["external"] != versions[name]:
            raise InputError("changed since it was imported", file=file, field=name,
                             remedy="Give what changed a new version_id")  # fmt: skip
    return [record for name, record in versions.items() if name not in known]


def _check_named(state: State, versions: dict[str, Record], records: dict[str, Record], file: object) -> None:
    known = versions.keys() | {version.model for version in state.versions}
    for name, record in records.items():
        if record["model_version"] not in known:
            raise InputError(f"{record['model_version']!r} is no known version", file=file,
                             field=f"{name}.model_version", remedy="Import the file that has it")  # fmt: skip


def _import(state: State, record: Record, actor: str) -> Draft:
    return Draft(kind="import", actor=actor, version=f"v{len(state.versions) + 1}",
                 facts={"model": record["version_id"], "external": record})  # fmt: skip


def _plan(registry: Registry, state: State, records: dict[str, Record], file: object) -> _Plan:
    """What an import of deployments would do; raises InputError where files and log contradict each other."""
    known = _replay(registry, state)
    for name in sorted(known.ours & records.keys()):
        theirs, ours = records[name]["status"], known.records[name]["status"]
        if theirs != ours:
            raise InputError(f"{theirs!r}, but {ours!r} by the log", file=file, field=f"{name}.status",
                             remedy=REMEDY)  # fmt: skip
    news = [record for name, record in records.items()
            if name not in known.ours and record != known.records.get(name)]  # fmt: skip
    latest = live(records.values())
    model = latest["model_version"] if latest else ""
    champion = {version.label: version.model for version in state.versions}.get(state.champion, "")
    own = {version.model for version in state.versions if version.folder}
    if not news or model == champion or (latest and latest["deployment_id"] in known.ours):
        return _Plan(news)
    if champion in own and latest not in news:  # what was live before ours is nothing new
        return _Plan(news)
    if {champion, model} & own:
        raise InputError(f"{model!r} is live there, but {champion or 'nothing'!r} by the log", file=file,
                         remedy=REMEDY)  # fmt: skip
    return _Plan(news, model, latest["deployment_id"] if latest else "")


def _take_over(
    state: State, registry: Registry, records: dict[str, Record], file: object, actor: str
) -> Draft:
    """The event that keeps Step 4's deployments, and adopts the one that is live."""
    plan = _plan(registry, state, records, file)
    if plan.model is None:  # an alias set to what it is: deployments alone make no event
        change: dict[str, Any] = {"kind": "alias", "version": state.aliases.get("shadow", ""),
                                  "facts": {"alias": "shadow"}}  # fmt: skip
    else:
        label = {version.model: version.label for version in state.versions}.get(plan.model, "")
        change = {"kind": "adopt", "version": label, "facts": {"deployment": plan.deployment}}
    return Draft(**change, actor=actor, evidence={"deployments": registry.put_evidence(plan.news)})


def _read(path: str | pathlib.Path, kind: type, key: str, containers: tuple[str, ...]) -> dict[str, Record]:
    """Records of a file by id, each as it came; raises InputError naming the entry and the field."""
    found: dict[str, Record] = {}
    for place, entry in _entries(_json(path), path, key, containers):
        try:
            msgspec.convert(entry, kind)
            if len(msgspec.json.encode(entry)) > RECORD_LIMIT:
                raise ValueError(f"a record larger than {RECORD_LIMIT:,} bytes")
        except (ValueError, RecursionError) as error:
            reason, field = explain(error)
            raise InputError(reason, file=path, field=f"{place}.{field}" if field else place) from None
        if entry[key] in found:
            raise InputError(f"{entry[key]!r} is there twice", file=path, field=f"{place}.{key}")
        found[entry[key]] = entry
    return found


def _entries(data: Any, path: object, key: str, containers: tuple[str, ...]) -> list[tuple[str, Any]]:
    """The entries of any shape that is read, and what to call each."""
    for name in containers:
        if isinstance(data, dict) and isinstance(data.get(name), list):
            if len(data) > 1:
                raise InputError(f"beside `{name}` stand fields that no export could keep", file=path,
                                 remedy=f"Leave only `{name}`")  # fmt: skip
            data = data[name]
    if isinstance(data, list):
        return [(f"[{i}]", entry) for i, entry in enumerate(data)]
    if not isinstance(data, dict):
        raise InputError("expected an object of records by id, or a list of records", file=path)
    for name, entry in data.items():
        if isinstance(entry, dict) and entry.setdefault(key, name) != name:
            raise InputError(f"stands under {name!r}", file=path, field=f"{name}.{key}")
    return [*data.items()]


def _json(path: str | pathlib.Path) -> Any:
    """Strict JSON: no NaN, no infinity, no key twice."""
    try:
        return json.loads(pathlib.Path(path).read_bytes(), object_pairs_hook=_object,
                          parse_float=_number, parse_constant=_number)  # fmt: skip
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise InputError("no such file", file=path) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"no JSON: {error}", file=path, line=getattr(error, "lineno", None)) from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key!r} is there twice")
        found[key] = value
    return found


def _number(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is not finite")
    return value


def _moment(text: str) -> datetime.datetime:
    """ISO 8601, UTC where no zone is told."""
    moment = datetime.datetime.fromisoformat(text)
    return moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)


def _check_moment(text: str, field: str) -> None:
    try:
        _moment(text)
    except ValueError:
        raise ValueError(f"expected ISO 8601, got {text[:50]!r} - at `$.{field}`") from None
