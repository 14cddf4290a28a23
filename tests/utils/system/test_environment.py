"""Streams, variables and signals that a program meets before its first line."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import BC, POINTMAZE

ROOT = Path(__file__).resolve().parents[3]


# Where the tests themselves run in the background, a child would ignore it.
HEEDS = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"


def run(script: str, *arguments: str, **environ: str) -> subprocess.CompletedProcess:
    """Runs a shell script in which "$@" is a Python program with arguments."""
    command = ["bash", "-c", script, "bash", sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environ, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams(closed, pointmaze, tmp_path):
    """Files of the run must not get the descriptors of standard streams."""
    flags = (*BC, f"--env_name={POINTMAZE}", f"--dataset={pointmaze}", "--offline_steps=2", f"--save_dir={tmp_path}")
    outcome = run(f'"$@" {closed}', "main.py", *flags)
    assert outcome.returncode == 0, outcome.stderr
    assert len(list(tmp_path.rglob("summary.json"))) == 1
    assert next(tmp_path.rglob("eval.csv")).read_text().startswith("step,")


def test_full_output_is_one_line(tmp_path):
    outcome = run(
        '"$@" > /dev/full', "main.py", "--env_name=robot:x", "--dataset=nothing.npz", f"--save_dir={tmp_path}"
    )
    assert outcome.returncode == 2 and outcome.stderr.count("\n") == 1, outcome.stderr


@pytest.mark.parametrize(("name", "value"), [("JAX_ENABLE_X64", "banana"), ("JAX_DEFAULT_MATMUL_PRECISION", "tf33")])
@pytest.mark.parametrize("program", [("main.py",), ("-m", "experiments.report", "nowhere")])
def test_variables_that_jax_cannot_read(name, value, program):
    outcome = run('"$@"', *program, **{name: value})
    assert outcome.returncode == 2
    assert outcome.stderr.startswith("error: JAX cannot be imported: ") and outcome.stderr.count("\n") == 1
    assert value in outcome.stderr


def test_interrupted_imports(tmp_path):
    """Ctrl-C while modules are imported."""
    (tmp_path / "slow.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    outcome = run('exec "$@"', "-c", f"{HEEDS}\nimport sys, utils; sys.path.append({str(tmp_path)!r}); import slow")
    assert outcome.returncode == -signal.SIGINT and outcome.stderr == "interrupted\n"


LOST = f"""
{HEEDS}
import gc, time
import utils

def _xla_gc_callback(*_):
    if not told:
        told.append(1)
        signal.raise_signal(signal.SIGINT)

told = []
gc.callbacks.append(_xla_gc_callback)
try:
    gc.collect()
    time.sleep(5)
    print("lost")
except KeyboardInterrupt:
    print("raised")
"""


def test_an_interrupt_in_a_garbage_collection_is_not_lost():
    outcome = run('"$@"', "-c", LOST)
    assert outcome.stdout == "raised\n" and outcome.stderr == "", outcome


def test_an_interrupt_while_xla_compiles_is_an_exit_code(tmp_path):
    """Not a crash of the interpreter's teardown."""
    (tmp_path / "program.py").write_text(
        f"{HEEDS}\nimport os, threading, time, jax\n"
        "from utils.system import entry_point\n"
        "def main(argv):\n"
        "    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "    while True:\n"
        "        jax.jit(lambda x, i=time.time(): x @ x + i).lower(jax.numpy.ones((64, 64))).compile()\n"
        "entry_point.run_main(main)\n"
    )
    outcome = run('"$@"', str(tmp_path / "program.py"), PYTHONPATH=str(ROOT))
    assert outcome.returncode == 130 and outcome.stderr.endswith("interrupted\n"), outcome
