"""Views: who learns from what, and who is judged on what."""

import numpy as np
import pytest

from cotrr.errors import InputError
from cotrr.ranker.views import make_examples, make_views
from tests.ranker.runs import CONFIG, change, start
from tests.ranker.synthetic import assert_same_bits, development


def test_views_of_folds():
    data = development()
    data.lists.y[0, 0] = np.nan
    views = make_views(data.lists, data.canonical_id, data.validation, 3)
    labelled = data.lists.labelled
    assert views.train.shape == views.held_out.shape == (4, *labelled.shape)
    query = np.broadcast_to(data.lists.query_id[:, None], labelled.shape)
    for train, held_out in zip(views.train[:3], views.held_out[:3], strict=True):
        assert train.any() and held_out.any() and not (train & held_out).any()
        assert not (train & ~labelled).any() and not (held_out & ~labelled).any()
        assert not set(query[train]) & set(query[held_out])
        assert not set(data.canonical_id[train]) & set(data.canonical_id[held_out])
        # No more is lost than rows whose query or whose picture is in the fold.
        of_fold = np.isin(query, list(set(query[held_out]))) | np.isin(
            np.where(labelled, data.canonical_id, ""), list(set(data.canonical_id[held_out]))
        )
        assert not (labelled & ~train & ~held_out & ~of_fold).sum() > 0.2 * labelled.sum()
    assert views.held_out[:3].sum(axis=0).max() == 1
    assert (views.train[:3].sum(axis=0) >= 1)[labelled].all()
    np.testing.assert_array_equal(views.train[3], labelled)
    assert not views.held_out[3].any()


def test_the_view_without_folds_holds_out_the_validation_split():
    data = development()
    views = make_views(data.lists, data.canonical_id, data.validation, 0)
    np.testing.assert_array_equal(views.train, (data.lists.labelled & ~data.validation[:, None])[None])
    np.testing.assert_array_equal(views.held_out, (data.lists.labelled & data.validation[:, None])[None])


@pytest.mark.parametrize("folds", [0, 3])
def test_gold_alone_is_held_out_where_there_is_any(folds):
    data = development()
    gold = data.lists.where & (np.random.default_rng(0).uniform(size=data.lists.where.shape) < 0.5)
    data.lists.y[0:20:4, 1:3] = np.nan
    views_of = lambda gold: make_views(
        data.lists._replace(gold=gold), data.canonical_id, data.validation, folds
    )
    labelled, nothing = data.lists.labelled, np.zeros_like(gold)
    mixed, silver = views_of(gold), views_of(nothing)
    assert (gold & ~labelled).any() and (labelled & ~gold).any()
    judged = [view for view in silver.held_out if view.any()]
    assert len(judged) == (folds or 1)
    for view in judged:  # with both kinds in it, so that leaving out silver means something
        assert (view & gold).any() and (view & ~gold).any()
    np.testing.assert_array_equal(mixed.held_out, silver.held_out & gold)
    for k, view in enumerate(mixed.held_out):
        assert view.any() == silver.held_out[k].any() and not (view & ~gold).any()
    # Silver is learned from all the same, but for what the fold takes out.
    np.testing.assert_array_equal(mixed.train, silver.train)
    assert (mixed.train & ~gold).any()
    # Gold without a label is none.
    np.testing.assert_array_equal(views_of(gold & ~labelled).held_out, silver.held_out)
    np.testing.assert_array_equal(views_of(data.lists.where).held_out, silver.held_out)


def test_labels_are_scaled_inside_their_domain():
    data = development()
    lists = data.lists
    views = make_views(lists, data.canonical_id, data.validation, 2)
    scale = np.linspace(0.5, 2, 72).astype(np.float32).reshape(3, 24)
    examples = make_examples(lists, None, scale, views)
    assert examples.gap.shape == (3, 24, 8)
    for k in range(3):
        np.testing.assert_allclose(examples.gap[k], lists.y / scale[k, :, None])
    np.testing.assert_array_equal(examples.y, lists.y)
    np.testing.assert_array_equal(examples.conflict, lists.conflict)
    assert_same_bits((examples.train, examples.held_out), (views.train, views.held_out))


def test_nothing_to_learn_from_or_nothing_held_out():
    data = development()
    with pytest.raises(InputError, match="1 of 1 views have no labelled rows held out") as error:
        start(CONFIG, data._replace(validation=np.zeros(24, bool)))
    assert error.value.field == "y" and "--folds=5" in str(error.value)
    with pytest.raises(InputError, match="1 of 1 views have no labelled rows to learn from"):
        start(CONFIG, data._replace(validation=np.ones(24, bool)))
    with pytest.raises(InputError, match=r"\d+ of 50 views have no labelled rows held out.*fewer folds"):
        start(change(CONFIG, folds=50), data)
    few = data.lists._replace(y=np.full_like(data.lists.y, np.nan))
    few.y[0, 0] = 0.5
    with pytest.raises(InputError, match=r"\d of 3 views have no labelled rows to learn from.*fewer --folds"):
        start(change(CONFIG, folds=2), data._replace(lists=few))


def test_a_picture_of_one_query_goes_where_its_query_goes():
    data = development()
    alone = data._replace(canonical_id=np.array([[f"{q}/{i}" for i in range(8)] for q in range(24)], object))
    views = make_views(alone.lists, alone.canonical_id, alone.validation, 3)
    labelled = alone.lists.labelled
    np.testing.assert_array_equal(views.held_out[:3].sum(axis=0), labelled)  # every row is held out once
    for k in range(3):
        np.testing.assert_array_equal(views.train[k], labelled & ~views.held_out[k])
