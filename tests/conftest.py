"""Strict flags, and the small runs that the tests share."""

import json
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import pytest

from cotrr.compilation import keep_compiled

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)
keep_compiled()

SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared"


def pytest_configure(config):
    """A kept program that another process has written by half is compiled again."""
    config.addinivalue_line("filterwarnings", "ignore:Error reading persistent compilation cache entry")


@pytest.fixture(scope="module")
def unoptimised():
    """XLA makes the same graphs in half the time, of slower machine code; also in processes started here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        jax.config.update("jax_disable_most_optimizations", True)
        yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()  # or the modules that follow would run programs of this one


@pytest.fixture
def shared():
    """The folder of shared data, where the checkout has one beside it."""

    def find(name: str) -> pathlib.Path:
        if not (SHARED / name).exists():
            pytest.skip(f"shared data absent: {name}")
        return SHARED / name

    return find


def scored_line(query: int, item: int, dim: int = 4, **fields) -> dict:
    """One valid scored line of query `q<query>` and picture `p<item>`; `fields` override."""
    image, text = np.random.default_rng([query + 1, 7]), np.random.default_rng([item + 1, 11])
    line = {
        "query_id": f"q{query}", "query": f"query {query}", "domain": f"d{query % 2}",
        "constraints": {"color": "pink"}, "id": f"p{item}", "canonical_id": f"shoot{item}",
        "url": f"file:p{item}.jpg",
        "text_embedding": image.normal(size=dim).round(4).tolist(),
        "image_embedding": text.normal(size=dim).round(4).tolist(),
        "subject_ratio": 0.3, "color_delta_e": 12.0 + item, "compliance_score": 0.5,
        "conflicts": [{"type": "color_mismatch", "severity": "strong", "confidence": 0.8}],
        "conflict_score": 0.4, "conflict_prob": 0.25,
        "review": {"compliance": round(((query * 3 + item * 5) % 10) / 10, 1),
                   "conflict": (query + item) % 2, "conflict_types": []},
    }  # fmt: skip
    line.update(fields)
    return {key: value for key, value in line.items() if value is not ...}


@pytest.fixture
def write_run(tmp_path):
    """Writes a run folder from lines (dicts, or raw strings) and returns its path."""

    def write(lines, name="run", manifest=None, status="completed", **extra) -> pathlib.Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        (folder / "scored.jsonl").write_text("".join(text + "\n" for text in texts))
        items = manifest
        if items is None:
            items = [f"{l['query_id']}/{l['id']}" for l in lines if isinstance(l, dict)]
        (folder / "manifest.json").write_text(json.dumps({
            "manifest_id": "m", "run_id": name, "model_version": "v", "overlay_version": "o",
            "created_at": "2026-01-01T00:00:00+00:00", "status": status,
            "items_by_stage": {"scored": items}, "metrics": {}, **extra,
        }))  # fmt: skip
        return folder

    return write


@pytest.fixture
def lines():
    """Six queries of eight candidates each from sixteen pictures."""
    return [scored_line(q, (q * 2 + i) % 16) for q in range(6) for i in range(8)]
