"""The way into production and back, by the commands of the README, on simulated runs."""

import json
import pathlib
import shutil

import pytest

from tests.commands import launch, make_data

RECIPE = "--flagfile=experiments/recipes/cotrr_lite.flags"
CLOSE = {  # enough queries to decide at this size, and no limit on how busy the machine is
    "name": "test-1", "description": "", "superiority": [{"metric": "compliance@1"}],
    "non_inferiority": [{"metric": "ndcg@10", "margin": 0.01}],
    "slices": [{"metric": "compliance@1", "margin": 0.2}],
    "limits": [{"figure": "conflict_auc", "at_least": 0.6}, {"figure": "latency_p95_ms", "at_most": 1000}],
}  # fmt: skip


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    """Two models of one run, and a registry that holds both."""
    work = tmp_path_factory.mktemp("deployment")
    data = f"--data={make_data(work, 300, 40, '0.3,0,0.7')}"
    for name, more in (("weak", ["--groups=clip,conflict"]), ("strong", [])):
        launch("train", data, f"--workdir={work / name}", RECIPE, "--quick", *more)
        launch("evaluate", data, f"--model={work / name}", f"--output={work / 'reports' / name}", "--quick")
    (work / "policy.json").write_text(json.dumps(CLOSE | {"first_champion": "clip"}))
    for name in ("weak", "strong"):
        registry(work, "register", data, f"--model={work / name}", f"--report={work / 'reports' / name}")
    return work


def registry(work: pathlib.Path, command: str, *arguments: object, fails: int = 0) -> str:
    return launch("registry", command, f"--registry={work / 'registry'}", "--actor=tester", *arguments,
                  fails=fails)  # fmt: skip


def promote(work: pathlib.Path, version: str, fails: int = 0) -> str:
    return registry(
        work, "promote", f"--version={version}", f"--data={work / 'data'}", "--quick",
        f"--policy={work / 'policy.json'}", f"--output={work / version}", fails=fails,
    )  # fmt: skip


def step4_files(work: pathlib.Path, name: str) -> tuple[dict, dict]:
    registry(work, "export", f"--output={work / name}")
    return tuple(json.loads((work / name / file).read_text())
                 for file in ("model_registry.json", "deployments.json"))  # fmt: skip


def test_two_versions_go_live_on_evidence_and_one_comes_back(road):
    versions, deployments = step4_files(road, "before")
    assert len(versions) == 2
    assert deployments == {}

    said = promote(road, "v1")
    assert "PROMOTE" in said
    said = promote(road, "v2")
    judgement = json.loads((road / "v2" / "judgement.json").read_text())
    assert judgement["verdict"] == "PROMOTE"
    assert judgement["incumbent"]["label"] == "v1"
    first = next(check for check in judgement["checks"] if check["check"].startswith("superiority"))
    assert 0 < first["bound"] < first["value"]
    gains = judgement["per_query"]["compliance@1"]
    mean = sum(a - b for a, b in zip(gains["candidate"], gains["incumbent"], strict=True))
    assert mean / judgement["queries"] == pytest.approx(first["value"], abs=1e-5)

    said = promote(road, "v1", fails=1)  # the weaker one, against the stronger
    assert "REJECT" in said
    assert "live: v2" in said

    _, deployments = step4_files(road, "live")
    live = max((d for d in deployments.values() if d["status"] == "promoted"), key=lambda d: d["deployed_at"])
    assert live["model_version"].startswith("strong-")

    said = registry(road, "rollback", "--reason=complaints")
    assert "rolled back from v2" in said
    assert "live: v1" in said
    _, deployments = step4_files(road, "after")
    assert "rolled_back" in {d["status"] for d in deployments.values()}

    said = registry(road, "verify")
    assert "as it was written" in said
    said = registry(road, "history")
    assert [line.split()[3] for line in said.splitlines() if line[:4].strip().isdigit()] == [
        "register", "register", "promote", "promote", "judge", "rollback"
    ]  # fmt: skip
    assert "nothing of ours was live" in registry(road, "history", "--at=2020-01-01T00:00")
    assert "v1 was live" in registry(road, "history", "--at=2999-01-01T00:00")


def test_a_canary_finds_a_planted_drift_and_lets_a_plain_run_pass(road):
    size = ("--queries=150", "--candidates=40")
    plain, moved = road / "runs" / "plain", road / "runs" / "moved"
    launch("simulate_run", f"--output={plain}", "--seed=5", *size)
    launch("simulate_run", f"--output={moved}", "--seed=6", "--brightness_shift=0.3", *size)
    common = (f"--registry={road / 'registry'}", "--version=v2", "--actor=tester",
              f"--latencies={road / 'latencies.jsonl'}")  # fmt: skip
    (road / "latencies.jsonl").write_text('{"ms": 0.5}\n' * 500)
    launch("canary", f"--run={plain}", f"--output={road / 'canary' / 'plain'}", *common)
    launch("canary", f"--run={moved}", f"--output={road / 'canary' / 'moved'}", *common, fails=1)
    found = json.loads((road / "canary" / "moved" / "canary.json").read_text())
    worst = {check.get("feature") for check in found["checks"] if check["verdict"] == "critical"}
    assert "brightness" in worst


def test_a_registry_that_was_tampered_with_is_found_out(road, tmp_path):
    shutil.copytree(road / "registry", tmp_path / "registry")
    file = next((tmp_path / "registry" / "cotrr" / "versions").glob("*/weights.npz"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    said = registry(tmp_path, "verify", fails=1)
    assert "WRONG" in said
    assert "weights.npz" in said
