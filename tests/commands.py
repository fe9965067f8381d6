"""Launchers as commands: run in the tests' own process, or in processes of their own."""

import contextlib
import io
import os
import pathlib
import runpy
import signal
import socket
import subprocess
import sys
import time
import warnings
from typing import NamedTuple
from unittest import mock

import pytest
from absl import app
from absl.testing import flagsaver

ROOT = pathlib.Path(__file__).resolve().parents[1]


class Ended(NamedTuple):
    """A launcher that has run: its exit status, and what it said where."""

    status: int
    output: str
    errors: str


def run(name: str, *arguments: object) -> Ended:
    """Runs a launcher to its end as `python -m` does, but in this process."""
    argv, output, errors = [name, *map(str, arguments)], io.StringIO(), io.StringIO()
    app.define_help_flags()  # once in a process: not to be among the flags that go when it ends
    with (
        contextlib.chdir(ROOT),
        mock.patch.object(sys, "argv", argv),
        flagsaver.flagsaver(),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
        warnings.catch_warnings(),
    ):
        # A launcher may have been imported before, by a test or by another launcher.
        warnings.filterwarnings("ignore", "'experiments.* found in sys.modules", RuntimeWarning)
        with pytest.raises(SystemExit) as end:
            runpy.run_module(f"experiments.{name}", run_name="__main__", alter_sys=True)
    return Ended(end.value.code or 0, output.getvalue(), errors.getvalue())


def launch(name: str, *arguments: object, fails: int = 0) -> str:
    """Runs a launcher, which must end with status `fails`; returns all that it said."""
    ended = run(name, *arguments)
    said = ended.output + ended.errors
    assert ended.status == fails, said
    return said


def start(name: str, *arguments: object) -> subprocess.Popen:
    """Starts a launcher in a process of its own; its standard output has all that it says."""
    return subprocess.Popen(
        [sys.executable, "-m", f"experiments.{name}", *map(str, arguments)],
        cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def in_two_processes(name: str, *arguments: object, fails: int = 0) -> list[str]:
    """What each of two processes says that together are a training launcher; both must end with a status."""
    shared = [name, *arguments, "--distributed", f"--coordinator=localhost:{free_port()}", "--processes=2"]
    both = [start(*shared, f"--process={k}") for k in range(2)]
    said = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [fails, fails], said
    return said


def log_of(folder):
    """The file that is a run's log, by its number, and how many epochs it holds."""
    path = folder / "epochs.jsonl"
    return (path.stat().st_ino, path.read_bytes().count(b"\n")) if path.exists() else (0, 0)


def stop_when(process, holds):
    """Stops a process at a moment when `holds()`."""
    while process.poll() is None:
        if holds():
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            if holds():
                return
            process.send_signal(signal.SIGCONT)
        time.sleep(0.001)
    pytest.fail(f"it was over too early: {process.communicate()[0]}")


def make_data(folder: pathlib.Path, queries: int, candidates: int, fractions: str) -> pathlib.Path:
    """A dataset of a simulated run; the run is `runs/one` of the folder."""
    launch("simulate_run", f"--output={folder / 'runs' / 'one'}", f"--queries={queries}",
           f"--candidates={candidates}")  # fmt: skip
    launch("generate_training_data", f"--input={folder / 'runs' / 'latest'}", f"--output={folder / 'data'}",
           f"--fractions={fractions}")  # fmt: skip
    return folder / "data"
