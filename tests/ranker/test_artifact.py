"""The model folder: what is saved is what is scored, and what was changed is refused."""

import functools
import json
import operator
import os
import pathlib
import re
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest

from cotrr import files
from cotrr.data.contract import ATTRIBUTES
from cotrr.errors import InputError
from cotrr.ranker import artifact, encoding, features, fitting
from cotrr.ranker.calibrators import Calibration, Choice, Intervals, Platt, pack
from cotrr.ranker.model import Reranker
from tests.ranker.synthetic import assert_same_bits, development, padded, randomised, without

NAMES = list(ATTRIBUTES)
DATA = development()
LISTS = DATA.lists
MASK = encoding.make_mask(encoding.GROUPS)
CALIBRATION = Calibration(
    rank=Platt(0.5, -0.2),
    conflict=Platt(0.4, -1.0),
    intervals=Intervals((0.2, 0.5, 0.8), (0.1, 0.3, 0.6), (0.4, 0.7, 0.95)),
    queries=20,
    choices={
        "rank": Choice("platt", {"platt": 0.61, "beta": 0.62}),
        "conflict": Choice("platt", {"platt": 0.3}),
    },
)


def make_model(hidden=4, lists=LISTS):
    """Two fold lanes and two final members: random parameters, and each its own statistics."""
    words = encoding.vocabulary(lists)
    quarters = [lists.take(np.flatnonzero(np.arange(24) % 4 != k)) for k in range(4)]
    fitted = [features.fit(part, words, features.Settings(4, 3)) for part in quarters]
    statistics = features.Statistics(*(np.stack(part) for part in zip(*fitted, strict=True)))
    inputs = fitting.featurize_views(statistics, encoding.encode(lists, words))
    keys = jax.random.split(jax.random.key(0), 4)
    one = jax.tree.map(lambda x: x[0, 0], inputs)
    init = jax.vmap(Reranker(hidden=hidden).init, in_axes=(0, None, None))
    params = jax.eval_shape(init, keys, one, features.make_gates(MASK))  # the shapes are all that is wanted
    pictures = DATA.canonical_id[:16][lists.where[:16]]
    seen = {"query_id": artifact.hashes("query_id", lists.query_id[:16]),
            "canonical_id": artifact.hashes("canonical_id", pictures)}  # fmt: skip
    params = jax.tree.map(lambda x: 0.3 * x, randomised(params))
    config = {"groups": "clip,so,conflict", "without": "", "hidden": hidden, "rate": 1e-3}
    return artifact.Model("light", config, words, statistics, params, np.array([False, False, True, True]),
                          CALIBRATION, {"best_epoch": 3}, seen)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture
def folder(model, tmp_path):
    artifact.save(model, tmp_path / "model")
    return tmp_path / "model"


def change_facts(folder, **changes):
    """Changes what model.json says, with a version that goes with it."""
    facts = json.loads((folder / "model.json").read_text()) | changes
    del facts["version"]
    version = f"{facts['name']}-{files.digest(facts)[:12]}"
    (folder / "model.json").write_text(json.dumps(facts | {"version": version}))


def version_of(model, folder):
    artifact.save(model, folder)
    return artifact.load(folder).version


@pytest.mark.parametrize("hidden", [0, 4])
def test_a_loaded_model_scores_the_same_bits(hidden, tmp_path):
    model = make_model(hidden)
    artifact.save(model, tmp_path)
    loaded = artifact.load(tmp_path)
    assert_same_bits(artifact.score(model, LISTS)._asdict(), artifact.score(loaded, LISTS)._asdict())
    assert_same_bits(model.params, loaded.params)
    assert_same_bits(model.statistics, loaded.statistics)
    assert_same_bits(model.seen, loaded.seen)
    same = ("config", "vocabulary", "calibration", "provenance")
    assert [getattr(model, k) for k in same] == [getattr(loaded, k) for k in same]
    assert loaded.version == json.loads((tmp_path / "model.json").read_text())["version"]
    assert re.fullmatch("light-[0-9a-f]{12}", loaded.version)


def test_saving_twice_gives_the_same_bytes(model, folder, tmp_path):
    artifact.save(model, tmp_path / "again")
    for name in ("weights.npz", "trained_on.npz", "model.json"):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert sorted(p.name for p in folder.iterdir()) == ["model.json", "trained_on.npz", "weights.npz"]
    assert artifact.load(folder).version == artifact.load(tmp_path / "again").version
    assert version_of(artifact.load(folder), tmp_path / "reloaded") == artifact.load(folder).version


def test_models_that_differ_in_anything_have_different_versions(model, tmp_path):
    calibration, plus_one = model.calibration, lambda tree: jax.tree.map(lambda x: x + 1, tree)
    others = {
        "none": {},
        "rank": {"calibration": calibration._replace(rank=Platt(0.5, -0.2 + 1e-12))},
        "conflict": {"calibration": calibration._replace(conflict=Platt(0.41, -1.0))},
        "interval": {
            "calibration": calibration._replace(intervals=calibration.intervals._replace(low=(0.1, 0.3, 0.5)))
        },
        "choices": {"calibration": calibration._replace(choices={})},
        "queries": {"calibration": calibration._replace(queries=21)},
        "params": {"params": plus_one(model.params)},
        "statistics": {"statistics": plus_one(model.statistics)},
        "final": {"final": ~model.final},
        "config": {"config": model.config | {"groups": "so,conflict"}},
        "without": {"config": model.config | {"without": "brightness"}},
        "vocabulary": {"vocabulary": model.vocabulary._replace(domains=("d0", "d2"))},
        "provenance": {"provenance": {"best_epoch": 4}},
        "seen": {"seen": model.seen | {"query_id": model.seen["query_id"][1:]}},
        "name": {"name": "other"},
    }
    found = {name: version_of(model._replace(**part), tmp_path / name) for name, part in others.items()}
    assert len(set(found.values())) == len(others), found
    weights = {name: files.sha256(tmp_path / name / "weights.npz") for name in others}
    same = [name for name in others if weights[name] == weights["none"]]
    assert sorted(set(others) - set(same)) == ["final", "params", "statistics"]


def test_nothing_is_pickled(folder):
    for name in ("weights.npz", "trained_on.npz"):
        with np.load(folder / name, allow_pickle=False) as arrays:
            assert all(arrays[key].dtype.kind in "fbiu" for key in arrays)
            assert len(arrays.files) > 1
    with np.load(folder / "weights.npz", allow_pickle=False) as arrays:
        assert arrays["params/base_scale"].shape == (4, 2)


def test_ids_are_not_in_the_folder(folder):
    for path in folder.iterdir():
        assert b"shoot1" not in path.read_bytes() and b"q11" not in path.read_bytes()


def test_changed_files_are_refused(folder):
    for name in ("weights.npz", "trained_on.npz"):
        kept = (folder / name).read_bytes()
        (folder / name).write_bytes(kept[:-1] + b"\1")
        with pytest.raises(InputError, match=f"{name}: not the file that was saved") as error:
            artifact.load(folder)
        assert error.value.file == folder / name
        (folder / name).write_bytes(kept)
    artifact.load(folder)


def paths_in(value, path=()):
    """Paths of every value inside, lists and objects too."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, item in items for found in ((*path, key), *paths_in(item, (*path, key)))]


def changed(value):
    """Other values, near and far."""
    match value:
        case str():
            return [value + "x", value[1:] or "y", None]
        case int():
            return [value + 1, -value - 1, float(value), str(value), None]
        case float():
            return [float(np.nextafter(value, 9)), -value, str(value), None]
        case list():
            return [value[::-1] if value != value[::-1] else [], value[1:], [*value, value[0]], None]
    return [value | {"more": 1}, {}, None]


def test_any_change_of_any_value_is_refused(folder):
    path, text = folder / "model.json", (folder / "model.json").read_text()
    places = paths_in(json.loads(text))
    assert ("calibration", "intervals", "low", 1) in places and ("vocabulary", "domains", 1) in places
    for *parents, last in places:
        inside = lambda facts, parents=parents: functools.reduce(operator.getitem, parents, facts)
        variants = []
        for other in changed(inside(json.loads(text))[last]):
            variants.append(json.loads(text))
            inside(variants[-1])[last] = other
        if [*parents, last] not in (["version"], ["name"]):  # without them it is no model at all
            variants.append(json.loads(text))
            del inside(variants[-1])[last]
        for facts in variants:
            path.write_text(json.dumps(facts))
            with pytest.raises(InputError, match=r"model\.json: changed since it was saved") as error:
                artifact.load(folder)
            assert error.value.file == path
    path.write_text(json.dumps(json.loads(text), indent=7))  # the values alone count
    assert artifact.load(folder).version == json.loads(text)["version"]


@pytest.mark.parametrize("name", ["model.json", "weights.npz", "trained_on.npz"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(InputError, match=rf"{name}: no finished model here.*experiments\.train"):
        artifact.load(folder)


def test_no_folder(tmp_path):
    with pytest.raises(InputError, match=r"nowhere/model\.json: no finished model here"):
        artifact.load(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="no finished model here"):
        artifact.load(tmp_path / "file")


def test_other_attributes_or_format_are_refused(folder):
    kept = (folder / "model.json").read_text()
    for changes in ({"attributes": [*ATTRIBUTES][::-1]}, {"format": 3}, {"format": 5}):
        change_facts(folder, **changes)
        with pytest.raises(InputError, match=r"model\.json: saved by another version"):
            artifact.load(folder)
        (folder / "model.json").write_text(kept)


@pytest.mark.parametrize("text", ['{"format": 1', "[]", "{}", "null", '{"files": []}', '{"files": {}}'])
def test_broken_json_is_named(folder, text):
    (folder / "model.json").write_text(text)
    with pytest.raises(InputError, match=r"model\.json: no model of cotrr"):
        artifact.load(folder)


@pytest.mark.parametrize("changes", [
    {"calibration": pack(CALIBRATION._replace(rank=Platt(-0.5, 0.0)))},
    {"calibration": {"intervals": "wide"}}, {"calibration": None},
    {"files": []}, {"files": {}}, {"format": []},
])  # fmt: skip
def test_other_facts_under_a_version_that_goes_with_them_are_named(folder, changes):
    change_facts(folder, **changes)
    with pytest.raises(InputError, match=r"model\.json: (no model of cotrr|saved by another version)"):
        artifact.load(folder)


def test_incomplete_weights_are_refused(model, folder):
    with np.load(folder / "weights.npz") as arrays:
        kept = {key: arrays[key] for key in arrays if key != "statistics/mean"}
    np.savez(folder / "weights.npz", **kept)
    change_facts(folder, files={"weights.npz": files.sha256(folder / "weights.npz"),
                                "trained_on.npz": files.sha256(folder / "trained_on.npz")})  # fmt: skip
    with pytest.raises(InputError, match=r"model\.json: no model of cotrr.*statistics/mean"):
        artifact.load(folder)


def test_scores_are_probabilities_inside_their_interval(model):
    lists = LISTS._replace(attributes=LISTS.attributes * np.float32(100))  # far outside training
    for scored in (artifact.score(model, LISTS), artifact.score(model, lists)):
        for name, part in scored._asdict().items():
            assert part.shape == LISTS.where.shape and np.isfinite(part[LISTS.where]).all(), name
            assert (part[~LISTS.where] == (-np.inf if name == "logit" else 0)).all(), name
        for part in scored[:5]:
            assert part.min() >= 0 and part.max() <= 1
        assert (scored.low <= scored.high).all()
        low, high = CALIBRATION.intervals(scored.score)  # always around the score itself
        ends = np.minimum(low, scored.score), np.maximum(high, scored.score)
        for mine, end in zip((scored.low, scored.high), ends, strict=True):
            np.testing.assert_allclose(mine[LISTS.where], end[LISTS.where], atol=1e-12)
    width = (scored.high - scored.low)[LISTS.where]
    assert np.ptp(width) > 0.01  # not the same everywhere


def test_scores_by_hand(model):
    encoded = encoding.encode(LISTS, model.vocabulary)
    lanes = artifact.lane_scores(model.params, model.statistics, encoded, MASK, hidden=4)
    assert lanes.rank.shape == lanes.conflict.shape == (4, 24, 8)
    scored = artifact.score(model, LISTS)
    q, i = 3, 2

    def one(lane):  # by its own statistics
        params, fitted = jax.tree.map(lambda x: x[lane], (model.params, model.statistics))
        query = features.featurize(fitted, jax.tree.map(lambda x: x[q], encoded))
        return Reranker(hidden=4).apply(params, query, features.make_gates(MASK))

    rank = np.array([float(one(lane).rank[i]) for lane in range(4)])
    conflict = np.array([float(one(lane).conflict[i]) for lane in range(4)])
    np.testing.assert_allclose(lanes.rank[:, q, i], rank, rtol=1e-4, atol=1e-5)
    expit = lambda z: 1 / (1 + np.exp(-z))
    score = expit(0.5 * rank[2:].mean() - 0.2)
    expected = {
        "logit": rank[2:].mean(), "score": score, "std": np.std(expit(0.5 * rank - 0.2)),
        "low": min(np.interp(score, [0.2, 0.5, 0.8], [0.1, 0.3, 0.6]), score),
        "high": max(np.interp(score, [0.2, 0.5, 0.8], [0.4, 0.7, 0.95]), score),
        "p_conflict": expit(0.4 * conflict[2:].mean() - 1.0),
    }  # fmt: skip
    for name, value in expected.items():
        assert getattr(scored, name)[q, i] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_batches_and_padding_do_not_change_scores(model):
    scored = artifact.score(model, LISTS)
    few = artifact.score(model, LISTS.take(np.array([5, 2])))
    more = artifact.score(model, padded(LISTS.take(np.arange(50) % 24), 3))  # more than one batch
    for name, part in scored._asdict().items():
        np.testing.assert_allclose(getattr(few, name), part[[5, 2]], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(getattr(more, name)[:, :8], part[np.arange(50) % 24], rtol=1e-5, atol=1e-6)


@pytest.fixture
def small_batches(monkeypatch):
    """Batches of eight lists of eight candidates, two of them under way."""
    monkeypatch.setattr(artifact, "pace", lambda: artifact.Pace(64, 2))


@pytest.fixture
def batches(monkeypatch):
    """For every call of `lane_scores` the shape of its images, and how many such arrays there were."""
    found, lane_scores, turn = [], artifact.lane_scores, threading.Lock()

    def record(params, statistics, encoded, mask, *, hidden):
        shape = encoded.image.shape
        with turn:  # who counts keeps what is counted alive
            found.append((shape, sum(array.shape == shape for array in jax.live_arrays())))
        return lane_scores(params, statistics, encoded, mask, hidden=hidden)

    monkeypatch.setattr(artifact, "lane_scores", record)
    return found


@pytest.mark.parametrize("queries", [1, 7, 8, 9, 24, 50])
def test_a_stream_of_batches_scores_as_one_batch(model, queries, small_batches, batches):
    lists = LISTS.take(np.arange(queries) % 24)
    streamed = np.stack(artifact.logits(model, lists))
    assert [shape for shape, _ in batches] == [(8, 8, 6)] * -(-queries // 8)
    encoded = encoding.encode(lists, model.vocabulary)
    at_once = np.stack(artifact.lane_scores(model.params, model.statistics, encoded, MASK, hidden=4))
    assert streamed.shape == at_once.shape == (2, 4, queries, 8)
    where = lists.where
    np.testing.assert_allclose(streamed[..., where], at_once[..., where], rtol=1e-5, atol=1e-5)
    assert_same_bits(np.stack(artifact.logits(model, lists)), streamed)


def test_what_is_in_the_padding_changes_no_bit(model, small_batches):
    score = lambda lists: artifact.score(model, lists.take(np.arange(20)))._asdict()
    assert_same_bits(score(padded(LISTS, 3, 1e30)), score(padded(LISTS, 3)))


def test_few_batches_are_on_the_device(model, small_batches, batches):
    artifact.score(model, LISTS.take(np.arange(400) % 24))
    assert len(batches) == 50
    assert max(count for _, count in batches) <= 4  # two, each of which JAX may hold twice for a moment


def test_other_numbers_and_lengths_of_lists_are_not_compiled_for(model, small_batches):
    artifact.score(model, LISTS)
    compiled = artifact.lane_scores._cache_size()
    for queries in (1, 5, 23, 100):
        lists = LISTS.take(np.arange(queries) % 24)
        artifact.score(model, lists)
        artifact.logits(model, lists._replace(**{name: getattr(lists, name)[:, :5] for name in BY_CANDIDATE}))
    assert artifact.lane_scores._cache_size() == compiled
    artifact.score(model, padded(LISTS, 9))
    assert artifact.lane_scores._cache_size() == compiled + 1


BY_CANDIDATE = ("image", "attributes", "y", "compliance", "conflict", "dual_score", "gold", "row", "where")


def test_sizes_of_lists_are_few_and_close():
    sizes = [artifact._roomy(n) for n in range(2000)]
    assert sizes[:10] == [4, 4, 4, 4, 4, 8, 8, 8, 8, 12] and sizes[100] == 104
    assert all(n <= size < n + max(4, 1 + n / 8) for n, size in enumerate(sizes) if n)
    assert [artifact._roomy(size) for size in sizes] == sizes == sorted(sizes)
    assert len(set(sizes)) < 70


def test_a_query_without_a_finite_score_is_named(model, small_batches):
    attributes = LISTS.attributes.copy()
    attributes[[17, 21], 1, NAMES.index("clip_score")] = np.inf
    with pytest.raises(InputError, match="candidates of query 'q17' have no finite score"):
        artifact.score(model, LISTS._replace(attributes=attributes))
    where = LISTS.where.copy()
    where[[17, 21], 1] = False  # what is no candidate needs no score
    scored = artifact.score(model, LISTS._replace(attributes=attributes, where=where))
    assert scored.logit[17, 1] == -np.inf and np.isfinite(scored.logit[where]).all()


ON_TWO_DEVICES = """
import sys, jax, numpy as np
from cotrr.ranker import artifact
from tests.ranker import test_artifact
used, lane_scores = set(), artifact.lane_scores

def record(params, statistics, encoded, mask, *, hidden):
    used.update(encoded.image.devices())
    return lane_scores(params, statistics, encoded, mask, hidden=hidden)

artifact.lane_scores, artifact.pace = record, lambda: artifact.Pace(64, 2)
np.save(sys.argv[1], np.stack(artifact.logits(test_artifact.make_model(), test_artifact.LISTS)))
assert used == set(jax.devices()) and len(used) == 2, used
"""


def test_devices_take_batches_in_turn(model, small_batches, tmp_path):
    root = pathlib.Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", ON_TWO_DEVICES, tmp_path / "logits.npy"],
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
        cwd=root, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found, alone = np.load(tmp_path / "logits.npy"), np.stack(artifact.logits(model, LISTS))
    np.testing.assert_allclose(found[..., LISTS.where], alone[..., LISTS.where], rtol=1e-5, atol=1e-5)


def test_embeddings_of_another_length_are_refused(model):
    for d in (5, 7):
        other = development(d=d).lists
        for lists, field in (
            (other, "image_embedding"),
            (LISTS._replace(image=other.image), "image_embedding"),
            (LISTS._replace(text=other.text), "text_embedding"),
        ):
            with pytest.raises(InputError, match=f"{d} numbers where the model was trained on 6") as error:
                artifact.score(model, lists)
            assert error.value.field == field and "encoder" in str(error.value)


def test_a_model_without_embeddings_leaves_them_aside():
    nothing = development(d=0).lists
    plain = make_model(lists=nothing)
    scored = artifact.score(plain, nothing)
    assert np.ptp(scored.score[LISTS.where]) > 0.01
    with_them = nothing._replace(image=LISTS.image, text=LISTS.text)
    assert_same_bits(artifact.score(plain, with_them)._asdict(), scored._asdict())


@pytest.mark.parametrize("kinds", [("image", "text"), ("image",), ("text",)])
def test_a_run_without_embeddings_is_scored_as_if_they_were_missing(model, kinds):
    parts = {kind: getattr(LISTS, kind) for kind in kinds}
    without = LISTS._replace(**{k: v[..., :0] for k, v in parts.items()})
    missing = LISTS._replace(**{k: np.full_like(v, np.nan) for k, v in parts.items()})
    scored = artifact.score(model, without)
    assert np.isfinite(scored.score).all() and np.ptp(scored.score[LISTS.where]) > 0.01
    assert_same_bits(scored._asdict(), artifact.score(model, missing)._asdict())
    assert not np.array_equal(scored.score, artifact.score(model, LISTS).score)


@pytest.mark.parametrize("names", [("conflict_prob",), ("clip_score", "brightness"), tuple(ATTRIBUTES)])
def test_a_field_absent_in_training_and_present_later_changes_no_score(names):
    columns = [NAMES.index(name) for name in names]
    absent = LISTS.attributes.copy()
    absent[..., columns] = np.nan
    lists = LISTS._replace(attributes=absent)
    model = make_model(lists=lists)
    scored = artifact.score(model, lists)
    assert np.ptp(scored.score[LISTS.where]) > 0.01
    assert_same_bits(artifact.score(model, LISTS)._asdict(), scored._asdict())
    inputs = fitting.featurize_views(model.statistics, encoding.encode(LISTS, model.vocabulary))
    nothing = (np.asarray(inputs.conflict) == 0).all() and (np.asarray(inputs.centre)[..., 1] == 0).all()
    assert nothing == ("conflict_prob" in names)
    assert not np.array_equal(artifact.score(make_model(), LISTS).score, scored.score)


def test_a_single_lane_has_no_spread(model, tmp_path):
    first = lambda tree: jax.tree.map(lambda value: value[2:3], tree)
    one = model._replace(
        params=first(model.params), statistics=first(model.statistics), final=np.array([True])
    )
    scored = artifact.score(one, LISTS)
    assert np.isnan(scored.std[LISTS.where]).all()  # unknown, and not a certainty of 0
    assert (scored.std[~LISTS.where] == 0).all()
    for name, part in scored._asdict().items():
        assert name == "std" or np.isfinite(part[LISTS.where]).all(), name
    twice = jax.tree.map(lambda value: np.repeat(value, 2, axis=0), (one.params, one.statistics))
    both = one._replace(params=twice[0], statistics=twice[1], final=np.array([False, True]))
    np.testing.assert_allclose(artifact.score(both, LISTS).std, 0, atol=1e-9)
    np.testing.assert_allclose(artifact.score(both, LISTS).score, scored.score, atol=1e-6)


def test_no_lists_and_empty_lists(model):
    nothing = artifact.score(model, LISTS.take(np.arange(0)))
    assert all(part.shape == (0, 8) for part in nothing)
    assert all(part.shape == (4, 0, 8) for part in artifact.logits(model, LISTS.take(np.arange(0))))
    empty = artifact.score(model, LISTS._replace(where=np.zeros_like(LISTS.where)))
    assert (empty.score == 0).all() and (empty.high == 0).all() and (empty.logit == -np.inf).all()


@pytest.mark.parametrize(
    "changes", [{"groups": "so,conflict"}, {"groups": "clip"}, {"without": "compliance_score, brightness"},
                {"groups": "clip, so", "without": "embeddings"}],
)  # fmt: skip
def test_what_the_config_masks_is_not_scored_with(model, changes):
    off = model._replace(config=model.config | changes)
    mask = encoding.mask_of(off.config)
    names = changes.get("without", "").replace(" ", "").split(",")
    assert [name for name in encoding.MASKED if name in names] == [
        name for name, on in zip(encoding.MASKED, mask, strict=True) if not on and name in names
    ]
    other = without(LISTS, ~mask)
    assert_same_bits(artifact.score(off, LISTS)._asdict(), artifact.score(off, other)._asdict())
    assert np.abs(artifact.score(model, LISTS).score - artifact.score(model, other).score).max() > 0.01
    assert np.abs(artifact.score(model, LISTS).score - artifact.score(off, LISTS).score).max() > 0.01


def test_masks_of_configs_by_hand():
    mask = encoding.mask_of({"groups": "clip, conflict", "without": "embeddings,soft_conflicts"})
    seen = [name for name, on in zip(encoding.MASKED, mask, strict=True) if on]
    conflict = [name for name in ATTRIBUTES if ATTRIBUTES[name] == "conflict"]
    assert seen == ["clip_score", *conflict[:-1]] and conflict[-1] == "soft_conflicts"


def test_overlap_counts_distinct_ids(model, folder):
    for each in (model, artifact.load(folder)):
        assert artifact.overlap(each.seen, "query_id", LISTS.query_id) == 16
        assert (
            artifact.overlap(each.seen, "query_id", np.array(["q0", "q0", "q15", "q16", "new"], object)) == 2
        )
        assert artifact.overlap(each.seen, "query_id", np.array([], object)) == 0
        assert artifact.overlap(each.seen, "canonical_id", LISTS.query_id) == 0
    pictures = set(DATA.canonical_id[:16][LISTS.where[:16]])
    assert artifact.overlap(model.seen, "canonical_id", np.array(sorted(pictures), object)) == len(pictures)
