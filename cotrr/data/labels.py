"""Labels: y = λ · compliance + (1 − λ) · (1 − p_conflict), gold from reviewers, else silver."""

from typing import NamedTuple

import numpy as np
import pyarrow as pa

from cotrr.errors import InputError

GOLD, SILVER = "gold", "silver"


class Labels(NamedTuple):
    """Labels of N rows; NaN (and kind None) where a row has neither a review nor Step 4's scores."""

    y: np.ndarray  # [N] float64 in [0, 1]
    compliance: np.ndarray  # [N] float64 in [0, 1]
    conflict: np.ndarray  # [N] float64: 0 or 1 where gold, a probability where silver
    kind: np.ndarray  # [N] object: "gold", "silver" or None


def numbers(table: pa.Table, name: str) -> np.ndarray:
    """[N] float64 of a numeric column; NaN where a value is missing."""
    return table[name].cast(pa.float64()).to_numpy(zero_copy_only=False)


def label(table: pa.Table, compliance_weight: float) -> Labels:
    """The labels of a table of candidates; `compliance_weight` is λ in [0, 1].

    A review gives a gold label.  Without one, `compliance_score` and `conflict_prob` give a silver
    label: a function of features, allowed for training, flagged, never evaluated beside gold.
    """
    if not 0 <= compliance_weight <= 1:
        raise InputError(f"--compliance_weight={compliance_weight}: expected λ in [0, 1]")
    gold = [numbers(table, name) for name in ("review_compliance", "review_conflict")]
    silver = [numbers(table, name) for name in ("compliance_score", "conflict_prob")]
    is_gold = ~np.isnan(gold[0])
    compliance, conflict = (np.where(is_gold, g, s) for g, s in zip(gold, silver, strict=True))
    # At λ = 1 a missing conflict is no reason to leave a row unlabelled, nor at λ = 0 a compliance.
    term = lambda weight, value: weight * value if weight else np.zeros(len(value))
    y = term(compliance_weight, compliance) + term(1 - compliance_weight, 1 - conflict)
    unlabelled = np.isnan(y)
    kind = np.full(len(y), SILVER, object)
    kind[is_gold], kind[unlabelled] = GOLD, None
    return Labels(y, np.where(unlabelled, np.nan, compliance),
                  np.where(unlabelled, np.nan, conflict), kind)  # fmt: skip
