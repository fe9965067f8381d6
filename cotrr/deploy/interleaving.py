"""Team-draft interleaving (Radlinski, Kurup & Joachims 2008): two rankings shown as one, clicks decide."""

from collections.abc import Collection, Sequence
from typing import Final, Literal, NamedTuple

import numpy as np

from cotrr.data.splits import unit_hash

Team = Literal["baseline", "candidate"]
BASELINE: Final = "baseline"
CANDIDATE: Final = "candidate"


class Interleaved(NamedTuple):
    """What is shown, best first, and which team put it there."""

    ranking: tuple[str, ...]
    teams: tuple[Team, ...]


def coins(salt: str, request_id: str, count: int) -> np.ndarray:
    """[count] bool, whether the candidate picks first in each round: the same on every machine."""
    return unit_hash("team draft", [f"{i}/{request_id}" for i in range(count)], salt) < 0.5


def team_draft(
    baseline: Sequence[str], candidate: Sequence[str], salt: str, request_id: str, length: int | None = None
) -> Interleaved:
    """Interleaves two rankings up to `length` items (all of them where it is None).

    In each round a coin says which team picks first; a team picks its best item that is not there yet.
    A team whose items are all there leaves the rest to the other one.

    >>> team_draft(["a", "b", "c"], ["b", "d", "a"], "salt", "request 3")
    Interleaved(ranking=('b', 'a', 'c', 'd'), teams=('candidate', 'baseline', 'baseline', 'candidate'))
    """
    rankings: dict[Team, Sequence[str]] = {BASELINE: baseline, CANDIDATE: candidate}
    items = len({*baseline, *candidate})
    wanted = items if length is None else min(length, items)
    shown: dict[str, Team] = {}  # item → team
    for candidate_first in coins(salt, request_id, wanted):
        order: tuple[Team, Team] = (CANDIDATE, BASELINE) if candidate_first else (BASELINE, CANDIDATE)
        for team in order:
            pick = next((item for item in rankings[team] if item not in shown), None)
            if pick is not None and len(shown) < wanted:
                shown[pick] = team
    return Interleaved(tuple(shown), tuple(shown.values()))


def credit(interleaved: Interleaved, clicked: Collection[str]) -> float:
    """(candidate − baseline) / all of the clicked items, in [−1, 1]; 0 without a click on what was shown.

    >>> credit(Interleaved(("b", "a", "d"), ("candidate", "baseline", "candidate")), {"b", "d", "a"})
    0.3333333333333333
    """
    teams = [team for item, team in zip(*interleaved, strict=True) if item in clicked]
    won = teams.count(CANDIDATE)
    return (2 * won - len(teams)) / len(teams) if teams else 0.0
