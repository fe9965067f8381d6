"""Registries that tests tamper with, and ones whose hashes are right whatever they say."""

import hashlib
import json

import msgspec
import pytest

from cotrr.deploy.registry import (
    Draft,
    Registry,
)
from cotrr.errors import InputError
from cotrr.ranker.model_files import TABLES, version_of
from cotrr.store import LocalStore
from tests.deploy.small import model_files, promotion, ticking


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


def unread(registry):
    """That a version is refused by all that would load it."""
    version = registry.state().versions[0]
    with pytest.raises(InputError):
        registry.contents(version)
    assert registry.verify()[0]
    return version


def nested(depth, inner=1):
    for _ in range(depth):
        inner = [inner]
    return inner
