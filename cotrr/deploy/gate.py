"""The promotion gate: a candidate against what is live, on one frozen test set, by intervals.

Every check passes, fails, or holds; what is missing or undecided holds.  All pass: PROMOTE.  Any
fails: REJECT.  Else HOLD, with how many more queries would decide it.
"""

from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pyarrow as pa

from cotrr import files
from cotrr.data import certificate, labels
from cotrr.data.lists import Lists, clusters
from cotrr.data.splits import unit_hash
from cotrr.deploy import ab
from cotrr.deploy.checks import FAIL, HOLD, PASS, Check, Gain, gain_of, judge_gains, judge_limit, verdict
from cotrr.deploy.policy import Policy
from cotrr.deploy.registry import Draft, Event, Registry, State, Version
from cotrr.deploy.scorer import Scorer, of_list
from cotrr.errors import InputError
from cotrr.evaluate import figures, probabilities, ranking, systems
from cotrr.evaluate.figures import Engine, Figure, Ratio, mean
from cotrr.evaluate.ranking import System
from cotrr.ranker import artifact
from cotrr.ranker.artifact import Model, Scored

SKETCH = 64  # hashes that stand for a set of queries: a shared half is seen as 0.5 ± 0.06


class HeldOut(NamedTuple):
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
    test: HeldOut


def promote(
    registry: Registry,
    name: str,
    test: HeldOut,
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
    before.refuse_changed_policy(policy.name, policy.digest)
    told = ab.read_verdict(experiment) if experiment else None
    contents, live = registry.contents(version), before.version(champion) if champion else None
    contest = Contest(
        artifact.assemble(contents),
        Scorer(contents),
        artifact.assemble(registry.contents(live)) if live and live.folder else None,
        test,
    )
    judged = judge(contest, policy, seed, resamples) | {
        "candidate": {"label": version.label, "model": version.model},
        "incumbent": {"label": champion, "model": live.model if live else ""},
        "policy": msgspec.to_builtins(policy),
        "policy_hash": policy.digest,
    }
    judgement: dict[str, Any] = {}

    def draft(state: State) -> Draft:
        checks = [*judged["checks"], *_log_checks(state, version, champion, policy, judged["sketch"]),
                  *_experiment_checks(policy, version, before, told)]  # fmt: skip
        said = {"checks": [check._asdict() for check in checks], "verdict": verdict(checks)}
        judgement.update(judged | said)
        grounds = {"judgement": judgement, "certificate": test.passport, "policy": judged["policy"],
                   **({"experiment": experiment} if experiment else {})}  # fmt: skip
        return Draft(
            kind="promote" if said["verdict"] == "PROMOTE" else "judge",
            actor=actor,
            version=version.label,
            evidence={what: registry.put_evidence(value) for what, value in grounds.items()},
            facts={"verdict": said["verdict"], "queries": judged["sketch"],
                   "policy": policy.name, "policy_hash": policy.digest},
        )  # fmt: skip

    return registry.append(draft), judgement


def sketch(query_ids: Iterable[str]) -> list[int]:
    """The SKETCH smallest hashes of the distinct queries: enough to see how much two sets share."""
    hashes = unit_hash("test set", sorted(set(query_ids)), "sketch")
    return np.sort((hashes * 2**53).astype(np.int64))[:SKETCH].tolist()


def shared(one: Collection[int], other: Collection[int]) -> float:
    """Share of the queries of both sets that is in either's sketch (bottom-k MinHash, Broder 1997).

    >>> shared([1, 2, 3], [2, 3, 4])
    0.5
    """
    both = sorted({*one, *other})[:SKETCH]
    return sum(h in one and h in other for h in both) / max(len(both), 1)


def looks(state: State, queries: Collection[int]) -> int:
    """How often the gate has looked at a test set that shares half its queries, whatever came of it."""
    earlier = (event.facts.get("queries") for event in state.events)
    return sum(isinstance(past, list) and shared(past, queries) >= 0.5 for past in earlier)


def _log_checks(
    state: State, version: Version, champion: str, policy: Policy, queries: list[int]
) -> list[Check]:
    """What the log must say, at the very place where the verdict is written."""
    same, used = state.champion == champion, looks(state, queries)
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
    policy: Policy, version: Version, state: State, told: ab.Verdict | None
) -> list[Check]:
    """The verdict of an A/B test, which must have compared these two."""
    if told is None:
        return [Check("A/B test", HOLD, "none given")] if policy.experiment == "required" else []
    live = state.version(state.champion).model if state.champion else policy.first_champion
    if (told.candidate_version, told.baseline_version) != (version.model, live):
        return [Check("A/B test", HOLD, f"it compared {told.candidate_version} with {told.baseline_version}")]
    said = {"promote": PASS, "rollback": FAIL}.get(told.verdict, HOLD)
    return [Check("A/B test", said, "" if said == PASS else told.held or f"verdict {told.verdict!r}")]


def judge(contest: Contest, policy: Policy, seed: int, resamples: int) -> dict[str, Any]:
    """All checks of a policy that the data can answer, and the figures behind them."""
    lists = contest.test.lists
    unit = clusters(contest.test.table, lists, policy.cluster_by)
    engine = figures.engine(len(lists.query_id), seed, resamples, unit)
    scored = artifact.score(contest.candidate, lists)
    system, values = _incumbent(contest, policy)
    ours, served = ranking.per_query(scored.logit, lists), contest.candidate.vocabulary.domains
    own = _figures(engine, contest, ours, scored)
    checks = [
        *_data_checks(contest, policy, engine),
        # Each must pass by itself, so none is adjusted for the others.
        *(
            check
            for gain in _superiority(policy, ours, values)
            for check in judge_gains(engine, [gain], policy.level)
        ),
        *judge_gains(engine, _non_inferiority(policy, ours, values, lists.domain, served), policy.level),
        *(judge_limit(limit, own.get(limit.figure)) for limit in policy.limits),
    ]
    named = sorted({part.metric for part in (*policy.superiority, *policy.non_inferiority, *policy.slices)})
    return {
        "checks": checks,
        "incumbent_system": system,
        "sketch": sketch(contest.test.table["query_id"].to_pylist()),
        "labels": contest.test.label,
        "queries": len(lists.query_id),
        "clusters": engine.draw.units,
        "certificate": files.digest(contest.test.passport),
        "figures": own,
        "incumbent_figures": _means(engine, values, ranking.METRICS),
        "gains": _means(engine, {m: gain_of(m, ours[m], values[m]) for m in named}, named, (-1, 1)),
        "per_query": {m: {"candidate": ours[m], "incumbent": values[m]} for m in named},
        "units": engine.unit,
        "seed": seed,
        "resamples": resamples,
    }


def _incumbent(contest: Contest, policy: Policy) -> tuple[str, dict[str, np.ndarray]]:
    """What is live, in words, and its [Q] values by metric; NaN where it cannot be formed."""
    if contest.champion:
        logit = artifact.score(contest.champion, contest.test.lists).logit
        return contest.champion.version, ranking.per_query(logit, contest.test.lists)
    name = systems.BASELINES[policy.first_champion]
    ladder = {s.name: s for s in systems.ladder(contest.candidate, contest.test.lists)}
    system = ladder.get(name, System(name, "", None, "it is not in the data"))
    if system.scores is None:
        undefined = np.full(len(contest.test.lists.query_id), np.nan)
        return f"{name} ({system.why})", dict.fromkeys(ranking.METRICS, undefined)
    return name, ranking.per_query(system.scores, contest.test.lists)


def _data_checks(contest: Contest, policy: Policy, engine: Engine) -> list[Check]:
    """Whether the test set may decide anything."""
    models = {"candidate": contest.candidate, "champion": contest.champion}
    seen = [f"the {name} has learned from {what}" for name, model in models.items()
            if model and (what := artifact.learned_from(model.seen, contest.test.table))]  # fmt: skip
    leaks, unchecked = (
        certificate.leaks(contest.test.passport) + seen,
        certificate.unchecked(contest.test.passport),
    )
    gold, units, least = contest.test.label == labels.GOLD, engine.draw.units, policy.minimum_clusters
    enough, size = units >= least, len(contest.test.lists.query_id) / units
    return [
        Check("no leakage", FAIL if leaks else HOLD if unchecked else PASS, "; ".join(leaks or unchecked)),
        Check("gold labels", PASS if gold else FAIL, "" if gold else f"labels are {contest.test.label}"),
        Check(f"enough {engine.unit_name}", PASS if enough else HOLD,
              "" if enough else f"{units} of at least {least}", float(units), None, float(least),
              more_queries=None if enough else int(np.ceil((least - units) * size))),
    ]  # fmt: skip


def _superiority(policy: Policy, ours: dict, theirs: dict) -> list[Gain]:
    return [
        Gain(f"superiority in {part.metric}" + (f" by {part.relative:.0%}" if part.relative else ""),
             gain_of(part.metric, ours[part.metric], theirs[part.metric], part.relative), part.above)
        for part in policy.superiority
    ]  # fmt: skip


def _non_inferiority(
    policy: Policy, ours: dict, theirs: dict, domain: np.ndarray, served: Iterable[str]
) -> list[Gain]:
    apart = lambda part: gain_of(part.metric, ours[part.metric], theirs[part.metric])
    whole = [Gain(f"no loss in {part.metric}", apart(part), -part.margin) for part in policy.non_inferiority]
    # A domain that the candidate serves and the test set lacks is unchecked, and so holds.
    inside = lambda part, name: np.where(domain == name, apart(part), np.nan)
    return whole + [
        Gain(f"no loss in {part.metric} in {name}", inside(part, name), -part.margin)
        for part in policy.slices
        for name in sorted({*domain, *served})
    ]


def _figures(engine: Engine, contest: Contest, ours: dict, scored: Scored) -> dict[str, Figure]:
    """The candidate's own figures by name."""
    conflict = probabilities.conflicts(engine, {"candidate": scored.p_conflict}, contest.test.lists)
    one = lambda q: contest.scorer.score(*of_list(contest.test.lists, q))
    return {
        **_means(engine, ours, ranking.METRICS),
        "conflict_auc": conflict["auc"],
        "conflict_ece": conflict["ece"],
        "coverage": probabilities.coverage(engine, scored.low, scored.high, contest.test.lists)["coverage"],
        "latency_p95_ms": systems.latency(one, contest.test.lists, "NumPy")["p95_ms"],
    }


def _means(
    engine: Engine, values: dict[str, np.ndarray], metrics: Any, bounds: tuple[float, float] = (0, 1)
) -> dict[str, Figure]:
    ratios: list[Ratio] = [mean(values[metric], bounds) for metric in metrics]
    return dict(zip(metrics, engine.figures(ratios), strict=True))
