"""Features: fitted on training rows alone, shrunk by domain, and nothing made up."""

import math

import jax
import numpy as np
import pytest

from cotrr.evaluate.metrics import ndcg
from cotrr.ranker import encoding, features, fitting
from cotrr.ranker.lanes import TrainConfig
from tests.ranker.synthetic import NAMES, assert_same_bits, development, padded, without

SETTINGS = features.Settings(4, 3)
A = len(NAMES)
EVERY = np.ones(A + 1, bool)
column = NAMES.index
BATCHED = jax.jit(jax.vmap(features.featurize, in_axes=(None, 0)))
BASE = jax.jit(jax.vmap(features.base_logits, in_axes=(0, None)))


def featurize(lists, statistics, words):
    return BATCHED(statistics, encoding.encode(lists, words))


def base_of(inputs, mask=EVERY):
    """[Q, n, 2] Step 4's rule and conflict logit."""
    return np.asarray(BASE(inputs, features.make_gates(mask)))


@pytest.fixture
def lists():
    return development(queries=9).lists


@pytest.fixture
def words(lists):
    return encoding.vocabulary(lists)


def test_words():
    lists = development(queries=3).lists._replace(
        constraints=(("color=pink", "glass=coupe"), ("color=red",), ())
    )
    words = encoding.vocabulary(lists)
    assert words == (("d0", "d1"), ("color", "color=pink", "color=red", "glass", "glass=coupe"))
    wants = encoding.encode(lists, words).wants
    np.testing.assert_array_equal(wants, [[1, 1, 0, 1, 1], [2, 0, 2, 0, 0], [0, 0, 0, 0, 0]])


def test_unknown_words_have_no_number_of_their_own(lists, words):
    other = lists._replace(
        constraints=(("color=blue", "size=xl"), *lists.constraints[1:]),
        domain=np.array(["new", *lists.domain[1:]], object),
    )
    encoded = encoding.encode(other, words)
    assert encoded.domain[0] == len(words.domains) and encoded.domain[1] == 1
    assert [words.constraints[i] for i in np.flatnonzero(encoded.wants[0])] == ["color"]
    assert encoded.wants.shape == (9, len(words.constraints))
    assert np.isfinite(featurize(other, features.fit(lists, words, SETTINGS), words).attributes).all()


def by_hand(groups):
    """Empirical Bayes of means and log variances, one number at a time (DerSimonian & Laird 1986)."""
    everything = [x for group in groups for x in group]
    centre = sum(everything) / len(everything)
    total = sum((x - centre) ** 2 for x in everything) / len(everything)

    def shrink(estimates, variances, centre):
        known = [(e - centre, 1 / v) for e, v in zip(estimates, variances, strict=True) if v is not None]
        weight = sum(w for _, w in known)
        q = sum(w * e**2 for e, w in known)
        denominator = weight - sum(w**2 for _, w in known) / weight
        spread = max(q - (len(known) - 1), 0) / denominator
        return [centre if v is None else centre + spread / (spread + v) * (e - centre)
                for e, v in zip(estimates, variances, strict=True)]  # fmt: skip

    means = [sum(g) / len(g) for g in groups]
    mean = shrink(means, [total / len(g) if len(g) > 1 else None for g in groups], centre)
    variances = [max(sum((x - m) ** 2 for x in g) / max(len(g) - 1, 1), 1e-3 * total)
                 for g, m in zip(groups, means, strict=True)]  # fmt: skip
    uncertainty = [2 / (len(g) - 1) if len(g) > 1 else None for g in groups]
    logs = shrink([math.log(v) for v in variances], uncertainty, math.log(total))
    return [*mean, centre], [*(math.exp(v / 2) for v in logs), math.sqrt(total)]


@pytest.fixture
def groups():
    rng = np.random.default_rng(0)
    sizes, centres, spreads = (400, 30, 2, 1, 60), (3.0, -1.0, 8.0, 9.0, 0.5), (1.0, 0.3, 2.0, 1.0, 4.0)
    return [list(rng.normal(c, s, n)) for n, c, s in zip(sizes, centres, spreads, strict=True)]


def moments_of(groups):
    values = np.array([[x] for group in groups for x in group])
    domain = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    order = np.random.default_rng(1).permutation(len(values))
    mean, scale = features.domain_moments(values[order], domain[order], len(groups))
    return mean[:, 0], scale[:, 0]


def test_moments_are_empirical_bayes_by_hand(groups):
    mean, scale = by_hand(groups)
    fitted = moments_of(groups)
    np.testing.assert_allclose(fitted[0], mean, rtol=1e-9)
    np.testing.assert_allclose(fitted[1], scale, rtol=1e-9)


def test_a_large_domain_keeps_its_mean_and_a_single_row_has_none(groups):
    mean, scale = moments_of(groups)
    assert mean[0] == pytest.approx(np.mean(groups[0]), abs=0.02)
    assert scale[0] == pytest.approx(np.std(groups[0]), rel=0.02)
    assert (mean[3], scale[3]) == pytest.approx((mean[-1], scale[-1]), rel=1e-12)
    two = np.mean(groups[2])
    assert mean[-1] < mean[2] < two and abs(mean[2] - two) > 10 * abs(mean[0] - np.mean(groups[0]))


def test_domains_that_differ_by_chance_alone_share_one_mean():
    rng = np.random.default_rng(3)
    groups = [list(rng.normal(size=20)) for _ in range(40)]
    mean, scale = moments_of(groups)
    raw = np.array([np.mean(group) for group in groups])
    assert np.std(mean[:-1]) < 0.5 * np.std(raw)
    assert np.std(np.log(scale[:-1])) < 0.5 * np.std(np.log([np.std(group) for group in groups]))


def test_an_unseen_domain_is_standardised_globally(lists, words):
    statistics = features.fit(lists, words, SETTINGS)
    other = lists._replace(domain=np.full(9, "new", object))
    values = lists.attributes[lists.where]
    result = np.asarray(featurize(other, statistics, words).attributes)[lists.where][:, :A]
    expected = (values - values.mean(axis=0)) / values.std(axis=0)
    np.testing.assert_allclose(result, expected, atol=1e-4)
    seen = np.asarray(featurize(lists, statistics, words).attributes)[lists.where][:, :A]
    assert np.abs(seen - expected).max() > 0.01


def test_a_constant_attribute_is_zero_whatever_comes_later(lists, words):
    lists.attributes[lists.where, column("contrast")] = 0.1
    lists.attributes[lists.where, column("soft_conflicts")] = 0
    statistics = features.fit(lists, words, SETTINGS)
    lists.attributes[0, 0, column("contrast")] = 0.9
    lists.attributes[0, 0, column("soft_conflicts")] = 7
    result = np.asarray(featurize(lists, statistics, words).attributes)
    for name in ("contrast", "soft_conflicts"):
        assert (result[..., column(name)] == 0).all()
    assert np.abs(result[..., column("brightness")]).max() > 0.5


def test_an_outlier_is_held_within_the_bounds(lists, words):
    statistics = features.fit(lists, words, SETTINGS)
    lists.attributes[0, 0, column("color_delta_e")] = 1e6
    assert featurize(lists, statistics, words).attributes[0, 0, column("color_delta_e")] == encoding.WINSOR


def test_a_missing_value_is_the_mean_of_its_domain_and_flagged(lists, words):
    ice, glass, never = map(column, ("ice_ratio", "glass_ratio", "brightness"))
    lists.attributes[::2, :, ice] *= 0.1  # the first domain's
    lists.attributes[:, :2, ice] = np.nan
    lists.attributes[..., glass] = np.nan
    statistics = features.fit(lists, words, SETTINGS)
    share = 18 / lists.where.sum()
    assert statistics.missing[ice] == pytest.approx(share) and statistics.missing[glass] == 1
    lists.attributes[1, 3, never] = np.nan
    lists.attributes[1, 4, glass] = 0.7
    result = np.asarray(featurize(lists, statistics, words).attributes)
    standard, flag = result[..., :A], result[..., A:]
    assert (standard[:, :2, ice] == 0).all() and standard[1, 3, never] == 0
    np.testing.assert_allclose(flag[:, :2, ice], 1 - share, rtol=1e-5)
    np.testing.assert_allclose(flag[..., ice][lists.where & (np.arange(8) > 1)], -share, rtol=1e-5)
    # Never or always missing in training: nothing was learned about it, so no flag.
    assert (
        (flag[..., never] == 0).all() and (flag[..., glass] == 0).all() and (standard[..., glass] == 0).all()
    )
    filled = features.fill(statistics, jax.tree.map(lambda x: x[1], encoding.encode(lists, words)))
    assert filled[0, ice] == statistics.mean[1, ice] != statistics.mean[0, ice]


def test_rule_by_hand(lists, words):
    row = np.zeros(A, np.float32)
    row[[column("clip_score"), column("compliance_score"), column("conflict_prob")]] = 0.3, 0.8, 0.25
    row[column("brightness")] = 100
    assert float(features.rule_score(row, NAMES)) == pytest.approx(0.2 * 0.3 + 0.7 * 0.8 - 0.3 * 0.25)
    assert float(features.rule_score(row, ("clip_score",))) == pytest.approx(0.2 * 0.3)
    assert float(features.rule_score(row, ())) == 0
    inputs = featurize(lists, features.fit(lists, words, SETTINGS), words)
    base = base_of(inputs)[lists.where]
    values = lists.attributes[lists.where]
    rule = (0.2 * values[:, column("clip_score")] + 0.7 * values[:, column("compliance_score")]
            - 0.3 * values[:, column("conflict_prob")])  # fmt: skip
    np.testing.assert_allclose(base[:, 0], (rule - rule.mean()) / rule.std(), atol=1e-4)
    p = np.clip(values[:, column("conflict_prob")], 0.01, 0.99)
    np.testing.assert_allclose(base[:, 1], np.log(p / (1 - p)), atol=1e-4)
    # What is masked stands at the mean of its domain.
    mean = features.fit(lists, words, SETTINGS).mean
    domain = np.broadcast_to(encoding.encode(lists, words).domain[:, None], lists.where.shape)[lists.where]
    masked = base_of(inputs, encoding.make_mask(encoding.GROUPS, ["compliance_score"]))[lists.where]
    usual = mean[domain, column("compliance_score")]
    other = rule + 0.7 * (usual - values[:, column("compliance_score")])
    np.testing.assert_allclose(masked[:, 0], (other - rule.mean()) / rule.std(), atol=1e-4)
    np.testing.assert_array_equal(masked[:, 1], base[:, 1])
    masked = base_of(inputs, encoding.make_mask(encoding.GROUPS, ["conflict_prob"]))[lists.where]
    usual = mean[domain, column("conflict_prob")]
    other = rule - 0.3 * (usual - values[:, column("conflict_prob")])
    np.testing.assert_allclose(masked[:, 0], (other - rule.mean()) / rule.std(), atol=1e-4)
    np.testing.assert_allclose(masked[:, 1], np.log(usual / (1 - usual)), atol=1e-4)


def test_a_rule_that_was_constant_in_training_stays_in_its_own_units(lists, words):
    for name in encoding.RULE:
        lists.attributes[lists.where, column(name)] = 0.25
    statistics = features.fit(lists, words, SETTINGS)
    lists.attributes[0, :2, column("compliance_score")] = 0.5, 1.0
    base = base_of(featurize(lists, statistics, words))[0, :3, 0]
    np.testing.assert_allclose(base, [0.7 * 0.25, 0.7 * 0.75, 0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [*encoding.RULE, "brightness"])
def test_an_attribute_that_training_never_saw_has_no_influence(lists, words, name):
    values = lists.attributes[..., column(name)].copy()
    lists.attributes[..., column(name)] = np.nan
    statistics = features.fit(lists, words, SETTINGS)
    assert statistics.missing[column(name)] == 1
    absent = featurize(lists, statistics, words)
    for later in (values, np.where(lists.where, 1e6, np.nan), np.where(values > 0.5, values, np.nan)):
        lists.attributes[..., column(name)] = later
        assert_same_bits(featurize(lists, statistics, words), absent)
    standard = np.asarray(absent.attributes)
    assert (standard[..., [column(name), A + column(name)]] == 0).all()
    base = base_of(absent)[lists.where]
    assert (base[:, 1] == 0).all() == (name == "conflict_prob")
    # The rule is that of its other terms.
    rest = np.asarray(features.rule_score(np.nan_to_num(lists.attributes), set(encoding.RULE) - {name}))
    rule = rest[lists.where]
    np.testing.assert_allclose(base[:, 0], (rule - rule.mean()) / rule.std(), atol=1e-4)


def test_a_conflict_probability_that_training_never_saw_gives_a_base_of_zero(lists, words):
    probability = lists.attributes[..., column("conflict_prob")].copy()
    seen = base_of(featurize(lists, features.fit(lists, words, SETTINGS), words))[..., 1]
    assert np.abs(seen[lists.where]).max() > 1
    lists.attributes[..., column("conflict_prob")] = np.nan
    statistics = features.fit(lists, words, SETTINGS)
    lists.attributes[..., column("conflict_prob")] = probability
    assert (base_of(featurize(lists, statistics, words))[..., 1] == 0).all()


@pytest.mark.parametrize("group", encoding.GROUPS)
def test_a_group_switched_off_is_not_in_the_base(lists, words, group):
    lists.attributes[::2, 0] = np.nan
    statistics = features.fit(lists, words, SETTINGS)
    mask = encoding.make_mask(set(encoding.GROUPS) - {group})
    before, after = (featurize(each, statistics, words) for each in (lists, without(lists, ~mask)))
    np.testing.assert_array_equal(base_of(before, mask), base_of(after, mask))
    changed = np.abs(base_of(before) - base_of(after)).max(axis=(0, 1))
    assert changed[0] > 0.1 and (changed[1] > 0.1) == (group == "conflict")


def test_masks_by_hand():
    everything = dict(zip(encoding.MASKED, encoding.make_mask(encoding.GROUPS), strict=True))
    assert [*everything] == [*NAMES, "embeddings"] and all(everything.values())
    named = lambda *arguments: {encoding.MASKED[k] for k in np.flatnonzero(encoding.make_mask(*arguments))}
    assert named(("clip",)) == {"clip_score", "embeddings"}
    assert named(("clip",), ("embeddings",)) == {"clip_score"}
    assert named(("conflict", "clip"), ("clip_score", "brightness")) == {"embeddings"} | {
        name for name in NAMES if encoding.ATTRIBUTES[name] == "conflict"
    }
    assert named(()) == set()
    for group in encoding.GROUPS:
        off = named(set(encoding.GROUPS) - {group})
        assert {encoding.ATTRIBUTES.get(name, "clip") for name in set(encoding.MASKED) - off} == {group}


def test_unknown_names_of_a_mask():
    for groups in (["clip", "color"], [""]):
        with pytest.raises(ValueError, match=r"^--groups: unknown \['(color)?'\]"):
            encoding.make_mask(groups)
    with pytest.raises(ValueError, match=r"^--without: unknown \['colour'\].*clip_score,.*embeddings"):
        encoding.make_mask(encoding.GROUPS, ["brightness", "colour"])


def test_gates_are_the_mask_and_the_sizes_of_what_is_in_it():
    mask = encoding.make_mask(encoding.GROUPS, ["brightness"])
    gates = features.make_gates(mask, 0.6, 0.1, 0.5)
    np.testing.assert_array_equal(gates.attributes, [name != "brightness" for name in NAMES])
    assert [float(size) for size in gates[1:]] == pytest.approx([0.6, 0.1, 0.5])
    gates = features.make_gates(encoding.make_mask(encoding.GROUPS, ["embeddings"]), 0.6, 0.1)
    assert (gates.attributes == 1).all() and (float(gates.image), float(gates.text)) == (0, 0)
    assert [float(part) for part in features.make_gates(mask)[1:]] == [1, 1, 1]


def test_principal_axes_have_size_one_and_are_orthogonal():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(50, 6)) * [5, 3, 2, 1, 0.5, 0.1] + 10
    mean, axes = features.principal_axes(vectors, 3)
    projected = (vectors - mean) @ axes
    assert axes.shape == (6, 3)
    assert np.sqrt(np.mean(projected**2)) == pytest.approx(1)
    assert np.allclose(projected.mean(axis=0), 0)
    gram = axes.T @ axes
    np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-12)
    np.testing.assert_allclose(np.diag(gram), gram[0, 0])  # the axes keep their proportions
    covariance = np.cov(vectors.T, bias=True)
    leading = np.linalg.eigh(covariance)[1][:, ::-1][:, :3]
    np.testing.assert_allclose(np.abs(leading.T @ axes) / np.sqrt(gram[0, 0]), np.eye(3), atol=1e-8)


def test_principal_axes_of_little():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(3, 6))
    mean, axes = features.principal_axes(vectors, 5)
    assert axes.shape == (6, 5)  # always as many as asked for, so that lanes stack
    assert (np.abs(axes[:, :2]).sum(axis=0) > 0.1).all()  # three points span a plane ...
    assert (axes[:, 2:] == 0).all()  # ... and no more
    projected = ((vectors - mean) @ axes)[:, :2]
    assert np.sqrt(np.mean(projected**2)) == pytest.approx(1)  # of the axes that are spanned
    np.testing.assert_allclose(projected @ np.linalg.pinv(axes[:, :2]), vectors - mean, atol=1e-12)
    assert features.principal_axes(rng.normal(size=(9, 6)), 8)[1].shape == (6, 6)
    alone = features.principal_axes(vectors[:1], 5)
    assert alone[1].shape == (6, 5) and (alone[1] == 0).all()
    np.testing.assert_array_equal(alone[0], vectors[0])
    assert features.principal_axes(vectors, 0)[1].shape == (6, 0)
    assert [part.shape for part in features.principal_axes(np.zeros((3, 0)), 5)] == [(0,), (0, 0)]
    holed = np.vstack([vectors, np.full((2, 6), np.nan)])
    assert_same_bits(features.principal_axes(holed, 5), features.principal_axes(vectors, 5))
    nothing = features.principal_axes(np.full((2, 6), np.nan), 5)
    assert nothing[1].shape == (6, 5) and (nothing[1] == 0).all() and (nothing[0] == 0).all()


def test_lists_without_embeddings(words):
    lists = development(queries=9, d=0).lists
    statistics = features.fit(lists, words, SETTINGS)
    result = featurize(lists, statistics, words)
    assert result.image.shape == (9, 8, 0) and result.text.shape == (9, 0)
    assert result.wants.shape == (9, 1 + len(words.constraints))


def test_a_missing_embedding_projects_to_the_mean(lists, words):
    statistics = features.fit(lists, words, SETTINGS)
    lists.image[0, 0], lists.text[1] = np.nan, np.nan
    result = featurize(lists, statistics, words)
    assert (result.image[0, 0] == 0).all() and np.abs(result.image[0, 1]).max() > 0.01
    assert (result.text[1] == 0).all() and np.abs(result.text[0]).max() > 0.01
    assert (result.wants[:, 0] == 1).all()


@pytest.mark.parametrize("garbage", [np.nan, 1e6])
def test_padding_is_zero_and_changes_no_candidate(lists, words, garbage):
    more = padded(lists, 3, garbage)
    statistics = features.fit(lists, words, SETTINGS)
    assert_same_bits(features.fit(more, words, SETTINGS), statistics)
    alone, beside = featurize(lists, statistics, words), featurize(more, statistics, words)
    for name in ("wants", "text", "centre"):
        np.testing.assert_allclose(getattr(beside, name), getattr(alone, name), atol=1e-6)
    np.testing.assert_allclose(base_of(beside)[:, :8], base_of(alone), atol=1e-5)
    assert np.isfinite(base_of(beside)).all()
    for name in ("image", "attributes", "rule", "conflict"):
        np.testing.assert_allclose(getattr(beside, name)[:, :8], getattr(alone, name), atol=1e-5)
        assert (np.asarray(getattr(beside, name))[~more.where] == 0).all()


def test_statistics_know_nothing_but_training_rows():
    clean = development()
    lists = clean.lists
    rng = np.random.default_rng(0)
    lists.y[:4, 0] = np.nan  # rows without a label are not learned from either
    outside = ~lists.labelled | clean.validation[:, None]

    def poisoned(values):
        noise = rng.normal(size=values.shape) * 1e6
        return np.where(outside.reshape(outside.shape + (1,) * (values.ndim - 2)), noise, values)

    other = lists._replace(
        attributes=poisoned(lists.attributes).astype(np.float32),
        image=poisoned(lists.image).astype(np.float32),
        text=np.where(clean.validation[:, None], 1e6, lists.text).astype(np.float32),
        y=np.where(clean.validation[:, None], 1e6, lists.y).astype(np.float32),
        domain=np.where(clean.validation, "only there", lists.domain),
        constraints=tuple(("ice=none",) if v else c
                          for v, c in zip(clean.validation, lists.constraints, strict=True)),
    )  # fmt: skip
    config = TrainConfig(folds=0, image_components=4, text_components=2)
    one, two = (fitting.set_up(d, config, ndcg) for d in (clean, clean._replace(lists=other)))
    assert one.vocabulary == two.vocabulary
    assert_same_bits(one.statistics, two.statistics)
    learned = lists.labelled & ~clean.validation[:, None]
    seen = [fitting.featurize_views(s.statistics, s.encoded) for s in (one, two)]
    for name in ("attributes", "image", "rule", "conflict"):
        before, after = (np.asarray(getattr(inputs, name)) for inputs in seen)
        assert before.shape[:3] == (1, 24, 8) and np.abs(before[0][learned]).max() > 0.1
        np.testing.assert_array_equal(before[0][learned], after[0][learned])
        assert not np.array_equal(before, after)
    # And a training row does count.
    lists.attributes[5, 1] += 1
    assert not np.array_equal(fitting.set_up(clean, config, ndcg).statistics.mean, one.statistics.mean)


FOLDED = TrainConfig(folds=3, image_components=4, text_components=2)


def view(setup, k):
    return jax.tree.map(lambda value: value[k], setup.statistics)


@pytest.fixture(scope="module")
def folded():
    """Lists whose rows are now and then without a label, by three folds."""
    clean = development()
    clean.lists.y[:4, 0] = np.nan
    clean.lists.attributes[::2, 1, 0] = np.nan
    return fitting.set_up(clean, FOLDED, ndcg)


def test_statistics_are_those_of_the_views_own_training_rows(folded):
    lists, views = folded.development.lists, folded.views
    assert {len(leaf) for leaf in jax.tree.leaves(folded.statistics)} == {4}
    for k, rows in enumerate(views.train):
        values = lists.attributes[rows]
        fitted = view(folded, k)
        np.testing.assert_allclose(fitted.missing, np.isnan(values).mean(axis=0), atol=1e-6)
        np.testing.assert_allclose(fitted.mean[-1], np.nanmean(values, axis=0), rtol=1e-4)
        np.testing.assert_allclose(fitted.scale[-1], np.nanstd(values, axis=0), rtol=1e-4)
        np.testing.assert_allclose(fitted.label_scale[-1], np.std(lists.y[rows]), rtol=1e-4)
        pictures = np.unique(lists.image[rows], axis=0)
        np.testing.assert_allclose(fitted.image_mean, pictures.mean(axis=0), atol=1e-5)
        np.testing.assert_allclose(fitted.text_mean, lists.text[rows.any(axis=1)].mean(axis=0), atol=1e-5)
    assert len(np.unique(folded.statistics.mean[:, -1, 0])) == 4


@pytest.mark.parametrize("fold", range(3))
@pytest.mark.parametrize("part", ["attributes", "image", "text", "y"])
def test_what_a_view_does_not_learn_from_leaves_its_statistics_alone(folded, fold, part):
    clean, k = folded.development, fold
    rows = {"held out": folded.views.held_out[k], "not learned from": ~folded.views.train[k]}
    rng = np.random.default_rng(fold)
    for name, changed in rows.items():
        if part == "text":
            changed = (changed.any(axis=1) & ~folded.views.train[k].any(axis=1))[:, None]
        old = getattr(clean.lists, part)
        where = changed.reshape(changed.shape + (1,) * (old.ndim - changed.ndim))
        new = np.where(where & ~np.isnan(old), rng.normal(size=old.shape) * 100, old).astype(np.float32)
        assert not np.array_equal(new, old, equal_nan=True), name
        other = fitting.set_up(clean._replace(lists=clean.lists._replace(**{part: new})), FOLDED, ndcg)
        np.testing.assert_array_equal(other.views.train, folded.views.train)
        assert_same_bits(view(other, k), view(folded, k))
        # Those that do learn from these rows notice.
        final = zip(*(jax.tree.leaves(view(setup, -1)) for setup in (other, folded)), strict=True)
        assert any(not np.array_equal(one, two) for one, two in final), name


def spoken(queries=40, d=12, seed=0):
    """Lists whose texts and images are sums of what their words mean; returns the meanings as well."""
    rng = np.random.default_rng(seed)
    colours, glasses = ["pink", "red", "blue"], ["coupe", "flute"]
    meaning = {f"color={c}": rng.normal(size=d) for c in colours} | {
        f"glass={g}": rng.normal(size=d) for g in glasses
    }
    lists = development(queries=queries, d=d).lists
    wanted = tuple((f"color={rng.choice(colours)}", f"glass={rng.choice(glasses)}") for _ in range(queries))
    text = np.stack([meaning[c] + meaning[g] for c, g in wanted]).astype(np.float32)
    return lists._replace(constraints=wanted, text=text + rng.normal(size=text.shape) * 0.01), meaning


def test_what_a_word_adds_to_a_query_is_found_in_the_images():
    lists, meaning = spoken()
    show = ["color=pink", "color=red", "color=blue"]
    lists.image[:, :3] = np.stack([meaning[word] for word in show])
    words = encoding.vocabulary(lists)
    match = np.asarray(featurize(lists, features.fit(lists, words, SETTINGS), words).match)
    keys = ["color", "glass"]
    assert match.shape == (*lists.where.shape, 2 * len(keys))
    for q, (colour, _) in enumerate(lists.constraints):
        for column in (0, 2):  # along the word, and its share among the colours
            assert match[q, :3, column].argmax() == show.index(colour)
    np.testing.assert_allclose(np.sqrt(np.mean(match[lists.where] ** 2, axis=0)), 1, rtol=1e-3)
    assert (match[~lists.where] == 0).all()


def test_words_are_the_ridge_solution_by_hand():
    lists, _ = spoken()
    words = encoding.vocabulary(lists)
    axes, by_key = features.word_axes(lists, words)
    leaf = ["=" in token for token in words.constraints]
    wanted = np.array([[float(t in wants) for t in words.constraints] for wants in lists.constraints])[
        :, leaf
    ]
    text = lists.text.astype(np.float64)
    text, first = np.unique(text, axis=0, return_index=True)
    wanted = wanted[first]
    rows = np.vstack([wanted, np.sqrt(features.RIDGE) * np.eye(sum(leaf))])
    target = np.vstack([text - text.mean(axis=0), np.zeros((sum(leaf), text.shape[1]))])
    np.testing.assert_allclose(axes[leaf], np.linalg.lstsq(rows, target, rcond=None)[0], atol=1e-5)
    assert (axes[~np.array(leaf)] == 0).all()
    np.testing.assert_array_equal(by_key.sum(axis=0), np.array(leaf, float))


@pytest.mark.parametrize("missing", ["text", "image", "constraints", "another length"])
def test_without_a_shared_space_there_is_nothing_to_match(missing):
    lists, _ = spoken()
    if missing == "constraints":
        lists = lists._replace(constraints=((),) * len(lists.query_id))
    elif missing == "another length":
        lists = lists._replace(text=lists.text[:, :5])
    elif missing == "text":
        lists = lists._replace(text=np.full_like(lists.text, np.nan))
    else:
        lists = lists._replace(image=lists.image[..., :0])
    words = encoding.vocabulary(lists)
    result = featurize(lists, features.fit(lists, words, SETTINGS), words)
    assert np.isfinite(result.attributes).all()
    assert result.match.shape[-1] == (4 if missing == "text" else 0)  # as in a view that has texts
    for match, there in zip(np.asarray(result.match), lists.where, strict=True):
        assert (np.ptp(match[there], axis=0) == 0).all()  # no candidate matches better than another


def test_a_query_without_its_embedding_and_an_image_without_one_match_nothing_wrong():
    lists, _ = spoken()
    lists.text[0] = np.nan
    lists.image[1, 0] = np.nan
    words = encoding.vocabulary(lists)
    match = np.asarray(featurize(lists, features.fit(lists, words, SETTINGS), words).match)
    assert np.isfinite(match).all() and (match[1, 0, :2] == 0).all()  # it stands where the mean image does
    assert (match[0, 0] != 0).any()  # the words are known from the other queries


def test_matches_by_hand():
    """Two colours and one glass; the third image lies between the colours."""
    axes, by_key = np.eye(3), np.array([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    image, wants = np.array([[2.0, 0.0, 1.0], [0.0, 2.0, 0.0], [1.0, 1.0, 3.0]]), np.array([0.5, 0.0, 0.5])
    match = features.match_words(image, wants, axes, by_key)
    share = lambda x, y: np.log(np.exp(x) / (np.exp(x) + np.exp(y)))
    expected = [[1.0, 0.5, share(2, 0), 0], [0, 0, share(0, 2), 0], [0.5, 1.5, share(1, 1), 0]]
    np.testing.assert_allclose(match, expected, atol=1e-6)
    nothing = features.match_words(image, np.zeros(3), axes, by_key)
    np.testing.assert_array_equal(nothing, 0)
