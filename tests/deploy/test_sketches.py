"""Sketches: distances by hand and against SciPy, and how far samples of one population may lie apart."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from scipy.stats import wasserstein_distance

from cotrr.data.contract import ATTRIBUTES
from cotrr.deploy import sketches
from cotrr.errors import InputError
from cotrr.ranker.calibrators import Scored
from tests.ranker.synthetic import development

NAMES = list(ATTRIBUTES)
SAMPLES = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=40).map(np.array)
SHARES = st.lists(st.floats(1e-6, 1.0), min_size=4, max_size=4).map(lambda s: np.array(s) / np.sum(s))


def population(queries, rng, n=10, pictures=200, shift=0.0):
    """Lists and scores whose numbers hang together by query and by picture; `shift` moves one of them."""
    lists = development(queries=queries, n=n, d=3, pictures=pictures, seed=int(rng.integers(2**31))).lists
    picture = np.unique(lists.image[..., 0], return_inverse=True)[1].reshape(lists.where.shape)
    draw = lambda *shape: rng.normal(size=(*shape, len(NAMES)))
    numbers = draw(queries, 1) + draw(picture.max() + 1)[picture] + draw(queries, n)
    numbers[..., NAMES.index("strong_conflicts")] = numbers[..., 0] + numbers[..., 1] > 3  # rare
    numbers[..., NAMES.index("soft_conflicts")] = 0.0
    numbers[..., NAMES.index("brightness")] += shift
    numbers = np.where(rng.uniform(size=numbers.shape) < 0.02, np.nan, numbers)
    score = np.where(lists.where, draw(queries, n)[..., 0] + draw(queries, 1)[..., 0], 0.0)
    risk = np.where(lists.where, 0.05 * draw(queries, n)[..., 0], 0.0)
    scored = Scored(score, score, score, score, risk, np.where(lists.where, score, -np.inf))
    return lists._replace(attributes=np.where(lists.where[..., None], numbers, np.nan)), scored


def read(lists, scored):
    return sketches.read(json.dumps(sketches.sketch(lists, scored)).encode())


@pytest.fixture(scope="module")
def made():
    lists, scored = population(60, np.random.default_rng(1))
    return lists, scored, read(lists, scored)


def test_wasserstein_by_hand():
    values = np.array([0.0, 1.0, 3.0])
    assert sketches.wasserstein(values, values + 2.5) == pytest.approx(2.5)
    assert sketches.wasserstein(np.zeros(2), np.array([0.0, 1.0])) == pytest.approx(0.5)


@given(SAMPLES, SAMPLES)
def test_wasserstein_is_scipys(first, second):
    assert sketches.wasserstein(first, second) == pytest.approx(wasserstein_distance(first, second), abs=1e-9)


@given(SHARES, SHARES)
def test_jensen_shannon_is_scipys_and_in_bits(p, q):
    found = sketches.jensen_shannon(p, q)
    assert 0 <= found <= 1
    # SciPy gives the root, and of equal shares the root of what rounding left.
    assert found == pytest.approx(np.nan_to_num(jensenshannon(p, q, base=2)) ** 2, abs=1e-9)
    assert sketches.jensen_shannon(np.array([1.0, 0.0]), np.array([0.0, 1.0])) == 1.0


def test_stability_index_by_hand_and_without_drift():
    p, q = np.array([0.5, 0.5]), np.array([0.2, 0.8])
    large = 10**9  # neither the half counts nor the correction matter
    assert sketches.stability_index(p, q, large, large) == pytest.approx(
        (0.5 - 0.2) * np.log(0.5 / 0.2) + (0.5 - 0.8) * np.log(0.5 / 0.8)
    )
    rng = np.random.default_rng(0)
    draw = lambda: rng.multinomial(200, np.full(10, 0.1)) / 200
    found = [sketches.stability_index(draw(), draw(), 200, 200) for _ in range(400)]
    assert np.mean(np.array(found) > 0.1) < 0.02 and min(found) == 0  # uncorrected: 36 %


def test_bins_keep_their_ends_and_what_lies_beyond():
    values = np.array([-5.0, 0.0, 1.0, 1.5, 9.0])
    np.testing.assert_allclose(sketches.bin_shares(values, np.array([0.0, 1.0])), [0.4, 0.2, 0.4])


def test_a_small_sample_is_kept_exactly_and_a_large_one_closely():
    assert sketches._quantiles(np.array([3.0, 1.0, 2.0]), 51).tolist() == [1, 2, 3]
    values = np.random.default_rng(0).normal(size=20_000)
    points = sketches._quantiles(values, sketches.POINTS)
    assert len(points) == sketches.POINTS and sketches.wasserstein(points, values) < 0.04
    assert sketches.wasserstein(points, values + 3) == pytest.approx(3, abs=0.01)


def test_a_sketch_tells_the_sample(made):
    lists, _, reference = made
    part, chosen = reference.domains["d1"], lists.domain == "d1"
    values = lists.attributes[chosen][..., NAMES.index("brightness")]
    found = part.features["brightness"]
    assert part.queries == chosen.sum() and {*reference.domains} == {"d0", "d1"}
    assert found.candidates == np.isfinite(values).sum()
    assert found.mean == pytest.approx(np.nanmean(values)) and found.sd == pytest.approx(np.nanstd(values))
    missing = np.isnan(values) & lists.where[chosen]
    assert found.missing == pytest.approx(missing.sum() / lists.where[chosen].sum())
    assert sum(found.shares) == pytest.approx(1)
    assert {*part.features} == {*ATTRIBUTES, *sketches.SCORES, *sketches.EMBEDDINGS}


def test_the_order_of_queries_and_padding_say_nothing(made):
    lists, scored, reference = made
    order = np.random.default_rng(2).permutation(len(lists.query_id))
    again = read(lists.take(order), Scored(*(part[order] for part in scored)))
    for name, feature in reference.overall.features.items():
        other = again.overall.features[name]
        assert (feature.points, feature.shares) == (other.points, other.shares)
        assert feature.missing == other.missing


def test_what_has_no_distance_says_why():
    lists, scored = population(12, np.random.default_rng(0))
    attributes = lists.attributes.copy()
    attributes[..., NAMES.index("contrast")] = np.nan
    attributes[..., NAMES.index("saturation")] = np.where(lists.where, 0.25, np.nan)
    attributes[3:, :, NAMES.index("brightness")] = np.nan
    features = read(lists._replace(attributes=attributes), scored).overall.features
    assert features["contrast"].why == "missing everywhere in the reference"
    assert features["saturation"].why == "constant in the reference" and features["saturation"].sd == 0
    assert features["brightness"].why == "3 of at least 5 queries have a value"
    for name in ("contrast", "saturation", "brightness"):
        assert sketches.drift(features[name], np.ones((9, 3)), 0.95) == features[name].why
    assert "0 of at least" in str(sketches.drift(features["rerank_score"], np.full((9, 3), np.nan), 0.95))


def test_the_limit_is_that_of_samples_of_queries_and_not_of_rows():
    """Of 200 new samples about 5 % are beyond the 95 % limit; rows taken as independent would give most."""
    rng, beyond, naive = np.random.default_rng(3), [], []
    for _ in range(10):
        reference = read(*population(40, rng, n=6))
        feature = reference.overall.features["color_delta_e"]
        for _ in range(20):
            lists, scored = population(40, rng, n=6)
            values = sketches.columns(lists, scored)["color_delta_e"]
            found = sketches.drift(feature, values, 0.95)
            beyond.append(found.wasserstein > found.wasserstein_limit)
            count = np.isfinite(values).sum()
            naive.append(found.wasserstein > 1.36 * np.sqrt(1 / count + 1 / feature.candidates))
    assert np.mean(beyond) < 0.06 and np.mean(naive) > 0.3


def test_a_limit_shrinks_with_queries_and_grows_with_the_level():
    null = sketches.Null(mean=1.0, sd=1.4, freedom=50.0)
    assert null.limit(50, 50, 0.99) > null.limit(50, 50, 0.95) > null.limit(50, 500, 0.95)
    exact = sketches.Null(mean=1.0, sd=np.sqrt(2), freedom=1e9)  # a squared normal
    assert exact.limit(2, 2, 0.95) == pytest.approx(1.959964**2, rel=1e-5)


def test_few_queries_that_make_up_the_spread_leave_few_degrees_of_freedom():
    assert sketches._freedom(np.r_[9.0, np.zeros(39)], 40) == pytest.approx(3)
    assert sketches._freedom(np.random.default_rng(0).normal(size=4000), 4000) == pytest.approx(4000, rel=0.1)


def test_pictures_are_known_by_their_embedding():
    lists = development(queries=6, d=3, pictures=9).lists
    picture = sketches._pictures(lists)
    same = (lists.image[:, :, None, None] == lists.image[None, None]).all(axis=-1)
    there = lists.where[:, :, None, None] & lists.where[None, None]
    np.testing.assert_array_equal((picture[:, :, None, None] == picture[None, None])[there], same[there])
    alone = sketches._pictures(lists._replace(image=lists.image[..., :0]))
    assert len(np.unique(alone)) == alone.size


def test_shoots_widen_the_limits_of_what_their_pictures_share():
    lists = development(queries=60, d=3, pictures=90).lists
    picture = np.unique(lists.image[..., 0], return_inverse=True)[1].reshape(lists.where.shape)
    shared = np.random.default_rng(0).normal(size=30)[picture // 3]
    attributes = lists.attributes.copy()
    attributes[..., NAMES.index("brightness")] = np.where(lists.where, shared, np.nan)
    lists, score = lists._replace(attributes=attributes), np.where(lists.where, 0.5, 0.0)
    ids = np.array([f"shoot{p // 3}" for p in picture[lists.where]], object)  # by row of the table
    mean = lambda *more: sketches.sketch(lists, Scored(*[score] * 6), *more)["overall"]["features"][
        "brightness"]["wasserstein"]["mean"]  # fmt: skip
    assert mean(ids) > 1.5 * mean()
    alone = np.arange(len(ids)).astype(str)
    assert mean(alone) < mean()


@given(st.binary(max_size=60) | st.recursive(st.none() | st.floats() | st.text(), st.lists).map(
    lambda value: json.dumps({"format": 1, "overall": value, "domains": {}}).encode()))  # fmt: skip
def test_garbage_only_raises_input_errors(content):
    with pytest.raises(InputError, match="reference"):
        sketches.read(content)


def test_another_format_is_refused(made):
    lists, scored, _ = made
    value = sketches.sketch(lists, scored) | {"format": 2}
    with pytest.raises(InputError, match="format 2"):
        sketches.read(json.dumps(value).encode())
