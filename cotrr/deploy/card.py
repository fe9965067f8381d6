"""The model card (Mitchell et al. 2019), as JSON and Markdown from the same evidence.

A pure function of the model, the data certificate and the evaluation report: whoever holds these can
build the card again, and see whether what it says follows from them.
"""

import collections
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jinja2

from cotrr import files
from cotrr.data import certificate as certificates
from cotrr.data.contract import ATTRIBUTES
from cotrr.data.labels import GOLD, SILVER
from cotrr.errors import InputError
from cotrr.evaluate import report as reports
from cotrr.evaluate.systems import BASELINES
from cotrr.ranker.artifact import Model, mask_of
from cotrr.ranker.lanes import names

FORMAT = 2  # another one wherever `build` or `markdown` says the same evidence differently
RULE = BASELINES["rule"]
HEADLINES = ("compliance@1", "ndcg@10")
INTENDED = (
    "Orders the candidate pictures that Step 4 retrieved and scored for one query, and gives each the "
    "label to expect, an interval, and a probability of a conflict."
)
NOT_INTENDED = (
    "Pictures whose embeddings come from another encoder than the one it was trained with.",
    "Decisions about people; nothing here was measured for that.",
    "Removing pictures without a person's look: a probability of a conflict is no verdict.",
)
Dict = Mapping[str, Any]


def build(model: Model, certificate: Dict, report: Dict | None = None) -> dict[str, Any]:
    """The card of a model, of data with this certificate and of what `evaluate` reported, as JSON.

    Raises InputError where the report is about another model.
    """
    if report and report["model"]["version"] != model.version:
        raise InputError(
            f"the report is about {report['model']['version']}, not {model.version}",
            field="model.version",
            remedy=f"Evaluate {model.version}: python -m experiments.evaluate --help",
        )
    evaluation = _evaluation(report) if report else None
    return files.finite({
        "format": FORMAT,
        "model": {"name": model.name, "version": model.version, "members": int(model.final.sum()),
                  "lanes": len(model.final)},
        "intended_use": {"for": INTENDED, "not_for": NOT_INTENDED},
        "inputs": _inputs(model),
        "training": _training(model),
        "data": _data(certificate),
        "evaluation": evaluation,
        "limits": _limits(model, certificate, report, evaluation),
        "evidence": {
            "certificate": files.digest(certificate),
            "trained_on_certificate": model.provenance.get("certificate"),
            "report": files.digest(report) if report else None,
            "evaluated_on_certificate": report["data"]["certificate"] if report else None,
        },
    })  # fmt: skip


def _inputs(model: Model) -> dict[str, Any]:
    """What the model looks at, and what it knows."""
    *attributes, embeddings = mask_of(model.config)
    length = lambda part: int(part.shape[-1]) if embeddings else 0
    return {
        "groups": list(names(model.config["groups"])),
        "without": list(names(model.config["without"])),
        "attributes": [name for name, seen in zip(ATTRIBUTES, attributes, strict=True) if seen],
        "embedding_lengths": {"image": length(model.statistics.image_mean),
                              "text": length(model.statistics.text_mean)},
        "domains": list(model.vocabulary.domains),
        "constraints": list(model.vocabulary.constraints),
    }  # fmt: skip


def _training(model: Model) -> dict[str, Any]:
    told = model.provenance
    return {
        "queries_learned_from": len(model.seen["query_id"]),
        "pictures_learned_from": len(model.seen["canonical_id"]),
        "labels": told.get("labels"),
        "calibrated_on": told.get("calibrated_on"),
        "calibrated_on_queries": model.calibration.queries,
        "calibrators": {head: choice.kind for head, choice in model.calibration.choices.items()},
        "configurations_looked_at": model.config.get("looked_at", 1),
        "best_epoch": told.get("best_epoch"),
        "validation_loss": told.get("validation_loss"),
        "settings": model.config,
    }


def _data(certificate: Dict) -> dict[str, Any]:
    settings = certificate["settings"]
    return {
        "input": certificate["input"].get("input"),
        "counts": certificate["counts"],
        "rows_dropped_by_split": certificate["rows_dropped"],
        "split_method": settings.get("split", {}).get("method"),
        "compliance_weight": settings.get("compliance_weight"),
        "labels": certificate["labels"],
        "overlap": certificate["overlap"],
        "near_duplicates": certificate["near_duplicates"]["pairs"],
        "label_leakage": [f"{name} ({how})" for name, how in certificate["label_leakage"].items()],
        "missing_everywhere": [name for name, share in certificate["missing"].items() if share == 1],
    }


def _evaluation(report: Dict) -> dict[str, Any]:
    """The report's figures, each with its interval, its n, and why anything is missing."""
    conflict, failures = _conflict(report), report["failures"]
    about = ("split", "label", "queries", "candidates")
    return {
        **{name: report["data"][name] for name in about},
        "resampled": report["bootstrap"]["unit"],
        "baseline": report["baseline"],
        "rule": RULE,
        "metrics": _figures(report["metrics"]),
        "over_baseline": _figures(report["deltas"].get(report["model_system"], {})),
        "over_rule": _figures(report["gains"].get(RULE, {})),
        "conflict": _figures({"AUC": conflict["auc"], "ECE": conflict["ece"]}),
        "intervals": {"nominal": report["uncertainty"]["nominal"]}
        | _figures({name: report["uncertainty"][name] for name in ("coverage", "width")}),
        "latency": _figures({k: v for k, v in report["latency"].items() if k.endswith("_ms")}),
        "acceptance": [row | {"figure": _figure(row["figure"])} for row in report["acceptance"]],
        "domains": {name: {"metrics": _figures(row["metrics"]), "over_baseline": _figures(row["deltas"])}
                    for name, row in report["slices"].items()},
        "failures": {"queries": failures["queries"], "with_regret": failures["with_regret"],
                     "reasons": [{name: row[name] for name in ("reason", "count", "share")}
                                 for row in failures["reasons"]]},
    }  # fmt: skip


def _conflict(report: Dict) -> dict[str, Any]:
    return report["conflict"]["systems"]["reranker"]


def _figures(found: Dict) -> dict[str, Any]:
    return {name: _figure(figure) for name, figure in found.items()}


def _figure(figure: Dict | None) -> dict[str, Any] | None:
    """A figure without the intervals that are not shown."""
    kept = ("value", "ci", "n", "kind", "why", "undefined")
    return {name: figure[name] for name in kept if name in figure} if figure else None


def _limits(model: Model, certificate: Dict, report: Dict | None, evaluation: Dict | None) -> list[str]:
    """What a user must be told: nothing but what follows from the evidence."""
    told = [*_limits_of_figures(model, report, evaluation)] if report and evaluation else []
    loud = [] if evaluation else ["It was NOT EVALUATED: there are no figures."]
    if evaluation and evaluation["label"] != GOLD:
        loud.append("Its figures rest on SILVER LABELS, Step 4's own scores: they say nothing about people.")
    if share := (model.provenance.get("labels") or {}).get(SILVER):
        loud.append(f"It LEARNED FROM SILVER LABELS, {share:.1%} of its data: functions of its own input.")
    loud += [f"Data: {breach}." for breach in certificates.breaches(dict(certificate))]
    if model.provenance.get("calibrated_on", GOLD) != GOLD:
        loud.append("Its scores and probabilities are calibrated on silver labels.")
    described = files.digest(certificate)
    if model.provenance.get("certificate") != described:
        loud.append("The data described here are not the data that it was trained on.")
    if report and report["data"]["certificate"] != described:
        loud.append("It was evaluated on other data than those described here.")
    if (looked_at := model.config.get("looked_at", 1)) > 1:
        loud.append(f"It was chosen from {looked_at} configurations on what they were validated on.")
    return list(dict.fromkeys([*loud, *told]))


def _limits_of_figures(model: Model, report: Dict, evaluation: Dict) -> Iterator[str]:
    yield from report["notices"]
    yield report["power"]["text"]
    for metric, figure in evaluation["over_rule"].items():
        if metric in HEADLINES and (ends := reports.interval(figure)) and ends[1] < 0:
            yield (f"It is WORSE than Step 4's own rule in {reports.metric_name(metric)}: "
                   f"{reports.figure_text(figure, 'points')}.")  # fmt: skip
    for row in evaluation["acceptance"]:
        if row["verdict"] != "met":
            yield f"{row['criterion']}: {row['verdict']}."
    held = evaluation["intervals"]
    if (ends := reports.interval(held["coverage"])) and not ends[0] <= held["nominal"] <= ends[1]:
        share = reports.figure_text(held["coverage"])
        yield f"Its intervals hold {share} of the labels, not the {held['nominal']:.0%} that they promise."
    if (_conflict(report).get("consistency") or {}).get("verdict") == "miscalibrated":
        yield "Its probabilities of a conflict are miscalibrated."
    if unknown := sorted(set(evaluation["domains"]) - set(model.vocabulary.domains)):
        yield f"It has learned nothing of these domains: {', '.join(unknown)}."
    yield from report["degenerate"]
    for what, count in collections.Counter(_missing(evaluation)).items():
        yield f"{count} figures are {what}."


def _missing(value: Any) -> Iterator[str]:
    """What is missing of each figure inside a value, and why."""
    if isinstance(value, Mapping) and "ci" in value:
        said = reports.parts(value)
        if value["value"] is None or value["ci"] is None:
            what = "undefined" if value["value"] is None else "without an interval"
            yield f"{what} ({said.why})" if said.why else what
    elif isinstance(value, Mapping | list):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _missing(part)


def markdown(card: Dict) -> str:
    """A card as GitHub-flavoured Markdown."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).with_name("templates")),
        finalize=reports.plain, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    for filter_ in (reports.figure_text, reports.metric_name, reports.facts, reports.number):
        environment.filters[filter_.__name__] = filter_
    text = environment.get_template("card.md.j2").render(card=card)
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"
