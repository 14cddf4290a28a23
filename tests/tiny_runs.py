"""Tiny runs of main.py, and what tests ask of the directories they leave."""

import contextlib
import io
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np

import main
from utils.output.loggers import read_csv
from utils.run import checkpoints
from utils.system import entry_point
from utils.system.cli import last_of_each

POINTMAZE = "pointmaze-medium-navigate-singletask-task1-v0"
# Compiled in seconds; an episode of five-step chunks is cheap.
TINY = (
    "--agent.batch_size=8",
    "--agent.actor_hidden_dims=(16,16)",
    "--agent.value_hidden_dims=(16,16)",
    "--agent.num_qs=2",
    "--agent.flow_steps=2",
    "--horizon_length=5",
    "--eval_workers=1",
    "--eval_episodes=1",
    "--eval_interval=0",
)
BC = ("--agent=agents/bc.py", *TINY)
OTQL = ("--agent=agents/otql.py", *TINY, "--agent.max_iterations=5", "--agent.best_of_n=1")


@dataclass(frozen=True)
class Outcome:
    """What a program left behind: exit code and output."""

    code: int
    out: str
    err: str


def call(*flags: str, program: ModuleType = main) -> Outcome:
    """Runs main.py, or another, in this process, with defaults for flags not given; what is compiled is shared.

    Of a flag that is given several times the last one counts: tests change one of a list of flags.
    """
    for name in getattr(program, "FLAGS", ()):
        program.FLAGS[name].unparse()
    out, err, argv, code = io.StringIO(), io.StringIO(), sys.argv, 0
    sys.argv = [f"{program.__name__}.py", *last_of_each(flags)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            entry_point.run_main(program.main)
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv = argv
    return Outcome(code, out.getvalue(), err.getvalue())


def run_main(*flags: str, program: ModuleType = main) -> Outcome:
    """`call` that must succeed."""
    outcome = call(*flags, program=program)
    assert outcome.code == 0, outcome.err
    return outcome


def refused(*flags: str, program: ModuleType = main) -> str:
    """`call` that must end in one line on stderr and exit code 2; returns the line."""
    outcome = call(*flags, program=program)
    assert outcome.code == 2, outcome
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1 and outcome.err.endswith("\n"), outcome
    return outcome.err


def interrupted(*flags: str) -> Outcome:
    """Runs main.py to the signal that `interrupt_at` prepared."""
    outcome = call(*flags)
    assert outcome.code == 143, outcome.err
    return outcome


def run_dirs(save_dir: Path) -> list[Path]:
    """The directories of the runs below `save_dir`, sorted."""
    return sorted(path.parent for path in save_dir.rglob("flags.json"))


def run_dir(save_dir: Path) -> Path:
    """The directory of the only run below `save_dir`."""
    (directory,) = run_dirs(save_dir)
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    """Path → bytes of every file below `directory`."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def assert_same_run(directory: Path, other: Path) -> None:
    """Two runs ended in the same agent and the same rows, bit for bit."""
    for name in ("train.csv", "eval.csv"):
        assert (directory / name).read_bytes() == (other / name).read_bytes()
    (step, state), (other_step, other_state) = (checkpoints.load_latest(d / "checkpoints") for d in (directory, other))
    assert step == other_step
    assert_same_tree(state["agent"], other_state["agent"])


def assert_same_tree(tree: dict, other: dict) -> None:
    """Two nested dicts of arrays are equal in structure, dtype, shape and bits."""
    assert tree.keys() == other.keys()
    for key, value in tree.items():
        if isinstance(value, dict):
            assert_same_tree(value, other[key])
        else:
            assert value.dtype == other[key].dtype and value.shape == other[key].shape, key
            assert value.tobytes() == other[key].tobytes(), key


def assert_close_csv(directory: Path, other: Path, rtol: float = 1e-4) -> None:
    """The rows of two runs agree up to rounding."""
    for name in ("train.csv", "eval.csv"):
        table, other_table = read_csv(directory / name), read_csv(other / name)
        assert table.keys() == other_table.keys() and len(table["step"])
        for column, values in table.items():
            np.testing.assert_allclose(values, other_table[column], rtol=rtol, atol=1e-6, err_msg=f"{name} {column}")
