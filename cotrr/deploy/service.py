"""The reranker as a small HTTP service: one process, one event loop, bounded in all that a client may do.

Requests are read without blocking and scored in the event loop: that takes a millisecond or two, and a
thread would wait for the same interpreter lock (measured: a third more work per request).  More cores serve
by more processes.
"""

import asyncio
import collections
import contextlib
import http
import socket
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from cotrr.deploy import candidates as requests
from cotrr.deploy.messages import ARRAYS, JSON, PROBLEM, Body, Limits, Trouble
from cotrr.deploy.metrics import Histogram, exposition
from cotrr.deploy.openapi import docs, openapi
from cotrr.deploy.reranker import Reranked, Reranker
from cotrr.errors import InputError

if TYPE_CHECKING:
    from starlette.requests import Request

    from cotrr.deploy.shadow import Shadow

LINGER = 1.0  # seconds in which a refused body is still taken in, so that its sender reads the answer
TOO_SLOW = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


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
