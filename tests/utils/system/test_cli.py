"""What all programs do before they start."""

import os
import subprocess
import sys

import pytest

from utils.system.entry_point import run_main
from utils.system.files import ROOT

PROGRAM = """
import sys
import jax, jax.numpy as jnp
from utils.system import entry_point

def main(argv):
    jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((40, 40))).block_until_ready()
    print(jax.config.jax_compilation_cache_dir)

entry_point.run_main(main)
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
    program = f"from utils.system import entry_point; entry_point.run_main(lambda argv: print('line\\n' * {lines}))"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


def run(code, cwd=None, **environment):
    """Runs a program of a line or two; a variable of value None is unset."""
    environment = {k: v for k, v in (os.environ | {"PYTHONPATH": str(ROOT)} | environment).items() if v is not None}
    return subprocess.run([sys.executable, "-c", code], env=environment, cwd=cwd, capture_output=True, text=True)


def test_any_text_goes_to_any_output():
    done = run("import utils; print(chr(0x3b5), '= 1', chr(0xdcc3))", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert (done.returncode, done.stdout, done.stderr) == (0, "\\u03b5 = 1 \\udcc3\n", "")


@pytest.mark.parametrize("home", [None, "", "/nowhere/at/all"])
def test_without_a_home_a_temporary_one_serves(home, tmp_path):
    unknown = "import pwd\ndef unknown(uid): raise KeyError(uid)\npwd.getpwuid = unknown\n"
    code = unknown + "import utils, pathlib, subprocess, sys; print(pathlib.Path('~/x').expanduser())"
    code += "; subprocess.run([sys.executable, '-c', 'import utils'])"  # A child has one.
    done = run(code, HOME=home, TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = done.stdout.removesuffix("/x\n")
    assert found.startswith(f"{tmp_path}/otql-home-")
    assert done.stderr == f"there is no home directory; {found} is used as such\n"


def test_modules_of_the_working_directory_are_found_and_never_take_a_projects_place(tmp_path):
    (tmp_path / "own_module.py").write_text("VALUE = 3")
    (tmp_path / "utils.py").write_text("raise ImportError('not the project')")
    for code in (
        "sys.path.remove(''); from utils.system import entry_point",
        "import experiments.sweep.grids; from utils.system import entry_point",
    ):
        done = run(
            f"import sys; {code}; entry_point.run_main(lambda argv: print(__import__('own_module').VALUE))",
            cwd=tmp_path,
        )
        assert (done.returncode, done.stdout) == (0, "3\n"), done.stderr


def test_an_exception_of_the_users_code_is_a_line_and_one_of_ours_asks_for_a_report(tmp_path):
    (tmp_path / "own.py").write_text("def fails(x):\n    return x['no']\n")
    start = "import sys; from utils.system import entry_point; sys.path.append('.'); import own; "
    done = run(start + "entry_point.run_main(lambda argv: own.fails({}))", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: your code failed at {tmp_path}/own.py, line 2: KeyError: 'no' (traceback: ")
    done = run(
        "from utils.system import entry_point, files; entry_point.run_main(lambda argv: files.temporary_name(3))"
    )
    assert done.returncode == 1 and done.stderr.startswith("Traceback")
    assert done.stderr.endswith("please report it, with all the lines above.\n")


@pytest.mark.parametrize("damage", ["truncated", "a file"])
def test_a_bad_cache_of_compiled_code_costs_one_line(damage, tmp_path):
    environment = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    if damage == "a file":
        (tmp_path / "cache").touch()
    else:
        assert run(PROGRAM, **environment).stderr == ""
        for path in (tmp_path / "cache").glob("*-cache"):
            path.write_bytes(path.read_bytes()[:-50])
    done = run(PROGRAM, **environment)
    assert done.returncode == 0 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"compiled anew, as {tmp_path / 'cache'} is damaged or cannot be written (")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device"), "error: No space left on device (traceback: "),
        (
            PermissionError(13, "Permission denied", "/somewhere/x"),
            "error: Permission denied: /somewhere/x (traceback: ",
        ),
        (BlockingIOError(11, "Resource temporarily unavailable"), "error: Resource temporarily unavailable (trace"),
        (MemoryError(), "error: out of memory; use a smaller --agent.batch_size"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."), "error: Out of memory allocating 9 b"),
    ],
)
def test_trouble_of_the_machine_is_one_line(error, said, capsys):
    def main(argv):
        raise error

    with pytest.raises(SystemExit) as end:
        run_main(main)
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1 and err.startswith(said), err
