"""The registry: nothing of a version or of garbage is loaded that its hashes and its format do not allow."""

import io
import json
import os
import pickle
import struct
import zipfile

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cotrr.deploy.registry import (
    MANIFEST_LIMIT,
    Registry,
)
from cotrr.errors import InputError
from cotrr.store import LocalStore
from tests.deploy.registries import (
    HASH,
    ORDER,
    REGISTER,
    consistent,
    forge,
    nested,
    plant,
    refuses,
    sha,
    unread,
)
from tests.deploy.small import model_files

pytestmark = pytest.mark.usefixtures("unflushed")


def test_a_planted_version_that_is_right_is_read(tmp_path):
    """That those below are refused for what is in them."""
    registry = plant(tmp_path, consistent())
    assert registry.verify() == ([], [])
    assert registry.contents(registry.state().versions[0]).facts["name"] == "light"


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
