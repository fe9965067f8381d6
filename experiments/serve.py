r"""Serve a model over HTTP, from a model folder or following a registry's champion.

    python -m experiments.serve --model=checkpoints/cotrr_lite_v1
    python -m experiments.serve --registry=registry --refresh_seconds=10

    curl -s localhost:8080/rerank -H 'content-type: application/json' -d '{"query": {"domain": "default",
        "constraints": {"color": "pink"}}, "candidates": [{"id": "p1", "clip_score": 0.3}, {"id": "p2"}]}'

/docs describes the API for people, /openapi.json for programs; /metrics is for Prometheus; /healthz says 503
where no model serves (requests then get their original order) or the process is about to stop.
One process serves with one thread: more cores by more processes, which may share a port (--reuse_port).
SIGTERM ends the requests that run, takes no new ones, and the status is 0.
"""

import gc
import os
import pathlib
import socket
import sys
from typing import TYPE_CHECKING

# Read when NumPy is imported.  Several threads a product wait for each other longer than they work.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from absl import flags

from cotrr.config import launch
from cotrr.deploy.messages import Limits
from cotrr.deploy.reranker import Reranker
from cotrr.deploy.service import Service, run
from cotrr.errors import InputError

if TYPE_CHECKING:
    from cotrr.deploy.shadow import Shadow

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Flags of this launcher."""
    flags.DEFINE_string("model", None, "Model folder, from train; or give --registry.")
    flags.DEFINE_string("registry", None, "Registry: a folder, or a URL that fsspec knows.")
    flags.DEFINE_string("name", "cotrr", "Name of the model in the registry.")
    flags.DEFINE_string("version", "champion", "Version in the registry; an alias is followed.")
    flags.DEFINE_string("host", "127.0.0.1", "Address to listen at.")
    flags.DEFINE_integer("port", 8080, "Port to listen at; 0 takes a free one.", lower_bound=0,
                         upper_bound=65535)  # fmt: skip
    flags.DEFINE_bool("reuse_port", False, "Several processes share the port.")
    flags.DEFINE_integer("top_m", 20, "Rerank the first M candidates unless a request says otherwise; the "
                                      "rest stay behind in order. 0 reranks all.", lower_bound=0)  # fmt: skip
    flags.DEFINE_float("deadline_ms", None, "After so long a request gets its original order.", lower_bound=0)
    flags.DEFINE_float("refresh_seconds", 10, "How often to look what is live in the registry.",
                       lower_bound=0.05)  # fmt: skip
    flags.DEFINE_float("max_body_mb", 8, "Largest body, in MB (2^20 bytes).", lower_bound=0.001)
    flags.DEFINE_integer("max_candidates", 1000, "Most candidates of a request.", lower_bound=1)
    flags.DEFINE_integer("max_connections", 512, "Further ones are told 503.", lower_bound=2)
    flags.DEFINE_float("timeout_s", 10, "Time for the head of a request, and again for its body.",
                       lower_bound=0.1)  # fmt: skip
    flags.DEFINE_integer("keep_alive_s", 75, "Time that an idle connection is kept; a load balancer in front "
                                             "should give up sooner.", lower_bound=1)  # fmt: skip
    flags.DEFINE_float("drain_s", 0, "Time from SIGTERM, when /healthz begins to say 503, to the end.",
                       lower_bound=0)  # fmt: skip
    flags.DEFINE_string("shadow_experiment", None, "Experiment in mode shadow: its candidate ranks unseen.")
    flags.DEFINE_string("shadow_log", None, "JSONL file for the shadow's exposures, for `ab analyze`.")


def main() -> None:
    """Loads, listens, serves."""
    if bool(FLAGS.model) == bool(FLAGS.registry):
        raise InputError("expected one of --model and --registry")
    reranker = load(FLAGS.model or FLAGS.registry, FLAGS.version)
    limits = Limits(int(FLAGS.max_body_mb * 2**20), FLAGS.max_candidates, FLAGS.timeout_s)
    service = Service(reranker, limits, make_shadow(reranker))
    listener = listen()
    stop = reranker.follow(FLAGS.refresh_seconds)
    host, port = listener.getsockname()[:2]
    what = reranker.serving.version or reranker.serving.reason
    place = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    ready = lambda: print(f"{place}  {what}", flush=True)
    # A thread that loads a model, or ranks for the shadow, gives way to requests sooner.
    sys.setswitchinterval(5e-4)
    gc.freeze()  # what is here stays: no collection need go through it again, which takes 10 ms
    try:
        run(service, listener, ready, connections=FLAGS.max_connections, keep_alive_s=FLAGS.keep_alive_s,
            drain_s=FLAGS.drain_s)  # fmt: skip
    finally:
        stop.set()
        if service.shadow:
            service.shadow.close()


def load(place: str, version: str) -> Reranker:
    """A reranker as the flags say."""
    if FLAGS.model and not (pathlib.Path(place) / "model.json").exists():
        raise InputError("no finished model here", file=place)
    return Reranker.load(place, FLAGS.name, version, top_m=FLAGS.top_m, deadline_ms=FLAGS.deadline_ms)


def make_shadow(served: Reranker) -> "Shadow | None":
    """What ranks unseen, or None; only then is what analyses experiments imported."""
    if not FLAGS.shadow_experiment and not FLAGS.shadow_log:
        return None
    if not (FLAGS.registry and FLAGS.shadow_experiment and FLAGS.shadow_log):
        raise InputError("a shadow needs --registry, --shadow_experiment and --shadow_log")
    from cotrr.deploy.experiment import read_experiment
    from cotrr.deploy.shadow import Shadow

    experiment = read_experiment(FLAGS.shadow_experiment)
    candidate = load(FLAGS.registry, experiment.candidate_version)
    candidate.follow(FLAGS.refresh_seconds)
    return Shadow(served, candidate, experiment, FLAGS.shadow_log)


def listen() -> socket.socket:
    """A socket at --host and --port; InputError where that cannot be."""
    try:
        family = socket.AF_INET6 if ":" in FLAGS.host else socket.AF_INET
        return socket.create_server((FLAGS.host, FLAGS.port), family=family, backlog=2048,
                                    reuse_port=FLAGS.reuse_port)  # fmt: skip
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InputError(f"--host={FLAGS.host} --port={FLAGS.port}: {reason}") from None


if __name__ == "__main__":
    launch(main, define_flags)
