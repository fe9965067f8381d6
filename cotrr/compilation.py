"""JAX's compiled programs, kept on disk, so that a launcher compiles a program once."""

import hashlib
import os
import pathlib
import platform
import sys

# An option of jax.jit: vectors as wide as a CPU has, a third faster; other devices ignore it.
WIDE = {"xla_cpu_prefer_vector_width": 512}


def keep_compiled() -> pathlib.Path | None:
    """Points JAX, where it is imported, to a cache folder of this user and processor.

    JAX_COMPILATION_CACHE_DIR, where set, goes before.  None where nothing is kept: a folder that
    cannot be made is no reason to stop.
    """
    jax = sys.modules.get("jax")
    if jax is None or os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return None
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = pathlib.Path(home) / "cotrr" / f"jax-{_processor()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    return folder


def _processor() -> str:
    """Names what the processor can do: a program for another one may hold instructions that it lacks."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        features = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        features = f"{platform.machine()} {platform.processor()}"
    return hashlib.sha256(features.encode()).hexdigest()[:12]
