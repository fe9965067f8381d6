"""The mirror in MLflow, against a server of its own on this machine."""

import importlib.util
import os
import pathlib
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from cotrr.deploy import mirror
from cotrr.deploy.registry import Draft
from cotrr.errors import InputError
from tests.deploy.small import make_registry, model_files, promotion

SERVER = ("mlflow", "alembic", "flask", "flask_cors", "huey", "aiohttp", "pandas")
MISSING = [name for name in SERVER if importlib.util.find_spec(name) is None]
QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
STARTS, ENDS = 120, 10  # seconds


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The URI of an MLflow server with an empty SQLite file."""
    if MISSING:
        pytest.skip(f"for an MLflow server are missing: {', '.join(MISSING)}")
    home = tmp_path_factory.mktemp("mlflow")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host=127.0.0.1", f"--port={port}", "--workers=1",
               f"--backend-store-uri=sqlite:///{home}/mlflow.db", f"--default-artifact-root={home}/artifacts"
               ]  # fmt: skip
    with open(home / "log", "wb") as log:
        process = subprocess.Popen(command, cwd=home, env=os.environ | QUIET, stdout=log, stderr=log,
                                   start_new_session=True)  # fmt: skip
    try:
        _wait(f"http://127.0.0.1:{port}/health", process, home / "log")
        yield f"http://127.0.0.1:{port}"
    finally:
        _stop(process)


def _wait(url: str, process: subprocess.Popen, log: pathlib.Path) -> None:
    end = time.monotonic() + STARTS
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    pytest.fail(f"the server did not start:\n{log.read_text()[-3000:]}")


def _stop(process: subprocess.Popen) -> None:
    """Ends the server and the workers that it started, which are one group."""
    for signal in (15, 9):
        try:
            os.killpg(process.pid, signal)
            process.wait(ENDS)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue
    process.wait(ENDS)


@pytest.fixture
def client(server):
    """What anybody else sees of the server."""
    from mlflow import MlflowClient

    return MlflowClient(server)


def act(registry, kind, version, **facts):
    if kind == "promote":
        return registry.append(lambda state: promotion(registry, version, **facts))
    return registry.append(lambda state: Draft(kind=kind, actor="tester", version=version, facts=facts))


def aliases(client):
    """Our labels by the aliases over there."""
    there = client.get_registered_model("cotrr").aliases
    return {alias: client.get_model_version("cotrr", v).tags[mirror.LABEL] for alias, v in there.items()}


def test_a_server_shows_what_the_log_says_push_by_push(tmp_path, server, client):
    registry = make_registry(tmp_path / "registry", 2)
    act(registry, "promote", "v1")
    act(registry, "alias", "v2", alias="shadow")
    assert mirror.push(registry, server) == ({"v1": "1", "v2": "2"}, {"champion": "v1", "shadow": "v2"})
    first = client.get_model_version("cotrr", "1")
    version = registry.state().versions[0]
    assert first.tags == {mirror.LABEL: "v1", mirror.MODEL: version.model, mirror.MANIFEST: version.manifest}
    assert first.source.startswith("cotrr://")
    folder = first.source.removeprefix(f"cotrr://{socket.gethostname()}")
    assert (pathlib.Path(folder) / "manifest.json").is_file()
    assert aliases(client) == {"champion": "v1", "shadow": "v2"}

    assert mirror.push(registry, server) == ({}, {})

    act(registry, "import", "v3", model="clip", external={"version_id": "clip"})
    registry.register(model_files(3), {}, "tester")
    act(registry, "promote", "v2")
    act(registry, "alias", "", alias="shadow")
    assert mirror.push(registry, server) == ({"v4": "3"}, {"champion": "v2", "shadow": ""})
    assert aliases(client) == {"champion": "v2"}

    client.set_registered_model_alias("cotrr", "champion", "3")
    client.set_registered_model_alias("cotrr", "theirs", "1")
    assert mirror.push(registry, server) == ({}, {"champion": "v2"})
    assert aliases(client) == {"champion": "v2", "theirs": "v1"}
    assert registry.state().champion == "v2"

    registry.rollback("tester")
    registry.rollback("tester")
    act(registry, "adopt", "v3")
    assert mirror.push(registry, server) == ({}, {"champion": ""})


def test_a_registered_model_of_others_is_left_alone(tmp_path, server, client):
    registry = make_registry(tmp_path / "registry", 1)
    registry.name = "theirs"
    client.create_registered_model("theirs")
    with pytest.raises(InputError, match="'theirs' is there that is no mirror of ours"):
        mirror.push(registry, server)
    assert client.search_model_versions("name = 'theirs'") == []


def test_a_server_that_does_not_answer_is_an_input_error(tmp_path, server, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(InputError, match=f"127.0.0.1:{port}: .*running"):
        mirror.push(make_registry(tmp_path), f"http://127.0.0.1:{port}")


@pytest.mark.parametrize(
    "uri", ["foo", "", "sqlite:///x.db", "file:///tmp/x", "http", "//host", "databricks"]
)
def test_what_is_no_url_of_a_server_is_told_in_one_line(tmp_path, uri):
    with pytest.raises(InputError, match="expected the http:// or https:// URL") as caught:
        mirror.push(make_registry(tmp_path), uri)
    assert "\n" not in str(caught.value)


def test_without_mlflow_it_is_said_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(InputError, match=r"mlflow is not installed. pip install 'cotrr\[mlflow\]'"):
        mirror.push(make_registry(tmp_path), "http://127.0.0.1:1")
