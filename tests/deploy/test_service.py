"""The service as a process of its own, asked by real clients over the loopback interface."""

import concurrent.futures
import contextlib
import http.client
import importlib.util
import json
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import msgspec
import numpy as np
import pytest

from cotrr.data.contract import ATTRIBUTES
from cotrr.deploy import Reranker
from cotrr.deploy import candidates as requests
from cotrr.deploy import experiment as online
from cotrr.deploy.messages import ARRAYS, JSON, PROBLEM, Answer, Limits
from cotrr.deploy.metrics import Histogram, exposition
from cotrr.deploy.registry import Draft
from cotrr.deploy.service import Service, run
from cotrr.errors import InputError
from tests.deploy.small import make_registry, promotion
from tests.deploy.test_ab import STEP4
from tests.deploy.test_reranker import LINES, QUERY, SCORER, wait_for

ROOT = pathlib.Path(__file__).resolve().parents[2]
MISSING = [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"missing: {', '.join(MISSING)}")
BODY = json.dumps({"query": QUERY, "candidates": LINES}).encode()
TIMEOUT = 1.0  # seconds: the service's for slow requests


class Server:
    """The launcher as a process."""

    def __init__(self, *flags):
        command = [sys.executable, "-m", "experiments.serve", "--port=0", *flags]
        self.process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE,
                                        stderr=subprocess.STDOUT)  # fmt: skip
        self.said = self.process.stdout.readline()
        self.port = int(re.match(r"http://127\.0\.0\.1:(\d+)  ", self.said)[1])

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)

    def ask(self, method, path, body=None, kind=JSON, **headers):
        """Status, headers and content of one request on a connection of its own."""
        with contextlib.closing(self.connect()) as client:
            return talk(client, method, path, body, kind, **headers)

    def rerank(self, body=BODY, kind=JSON) -> Answer:
        status, _, content = self.ask("POST", "/rerank", body, kind)
        assert status == 200, content
        return msgspec.json.decode(content, type=Answer)

    def raw(self, *parts: bytes, pause=0.0) -> bytes:
        """All that comes back to bytes sent one after the other, until the server hangs up."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=20) as client:
            with contextlib.suppress(ConnectionError):  # it has hung up already
                for part in parts:
                    client.sendall(part)
                    time.sleep(pause)
            return read_all(client)

    def metrics(self) -> dict[str, float]:
        lines = self.ask("GET", "/metrics")[2].decode().splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[0] != "#"}

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        self.rest = self.process.communicate(timeout=20)[0]
        return self.process.returncode


def read_all(client: socket.socket) -> bytes:
    """What comes until the other side hangs up."""
    answer = b""
    with contextlib.suppress(ConnectionError):
        while got := client.recv(65536):
            answer += got
    return answer


def talk(client, method, path, body=None, kind=JSON, **headers):
    client.request(method, path, body, {"content-type": kind, **headers})
    response = client.getresponse()
    return response.status, response.headers, response.read()


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    registry = make_registry(tmp_path_factory.mktemp("serve") / "registry", 2)
    registry.append(lambda _: promotion(registry, "v1"))
    return registry


@contextlib.contextmanager
def serving(registry, *flags):
    server = Server(f"--registry={registry.store._folder}", *flags)
    try:
        yield server
        assert server.stop() == 0
        assert "Traceback" not in server.rest
    finally:
        server.process.kill()
        server.process.communicate()


@pytest.fixture(scope="module")
def server(registry):
    """A service with small limits, following the registry."""
    flags = ("--refresh_seconds=0.05", "--max_body_mb=0.125", "--max_candidates=20",
             f"--timeout_s={TIMEOUT}", "--keep_alive_s=1", "--max_connections=40")  # fmt: skip
    with serving(registry, *flags) as started:
        yield started


def expected(**how):
    return Reranker(SCORER).rerank(QUERY, LINES, **how)


class TestAnswers:
    def test_json(self, server):
        found = server.rerank()
        assert (found.label, found.fallback, found.model_version) == ("v1", "", SCORER.version)
        rows = [row | {"id": LINES[row["original_rank"] - 1]["id"]} for row in expected().rows()]
        assert msgspec.to_builtins(found.results) == rows

    def test_arrays(self, server):
        rng = np.random.default_rng(0)
        image, attributes = rng.normal(size=(9, 6)), rng.uniform(size=(9, len(ATTRIBUTES)))
        found = server.rerank(requests.pack(QUERY, image, attributes, top_m=4), f"{ARRAYS}; v=1")
        rows = Reranker(SCORER).rerank_arrays(QUERY, image, attributes, top_m=4).rows()
        assert msgspec.to_builtins(found.results) == rows

    def test_top_m(self, server):
        found = server.rerank(json.dumps({"query": QUERY, "candidates": LINES, "top_m": 3}))
        assert [row.original_rank - 1 for row in found.results] == expected(top_m=3).order

    def test_no_candidates(self, server):
        assert server.rerank(b'{"query": {}, "candidates": []}').results == []

    def test_bad_candidates_are_put_behind(self, server):
        bad = [7, {"id": "p", "brightness": 2}, {"canonical_id": "q", "image_embedding": [1]}]
        found = server.rerank(json.dumps({"query": QUERY, "candidates": [*bad, *LINES]}))
        assert [(row.id, row.original_rank) for row in found.results[-3:]] == [(None, 1), ("p", 2), ("q", 3)]
        assert [bool(row.reason) for row in found.results] == [False] * 8 + [True] * 3
        assert [row.id for row in found.results[:8]] == [LINES[i]["id"] for i in expected().order]

    def test_a_bad_query_gets_the_original_order(self, server):
        found = server.rerank(json.dumps({"query": {"text_embedding": [1]}, "candidates": LINES}))
        assert found.fallback.startswith("bad request: query: text_embedding: 1 numbers")
        assert [row.original_rank for row in found.results] == list(range(1, 9))

    def test_one_connection_for_many(self, server):
        with contextlib.closing(server.connect()) as client:
            for method, path in [("POST", "/rerank"), ("GET", "/nothing"), ("GET", "/healthz")] * 3:
                talk(client, method, path, BODY if path == "/rerank" else None)
                local = client.sock.getsockname()
            assert client.sock.getsockname() == local


class TestRefusals:
    @pytest.mark.parametrize(
        ("body", "field"),
        [
            (b"", None),
            (b"{", None),
            (b"[]", None),
            (b"\xff", None),
            (b'{"query": {}}', "candidates"),
            (b'{"query": [], "candidates": []}', "query"),
            (b'{"query": {}, "candidates": {}}', "candidates"),
            (b'{"query": {}, "candidates": [], "top_m": -1}', "top_m"),
            (b'{"query": {}, "candidates": [], "top_n": 1}', None),
            (b'{"query": {"x": NaN}, "candidates": []}', None),
            (b'{"query": {}, "candidates": [{"clip_score": 1e999}]}', "candidates[0][...]"),
            (b'{"query": {}, "candidates": ' + b"[" * 60_000, None),
        ],
    )
    def test_malformed_json(self, server, body, field):
        self.check(server.ask("POST", "/rerank", body), 400, field)

    @pytest.mark.parametrize(
        ("body", "field"),
        [
            (b"", None),
            (b'{"candidates": 1}', None),
            (b'{"candidates": -1}\n', "candidates"),
            (b'{"candidates": 1, "image_dim": 4}\n\0\0\0\0', None),
            (b'{"candidates": 1, "attributes": ["y"]}\n\0\0\0\0', "attributes"),
        ],
    )
    def test_malformed_arrays(self, server, body, field):
        self.check(server.ask("POST", "/rerank", body, ARRAYS), 400, field)

    def test_too_many_candidates(self, server):
        many = json.dumps({"query": {}, "candidates": [{}] * 21})
        self.check(server.ask("POST", "/rerank", many), 422, "candidates")
        self.check(server.ask("POST", "/rerank", b'{"candidates": 21}\n', ARRAYS), 422, "candidates")

    def test_another_kind_of_body(self, server):
        for kind, headers in (("text/plain", {}), (JSON, {"content-encoding": "gzip"})):
            self.check(server.ask("POST", "/rerank", BODY, kind, **headers), 415, None)

    def test_other_paths_and_methods(self, server):
        self.check(server.ask("GET", "/nothing"), 404, None)
        self.check(server.ask("POST", "/nothing", BODY), 404, None)
        answer = server.ask("GET", "/rerank")
        self.check(answer, 405, None)
        assert answer[1]["allow"] == "POST"
        assert server.ask("HEAD", "/healthz")[::2] == (200, b"")

    @pytest.mark.parametrize("megabytes", [1, 20])
    def test_an_oversized_body(self, server, megabytes):
        large = b" " * (megabytes << 20)
        self.check(server.ask("POST", "/rerank", large), 413, None)  # refused by what it says of itself
        self.check(server.ask("POST", "/rerank", iter([large])), 413, None)  # in chunks: while it comes

    def check(self, answer, status, field):
        assert answer[0] == status, answer
        assert answer[1]["content-type"] == PROBLEM
        trouble = json.loads(answer[2])
        assert trouble["status"] == status
        assert trouble["detail"]
        assert trouble["field"] == field

    def test_what_is_no_http(self, server):
        assert server.raw(b"what?\r\n\r\n").startswith(b"HTTP/1.1 400")
        endless = b"GET /healthz HTTP/1.1\r\nhost: a\r\nx: " + b"y" * 200_000
        assert server.raw(endless)[:10] in (b"", b"HTTP/1.1 4")  # it hangs up while there is more to come
        sized = b"POST /rerank HTTP/1.1\r\nhost: a\r\ncontent-length: -5\r\n\r\n"
        assert server.raw(sized).startswith(b"HTTP/1.1 400")


class TestOthersAreNotDisturbed:
    HEAD = b"POST /rerank HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"

    def test_slow_requests_are_refused_meanwhile_others_are_served(self, server):
        size = b"content-length: %d\r\n\r\n" % len(BODY)
        slow = {
            "no head": (),
            "half a head": (self.HEAD[:30],),
            "a head in drops": tuple(self.HEAD[i : i + 1] for i in range(12)),
            "no body": (self.HEAD + size,),
            "half a body": (self.HEAD + size, BODY[:50]),
            "a body in drops": (self.HEAD + size, *(BODY[i : i + 1] for i in range(12))),
        }
        with concurrent.futures.ThreadPoolExecutor(len(slow)) as pool:
            begun = time.monotonic()
            sent = {what: pool.submit(server.raw, *parts, pause=0.1) for what, parts in slow.items()}
            served, longest = 0, 0.0
            while time.monotonic() < begun + TIMEOUT:
                before = time.monotonic()
                assert server.rerank().label == "v1"
                served, longest = served + 1, max(longest, time.monotonic() - before)
            said = {what: one.result() for what, one in sent.items()}
        for what, answer in said.items():
            assert answer.startswith(b"HTTP/1.1 408"), what
            assert b"connection: close" in answer
        assert served > 5
        assert longest < TIMEOUT

    def test_an_idle_connection_is_closed(self, server):
        answer = server.raw(b"GET /healthz HTTP/1.1\r\nhost: a\r\n\r\n")
        assert answer.count(b"HTTP/1.1") == 1
        assert answer.startswith(b"HTTP/1.1 200")

    def test_a_second_head_that_comes_slowly(self, server):
        answer = server.raw(b"GET /healthz HTTP/1.1\r\nhost: a\r\n\r\n", b"GET /he", pause=0.1)
        assert re.findall(rb"HTTP/1.1 (\d+)", answer) == [b"200", b"408"]

    def test_a_client_that_hangs_up(self, server):
        for _ in range(5):
            with socket.create_connection(("127.0.0.1", server.port)) as client:
                client.sendall(self.HEAD + b"content-length: 1000\r\n\r\n{")
        assert server.rerank().label == "v1"
        wait_for(lambda: server.metrics().get('cotrr_http_requests_total{path="/rerank",status="499"}') == 5)

    def test_a_client_that_reads_no_answers(self, server):
        many = 400 * b"GET /openapi.json HTTP/1.1\r\nhost: a\r\n\r\n"
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", server.port))
            client.sendall(many)
            time.sleep(2 * TIMEOUT)
            answer = read_all(client)
        assert 0 < answer.count(b"HTTP/1.1 200") < 400
        assert server.rerank().label == "v1"

    def test_too_many_connections_are_told_so(self, server):
        with contextlib.ExitStack() as stack:
            for _ in range(45):
                stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            time.sleep(0.1)
            assert server.ask("GET", "/healthz")[0] == 503
        wait_for(lambda: server.ask("GET", "/healthz")[0] == 200)


class TestFollowing:
    def test_a_swap_under_load_drops_nothing(self, server, registry):
        versions, stop = {v.model: v.label for v in registry.state().versions}, threading.Event()
        before = server.metrics()["cotrr_swaps_total"]

        def load():
            answers = []
            with contextlib.closing(server.connect()) as client:
                while not stop.is_set():
                    status, _, content = talk(client, "POST", "/rerank", BODY)
                    assert status == 200
                    answers.append(msgspec.json.decode(content, type=Answer))
            return answers

        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            asking = [pool.submit(load) for _ in range(3)]
            for step in range(6):
                move(registry, "v2" if step % 2 == 0 else "v1")
                wait_for(lambda n=step + 1: server.metrics()["cotrr_swaps_total"] == before + n)
            stop.set()
            answers = [answer for one in asking for answer in one.result()]
        assert {answer.model_version for answer in answers} == set(versions)
        for answer in answers:
            assert answer.label == versions[answer.model_version]
            assert {row.model_version for row in answer.results} == {answer.model_version}
            assert not answer.fallback

    def test_no_champion_is_the_original_order_and_not_healthy(self, server, registry):
        assert json.loads(server.ask("GET", "/healthz")[2]) == {
            "status": "ok", "model_version": SCORER.version, "label": "v1", "trouble": ""
        }  # fmt: skip
        move(registry, "")
        wait_for(lambda: server.ask("GET", "/healthz")[0] == 503)
        assert json.loads(server.ask("GET", "/healthz")[2])["status"] == "no version is champion"
        found = server.rerank()
        assert found.fallback.startswith("no champion")
        assert [row.original_rank for row in found.results] == list(range(1, 9))
        assert "cotrr_model_info" not in "".join(server.metrics())
        move(registry, "v1")
        wait_for(lambda: server.ask("GET", "/healthz")[0] == 200)

    def test_what_cannot_be_loaded_is_said(self, server, registry):
        folder = registry.store._folder / "cotrr" / "versions" / registry.state().version("v2").folder
        whole = (folder / "weights.npz").read_bytes()
        (folder / "weights.npz").write_bytes(b"")
        try:
            move(registry, "v2")
            wait_for(lambda: server.metrics()["cotrr_refresh_failing"])
            health = json.loads(server.ask("GET", "/healthz")[2])
            assert (health["status"], health["label"]) == ("ok", "v1")
            assert "changed since" in health["trouble"]
        finally:
            (folder / "weights.npz").write_bytes(whole)
            move(registry, "v1")
        wait_for(lambda: not server.metrics()["cotrr_refresh_failing"])
        assert server.rerank().label == "v1"


def move(registry, label):
    """Makes a version, or none, live."""
    back = Draft(kind="rollback", actor="t", version="")
    registry.append(lambda _: promotion(registry, label) if label else back)


class TestDescription:
    def test_metrics(self, server):
        before = server.metrics()
        server.rerank()
        after = server.metrics()
        grown = {name for name in after if after[name] > before.get(name, 0)}
        assert {'cotrr_requests_total{outcome="reranked"}', "cotrr_candidates_total",
                'cotrr_http_requests_total{path="/rerank",status="200"}',
                f'cotrr_rerank_seconds_count{{body="{JSON}"}}'} <= grown  # fmt: skip
        assert after[f'cotrr_model_info{{version="{SCORER.version}",label="v1"}}'] == 1
        buckets = [
            n for name, n in after.items() if name.startswith("cotrr_rerank_seconds_bucket") and JSON in name
        ]
        assert buckets == sorted(buckets)
        assert buckets[-1] == after[f'cotrr_rerank_seconds_count{{body="{JSON}"}}']
        assert 10e6 < after["cotrr_resident_bytes"] < 500e6

    def test_they_are_what_prometheus_reads(self, server):
        parser = pytest.importorskip("prometheus_client.parser")
        families = list(parser.text_string_to_metric_families(server.ask("GET", "/metrics")[2].decode()))
        assert {"cotrr_requests", "cotrr_rerank_seconds", "cotrr_model_info"} <= {f.name for f in families}
        assert all(family.documentation for family in families)

    def test_openapi(self, server):
        status, headers, content = server.ask("GET", "/openapi.json")
        assert (status, headers["content-type"]) == (200, JSON)
        api = json.loads(content)
        schemas = api["components"]["schemas"]
        for name in re.findall(rb'"\$ref":"#/components/schemas/([^"]+)"', content):
            assert name.decode() in schemas
        assert set(api["paths"]) == {"/rerank", "/healthz", "/metrics"}
        candidate = schemas["Candidate"]["properties"]
        assert {"image_embedding", "conflicts", "id", *requests.STATED} <= set(candidate)
        assert candidate["brightness"]["anyOf"][0]["maximum"] == 1
        assert schemas["Body"]["properties"]["candidates"]["maxItems"] == 20

    def test_the_page_needs_no_network(self, server):
        status, headers, content = server.ask("GET", "/docs")
        assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
        assert b"POST /rerank" in content
        assert set(re.findall(rb'(?:src|href)="?([^" >]+)', content)) == {b"/openapi.json"}


class TestProcess:
    def test_it_stops_gracefully(self, registry):
        with serving(registry) as server, socket.create_connection(("127.0.0.1", server.port)) as client:
            head = TestOthersAreNotDisturbed.HEAD + b"content-length: %d\r\n\r\n" % len(BODY)
            client.sendall(head + BODY[:100])
            time.sleep(0.2)
            server.process.send_signal(signal.SIGTERM)
            wait_for(lambda: not can_connect(server.port))
            client.sendall(BODY[100:])
            answer = read_all(client)
            assert answer.startswith(b"HTTP/1.1 200")
            assert server.process.wait(20) == 0

    def test_it_says_that_it_is_about_to_stop(self, registry):
        with serving(registry, "--drain_s=1") as server:
            server.process.send_signal(signal.SIGTERM)
            wait_for(lambda: server.ask("GET", "/healthz")[0] == 503)
            assert json.loads(server.ask("GET", "/healthz")[2])["status"] == "stopping"
            assert server.rerank().label == "v1"
            assert server.process.wait(20) == 0

    def test_processes_share_a_port(self, registry):
        with (
            serving(registry, "--reuse_port") as first,
            serving(registry, "--reuse_port", f"--port={first.port}") as second,
        ):
            assert first.port == second.port
            for _ in range(20):
                assert first.rerank().label == "v1"
            second.process.send_signal(signal.SIGTERM)
            assert second.process.wait(20) == 0
            assert first.rerank().label == "v1"

    def test_a_shadow_ranks_unseen(self, registry, tmp_path):
        shadow = STEP4 | {"mode": "shadow", "experiment_id": "s"}
        (tmp_path / "e.json").write_text(json.dumps(shadow))
        log = tmp_path / "shadow.jsonl"
        with serving(registry, f"--shadow_experiment={tmp_path / 'e.json'}", f"--shadow_log={log}") as server:
            server.rerank(json.dumps({"query": QUERY, "candidates": LINES, "unit": "u", "request_id": "r"}))
            arrays = requests.pack(QUERY, np.zeros((2, 0)), np.full((2, 18), 0.5), unit="u", request_id="r2")
            assert server.rerank(arrays, ARRAYS).label == "v1"
            wait_for(lambda: server.metrics()['cotrr_shadow_total{outcome="logged"}'] == 2)
        exposures = online.read_exposures(log, online.read_experiment(tmp_path / "e.json")).records
        assert [(record.unit, record.request_id) for record in exposures] == [("u", "r"), ("u", "r2")]
        assert exposures[0].shadow.top_k_overlap == 1  # v2 differs from v1 in its name alone

    @pytest.mark.parametrize(
        ("flags", "said"),
        [
            ([], "expected one of --model and --registry"),
            (["--model=a", "--registry=b"], "expected one of --model and --registry"),
            (["--model={tmp}"], "no finished model"),
            (["--registry={tmp}"], "neither a model nor a registry"),
            (["--registry={registry}", "--port={taken}"], "address already in use"),
            (["--registry={registry}", "--shadow_log=x"], "a shadow needs"),
        ],
    )
    def test_what_cannot_start(self, registry, tmp_path, flags, said):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            known = {"tmp": tmp_path, "registry": registry.store._folder, "taken": taken.getsockname()[1]}
            command = [sys.executable, "-m", "experiments.serve", *(flag.format(**known) for flag in flags)]
            ended = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=60)
        assert ended.returncode == 2
        assert said in ended.stderr

    def test_it_imports_little(self):
        code = ("import sys, experiments.serve, starlette.applications, uvicorn;"
                "print({'jax', 'scipy', 'pyarrow'} & {m.split('.')[0] for m in sys.modules})")  # fmt: skip
        said = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert said.stdout.strip() == "set()"


def can_connect(port) -> bool:
    with contextlib.suppress(ConnectionError), socket.create_connection(("127.0.0.1", port), 5):
        return True
    return False


@pytest.mark.parametrize("package", ["uvicorn", "starlette.applications"])
def test_it_says_what_is_not_installed(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=r"is not installed. pip install 'cotrr\[serve\]'"):
        run(Service(Reranker(SCORER), Limits()), None, None)


def test_labels_are_escaped_and_buckets_include_their_end():
    service = Service(Reranker(SCORER), Limits())
    service.replies['/a"b\\c\nd', 200] += 1
    assert r'cotrr_http_requests_total{path="/a\"b\\c\nd",status="200"} 1' in exposition(service)
    histogram = Histogram()
    for seconds in (0.0, 0.001, 0.0011, 9.0):
        histogram.add(seconds)
    assert histogram.counts == [1, 0, 1, 1, 0, 0, 0, 0, 0, 0, 1]
