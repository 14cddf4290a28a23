"""Variables that JAX, XLA and MuJoCo read: what cannot be is one line, what can be changes no number."""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from utils.coupling import squared_distances
from utils.system.files import ROOT
from utils.system.jax_setup import matmul_precision

PROGRAM = """
import numpy as np
import jax, jax.numpy as jnp
from utils.system import entry_point

def main(argv):
    x = jax.jit(lambda x: jnp.ones((2, 1)) + x * jax.random.uniform(jax.random.PRNGKey(0), (3,)))(np.arange(3.0))
    print(x.dtype, x.tolist())

entry_point.run_main(main)
"""

MAKE = (
    "from envs import tasks; from utils.system.entry_point import run_main; "
    "run_main(lambda argv: tasks.make_env('gym:{}'))"
)


def run(*command, **environment):
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, cwd=ROOT)


@pytest.fixture(scope="module")
def expected():
    """Output of the program where nothing is set."""
    done = run("-c", PROGRAM)
    assert done.returncode == 0 and done.stdout.startswith("float32")
    return done.stdout


@pytest.mark.parametrize(
    "variables",
    [
        {"JAX_ENABLE_X64": "1"},
        {"JAX_NUMPY_RANK_PROMOTION": "raise", "JAX_NUMPY_DTYPE_PROMOTION": "strict", "JAX_LEGACY_PRNG_KEY": "error"},
        {"XLA_FLAGS": "--xla_cpu_enable_fast_math=false"},
    ],
)
def test_numbers_are_the_programs_own(variables, expected):
    done = run("-c", PROGRAM, **variables)
    assert (done.returncode, done.stdout, done.stderr) == (0, expected, "")


@pytest.mark.parametrize(
    "variables,line",
    [
        ({"JAX_PLATFORMS": "cuda"}, "JAX finds no device with JAX_PLATFORMS=cuda"),
        ({"JAX_PLATFORMS": "cqu"}, "JAX finds no device with JAX_PLATFORMS=cqu (Unable to initialize backend 'cqu'"),
        ({"XLA_FLAGS": "--xla_f=1"}, "XLA fails with XLA_FLAGS=--xla_f=1: Unknown flag in XLA_FLAGS: --xla_f=1"),
        ({"XLA_FLAGS": "fast"}, 'XLA fails with XLA_FLAGS=fast: Could not open file "fast"'),
    ],
)
def test_what_cannot_be_is_one_line(variables, line):
    if variables.get("JAX_PLATFORMS") == "cuda" and run("-c", "import jax; jax.devices('cuda')").returncode == 0:
        pytest.skip("there is a GPU")
    done = run("-c", PROGRAM, **variables)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {line}")


@pytest.mark.parametrize(
    "command",
    [
        ("-m", "envs.collect", "--env_name=scene-play-v0", "--episodes=1"),
        ("-m", "envs.panda.demonstrate", "--env_name=OpenMicrowave-v0", "--episodes=1"),
        (
            "-c",
            MAKE.format("Hopper-v5"),
        ),
    ],
)
def test_a_renderer_that_is_not_there_is_named(command, tmp_path):
    directory = [f"--dataset_dir={tmp_path}"] if command[0] == "-m" else []
    done = run(*command, *directory, MUJOCO_GL="elg")
    assert done.returncode == 2 and not list(tmp_path.iterdir())
    assert done.stderr.splitlines()[-1].startswith("error: MuJoCo fails with MUJOCO_GL=elg (invalid value")
    assert "Traceback" not in done.stderr


def test_who_needs_no_renderer_never_hears_of_it():
    assert run("-c", MAKE.format("Pendulum-v1"), MUJOCO_GL="elg").returncode == 0
    done = run("-c", MAKE.format("NoSuch-v1"), MUJOCO_GL="elg")
    assert done.returncode == 2 and "MUJOCO_GL" not in done.stderr


@pytest.mark.check
def test_precision_of_products_holds_in_its_block_and_never_for_distances():
    x = jnp.ones((2, 3))

    def precisions(function):
        return set(re.findall(r"precision=\(?(?:Precision\.)?(\w+)", str(jax.make_jaxpr(function)(x))))

    before = precisions(lambda x: x @ x.T)
    with matmul_precision("tensorfloat32"):
        assert precisions(lambda x: x @ x.T) == {"HIGH"}
        assert precisions(lambda x: squared_distances(x, x)) == {"HIGHEST"}
        with matmul_precision(None):
            assert precisions(lambda x: x @ x.T) == {"HIGH"}
    assert precisions(lambda x: x @ x.T) == before != {"HIGH"}
