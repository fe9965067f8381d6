"""Small models and registries that the tests of this folder share."""

import functools
import pathlib
import tempfile

import numpy as np

from cotrr.deploy.registry import GROUNDS, Draft, Registry
from cotrr.ranker import artifact
from cotrr.ranker.model_files import read_files
from cotrr.store import LocalStore
from tests.ranker.test_artifact import make_model


@functools.cache
def model_files(number: int = 1) -> dict[str, bytes]:
    """The files of a model folder; each number gives another model."""
    with tempfile.TemporaryDirectory() as folder:
        artifact.save(_model()._replace(provenance={"best_epoch": number}), folder)
        return read_files(folder)


@functools.cache
def _model() -> artifact.Model:
    return make_model()


def ticking():
    """A clock that gives one second after the other, from noon of 2026-01-01 UTC."""
    seconds = iter(range(10**6))
    return lambda: (
        f"2026-01-01T{12 + (s := next(seconds)) // 3600:02d}:{s // 60 % 60:02d}:{s % 60:02d}.000000+00:00"
    )


def make_registry(folder: pathlib.Path, versions: int = 0) -> Registry:
    """A registry in a folder, with so many versions."""
    registry = Registry(LocalStore(folder), clock=ticking())
    for number in range(1, versions + 1):
        registry.register(model_files(number), {"number": number}, "tester")
    return registry


def promotion(registry: Registry, label: str, actor: str = "tester", judgement=None, **facts) -> Draft:
    """A promotion of a version on such grounds as the log asks for."""
    grounds = registry.put_evidence({"verdict": "PROMOTE"})
    evidence = dict.fromkeys(GROUNDS, grounds)
    if judgement is not None:
        evidence["judgement"] = registry.put_evidence(judgement)
    return Draft(kind="promote", actor=actor, version=label, evidence=evidence,
                 facts={"verdict": "PROMOTE", **facts})  # fmt: skip


def single_lane(model: artifact.Model) -> artifact.Model:
    """The first of a model's lanes alone."""
    one = lambda tree: {k: one(v) for k, v in tree.items()} if isinstance(tree, dict) else tree[:1]
    statistics = type(model.statistics)(*(part[:1] for part in model.statistics))
    return model._replace(params=one(model.params), statistics=statistics, final=np.array([True]))
