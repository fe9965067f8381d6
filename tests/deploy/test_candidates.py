"""What a request may hold: what is good is taken as the reader takes it, what is bad is named."""

import collections
import math
import re
import types

import numpy as np
import pytest

from cotrr.data import runs
from cotrr.data.contract import ATTRIBUTES
from cotrr.data.lists import to_lists
from cotrr.deploy import candidates as requests
from cotrr.deploy.scorer import Query
from cotrr.errors import InputError
from tests.conftest import scored_line

DIM = 4
NOTHING = Query(np.zeros(0, np.float32), "default", ())
EMBEDDING = [0.5, -1.0, 2.0, 0.25]
GOOD = {"id": "p", "image_embedding": EMBEDDING, "brightness": 0.5}


def reason_of(candidate, query=NOTHING):
    """Why a candidate is bad; the good ones on both of its sides must not notice."""
    parsed = requests.parse([GOOD, candidate, GOOD], query, DIM)
    alone = requests.parse([GOOD], query, DIM)
    for part, single in zip(parsed[:2], alone[:2], strict=True):
        np.testing.assert_array_equal(part[[0, 2]], single[[0, 0]])
    assert set(parsed.reasons) <= {1}
    if parsed.reasons:
        assert np.isnan(parsed.image[1]).all()
        assert np.isnan(parsed.attributes[1]).all()
    return parsed.reasons.get(1)


def test_lines_become_what_the_reader_makes_of_them(write_run):
    bare = {"conflicts": ..., "brightness": 1, "clip_score": 0.125, "conflict_prob": ...}
    many = [{"type": "a", "severity": s, "confidence": 1} for s in ("soft", "strong", "soft")]
    lines = [scored_line(0, 0), scored_line(0, 1, **bare), scored_line(0, 2, conflicts=many),
             scored_line(0, 3, image_embedding=...), scored_line(0, 4, conflict_prob=...,
                                                                 conflict_probability=0.5)]  # fmt: skip
    lists = to_lists(runs.read_run(write_run(lines)).table)
    query = requests.parse_query(lines[0], DIM)
    parsed = requests.parse(lines, query, DIM)
    np.testing.assert_array_equal(query.text, lists.text[0])
    assert (query.domain, query.constraints) == (lists.domain[0], lists.constraints[0])
    np.testing.assert_array_equal(parsed.image, lists.image[0])
    np.testing.assert_array_equal(parsed.attributes, lists.attributes[0])
    assert not parsed.reasons
    assert parsed.attributes[4, list(ATTRIBUTES).index("conflict_prob")] == 0.5


def test_bounds_are_the_contracts():
    bounds = dict(zip(requests.NAMES, zip(requests.LOW, requests.HIGH, strict=True), strict=True))
    assert bounds["brightness"] == (0, 1)
    assert bounds["color_delta_e"] == (0, 1e6)
    assert bounds["clip_score"] == (-1e6, 1e6)
    assert bounds["strong_conflicts"] == (0, 1e6)


@pytest.mark.parametrize(
    ("candidate", "reason"),
    [
        (None, "not a mapping"),
        ("brightness", "not a mapping"),
        ([("brightness", 0.5)], "not a mapping"),
        ({**GOOD, "brightness": 1.5}, "brightness: expected `float` <= 1.0"),
        ({**GOOD, "brightness": -0.1}, "brightness"),
        ({**GOOD, "brightness": math.nan}, "brightness"),
        ({**GOOD, "brightness": math.inf}, "brightness"),
        ({**GOOD, "brightness": "0.5"}, "brightness: expected `float | null`, got `str`"),
        ({**GOOD, "brightness": True}, "brightness"),
        ({**GOOD, "brightness": [0.5]}, "brightness"),
        ({**GOOD, "clip_score": 1e300}, "clip_score"),
        ({**GOOD, "clip_score": 10**400}, "clip_score: number out of range"),
        ({**GOOD, "color_delta_e": np.float32(-1)}, "color_delta_e"),
        ({**GOOD, "conflict_prob": 0.1, "conflict_probability": 0.2}, "both spellings"),
        ({**GOOD, "conflicts": 3}, "conflicts"),
        ({**GOOD, "conflicts": [{"type": "a", "severity": "mild", "confidence": 1}]}, "severity"),
        ({**GOOD, "conflicts": [{"severity": "soft"}]}, "conflicts"),
        ({"image_embedding": EMBEDDING[:3]}, "image_embedding: 3 numbers where the model was trained on 4"),
        ({"image_embedding": [EMBEDDING]}, "image_embedding"),
        ({"image_embedding": [[1.0], [1.0, 2.0]]}, ""),
        ({"image_embedding": "abcd"}, "image_embedding: expected a list of numbers"),
        ({"image_embedding": ["1", "2", "3", "4"]}, "image_embedding: expected a list of numbers"),
        ({"image_embedding": [None, 1.0, 2.0, 3.0]}, "image_embedding: expected a list of numbers"),
        ({"image_embedding": {}}, "image_embedding: expected a list of numbers"),
        ({"image_embedding": [10**400, 1, 1, 1]}, "image_embedding"),
        ({"image_embedding": [0.0] * 4}, "image_embedding: not a finite vector"),
        ({"image_embedding": [1e39, 0, 0, 0]}, "image_embedding: not a finite vector"),
        ({"image_embedding": [1e7, 0, 0, 0]}, "image_embedding: not a finite vector"),
        ({"image_embedding": [math.nan, 1, 1, 1]}, "image_embedding: not a finite vector"),
        ({"image_embedding": [math.inf, 1, 1, 1]}, "image_embedding: not a finite vector"),
    ],
)  # fmt: skip
def test_a_bad_candidate_is_named_and_stops_no_other(candidate, reason):
    assert re.search(reason, reason_of(candidate))


class Angry(dict):
    """A mapping that fails when it is read."""

    def get(self, *_):
        raise RuntimeError("no")


def test_a_mapping_that_fails_is_its_candidates_problem():
    assert reason_of(Angry()) == "cannot be read: RuntimeError"


@pytest.mark.parametrize(
    "candidate",
    [
        {},
        {"unknown": object(), "review": "whatever"},
        {**GOOD, "brightness": 1},
        {**GOOD, "brightness": np.float32(0.25), "contrast": np.float64(0.5), "clip_score": np.int64(3)},
        {**GOOD, "brightness": None, "conflicts": None, "image_embedding": None},
        {**GOOD, "conflict_prob": 0.2, "conflict_probability": 0.2},
        types.MappingProxyType(GOOD),
        collections.ChainMap(GOOD, {"contrast": 0.5}),
        {"image_embedding": np.array(EMBEDDING, np.float16)},
        {"image_embedding": tuple(EMBEDDING)},
        {"image_embedding": [1, 2, 3, 4]},
        {"image_embedding": np.full(4, np.nan)},
    ],
)
def test_what_is_good_is_taken(candidate):
    assert reason_of(candidate) is None


def test_a_missing_clip_score_is_the_cosine_if_there_are_two_embeddings():
    at = requests.NAMES.index("clip_score")
    query = requests.parse_query({"text_embedding": [1.0, 0, 0, 0]}, DIM)
    some = [{"image_embedding": [1.0, 1, 0, 0]}, {"image_embedding": [1.0, 1, 0, 0], "clip_score": 9}, {}]
    found = requests.parse(some, query, DIM).attributes[:, at]
    np.testing.assert_allclose(found, [math.sqrt(0.5), 9, np.nan], rtol=1e-6)
    assert np.isnan(requests.parse(some, NOTHING, DIM).attributes[0, at])


def test_a_model_without_embeddings_looks_at_none():
    parsed = requests.parse([{"image_embedding": "whatever"}], requests.parse_query({}, 0), 0)
    assert parsed.image.shape == (1, 0)
    assert not parsed.reasons


@pytest.mark.parametrize(
    ("query", "field"),
    [
        (None, "not a mapping"),
        ([], "not a mapping"),
        ({"domain": ""}, "domain"),
        ({"domain": 3}, "domain"),
        ({"constraints": "pink"}, "constraints"),
        ({"constraints": ["pink"]}, "constraints"),
        ({"constraints": {"n": 10**5000}}, "limit"),
        ({"text_embedding": [1.0, 2.0]}, "text_embedding: 2 numbers"),
        ({"text_embedding": [0.0] * 4}, "text_embedding"),
        ({"text_embedding": [math.inf, 0, 0, 0]}, "text_embedding"),
        ({"text_embedding": "abcd"}, "text_embedding"),
    ],
)
def test_a_bad_query_is_named(query, field):
    with pytest.raises(InputError, match=field):
        requests.parse_query(query, DIM)


@pytest.mark.parametrize("text", [None, [], np.full(4, np.nan, np.float32), ...])
def test_a_query_without_text_is_one(text):
    query = {"domain": "d", "constraints": {"color": ["red", "pink"]}, "text_embedding": text}
    found = requests.parse_query({k: v for k, v in query.items() if v is not ...}, DIM)
    assert (len(found.text), found.domain, found.constraints) == (0, "d", ("color=pink", "color=red"))


class TestArrays:
    def arrays(self, n=3):
        return np.tile(np.float32(EMBEDDING), (n, 1)), np.full((n, len(ATTRIBUTES)), 0.5, np.float32)

    def test_bad_rows_are_named(self):
        image, attributes = self.arrays(6)
        attributes[1, requests.NAMES.index("brightness")] = 2
        attributes[2, 0] = np.inf
        image[3, 2] = np.nan
        image[4] = np.nan
        image[5] = 0
        parsed = requests.parse_arrays(image, attributes, NOTHING, DIM)
        assert parsed.reasons == {
            1: "brightness: 2 is not within [0, 1]",
            2: "clip_score: inf is not within [-1e+06, 1e+06]",
            3: "image_embedding: not a finite vector of length 1e-06 to 1e+06",
            5: "image_embedding: not a finite vector of length 1e-06 to 1e+06",
        }
        assert np.isnan(parsed.attributes[[1, 2, 3, 5]]).all()
        assert attributes[1].any()  # what came is not written to
        np.testing.assert_array_equal(parsed.attributes[[0, 4]], attributes[[0, 4]])

    def test_no_images(self):
        _, attributes = self.arrays()
        for image in (np.zeros((3, 0)), np.full((3, DIM), np.nan)):
            parsed = requests.parse_arrays(image, attributes, NOTHING, DIM)
            assert parsed.image.shape == (3, DIM)
            assert not parsed.reasons

    @pytest.mark.parametrize(
        ("image", "attributes"),
        [((3, 4), (3, 17)), ((3, 4), (18,)), ((2, 4), (3, 18)), ((3, 5), (3, 18)), ((3,), (3, 18))],
    )
    def test_shapes_that_cannot_be_meant(self, image, attributes):
        with pytest.raises(InputError, match="shape"):
            requests.parse_arrays(np.zeros(image), np.zeros(attributes), NOTHING, DIM)

    def test_over_the_wire_and_back(self):
        image, attributes = self.arrays()
        attributes[0, 0] = np.nan
        query = {"domain": "d", "constraints": {"color": "pink"}, "text_embedding": np.float32(EMBEDDING)}
        body = requests.pack(query, image, attributes, top_m=2)
        head, numbers = requests.read_head(body)
        assert (head.candidates, head.top_m) == (3, 2)
        found = requests.unpack(head, numbers)
        np.testing.assert_array_equal(found.image, image)
        np.testing.assert_array_equal(found.attributes, attributes)
        np.testing.assert_array_equal(found.query.pop("text_embedding"), query.pop("text_embedding"))
        assert found.query == query

    def test_some_columns_in_any_order(self):
        head = requests.Head(2, ["contrast", "clip_score"])
        found = requests.unpack(head, np.array([[0.1, 0.2], [0.3, 0.4]], "<f4").tobytes())
        names = [requests.NAMES.index(name) for name in head.attributes]
        np.testing.assert_allclose(found.attributes[:, names], [[0.1, 0.2], [0.3, 0.4]], rtol=1e-6)
        assert np.isnan(found.attributes).sum() == 2 * 16
        assert found.image.shape == (2, 0)

    @pytest.mark.parametrize(
        ("head", "message"),
        [
            (requests.Head(2, ["contrast"], 1), "8 bytes of numbers where the head makes it 16"),
            (requests.Head(2, ["y"]), "unknown"),
            (requests.Head(1, ["contrast", "contrast"]), "twice"),
        ],
    )
    def test_a_head_that_does_not_fit(self, head, message):
        with pytest.raises(InputError, match=message):
            requests.unpack(head, np.zeros(2, "<f4").tobytes())

    def test_no_head(self):
        for body in (b"", b"{}", b'{"candidates": -1}\n', b'{"candidates": 1e9}\n', b"\xff\n", b"[]\n"):
            with pytest.raises(ValueError):  # noqa: PT011
                requests.read_head(body)
