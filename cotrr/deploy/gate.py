"""The promotion gate: a candidate against what is live, on one frozen test set, by intervals.

Every check passes, fails, or holds; what is missing or undecided holds.  All pass: PROMOTE.  Any
fails: REJECT.  Else HOLD, with how many more queries would decide it.
"""

from functools import partial
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pyarrow as pa
from scipy.special import ndtri
from scipy.stats import t

from cotrr import files
from cotrr.data import certificate, labels
from cotrr.data.lists import Lists, clusters
from cotrr.deploy.policy import Limit, Policy
from cotrr.deploy.registry import Draft, Event, Registry, State, Version
from cotrr.deploy.scorer import Scorer, of_list
from cotrr.errors import InputError
from cotrr.evaluate import acceptance, figures, intervals, probabilities, ranking, systems
from cotrr.evaluate.comparisons import holm
from cotrr.evaluate.figures import Engine, Figure, Ratio, mean
from cotrr.evaluate.ranking import System
from cotrr.ranker import artifact
from cotrr.ranker.artifact import Model, Scored

PASS, HOLD, FAIL = "pass", "hold", "fail"
POWER = 0.8  # with which the further queries that are asked for decide
LOWER_IS_BETTER = "conflict_rate"


class Check(NamedTuple):
    """One question of a policy, and what the evidence says."""

    check: str
    verdict: str  # pass, hold, fail
    why: str = ""
    value: float | None = None
    bound: float | None = None  # one-sided, at the policy's level
    threshold: float | None = None
    p: float | None = None  # that it holds; adjusted by Holm within its family
    more_queries: int | None = None  # that would decide it, were the value the truth


class Gain(NamedTuple):
    """A difference that must lie above a threshold: the mean of [Q] values, NaN where undefined."""

    check: str
    values: np.ndarray
    threshold: float


def verdict(checks: list[Check]) -> str:
    """PROMOTE where all checks pass, REJECT where any fails, HOLD otherwise.

    >>> verdict([Check("a", PASS), Check("b", HOLD)]), verdict([])
    ('HOLD', 'HOLD')
    """
    found = {check.verdict for check in checks}
    return "REJECT" if FAIL in found else "PROMOTE" if found == {PASS} else "HOLD"


def judge_gains(engine: Engine, gains: list[Gain], level: float) -> list[Check]:
    """A family of gains, each tested one-sided on units that are resampled whole; Holm adjusts.

    A gain passes where it is significantly above its threshold, and fails where it is significantly
    below.  Two tests must agree, for each errs where the other does not: bootstrap-t (Davison & Hinkley
    1997, 4.4.1), which knows skew, and Student's t on the units, which is steady where few of them move.
    """
    if not gains:
        return []
    found = engine.estimate([mean(gain.values, (-1, 1)) for gain in gains])
    factor = np.maximum(intervals.quantile(intervals.ascending(found.pivots), level), _student(found, level))
    lower = found.value - found.error * factor
    thresholds = np.array([gain.threshold for gain in gains])
    above, below = _p_values(found, thresholds)
    told = (found.units >= figures.FEWEST) & np.isfinite(above) & np.isfinite(below)
    above, below = np.where(told, above, 1.0), np.where(told, below, 1.0)
    above, below = holm(above), holm(below)
    alpha = 1 - level
    more = _more(found, thresholds, alpha / len(gains))
    checks = []
    for i, gain in enumerate(gains):
        if not told[i]:
            why = f"{found.units[i]} of at least {figures.FEWEST} {engine.unit_name}"
            checks.append(Check(gain.check, HOLD, why, _number(found.value[i]), None, gain.threshold))
            continue
        said = PASS if above[i] <= alpha else FAIL if below[i] <= alpha else HOLD
        checks.append(
            Check(
                gain.check, said,
                {PASS: "", FAIL: "decided: on the wrong side", HOLD: "not decided"}[said],
                float(found.value[i]), _number(lower[i]), gain.threshold, float(above[i]),
                more[i] if said == HOLD else None,
            )
        )  # fmt: skip
    return checks


def _p_values(found: figures.Estimates, thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[R] p-values of "not above" and of "not below" the thresholds; NaN where undefined.

    Where all units agree there is nothing to resample: were the truth on the other side, a share of
    the units as large as the distance would have to differ, and none of U does.
    """
    distance = found.value - thresholds
    none = found.error == 0
    reached = (distance / np.where(none, 1.0, found.error))[:, None]
    count = found.pivots.shape[1]
    share = lambda hit: (1 + hit.sum(axis=1)) / (count + 1)
    defined = np.where(np.isnan(found.pivots).any(axis=1), np.nan, 1.0)
    agreed = lambda by: (1 - np.clip(by, 0, 1)) ** found.units
    above = np.where(none, agreed(distance), share(found.pivots >= reached) * defined)
    below = np.where(none, agreed(-distance), share(found.pivots <= reached) * defined)
    student = partial(t.sf, df=np.maximum(found.units - 1, 1))
    return (np.maximum(above, np.where(none, 0.0, student(reached[:, 0]))),
            np.maximum(below, np.where(none, 0.0, student(-reached[:, 0]))))  # fmt: skip


def _student(found: figures.Estimates, level: float) -> np.ndarray:
    return t.ppf(level, np.maximum(found.units - 1, 1))


def _more(found: figures.Estimates, thresholds: np.ndarray, alpha: float) -> list[int | None]:
    """How many more queries would decide each, with POWER; None where the value is at its threshold."""
    distance = np.abs(found.value - thresholds)
    with np.errstate(divide="ignore", invalid="ignore"):
        needed = found.count * ((ndtri(1 - alpha) + ndtri(POWER)) * found.error / distance) ** 2
    return [int(np.ceil(n - c)) if np.isfinite(n) and n > c else None
            for n, c in zip(needed, found.count, strict=True)]  # fmt: skip


def gain_of(metric: str, candidate: np.ndarray, incumbent: np.ndarray, relative: float = 0.0) -> np.ndarray:
    """[Q] by how much the candidate is better, less `relative` of the incumbent's value.

    >>> gain_of("conflict_rate@1", np.array([0.0, 1.0]), np.array([1.0, 1.0]), relative=0.2)
    array([ 0.8, -0.2])
    """
    better = incumbent - candidate if metric.startswith(LOWER_IS_BETTER) else candidate - incumbent
    better = np.where(np.abs(better) < ranking.NOISE, 0.0, better)
    return better - relative * incumbent if relative else better


class Test(NamedTuple):
    """A frozen test set."""

    table: pa.Table
    lists: Lists  # its labelled queries
    label: str  # gold or silver
    passport: dict[str, Any]  # the data certificate


class Contest(NamedTuple):
    """What a policy is asked about."""

    candidate: Model
    scorer: Scorer  # the same, as it serves
    champion: Model | None  # None: nothing of ours is live, and the policy names a baseline
    table: pa.Table
    lists: Lists
    label: str
    passport: dict[str, Any]


def promote(
    registry: Registry,
    name: str,
    test: Test,
    policy: Policy,
    actor: str,
    experiment: dict[str, Any] | None = None,
    seed: int = 0,
    resamples: int = 10_000,
) -> tuple[Event, dict[str, Any]]:
    """Judges a version and logs the look; a PROMOTE makes it champion, if the champion is still the same.

    `experiment` is the verdict of an A/B test.  Returns the event and the judgement, which is kept as
    its evidence.  Raises InputError for a policy that was changed without a new name.
    """
    before = registry.state()
    version, champion = before.version(name), before.champion
    if version.label == champion:
        raise InputError(f"{version.label} is live already")
    _refuse_changed_policy(before, policy)
    contents, live = registry.contents(version), before.version(champion) if champion else None
    contest = Contest(
        artifact.assemble(contents),
        Scorer(contents),
        artifact.assemble(registry.contents(live)) if live and live.folder else None,
        *test,
    )
    judged = judge(contest, policy, seed, resamples)
    judgement: dict[str, Any] = {}

    def draft(state: State) -> Draft:
        checks = [*judged["checks"], *_log_checks(state, version, champion, policy, judged["test_set"]),
                  *_experiment_checks(policy, version, before, experiment)]  # fmt: skip
        judgement.update(judged, checks=[check._asdict() for check in checks], verdict=verdict(checks))
        judgement.update(
            candidate={"label": version.label, "model": version.model},
            incumbent={"label": champion, "model": before.version(champion).model if champion else "",
                       "system": judged["incumbent_system"]},
            policy=msgspec.to_builtins(policy), policy_hash=policy.digest,
        )  # fmt: skip
        grounds = {"judgement": judgement, "certificate": test.passport, "policy": judgement["policy"],
                   **({"experiment": experiment} if experiment else {})}  # fmt: skip
        return Draft(
            kind="promote" if judgement["verdict"] == "PROMOTE" else "judge",
            actor=actor,
            version=version.label,
            evidence={what: registry.put_evidence(value) for what, value in grounds.items()},
            facts={"verdict": judgement["verdict"], "test_set": judged["test_set"],
                   "policy": policy.name, "policy_hash": policy.digest},
        )  # fmt: skip

    return registry.append(draft), judgement


def looks(state: State, test_set: str) -> int:
    """How often a test set has been looked at, whatever came of it."""
    return sum(event.facts.get("test_set") == test_set for event in state.events)


def _refuse_changed_policy(state: State, policy: Policy) -> None:
    for event in state.events:
        if event.facts.get("policy") == policy.name and event.facts.get("policy_hash") != policy.digest:
            raise InputError(
                f"policy {policy.name!r} said something else in event {event.number}",
                field="name",
                remedy="Give a changed policy a new name",
            )


def _log_checks(state: State, version: Version, champion: str, policy: Policy, test: str) -> list[Check]:
    """What the log must say, at the very place where the verdict is written."""
    same, used = state.champion == champion, looks(state, test)
    blocked = version.label in state.blocked
    return [
        Check("champion as judged", PASS if same else HOLD,
              "" if same else f"meanwhile {state.champion or 'nothing'} is live"),
        Check("fresh test set", PASS if used < policy.maximum_looks else HOLD,
              "" if used < policy.maximum_looks else "looked at too often: bring a fresh one",
              float(used + 1), None, float(policy.maximum_looks)),
        Check("no canary blocks it", HOLD if blocked else PASS,
              "its last canary was critical" if blocked else ""),
    ]  # fmt: skip


def _experiment_checks(
    policy: Policy, version: Version, state: State, experiment: dict[str, Any] | None
) -> list[Check]:
    """The verdict of an A/B test, which must have compared these two."""
    if experiment is None:
        return [Check("A/B test", HOLD, "none given")] if policy.experiment == "required" else []
    live = state.version(state.champion).model if state.champion else None
    other = [experiment.get("candidate_version") != version.model,
             live is not None and experiment.get("baseline_version") != live]  # fmt: skip
    said = {"promote": PASS, "rollback": FAIL}.get(str(experiment.get("verdict")), HOLD)
    if any(other):
        return [Check("A/B test", HOLD, "it compared other versions")]
    return [Check("A/B test", said, "" if said == PASS else f"verdict {experiment.get('verdict')!r}")]


def judge(contest: Contest, policy: Policy, seed: int, resamples: int) -> dict[str, Any]:
    """All checks of a policy that the data can answer, and the figures behind them."""
    lists = contest.lists
    unit = clusters(contest.table, lists, policy.cluster_by)
    engine = figures.engine(len(lists.query_id), seed, resamples, unit)
    scored = artifact.score(contest.candidate, lists)
    system, values = _incumbent(contest, policy)
    ours = ranking.per_query(scored.logit, lists)
    own = _figures(engine, contest, ours, scored)
    checks = [
        *_data_checks(contest, policy, engine),
        # Each must pass by itself, so none is adjusted for the others.
        *(
            check
            for gain in _superiority(policy, ours, values)
            for check in judge_gains(engine, [gain], policy.level)
        ),
        *judge_gains(engine, _non_inferiority(policy, ours, values, lists.domain), policy.level),
        *(judge_limit(limit, own.get(limit.figure)) for limit in policy.limits),
    ]
    named = sorted({part.metric for part in (*policy.superiority, *policy.non_inferiority, *policy.slices)})
    return {
        "checks": checks,
        "incumbent_system": system,
        "test_set": test_set(contest.table),
        "labels": contest.label,
        "queries": len(lists.query_id),
        "clusters": engine.draw.units,
        "certificate": files.digest(contest.passport),
        "figures": own,
        "incumbent_figures": _means(engine, values, ranking.METRICS),
        "gains": _means(engine, {m: gain_of(m, ours[m], values[m]) for m in named}, named, (-1, 1)),
        "per_query": {m: {"candidate": ours[m], "incumbent": values[m]} for m in named},
        "units": engine.unit,
        "seed": seed,
        "resamples": resamples,
    }


def test_set(table: pa.Table) -> str:
    """SHA-256 of a test set: its candidates and their labels, in any order."""
    columns = ("query_id", "id", "canonical_id", "label", "y")
    rows = zip(*(table[name].to_pylist() for name in columns), strict=True)
    return files.digest(sorted(map(list, rows), key=str))


def _incumbent(contest: Contest, policy: Policy) -> tuple[str, dict[str, np.ndarray]]:
    """What is live, in words, and its [Q] values by metric; NaN where it cannot be formed."""
    if contest.champion:
        logit = artifact.score(contest.champion, contest.lists).logit
        return contest.champion.version, ranking.per_query(logit, contest.lists)
    name = systems.BASELINES[policy.first_champion]
    ladder = {s.name: s for s in systems.ladder(contest.candidate, contest.lists)}
    system = ladder.get(name, System(name, "", None, "it is not in the data"))
    if system.scores is None:
        undefined = np.full(len(contest.lists.query_id), np.nan)
        return f"{name} ({system.why})", dict.fromkeys(ranking.METRICS, undefined)
    return name, ranking.per_query(system.scores, contest.lists)


def _data_checks(contest: Contest, policy: Policy, engine: Engine) -> list[Check]:
    """Whether the test set may decide anything."""
    models = {"candidate": contest.candidate, "champion": contest.champion}
    seen = [f"the {name} has learned from {what}" for name, model in models.items()
            if model and (what := artifact.learned_from(model, contest.table))]  # fmt: skip
    leaks = certificate.leaks(contest.passport) + seen
    gold, units = contest.label == labels.GOLD, engine.draw.units
    enough = units >= policy.minimum_clusters
    short = f"{units} of at least {policy.minimum_clusters}"
    return [
        Check("no leakage", FAIL if leaks else PASS, "; ".join(leaks)),
        Check("gold labels", PASS if gold else FAIL, "" if gold else f"labels are {contest.label}"),
        Check(f"enough {engine.unit_name}", PASS if enough else HOLD, "" if enough else short,
              float(units), None, float(policy.minimum_clusters),
              more_queries=None if enough else policy.minimum_clusters - units),
    ]  # fmt: skip


def _superiority(policy: Policy, ours: dict, theirs: dict) -> list[Gain]:
    return [
        Gain(f"superiority in {part.metric}" + (f" by {part.relative:.0%}" if part.relative else ""),
             gain_of(part.metric, ours[part.metric], theirs[part.metric], part.relative), part.above)
        for part in policy.superiority
    ]  # fmt: skip


def _non_inferiority(policy: Policy, ours: dict, theirs: dict, domain: np.ndarray) -> list[Gain]:
    apart = lambda part: gain_of(part.metric, ours[part.metric], theirs[part.metric])
    whole = [Gain(f"no loss in {part.metric}", apart(part), -part.margin) for part in policy.non_inferiority]
    inside = lambda part, name: np.where(domain == name, apart(part), np.nan)
    return whole + [
        Gain(f"no loss in {part.metric} in {name}", inside(part, name), -part.margin)
        for part in policy.slices
        for name in sorted(set(domain))
    ]


def judge_limit(limit: Limit, figure: Figure | None) -> Check:
    """A figure of the candidate against its limit, by the figure's own 95 % interval."""
    least = limit.at_least is not None
    threshold = limit.at_least if limit.at_least is not None else limit.at_most
    assert threshold is not None
    said = {"met": PASS, "not met": FAIL}.get(acceptance.judge(figure, threshold, least), HOLD)
    figure = figure or {"value": None, "ci": None, "why": "not measured"}
    why = "" if said == PASS else figure.get("why") or f"interval {figure['ci']}"
    bound = figure["ci"][0 if least else 1] if figure["ci"] else None
    sign = "≥" if least else "≤"
    return Check(f"{limit.figure} {sign} {threshold:g}", said, why, figure["value"], bound, threshold)


def _figures(engine: Engine, contest: Contest, ours: dict, scored: Scored) -> dict[str, Figure]:
    """The candidate's own figures by name."""
    conflict = probabilities.conflicts(engine, {"candidate": scored.p_conflict}, contest.lists)
    one = lambda q: contest.scorer.score(*of_list(contest.lists, q))
    return {
        **_means(engine, ours, ranking.METRICS),
        "conflict_auc": conflict["auc"],
        "conflict_ece": conflict["ece"],
        "coverage": probabilities.coverage(engine, scored.low, scored.high, contest.lists)["coverage"],
        "latency_p95_ms": systems.latency(one, contest.lists, "NumPy")["p95_ms"],
    }


def _means(
    engine: Engine, values: dict[str, np.ndarray], metrics: Any, bounds: tuple[float, float] = (0, 1)
) -> dict[str, Figure]:
    ratios: list[Ratio] = [mean(values[metric], bounds) for metric in metrics]
    return dict(zip(metrics, engine.figures(ratios), strict=True))


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
