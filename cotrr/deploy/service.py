"""The reranker as a small HTTP service: one process, one event loop, bounded in all that a client may do.

Requests are read without blocking and scored in the event loop: that takes a millisecond or two, and a
thread would wait for the same interpreter lock (measured: a third more work per request).  More cores serve
by more processes.
"""

import asyncio
import bisect
import collections
import contextlib
import html
import http
import inspect
import os
import pathlib
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta

from cotrr.data.contract import Share, Vector
from cotrr.deploy import candidates as requests
from cotrr.deploy.reranker import FALLBACKS, Reranked, Reranker
from cotrr.errors import InputError

if TYPE_CHECKING:
    from starlette.requests import Request

    from cotrr.deploy.shadow import Shadow

JSON, ARRAYS, PROBLEM = "application/json", "application/vnd.cotrr.arrays", "application/problem+json"
BUCKETS = (0.00025, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5)  # seconds; p95 is to be 1 ms
ESCAPED = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})  # in the values of Prometheus' labels
LINGER = 1.0  # seconds in which a refused body is still taken in, so that its sender reads the answer
TOO_SLOW = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


class Limits(NamedTuple):
    """What a request may cost."""

    max_body: int = 8 * 2**20  # bytes
    max_candidates: int = 1000
    timeout_s: float = 10.0  # for the head of a request, and again for its body


class Body(msgspec.Struct, forbid_unknown_fields=True):
    """A request in JSON."""

    query: dict[str, Any]
    candidates: list[Any]  # checked one by one: a bad one is put behind and stops no other
    top_m: requests.Count | None = None
    request_id: str = ""
    unit: str = ""


class Result(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    """One candidate; the numbers are null where it was not scored."""

    rerank_score: Share | None
    rerank_std: Share | None
    rerank_low: Share | None
    rerank_high: Share | None
    p_conflict: Share | None
    rank: Annotated[int, Meta(ge=1)]
    original_rank: Annotated[int, Meta(ge=1)]
    model_version: str
    id: str | None = None  # as the request states it
    reason: str | None = None  # why it was put behind


class Answer(msgspec.Struct):
    """The candidates, best first; `fallback` is empty unless they are in their original order, and why."""

    model_version: str
    label: str
    fallback: str
    results: list[Result]


class Trouble(msgspec.Struct):
    """What is wrong with a request (RFC 9457)."""

    status: int
    title: str
    detail: str
    field: str | None = None


class Refused(Exception):
    """A request that gets no ranking; the connection ends where its body was not read."""

    def __init__(self, status: int, detail: str, field: str | None = None):
        super().__init__(status, detail, field)


class Reply(NamedTuple):
    """A response, as an ASGI application."""

    status: int
    content: bytes
    kind: str = JSON
    headers: tuple[tuple[str, str], ...] = ()
    closes: bool = False  # the connection, since the request was not read to its end

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Sends it; where it closes, takes in the rest of the request for a while, then hangs up."""
        headers = [("content-type", self.kind), ("content-length", str(len(self.content))), *self.headers]
        headers += [("connection", "close")] * self.closes
        encoded = [(name.encode(), value.encode()) for name, value in headers]
        await send({"type": "http.response.start", "status": self.status, "headers": encoded})
        if self.closes:
            await send({"type": "http.response.body", "body": self.content, "more_body": True})
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LINGER):
                    while (await receive()).get("more_body"):
                        pass
        body = b"" if self.closes else self.content
        await send({"type": "http.response.body", "body": body, "more_body": False})


class Service:
    """The endpoints and what they count."""

    def __init__(self, reranker: Reranker, limits: Limits, shadow: "Shadow | None" = None):
        self.reranker, self.limits, self.shadow = reranker, limits, shadow
        self._ranker = shadow or reranker
        self.stopping = False
        self.replies: collections.Counter[tuple[str, int]] = collections.Counter()  # by path and status
        self.seconds = {kind: Histogram() for kind in (JSON, ARRAYS)}
        self.pages = {"/openapi.json": msgspec.json.encode(openapi(limits)), "/docs": docs(limits)}

    async def rerank(self, request: "Request") -> Reply:
        """Reads, ranks, answers."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind not in self.seconds or request.headers.get("content-encoding", "identity") != "identity":
            raise Refused(415, f"expected {JSON} or {ARRAYS}, not compressed")
        body = await self._read(request)
        start = time.perf_counter()
        answer = encode(*(self._json if kind == JSON else self._arrays)(body, start))
        self.seconds[kind].add(time.perf_counter() - start)
        return Reply(200, answer)

    async def health(self, request: "Request") -> Reply:
        """200 while a model serves; 503 where none does, or the process is about to end."""
        serving, status = self.reranker.serving, "ok"
        if self.stopping or not serving.scorer:
            status = "stopping" if self.stopping else serving.reason
        said = {"status": status, "model_version": serving.version, "label": serving.label,
                "trouble": self.reranker.trouble}  # fmt: skip
        return Reply(200 if status == "ok" else 503, msgspec.json.encode(said))

    async def metrics(self, request: "Request") -> Reply:
        """What was counted, as text for Prometheus."""
        return Reply(200, exposition(self).encode(), "text/plain; version=0.0.4; charset=utf-8")

    async def page(self, request: "Request") -> Reply:
        """The API's description, for programs and for people."""
        content = self.pages[request.url.path]
        return Reply(200, content, JSON if content.startswith(b"{") else "text/html; charset=utf-8")

    async def _read(self, request: "Request") -> bytes:
        """The body; Refused where it is too large or comes too slowly."""
        limit, body = self.limits.max_body, bytearray()
        too_large = Refused(413, f"the body is larger than {limit:,} bytes")
        if int(request.headers.get("content-length", 0)) > limit:
            raise too_large
        try:
            async with asyncio.timeout(self.limits.timeout_s):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > limit:
                        raise too_large
        except TimeoutError:
            raise Refused(408, f"the body took longer than {self.limits.timeout_s:g} s") from None
        return bytes(body)

    def _json(self, content: bytes, start: float) -> tuple[Reranked, list[Any]]:
        try:
            body = msgspec.json.decode(content, type=Body)
        except (ValueError, RecursionError) as error:
            raise malformed(error) from None
        self._check_count(len(body.candidates))
        how = self._how(body, start)
        return self._ranker.rerank(body.query, body.candidates, **how), body.candidates

    def _arrays(self, content: bytes, start: float) -> tuple[Reranked, list[Any]]:
        try:
            head, numbers = requests.read_head(content)
            self._check_count(head.candidates)
            query, image, attributes = requests.unpack(head, numbers)
        except InputError as error:
            raise Refused(400, str(error), error.field) from None
        except (ValueError, RecursionError) as error:
            raise malformed(error) from None
        return self._ranker.rerank_arrays(query, image, attributes, **self._how(head, start)), []

    def _how(self, asked: Body | requests.Head, start: float) -> dict[str, Any]:
        shadowed = {"unit": asked.unit, "request_id": asked.request_id} if self.shadow else {}
        return {"top_m": asked.top_m, "since": start, **shadowed}

    def _check_count(self, count: int) -> None:
        if count > self.limits.max_candidates:
            raise Refused(422, f"{count:,} candidates; {self.limits.max_candidates:,} are allowed",
                          "candidates")  # fmt: skip


def encode(found: Reranked, candidates: list[Any]) -> bytes:
    """The answer in JSON, with the ids that candidates state."""
    rows = found.rows()
    for row in rows if candidates else ():
        candidate = candidates[row["original_rank"] - 1]
        stated = isinstance(candidate, dict) and (candidate.get("id") or candidate.get("canonical_id"))
        if isinstance(stated, str):
            row["id"] = stated
    said = {"model_version": found.model_version, "label": found.label, "fallback": found.fallback}
    return msgspec.json.encode(said | {"results": rows})


def malformed(error: Exception) -> Refused:
    """The refusal of a body that cannot be decoded, with the field that it names."""
    if isinstance(error, RecursionError):
        return Refused(400, "nested too deeply")
    reason, _, place = str(error).partition(" - at `$.")
    missing = reason.partition("missing required field `")[2].rstrip("`")
    return Refused(400, reason, place.rstrip("`") or missing or None)


def problem(status: int, detail: str, field: str | None = None, headers: Iterable = ()) -> Reply:
    """A refusal as problem details (RFC 9457)."""
    trouble = Trouble(status, http.HTTPStatus(status).phrase, detail, field)
    return Reply(status, msgspec.json.encode(trouble), PROBLEM, tuple(headers), status in (408, 413, 415))


def application(service: Service) -> Any:
    """The service as an ASGI application; raises InputError where starlette is not installed."""
    try:
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.requests import ClientDisconnect
        from starlette.routing import Route
    except ImportError:
        raise InputError("starlette is not installed", remedy="pip install 'cotrr[serve]'") from None

    async def refused(_: Any, error: Exception) -> Reply:
        return problem(*error.args)

    async def of_starlette(_: Any, error: Any) -> Reply:  # an unknown path, a wrong method
        return problem(error.status_code, error.detail, headers=(error.headers or {}).items())

    async def gone(_: Any, error: Exception) -> Reply:  # nobody is there to read it
        return Reply(499, b"")

    routes = [
        Route("/rerank", service.rerank, methods=["POST"]),
        Route("/healthz", service.health),
        Route("/metrics", service.metrics),
        *(Route(path, service.page) for path in service.pages),
    ]
    known = {route.path for route in routes}
    handlers: Any = {Refused: refused, HTTPException: of_starlette, ClientDisconnect: gone}
    inner = Starlette(routes=routes, exception_handlers=handlers)

    async def counted(scope: Any, receive: Any, send: Any) -> None:
        path = path if (path := scope.get("path")) in known else "other"

        async def sends(message: Any) -> None:
            if message["type"] == "http.response.start":
                service.replies[path, message["status"]] += 1
            await send(message)

        await inner(scope, receive, sends)

    return counted


def run(service: Service, listener: socket.socket, ready: Callable[[], None], *, connections: int = 512,
        keep_alive_s: int = 75, drain_s: float = 0) -> None:  # fmt: skip
    """Serves, once it is `ready`, until SIGTERM or SIGINT; then ends what runs and takes no new requests.

    For `drain_s` before that, `/healthz` says 503 while all else goes on, so that who sends requests can
    turn away.  Raises InputError where uvicorn is not installed.
    """
    try:
        import uvicorn
    except ImportError:
        raise InputError("uvicorn is not installed", remedy="pip install 'cotrr[serve]'") from None

    class Server(uvicorn.Server):
        ends = float("inf")

        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            ready()

        def handle_exit(self, sig: int, frame: Any) -> None:  # uvicorn's own raises the signal again
            self.force_exit = service.stopping
            service.stopping = True
            self.ends = time.monotonic() + drain_s

        async def on_tick(self, counter: int) -> bool:
            return await super().on_tick(counter) or time.monotonic() >= self.ends

    timeout_s = service.limits.timeout_s
    config = uvicorn.Config(
        application(service), http=_protocol(timeout_s), ws="none", lifespan="off", access_log=False,
        log_level="error", server_header=False, proxy_headers=False, limit_concurrency=connections,
        timeout_keep_alive=keep_alive_s, timeout_graceful_shutdown=int(2 * timeout_s) + 1,
    )  # fmt: skip
    Server(config).run([listener])


def _protocol(timeout_s: float) -> Any:
    """HTTP/1.1 as uvicorn speaks it with h11, which bounds the size of a head.

    This bounds its time too, and the time in which a client takes in no more of an answer.
    """
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Protocol(H11Protocol):
        heading: asyncio.TimerHandle | None = None  # set while a head is awaited
        stalled: asyncio.TimerHandle | None = None  # set while the client does not read

        def connection_made(self, transport: Any) -> None:
            # h11 writes head and body apart; else the second waits 40 ms for the client's delayed ACK.
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            super().connection_made(transport)
            self._await_head()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle and not self.cycle.response_complete:
                self.heading = _cancelled(self.heading)
            else:
                self._await_head()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self.heading, self.stalled = _cancelled(self.heading), _cancelled(self.stalled)

        def pause_writing(self) -> None:
            super().pause_writing()
            self.stalled = self.loop.call_later(timeout_s, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            self.stalled = _cancelled(self.stalled)

        def _await_head(self) -> None:
            self.heading = self.heading or self.loop.call_later(timeout_s, self._too_slow)

        def _too_slow(self) -> None:
            self.transport.write(TOO_SLOW)
            self.transport.close()

    return Protocol


def _cancelled(timer: asyncio.TimerHandle | None) -> None:
    if timer:
        timer.cancel()


class Histogram:
    """How long requests took, by bucket."""

    def __init__(self) -> None:
        self.counts, self.total = [0] * (len(BUCKETS) + 1), 0.0

    def add(self, seconds: float) -> None:
        """One more request."""
        self.counts[bisect.bisect_left(BUCKETS, seconds)] += 1
        self.total += seconds


def exposition(service: Service) -> str:
    """The counters in Prometheus' text format, version 0.0.4."""
    stats, serving = service.reranker.stats(), service.reranker.serving
    outcomes = {"reranked": stats["reranked"]} | {kind: stats[f"fallback: {kind}"] for kind in FALLBACKS}
    model = {"version": serving.version, "label": serving.label}
    families = [
        ("http_requests_total", "counter", "Responses by path and status.",
         [({"path": path, "status": status}, count) for (path, status), count in service.replies.items()]),
        ("requests_total", "counter", "Rankings by outcome; but for `reranked` in the original order.",
         [({"outcome": outcome}, count) for outcome, count in outcomes.items()]),
        ("candidates_total", "counter", "Candidates of all rankings.", [({}, stats["candidates"])]),
        ("bad_candidates_total", "counter", "Candidates put behind.", [({}, stats["bad candidates"])]),
        ("swaps_total", "counter", "Changes of what serves.", [({}, stats["swaps"])]),
        ("model_info", "gauge", "What serves now.", [(model, 1)] if serving.scorer else []),
        ("refresh_failing", "gauge", "1: what is live in the registry cannot be loaded.",
         [({}, int(bool(service.reranker.trouble)))]),
        ("resident_bytes", "gauge", "Resident memory.", [({}, resident())]),
        ("shadow_total", "counter", "Requests for the shadow by what became of them.",
         [({"outcome": name}, n) for name, n in (service.shadow.stats() if service.shadow else {}).items()]),
    ]  # fmt: skip
    lines = []
    for name, kind, help, samples in families:
        lines += [f"# HELP cotrr_{name} {help}", f"# TYPE cotrr_{name} {kind}"] if samples else []
        lines += [f"cotrr_{name}{_labels(labels)} {value}" for labels, value in samples]
    return "\n".join([*lines, *_histograms(service.seconds), ""])


def _histograms(seconds: Mapping[str, Histogram]) -> list[str]:
    name = "cotrr_rerank_seconds"
    lines = [f"# HELP {name} From the body's last byte to the encoded answer.", f"# TYPE {name} histogram"]
    for kind, histogram in seconds.items():
        so_far = 0
        for end, count in zip((*BUCKETS, "+Inf"), histogram.counts, strict=True):
            so_far += count
            lines.append(f"{name}_bucket{_labels({'body': kind, 'le': end})} {so_far}")
        lines += [f"{name}_sum{_labels({'body': kind})} {histogram.total:.6f}",
                  f"{name}_count{_labels({'body': kind})} {so_far}"]  # fmt: skip
    return lines


def _labels(labels: Mapping[str, object]) -> str:
    inside = ",".join(f'{name}="{str(value).translate(ESCAPED)}"' for name, value in labels.items())
    return f"{{{inside}}}" if inside else ""


def resident() -> int:
    """Bytes of this process in memory; 0 where the system does not say."""
    try:
        pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
    except OSError:
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


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
