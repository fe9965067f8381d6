"""The canary: is a run, or a version on it, still what was registered?  Almost all of it without labels.

Every check has one of four verdicts.  An alarm needs a size that matters and a change beyond chance;
what cannot be judged holds, and so does what is large but may be chance.  A one-sided error of
(1 − confidence) / 2 is shared by all drift checks, and another by those of latency.

A block is lifted by a run that is at least as new as every run that was critical, by the manifests'
`created_at`; a run without a manifest lifts none.  The log keeps each policy's hash: a changed policy
needs a new name.
"""

import datetime
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import numpy as np
from msgspec import Meta
from scipy import stats

from cotrr import files
from cotrr.data.contract import ATTRIBUTES, Share
from cotrr.data.lists import Lists
from cotrr.deploy import sketches
from cotrr.deploy.registry import Draft, Event, Registry, State, stamp
from cotrr.deploy.sketches import Feature, Part, Reference
from cotrr.ranker.calibrators import Scored

Verdict = Literal["pass", "warning", "hold", "critical"]
ORDER: tuple[Verdict, ...] = ("pass", "warning", "hold", "critical")  # the last one there is the status
TRIGGERS = ("overlay_update", "source_sync", "model_change", "scheduled")
STRONG = list(ATTRIBUTES).index("strong_conflicts")

Size = Annotated[float, Meta(gt=0, le=1e9)]
Count = Annotated[int, Meta(ge=1, le=10**9)]


class CanaryPolicy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Step 4's thresholds, and those of the checks that it does not have."""

    name: Annotated[str, Meta(pattern=r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")]
    description: str = ""
    mean_drop_warning: Share = 0.03  # of Compliance@1 on the probe
    mean_drop_critical: Share = 0.05
    tail_drop_threshold: Share = 0.05  # more queries at or below the baseline's lowest tenth: a warning
    confidence: Annotated[float, Meta(ge=0.8, lt=1)] = 0.95
    rolling_window: Count = 7  # earlier runs
    minimum_runs: Count = 3
    block_on_critical: bool = True
    roll_back_on_critical: bool = False
    minimum_queries: Count = 20
    minimum_domain_queries: Count = sketches.FEWEST
    drift_warning: Size = 0.2  # W1 in sd of the reference
    drift_critical: Size = 0.5
    divergence_warning: Share = 0.05  # Jensen–Shannon, bits
    divergence_critical: Share = 0.1
    missing_warning: Share = 0.05  # change of a missing rate; values that leave a constant
    missing_critical: Share = 0.2
    top_k: Count = 5
    overlap_warning: Share = 0.5  # of the first k with the champion's, less is an alarm
    overlap_critical: Share = 0.2
    conflict_warning: Share = 0.05  # rise of conflicts in the first k
    conflict_critical: Share = 0.1
    ties_warning: Share = 0.05  # share of queries
    ties_critical: Share = 0.2
    minimum_requests: Count = 300
    latency_budget_ms: Size = 1.0
    latency_share: Share = 0.05  # of requests may be above the budget
    latency_tail: Annotated[float, Meta(gt=0, lt=1)] = 0.01  # share of requests that may be slow:
    latency_tail_factor: Annotated[float, Meta(gt=1, le=1e9)] = 4.0  # times their own median, or beyond
    latency_growth: Annotated[float, Meta(ge=1, le=1e9)] = 1.5  # the baseline's tail, times this share

    def __post_init__(self) -> None:
        for name in ("mean_drop", "drift", "divergence", "missing", "conflict", "ties"):
            if getattr(self, f"{name}_warning") > getattr(self, f"{name}_critical"):
                raise ValueError(f"is above {name}_critical - at `$.{name}_warning`")
        if self.overlap_warning < self.overlap_critical:
            raise ValueError("is below overlap_critical - at `$.overlap_warning`")
        if self.minimum_runs > self.rolling_window:
            raise ValueError("is above rolling_window - at `$.minimum_runs`")

    @property
    def digest(self) -> str:
        """SHA-256 of what it says, defaults included."""
        return files.digest(msgspec.to_builtins(self))

    @property
    def tail(self) -> float:
        """The error on one side of an interval."""
        return (1 - self.confidence) / 2


class Check(NamedTuple):
    """One verdict, and what it rests on."""

    name: str
    verdict: Verdict
    value: float | None
    threshold: float | None  # where the alarm begins
    why: str = ""
    domain: str = ""  # "": over all
    feature: str = ""


class Probe(NamedTuple):
    """Compliance@1 of labelled queries, now and in earlier runs, the newest last."""

    now: dict[str, float]  # by query_id
    before: list[dict[str, float]]


class Seen(NamedTuple):
    """All that a canary looks at; None is what there is not."""

    lists: Lists
    scored: Scored  # by the version under test
    reference: Reference | None
    champion: Scored | None  # where another version is live
    latencies: np.ndarray | None  # [N] ms, of the version under test
    baseline_latencies: np.ndarray | None  # [M] ms, of what is live, at the same time
    probe: Probe | None


def judge(seen: Seen, policy: CanaryPolicy) -> list[Check]:
    """All checks."""
    queries, least = len(seen.lists.query_id), policy.minimum_queries
    checks = [Check("queries", "pass" if queries >= least else "hold", queries, least)]
    if seen.reference is None:
        checks.append(hold("drift", "the version has no reference"))
    else:
        checks += drift_checks(seen.reference, seen.lists, seen.scored, policy)
    checks += ranking_checks(seen.lists, seen.scored, seen.champion, policy)
    checks += latency_checks(seen.latencies, seen.baseline_latencies, policy)
    return checks + (probe_checks(seen.probe, policy) if seen.probe else [])


def status(checks: Iterable[Check]) -> Verdict:
    """Critical before hold, hold before warning: what is known to be wrong needs no more data."""
    return max((check.verdict for check in checks), key=ORDER.index, default="hold")


def grade(value: float, warning: float, critical: float, limit: float = 0.0) -> Verdict:
    """An alarm where a value is above what chance gives and at least of a size; NaN holds."""
    if not (np.isfinite(value) and np.isfinite(limit)):
        return "hold"
    if value <= limit or value < warning:
        return "pass"
    return "critical" if value >= critical else "warning"


def _graded(name: str, value: float, sizes: tuple[float, float], limit: float, why: str) -> Check:
    """A check of a value that is an alarm above what chance gives and from the first size on.

    Critical in size but not beyond chance holds.
    """
    verdict = grade(value, *sizes, limit)
    if verdict == "pass" and 0 < value >= sizes[1]:
        verdict, why = "hold", f"{why}: large, but not beyond chance"
    return Check(name, verdict, value, max(sizes[0], limit), why)


def drift_checks(reference: Reference, lists: Lists, scored: Scored, policy: CanaryPolicy) -> list[Check]:
    """Domains, fields, missing rates and distributions of every number, by domain and over all."""
    columns, domain = sketches.columns(lists, scored), lists.domain.astype(str)
    tests = 3 * sum(len(part.features) for part in reference.parts.values()) + len(reference.overall.features)
    level = 1 - policy.tail / tests
    checks = [Check("domain", "warning", float(np.mean(domain == new)), None, "not in the reference", new)
              for new in sorted(set(domain) - {*reference.domains})]  # fmt: skip
    for name, part in reference.parts.items():
        chosen = domain == name if name else np.ones(len(domain), bool)
        count, least = int(chosen.sum()), policy.minimum_domain_queries if name else policy.minimum_queries
        if name:
            checks.append(hold("domain", "lost: no query of it", name) if not count
                          else Check("domain", "pass", float(chosen.mean()), None, "", name))  # fmt: skip
        if min(count, part.queries) < least:
            why = f"{count} queries, and {part.queries} in the reference; at least {least} are needed"
            checks.append(hold("drift", why, name))
            continue
        if not name:
            checks += _field_checks(part, columns, level)
        for feature, sketch in part.features.items():
            values, where = columns[feature][chosen], lists.where[chosen]
            found = [_missing_check(sketch, part.queries, values, where, level, policy)]
            found += feature_checks(sketch, values, level, policy)
            checks += [check._replace(domain=name, feature=feature) for check in found]
    return checks


def _field_checks(part: Part, columns: Mapping[str, np.ndarray], level: float) -> list[Check]:
    """Attributes and embeddings that no candidate had then, or none of [Q, n] has now."""
    checks = []
    for name in sorted(part.features.keys() - {*sketches.SCORES}):
        known, there, queries = part.features[name].queries, ~np.isnan(columns[name]), len(columns[name])
        if not known and there.any():
            checks.append(Check("fields", "warning", None, None, "new: missing everywhere then", "", name))
        # Or none of those that had it is among the queries of now, were all of them shuffled.
        elif not there.any() and stats.hypergeom.pmf(0, part.queries + queries, known, queries) < 1 - level:
            checks.append(Check("fields", "critical", None, None, "vanished: missing everywhere", "", name))
    return checks or [Check("fields", "pass", None, None, "as they were")]


def feature_checks(feature: Feature, values: np.ndarray, level: float, policy: CanaryPolicy) -> list[Check]:
    """W1 and Jensen–Shannon of values [Q, n] (NaN: missing) against one sketch."""
    known = values[~np.isnan(values)]
    if not feature.candidates and not len(known):
        return [Check("drift", "pass", None, None, "missing, then as now")]
    if feature.sd == 0 and len(known):
        return [_constant_check(feature, values, level, policy)]
    found = sketches.drift(feature, values, level)
    if isinstance(found, str):
        return [hold("drift", found)]
    why = f"sd; mean {feature.mean:.4g} → {known.mean():.4g}; PSI {found.psi:.3f}"
    drift = _graded("drift", found.wasserstein, (policy.drift_warning, policy.drift_critical),
                    found.wasserstein_limit, why)  # fmt: skip
    limit, least = found.jensen_shannon_limit, policy.divergence_warning
    # No divergence is above 1 bit: where the limit is, none can be an alarm, and a smaller one must hold.
    sizes = least, least if limit >= 1 else policy.divergence_critical
    return [drift, _graded("divergence", found.jensen_shannon, sizes, limit, "bits")]


def _constant_check(feature: Feature, values: np.ndarray, level: float, policy: CanaryPolicy) -> Check:
    """Share of values [Q, n] other than the only one then; beyond chance by the queries that have them."""
    constant = feature.mean or 0.0
    there, other = ~np.isnan(values), np.abs(values - constant) > sketches.SAME * max(abs(constant), 1.0)
    share, queries = float(other.sum() / there.sum()), int(there.any(axis=1).sum())
    # P(none of them is among the reference's) if all queries were shuffled: Fisher's exact test.
    p = stats.hypergeom.pmf(0, feature.queries + queries, int(other.any(axis=1).sum()), feature.queries)
    why = f"share other than {constant:.4g}, the only value then; p = {p:.2g}"
    limit = share if p > 1 - level else 0.0
    return _graded("drift", share, (policy.missing_warning, policy.missing_critical), limit, why)


def _missing_check(
    feature: Feature, known: int, values: np.ndarray, where: np.ndarray, level: float, policy: CanaryPolicy
) -> Check:
    """Change of a missing rate against its spread between `known` queries then and those of now.

    A fall is no more than a warning.
    """
    share, sd = sketches.missing_share(values, where)
    change, queries = share - feature.missing, int(where.any(axis=1).sum())
    error = np.hypot(feature.missing_sd / np.sqrt(known), sd / np.sqrt(max(queries, 1)))
    limit = float(stats.t.isf((1 - level) / 2, max(min(known, queries) - 1, 1)) * error)
    sizes = policy.missing_warning, policy.missing_critical if change > 0 else np.inf
    why = f"{feature.missing:.3f} → {share:.3f}"
    return _graded("missing rate", abs(change), sizes, limit, why)


def ranking_checks(
    lists: Lists, scored: Scored, champion: Scored | None, policy: CanaryPolicy
) -> list[Check]:
    """Scores that are none, ties, lists of one; and the first k against the champion's, query by query.

    Where the version is the champion, or none is live, its first k are compared with those of the
    order in which the run came.
    """
    k, where = policy.top_k, lists.where
    broken = ~np.isfinite(np.stack([scored.score, scored.p_conflict, scored.logit])).all(axis=0) & where
    broken_share = float(broken.sum() / max(where.sum(), 1))
    ties, singles = tied(scored.logit, where, k), where.sum(axis=1) < 2
    sizes = policy.ties_warning, policy.ties_critical
    checks = [
        Check("finite scores", "critical" if broken_share else "pass", broken_share, 0.0,
              "share of the candidates without a finite score"),
        _graded("ties", _mean(ties), sizes, 0.0, f"share of the queries whose first {k} a tie decides"),
        _graded("single candidates", _mean(singles), sizes, 0.0, "share of the queries without a choice"),
    ]  # fmt: skip
    if broken_share:
        return [*checks, hold("conflicts", "scores are missing")]
    ours = first(scored.logit, where, k)
    if champion is None:
        came = np.broadcast_to(-np.arange(where.shape[1], dtype=float), where.shape)
        theirs, judged_by, name = first(came, where, k), scored.p_conflict, "the order as it came"
    elif not np.isfinite(champion.logit[where]).all():
        return [*checks, hold("overlap", "the champion has no finite scores")]
    else:
        theirs, judged_by, name = first(champion.logit, where, k), champion.p_conflict, "the champion"
        checks.append(_overlap_check(ours, theirs, where.sum(axis=1) > k, policy))
    strong = np.where(np.isnan(lists.attributes[..., STRONG]), np.nan, lists.attributes[..., STRONG] > 0)
    return checks + [
        _rise_check(label, _mean_in(ours, values) - _mean_in(theirs, values), name, policy)
        for label, values in ((f"strong conflicts@{k}", strong), (f"p_conflict@{k}", judged_by))
    ]


def first(scores: np.ndarray, where: np.ndarray, k: int) -> np.ndarray:
    """[Q, n] bool: the k candidates of the highest scores; equal ones in their original order."""
    order = np.argsort(np.where(where, -scores, np.inf), axis=1, kind="stable")
    return (np.argsort(order, axis=1) < k) & where


def tied(scores: np.ndarray, where: np.ndarray, k: int) -> np.ndarray:
    """[Q] bool: whether equal scores decide which candidate stands on which of the first k ranks."""
    ordered = np.sort(np.where(where, -scores, np.nan), axis=1)  # NaN last
    return (ordered[:, :-1] == ordered[:, 1:])[:, :k].any(axis=1)


def _overlap_check(ours: np.ndarray, theirs: np.ndarray, open_: np.ndarray, policy: CanaryPolicy) -> Check:
    """Mean share of the first k that two orders have in common, where a query has more than k."""
    share = ((ours & theirs).sum(axis=1) / np.maximum(ours.sum(axis=1), 1))[open_]
    if len(share) < policy.minimum_queries:
        return hold("overlap", f"{len(share)} queries have more than {policy.top_k} candidates")
    value, reach = _mean(share), _reach(share, policy.confidence)
    # What is not in common, turned round: an alarm begins where all of the interval is beyond a size.
    verdict = grade(1 - value - reach, 1 - policy.overlap_warning, 1 - policy.overlap_critical)
    why = f"of the first {policy.top_k} with the champion's, ± {reach:.3f}"
    return Check("overlap", verdict, value, policy.overlap_warning, why)


def _rise_check(name: str, rise: np.ndarray, than: str, policy: CanaryPolicy) -> Check:
    rise = rise[~np.isnan(rise)]
    if len(rise) < policy.minimum_queries:
        return hold(name, f"{len(rise)} queries have it")
    sizes, reach = (policy.conflict_warning, policy.conflict_critical), _reach(rise, policy.confidence)
    return _graded(name, _mean(rise), sizes, reach, f"rise over {than}, ± {reach:.3f}")


def latency_checks(
    latencies: np.ndarray | None, baseline: np.ndarray | None, policy: CanaryPolicy
) -> list[Check]:
    """Shares of requests above the budget, far above their own median, and above the baseline's tail.

    All tests are exact for independent requests.  Ranks as a whole would not do: a few requests that
    are much slower hardly move them.  The champion has no baseline: its tail is told by its own median.
    """
    if latencies is None:
        return [hold("latency", "not measured")]
    counts = [len(latencies)] + ([] if baseline is None else [len(baseline)])
    if min(counts) < policy.minimum_requests:
        return [hold("latency", f"{min(counts)} of at least {policy.minimum_requests} requests")]
    n, budget, median = counts[0], policy.latency_budget_ms, float(np.median(latencies))
    if not median:
        return [hold("latency", "half of the requests took no time at all: measure more finely")]
    checks = []
    for name, limit, share, what in (
        ("latency budget", budget, policy.latency_share, f"{budget:g} ms"),
        ("slow requests", policy.latency_tail_factor * median, policy.latency_tail,
         f"{policy.latency_tail_factor:g} × their median of {median:.3g} ms"),
    ):  # fmt: skip
        above = int((latencies > limit).sum())
        p = float(stats.binom.sf(above - 1, n, share))  # exact
        checks.append(_latency_check(name, above, n, share, p, what, policy))
    if baseline is not None:
        above, limit, p = exceedance(latencies, baseline, policy.latency_tail)
        share, what = policy.latency_tail * policy.latency_growth, f"the baseline's {limit:.3g} ms"
        checks.append(_latency_check("latency tail", above, n, share, p, what, policy))
    return checks


def _latency_check(
    name: str, above: int, requests: int, share: float, p: float, what: str, policy: CanaryPolicy
) -> Check:
    """Critical where a larger share than is tolerated is above a limit, beyond chance."""
    verdict: Verdict = "critical" if above > share * requests and p < policy.tail / 3 else "pass"
    return Check(name, verdict, above / requests, share, f"of {requests} requests above {what}, p = {p:.2g}")


def exceedance(latencies: np.ndarray, baseline: np.ndarray, tail: float) -> tuple[int, float, float]:
    """How many are above the baseline's own limit, the limit, and P(so many or more) without a change.

    The limit is the r-th largest of m: a new request is above it with a Beta(r, m − r + 1) probability,
    whatever the distribution, which makes the count beta-binomial (Gumbel & von Schelling 1950).
    """
    m = len(baseline)
    r = max(round(tail * m), 1)
    limit = float(np.sort(baseline)[m - r])
    above = int((latencies > limit).sum())
    return above, limit, float(stats.betabinom.sf(above - 1, len(latencies), r, m - r + 1))


def probe_checks(probe: Probe, policy: CanaryPolicy) -> list[Check]:
    """Compliance@1 of labelled queries against the rolling baseline: its mean, and its lower tenth.

    Query by query where all runs have all queries, else as independent samples.
    """
    names = "probe compliance@1", "probe tail"
    runs = probe.before[-policy.rolling_window :]
    if len(runs) < policy.minimum_runs:
        return [hold(name, f"{len(runs)} of at least {policy.minimum_runs} earlier runs") for name in names]
    if min(map(len, (probe.now, *runs))) < policy.minimum_queries:
        return [hold(name, f"fewer than {policy.minimum_queries} labelled queries") for name in names]
    paired = all(probe.now.keys() == run.keys() for run in runs)
    now, before = np.array([*probe.now.values()]), np.concatenate([[*run.values()] for run in runs])
    if paired:
        before = np.mean([[run[query] for query in probe.now] for run in runs], axis=0)
    low = np.quantile(before, 0.1, method="inverted_cdf")
    count = min(map(len, runs))  # runs of one probe are not independent

    def check(name: str, then: np.ndarray, now: np.ndarray, sizes: tuple[float, float], what: str) -> Check:
        apart = (then - now.astype(float),) if paired else (then, now)
        reach = np.hypot.reduce([_reach(part, policy.confidence, min(len(part), count)) for part in apart])
        change = f"{what} {_mean(then):.3f} → {_mean(now):.3f}, ± {reach:.3f}"
        return _graded(name, _mean(then) - _mean(now), sizes, float(reach), change)

    sizes = (policy.mean_drop_warning, policy.mean_drop_critical), (policy.tail_drop_threshold, np.inf)
    return [check(names[0], before, now, sizes[0], "mean"),
            check(names[1], before > low, now > low, sizes[1], f"share above {low:.3g}")]  # fmt: skip


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else np.nan


def _mean_in(chosen: np.ndarray, values: np.ndarray) -> np.ndarray:
    """[Q] means of values [Q, n] over the chosen candidates that have one; NaN where none has."""
    there = chosen & ~np.isnan(values)
    count = there.sum(axis=1)
    return np.where(count > 0, np.where(there, values, 0.0).sum(axis=1) / np.maximum(count, 1), np.nan)


def _reach(values: np.ndarray, confidence: float, count: int | None = None) -> float:
    """Half the width of Student's interval of a mean; `count` where fewer of them are independent."""
    count = len(values) if count is None else count
    if count < 2:
        return np.inf
    sd = np.std(values.astype(float), ddof=1)
    return float(stats.t.ppf((1 + confidence) / 2, count - 1) * sd / np.sqrt(count))


def hold(name: str, why: str, domain: str = "") -> Check:
    """A check that cannot be made."""
    return Check(name, "hold", None, None, why, domain)


def report(
    checks: Sequence[Check], policy: CanaryPolicy, trigger: str, probe: Probe | None, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """The result in the shape of Step 4's canary; `facts` say of which run and version."""
    found, runs = status(checks), len(probe.before[-policy.rolling_window :]) if probe else 0
    by_verdict = {verdict: sum(check.verdict == verdict for check in checks) for verdict in ORDER}
    blocks = found == "critical" and policy.block_on_critical
    return {
        **facts,
        "trigger": trigger,
        "status": found,
        "block": {"blocks": blocks, "rolls_back": found == "critical" and policy.roll_back_on_critical},
        "counts": by_verdict,
        "thresholds": msgspec.to_builtins(policy),
        "baseline": {"window": policy.rolling_window, "minimum": policy.minimum_runs, "runs": runs},
        "checks": [{k: v for k, v in check._asdict().items() if v != ""} for check in checks],
        "probe": probe.now if probe else None,
    }


def earlier_probes(registry: Registry, state: State, window: int, run: str = "") -> list[dict[str, float]]:
    """Compliance@1 by query in the last canaries of what was live then, newest last; no critical drops.

    Of each run the newest, and none of `run` itself: a run that is looked at twice is no two runs.
    """
    found, known = list[dict[str, float]](), {run}
    for event in reversed(state.events):
        probed = event.kind == "canary" and event.facts.get("probe", "") not in ("", "critical")
        name = str(event.facts.get("run", ""))
        if probed and event.champion in ("", event.version) and name not in known and len(found) < window:
            known.add(name)
            found.append(registry.evidence(event.evidence["canary"])["probe"])
    return found[::-1]


def run_time(manifest: Mapping[str, Any] | None) -> str:
    """When a run was made, as events write moments (UTC where it names no zone); "" where nothing tells."""
    try:
        made = datetime.datetime.fromisoformat(manifest["created_at"] if manifest else "")
        return stamp(made if made.tzinfo else made.replace(tzinfo=datetime.UTC))
    except (ValueError, OverflowError):
        return ""


def record(registry: Registry, label: str, result: Mapping[str, Any], actor: str, made: str = "") -> Event:
    """Logs a result about a run that was `made` when `run_time` says.

    Only a version that does better than hold, on a run that is new enough, gets rid of a block.
    """
    evidence = {"canary": registry.put_evidence(result)}
    probed = [Check(**check) for check in result["checks"] if check["name"].startswith("probe")]
    name, digest = result["thresholds"]["name"], files.digest(result["thresholds"])
    facts = {"verdict": result["status"], "run": result["run"], "run_made": made,
             "probe": status(probed) if probed else "", "policy": name, "policy_hash": digest}  # fmt: skip

    def draft(state: State) -> Draft:
        state.refuse_changed_policy(name, digest)
        lifts = result["status"] in ("pass", "warning") and made and made >= _blocked_by(state, label)
        blocks = result["block"]["blocks"] or (not lifts and label in state.blocked)
        return Draft(kind="canary", actor=actor, version=label, evidence=evidence,
                     facts=facts | {"blocks": blocks})  # fmt: skip

    return registry.append(draft)


def _blocked_by(state: State, label: str) -> str:
    """When the newest run was made that a version was critical on; none was made after its canary."""
    return max((min(str(event.facts.get("run_made", "")), event.at) for event in state.events
                if event.kind == "canary" and event.version == label
                and event.facts.get("verdict") == "critical"), default="")  # fmt: skip


def markdown(result: Mapping[str, Any]) -> str:
    """The result for people: what is not a pass, then how many of each check passed."""
    number = lambda value: "" if value is None else f"{value:.4g}"
    rows = [(c["verdict"], c["name"], c.get("feature", ""), c.get("domain", "all"), number(c["value"]),
             number(c["threshold"]), c.get("why", ""))
            for c in sorted(result["checks"], key=lambda c: -ORDER.index(c["verdict"]))
            if c["verdict"] != "pass"]  # fmt: skip
    counts = ", ".join(f"{count} {verdict}" for verdict, count in result["counts"].items())
    decision = [word for word, holds in result["block"].items() if holds]
    lines = [
        f"# Canary: {result['status']}",
        "",
        f"Version {result['version']} ({result['model']}) on {result['run']}; trigger {result['trigger']}.",
        f"{counts}." + (f" Decision: {', '.join(decision).replace('_', ' ')}." if decision else ""),
    ]
    if rows:
        head = ("verdict", "check", "feature", "domain", "value", "threshold", "why")
        cell = lambda text: str(text).replace("|", "\\|").replace("\n", " ")
        lines += ["", *("| " + " | ".join(map(cell, row)) + " |" for row in (head, ["---"] * 7, *rows))]
    return "\n".join([*lines, *(f"\nNote: {notice}" for notice in result.get("notices", []))]) + "\n"
