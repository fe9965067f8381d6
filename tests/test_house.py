"""The house: data flow one way, and nothing stands in it that must not."""

import ast
import pathlib

import pytest

HOUSE = pathlib.Path(__file__).parents[1]
ROOMS = ("data", "ranker", "evaluate", "deploy")  # each may know those before it
MODULES = {path.relative_to(HOUSE).as_posix(): path for path in (HOUSE / "cotrr").rglob("*.py")}


def imported(path):
    """Full names of what a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("module", MODULES)
def test_no_module_knows_a_later_room_or_the_launchers(module):
    room = module.split("/")[1]
    known = ROOMS[: ROOMS.index(room) + 1] if room in ROOMS else ()
    for name in imported(MODULES[module]):
        package, *parts = name.split(".")
        assert package not in ("experiments", "benchmarks", "tests"), name
        assert package != "cotrr" or parts[0] not in ROOMS or parts[0] in known, name


def test_every_room_is_there():
    assert {module.split("/")[1] for module in MODULES} >= {*ROOMS}
    assert any(name.startswith("cotrr.data.") for name in imported(MODULES["cotrr/ranker/features.py"]))


def importers(package):
    return [module for module, path in MODULES.items()
            if any(name.split(".")[0] == package for name in imported(path))]  # fmt: skip


@pytest.mark.parametrize("forbidden", ["pickle", "tensorflow", "torch", "cloudpickle", "joblib", "dill"])
def test_no_module_imports_what_runs_code_or_weighs_gigabytes(forbidden):
    assert not importers(forbidden)


def test_one_file_imports_flax():
    assert importers("flax") == ["cotrr/ranker/model.py"]
