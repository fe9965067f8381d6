"""CIEDE2000 against the published pairs, on NumPy and on JAX."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cotrr.data.color import delta_e_2000

# Sharma, Wu & Dalal (2005), table 1: L1 a1 b1 L2 a2 b2 difference. The pairs are chosen to expose
# wrong branches: hues beyond 180 degrees apart, mean hues across 0, zero chroma, the blue rotation.
PUBLISHED = np.array(
    [
        [50.0000, 2.6772, -79.7751, 50.0000, 0.0000, -82.7485, 2.0425],
        [50.0000, 3.1571, -77.2803, 50.0000, 0.0000, -82.7485, 2.8615],
        [50.0000, 2.8361, -74.0200, 50.0000, 0.0000, -82.7485, 3.4412],
        [50.0000, -1.3802, -84.2814, 50.0000, 0.0000, -82.7485, 1.0000],
        [50.0000, -1.1848, -84.8006, 50.0000, 0.0000, -82.7485, 1.0000],
        [50.0000, -0.9009, -85.5211, 50.0000, 0.0000, -82.7485, 1.0000],
        [50.0000, 0.0000, 0.0000, 50.0000, -1.0000, 2.0000, 2.3669],
        [50.0000, -1.0000, 2.0000, 50.0000, 0.0000, 0.0000, 2.3669],
        [50.0000, 2.4900, -0.0010, 50.0000, -2.4900, 0.0009, 7.1792],
        [50.0000, 2.4900, -0.0010, 50.0000, -2.4900, 0.0010, 7.1792],
        [50.0000, 2.4900, -0.0010, 50.0000, -2.4900, 0.0011, 7.2195],
        [50.0000, 2.4900, -0.0010, 50.0000, -2.4900, 0.0012, 7.2195],
        [50.0000, -0.0010, 2.4900, 50.0000, 0.0009, -2.4900, 4.8045],
        [50.0000, -0.0010, 2.4900, 50.0000, 0.0010, -2.4900, 4.8045],
        [50.0000, -0.0010, 2.4900, 50.0000, 0.0011, -2.4900, 4.7461],
        [50.0000, 2.5000, 0.0000, 50.0000, 0.0000, -2.5000, 4.3065],
        [50.0000, 2.5000, 0.0000, 73.0000, 25.0000, -18.0000, 27.1492],
        [50.0000, 2.5000, 0.0000, 61.0000, -5.0000, 29.0000, 22.8977],
        [50.0000, 2.5000, 0.0000, 56.0000, -27.0000, -3.0000, 31.9030],
        [50.0000, 2.5000, 0.0000, 58.0000, 24.0000, 15.0000, 19.4535],
        [50.0000, 2.5000, 0.0000, 50.0000, 3.1736, 0.5854, 1.0000],
        [50.0000, 2.5000, 0.0000, 50.0000, 3.2972, 0.0000, 1.0000],
        [50.0000, 2.5000, 0.0000, 50.0000, 1.8634, 0.5757, 1.0000],
        [50.0000, 2.5000, 0.0000, 50.0000, 3.2592, 0.3350, 1.0000],
        [60.2574, -34.0099, 36.2677, 60.4626, -34.1751, 39.4387, 1.2644],
        [63.0109, -31.0961, -5.8663, 62.8187, -29.7946, -4.0864, 1.2630],
        [61.2901, 3.7196, -5.3901, 61.4292, 2.2480, -4.9620, 1.8731],
        [35.0831, -44.1164, 3.7933, 35.0232, -40.0716, 1.5901, 1.8645],
        [22.7233, 20.0904, -46.6940, 23.0331, 14.9730, -42.5619, 2.0373],
        [36.4612, 47.8580, 18.3852, 36.2715, 50.5065, 21.2231, 1.4146],
        [90.8027, -2.0831, 1.4410, 91.1528, -1.6435, 0.0447, 1.4441],
        [90.9257, -0.5406, -0.9208, 88.6381, -0.8985, -0.7239, 1.5381],
        [6.7747, -0.2908, -2.4247, 5.8714, -0.0985, -2.2286, 0.6377],
        [2.0776, 0.0795, -1.1350, 0.9033, -0.0636, -0.5514, 0.9082],
    ]
)
FIRST, SECOND, DIFFERENCE = PUBLISHED[:, :3], PUBLISHED[:, 3:6], PUBLISHED[:, 6]


def some_labs(count: int, seed: int) -> np.ndarray:
    """Colours [count, 3] over the range of photographs; every seventh one is an exact grey."""
    labs = np.random.default_rng(seed).uniform((0, -90, -90), (100, 90, 90), (count, 3))
    labs[::7, 1:] = 0.0
    return labs


@pytest.mark.parametrize("pair", range(34))
def test_equals_the_published_difference(pair: int) -> None:
    found = delta_e_2000(FIRST[pair], SECOND[pair])
    assert found == pytest.approx(DIFFERENCE[pair], abs=1e-4)


def test_is_symmetric() -> None:
    one, other = some_labs(500, 0), some_labs(500, 1)[::-1]
    np.testing.assert_allclose(delta_e_2000(one, other), delta_e_2000(other, one), rtol=1e-10)
    np.testing.assert_allclose(delta_e_2000(SECOND, FIRST), DIFFERENCE, atol=1e-4)


def test_is_zero_for_one_colour_and_positive_for_two() -> None:
    labs = some_labs(200, 2)
    np.testing.assert_allclose(delta_e_2000(labs, labs), 0.0, atol=1e-9)
    assert np.all(delta_e_2000(labs, labs + 0.5) > 0)


def test_two_greys_differ_by_weighted_lightness_alone() -> None:
    # The mean lightness is 50, where the weight S_L is 1.
    assert delta_e_2000(np.array([40.0, 0, 0]), np.array([60.0, 0, 0])) == pytest.approx(20.0)


def test_integers_are_colours_too() -> None:
    assert delta_e_2000(np.array([40, 0, 0]), np.array([60, 0, 0])) == pytest.approx(20.0)


def test_leading_dimensions_broadcast() -> None:
    rows, columns = some_labs(5, 3), some_labs(4, 4)
    table = delta_e_2000(rows[:, None], columns)
    assert table.shape == (5, 4)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            assert table[i, j] == pytest.approx(float(delta_e_2000(row, column)), rel=1e-12)


def test_jax_agrees_with_numpy_under_jit_and_vmap() -> None:
    one, other = some_labs(300, 5), some_labs(300, 6)
    expected = delta_e_2000(one, other)
    one_jax, other_jax = jnp.asarray(one, jnp.float32), jnp.asarray(other, jnp.float32)
    for function in (delta_e_2000, jax.jit(delta_e_2000), jax.jit(jax.vmap(delta_e_2000))):
        found = function(one_jax, other_jax)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_jax_broadcasts_even_where_rank_promotion_is_refused() -> None:
    rows, columns = jnp.asarray(some_labs(5, 7)), jnp.asarray(some_labs(4, 8))
    with jax.numpy_rank_promotion("raise"):
        assert jax.jit(delta_e_2000)(rows[:, None], columns).shape == (5, 4)
