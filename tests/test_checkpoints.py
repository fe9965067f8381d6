"""Checkpoints: what is loaded is what was saved, the last few are kept, halves are ignored."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cotrr.checkpoints import Checkpoints


class Small(NamedTuple):
    """A state with what a real one may hold."""

    params: dict
    key: jax.Array
    best: jax.Array


def state(value: float, seed: int = 0) -> Small:
    params = {"dense": {"kernel": jnp.full((2, 3), value), "count": jnp.int32(value)}}
    return Small(params, jax.random.key(seed), jnp.float32(jnp.inf))


def assert_equal(one: Small, other: Small) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    assert one.key.dtype == other.key.dtype
    plain = lambda s: s._replace(key=jax.random.key_data(s.key))
    for a, b in zip(*map(jax.tree.leaves, (plain(one), plain(other))), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def steps_in(folder):
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())


def test_nothing_there(tmp_path):
    with Checkpoints(tmp_path / "new") as kept:
        assert kept.load_latest(state(0)) is None


def test_a_state_comes_back_with_its_typed_key(tmp_path):
    with Checkpoints(tmp_path) as kept:
        kept.save(3, state(1.5, seed=42))
    with Checkpoints(tmp_path) as kept:
        loaded = kept.load(3, state(0.0))
    assert_equal(loaded, state(1.5, seed=42))
    assert jnp.issubdtype(loaded.key.dtype, jax.dtypes.prng_key)
    draw = jax.random.uniform(jax.random.key(42), (3,))
    np.testing.assert_array_equal(jax.random.uniform(loaded.key, (3,)), draw)


@pytest.mark.parametrize("keep", [1, 2])
def test_the_last_few_are_kept(tmp_path, keep):
    with Checkpoints(tmp_path, keep) as kept:
        for step in (1, 2, 5, 10):
            kept.save(step, state(step))
        assert kept.load_latest(state(0))[1] == 10
    assert steps_in(tmp_path) == [5, 10][-keep:]
    with Checkpoints(tmp_path, keep) as kept:
        assert kept.load_latest(state(0))[1] == 10
        assert_equal(kept.load(10, state(0)), state(10))


def test_a_step_may_be_saved_again(tmp_path):
    with Checkpoints(tmp_path) as kept:
        kept.save(4, state(1))
        kept.save(4, state(2))
        assert_equal(kept.load(4, state(0)), state(2))


def test_a_half_written_checkpoint_is_ignored(tmp_path):
    with Checkpoints(tmp_path) as kept:
        kept.save(1, state(1))
        kept.save(2, state(2))
    half = tmp_path / "7.orbax-checkpoint-tmp"
    half.mkdir()
    (half / "pytree").mkdir()
    (half / "pytree" / "part").write_bytes(b"half")
    with Checkpoints(tmp_path) as kept:
        assert kept.load_latest(state(0))[1] == 2
        assert_equal(kept.load(2, state(0)), state(2))
        kept.save(3, state(3))
        assert kept.load_latest(state(0))[1] == 3
        assert_equal(kept.load(3, state(0)), state(3))
    assert not half.exists() and steps_in(tmp_path) == [2, 3]


def test_a_damaged_checkpoint_is_put_aside_and_steps_before_it_can_be_saved(tmp_path):
    folder = tmp_path / "checkpoints"
    with Checkpoints(folder) as kept:
        kept.save(20, state(20))
        kept.save(40, state(40))
    for path in (folder / "40").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:20])
    with Checkpoints(folder) as kept:
        with pytest.warns(UserWarning, match="step 40 is damaged"):
            loaded, step = kept.load_latest(state(0))
        assert step == 20
        assert_equal(loaded, state(20))
        kept.save(30, state(30))
        assert_equal(kept.load(30, state(0)), state(30))
        with pytest.raises(OSError, match="later than step 25"):
            kept.save(25, state(25))
    assert steps_in(folder) == [20, 30] and (tmp_path / "damaged-checkpoints-40").exists()
