"""The service's counters in Prometheus' text format."""

import bisect
import os
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from cotrr.deploy.reranker import FALLBACKS

if TYPE_CHECKING:
    from cotrr.deploy.service import Service

BUCKETS = (0.00025, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5)  # seconds; p95 is to be 1 ms
ESCAPED = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})  # in the values of Prometheus' labels


class Histogram:
    """How long requests took, by bucket."""

    def __init__(self) -> None:
        self.counts, self.total = [0] * (len(BUCKETS) + 1), 0.0

    def add(self, seconds: float) -> None:
        """One more request."""
        self.counts[bisect.bisect_left(BUCKETS, seconds)] += 1
        self.total += seconds


def exposition(service: "Service") -> str:
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
