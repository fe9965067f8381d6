"""The registry's log: any change of any byte is found, and what contradicts itself is refused."""

import itertools
import json

import msgspec
import numpy as np
import pytest

from cotrr.deploy.registry import (
    EVENT_LIMIT,
    Draft,
    Registry,
)
from cotrr.errors import InputError
from cotrr.ranker.model_files import FILES
from cotrr.store import LocalStore
from tests.deploy.registries import HASH, IMPORT, ORDER, PROMOTE, REGISTER, forge, refuses, sha

pytestmark = pytest.mark.usefixtures("unflushed")


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
