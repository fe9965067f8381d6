"""The NumPy scorer says what the JAX model says, whatever is missing, and imports nothing of it."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

from cotrr.deploy import scorer as scorer_module
from cotrr.deploy.scorer import Query, Scorer, of_list
from cotrr.ranker import artifact, model_files
from tests.deploy.small import single_lane
from tests.ranker.test_artifact import LISTS, make_model

LARGEST = 1e-5


def both(model, folder):
    artifact.save(model, folder)
    return artifact.load(folder), Scorer(model_files.parse(model_files.read_files(folder), folder))


def largest_difference(model, scorer, lists):
    """Of the logits of every lane; and nothing that follows from them is far off either."""
    wanted = artifact.score(model, lists)
    for q, where in enumerate(lists.where):
        for ours, theirs in zip(scorer.score(*of_list(lists, q)), wanted, strict=True):
            np.testing.assert_allclose(ours, theirs[q][where], atol=LARGEST)
    return scorer_module.largest_difference(scorer, artifact.logits(model, lists), lists)


def holes(lists, share):
    """Lists of which a share of everything that may be missing is missing."""
    rng = np.random.default_rng(1)
    lost = lambda *shape: rng.random(shape) < share
    queries, n = lists.where.shape
    return lists._replace(
        attributes=np.where(lost(*lists.attributes.shape), np.nan, lists.attributes).astype(np.float32),
        image=np.where(lost(queries, n, 1), np.nan, lists.image).astype(np.float32),
        text=np.where(lost(queries, 1), np.nan, lists.text).astype(np.float32),
        domain=np.where(lost(queries), "never seen", lists.domain.astype(str)).astype(object),
        constraints=tuple((*w, "color=unheard", "odd=1") if gone else w
                          for w, gone in zip(lists.constraints, lost(queries), strict=True)),
    )  # fmt: skip


@pytest.fixture(scope="module", params=[0, 4], ids=["linear", "hidden"])
def pair(request, tmp_path_factory):
    return both(make_model(hidden=request.param), tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_it_scores_what_the_model_scores(pair, share):
    assert largest_difference(*pair, holes(LISTS, share)) < LARGEST


def test_a_run_without_any_embedding_is_scored_too(pair):
    model, scorer = pair
    bare = LISTS._replace(image=LISTS.image[..., :0], text=LISTS.text[..., :0])
    assert largest_difference(model, scorer, bare) < LARGEST


def test_a_model_that_learned_without_embeddings_ignores_them(tmp_path):
    bare = LISTS._replace(image=LISTS.image[..., :0], text=LISTS.text[..., :0])
    model, scorer = both(make_model(lists=bare), tmp_path)
    assert largest_difference(model, scorer, bare) < LARGEST
    assert largest_difference(model, scorer, LISTS._replace(text=bare.text, image=bare.image)) < LARGEST


@pytest.mark.parametrize("change", [{"groups": "so"}, {"without": "embeddings,conflict_prob,clip_score"}])
def test_what_is_masked_does_not_count(tmp_path, change):
    model = make_model()
    model = model._replace(config=model.config | change)
    assert largest_difference(*both(model, tmp_path), holes(LISTS, 0.2)) < LARGEST


def test_a_single_lane_has_no_spread(tmp_path):
    model = single_lane(make_model())
    assert largest_difference(*both(model, tmp_path), LISTS) < LARGEST


@pytest.mark.parametrize("hidden", [0, 4])
@pytest.mark.parametrize("views", [[0, 0, 1, 1], [0, 1, 1, 1], [2, 2, 2, 2]])
def test_lanes_may_share_statistics(tmp_path, views, hidden):
    model = make_model(hidden)
    shared = jax.tree.map(lambda part: part[np.array(views)], model.statistics)
    pair = both(model._replace(statistics=shared), tmp_path)
    assert largest_difference(*pair, holes(LISTS, 0.3)) < LARGEST


def test_a_query_scores_alike_whatever_other_threads_ask(pair, tmp_path):
    model, scorer = pair
    lists = holes(LISTS, 0.3)
    queries = [q for _ in range(20) for q in range(len(lists.where))]
    alone = [scorer.logits(*of_list(lists, q)) for q in queries]
    _, fresh = both(model, tmp_path)
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda q: fresh.logits(*of_list(lists, q)), queries))
    for ours, theirs in zip(together, alone, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_what_it_is_given_stays_as_it_was(pair):
    _, scorer = pair
    query, *arrays = of_list(holes(LISTS, 0.3), 3)
    for order in ("C", "F"):
        given = [np.array(array, np.float32, order=order) for array in arrays]
        for array in given:
            array.setflags(write=False)
        np.testing.assert_array_equal(scorer.logits(query, *given), scorer.logits(query, *arrays))


def test_one_candidate_and_none(pair):
    _, scorer = pair
    query = Query(LISTS.text[0], LISTS.domain[0], LISTS.constraints[0])
    for count in (0, 1):
        found = scorer.score(query, LISTS.image[0, :count], LISTS.attributes[0, :count])
        assert all(len(values) == count for values in found)


def test_a_candidate_is_scored_alike_in_any_company(pair):
    _, scorer = pair
    query = Query(LISTS.text[3], LISTS.domain[3], LISTS.constraints[3])
    image, attributes = LISTS.image[3], LISTS.attributes[3]
    whole = scorer.score(query, image, attributes).logit
    turned = scorer.score(query, image[::-1], attributes[::-1]).logit[::-1]
    np.testing.assert_allclose(whole, turned, atol=1e-5)


def test_it_needs_no_jax_and_no_scipy():
    code = (
        "import sys, cotrr.deploy.scorer;"
        "print(sorted({'jax', 'flax', 'scipy', 'pyarrow', 'absl'} & {m.split('.')[0] for m in sys.modules}))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "[]"
