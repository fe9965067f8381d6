"""The simulated run: its truth, its contract fields, its bytes."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from typing import Any

import numpy as np
import pytest

from cotrr.data import contract, runs, simulator
from cotrr.data.simulator import OPTIONAL, Simulation, expected_metrics, write_run
from cotrr.errors import InputError

SMALL = Simulation(queries=60, candidates=25, pictures=500, embedding_dim=16, seed=3)
SHARES = (
    "subject_ratio", "object_area", "glass_ratio", "garnish_ratio", "ice_ratio", "brightness",
    "contrast", "saturation", "compliance_score", "conflict_prob", "conflict_calibrated",
    "temperature_conflict", "clarity_conflict",
)  # fmt: skip
Row = dict[str, Any]


def written(folder: pathlib.Path) -> list[Row]:
    return [json.loads(line) for line in (folder / "scored.jsonl").read_text().splitlines()]


def small(**changes: Any) -> Simulation:
    return dataclasses.replace(SMALL, **changes)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("runs") / "small"
    write_run(SMALL, folder)
    return folder


@pytest.fixture(scope="module")
def rows(run: pathlib.Path) -> list[Row]:
    return written(run)


@pytest.fixture(scope="module")
def truth(run: pathlib.Path) -> dict[str, Any]:
    return json.loads((run / "truth.json").read_text())


def test_same_settings_give_the_same_bytes_and_another_seed_others(
    run: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    write_run(SMALL, tmp_path / "again")
    write_run(small(seed=4), tmp_path / "other")
    for name in ("manifest.json", "scored.jsonl", "truth.json", "truth.jsonl"):
        content = (run / name).read_bytes()
        assert (tmp_path / "again" / name).read_bytes() == content
        assert (tmp_path / "other" / name).read_bytes() != content
    assert sorted(path.name for path in run.iterdir()) == [
        "manifest.json", "scored.jsonl", "truth.json", "truth.jsonl",
    ]  # fmt: skip


def test_a_longer_run_begins_with_the_shorter_one(run: pathlib.Path, tmp_path: pathlib.Path) -> None:
    write_run(small(queries=7), tmp_path / "short")
    short = (tmp_path / "short" / "scored.jsonl").read_bytes()
    assert (run / "scored.jsonl").read_bytes().startswith(short)


def test_every_field_of_the_contract_occurs_and_is_in_range(rows: list[Row]) -> None:
    seen = {field for row in rows for field in row}
    assert seen == contract.FIELDS - {"conflict_probability"}
    for row in rows:
        assert all(0 <= row[field] <= 1 for field in SHARES if field in row)
        assert row["conflict_score"] >= 0 and row.get("color_delta_e", 0) >= 0
        assert math.isfinite(row["dual_score"])
        for conflict in row["conflicts"]:
            assert conflict["severity"] in ("strong", "soft") and 0 <= conflict["confidence"] <= 1
        review = row["review"]
        assert 0 <= review["compliance"] <= 1
        assert review["conflict"] == (len(review["conflict_types"]) > 0)
    for field in (*SHARES, "color_delta_e", "conflict_score", "clip_score", "dual_score"):
        values = {row[field] for row in rows if field in row}
        assert len(values) > 5, f"{field} does not vary"


def test_scores_follow_from_what_the_line_says(rows: list[Row]) -> None:
    for row in rows:
        image, text = np.array(row["image_embedding"]), np.array(row["text_embedding"])
        assert image.shape == text.shape == (16,)
        assert np.linalg.norm(image) == pytest.approx(1, abs=1e-4)
        assert row["clip_score"] == pytest.approx(image @ text, abs=1e-5)
        weights = {"strong": 1.0, "soft": 0.5}
        score = sum(weights[c["severity"]] * c["confidence"] for c in row["conflicts"])
        assert row["conflict_score"] == pytest.approx(score, abs=1e-3)
        fused = 0.7 * row["compliance_score"] + 0.3 * (1 - row["conflict_prob"])
        assert row["dual_score"] == pytest.approx(fused + 0.2 * row["clip_score"], abs=1e-5)
        assert ("color_delta_e" in row) <= ("color" in row["constraints"])


def test_the_reader_takes_the_run(run: pathlib.Path) -> None:
    reading = runs.read_run(run)
    assert reading.table.num_rows == 60 * 25
    assert reading.summary["unknown_fields"] == {}


def test_the_manifest_names_every_line(run: pathlib.Path, rows: list[Row]) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    assert set(manifest) == set(contract.Manifest.__struct_fields__)
    assert manifest["status"] == "completed" and manifest["embedding_dim"] == 16
    scored = manifest["items_by_stage"]["scored"]
    assert scored == [f"{row['query_id']}/{row['id']}" for row in rows]
    assert len(set(scored)) == len(scored) == manifest["metrics"]["scored"] == 60 * 25
    pool = manifest["items_by_stage"]["raw_candidates"]
    assert len(pool) == 500 and {row["id"] for row in rows} <= set(pool)


def test_pictures_recur_across_queries_and_shoots_have_frames(rows: list[Row]) -> None:
    pictures, shoots = {row["id"] for row in rows}, {row["canonical_id"] for row in rows}
    assert len(pictures) < len(rows) / 2
    assert len(shoots) < len(pictures)
    one = {row["id"]: (row["canonical_id"], tuple(row["image_embedding"])) for row in rows}
    assert all(one[r["id"]] == (r["canonical_id"], tuple(r["image_embedding"])) for r in rows)


def plain_metrics(order: list[Row]) -> list[float]:
    """Compliance@1/3/5 and nDCG@10 of one ordered list, in plain Python."""
    labels = [row["review"]["compliance"] for row in order]
    gains = [sum(y / math.log2(i + 2) for i, y in enumerate(some[:10]))
             for some in (labels, sorted(labels, reverse=True))]  # fmt: skip
    return [sum(labels[:k]) / k for k in (1, 3, 5)] + [gains[0] / gains[1]]


def test_the_truth_is_what_the_lines_say(rows: list[Row], truth: dict[str, Any]) -> None:
    lists: dict[str, list[Row]] = {}
    for row in rows:
        lists.setdefault(row["query_id"], []).append(row)
    keys = {
        "reviewer": lambda row: -row["review"]["compliance"],
        "clip_score": lambda row: -row["clip_score"],
        "step4_rule": lambda row: -row["dual_score"],
    }
    for ranking, key in keys.items():
        mean = np.mean([plain_metrics(sorted(some, key=key)) for some in lists.values()], axis=0)
        assert list(truth["metrics"][ranking].values()) == pytest.approx(list(mean), abs=1e-9)
    labels = [row["review"]["compliance"] for row in rows]
    for metric in ("compliance_at_1", "compliance_at_3", "compliance_at_5"):
        assert truth["metrics"]["random"][metric] == pytest.approx(np.mean(labels))
    assert truth["rows"] == truth["reviewed_rows"] == len(rows)
    assert truth["queries"] == len(lists) and truth["queries_without_gain"] == 0
    conflict = np.mean([row["review"]["conflict"] for row in rows])
    assert truth["conflict_rate"] == pytest.approx(conflict)
    assert truth["settings"] == dataclasses.asdict(SMALL)
    assert truth["model"] == simulator.__doc__


def test_better_knowledge_ranks_better(truth: dict[str, Any]) -> None:
    for metric in ("compliance_at_1", "ndcg_at_10"):
        order = ("random", "clip_score", "step4_rule", "noise_free", "reviewer")
        values = [truth["metrics"][ranking][metric] for ranking in order]
        assert values == sorted(values) and len(set(values)) == 5


def test_ties_take_their_expected_value() -> None:
    labels = np.array([1.0, 0.0, 0.5])
    tied = expected_metrics(np.array([2.0, 2.0, 1.0]), labels)
    both = [expected_metrics(np.array(s), labels) for s in ([3.0, 2.0, 1.0], [2.0, 3.0, 1.0])]
    np.testing.assert_allclose(tied, np.mean(both, axis=0))
    assert tied[0] == 0.5
    assert np.isnan(expected_metrics(np.array([1.0, 2.0]), np.zeros(2))[3])


def test_perfect_detectors_and_reviewers_agree_on_every_conflict(tmp_path: pathlib.Path) -> None:
    exact = small(detector_error=0.0, pixel_error=0.0, reviewer_noise=0.0, reviewer_error=0.0)
    truth = write_run(exact, tmp_path / "exact")
    for row in written(tmp_path / "exact"):
        assert [c["type"] for c in row["conflicts"]] == row["review"]["conflict_types"]
    # The reviewer's scale has steps of 0.05, so the orders differ by rounding alone.
    best, known = truth["metrics"]["reviewer"], truth["metrics"]["noise_free"]
    assert known["ndcg_at_10"] == pytest.approx(best["ndcg_at_10"], abs=1e-9)


def test_errors_make_conflicts_disagree(rows: list[Row]) -> None:
    agree = [[c["type"] for c in r["conflicts"]] == r["review"]["conflict_types"] for r in rows]
    assert 0.2 < np.mean(agree) < 0.9


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_missing_rate_is_respected(rate: float, tmp_path: pathlib.Path) -> None:
    write_run(small(missing_rate=rate), tmp_path / "run")
    rows = written(tmp_path / "run")
    for field in OPTIONAL:
        asked = [r for r in rows if field != "color_delta_e" or "color" in r["constraints"]]
        share = np.mean([field not in row for row in asked])
        # Four standard errors of a share of about 1,300 rows; exact at 0.
        assert abs(share - rate) <= 4 * math.sqrt(rate * (1 - rate) / len(asked))
    always = contract.FIELDS - {*OPTIONAL, "conflict_probability"}
    assert all(always <= set(row) for row in rows)


def test_unreviewed_share_is_respected(rows: list[Row], tmp_path: pathlib.Path) -> None:
    truth = write_run(small(unreviewed_rate=0.4), tmp_path / "run")
    partly = written(tmp_path / "run")
    told = [row for row in partly if "review" in row]
    assert truth["reviewed_rows"] == len(told)
    assert abs(1 - len(told) / len(partly) - 0.4) <= 4 * math.sqrt(0.24 / len(partly))
    # Only the reviews go: lines, and the verdicts that stay, are those of the full run.
    for full, row in zip(rows, partly, strict=True):
        assert {**row, "review": full["review"]} == full
        assert row.get("review", full["review"]) == full["review"]


def test_a_run_without_reviews_has_no_truth_to_tell(tmp_path: pathlib.Path) -> None:
    truth = write_run(small(queries=3, unreviewed_rate=1.0), tmp_path / "run")
    assert truth["queries_without_review"] == 3 and truth["conflict_rate"] is None
    assert all("review" not in row for row in written(tmp_path / "run"))
    assert all(value is None for metrics in truth["metrics"].values() for value in metrics.values())


def test_drift_moves_the_pixels_and_leaves_the_drinks(tmp_path: pathlib.Path) -> None:
    def brightness(shift: float) -> dict[str, float]:
        name = tmp_path / f"run{shift}"
        write_run(small(brightness_shift=shift, missing_rate=0.0), name)
        return {row["id"]: row["brightness"] for row in written(name)}

    before, after = brightness(0.0), brightness(0.2)
    common = before.keys() & after.keys()
    assert len(common) > 100
    expected = [min(1.0, before[name] + 0.2) for name in common]
    np.testing.assert_allclose([after[name] for name in common], expected, atol=2e-4)


def test_runs_of_one_encoder_share_the_space(tmp_path: pathlib.Path) -> None:
    def texts(**changes: Any) -> dict[tuple[str, str], list[float]]:
        write_run(small(queries=200, candidates=1, **changes), tmp_path / "run")
        rows = written(tmp_path / "run")
        return {(row["query"], row["domain"]): row["text_embedding"] for row in rows}

    base, other_seed, other_encoder = texts(), texts(seed=9), texts(encoder_seed=1)
    shared = base.keys() & other_seed.keys()
    assert shared and all(base[key] == other_seed[key] for key in shared)
    assert all(base[key] != other_encoder[key] for key in base)


def test_a_failure_leaves_the_older_run_as_it_was(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "run"
    write_run(small(queries=3), folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def stop(count: int) -> None:
        if count == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_run(small(queries=4), folder, stop)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    "wrong",
    [{"candidates": 501}, {"missing_rate": 1.5}, {"domains": 0}, {"reviewer_noise": -1.0},
     {"queries": 0}, {"detector_error": -0.1}],
)  # fmt: skip
def test_senseless_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        small(**wrong)
