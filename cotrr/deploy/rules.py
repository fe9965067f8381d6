"""The rules of governance by name, and what a breach of one says."""

from collections.abc import Iterable
from typing import NamedTuple

from cotrr.data import certificate


class Rule(NamedTuple):
    """How a rule is read, and what to do about a breach."""

    reading: str
    remedy: str


RULES = {
    "certificate": Rule("files and run are those that the certificate was made of, and say what it says",
                        "Generate the dataset again"),
    "leakage": Rule("no canonical_id and no query_id is in two splits", "Generate the dataset again"),
    "near_duplicates": Rule(f"no pictures of two splits have a cosine above {certificate.NEAR_DUPLICATE}",
                            "Give near-identical pictures one canonical_id"),
    "label_leakage": Rule("no attribute alone determines y", "Take labels from reviewers, or leave it out"),
    "silver_labels": Rule("labels follow from their rows; the test split has gold ones, reports no others",
                          "Have reviewers judge the test split, and evaluate again"),
    "domain_cap": Rule("a run has at most so many sources by domain: field `source`, else the URL's host",
                       "Leave some of the sources to another run"),
    "photographers": Rule("a run has at least so many photographers by domain: field `photographer`",
                          "Add pictures by others, or have the lines name `photographer`"),
    "broken_urls": Rule("at most this share of the new pictures' URLs is broken: no such file (relative to "
                        "the run), or `http_status`, else `url_status`, outside 200-399; files outside of "
                        "the run's folder are not looked at",
                        "Remove these pictures, or have the lines state `http_status`"),
    "duplicates": Rule("at most this share of the new pictures is there under another canonical_id too: by "
                       "URL, or by image embedding", "Give one picture one canonical_id"),
    "missing_card": Rule("the model and each version have card.json and card.md",
                         "Register it with its report: python -m experiments.registry register"),
    "card_evidence": Rule("both cards are what the model, certificate.json and report.json beside them give",
                          "Register the model again, with its report"),
    "report_evidence": Rule("the point values of a report (ranking metrics, by domain too, and conflict AUC) "
                            "are those of the model's scores on the data that it names",
                            "Evaluate again: python -m experiments.evaluate, then register with its report"),
    "learned_from_test": Rule("the model has learned from no query or picture of the test split",
                              "Test it on data that it has not seen"),
    "broken_chain": Rule("every byte of the registry is as it was written", "Restore it from a copy"),
    "champion_evidence": Rule("what is live was promoted on a judgement PROMOTE of this very version, on "
                              "gold labels and data without leakage", "Roll back, or promote it by the gate"),
    "policy_changed": Rule("policies of one name, in the log and in the folder, say the same",
                           "Give the changed policy a new name"),
    "policy_unknown": Rule("the policy that what is live was promoted by is a file of the folder, defaults "
                           "included", "Promote it by one of these, or put the policy there after review"),
}  # fmt: skip
MEASURED = ("leakage", "near_duplicates", "label_leakage", "silver_labels")
OF_RUN = ("domain_cap", "photographers", "broken_urls", "duplicates")
OF_REPORT = ("silver_labels", "report_evidence")
OF_REGISTRY = ("broken_chain", "champion_evidence", "policy_changed", "policy_unknown")


class Breach(NamedTuple):
    """A rule that does not hold, or with `checked` False: of which nothing can be told."""

    rule: str
    where: str
    what: str
    checked: bool = True


def unchecked(rules: Iterable[str], where: str, why: str) -> list[Breach]:
    """That nothing can be told of rules."""
    return [Breach(rule, where, why, checked=False) for rule in rules]
