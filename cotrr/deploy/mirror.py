"""A one-way mirror of the registry in MLflow's: who looks there sees what the log says.

One registered model of the registry's name; one MLflow version for each version that is registered here,
and the aliases that point to them.  Nothing is ever read back: an alias that is moved over there is put
back by the next push, and changes nothing here.  Step 4's own versions have no files here and are left
out, as are aliases that point to them.
"""

import os
import socket
import urllib.parse
from typing import Any, NamedTuple

from cotrr.deploy import step4
from cotrr.deploy.registry import ALIASES, Registry, Version
from cotrr.errors import InputError

LABEL, MODEL, MANIFEST, MIRROR = "cotrr.label", "cotrr.model_version", "cotrr.manifest_sha256", "cotrr.mirror"
DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",  # MLflow's own 7 wait for minutes where no server is
}


class Pushed(NamedTuple):
    """What a push changed over there; empty where it was up to date."""

    versions: dict[str, str]  # our label → MLflow's version
    aliases: dict[str, str]  # alias → our label, "" where it was removed


def push(registry: Registry, tracking_uri: str) -> Pushed:
    """Makes an MLflow server's registered model say what the log says; returns what had to change.

    Raises InputError for what is no URL of a server, where mlflow is not installed, where the server refuses
    or does not answer, and where a registered model of this name is there that is no mirror.
    """
    if urllib.parse.urlsplit(tracking_uri).scheme not in ("http", "https"):
        raise InputError("expected the http:// or https:// URL of an MLflow server", file=tracking_uri)
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    try:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
    except ImportError:
        raise InputError("mlflow is not installed", remedy="pip install 'cotrr[mlflow]'") from None
    try:
        return _push(registry, MlflowClient(tracking_uri, registry_uri=tracking_uri))
    except MlflowException as error:
        raise InputError(
            str(error), file=tracking_uri, remedy="Is it an MLflow server, and running?"
        ) from None


def _push(registry: Registry, client: Any) -> Pushed:
    name, state = registry.name, registry.state()
    there = _registered_model(client, name).aliases
    numbers = _versions(client, name)
    new = {}
    ours = [version for version in state.versions if version.folder]
    for version in ours:
        if version.manifest not in numbers:
            numbers[version.manifest] = new[version.label] = _create(client, registry, version)
    number_of = {version.label: numbers[version.manifest] for version in ours}
    moved = {}
    for alias in ALIASES:
        label = state.aliases.get(alias, "")
        number = number_of.get(label)
        if number == there.get(alias):
            continue
        if number is None:
            client.delete_registered_model_alias(name, alias)
        else:
            client.set_registered_model_alias(name, alias, number)
        moved[alias] = label if number else ""
    return Pushed(new, moved)


def _registered_model(client: Any, name: str) -> Any:
    """The registered model, made where it is absent; raises InputError for one that others made."""
    # A search finds none where `get` would raise an error that reads like any other.
    found = client.search_registered_models(f"name = '{name}'")
    if not found:
        return client.create_registered_model(name, {MIRROR: "one-way"}, "Written by cotrr, never read back.")
    if MIRROR not in found[0].tags:
        raise InputError(f"a registered model {name!r} is there that is no mirror of ours",
                         remedy="Rename it, or give the registry another --name")  # fmt: skip
    return client.get_registered_model(name)  # a search may leave aliases out


def _versions(client: Any, name: str) -> dict[str, str]:
    """MLflow's version numbers by the manifests that they mirror."""
    found, token = dict[str, str](), None
    while True:
        page = client.search_model_versions(f"name = '{name}'", max_results=1000, page_token=token)
        found |= {version.tags[MANIFEST]: version.version for version in page if MANIFEST in version.tags}
        token = page.token
        if not token:
            return found


def _create(client: Any, registry: Registry, version: Version) -> str:
    source = step4.location(registry, version)
    if "://" not in source:
        # A server refuses paths of a file system, which might be its own, as a source.
        source = f"cotrr://{socket.gethostname()}{urllib.parse.quote(source)}"
    tags = {LABEL: version.label, MODEL: version.model, MANIFEST: version.manifest}
    description = f"{version.model}, registered by {version.event.actor} at {version.event.at}"
    made = client.create_model_version(registry.name, source, tags=tags, description=description)
    return made.version
