"""Tests of interleaving: a draft by hand, the same everywhere, and no team favoured."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cotrr.deploy import interleaving
from cotrr.deploy.interleaving import BASELINE, CANDIDATE, Interleaved

few = settings(max_examples=100, deadline=None, derandomize=True, database=None)
rankings = st.lists(st.sampled_from("abcdefgh"), unique=True, max_size=8)


def drafted(baseline, candidate, tosses, length=None):
    """The draft as the paper puts it: the smaller team picks, a toss decides between equal ones."""
    shown, team = [], {}
    tosses = iter(tosses)
    length = len({*baseline, *candidate}) if length is None else min(length, len({*baseline, *candidate}))
    while len(shown) < length:
        sizes = list(team.values()).count(BASELINE), list(team.values()).count(CANDIDATE)
        turn = CANDIDATE if sizes[1] < sizes[0] or (sizes[0] == sizes[1] and next(tosses)) else BASELINE
        left = [item for item in (candidate if turn == CANDIDATE else baseline) if item not in team]
        if not left:
            return None  # the paper does not say what happens then
        shown.append(left[0])
        team[left[0]] = turn
    return Interleaved(tuple(shown), tuple(team.values()))


def test_by_hand():
    tosses = interleaving.coins("salt", "request 3", 4)
    assert tosses[:2].tolist() == [True, False]
    found = interleaving.team_draft("abc", "bda", "salt", "request 3")
    assert found == (("b", "a", "c", "d"), (CANDIDATE, BASELINE, BASELINE, CANDIDATE))


@few
@given(rankings, rankings, st.none() | st.integers(0, 9), st.text("xyz", max_size=3))
def test_as_the_paper_puts_it(baseline, candidate, length, request_id):
    found = interleaving.team_draft(baseline, candidate, "salt", request_id, length)
    items = {*baseline, *candidate}
    assert len(found.ranking) == len(set(found.ranking)) == len(found.teams)
    assert set(found.ranking) <= items
    assert len(found.ranking) == (len(items) if length is None else min(length, len(items)))
    expected = drafted(baseline, candidate, interleaving.coins("salt", request_id, 20), length)
    assert expected is None or found == expected


def test_the_same_on_every_machine():
    tosses = interleaving.coins("salt", "request", 12)
    assert "".join("1" if toss else "0" for toss in tosses) == "000111010111"
    assert (interleaving.coins("salt", "a", 64) != interleaving.coins("pepper", "a", 64)).any()


def test_no_team_is_favoured():
    """Clicks that do not look at the teams give both the same, whatever the rankings."""
    rng = np.random.default_rng(0)
    baseline, candidate = list("abcdef"), list("fbgahc")
    scores = []
    for request in range(4000):
        shown = interleaving.team_draft(baseline, candidate, "salt", str(request), 5)
        clicked = {item for item in shown.ranking if rng.random() < 0.4}
        scores.append(interleaving.credit(shown, clicked))
    assert abs(np.mean(scores)) < 3 * np.std(scores) / np.sqrt(len(scores))


def test_a_better_ranking_wins():
    good, bad = list("abcdef"), list("fedcba")
    shown = [interleaving.team_draft(bad, good, "salt", str(request), 4) for request in range(200)]
    assert np.mean([interleaving.credit(one, {"a"}) for one in shown]) > 0.9


@pytest.mark.parametrize(
    ("clicked", "expected"),
    [((), 0), ("x", 0), ("a", 1), ("b", -1), ("ab", 0), ("ac", 1), ("abc", 1 / 3), ("abcx", 1 / 3)],
)
def test_credit(clicked, expected):
    shown = Interleaved(("a", "b", "c"), (CANDIDATE, BASELINE, CANDIDATE))
    assert interleaving.credit(shown, set(clicked)) == pytest.approx(expected)
