"""The registry: the log decides, any change of any byte is found, and nothing but InputError comes out."""

import contextlib
import datetime
import hashlib
import io
import itertools
import json
import os
import pickle
import shutil
import struct
import time
import zipfile

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cotrr.deploy.registry import (
    EVENT_LIMIT,
    FILES_LIMIT,
    GROUNDS,
    MANIFEST_LIMIT,
    Draft,
    Registry,
    State,
    stamp,
)
from cotrr.errors import InputError
from cotrr.ranker.model_files import FILES, TABLES, version_of
from cotrr.store import LocalStore, open_store
from tests.deploy.small import make_registry, model_files, promotion, ticking


@pytest.fixture(scope="module", autouse=True)
def unflushed():
    """Without the time that flushing takes: test_registry_crashes.py is about that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(params=["local", "memory"])
def registry(request, tmp_path):
    """A registry of three versions, in a folder or in fsspec's emulation of an object store."""
    if request.param == "memory":
        fsspec = pytest.importorskip("fsspec")
        fsspec.filesystem("memory").store.clear()
    place = {"local": f"{tmp_path}/registry", "memory": "memory://bucket"}[request.param]
    registry = Registry(open_store(place), clock=ticking())
    for number in (1, 2, 3):
        registry.register(model_files(number), {"number": number}, "tester")
    return registry


@pytest.fixture(scope="module")
def history(tmp_path_factory):
    """A folder with a registry where each kind of event happened; to be copied, not changed."""
    folder = tmp_path_factory.mktemp("history") / "registry"
    registry = make_registry(folder, versions=3)
    put(registry, "import", "v4", facts={"model": "step4"})
    put(registry, "adopt", "v4")
    judgement = registry.put_evidence({"verdict": "HOLD", "value": 0.25})
    put(registry, "judge", "v1", evidence={"judgement": judgement})
    registry.append(lambda state: promotion(registry, "v1", judgement={"verdict": "PROMOTE", "value": 0.5}))
    put(registry, "alias", "v2", facts={"alias": "challenger"})
    promote(registry, "v2")
    put(registry, "canary", "v2", facts={"blocks": True})
    registry.rollback("tester")
    return folder


@pytest.fixture
def copy(history, tmp_path):
    return LocalCopy(shutil.copytree(history, tmp_path / "registry"))


class LocalCopy:
    """A copy of the history, with its folders by name."""

    def __init__(self, folder):
        self.folder, self.home = folder, folder / "cotrr"
        self.registry = Registry(LocalStore(folder), clock=ticking())
        self.events = sorted((self.home / "events").iterdir())

    @property
    def problems(self):
        return Registry(LocalStore(self.folder)).verify()[0]

    def version(self, label):
        return self.registry.state().version(label)

    def path(self, label):
        return self.home / "versions" / self.version(label).folder


def put(registry, kind, version, **more):
    return registry.append(lambda state: Draft(kind=kind, actor="tester", version=version, **more))


def promote(registry, version):
    return registry.append(lambda state: promotion(registry, version))


def sha(data):
    return hashlib.sha256(data).hexdigest()


ORDER = ("kind", "actor", "version", "evidence", "facts", "number", "previous", "at", "champion")
HASH = "0" * 64
REGISTER = {"kind": "register", "version": "v1", "facts": {"model": "m-1", "manifest": HASH}}
PROMOTE = {"kind": "promote", "version": "v1", "facts": {"verdict": "PROMOTE"},
           "evidence": {"certificate": HASH, "judgement": HASH, "policy": HASH}}  # fmt: skip
IMPORT = {"kind": "import", "version": "v1", "facts": {"model": "theirs"}}


def canonical(value):
    return msgspec.json.decode(msgspec.json.encode(value, order="deterministic"))


def forge(folder, *events, **parts):
    """A log whose hashes are right, whatever it says; the last event also says `parts`."""
    (folder / "cotrr" / "events").mkdir(parents=True)
    previous, made = "", [*events[:-1], events[-1] | parts]
    for number, event in enumerate(made, 1):
        said = {"actor": "forger", "evidence": {}, "facts": {}, "number": number, "previous": previous,
                "at": "2026-01-01T00:00:00.000000+00:00", "champion": ""} | event  # fmt: skip
        said |= {key: canonical(said[key]) for key in ("facts", "evidence")}
        said = {key: said[key] for key in sorted(said, key=lambda k: (*ORDER, k).index(k))}
        data = msgspec.json.encode(said)
        previous = sha(data)
        whole = msgspec.json.encode({"event": said, "sha256": previous})
        (folder / "cotrr" / "events" / f"{number:08d}.json").write_bytes(whole)
    return Registry(LocalStore(folder))


def refuses(registry, match=None):
    """That neither state nor verify lets something pass."""
    with pytest.raises(InputError, match=match):
        registry.state()
    assert registry.verify()[0]


# What it does.


def test_versions_are_numbered_in_order_and_come_back_whole(registry):
    state = registry.state()
    assert [v.label for v in state.versions] == ["v1", "v2", "v3"]
    for number, version in enumerate(state.versions, 1):
        assert registry.files(version) == model_files(number)
        assert registry.contents(version).facts["version"] == version.model
        assert registry.manifest(version).facts == {"number": number}
    assert registry.verify() == ([], [])


def test_a_model_is_registered_once(registry):
    with pytest.raises(InputError, match="is registered as v2 already"):
        registry.register(model_files(2), {"other": "facts"}, "tester")
    assert len(registry.state().versions) == 3 and registry.verify() == ([], [])


def test_what_is_no_model_is_not_registered(registry):
    before = registry.store.keys("cotrr")
    damaged = model_files(4)["weights.npz"][:-1] + b"\1"
    for content in (model_files(4) | {"weights.npz": damaged}, {}, {"model.json": b"{}"}):
        with pytest.raises(InputError):
            registry.register(content, {}, "tester")
    assert registry.store.keys("cotrr") == before


@pytest.mark.parametrize("name", ["../x", "a/b", "manifest.json", ".hidden", "a b", "x" * 101, ""])
def test_a_file_of_a_version_has_a_strict_name(registry, name):
    before = registry.store.keys("cotrr")
    with pytest.raises(InputError, match="no manifest of a version"):
        registry.register(model_files(4) | {name: b""}, {}, "tester")
    assert registry.store.keys("cotrr") == before


def test_too_many_files_are_not_registered(registry):
    with pytest.raises(InputError, match="no manifest of a version"):
        registry.register(model_files(4) | {f"f{i}": b"" for i in range(FILES_LIMIT)}, {}, "tester")


def test_a_version_is_found_by_label_alias_and_model(registry):
    promote(registry, "v2")
    state = registry.state()
    for name in ("v2", "champion", state.versions[1].model):
        assert state.version(name).label == "v2"
    for name in ("v4", "shadow", "", "V2", "v02", "v2 "):
        with pytest.raises(InputError, match=r"no version.*v1, v2, v3, champion"):
            state.version(name)


def test_a_model_of_step_4_that_is_called_as_ours_is_never_mistaken(registry):
    put(registry, "import", "v4", facts={"model": "v5"})
    put(registry, "import", "v5", facts={"model": "champion"})
    state = registry.state()
    assert state.version("v5").model == "champion"
    with pytest.raises(InputError, match="no version 'champion'"):
        state.version("champion")


def test_promotion_makes_live_and_remembers(registry):
    event = promote(registry, "v1")
    assert (event.champion, registry.state().champion) == ("", "v1")
    event = promote(registry, "v2")
    assert (event.champion, registry.state().champion) == ("v1", "v2")
    assert registry.state().past == ("", "v1")


def test_promotion_is_refused_if_the_champion_is_another_by_then(registry):
    """Another process promotes between the look and the write: the draft is asked again."""
    other = Registry(registry.store, clock=ticking())
    looked = []

    def draft(state):
        looked.append(state.champion)
        if len(looked) == 1:
            promote(other, "v3")
        if state.champion != "":
            raise InputError(f"meanwhile {state.champion} is live")
        return promotion(registry, "v1")

    with pytest.raises(InputError, match="meanwhile v3 is live"):
        registry.append(draft)
    assert looked == ["", "v3"]
    assert Registry(registry.store).state().champion == "v3"


def test_a_write_that_comes_second_goes_under_the_next_number(registry):
    other, first = Registry(registry.store, clock=ticking()), []

    def draft(state):
        if not first:
            first.append(put(other, "judge", "v3"))
        return promotion(registry, "v1")

    event = registry.append(draft)
    assert event.number == first[0].number + 1 and event.previous == first[0].digest
    assert registry.verify() == ([], [])


def test_rollback_goes_back_step_by_step_to_nothing(registry):
    for label in ("v1", "v2", "v3"):
        promote(registry, label)
    for expected in ("v2", "v1", ""):
        event = registry.rollback("tester", reason="complaints")
        assert event.version == expected == registry.state_after(event).champion == registry.state().champion
        assert event.facts == {"reason": "complaints"}
    with pytest.raises(InputError, match="nothing is live, so there is nothing to roll back"):
        registry.rollback("tester")
    assert len(registry.state().events) == 9  # forward in the log, nothing was taken out


def test_rollback_to_a_version_takes_the_past_of_then(registry):
    for label in ("v1", "v2", "v3", "v2"):
        promote(registry, label)
    registry.rollback("tester", to="v1")
    assert registry.state().champion == "v1" and registry.state().past == ("",)


def test_after_a_rollback_the_way_forward_is_open(registry):
    promote(registry, "v1")
    promote(registry, "v2")
    registry.rollback("tester")
    promote(registry, "v3")
    assert registry.state().past == ("", "v1")
    assert registry.rollback("tester").version == "v1"


@pytest.mark.parametrize("to", ["v3", "v9", "shadow"])
def test_what_was_never_live_is_not_reached_by_rollback(registry, to):
    promote(registry, "v1")
    promote(registry, "v2")
    before = registry.state()
    with pytest.raises(InputError):
        registry.rollback("tester", to=to)
    assert Registry(registry.store).state() == before


def test_rollback_to_what_is_live_is_refused(registry):
    for label in ("v1", "v2", "v1"):
        promote(registry, label)
    with pytest.raises(InputError, match="v1 is live already"):
        registry.rollback("tester", to="v1")


def test_a_damaged_target_is_refused_and_nothing_changes(copy):
    promote(copy.registry, "v3")  # over v1
    (copy.path("v1") / "trained_on.npz").write_bytes(b"")
    before = sorted(copy.home.rglob("*"))
    with pytest.raises(InputError, match=r"trained_on\.npz: changed since it was written"):
        copy.registry.rollback("tester")
    assert sorted(copy.home.rglob("*")) == before and copy.registry.state().champion == "v3"


def test_two_who_roll_back_at_once_go_back_once(registry):
    for label in ("v1", "v2", "v3"):
        promote(registry, label)
    late = Registry(registry.store, clock=ticking())
    verify_first, looks = late.contents, []

    def contents(version):
        if not looks:
            looks.append(Registry(registry.store, clock=ticking()).rollback("other"))
        return verify_first(version)

    late.contents = contents
    with pytest.raises(InputError, match="meanwhile v2 is live, no longer v3"):
        late.rollback("tester")
    assert registry.state().champion == "v2"


def test_a_rollback_from_a_version_leaves_another_live(registry):
    for label in ("v1", "v2", "v3"):
        promote(registry, label)
    for expected in ("v2", ""):
        with pytest.raises(InputError):
            registry.rollback("tester", expected=expected)
    assert registry.state().champion == "v3"
    assert registry.rollback("tester", expected="v3").version == "v2"


def test_a_rollback_passes_over_what_is_blocked_unless_it_is_named(registry):
    for label in ("v1", "v2", "v3"):
        promote(registry, label)
    put(registry, "canary", "v2", facts={"blocks": True})
    assert registry.rollback("tester").version == "v1"
    assert registry.state().past == ("",)
    promote(registry, "v3")
    put(registry, "canary", "v1", facts={"blocks": True})
    assert registry.state().way_back == ""
    assert registry.rollback("tester", to="v1").version == "v1"
    promote(registry, "v3")
    assert registry.rollback("tester").version == "" == registry.state().champion


def test_a_rollback_does_not_go_back_to_what_is_live(registry):
    for label in ("v1", "v2", "v1"):
        promote(registry, label)
    put(registry, "canary", "v2", facts={"blocks": True})
    assert registry.rollback("tester").version == ""


@pytest.mark.parametrize("change", [
    {"evidence": {}}, {"facts": {}}, {"facts": {"verdict": "HOLD"}}, {"facts": {"verdict": True}},
    *({"evidence": {**dict.fromkeys(GROUNDS, "0" * 64), what: "0" * 63}} for what in GROUNDS),
    *({"evidence": {other: "0" * 64 for other in GROUNDS if other != what}} for what in GROUNDS),
])  # fmt: skip
def test_a_version_goes_live_only_on_evidence(registry, change):
    before = registry.store.keys("cotrr")
    draft = msgspec.structs.replace(promotion(registry, "v1"), **change)
    with pytest.raises(InputError, match="promotes v1 without evidence"):
        registry.append(lambda state: draft)
    assert [key for key in registry.store.keys("cotrr") if "/evidence/" not in key] == before


def test_evidence_that_an_event_names_and_that_is_missing_is_found(registry):
    grounds = msgspec.structs.replace(promotion(registry, "v1"), evidence=dict.fromkeys(GROUNDS, HASH))
    registry.append(lambda state: grounds)
    assert registry.verify()[0] == [f"cotrr/evidence/{HASH}.json: missing"]


def test_a_put_that_succeeded_but_whose_answer_was_lost_is_ours(registry):
    store = registry.store
    put_for_real = store.put
    store.put = lambda key, data: put_for_real(key, data) and "/events/" not in key
    event = put(registry, "judge", "v1")
    assert registry.state().events[-1] == event and event.number == 4


def test_a_clock_that_was_ahead_is_told(registry):
    noon = datetime.datetime(2030, 1, 1, 12, tzinfo=datetime.UTC)
    clock = lambda minutes: lambda: stamp(noon + datetime.timedelta(minutes=minutes))
    put(Registry(registry.store, clock=clock(0)), "judge", "v1")
    assert Registry(registry.store, clock=clock(-4)).verify() == ([], [])
    (problem,) = Registry(registry.store, clock=clock(-6)).verify()[0]
    assert problem == "event 4 is of 2030-01-01T12:00:00.000000+00:00, which is in the future"


def test_what_step_4_had_live_is_gone_back_to_without_files(registry):
    put(registry, "import", "v4", facts={"model": "theirs"})
    put(registry, "adopt", "v4")
    promote(registry, "v1")
    assert registry.rollback("tester").version == "v4"
    for ask in (registry.manifest, registry.files, registry.contents):
        with pytest.raises(InputError, match="Step 4's own theirs: its files are not here"):
            ask(registry.state().version("v4"))
    assert registry.verify() == ([], [])


def test_what_was_live_at_a_moment(registry):
    at = lambda text: registry.live_at(datetime.datetime.fromisoformat(text))
    times = [promote(registry, label).at for label in ("v1", "v2")] + [registry.rollback("tester").at]
    before = lambda text: stamp(datetime.datetime.fromisoformat(text) - datetime.timedelta(microseconds=1))
    assert [at(t) for t in times] == ["v1", "v2", "v1"]  # from that moment on
    assert [at(before(t)) for t in times] == ["", "v1", "v2"]
    assert at("1999-01-01T00:00:00+00:00") == "" and at("2999-01-01T00:00:00+00:00") == "v1"
    assert at(times[1].replace("12:", "14:").replace("+00:00", "+02:00")) == "v2"  # the same moment


def test_aliases_follow_from_the_log_and_can_be_rebuilt(registry):
    put(registry, "alias", "v1", facts={"alias": "challenger"})
    put(registry, "alias", "v2", facts={"alias": "shadow"})
    promote(registry, "v3")
    put(registry, "alias", "v3", facts={"alias": "challenger"})
    put(registry, "alias", "", facts={"alias": "shadow"})
    assert registry.state().aliases == {"champion": "v3", "challenger": "v3"}
    assert Registry(registry.store).state() == registry.state()
    assert registry.state_after(registry.state().events[4]).aliases == {"challenger": "v1", "shadow": "v2"}


def test_a_blocked_version_is_not_promoted_until_a_canary_passes(registry):
    put(registry, "canary", "v1", facts={"blocks": True})
    put(registry, "canary", "v2", facts={"blocks": False})
    assert registry.state().blocked == {"v1"}
    with pytest.raises(InputError, match="a canary blocks v1"):
        promote(registry, "v1")
    put(registry, "canary", "v1", facts={"blocks": False})
    promote(registry, "v1")


def test_time_never_goes_back_in_the_log(registry):
    times = iter(["2026-06-01T00:00:00.000000+00:00", "2026-01-01T00:00:00.000000+00:00"])
    late = Registry(registry.store, clock=lambda: next(times))
    first, second = (put(late, "judge", "v1") for _ in range(2))
    assert second.at == first.at


def test_evidence_is_kept_by_its_hash_and_once(registry):
    grounds = {"b": [1, None, np.float32(0.5), np.array([1, 2])], "a": float("nan")}
    digest = registry.put_evidence(grounds)
    assert registry.put_evidence(grounds) == digest
    assert registry.evidence(digest) == {"a": None, "b": [1, None, 0.5, [1, 2]]}
    assert registry.store.get(f"cotrr/evidence/{digest}.json", 99) == b'{"a":null,"b":[1,null,0.5,[1,2]]}'


@pytest.mark.parametrize("digest", ["0" * 64, "", "..", "../events/00000001", "a b", "\0"])
def test_evidence_that_is_not_there(registry, digest):
    with pytest.raises(InputError):
        registry.evidence(digest)


def test_a_state_reads_only_what_is_new(registry):
    read = []
    registry.store.get, get = lambda key, limit: (read.append(key), get(key, limit))[1], registry.store.get
    other = Registry(registry.store)
    other.state()
    del read[:]
    other.state()
    assert read == ["cotrr/events/00000004.json"]


def test_a_thousand_events_are_read_in_no_time(tmp_path):
    event = {"kind": "canary", "version": "v1", "facts": {"blocks": False}}
    registry = forge(tmp_path, IMPORT, *[event] * 999)
    start = time.perf_counter()
    assert len(registry.state().events) == 1000
    assert time.perf_counter() - start < 5  # it is 0.1 s; quadratic reading or hashing would be minutes


def test_a_registry_that_is_not_there_is_empty(tmp_path):
    registry = Registry(LocalStore(tmp_path / "nowhere"))
    assert registry.state() == State() and registry.verify() == (["cotrr: nothing here"], [])
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("name", ["", "..", "a/b", ".x", "a b", "x" * 101, "\n"])
def test_the_name_of_a_registry_is_strict(tmp_path, name):
    with pytest.raises(InputError, match="--name"):
        Registry(LocalStore(tmp_path), name)


def test_names_are_apart(tmp_path):
    one, two = (Registry(LocalStore(tmp_path), name, ticking()) for name in ("one", "two"))
    one.register(model_files(1), {}, "tester")
    assert two.state() == State()
    assert one.verify() == ([], []) and two.verify() == (["two: nothing here"], [])


# What is not written.


@pytest.mark.parametrize("facts", [
    {"x": object()}, {"x": "\ud800"}, {"\ud800": 1}, {"x": 10**5000}, {"x": "x" * EVENT_LIMIT},
])  # fmt: skip
def test_an_event_that_readers_would_refuse_is_not_written(registry, facts):
    before = registry.store.keys("cotrr")
    with pytest.raises(InputError):
        put(registry, "judge", "v1", facts=facts)
    assert registry.store.keys("cotrr") == before
    put(registry, "judge", "v1")


def nested(depth, inner=1):
    for _ in range(depth):
        inner = [inner]
    return inner


@pytest.mark.parametrize("depth", [300, 600, 950, 1000, 2000, 100_000])
def test_deeply_nested_values_are_written_only_if_they_can_be_read(registry, depth):
    for write in (lambda: put(registry, "judge", "v1", facts={"x": nested(depth)}),
                  lambda: registry.put_evidence(nested(depth))):  # fmt: skip
        try:
            write()
        except InputError:
            continue
        assert Registry(registry.store).verify() == ([], [])
    Registry(registry.store).state()


def test_what_was_written_is_read_however_deep_the_reader_is_called(registry):
    for depth in range(600, 100, -10):
        with contextlib.suppress(InputError):
            put(registry, "judge", "v1", facts={"x": nested(depth)})
            break
    deeply = lambda n: deeply(n - 1) if n else Registry(registry.store).state()
    assert deeply(300) == registry.state()


def test_an_event_says_what_its_reader_reads(registry):
    event = put(
        registry, "judge", "v1", facts={"a": float("inf"), "b": np.float64(0.5), "c": (1, 2), 3: True}
    )
    assert event.facts == {"a": None, "b": 0.5, "c": [1, 2], "3": True}
    assert Registry(registry.store).state().events[-1] == event


@pytest.mark.parametrize("actor", ["a\nb", "\x1b[2J", "\ud800", "\0", "\u202e"])
def test_an_actor_that_would_confuse_a_terminal_is_refused(registry, actor):
    before = registry.store.keys("cotrr")
    with pytest.raises(InputError):
        registry.append(lambda state: Draft(kind="judge", actor=actor, version="v1"))
    assert registry.store.keys("cotrr") == before


@pytest.mark.parametrize("clock", ["now", "", "2026-01-01", "9999-99-99T00:00:00.000000+00:00"])
def test_a_clock_that_gives_no_time_is_refused(registry, clock):
    broken = Registry(registry.store, clock=lambda: clock)
    last = registry.state().events[-1].at
    with contextlib.suppress(InputError):
        assert put(broken, "judge", "v1").at == last  # earlier as text
    assert Registry(registry.store).verify() == ([], [])


def test_facts_too_large_for_a_manifest_are_refused(registry):
    before = registry.store.keys("cotrr")
    with pytest.raises(InputError, match="larger than"):
        registry.register(model_files(4), {"x": "x" * MANIFEST_LIMIT}, "tester")
    assert registry.store.keys("cotrr") == before


def test_a_registration_finds_what_another_began_and_ends_it(tmp_path):
    whole = make_registry(tmp_path / "whole", versions=1)
    folder = whole.state().versions[0].folder
    begun = make_registry(tmp_path / "begun")
    begun.store.put(f"cotrr/versions/{folder}/model.json", model_files(1)["model.json"])
    assert Registry(begun.store, clock=ticking()).verify() == (
        [], [f"cotrr/versions/{folder}/model.json: of no version (its registration did not end)"]
    )  # fmt: skip
    begun.register(model_files(1), {"number": 1}, "tester")
    assert begun.verify() == ([], []) and begun.state() == whole.state()


@pytest.mark.parametrize("found", [b"", b"other bytes", b"x" * 10**5])
def test_other_bytes_under_a_name_that_is_a_hash_are_told(tmp_path, found):
    folder = make_registry(tmp_path / "whole", versions=1).state().versions[0].folder
    begun = make_registry(tmp_path / "begun")
    begun.store.put(f"cotrr/versions/{folder}/model.json", found)
    with pytest.raises(InputError, match=r"model\.json: (holds something else|larger than)"):
        begun.register(model_files(1), {"number": 1}, "tester")
    assert begun.state() == State()
    digest = begun.put_evidence({"a": 1})
    path = tmp_path / "begun/cotrr/evidence" / f"{digest}.json"
    path.write_bytes(found)
    with pytest.raises(InputError):
        begun.put_evidence({"a": 1})
    assert begun.verify()[0]


# A log whose hashes are right, but what it says is not.


CONTRADICTIONS = {
    "a promotion that saw another champion": [REGISTER, PROMOTE | {"champion": "v1"}],
    "a rollback that saw another champion": [REGISTER, PROMOTE,
                                             {"kind": "rollback", "version": ""}],
    "a number too low": [REGISTER, {"kind": "judge", "version": "v1", "number": 1}],
    "a number too high": [REGISTER, {"kind": "judge", "version": "v1", "number": 3}],
    "a huge number": [REGISTER | {"number": 10**30}],
    "a negative number": [REGISTER | {"number": -1}],
    "no number": [REGISTER | {"number": None}],
    "a number as text": [REGISTER | {"number": "1"}],
    "true for one": [REGISTER | {"number": True}],
    "another previous": [REGISTER, {"kind": "judge", "version": "v1", "previous": HASH}],
    "a previous of the first": [REGISTER | {"previous": HASH}],
    "time that goes back": [REGISTER, {"kind": "judge", "version": "v1",
                            "at": "2025-01-01T00:00:00.000000+00:00"}],
    "promotion of none": [REGISTER, PROMOTE | {"version": ""}],
    "promotion of a version that is not there": [REGISTER, PROMOTE | {"version": "v2"}],
    "promotion by the name of a model": [REGISTER, PROMOTE | {"version": "m-1"}],
    "promotion by an alias": [REGISTER, {"kind": "alias", "version": "v1", "facts": {"alias": "shadow"}},
                              PROMOTE | {"version": "shadow"}],
    "promotion of what is live": [REGISTER, PROMOTE,
                                  PROMOTE | {"champion": "v1"}],
    "promotion of Step 4's own": [IMPORT, PROMOTE],
    "promotion of a blocked version": [REGISTER, {"kind": "canary", "version": "v1",
                                       "facts": {"blocks": True}},
                                       PROMOTE],
    "promotion without evidence": [REGISTER, PROMOTE | {"evidence": {}}],
    "promotion without a verdict": [REGISTER, PROMOTE | {"facts": {}}],
    "adoption of ours": [REGISTER, {"kind": "adopt", "version": "v1"}],
    "adoption of nothing when nothing is live": [IMPORT, {"kind": "adopt", "version": ""}],
    "rollback to what was never live": [REGISTER, {"kind": "rollback", "version": "v1"}],
    "rollback to nothing from nothing": [REGISTER, {"kind": "rollback", "version": ""}],
    "champion as an alias to set": [REGISTER, {"kind": "alias", "version": "v1",
                                    "facts": {"alias": "champion"}}],
    "an alias of no name": [REGISTER, {"kind": "alias", "version": "v1", "facts": {"alias": "other"}}],
    "an alias without its name": [REGISTER, {"kind": "alias", "version": "v1"}],
    "an alias that is a list": [REGISTER, {"kind": "alias", "version": "v1", "facts": {"alias": ["shadow"]}}],
    "a canary that says nothing": [REGISTER, {"kind": "canary", "version": "v1"}],
    "a canary that blocks by a word": [REGISTER, {"kind": "canary", "version": "v1",
                                       "facts": {"blocks": "no"}}],
    "a canary of none": [REGISTER, {"kind": "canary", "version": "", "facts": {"blocks": True}}],
    "a judgement of none": [REGISTER, {"kind": "judge", "version": ""}],
    "a version out of turn": [REGISTER | {"version": "v2"}],
    "the same label twice": [REGISTER, REGISTER | {"facts": {"model": "m-2", "manifest": HASH}}],
    "the same model twice": [REGISTER, REGISTER | {"version": "v2"}],
    "the same model imported": [REGISTER, {"kind": "import", "version": "v2", "facts": {"model": "m-1"}}],
    "a label that is none": [REGISTER | {"version": "one"}],
    "no model": [REGISTER | {"facts": {"manifest": HASH}}],
    "a model without a name": [REGISTER | {"facts": {"model": "", "manifest": HASH}}],
    "a model that clears the screen": [REGISTER | {"facts": {"model": "\x1b[2J", "manifest": HASH}}],
    "a model that is a number": [REGISTER | {"facts": {"model": 1, "manifest": HASH}}],
    "no manifest": [REGISTER | {"facts": {"model": "m-1"}}],
    "a manifest elsewhere": [REGISTER | {"facts": {"model": "m-1", "manifest": "../../elsewhere"}}],
    "a manifest in capitals": [REGISTER | {"facts": {"model": "m-1", "manifest": "A" * 64}}],
    "a kind that is none": [REGISTER | {"kind": "delete"}],
    "a field that is none": [REGISTER | {"more": 1}],
    "facts that are a list": [REGISTER | {"facts": []}],
    "facts that are missing": [REGISTER | {"facts": None}],
    "evidence that is a number": [REGISTER | {"evidence": {"judgement": 1}}],
    "an actor that is a number": [REGISTER | {"actor": 1}],
    "an actor of two lines": [REGISTER | {"actor": "a\nb"}],
}  # fmt: skip


@pytest.mark.parametrize("events", CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_a_log_that_contradicts_itself_is_refused(tmp_path, events):
    registry = forge(tmp_path, *events)
    refuses(registry)
    assert "canonical" not in registry.verify()[0][0]


def test_a_forged_log_without_a_contradiction_is_read(tmp_path):
    """That the forgeries above are refused for what they say."""
    registry = forge(tmp_path, REGISTER, {"kind": "judge", "version": "v1", "facts": {"x": 10**30}},
                     PROMOTE,
                     {"kind": "rollback", "version": "", "champion": "v1"},
                     {"kind": "import", "version": "v2", "facts": {"model": "theirs"}},
                     {"kind": "adopt", "version": "v2"},
                     {"kind": "adopt", "version": "", "champion": "v2"},
                     {"kind": "alias", "version": "v1", "facts": {"alias": "shadow"}},
                     {"kind": "alias", "version": "", "facts": {"alias": "shadow"}},
                     {"kind": "canary", "version": "v1", "facts": {"blocks": True}})  # fmt: skip
    assert registry.state().past == ("", "v2") and len(registry.state().events) == 10


@pytest.mark.parametrize("at", [
    "", "now", "2026-01-01", "2026-01-01T00:00:00+00:00", "2026-01-01T00:00:00.000000",
    "2026-01-01T00:00:00.000000Z",
    "2026-01-01T00:00:00.000000+01:00", "2026-02-30T00:00:00.000000+00:00", "zzzz",
    "99999-01-01T00:00:00.000000+00:00",
    "0001-01-01T00:00:00.000000+23:59", "２０２６-01-01T00:00:00.000000+00:00", 1, None,
])  # fmt: skip
def test_a_time_that_is_none_is_refused(tmp_path, at):
    refuses(forge(tmp_path, REGISTER, at=at))


@pytest.mark.parametrize("text", [
    b"", b"{}", b"[]", b"null", b"1", b'"x"', b"NaN", b"{", b"\xff", b"\xef\xbb\xbf{}", b"[" * 10**5,
    b'{"event":' * 10**4,
    b"1" + b"0" * 5000, b"1e999", b'{"event":{},"sha256":""}', b'{"event":null,"sha256":null}',
    b" " * EVENT_LIMIT,
    b" " * (EVENT_LIMIT + 1), b'{"event":{"kind":"judge","kind":"judge"}}', b'"\\ud800"',
])  # fmt: skip
def test_an_event_that_is_none_is_refused(copy, text):
    copy.events[-1].write_bytes(text)
    refuses(copy.registry)
    copy.events[0].write_bytes(text)
    refuses(Registry(LocalStore(copy.folder)))


def test_events_are_canonical_bytes(copy):
    for path in copy.events:
        data, value = path.read_bytes(), json.loads(path.read_bytes())
        assert data == json.dumps(value, separators=(",", ":")).encode()
        assert list(value["event"]) == list(ORDER)
        assert list(value["event"]["facts"]) == sorted(value["event"]["facts"])
        event = json.dumps(value["event"], separators=(",", ":")).encode()
        assert value["sha256"] == sha(event)
    for same in (json.dumps(value).encode(), data + b"\n", data.replace(b"rollback", b"r\\u006fllback"),
                 data.replace(b'{"event":', b'{"sha256":"0","event":')):  # fmt: skip
        assert same != data
        path.write_bytes(same)
        assert copy.problems, same


# Tampering.


def flipped(data, position, bit=0):
    return data[:position] + bytes([data[position] ^ 1 << bit]) + data[position + 1 :]


def test_any_flipped_byte_of_any_event_is_found(copy):
    for turn, path in enumerate(copy.events):
        data = path.read_bytes()
        for position in range(len(data)):
            path.write_bytes(flipped(data, position, (turn + position) % 8))
            with pytest.raises(InputError):
                Registry(copy.registry.store).state()
        path.write_bytes(data)
    assert copy.problems == []


def test_any_flipped_byte_of_a_manifest_or_of_evidence_is_found(copy):
    state = copy.registry.state()
    digest = state.events[5].evidence["judgement"]
    version = state.versions[0]
    for path, ask in ((copy.path("v1") / "manifest.json", lambda: copy.registry.manifest(version)),
                      (copy.home / "evidence" / f"{digest}.json",
                      lambda: copy.registry.evidence(digest))):  # fmt: skip
        data = path.read_bytes()
        for position in range(len(data)):
            path.write_bytes(flipped(data, position, position % 8))
            with pytest.raises(InputError, match="changed since it was written"):
                ask()
        assert copy.problems
        path.write_bytes(data)
    assert copy.problems == []


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_of_a_file_of_a_version_is_found(copy, name):
    path, version = copy.path("v2") / name, copy.version("v2")
    data = path.read_bytes()
    some = np.random.default_rng(0).integers(0, len(data), 200)
    for position in (0, len(data) - 1, *map(int, some)):
        path.write_bytes(flipped(data, position, position % 8))
        with pytest.raises(InputError, match=f"{name}: changed since it was written"):
            copy.registry.files(version)
    assert copy.problems
    path.write_bytes(data)
    assert copy.problems == []


def every_file(copy):
    return [path for path in sorted(copy.home.rglob("*")) if path.is_file()]


def test_any_file_cut_short_lengthened_emptied_or_removed_is_found(copy):
    for path in every_file(copy):
        data = path.read_bytes()
        for other in (data[:-1], data[1:], data + b"\0", data + b"\n", b"", data + data):
            path.write_bytes(other)
            assert copy.problems, path
        path.unlink()
        if path != copy.events[-1]:
            assert copy.problems, path
        path.write_bytes(data)
    assert copy.problems == []


def test_any_two_files_that_are_swapped_are_found(copy):
    files = every_file(copy)
    for one, two in [*itertools.pairwise(files), (files[0], files[-1])]:
        data = one.read_bytes(), two.read_bytes()
        one.write_bytes(data[1])
        two.write_bytes(data[0])
        assert data[0] == data[1] or copy.problems, (one, two)
        one.write_bytes(data[0])
        two.write_bytes(data[1])


def test_versions_that_are_swapped_are_found(copy):
    one, two = copy.path("v1"), copy.path("v2")
    one.rename(copy.folder / "aside")
    two.rename(one)
    (copy.folder / "aside").rename(two)
    for label in ("v1", "v2"):
        with pytest.raises(InputError, match="changed since it was written"):
            copy.registry.files(copy.version(label))


@pytest.mark.parametrize("where", ["", "events", "evidence", "versions", "versions/x", "other", "v1"])
@pytest.mark.parametrize("name", ["extra", "extra.json", ".hidden", "a b", "00000099.json"])
def test_an_extra_file_is_noticed(copy, where, name):
    folder = copy.path("v1") if where == "v1" else copy.home / where
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"{}")
    problems, notes = copy.registry.verify()
    assert problems or (where.startswith("versions") and notes)
    if where == "v1":
        with pytest.raises(InputError, match="files are missing or too many"):
            copy.registry.files(copy.version("v1"))


def test_a_removed_event_is_found_and_nothing_is_written_in_its_place(copy):
    for number, path in enumerate(copy.events[:-1], 1):
        data = path.read_bytes()
        path.unlink()
        registry = Registry(LocalStore(copy.folder))
        with pytest.raises(InputError, match=rf"{number:08d}\.json: missing, though there are later events"):
            registry.append(lambda state: Draft(kind="judge", actor="tester", version="v1"))
        assert not path.exists() and copy.problems
        path.write_bytes(data)


def test_removed_newest_events_show_only_against_a_head_that_is_kept_elsewhere(copy):
    kept = copy.registry.state().head
    assert kept == Registry(LocalStore(copy.folder)).state().head
    for path in (copy.events[-1], copy.events[-2]):
        path.unlink()
        cut = Registry(LocalStore(copy.folder))
        assert cut.verify()[0] == []  # a shorter log is a log
        assert cut.state().head != kept
    assert kept not in {event.digest for event in cut.state().events}


def test_events_in_another_order_are_found(copy):
    for one, two in itertools.pairwise(copy.events):
        data = one.read_bytes(), two.read_bytes()
        one.write_bytes(data[1])
        two.write_bytes(data[0])
        refuses(Registry(LocalStore(copy.folder)))
        one.write_bytes(data[0])
        two.write_bytes(data[1])


def test_an_event_rewritten_with_its_own_hash_breaks_the_chain(copy):
    value = json.loads(copy.events[4].read_bytes())
    value["event"]["actor"] = "another"
    value["sha256"] = sha(msgspec.json.encode(value["event"]))
    copy.events[4].write_bytes(msgspec.json.encode(value))
    refuses(copy.registry, "event 6 does not follow event 5")


def test_what_a_broken_event_hides_is_not_called_wrong(copy):
    copy.events[1].write_bytes(b"{}")
    problems, notes = copy.registry.verify()
    assert len(problems) == 1 and "00000002.json" in problems[0] and notes == []


def test_who_has_read_the_log_before_sees_a_broken_event_that_follows(copy):
    copy.registry.state()
    event = copy.events[-1].with_name(f"{len(copy.events) + 1:08d}.json")
    event.write_bytes(copy.events[-1].read_bytes())
    for _ in range(2):
        with pytest.raises(InputError, match="does not follow"):
            copy.registry.state()


@pytest.mark.parametrize("what", ["file", "version", "versions", "evidence", "events", "name"])
def test_a_link_in_the_place_of_anything_is_refused(copy, tmp_path, what):
    version, digest = copy.version("v1"), copy.registry.state().events[5].evidence["judgement"]
    path = {"file": copy.path("v1") / "model.json", "version": copy.path("v1"),
    "versions": copy.home / "versions",
            "evidence": copy.home / "evidence", "events": copy.home / "events",
            "name": copy.home}[what]  # fmt: skip
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert copy.problems
    fresh = Registry(LocalStore(copy.folder))
    asked = {"evidence": [lambda: fresh.evidence(digest)], "events": [fresh.state],
             "name": [fresh.state, lambda: fresh.evidence(digest), lambda: fresh.files(version)]}  # fmt: skip
    for ask in asked.get(what, [lambda: fresh.files(version), lambda: fresh.contents(version)]):
        with pytest.raises(InputError):
            ask()


# Versions whose hashes are right, but whose files are not.


def plant(folder, content, named="", **manifest):
    """A registry with one version of any content, all its hashes consistent."""
    facts = json.loads(content["model.json"])
    told = {"format": 1, "model": facts["version"],
            "files": {k: {"size": len(content[k]), "sha256": sha(content[k])} for k in sorted(content)},
            "facts": {}} | manifest  # fmt: skip
    data = told.pop("raw", None) or msgspec.json.encode(told)
    model = named or facts["version"]
    registry = forge(folder, REGISTER | {"facts": {"manifest": sha(data), "model": model}})
    place = folder / "cotrr/versions" / sha(data)[:16]
    place.mkdir(parents=True)
    for name, part in {**content, "manifest.json": data}.items():
        (place / name).write_bytes(part)
    return registry


def consistent(**parts):
    """The content of a model with other tables or facts,
    under the hashes and the version that go with them."""
    content = dict(model_files(1))
    content.update({f"{name}.npz": parts.pop(name) for name in ("weights", "trained_on") if name in parts})
    facts = json.loads(content["model.json"]) | parts
    facts["files"] = {name: sha(content[name]) for name in TABLES}
    del facts["version"]
    facts["version"] = version_of(facts)
    return content | {"model.json": json.dumps(facts).encode()}


def test_a_planted_version_that_is_right_is_read(tmp_path):
    """That those below are refused for what is in them."""
    registry = plant(tmp_path, consistent())
    assert registry.verify() == ([], [])
    assert registry.contents(registry.state().versions[0]).facts["name"] == "light"


def unread(registry):
    """That a version is refused by all that would load it."""
    version = registry.state().versions[0]
    with pytest.raises(InputError):
        registry.contents(version)
    assert registry.verify()[0]
    return version


@pytest.mark.parametrize("manifest", [
    {"format": 2}, {"format": "1"}, {"model": "other"}, {"model": None}, {"files": {}}, {"files": []},
    {"facts": None},
    {"more": 1}, {"raw": b"{}"}, {"raw": b"["}, {"raw": b"[" * 10**5}, {"raw": b"NaN"},
    {"raw": b"x" * (MANIFEST_LIMIT + 1)},
])  # fmt: skip
def test_a_manifest_that_is_none_is_refused(tmp_path, manifest):
    unread(plant(tmp_path, consistent(), **manifest))


def listing(**changes):
    content = consistent()
    return {k: {"size": len(v), "sha256": sha(v)} for k, v in sorted(content.items())} | changes


@pytest.mark.parametrize("file", [
    {"size": -1, "sha256": HASH}, {"size": 2**40, "sha256": HASH}, {"size": 10**30, "sha256": HASH},
    {"size": 1.5, "sha256": HASH}, {"size": True, "sha256": HASH}, {"size": 1, "sha256": None}, {"size": 1},
    [], None,
    {"size": 1, "sha256": HASH, "url": "http://x"},
])  # fmt: skip
def test_a_file_that_a_manifest_cannot_mean_is_refused(tmp_path, file):
    unread(plant(tmp_path, consistent(), files=listing(**{"model.json": file})))


@pytest.mark.parametrize(
    "name", ["../model.json", "/etc/passwd", "a/b", "..", ".x", "a b", "manifest.json", "", "\n"]
)
def test_a_manifest_that_lists_a_name_that_is_not_strict_is_refused(tmp_path, name):
    files = dict(sorted(listing(**{name: {"size": 0, "sha256": sha(b"")}}).items()))
    unread(plant(tmp_path, consistent(), files=files))


def test_a_manifest_with_a_key_twice_is_refused(tmp_path):
    content = consistent()
    data = msgspec.json.encode({"format": 1, "model": json.loads(content["model.json"])["version"],
                                "files": listing(), "facts": {}})  # fmt: skip
    unread(plant(tmp_path, content, raw=data.replace(b'"facts":{}', b'"facts":{},"facts":{}')))


BIG = {f"f{i:02d}": {"size": 2**29, "sha256": HASH} for i in range(3)}


@pytest.mark.parametrize("files", [
    listing(**BIG), listing(**BIG, balance={"size": -(2**40), "sha256": HASH}),
    {"model.json": listing()["model.json"]},
], ids=["too large together", "a size below 0", "not all of a model"])  # fmt: skip
def test_a_manifest_is_refused_before_any_file_is_read(tmp_path, files):
    registry = plant(tmp_path, consistent(), files=dict(sorted(files.items())))
    with pytest.raises(InputError, match="no manifest of a version"):
        registry.manifest(unread(registry))


def test_another_model_than_the_event_names_is_refused(tmp_path):
    registry = plant(tmp_path / "event", consistent(), named="other-1")
    with pytest.raises(InputError, match="is about 'light-.*, not other-1"):
        registry.manifest(unread(registry))
    registry = plant(tmp_path / "manifest", consistent(), named="other-1", model="other-1")
    with pytest.raises(InputError, match="is light-.*, not other-1"):
        registry.contents(unread(registry))


def npy(shape, descr="<f8", data=b""):
    header = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (63 - (10 + len(header)) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


def packed(name, data, method=zipfile.ZIP_STORED):
    """The weights with one more member."""
    stream = io.BytesIO(model_files(1)["weights.npz"])
    with zipfile.ZipFile(stream, "a", method) as archive:
        archive.writestr(name, data)
    return stream.getvalue()


def with_directory(offset, value):
    """The weights, their last member's entry in the archive's directory changed."""
    data = bytearray(packed("params/x.npy", npy("(1,)", data=bytes(8))))
    data[data.rfind(b"PK\1\2") + offset] = value
    return bytes(data)


class Payload:
    """A pickle that would leave a trace."""

    def __reduce__(self):
        return os.mkdir, ("unpickled",)


BROKEN = {
    "a pickled array": lambda: packed("params/x.npy", npy("(1,)", "|O", pickle.dumps(Payload()))),
    "a bare pickle": lambda: pickle.dumps(Payload()),
    "a bomb": lambda: packed("params/x.npy", bytes(10**7), zipfile.ZIP_DEFLATED),
    "a bomb of another kind": lambda: packed("params/x.npy", bytes(10**7), zipfile.ZIP_LZMA),
    "an array of terabytes": lambda: packed("params/x.npy", npy("(10000000000000,)")),
    "an array of more than there are numbers": lambda: packed("params/x.npy", npy(f"({10**30},)")),
    "an array of less than nothing": lambda: packed("params/x.npy", npy("(-1,)")),
    "an array whose size overflows": lambda: packed("params/x.npy", npy("(4294967296, 4294967296)")),
    "a header that does not end": lambda: packed("params/x.npy",
    b"\x93NUMPY\x01\x00\x10\x00{'descr': (((((((("),
    "a header of gigabytes": lambda: packed("params/x.npy", b"\x93NUMPY\x02\x00\xff\xff\xff\x7f{"),
    "a header that is code": lambda: packed("params/x.npy", npy("__import__('os').mkdir('unpickled')")),
    "an encrypted member": lambda: with_directory(8, 1),
    "an unknown compression": lambda: with_directory(10, 99),
    "a member that is elsewhere": lambda: with_directory(42, 7),
    "half an archive": lambda: model_files(1)["weights.npz"][:5000],
    "an array and no archive": lambda: npy("(1,)", data=bytes(8)),
    "nothing": lambda: b"",
    "text": lambda: b"weights",
}  # fmt: skip


@pytest.mark.parametrize("table", BROKEN.values(), ids=BROKEN)
def test_a_table_that_is_none_is_refused_under_hashes_that_are_right(tmp_path, monkeypatch, table):
    monkeypatch.chdir(tmp_path)
    version = unread(plant(tmp_path / "registry", consistent(weights=table())))
    assert version.label == "v1" and not (tmp_path / "unpickled").exists()


def test_members_that_share_their_bytes_are_a_bomb(tmp_path):
    """Many entries of the archive's directory may point to the same data."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("params/x.npy", npy("(1000,)", data=bytes(8000)))
        first = archive.infolist()[0]
        for number in range(200):
            twin = zipfile.ZipInfo(f"params/{number}.npy")
            for slot in ("CRC", "compress_size", "file_size", "header_offset"):
                setattr(twin, slot, getattr(first, slot))
            archive.filelist.append(twin)
    unread(plant(tmp_path, consistent(weights=stream.getvalue())))


@pytest.mark.parametrize("facts", [
    {"vocabulary": None}, {"vocabulary": []}, {"vocabulary": {}}, {"calibration": None}, {"calibration": []},
    {"calibration": {"rank": 1}}, {"format": None}, {"attributes": None}, {"attributes": {}},
    {"vocabulary": nested(300)},
])  # fmt: skip
def test_a_model_whose_facts_are_none_is_refused_under_hashes_that_are_right(tmp_path, facts):
    unread(plant(tmp_path, consistent(**facts)))


# Garbage.


GARBAGE = settings(deadline=None, max_examples=80, suppress_health_check=list(HealthCheck))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
NOISE = st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode("utf-8", "surrogatepass"))


@GARBAGE
@given(NOISE)
def test_garbage_for_an_event_is_refused(history, tmp_path_factory, noise):
    folder = tmp_path_factory.mktemp("garbage")
    (folder / "cotrr/events").mkdir(parents=True)
    (folder / "cotrr/events/00000001.json").write_bytes(noise)
    refuses(Registry(LocalStore(folder)))


@GARBAGE
@given(st.fixed_dictionaries({}, optional={key: JSON for key in (*ORDER, "more")}))
def test_garbage_in_an_event_with_the_right_hash_is_an_event_or_refused(tmp_path_factory, parts):
    folder = tmp_path_factory.mktemp("garbage")
    try:
        registry = forge(folder, REGISTER, {"kind": "judge", "version": "v1"}, **parts)
    except UnicodeEncodeError:  # no bytes say that
        return
    try:
        count = len(registry.state().events)
    except InputError:
        count = 0
    assert count == 2 or registry.verify()[0]


@GARBAGE
@given(noise=NOISE)
def test_garbage_for_a_manifest_is_refused(tmp_path_factory, noise):
    content = {"model.json": b'{"version":"m-1"}'}
    registry = plant(tmp_path_factory.mktemp("garbage"), content, raw=noise or b" ")
    unread(registry)


@GARBAGE
@given(noise=NOISE, kept=JSON)
def test_garbage_for_evidence_is_read_as_it_is_or_refused(tmp_path_factory, noise, kept):
    folder = tmp_path_factory.mktemp("garbage")
    registry = Registry(LocalStore(folder))
    (folder / "cotrr/evidence").mkdir(parents=True)
    (folder / "cotrr/evidence" / f"{sha(noise)}.json").write_bytes(noise)
    try:
        assert msgspec.json.encode(registry.evidence(sha(noise)), order="deterministic") == noise
    except InputError:
        assert registry.verify()[0]
    try:
        digest = registry.put_evidence(kept)
    except InputError:
        return
    registry.evidence(digest)


@GARBAGE
@given(st.text(max_size=120), st.text(max_size=30))
def test_garbage_for_names_is_refused(copy_of_history, name, digest):
    registry = Registry(LocalStore(copy_of_history))
    for ask in (lambda: registry.evidence(digest), lambda: registry.state().version("?" + name),
                lambda: registry.register(model_files(1) | {"?" + name: b""}, {}, "tester"),
                lambda: registry.rollback("tester", to="?" + name),
                lambda: Registry(registry.store, "?" + name)):  # fmt: skip
        with pytest.raises(InputError):
            ask()


@pytest.fixture(scope="module")
def copy_of_history(history, tmp_path_factory):
    return shutil.copytree(history, tmp_path_factory.mktemp("names") / "registry")
