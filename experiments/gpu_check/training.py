"""OTQL runs over couplings and sources that end in time: data, training, and what the runs reached."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.gpu_check.children import GRACE, Budget, child, last_line, wait
from utils.output.loggers import read_csv
from utils.system.files import read_json

SECONDS = 120.0  # least time of a group of arms: start, compilation and the first evaluations
INDEPENDENT = 1000.0  # ε at which the plan is that of independent pairs
# Group → settings of its program, and the values of ε whose runs train in parallel in it.
GROUPS: dict[str, tuple[dict[str, str], tuple[float, ...]]] = {
    "standard": ({}, (0.1, 0.5, 2.0, INDEPENDENT)),
    "action": ({"source": "action"}, (0.1, INDEPENDENT)),
    "noise": ({"source": "noise"}, (0.1, 0.5)),
    "shortcut": ({"targets": "shortcut"}, (INDEPENDENT,)),
    "action_shortcut": ({"source": "action", "targets": "shortcut"}, (INDEPENDENT,)),
}
HEADER = ("group", "source", "targets", "epsilon", "seed", "step", "episodes", "success_rate", "return_mean")


@dataclass(frozen=True)
class Scale:
    """Sizes of the runs.

    Attributes:
        task: of all runs. episodes: of the dataset. seeds: of an arm. groups: in GROUPS, in their order.
        seconds: least time of a group. flags: of main.py beside those of an arm.
    """

    task: str
    episodes: int
    seeds: int
    groups: tuple[str, ...]
    seconds: float
    flags: tuple[str, ...]


# As many evaluation episodes an update as 50 every 50,000.
PAPER = Scale(
    "scene-play-singletask-task1-v0",
    200,
    2,
    tuple(GROUPS),
    SECONDS,
    ("--preset=paper", "--offline_steps=1000000", "--log_interval=1000", "--eval_interval=25000", "--eval_episodes=25"),
)
TINY = Scale(
    "pointmaze-medium-navigate-singletask-task1-v0",
    2,
    1,
    ("standard",),
    5.0,
    (
        *("--preset=cpu", "--offline_steps=120", "--log_interval=20", "--eval_interval=60", "--eval_episodes=1"),
        *("--max_episode_steps=10", "--eval_workers=1"),
    ),
)


@dataclass(frozen=True)
class GroupResult:
    """Outcome of a group.

    Attributes:
        updates: steps that every run did. seconds: that those after the first logged ones took, evaluations included.
        timed: updates in these seconds. runs: in the program. problem: '' or why it ended early.
    """

    updates: int
    timed: int
    seconds: float
    runs: int
    problem: str


def collect_command(scale: Scale, directory: Path) -> list[str]:
    """Returns the command that collects the dataset of the runs."""
    name = scale.task.partition("-singletask")[0] + "-v0"
    command = [sys.executable, "-m", "envs.collect", f"--env_name={name}", f"--episodes={scale.episodes}"]
    return [*command, f"--dataset_dir={directory}"]


def train_group(
    name: str,
    scale: Scale,
    data: list[str],
    overrides: list[str],
    environment: dict[str, str],
    seconds: float,
    out: Path,
) -> GroupResult:
    """Trains the arms of a group for a number of seconds, then ends them with a checkpoint.

    Args:
        name: in GROUPS. scale: sizes of the runs. data: flags of main.py that name the dataset.
        overrides: further flags of main.py. environment: of the process. seconds: until it is told to end.
        out: directory of logs and runs.
    """
    settings, values = GROUPS[name]
    command = [sys.executable, "main.py", "--agent=agents/otql.py", f"--env_name={scale.task}", *data, *scale.flags]
    command += [f"--agent.{key}={value}" for key, value in settings.items()]
    command += [f"--vary=agent.epsilon={','.join(map(str, values))}", f"--num_seeds={scale.seeds}", "--noprogress"]
    command += [*overrides, f"--save_dir={out / 'runs'}", f"--run_group={name}"]
    stamps: list[tuple[float, int]] = []  # (seconds, step) of each new row of train.csv

    def poll() -> None:
        step = last_step(out / "runs" / name)
        if step and (not stamps or step > stamps[-1][1]):
            stamps.append((time.monotonic(), step))

    log = out / f"{name}.log"
    log.unlink(missing_ok=True)
    with child(command, environment, log) as process:
        ended = wait(process, seconds, poll)
    problem = f"exit code {process.returncode}: {last_line(log)}" if ended and process.returncode else ""
    if not (problem or stamps):
        problem = f"no update was logged within {seconds:.0f} s"
    first, last = (stamps[0], stamps[-1]) if stamps else ((0.0, 0), (0.0, 0))
    return GroupResult(last[1], last[1] - first[1], last[0] - first[0], len(values) * scale.seeds, problem)


def last_step(group: Path) -> int:
    """Returns the last step in the train.csv of a group's first run, 0 without one."""
    path = next(iter(sorted(group.rglob("train.csv"))), None) if group.exists() else None
    table = read_csv(path) if path else {}
    return int(table["step"][-1]) if len(table.get("step", ())) else 0


def evaluations(out: Path) -> list[list[Any]]:
    """Returns the rows of HEADER: every evaluation of all runs below `out`, by group, ε, seed and step."""
    rows = []
    for path in sorted((out / "runs").rglob("eval.csv")):
        record, table = read_json(path.parent / "flags.json"), read_csv(path)
        config, group = record["config"], path.relative_to(out / "runs").parts[0]
        arm = [group, config["source"], config["targets"], config["epsilon"], record["seed"]]
        success = table.get("success_rate", [float("nan")] * len(table["step"]))
        columns = table["step"], table["episodes"], success, table["return_mean"]
        rows += [[*arm, int(step), int(count), *map(float, rest)] for step, count, *rest in zip(*columns, strict=True)]
    order = list(GROUPS)
    return sorted(rows, key=lambda row: (order.index(row[0]) if row[0] in order else len(order), *row[3:6]))


def train_all(
    scale: Scale, data: list[str], overrides: list[str], environment: dict[str, str], budget: Budget, out: Path
) -> tuple[dict[str, GroupResult], list[str]]:
    """Trains one group after the other; the time that is left is shared by those that have not run.

    Returns:
        the results of those that ran, and a line for each one that was left out or failed.
    """
    results, missing = dict[str, GroupResult](), []
    for number, name in enumerate(scale.groups):
        left = max(0.0, budget.left - GRACE)  # A run saves before it ends.
        seconds = max(left / (len(scale.groups) - number), min(scale.seconds, left))
        if seconds < scale.seconds:
            missing.append(f"runs, group {name}: no time is left")
            continue
        results[name] = train_group(name, scale, data, overrides, environment, seconds, out)
        if problem := results[name].problem:
            missing.append(f"runs, group {name}: {problem}")
    return results, missing
