"""The registry: immutable versions, and a log of events that everything else follows from.

    NAME/versions/<hash>/   the files of a version, and manifest.json with the SHA-256 of each
    NAME/events/<number>    what happened, each event with the hash of the one before
    NAME/evidence/<hash>    what a decision rested on: judgements of the gate, verdicts of the canary

An event is put if absent under the next number, so of several writers one wins and the others look
again: what is live changes only if it is still what the writer had seen.  Aliases are derived, never
stored.  All JSON is canonical: each byte is one that a hash stands for.  The chain shows a change of any
event but proves nothing of the newest ones unless its head, which `verify` prints, is kept elsewhere too.
"""

import datetime
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import msgspec

from cotrr import files
from cotrr.errors import InputError
from cotrr.ranker import model_files
from cotrr.store import NAME, Store

Kind = Literal["register", "import", "alias", "adopt", "judge", "promote", "rollback", "canary"]
ALIASES = ("champion", "challenger", "shadow")
GROUNDS = ("judgement", "certificate", "policy")  # evidence that every promotion names
AHEAD = datetime.timedelta(minutes=5)  # a clock that is further ahead than this is wrong
EVENT_LIMIT, MANIFEST_LIMIT, EVIDENCE_LIMIT = 2**18, 2**20, 2**26  # bytes
FILES_LIMIT, VERSION_LIMIT = 64, 2**30  # files of a version, and bytes of all of them
FORMAT = 1
SHA256, LABEL = re.compile(r"[0-9a-f]{64}"), re.compile(r"v[0-9]+")
EVENT = re.compile(r".*/events/[0-9]{8}\.json")


class Draft(msgspec.Struct, frozen=True, kw_only=True):
    """What is to happen, before it has a number."""

    kind: Kind
    actor: str
    version: str  # `v3`; "" where an alias is cleared, or no version is live
    evidence: dict[str, str] = {}  # SHA-256 in NAME/evidence/, by what it is
    facts: dict[str, Any] = {}


class Event(Draft, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One entry of the log."""

    number: int
    previous: str  # SHA-256 of the event before, "" for the first
    at: str  # as `stamp` writes it, never before the event before
    champion: str  # what was live when it happened, "" for none

    @property
    def digest(self) -> str:
        """SHA-256 of the event's content."""
        return _sha256(_encode(self))


class _Stored(msgspec.Struct, forbid_unknown_fields=True):
    event: Event
    sha256: str  # of the event: the newest one has no successor to vouch for it


class File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Size and SHA-256 of a file of a version."""

    size: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`manifest.json` of a version."""

    format: int
    model: str  # the model's own version, which reranked lines carry
    files: dict[str, File]
    facts: dict[str, Any] = {}  # data certificate, settings, metrics with intervals


class Version(NamedTuple):
    """A registered version, or one of Step 4's own that was imported; the files of those are not here."""

    label: str  # v1, v2, … in order of registration
    model: str  # what reranked lines call it
    folder: str  # "" of an imported version
    manifest: str  # SHA-256
    event: Event


class State(NamedTuple):
    """All that follows from the log."""

    events: tuple[Event, ...] = ()
    versions: tuple[Version, ...] = ()
    aliases: dict[str, str] = {}  # noqa: RUF012  # alias → label
    past: tuple[str, ...] = ()  # what was live before and a rollback goes back to, the newest last
    blocked: frozenset[str] = frozenset()  # by a canary, until another passes

    @property
    def way_back(self) -> str:
        """What a rollback makes live: the newest of the past that no canary blocks; "" where none is."""
        passed_over = self.blocked | {self.champion}
        return next((label for label in self.past[::-1] if label not in passed_over), "")

    @property
    def head(self) -> str:
        """SHA-256 of the newest event."""
        return self.events[-1].digest if self.events else ""

    @property
    def champion(self) -> str:
        """The label of what is live; "" where nothing is."""
        return self.aliases.get("champion", "")

    def version(self, name: str) -> Version:
        """The version of a label, an alias, or a model's own version; raises InputError for others.

        A model of Step 4 may be called v2 or champion: here these names mean labels and aliases only.
        """
        label, ours = self.aliases.get(name, name), name in ALIASES or LABEL.fullmatch(name)
        for version in self.versions:
            if label == version.label or (name == version.model and not ours):
                return version
        known = ", ".join([*(v.label for v in self.versions), *self.aliases]) or "none yet"
        raise InputError(f"no version {name!r}", remedy=f"Known are: {known}")

    def refuse_changed_policy(self, name: str, digest: str) -> None:
        """Raises InputError where a policy said something else under its name in an earlier event."""
        for event in self.events:
            if event.facts.get("policy") == name and event.facts.get("policy_hash") != digest:
                raise InputError(
                    f"policy {name!r} said something else in event {event.number}",
                    field="name",
                    remedy="Give a changed policy a new name",
                )

    def step(self, event: Event) -> "State":
        """The state after one more event; raises InputError for one that cannot follow."""
        last, label = self.events[-1] if self.events else None, event.version
        if event.number != len(self.events) + 1 or event.previous != self.head:
            raise InputError(f"event {event.number} does not follow event {len(self.events)}")
        if event.champion != self.champion or not _is_stamp(event.at) or (last and event.at < last.at):
            raise InputError(f"event {event.number} contradicts the log before it")
        if not event.actor.isprintable():
            raise InputError(f"event {event.number} has no printable actor")
        after = self._replace(events=(*self.events, event))
        if event.kind in ("register", "import"):
            return after._registered(event)
        may_be_none = event.kind in ("alias", "adopt", "rollback")
        if label not in [version.label for version in self.versions] and (label or not may_be_none):
            raise InputError(f"event {event.number} is about {label!r}, which is no version")
        match event.kind:
            case "promote" | "adopt" | "rollback":
                return after._live(event)
            case "alias":
                alias = _fact(event, "alias", str)
                if alias not in ALIASES[1:]:
                    raise InputError(f"event {event.number} sets {alias!r}, which is no alias to set")
                return after._replace(aliases=self._with(alias, label))
            case "canary":
                change = self.blocked.union if _fact(event, "blocks", bool) else self.blocked.difference
                return after._replace(blocked=change({label}))
            case _:
                return after

    def _live(self, event: Event) -> "State":
        """Another version live, or none; one from the past takes the past as it was then."""
        label, past = event.version, (*self.past, self.champion)
        ours = bool(label) and bool(self.version(label).folder)
        if label == self.champion:
            raise InputError(f"{label or 'nothing'} is live already")
        if event.kind == "promote" and label in self.blocked:
            raise InputError(f"a canary blocks {label}", remedy="It goes live after one that passes")
        if (event.kind, ours) in (("promote", False), ("adopt", True)):
            raise InputError(
                f"{label or 'nothing'} is {'' if ours else 'not '}registered here: no {event.kind}"
            )
        if event.kind == "promote" and not _is_grounded(event):
            raise InputError(f"event {event.number} promotes {label} without evidence",
                             remedy="A version goes live by the gate, or back by `rollback`")  # fmt: skip
        if event.kind == "rollback":
            if label not in self.past:
                raise InputError(f"{label} is not among what was live before",
                                 remedy="A version goes live by `promote`")  # fmt: skip
            past = self.past[: len(self.past) - 1 - self.past[::-1].index(label)]
        return self._replace(aliases=self._with("champion", label), past=past)

    def _with(self, alias: str, label: str) -> dict[str, str]:
        others = {name: other for name, other in self.aliases.items() if name != alias}
        return others | ({alias: label} if label else {})

    def _registered(self, event: Event) -> "State":
        """A further version."""
        model = _fact(event, "model", str)
        manifest = _fact(event, "manifest", str) if event.kind == "register" else ""
        if event.version != f"v{len(self.versions) + 1}":
            raise InputError(f"event {event.number} registers {event.version!r} out of turn")
        if not (SHA256.fullmatch(manifest) or event.kind == "import"):
            raise InputError(f"event {event.number} has no SHA-256", field="manifest")
        if not model or not model.isprintable():
            raise InputError(f"event {event.number} registers {model!r}, which is no name of a model")
        if known := [version.label for version in self.versions if version.model == model]:
            raise InputError(f"{model} is registered as {known[0]} already")
        version = Version(event.version, model, manifest[:16], manifest, event)
        return self._replace(versions=(*self.versions, version))


class Registry:
    """The versions of one model name in a store."""

    def __init__(self, store: Store, name: str = "cotrr", clock: Callable[[], str] | None = None):
        if not NAME.fullmatch(name):
            raise InputError(f"--name={name!r}: use letters, digits, dots, dashes and underscores")
        self.store, self.name = store, name
        self._clock = clock or _now
        self._state = State()

    def state(self) -> State:
        """The state of the log; reads the events that are new since the last call."""
        while self._read_on() or self._is_gap():
            pass
        return self._state

    def append(self, draft: Callable[[State], Draft]) -> Event:
        """Writes what `draft` makes of the state: where another was faster, of the state after that.

        `draft` raises InputError where the state does not allow it.
        """
        while True:
            state = self.state()
            wanted = draft(state)
            last = state.events[-1].at if state.events else ""
            event = Event(
                **msgspec.structs.asdict(wanted) | {"facts": _finite(wanted.facts)},
                number=len(state.events) + 1,
                previous=state.head,
                at=max(self._clock(), last),
                champion=state.champion,
            )
            key, data = self._event_key(event.number), _encode(_Stored(event, event.digest))
            event = self._decode_event(key, data)  # as every reader will, to be refused here instead
            state.step(event)
            # A store that was asked again after its answer got lost says no to what is there: our own.
            if self.store.put(key, data) or self.store.get(key, EVENT_LIMIT) == data:
                return event

    def register(self, content: Mapping[str, bytes], facts: Mapping[str, Any], actor: str) -> Version:
        """Puts the files of a version, model_files.FILES among them, then the event that makes it one."""
        model = model_files.parse(content, "--model").facts["version"]
        listed = {name: File(len(data), _sha256(data)) for name, data in content.items()}
        manifest = _encode(Manifest(format=FORMAT, model=model, files=listed,
                                    facts=_finite(facts)))  # fmt: skip
        digest = _sha256(manifest)
        folder = f"versions/{digest[:16]}"
        _check_manifest(self._decode(manifest, f"{folder}/manifest.json", Manifest, MANIFEST_LIMIT))

        def draft(state: State) -> Draft:
            if known := [v.label for v in state.versions if v.model == model]:
                raise InputError(f"{model} is registered as {known[0]} already")
            return Draft(kind="register", actor=actor, version=f"v{len(state.versions) + 1}",
                         facts={"model": model, "manifest": digest})  # fmt: skip

        draft(self.state())
        for name, data in {**content, "manifest.json": manifest}.items():
            self._put(f"{folder}/{name}", data)
        return self.state_after(self.append(draft)).versions[-1]

    def state_after(self, event: Event) -> State:
        """The state just after an event, whatever has come since."""
        return _replay(self.state().events[: event.number])

    def put_evidence(self, value: Any) -> str:
        """Keeps a decision's grounds as JSON; returns their SHA-256."""
        data = _encode(_finite(value))
        digest = _sha256(data)
        path = f"evidence/{digest}.json"
        self._decode(data, path, Any, EVIDENCE_LIMIT)
        self._put(path, data)
        return digest

    def evidence(self, digest: str) -> Any:
        """What was kept under a SHA-256; raises InputError where it is missing or changed."""
        return self._verified(f"evidence/{digest}.json", digest, Any, EVIDENCE_LIMIT)

    def manifest(self, version: Version) -> Manifest:
        """The manifest of a version, verified."""
        if not version.folder:
            raise InputError(f"{version.label} is Step 4's own {version.model}: its files are not here")
        path = f"versions/{version.folder}/manifest.json"
        manifest = _check_manifest(self._verified(path, version.manifest, Manifest, MANIFEST_LIMIT))
        if manifest.model != version.model:
            raise InputError(f"is about {manifest.model!r}, not {version.model}", file=self._key(path))
        return manifest

    def files(self, version: Version) -> dict[str, bytes]:
        """All files of a version; raises InputError unless they are exactly those it was registered with."""
        manifest, prefix = self.manifest(version), f"versions/{version.folder}"
        there = {key.removeprefix(self._key(prefix) + "/") for key in self.store.keys(self._key(prefix))}
        if odd := there ^ {*manifest.files, "manifest.json"}:
            raise InputError(
                f"files are missing or too many: {', '.join(sorted(odd))}", file=self._key(prefix)
            )
        content = {}
        for name, file in manifest.files.items():
            content[name] = self._get(f"{prefix}/{name}", file.size)
            if len(content[name]) != file.size or _sha256(content[name]) != file.sha256:
                raise InputError("changed since it was written", file=self._key(f"{prefix}/{name}"))
        return content

    def contents(self, version: Version) -> model_files.Contents:
        """The model of a version as its files hold it, verified first."""
        folder = self._key(f"versions/{version.folder}")
        found = model_files.parse(self.files(version), folder)
        if found.facts["version"] != version.model:
            raise InputError(f"is {found.facts['version']}, not {version.model}", file=folder)
        return found

    def rollback(
        self, actor: str, to: str | None = None, reason: str = "", expected: str | None = None
    ) -> Event:
        """Makes `State.way_back` live again, or version `to`, blocked or not; verifies its files first.

        A version of Step 4's own, or none at all, has no files here: Step 4 then serves as it did.
        Raises InputError where another version than `expected`, a label, is live: unless given, than
        what is live now, lest two go back by two.
        """
        before = self.state().champion if expected is None else expected

        def draft(state: State) -> Draft:
            if not before:
                raise InputError("nothing is live, so there is nothing to roll back")
            if state.champion != before:
                raise InputError(f"meanwhile {state.champion or 'nothing'} is live, no longer {before}",
                                 remedy="See what happened, then decide again")  # fmt: skip
            target = state.version(to).label if to else state.way_back
            if target and state.version(target).folder:
                self.contents(state.version(target))
            return Draft(kind="rollback", actor=actor, version=target, facts={"reason": reason})

        return self.append(draft)

    def live_at(self, moment: datetime.datetime) -> str:
        """The label of what was live at a moment; "" where nothing was."""
        at = stamp(moment)
        return _replay(event for event in self.state().events if event.at <= at).champion

    def verify(self) -> tuple[list[str], list[str]]:
        """What is wrong, and what was merely noticed, after reading every byte there is."""
        try:
            keys = self.store.keys(self.name)
        except InputError as error:
            return [str(error)], []
        if not keys:
            return [f"{self.name}: nothing here"], []
        fresh, notes = Registry(self.store, self.name), list[str]()
        problems = broken = _told(fresh.state)
        state, now = fresh._state, datetime.datetime.fromisoformat(self._clock())
        if state.events and (at := state.events[-1].at) > stamp(now + AHEAD):  # all later ones will say so
            problems = [*problems, f"event {len(state.events)} is of {at}, which is in the future"]
        for version in state.versions:
            if version.folder:
                problems = problems + _told(lambda v=version: self.contents(v))
        kept = {key.split("/")[-1].removesuffix(".json") for key in keys if self._is_below("evidence", key)}
        named = {digest for event in state.events for digest in event.evidence.values()}
        for digest in sorted(kept | named):
            problems = problems + _told(lambda d=digest: self.evidence(d))
        folders = tuple(self._key(f"versions/{v.folder}/") for v in state.versions if v.folder)
        events = {self._event_key(event.number) for event in state.events}
        for key in keys:
            if key in events or key.startswith(folders) or self._is_below("evidence", key):
                continue
            if broken and (EVENT.fullmatch(key) or self._is_below("versions", key)):
                continue  # what comes after a broken event was not read
            if self._is_below("versions", key):
                notes.append(f"{key}: of no version (its registration did not end)")
            else:
                problems = [*problems, f"{key}: does not belong here"]
        return problems, notes

    def _is_below(self, folder: str, key: str) -> bool:
        return key.startswith(self._key(f"{folder}/"))

    def _read_on(self) -> bool:
        """Takes in the next event, if it is there."""
        key = self._event_key(len(self._state.events) + 1)
        try:
            data = self.store.get(key, EVENT_LIMIT)
        except KeyError:
            return False
        self._state = self._state.step(self._decode_event(key, data))
        return True

    def _is_gap(self) -> bool:
        """Whether there are later events than the last one read: raises InputError if its next is gone."""
        key = self._event_key(len(self._state.events) + 1)
        later = [k for k in self.store.keys(self._key("events")) if EVENT.fullmatch(k) and k >= key]
        if later and not self._read_on():  # were it still being written, none would be after it
            raise InputError("missing, though there are later events", file=key)
        return bool(later)

    def _decode_event(self, key: str, data: bytes) -> Event:
        stored = self._decode(data, key.removeprefix(self.name + "/"), _Stored, EVENT_LIMIT)
        if stored.sha256 != stored.event.digest:
            raise InputError("changed since it was written", file=key)
        return stored.event

    def _event_key(self, number: int) -> str:
        return self._key(f"events/{number:08d}.json")

    def _key(self, path: str) -> str:
        return f"{self.name}/{path}"

    def _put(self, path: str, data: bytes) -> None:
        """Puts what is named by its content: what is there already must be the same."""
        key = self._key(path)
        if not self.store.put(key, data) and self.store.get(key, len(data)) != data:
            raise InputError("holds something else", file=key, remedy="Move it away, then do this again")

    def _get(self, path: str, limit: int) -> bytes:
        try:
            return self.store.get(self._key(path), limit)
        except KeyError:
            raise InputError("missing", file=self._key(path)) from None

    def _verified(self, path: str, digest: str, kind: Any, limit: int) -> Any:
        data = self._get(path, limit)
        if _sha256(data) != digest:
            raise InputError("changed since it was written", file=self._key(path))
        return self._decode(data, path, kind, limit)

    def _decode(self, data: bytes, path: str, kind: Any, limit: int) -> Any:
        if len(data) > limit:
            raise InputError(f"larger than {limit:,} bytes", file=self._key(path))
        try:
            value = msgspec.json.decode(data, type=kind)
            if _encode(value) == data:
                return value
            reason = "it is not canonical JSON"
        except (ValueError, RecursionError) as error:
            reason = str(error)
        raise InputError(f"not what belongs here: {reason}", file=self._key(path))


def _encode(value: Any) -> bytes:
    """Canonical JSON; raises InputError for what JSON does not hold."""
    try:
        return msgspec.json.encode(value, order="deterministic")
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise InputError(f"cannot be kept as JSON: {error}") from None


def _finite(value: Any) -> Any:
    """`files.finite`, which ends at half the depth that readers reach, whatever calls them."""
    try:
        return files.finite(value)
    except RecursionError:
        raise InputError("cannot be kept as JSON: nested too deeply") from None


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _replay(events: Iterable[Event]) -> State:
    state = State()
    for event in events:
        state = state.step(event)
    return state


def _fact(event: Event, name: str, kind: type) -> Any:
    value = event.facts.get(name)
    if not isinstance(value, kind):
        raise InputError(f"event {event.number} lacks `{name}`", field=name)
    return value


def _is_grounded(event: Event) -> bool:
    """Whether a promotion rests on a judgement that said so."""
    grounds = [event.evidence.get(what, "") for what in GROUNDS]
    return all(map(SHA256.fullmatch, grounds)) and event.facts.get("verdict") == "PROMOTE"


def stamp(moment: datetime.datetime) -> str:
    """A moment with its zone as events write it; their order as text is their order in time."""
    return moment.astimezone(datetime.UTC).isoformat(timespec="microseconds")


def _is_stamp(text: str) -> bool:
    try:
        return stamp(datetime.datetime.fromisoformat(text)) == text
    except (ValueError, OverflowError):
        return False


def _now() -> str:
    return stamp(datetime.datetime.now(datetime.UTC))


def _check_manifest(manifest: Manifest) -> Manifest:
    names, sizes = {*manifest.files}, [file.size for file in manifest.files.values()]
    bad = [name for name in names if not NAME.fullmatch(name) or name == "manifest.json"]
    if (
        manifest.format != FORMAT
        or bad
        or min(sizes, default=0) < 0
        or sum(sizes) > VERSION_LIMIT
        or len(names) > FILES_LIMIT
        or not names.issuperset(model_files.FILES)
    ):
        raise InputError(
            f"no manifest of a version: format {manifest.format}, {len(names)} files of {sum(sizes):,} bytes"
            + "".join(f", {name[:100]!r}" for name in bad)
        )
    return manifest


def _told(check: Callable[[], Any]) -> list[str]:
    """What a check raises, as a list of at most one problem."""
    try:
        check()
    except InputError as error:
        return [str(error)]
    return []
