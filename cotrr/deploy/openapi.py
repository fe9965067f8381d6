"""The API's description, and a page to read it, from the types that check requests."""

import html
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from cotrr.data.contract import Vector
from cotrr.deploy import candidates as requests
from cotrr.deploy.messages import ARRAYS, JSON, PROBLEM, Answer, Body, Limits, Trouble


def openapi(limits: Limits) -> dict[str, Any]:
    """The API's description (OpenAPI 3.1), its schemas those of the contract."""
    schemas = _schemas(limits)
    refusals = {
        "400": "Malformed: `field` names what is.",
        "408": f"The body took longer than {limits.timeout_s:g} s.",
        "413": f"The body is larger than {limits.max_body:,} bytes.",
        "415": f"Neither {JSON} nor {ARRAYS}, or compressed.",
        "422": f"More than {limits.max_candidates:,} candidates.",
    }
    said = {status: {"description": text, "content": {PROBLEM: {"schema": _reference("Trouble")}}}
            for status, text in refusals.items()}  # fmt: skip
    said["200"] = {"description": "The ranking.", "content": {JSON: {"schema": _reference("Answer")}}}
    binary = {"type": "string", "format": "binary", "description": schemas["Head"]["description"]}
    rerank = {
        "summary": "The candidates of a query, best first.",
        "description": "A bad candidate is put behind, with a reason.  A bad query, a deadline that passed "
                       "or no model that serves give the original order, and `fallback` says why: 200 all "
                       f"the same.  {ARRAYS} is JSON (Head), a newline, and little-endian float32 numbers.",
        "requestBody": {"required": True, "content": {JSON: {"schema": _reference("Body")},
                                                      ARRAYS: {"schema": binary}}},
        "responses": dict(sorted(said.items())),
    }  # fmt: skip
    get = lambda summary, **responses: {"get": {"summary": summary, "responses": {
        code.strip("_"): {"description": text} for code, text in responses.items()}}}  # fmt: skip
    return {
        "openapi": "3.1.0",
        "info": {"title": "cotrr", "version": "1", "summary": "Reranks the candidates of a query."},
        "paths": {
            "/rerank": {"post": rerank},
            "/healthz": get("Whether a model serves.", _200="Which one.", _503="None, or about to stop."),
            "/metrics": get("Counters for Prometheus.", _200="Text format 0.0.4."),
        },
        "components": {"schemas": schemas},
    }


def _schemas(limits: Limits) -> dict[str, Any]:
    """The schemas of what is sent and answered, by name."""
    text, names = [("text_embedding", Vector | None, None)], ("id", "canonical_id")
    query = msgspec.defstruct("Query", text, bases=(requests.Asked,))
    more = [*((name, str | None, None) for name in names), ("image_embedding", Vector | None, None)]
    candidate = msgspec.defstruct("Candidate", more, bases=(requests.Features,))
    kinds = (Body, requests.Head, query, candidate, Answer, Trouble)
    _, schemas = msgspec.json.schema_components(kinds, ref_template=_reference("{name}")["$ref"])
    for schema in schemas.values():
        schema["description"] = inspect.cleandoc(schema.get("description", ""))
    for name in ("Body", "Head"):
        schemas[name]["properties"]["query"] = _reference("Query")
    many = {"type": "array", "items": _reference("Candidate"), "maxItems": limits.max_candidates}
    schemas["Body"]["properties"]["candidates"] = many
    return schemas


def _reference(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def docs(limits: Limits) -> bytes:
    """The same as a page that needs nothing from anywhere."""
    api, text = openapi(limits), []
    for path, methods in api["paths"].items():
        for method, what in methods.items():
            said = f"{what['summary']} {what.get('description', '')}"
            text += [f"<h2>{method.upper()} {path}</h2><p>{_prose(said)}</p>"]
            text += [_table((code, _prose(r["description"])) for code, r in what["responses"].items())]
    for name, schema in api["components"]["schemas"].items():
        rows = ((field, f"<code>{html.escape(_kind(kind))}</code>")
                for field, kind in schema.get("properties", {}).items())  # fmt: skip
        text += [f"<h2 id={name}>{name}</h2><p>{_prose(schema.get('description', ''))}</p>", _table(rows)]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>cotrr</title><meta name="viewport" '
        'content="width=device-width"><style>body{font:16px/1.5 system-ui;max-width:50rem;margin:2rem auto;'
        "padding:0 1rem;color-scheme:light dark}td{padding:0 1rem .2rem 0;vertical-align:top}</style>"
        f'<h1>cotrr</h1><p>As JSON: <a href="/openapi.json">/openapi.json</a></p>{"".join(text)}</html>'
    ).encode()


def _prose(text: str) -> str:
    return html.escape(" ".join(text.split()))


def _table(rows: Iterable[tuple[str, str]]) -> str:
    return f"<table>{''.join(f'<tr><td>{name}</td><td>{what}</td></tr>' for name, what in rows)}</table>"


def _kind(schema: Mapping[str, Any]) -> str:
    """A schema in a few words."""
    if "$ref" in schema:
        return schema["$ref"].rsplit("/", 1)[-1]
    if "anyOf" in schema:
        return " | ".join(map(_kind, schema["anyOf"]))
    if schema.get("type") == "array":
        return f"[{_kind(schema.get('items') or {})}, …]"
    ends = [f"{sign} {schema[end]:g}" for end, sign in (("minimum", "≥"), ("maximum", "≤")) if end in schema]
    return " ".join([schema.get("type") or "any", *ends])
