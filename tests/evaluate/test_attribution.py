"""Tests of the attributions: sums, brute force over all coalitions, and what an absent player is."""

import itertools
from math import factorial

import jax
import numpy as np
import pytest

from cotrr.evaluate import attribution
from cotrr.evaluate.attribution import explain, owen_game, shapley_weight
from cotrr.ranker import artifact, encoding, fitting, training
from cotrr.ranker.encoding import EMBEDDINGS
from cotrr.ranker.lanes import TrainConfig, make_lanes
from tests.ranker.synthetic import development, randomised

PAIRS = np.arange(6), np.zeros(6, int), np.arange(6) % 5 + 1  # query, first, second


def make_model(hidden=0, groups="clip,so,conflict", members=2, missing=False, without=""):
    """A model with random parameters on synthetic lists of few attributes."""
    data = development(d=3)
    kept = [
        encoding.NAMES.index(name)
        for name in ("clip_score", "subject_ratio", "compliance_score", "conflict_prob")
    ]
    attributes = np.full_like(data.lists.attributes, np.nan)
    attributes[..., kept] = data.lists.attributes[..., kept]
    if missing:  # so a missing-value indicator counts
        attributes[3, [2, 4], kept[1]] = np.nan
    data = data._replace(lists=data.lists._replace(attributes=attributes))
    config = TrainConfig(
        folds=2, members=members, hidden=hidden, groups=groups, without=without,
        image_components=2, text_components=2, bagging=1.0,
    )  # fmt: skip
    setup = fitting.set_up(data, config, lambda scores, y, *, where: scores.sum())
    state = jax.eval_shape(training.init_lanes, setup.train, make_lanes([config]))
    state = state._replace(best_params=randomised(state.params))
    return fitting.finish(setup, state, config, "model", {}), data.lists


def margins(model, lists, query, first, second, absent):
    """[K] margins of the scorer itself where the `absent` players are at their domain's training mean."""
    encoded = encoding.encode(lists, model.vocabulary)
    member = int(model.final.argmax())
    mean = np.asarray(model.statistics.mean)[member][np.asarray(encoded.domain)]
    blurred = lists.attributes.copy()
    for name in absent & set(encoding.NAMES):
        a = encoding.NAMES.index(name)
        blurred[..., a] = mean[:, None, a]
    image = lists.image
    if EMBEDDINGS in absent:
        image = np.broadcast_to(np.asarray(model.statistics.image_mean)[member], image.shape)
    logit = artifact.score(model, lists._replace(attributes=blurred, image=image)).logit
    return logit[query, first] - logit[query, second]


def brute_force(worth, players, groups=None):
    """Shapley values [K] by player over all orders; with groups only orders that keep them together."""
    total = {player: 0.0 for player in players}
    together = lambda order: len([g for g, _ in itertools.groupby(order, key=groups.get)])
    orders = [order for order in itertools.permutations(players)
              if groups is None or together(order) == len(set(groups.values()))]  # fmt: skip
    for order in orders:
        for i, player in enumerate(order):
            total[player] += (worth(frozenset(order[: i + 1])) - worth(frozenset(order[:i]))) / len(orders)
    return total


@pytest.fixture(scope="module", params=[0, 4], ids=["linear", "hidden"])
def game(request):
    """A model, what was explained, and the worth of each coalition by the scorer."""
    model, lists = make_model(request.param, members=1)
    found = explain(model, lists, *PAIRS)
    players = frozenset(found.attributes)
    worths = {}

    def worth(there):
        if there not in worths:
            worths[there] = margins(model, lists, *PAIRS, set(players - there))
        return worths[there]

    return request.param, found, worth


def test_attributes_add_up_to_groups_and_groups_to_the_margin(game):
    _, found, worth = game
    everyone = frozenset(found.attributes)
    nobody = worth(frozenset())
    np.testing.assert_allclose(nobody, 0, atol=1e-5)
    np.testing.assert_allclose(found.margin, worth(everyone), atol=1e-5)
    np.testing.assert_allclose(sum(found.groups.values()), found.margin, atol=1e-5)
    np.testing.assert_allclose(sum(found.attributes.values()), found.margin, atol=1e-5)
    assert np.abs(found.margin).max() > 0.1


def test_groups_have_the_shapley_values_of_the_game_between_groups(game):
    _, found, worth = game
    owner = encoding.ATTRIBUTES | {EMBEDDINGS: "clip"}
    inside = lambda there: frozenset(p for p in found.attributes if owner[p] in there)
    expected = brute_force(lambda there: worth(inside(there)), list(found.groups))
    for group, values in expected.items():
        np.testing.assert_allclose(found.groups[group], values, atol=1e-5)


def test_attributes_have_the_values_of_all_orders_that_keep_groups_together(game):
    hidden, found, worth = game
    owner = {p: (encoding.ATTRIBUTES | {EMBEDDINGS: "clip"})[p] for p in found.attributes}
    owen, plain = (brute_force(worth, list(owner), groups) for groups in (owner, None))
    for player in owner:
        np.testing.assert_allclose(found.attributes[player], owen[player], atol=1e-5)
    apart = max(np.abs(owen[player] - plain[player]).max() for player in owner)
    if hidden:
        assert apart > 1e-3  # so this test tells the two values apart
    else:
        assert apart < 1e-5  # without a hidden layer the plain Shapley values are the same


def test_players_are_what_the_model_uses_and_has_seen():
    model, lists = make_model(groups="so,conflict")
    found = explain(model, lists, *PAIRS)
    assert set(found.attributes) == {"subject_ratio", "compliance_score", "conflict_prob"}
    assert set(found.groups) == {"so", "conflict"}
    logit = artifact.score(model, lists).logit
    query, first, second = PAIRS
    np.testing.assert_allclose(found.margin, logit[query, first] - logit[query, second], atol=1e-5)


@pytest.mark.parametrize(
    ("without", "groups"),
    [
        ("conflict_prob", {"clip", "so"}),
        ("clip_score,subject_ratio", {"clip", "so", "conflict"}),
        ("embeddings", {"clip", "so", "conflict"}),
    ],
)
def test_what_the_model_was_trained_without_is_no_player(without, groups):
    model, lists = make_model(without=without)
    found = explain(model, lists, *PAIRS)
    everyone = {"clip_score", "subject_ratio", "compliance_score", "conflict_prob", EMBEDDINGS}
    assert set(found.attributes) == everyone - set(without.split(","))
    assert set(found.groups) == groups
    logit = artifact.score(model, lists).logit
    query, first, second = PAIRS
    np.testing.assert_allclose(found.margin, logit[query, first] - logit[query, second], atol=1e-5)
    np.testing.assert_allclose(sum(found.attributes.values()), found.margin, atol=1e-5)
    np.testing.assert_allclose(sum(found.groups.values()), found.margin, atol=1e-5)


def test_members_are_averaged_and_missing_values_belong_to_their_attribute():
    model, lists = make_model(members=3, missing=True)
    logit = artifact.score(model, lists).logit
    query, first, second = PAIRS
    found = explain(model, lists, *PAIRS)
    np.testing.assert_allclose(found.margin, logit[query, first] - logit[query, second], atol=1e-5)
    np.testing.assert_allclose(sum(found.attributes.values()), found.margin, atol=1e-5)


def test_a_candidate_against_itself_has_nothing_to_explain():
    model, lists = make_model()
    query, first, _ = PAIRS
    found = explain(model, lists, query, first, first)
    for values in (found.margin, *found.groups.values(), *found.attributes.values()):
        np.testing.assert_allclose(values, 0, atol=1e-6)


def test_weights_of_a_player_add_up_to_one():
    for players in range(1, 8):
        sizes = range(players)
        ways = [factorial(players - 1) // factorial(s) // factorial(players - 1 - s) for s in sizes]
        assert sum(w * shapley_weight(s, players) for s, w in zip(sizes, ways, strict=True)) == pytest.approx(
            1
        )


def test_an_additive_game_gives_each_player_its_own_worth():
    coalitions, weights = owen_game([[0, 3], [1], [2, 4]])
    own = np.array([1.0, -2.0, 0.5, 4.0, 0.0])
    np.testing.assert_allclose(weights @ (coalitions @ own), own, atol=1e-12)
    assert attribution.owen_game([[0]])[0].tolist() == [[False], [True]]
