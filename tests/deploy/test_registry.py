"""The registry: the log decides what is live, and nothing that readers would refuse is written."""

import contextlib
import datetime
import time

import msgspec
import numpy as np
import pytest

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
from cotrr.store import LocalStore
from tests.deploy.registries import (
    HASH,
    IMPORT,
    forge,
    nested,
    promote,
    put,
)
from tests.deploy.small import make_registry, model_files, promotion, ticking

pytestmark = pytest.mark.usefixtures("unflushed")


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
