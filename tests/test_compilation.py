"""Compiled programs are kept on disk, and never in the way."""

import sys

import jax
import pytest

from cotrr.compilation import keep_compiled


@pytest.fixture(autouse=True)
def restored():
    """JAX's own settings come back after each test."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_a_folder_of_this_user_and_processor(monkeypatch, tmp_path):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = keep_compiled()
    assert folder is not None
    assert folder.parent == tmp_path / "cotrr"
    assert jax.config.jax_compilation_cache_dir == str(folder)


def test_what_cannot_be_kept_is_not_kept(monkeypatch, tmp_path):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert keep_compiled() is None


def test_the_users_own_folder_goes_before(monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    assert keep_compiled() is None


def test_without_jax_nothing_is_imported(monkeypatch):
    monkeypatch.delitem(sys.modules, "jax")
    assert keep_compiled() is None
    assert "jax" not in sys.modules
