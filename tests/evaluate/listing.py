"""Lists and checks that the tests of the evaluation share."""

import functools
import json

import numpy as np

from cotrr.data.lists import Lists
from cotrr.evaluate import bootstrap
from cotrr.evaluate.figures import Engine


def make_lists(compliance, y=None, conflict=None, where=None, domain=None) -> Lists:
    """Lists of the given labels [Q, n]; what ranking does not read is empty."""
    compliance = np.asarray(compliance, np.float32)
    queries, n = compliance.shape
    where = np.ones((queries, n), bool) if where is None else where
    part = lambda values: np.where(where, compliance if values is None else values, np.nan)
    nothing = np.zeros((queries, n, 0), np.float32)
    return Lists(
        query_id=np.array([f"q{q}" for q in range(queries)], object),
        query=np.array([f"query {q}" for q in range(queries)], object),
        domain=np.array(["a"] * queries if domain is None else domain, object),
        constraints=((),) * queries,
        text=np.zeros((queries, 0), np.float32),
        image=nothing,
        attributes=nothing,
        y=part(y).astype(np.float32),
        compliance=part(None).astype(np.float32),
        conflict=part(conflict).astype(np.float32),
        dual_score=np.full((queries, n), np.nan, np.float32),
        gold=where,
        row=np.where(where, np.arange(queries * n).reshape(queries, n), -1),
        where=where,
    )


@functools.cache
def _counts(seed, resamples, units):
    return bootstrap.counts(np, seed, np.arange(resamples), units)


def counts_of(engine: Engine) -> np.ndarray:
    """[B, U] how often each resample of an engine draws each unit."""
    return _counts(engine.seed, engine.resamples, engine.draw.units)


def figures_of(report):
    """Every figure in a nested report."""
    if isinstance(report, dict) and "kind" in report:
        yield report
    elif isinstance(report, dict | list):
        for part in report.values() if isinstance(report, dict) else report:
            yield from figures_of(part)


def check_figures(report):
    """Fit for JSON, intervals in order, and no number missing without a reason."""
    json.dumps(report, allow_nan=False)
    for figure in figures_of(report):
        assert set(figure) >= {"value", "ci", "n", "kind"}
        assert ("why" in figure) == (figure["value"] is None or figure["ci"] is None), figure
        assert figure.get("why", "because")
        for low, high in filter(None, (figure["ci"], *figure.get("intervals", {}).values())):
            assert low <= high
