"""Tests of the resampling: the generator, the law of its counts, and sums that are the same everywhere."""

import hashlib
import os
import pathlib
import subprocess
import sys
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.random import threefry_2x32
from scipy import stats

from cotrr.evaluate import auc, bootstrap
from cotrr.evaluate.bootstrap import Draw

few = settings(max_examples=100, deadline=None, derandomize=True, database=None)
ROOT = pathlib.Path(__file__).parents[2]
UNITS = (12, 60, 400)  # all drawn one by one; mostly one by one; mostly Poisson
B = 4096


def drawn(units, resamples=B, seed=0):
    """[B, U] counts by NumPy."""
    return bootstrap.counts(np, seed, np.arange(resamples), units)


def drawn_by_jax(units, replicates, seed=0, weights=bootstrap.counts):
    """[c, U] counts by JAX; traced anew each time, so that no test reuses another's constants."""
    compiled = jax.jit(lambda seed, ids: weights(jnp, seed, ids, units))
    return np.asarray(compiled(jnp.uint32(seed), jnp.asarray(replicates, jnp.uint32)))


class TestThreefry:
    @pytest.mark.parametrize(
        ("key", "counter", "words"),
        [
            ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
            ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 2, (0x1CB996FC, 0xBB002BE7)),
            ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
        ],
    )
    def test_published_vectors(self, key, counter, words):
        array = lambda value: np.array([value], np.uint32)
        found = bootstrap.threefry(np, tuple(map(array, key)), *map(array, counter))
        assert tuple(int(word[0]) for word in found) == words

    def test_equals_that_of_jax(self):
        rng = np.random.default_rng(0)
        for _ in range(5):
            key, counter = rng.integers(0, 2**32, 2, np.uint32), rng.integers(0, 2**32, (2, 50), np.uint32)
            expected = np.asarray(threefry_2x32(jnp.asarray(key), jnp.asarray(counter.ravel())))
            found = bootstrap.threefry(np, (key[:1], key[1:]), *counter)
            np.testing.assert_array_equal(np.concatenate(found), expected)


class TestIndex:
    edges = np.array([0, 1, 0xFFFF, 0x10000, 0x10001, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF], np.uint32)

    @few
    @given(st.one_of(st.sampled_from([1, 2, 3, 0xFFFF, 0x10000, 0x10001, 2**31]), st.integers(1, 2**31)),
           st.lists(st.integers(0, 2**32 - 1), max_size=20))  # fmt: skip
    def test_is_a_product_of_whole_numbers(self, units, words):
        words = np.r_[self.edges, np.array(words, np.uint32)]
        expected = [int(word) * units >> 32 for word in words]
        found = bootstrap._index(np, words, units)
        assert found.dtype == np.int32
        assert found.tolist() == expected
        assert min(expected) >= 0 and max(expected) < units

    def test_jax_does_the_same(self):
        for units in (7, 70_001, 2**31 - 1):
            found = bootstrap._index(jnp, jnp.asarray(self.edges), units)
            np.testing.assert_array_equal(found, bootstrap._index(np, self.edges, units))


def test_a_seed_draws_the_same_in_every_version():
    """A report tells its seed, so that its figures can be had again."""
    assert bootstrap.counts(np, 0, np.arange(2), 12).tolist() == [
        [0, 1, 1, 1, 2, 2, 1, 0, 0, 1, 2, 1],
        [0, 1, 2, 0, 0, 2, 0, 1, 2, 1, 1, 2],
    ]
    assert bootstrap.counts(np, 7, np.array([10**6]), 12).tolist() == [[2, 0, 1, 1, 3, 0, 1, 1, 0, 2, 1, 0]]
    assert bootstrap.flips(np, 0, np.arange(1), 12).tolist() == [[1, 0, 1, 1, 0, 0, 0, 1, 0, 1, 0, 1]]


class TestCounts:
    @pytest.mark.parametrize("units", [1, 2, 25, 26, *UNITS, 5000])
    def test_every_replicate_draws_as_many_units_as_there_are(self, units):
        counts = drawn(units, 40)
        assert counts.shape == (40, units)
        assert counts.dtype == np.int32
        assert counts.min() >= 0
        assert (counts.sum(axis=1) == units).all()

    @pytest.mark.parametrize("units", UNITS)
    def test_moments_are_multinomial(self, units):
        counts = drawn(units)
        covariance = np.cov(counts.T)
        np.testing.assert_allclose(counts.mean(axis=0), 1, atol=5 / np.sqrt(B))
        # A count's variance is about 1, its fourth central moment about 4: sd of s² is √(3/B).
        np.testing.assert_allclose(np.diag(covariance), 1 - 1 / units, atol=5 * np.sqrt(3 / B))
        apart = covariance[~np.eye(units, dtype=bool)]
        np.testing.assert_allclose(apart, -1 / units, atol=6 / np.sqrt(B))
        # Rows sum to U, so all covariances together are not free: they tell of the variances.
        assert apart.mean() == pytest.approx(-np.diag(covariance).mean() / (units - 1))

    @pytest.mark.parametrize("units", UNITS)
    def test_a_unit_is_drawn_binomially(self, units):
        counts = drawn(units)
        for unit in (0, units // 2, units - 1):
            assert binomial_p(counts[:, unit], units, 1 / units) > 1e-3

    @pytest.mark.parametrize("units", UNITS)
    def test_units_together_are_drawn_binomially(self, units):
        counts, half = drawn(units), units // 2
        # Units half a row apart share a call of the generator.
        for together in ([0, 1], [0, half], [half, units - 1], range(half)):
            total = counts[:, list(together)].sum(axis=1)
            assert binomial_p(total, units, len(together) / units) > 1e-3

    @pytest.mark.parametrize("units", UNITS)
    def test_all_units_are_drawn_alike(self, units):
        assert stats.chisquare(drawn(units).sum(axis=0)).pvalue > 1e-3

    @pytest.mark.parametrize("units", UNITS)
    def test_replicates_and_seeds_are_not_copies_of_each_other(self, units):
        counts, other = drawn(units), drawn(units, seed=1)
        assert len(np.unique(counts, axis=0)) > 0.99 * B
        for a, b in ((counts[1:], counts[:-1]), (counts, other)):
            assert np.mean((a - 1) * (b - 1)) == pytest.approx(0, abs=5 / np.sqrt(B * units))

    @pytest.mark.parametrize("units", [1, *UNITS])
    def test_jax_draws_the_same(self, units):
        np.testing.assert_array_equal(drawn_by_jax(units, np.arange(50)), drawn(units, 50))

    @pytest.mark.parametrize("units", UNITS)
    def test_chunks_their_order_and_further_replicates_change_nothing(self, units):
        counts, of = drawn(units, 50), lambda ids: bootstrap.counts(np, 0, np.array(ids), units)
        np.testing.assert_array_equal(of(range(7, 20)), counts[7:20])
        np.testing.assert_array_equal(of([30, 3, 3]), counts[[30, 3, 3]])
        np.testing.assert_array_equal(np.concatenate([of([b]) for b in range(50)]), counts)


def binomial_p(observed, trials, chance):
    """p-value of a χ² test of draws against Binomial(trials, chance), rare counts taken together."""
    law = stats.binom(trials, chance)
    low, high = (int(law.ppf(tail)) for tail in (0.005, 0.995))
    seen = np.bincount(np.clip(observed, low, high) - low, minlength=high - low + 1)
    expected = np.r_[law.cdf(low), law.pmf(range(low + 1, high)), law.sf(high - 1)] * len(observed)
    return stats.chisquare(seen, expected).pvalue


class TestRejection:
    """With a small SPREAD many Poisson totals are too high or too low, and are drawn anew."""

    @pytest.fixture(autouse=True, params=UNITS[1:])
    def units(self, request, monkeypatch):
        monkeypatch.setattr(bootstrap, "SPREAD", 0.3)
        return request.param

    def test_many_rows_are_drawn_anew_and_all_sums_are_exact(self, units, monkeypatch):
        streams, words = [], bootstrap._words

        def record(xp, seed, stream, *rest):
            streams.append(int(stream))
            return words(xp, seed, stream, *rest)

        monkeypatch.setattr(bootstrap, "_words", record)
        counts = drawn(units, 200)
        assert {0, 1, 2, 4, 6} <= set(streams)
        assert (counts.sum(axis=1) == units).all()
        assert counts.min() == 0

    def test_jax_draws_the_same(self, units):
        np.testing.assert_array_equal(drawn_by_jax(units, np.arange(200)), drawn(units, 200))

    def test_a_row_does_not_depend_on_those_beside_it(self, units):
        alone = [bootstrap.counts(np, 0, np.array([b]), units)[0] for b in range(60)]
        np.testing.assert_array_equal(alone, drawn(units, 60))

    def test_the_law_stays(self, units):
        counts = drawn(units)
        for unit in (0, units - 1):
            assert binomial_p(counts[:, unit], units, 1 / units) > 1e-3
        assert binomial_p(counts[:, : units // 2].sum(axis=1), units, units // 2 / units) > 1e-3
        assert stats.chisquare(counts.sum(axis=0)).pvalue > 1e-3


class TestFlips:
    flips = bootstrap.flips(np, 3, np.arange(B), 70)

    def test_are_heads_or_tails_equally_often(self):
        assert set(np.unique(self.flips)) == {0, 1}
        assert self.flips.mean() == pytest.approx(0.5, abs=2 / np.sqrt(B * 70))
        np.testing.assert_allclose(self.flips.mean(axis=0), 0.5, atol=2.25 / np.sqrt(B))
        np.testing.assert_allclose(self.flips.mean(axis=1), 0.5, atol=2.25 / np.sqrt(70))

    def test_are_independent_of_each_other_and_of_the_counts(self):
        signs = 1 - 2 * self.flips
        together = signs.T @ signs / B - np.eye(70)
        np.testing.assert_allclose(together, 0, atol=5 / np.sqrt(B))
        assert np.mean(signs[1:] * signs[:-1]) == pytest.approx(0, abs=4 / np.sqrt(B * 70))
        counts = bootstrap.counts(np, 3, np.arange(B), 70)
        assert np.mean(signs * (counts - 1)) == pytest.approx(0, abs=4 / np.sqrt(B * 70))

    @pytest.mark.parametrize("units", [1, 31, 32, 33, 70])
    def test_jax_draws_the_same(self, units):
        found = bootstrap.flips(np, 3, np.arange(50), units)
        assert found.shape == (50, units)
        np.testing.assert_array_equal(drawn_by_jax(units, np.arange(50), 3, bootstrap.flips), found)

    def test_chunks_change_nothing(self):
        np.testing.assert_array_equal(bootstrap.flips(np, 3, np.arange(20, 50), 70), self.flips[20:50])

    def test_seed_decides(self):
        other = bootstrap.flips(np, 4, np.arange(B), 70)
        assert np.mean(self.flips == other) == pytest.approx(0.5, abs=0.01)


def from_digits(digits, size):
    """The values that digits stand for."""
    places = 2.0 ** (bootstrap.BITS * np.arange(bootstrap.DIGITS))
    return np.tensordot(places, digits.astype(np.float64), axes=1) * size


class TestFixedPoint:
    @few
    @given(st.lists(st.floats(-1, 1), min_size=1, max_size=8), st.integers(-1000, 1000))
    def test_every_value_is_held_to_a_part_of_the_largest(self, values, power):
        values = np.ldexp(np.array(values), power)[:, None]
        digits, size = bootstrap.fixed_point(values)
        largest = np.abs(values).max()
        assert digits.dtype == np.float32
        assert np.abs(from_digits(digits, size) - values).max() <= 2.0**-33 * largest
        # What float32 adds up exactly: whole digits of 11 bits.
        np.testing.assert_array_equal(digits, np.rint(digits))
        assert np.abs(digits).max() <= 2**bootstrap.BITS

    @pytest.mark.parametrize("scale", [2.0**-900, 1.0, 2.0**900])
    @pytest.mark.parametrize(
        "values", [[0, 0], [1, -1, 0], [0.5, 1, -0.25], [1 - 2.0**-33, 2.0**-33, -(2.0**-33)]]
    )
    def test_what_fits_is_exact(self, values, scale):
        values = np.array(values)[:, None] * scale
        np.testing.assert_array_equal(from_digits(*bootstrap.fixed_point(values)), values)

    def test_no_more_than_the_digits_is_held(self):
        values = np.random.default_rng(0).random((200_000, 4))
        tracemalloc.start()
        digits, _ = bootstrap.fixed_point(values)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert digits.nbytes == 12 * values.size
        assert peak < digits.nbytes + 10 * 8 * values[: bootstrap.BLOCK].size

    def test_columns_have_sizes_of_their_own(self):
        values = np.array([[1e-9, 1e9], [3e-9, -2e9]])
        np.testing.assert_allclose(from_digits(*bootstrap.fixed_point(values)), values, rtol=2.0**-32)

    def test_block_of_largest_digits_adds_up_in_float32(self):
        # Drawn twice on average, as a block of 4096 units is in no resample that will ever be seen.
        assert bootstrap.BLOCK * 2 * 2**bootstrap.BITS <= 2**24


def values_of(units, columns=3, seed=1):
    """Values of different scales, signs and zeros."""
    values = np.random.default_rng(seed).normal(size=(units, columns)) * 10.0 ** np.arange(columns)
    values[::7, 0] = 0
    return values


@pytest.fixture
def chunked(monkeypatch):
    """Small blocks of units and chunks of replicates; what was compiled for others is not used."""
    monkeypatch.setattr(bootstrap, "BLOCK", 16)
    bootstrap._sum_chunk.clear_cache()
    yield
    bootstrap._sum_chunk.clear_cache()


class TestSums:
    @pytest.mark.parametrize("backend", ["numpy", "jax"])
    def test_whole_numbers_are_summed_exactly(self, backend):
        values = np.random.default_rng(0).integers(-(2**30), 2**30, (50, 2))
        values[0] = 2**30  # the size of the column
        found = bootstrap.weighted_sums(Draw(5, 64, 50, backend), values)
        expected = bootstrap.counts(np, 5, np.arange(64), 50).astype(np.int64) @ values
        assert found.dtype == np.float64
        assert found.T.astype(np.int64).tolist() == expected.tolist()

    @pytest.mark.parametrize("units", [12, 400, 5 * bootstrap.BLOCK - 480])  # sums beyond 2^24
    def test_equal_those_of_float64_and_backends_agree_in_every_bit(self, units):
        values = values_of(units)
        found, by_jax = (bootstrap.weighted_sums(Draw(2, 96, units, b), values) for b in ("numpy", "jax"))
        assert found.tobytes() == by_jax.tobytes()
        expected = drawn(units, 96, 2) @ values
        largest = np.abs(values).max(axis=0)
        assert (np.abs(found.T - expected) <= 2.0**-33 * units * largest).all()

    @pytest.mark.parametrize("units", [15, 96, 100])  # less than a block; whole ones; some left over
    def test_blocks_and_chunks_change_no_bit(self, units, chunked, monkeypatch):
        values = values_of(units)
        whole = Draw(2, 96, units, "numpy")
        in_blocks = bootstrap.weighted_sums(whole, values)
        by_jax = bootstrap.weighted_sums(whole._replace(backend="jax"), values)
        monkeypatch.setattr(bootstrap, "on_cpu", lambda: False)  # larger chunks
        larger = bootstrap.weighted_sums(whole._replace(backend="jax"), values)
        monkeypatch.undo()
        expected = bootstrap.weighted_sums(whole, values)
        assert expected.tobytes() == in_blocks.tobytes() == by_jax.tobytes() == larger.tobytes()

    @pytest.mark.parametrize("backend", ["numpy", "jax"])
    def test_further_replicates_and_columns_change_no_bit(self, backend):
        values, draw = values_of(300), Draw(2, 1100, 300, backend)  # JAX: two calls of several chunks
        found = bootstrap.weighted_sums(draw, values)
        np.testing.assert_array_equal(
            bootstrap.weighted_sums(draw._replace(resamples=96, backend="numpy"), values), found[:, :96]
        )
        np.testing.assert_array_equal(bootstrap.weighted_sums(draw, values[:, 1:]), found[1:])

    @pytest.mark.parametrize("backend", ["numpy", "jax"])
    def test_flipped_sums_change_the_signs_of_units(self, backend):
        values = values_of(70)
        found = bootstrap.flipped_sums(Draw(3, 96, 70, backend), values)
        np.testing.assert_allclose(found.T, (1 - 2 * TestFlips.flips[:96]) @ values, rtol=1e-7, atol=1e-6)

    def test_weights_do_not_mix_in_the_memory_of_small_draws(self):
        draw, ones = Draw(3, 96, 70), np.ones((70, 1))
        assert (bootstrap.weighted_sums(draw, ones) == 70).all()
        assert (np.abs(bootstrap.flipped_sums(draw, ones)) < 70).all()
        assert (bootstrap.weighted_sums(draw, ones) == 70).all()

    @pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
    def test_what_is_undefined_is_refused(self, broken):
        with pytest.raises(ValueError, match="finite"):
            bootstrap.weighted_sums(Draw(0, 8, 3), np.array([[1.0], [broken], [2.0]]))

    @pytest.mark.parametrize("backend", ["numpy", "jax"])
    def test_seed_is_an_unsigned_32_bit_number(self, backend):
        values = values_of(12)
        sums = lambda seed: bootstrap.weighted_sums(Draw(seed, 32, 12, backend), values)
        assert len({sums(seed).tobytes() for seed in (0, 1, 2**31, 2**32 - 1)}) == 4
        for seed in (-1, 2**32):
            with pytest.raises(OverflowError):
                sums(seed)

    def test_numpy_does_small_work_alone(self):
        assert Draw(0, 1000, bootstrap.SMALL // 1000).small
        assert not Draw(0, 1000, bootstrap.SMALL // 1000 + 1).small
        assert Draw(0, 1000, 10**6, "numpy").small
        assert not Draw(0, 1, 1, "jax").small


SUMS = """
import jax
from cotrr.evaluate import auc
from tests.evaluate import test_bootstrap
auc.UNROLLED = 4  # so that eight devices are compiled for in seconds; no bit depends on it
print(jax.local_device_count(), test_bootstrap.digest("jax"))
"""


def digest(backend):
    """Of the bytes of all sums and wins of one draw."""
    rng = np.random.default_rng(0)
    draw, items = Draw(3, 600, 70, backend), (rng.integers(0, 70, 200), rng.integers(0, 50, 200) / 50)
    sums = bootstrap.weighted_sums(draw, values_of(70))
    wins = auc.weighted_wins(draw, auc.sort_items(*items, rng.random(200) < 0.4))
    assert sums.shape == (3, 600) and wins.shape == (600,)
    return " ".join(hashlib.sha256(part.tobytes()).hexdigest() for part in (sums, wins))


def run(script, **environment):
    """What a Python of its own prints."""
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_eight_devices_give_the_bits_of_one_and_of_numpy():
    count, *found = run(SUMS, XLA_FLAGS="--xla_force_host_platform_device_count=8")
    assert count == "8"
    assert jax.local_device_count() == 1
    assert " ".join(found) == digest("jax") == digest("numpy")


PEAK = """
import resource, numpy as np
from cotrr.evaluate import bootstrap
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
values = np.random.default_rng(0).random(({units}, {columns}))
bootstrap.weighted_sums(bootstrap.Draw(0, 4, 3_000, "jax"), values[:3_000])  # what a compiler needs
before = peak()
bootstrap.weighted_sums(bootstrap.Draw(0, {resamples}, {units}), values)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
@pytest.mark.parametrize(("units", "columns", "resamples"), [(30_000, 8, 1000), (1_000_000, 1, 160)])
def test_memory_stays_far_below_that_of_all_counts(units, columns, resamples):
    megabytes = int(run(PEAK.format(units=units, columns=columns, resamples=resamples))[0]) / 1024
    assert megabytes < units * resamples * 4 / 1e6 * 0.6  # measured: 33 of 120, 266 of 640
