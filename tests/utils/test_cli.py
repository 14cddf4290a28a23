"""What all programs do before they start."""

import os
import subprocess
import sys

import pytest

from utils.runs import ROOT

PROGRAM = """
import sys
import jax, jax.numpy as jnp
from utils import cli

def main(argv):
    jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((40, 40))).block_until_ready()
    print(jax.config.jax_compilation_cache_dir)

cli.run(main)
"""


@pytest.mark.parametrize("given", [False, True])
def test_what_is_compiled_is_kept(tmp_path, given):
    """In the user's cache directory, unless told otherwise; a place that cannot be written is no reason to stop."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    environment |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    environment |= {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "own")} if given else {}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    directory = done.stdout.strip()
    if given:
        assert directory == str(tmp_path / "own")
    else:
        assert directory.startswith(str(tmp_path / "cache" / "otql" / "compiled-"))
        assert os.listdir(directory)
        (tmp_path / "file").write_text("")
        environment["XDG_CACHE_HOME"] = str(tmp_path / "file")
        again = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert again.returncode == 0, again.stderr


@pytest.mark.parametrize("lines", [1, 100_000])
def test_closed_output_is_no_error(lines):
    program = f"from utils import cli; cli.run(lambda argv: print('line\\n' * {lines}))"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141
