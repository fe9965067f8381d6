"""What the tests of registries share."""

import os
import shutil

import pytest

from cotrr.deploy.registry import (
    Registry,
)
from cotrr.store import open_store
from tests.deploy.registries import LocalCopy, promote, put
from tests.deploy.small import make_registry, model_files, promotion, ticking


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def copy_of_history(history, tmp_path_factory):
    return shutil.copytree(history, tmp_path_factory.mktemp("names") / "registry")
