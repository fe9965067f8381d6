r"""The whole road in one go: simulate (or take a real run), generate, train, evaluate, rerank.

python -m experiments.demo                      # a simulated run, known truth
python -m experiments.demo --input=runs/latest  # a run of your own
"""

import json
import pathlib
import subprocess
import sys
import time

import numpy as np
from absl import flags

from cotrr.config import launch
from cotrr.data import dataset
from cotrr.data.lists import to_lists
from cotrr.evaluate.ranking import per_query
from cotrr.evaluate.report import figure_text
from experiments.terminal import done, say

FLAGS = flags.FLAGS
RECIPE = pathlib.Path(__file__).parent / "recipes" / "cotrr_lite.flags"


def define_flags() -> None:
    """Flags of this launcher."""
    flags.DEFINE_string("workdir", "checkpoints/demo", "Folder for everything that the demo writes.")
    flags.DEFINE_string("input", None, "A run to use instead of a simulated one.")
    flags.DEFINE_list("fractions", ["0.5", "0", "0.5"], "Shares of train, validation, test.")
    flags.DEFINE_bool("quick", False, "Small sizes everywhere, to see that it works.")


def main() -> None:
    """Runs the launchers one after another, each as its own command."""
    work, start = pathlib.Path(FLAGS.workdir), time.monotonic()
    data, model, report = work / "data", work / "model", work / "report"
    quick = ["--quick"] if FLAGS.quick else []
    source = FLAGS.input or str(work / "runs" / "simulated")
    if not FLAGS.input:
        size = ["--queries=60", "--candidates=40"] if FLAGS.quick else ["--queries=400"]
        step("simulate_run", f"--output={source}", "--overwrite", *size)
    step("generate_training_data", f"--input={source}", f"--output={data}",
         f"--fractions={','.join(FLAGS.fractions)}")  # fmt: skip
    step("train", f"--data={data}", f"--workdir={model}", f"--flagfile={RECIPE}", "--overwrite", *quick)
    step("evaluate", f"--model={model}", f"--data={data}", f"--output={report}", *quick)
    step("rerank", f"--model={model}", f"--input={source}", f"--output={work / 'reranked.jsonl'}",
         "--top_m=0")  # fmt: skip
    say()
    if not FLAGS.input:
        truth(pathlib.Path(source), data, report)
    for row in json.loads((report / "report.json").read_text())["acceptance"]:
        say(f"  {row['verdict']:<12} {row['criterion']:<38} {figure_text(row['figure'], row['unit'])}")
    done(
        {"time": f"{time.monotonic() - start:.0f} s", "report": report / "report.html",
         "reranked": work / "reranked.jsonl",
         "tensorboard": f"tensorboard --logdir={model / 'tensorboard'}"},
        [f"open {report / 'report.html'} in a browser"],
    )  # fmt: skip


def step(launcher: str, *arguments: str) -> None:
    """Runs one launcher and stops the demo where it fails."""
    say(f"\n$ python -m experiments.{launcher} {' '.join(arguments)}")
    status = subprocess.run([sys.executable, "-m", f"experiments.{launcher}", *arguments]).returncode
    if status:
        sys.exit(status)


def truth(run: pathlib.Path, data: pathlib.Path, report: pathlib.Path) -> None:
    """What could have been reached on the very same lists: the simulated run knows."""
    table, best = dataset.read(data, "test"), {}
    lists = to_lists(table)
    known = [json.loads(line) for line in (run / "truth.jsonl").read_text().splitlines()]
    compliance = {(line["query_id"], line["id"]): line["compliance"] for line in known}
    keys = zip(table["query_id"].to_pylist(), table["id"].to_pylist(), strict=True)
    noise_free = np.array([compliance[key] for key in keys])[lists.row]
    for name, scores in {"the reviewer's own order": lists.compliance, "the truth": noise_free}.items():
        best[name] = {m: np.nanmean(v) for m, v in per_query(scores, lists).items()}
    reached = json.loads((report / "report.json").read_text())["metrics"]
    best["+Reranker"] = {metric: figure["value"] for metric, figure in reached.items()}
    say("What is reachable on the test lists, by the reviewer's labels:")
    for name, metrics in best.items():
        regret = best["the truth"]["compliance@1"] - metrics["compliance@1"]
        say(f"  {name:<26} C@1 {metrics['compliance@1']:.3f}  nDCG@10 {metrics['ndcg@10']:.3f}"
            + (f"  regret in C@1 {regret:.3f}" if name == "+Reranker" else ""))  # fmt: skip
    say()


if __name__ == "__main__":
    launch(main, define_flags)
