"""The registry: immutable versions, and a log of events that everything else follows from.

    NAME/versions/<hash>/   the files of a version, and manifest.json with the SHA-256 of each
    NAME/events/<number>    what happened, each event with the hash of the one before
    NAME/evidence/<hash>    what a decision rested on: judgements of the gate, verdicts of the canary

An event is put if absent under the next number, so of several writers one wins and the others look
again: what is live changes only if it is still what the writer had seen.  Aliases are derived, never
stored.  The chain shows a change of any event but proves nothing of the newest ones unless its head,
which `verify` prints, is kept elsewhere too.
"""

import datetime
import hashlib
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import msgspec

from cotrr import files
from cotrr.deploy.store import NAME, Store
from cotrr.errors import InputError
from cotrr.ranker import artifact

Kind = Literal["register", "import", "alias", "adopt", "judge", "promote", "rollback", "canary"]
ALIASES = ("champion", "challenger", "shadow")
EVENT_LIMIT, MANIFEST_LIMIT, EVIDENCE_LIMIT, FILE_LIMIT = 2**18, 2**20, 2**26, 2**29  # bytes
FILES_LIMIT = 64  # of one version
FORMAT = 1


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
    at: str  # ISO 8601, UTC, never before the event before
    champion: str  # what was live when it happened, "" for none

    @property
    def digest(self) -> str:
        """SHA-256 of the event's content."""
        return hashlib.sha256(msgspec.json.encode(self, order="deterministic")).hexdigest()


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
    def head(self) -> str:
        """SHA-256 of the newest event."""
        return self.events[-1].digest if self.events else ""

    @property
    def champion(self) -> str:
        """The label of what is live; "" where nothing is."""
        return self.aliases.get("champion", "")

    def version(self, name: str) -> Version:
        """The version of a label, an alias, or a model's own version; raises InputError for others."""
        label = self.aliases.get(name, name)
        for version in self.versions:
            if label in (version.label, version.model):
                return version
        known = ", ".join([*(v.label for v in self.versions), *self.aliases]) or "none yet"
        raise InputError(f"no version {name!r}", remedy=f"Known are: {known}")

    def step(self, event: Event) -> "State":
        """The state after one more event; raises InputError for one that cannot follow."""
        last = self.events[-1] if self.events else None
        if event.number != len(self.events) + 1 or event.previous != self.head:
            raise InputError(f"event {event.number} does not follow event {len(self.events)}")
        if event.champion != self.champion or (last and event.at < last.at):
            raise InputError(f"event {event.number} contradicts the log before it")
        after = self._replace(events=(*self.events, event))
        if event.kind in ("register", "import"):
            return after._registered(event)
        if event.version:
            after.version(event.version)
        live = lambda label: {**{k: v for k, v in self.aliases.items() if k != "champion"},
                              **({"champion": label} if label else {})}  # fmt: skip
        match event.kind:
            case "adopt" if event.version and after.version(event.version).folder:
                raise InputError(f"event {event.number} adopts a version that is not Step 4's own")
            case "promote" | "adopt":
                return after._replace(aliases=live(event.version), past=(*self.past, self.champion))
            case "rollback":
                return after._replace(aliases=live(event.version), past=self._past_before(event.version))
            case "alias":
                alias = _fact(event, "alias")
                others = {k: v for k, v in self.aliases.items() if k != alias}
                return after._replace(aliases=others | ({alias: event.version} if event.version else {}))
            case "canary":
                change = self.blocked.union if event.facts.get("blocks") else self.blocked.difference
                return after._replace(blocked=change({event.version}))
            case _:
                return after

    def _past_before(self, label: str) -> tuple[str, ...]:
        """The past of a version that was live, when it was; raises InputError for any other."""
        if label not in self.past:
            raise InputError(f"{label} is not among what was live before",
                             remedy="A version goes live by `promote`")  # fmt: skip
        return self.past[: len(self.past) - 1 - self.past[::-1].index(label)]

    def _registered(self, event: Event) -> "State":
        """A further version; one that Step 4 had live is what a rollback goes back to."""
        if event.version != f"v{len(self.versions) + 1}":
            raise InputError(f"event {event.number} registers {event.version!r} out of turn")
        of = lambda name: _fact(event, name) if event.kind == "register" else ""
        version = Version(event.version, _fact(event, "model"), of("folder"), of("manifest"), event)
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
        while (event := self._event(len(self._state.events) + 1)) is not None:
            self._state = self._state.step(event)
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
                **msgspec.structs.asdict(wanted),
                number=len(state.events) + 1,
                previous=state.head,
                at=max(self._clock(), last),
                champion=state.champion,
            )
            state.step(event)  # refused here rather than by every reader
            stored = _Stored(event, event.digest)
            if self.store.put(
                self._event_key(event.number), msgspec.json.encode(stored, order="deterministic")
            ):
                return event

    def register(self, content: Mapping[str, bytes], facts: Mapping[str, Any], actor: str) -> Version:
        """Puts the files of a version, artifact.FILES among them, then the event that makes it one."""
        model = artifact.parse(content, "--model")
        listed = {name: File(len(data), hashlib.sha256(data).hexdigest()) for name, data in content.items()}
        manifest = msgspec.json.encode(
            Manifest(format=FORMAT, model=model.version, files=listed, facts=files.finite(facts)),
            order="deterministic",
        )
        _check_manifest(msgspec.json.decode(manifest, type=Manifest))
        digest = hashlib.sha256(manifest).hexdigest()
        folder = digest[:16]

        def draft(state: State) -> Draft:
            if known := [v.label for v in state.versions if v.model == model.version]:
                raise InputError(f"{model.version} is registered as {known[0]} already")
            return Draft(kind="register", actor=actor, version=f"v{len(state.versions) + 1}",
                         facts={"model": model.version, "folder": folder, "manifest": digest})  # fmt: skip

        draft(self.state())
        for name, data in {**content, "manifest.json": manifest}.items():
            self._put(f"versions/{folder}/{name}", data)
        return self.state_after(self.append(draft)).versions[-1]

    def state_after(self, event: Event) -> State:
        """The state just after an event, whatever has come since."""
        state = State()
        for past in self.state().events[: event.number]:
            state = state.step(past)
        return state

    def put_evidence(self, value: Any) -> str:
        """Keeps a decision's grounds as canonical JSON; returns their SHA-256."""
        data = msgspec.json.encode(files.finite(value), order="deterministic")
        digest = hashlib.sha256(data).hexdigest()
        self._put(f"evidence/{digest}.json", data)
        return digest

    def evidence(self, digest: str) -> Any:
        """What was kept under a SHA-256; raises InputError where it is missing or changed."""
        data = self._get(f"evidence/{digest}.json", EVIDENCE_LIMIT)
        if hashlib.sha256(data).hexdigest() != digest:
            raise InputError("changed since it was written", file=self._key(f"evidence/{digest}.json"))
        return self._decode(data, f"evidence/{digest}.json", Any)

    def manifest(self, version: Version) -> Manifest:
        """The manifest of a version, verified."""
        path = f"versions/{version.folder}/manifest.json"
        if not version.folder:
            raise InputError(f"{version.label} is Step 4's own {version.model}: its files are not here")
        data = self._get(path, MANIFEST_LIMIT)
        if hashlib.sha256(data).hexdigest() != version.manifest:
            raise InputError("changed since it was registered", file=self._key(path))
        return _check_manifest(self._decode(data, path, Manifest))

    def files(self, version: Version) -> dict[str, bytes]:
        """All files of a version; raises InputError unless they are exactly those it was registered with."""
        manifest, prefix = self.manifest(version), f"versions/{version.folder}"
        there = {key.removeprefix(self._key(prefix) + "/") for key in self.store.keys(self._key(prefix))}
        if there != {*manifest.files, "manifest.json"}:
            odd = ", ".join(sorted(there ^ {*manifest.files, "manifest.json"}))
            raise InputError(f"files are missing or too many: {odd}", file=self._key(prefix))
        content = {}
        for name, file in manifest.files.items():
            data = self._get(f"{prefix}/{name}", file.size)
            if len(data) != file.size or hashlib.sha256(data).hexdigest() != file.sha256:
                raise InputError("changed since it was registered", file=self._key(f"{prefix}/{name}"))
            content[name] = data
        return content

    def model(self, version: Version) -> artifact.Model:
        """The model of a version, its files verified first."""
        return artifact.parse(self.files(version), self._key(f"versions/{version.folder}"))

    def rollback(self, actor: str, to: str | None = None, reason: str = "") -> Event:
        """Makes the version before the champion live again, or version `to`; verifies its files first.

        A version of Step 4's own, or none at all, has no files here: Step 4 then serves as it did.
        """

        def draft(state: State) -> Draft:
            if not state.champion:
                raise InputError("nothing is live, so there is nothing to roll back")
            target = state.version(to).label if to else state.past[-1]
            if target and state.version(target).folder:
                self.model(state.version(target))
            return Draft(kind="rollback", actor=actor, version=target, facts={"reason": reason})

        return self.append(draft)

    def live_at(self, moment: datetime.datetime) -> str:
        """The label of what was live at a moment; "" where nothing was."""
        at, state = stamp(moment), State()
        for event in self.state().events:
            if event.at > at:
                break
            state = state.step(event)
        return state.champion

    def verify(self) -> tuple[list[str], list[str]]:
        """What is wrong, and what was merely noticed, after reading every byte there is."""
        try:
            keys = self.store.keys(self.name)
        except InputError as error:
            return [str(error)], []
        fresh, problems, notes = Registry(self.store, self.name), list[str](), list[str]()
        try:
            state = fresh.state()
        except InputError as error:
            problems.append(str(error))
            state = fresh._state
        expected = {self._event_key(event.number) for event in state.events}
        for version in state.versions:
            if version.folder:
                problems += _told(lambda v=version: self.model(v))
        for digest in sorted({d for event in state.events for d in event.evidence.values()}):
            problems += _told(lambda d=digest: self.evidence(d))
        folders = tuple(self._key(f"versions/{v.folder}/") for v in state.versions if v.folder)
        for key in keys:
            if key in expected or key.startswith(folders):
                continue
            if key.startswith(self._key("versions/")):
                notes.append(f"{key}: of no version (its registration did not end)")
            elif key.startswith(self._key("evidence/")):
                digest = key.removeprefix(self._key("evidence/")).removesuffix(".json")
                problems += _told(lambda d=digest: self.evidence(d))
            else:
                problems.append(f"{key}: does not belong here")
        return list(dict.fromkeys(problems)), notes

    def _event(self, number: int) -> Event | None:
        key = self._event_key(number)
        try:
            data = self.store.get(key, EVENT_LIMIT)
        except KeyError:
            return None
        stored = self._decode(data, key.removeprefix(self.name + "/"), _Stored)
        # Canonical bytes: then every byte of the file is one that the hash stands for.
        if stored.sha256 != stored.event.digest or msgspec.json.encode(stored, order="deterministic") != data:
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
            raise InputError("holds something else", file=key, remedy="See what `verify` says")

    def _get(self, path: str, limit: int) -> bytes:
        try:
            return self.store.get(self._key(path), limit)
        except KeyError:
            raise InputError("missing", file=self._key(path)) from None

    def _decode(self, data: bytes, path: str, kind: Any) -> Any:
        try:
            return msgspec.json.decode(data, type=kind)
        except (ValueError, RecursionError) as error:
            raise InputError(f"not what belongs here: {error}", file=self._key(path)) from None


def _fact(event: Event, name: str) -> str:
    value = event.facts.get(name)
    if not isinstance(value, str):
        raise InputError(f"event {event.number} lacks `{name}`", field=name)
    return value


def stamp(moment: datetime.datetime) -> str:
    """A moment with its zone as events write it; their order as text is their order in time."""
    return moment.astimezone(datetime.UTC).isoformat(timespec="microseconds")


def _now() -> str:
    return stamp(datetime.datetime.now(datetime.UTC))


def _check_manifest(manifest: Manifest) -> Manifest:
    names = [*manifest.files]
    bad = [name for name in names if not NAME.fullmatch(name) or name == "manifest.json"]
    large = [name for name, file in manifest.files.items() if not 0 <= file.size <= FILE_LIMIT]
    if manifest.format != FORMAT or bad or large or len(names) > FILES_LIMIT or {*artifact.FILES} - {*names}:
        raise InputError(f"no manifest of a version: format {manifest.format}, {len(names)} files"
                         + "".join(f", {name[:100]!r}" for name in bad + large))  # fmt: skip
    return manifest


def _told(check: Callable[[], Any]) -> list[str]:
    """What a check raises, as a list of at most one problem."""
    try:
        check()
    except InputError as error:
        return [str(error)]
    return []
