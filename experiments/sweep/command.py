"""Command line of sweeps: runs of a grid of settings, on this machine or on Slurm.

    python -m experiments.sweep --grid=table1 --backend=slurm [status | report]

Grids are defined in experiments/sweep/grids.py, or in your own file that defines GRID. Rerun the same command to
resume: finished jobs are skipped, interrupted ones resume, and no job runs twice at once. `status` counts jobs that are
done, diverged, running, queued, stopped or failed, with the last line of each failure; `report` compares all runs.

    python -m experiments.sweep --grid=laptop --jobs=2                     two at a time, each with half of the cores
    python -m experiments.sweep --grid=table1 --gpus=0,1,2,3 --jobs=8      eight at a time on four GPUs
    python -m experiments.sweep --grid=table1 --backend=slurm --seeds_per_job=4 --partition=gpu --gpus_per_job=1
"""

import contextlib
import functools
import itertools
import json
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags
from tqdm import tqdm

from envs.tasks import parse_task
from experiments.sweep.grids import GRIDS, PROGRAMS, Grid
from experiments.sweep.jobs import Job, run_here
from experiments.sweep.slurm import live_ids, submit
from utils.errors import UserError
from utils.run.agent_files import import_file
from utils.run.directory import run_root
from utils.run.flags import parse_flags
from utils.run.runs import RunPlan
from utils.system.cli import define_flag, last_of_each, parse_arguments
from utils.system.entry_point import run_main
from utils.system.files import ROOT, atomic_write_text, read_json
from utils.system.locks import exclusive_lock

FLAGS = flags.FlagValues()
ACTIONS = ("start", "status", "report")
SELECTIONS = ("agents", "env_names", "seeds")
BACKEND_FLAGS = {
    "local": ("jobs", "gpus"),
    "slurm": (
        *("partition", "minutes", "gpus_per_job", "cpus_per_job", "memory_gb", "array_parallelism", "signal_seconds"),
    ),
}
# Flags that the sweep sets in every command.
RESERVED = ("agent", "env_name", "seed", "num_seeds", "save_dir", "run_group")

_flag = functools.partial(define_flag, FLAGS)
_flag("string", "grid", None, f"{', '.join(GRIDS)}, or a Python file that defines GRID.")
_flag("string", "save_dir", "exp", "Runs are saved in <save_dir>/<grid>[-<setting>]/…")
_flag("list", "agents", None, "Only these of the grid's agents.")
_flag("list", "env_names", None, "Only these of the grid's tasks.")
_flag("integer", "seeds", None, "Number of seeds; default: the grid's.", lower_bound=1)
_flag("integer", "seeds_per_job", 1, "Seeds trained in parallel in one job.", lower_bound=1)
_flag("list", "flags", [], "Flags added to every command, without dashes: offline_steps=500000,sparse.")
_flag("enum", "backend", "local", "Where jobs run.", enum_values=["local", "slurm"])
_flag("bool", "dry_run", False, "Only print the commands that would be started.")
_flag("integer", "jobs", None, "local: jobs at a time; default: one, or one per GPU.", lower_bound=1)
_flag("list", "gpus", [], "local: GPUs assigned to the jobs, such as 0,1; default: jobs share the cores.")
_flag("string", "partition", None, "slurm: partition.")
_flag("integer", "minutes", 24 * 60, "slurm: time limit, after which a job is requeued and resumes.", lower_bound=1)
_flag("integer", "gpus_per_job", 0, "slurm: GPUs per job.", lower_bound=0)
_flag("integer", "cpus_per_job", 4, "slurm: cores per job.", lower_bound=1)
_flag("integer", "memory_gb", None, "slurm: memory per job, GB.", lower_bound=1)
_flag("integer", "array_parallelism", 64, "slurm: jobs of the array that run at a time.", lower_bound=1)
_flag("integer", "signal_seconds", 120, "slurm: seconds before the time limit at which jobs save.", lower_bound=1)


def load_grid(name: str | None) -> tuple[str, Grid]:
    """Returns a grid and its name, from GRIDS or from a Python file.

    Raises:
        UserError: the grid is unknown, or the file defines none.
    """
    if name in GRIDS:
        return name, GRIDS[name]
    path = Path(name or "").expanduser()
    if path.suffix != ".py" or not path.is_file():
        raise UserError(f"--grid={name} is none of {', '.join(GRIDS)}, nor a Python file")
    module = import_file(path, f"grid_{path.stem}", str(path))
    if not isinstance(getattr(module, "GRID", None), Grid):
        raise UserError(f"{path} defines no GRID of type experiments.sweep.grids.Grid")
    return path.stem, module.GRID


def select(flag: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the names in `known` that the flag selects; all if it is not given.

    Raises:
        UserError: the flag has a name that is not in `known`.
    """
    names = FLAGS[flag].value
    if unknown := set(names or ()) - set(known):
        raise UserError(f"--{flag}: the grid has no {min(unknown)}; it has {', '.join(known)}")
    return tuple(name for name in known if not names or name in names)


def group_name(name: str, setting: str) -> str:
    """Returns the run group of a grid's setting."""
    return f"{name}-{setting}" if setting else name


def make_jobs(name: str, grid: Grid) -> list[Job]:
    """Returns one job for each agent, task, setting and block of seeds.

    Raises:
        UserError: an unknown agent, task, flag or agent setting, or two jobs with the same directory.
    """
    seeds, jobs = range(FLAGS.seeds or grid.seeds), []
    folder = Path(FLAGS.save_dir).expanduser() / name / ".sweep"
    env_names, agents = select("env_names", grid.env_names), select("agents", grid.agents)
    for (setting, varied), env_name, agent in itertools.product(grid.settings.items(), env_names, agents):
        group = group_name(name, setting)
        path = agent if agent.endswith(".py") else f"agents/{agent}.py"
        more = last_of_each((*grid.flags, *varied, *merge_flags(grid.flags, varied)))
        command = f"--agent={path}", f"--env_name={env_name}", *more
        for first in seeds[:: FLAGS.seeds_per_job]:
            block = seeds[first : first + FLAGS.seeds_per_job]
            own = f"--seed={first}", f"--num_seeds={len(block)}", f"--save_dir={FLAGS.save_dir}", f"--run_group={group}"
            config = parse_flags((grid.program, *command, *own), PROGRAMS[grid.program])
            plan, task = RunPlan.from_config(config, parse_task(env_name)), run_root("", "", env_name).name
            jobs.append(
                Job(
                    name="-".join(part for part in (Path(path).stem, task, setting, f"sd{first}") if part),
                    command=(str(ROOT / grid.program), *command, *own),
                    folder=folder,
                    directories=tuple(spec.directory for spec in plan.specs),
                    total=config.total_steps,
                    settings=tuple(map(plan.settings, plan.specs)),
                )
            )
    directory, times = Counter(directory for job in jobs for directory in job.directories).most_common(1)[0]
    if times > 1:
        raise UserError(f"{times} of the grid's commands would write {directory}; give their settings distinct names")
    return jobs


def merge_flags(shared: Sequence[str], own: Sequence[str]) -> list[str]:
    """Returns the command line's --flags with dashes, to be added to a grid's shared and a setting's own flags.

    Raises:
        UserError: one of the flags is set by the sweep, or is varied by the grid.
    """
    given = [f"--{flag.lstrip('-')}" for flag in FLAGS.flags]
    for name in map(_name, (*shared, *own, *given)):
        if name in RESERVED:
            raise UserError(f"--{name} is set by the sweep; leave it out of the grid's flags and of --flags")
    varied = {_name(flag) for flag in own} | {flag.split("=")[1] for flag in own if flag.startswith("--vary=")}
    if both := varied.intersection(map(_name, given)):
        raise UserError(f"--flags={min(both)}: the grid varies this setting; leave it out of --flags")
    return given


def _name(flag: str) -> str:
    return flag.lstrip("-").partition("=")[0]


def queued(folder: Path) -> set[str]:
    """Returns the names of the jobs that are pending or running on Slurm."""
    ids = _submitted(folder)
    live = live_ids() if ids else set()
    return {name for name, job_id in ids.items() if job_id in live}


def _submitted(folder: Path) -> dict[str, str]:
    """Returns job name → Slurm id of all jobs submitted so far."""
    path = folder / "submitted.json"
    return read_json(path) if path.exists() else {}


def start(jobs: list[Job], folder: Path) -> None:
    """Starts the jobs that are neither finished, running nor queued.

    Raises:
        UserError: a directory holds another run, jobs cannot be submitted, or local jobs failed.
    """
    names = queued(folder)
    states = {}
    for job in jobs:
        states[job], note = job.state(job.name in names)
        if states[job] == "other":
            raise UserError(f"{note}; use another --save_dir")
    due = [job for job in jobs if states[job] not in ("done", "diverged", "running", "queued")]
    counts = Counter(states.values())
    print(", ".join(f"{count} {state}" for state, count in counts.items()) + f"; {len(due)} to start", file=sys.stderr)
    if FLAGS.dry_run:
        for job in due:
            print("python", shlex.join(job.command))
    elif due and FLAGS.backend == "slurm":
        parameters = {
            "job_name": folder.parent.name,
            "time": FLAGS.minutes,
            "cpus_per_task": FLAGS.cpus_per_job,
            "array_parallelism": FLAGS.array_parallelism,
            "signal_delay_s": FLAGS.signal_seconds,
            # The job must be able to import this package from any working directory.
            "setup": [f"export PYTHONPATH={ROOT}${{PYTHONPATH:+:$PYTHONPATH}}"],
            **({"partition": FLAGS.partition} if FLAGS.partition else {}),
            **({"gpus_per_node": FLAGS.gpus_per_job} if FLAGS.gpus_per_job else {}),
            **({"mem": f"{FLAGS.memory_gb}GB"} if FLAGS.memory_gb else {}),
        }
        ids = submit(due, folder, parameters)
        new = {job.name: job_id for job, job_id in zip(due, ids, strict=True)}
        atomic_write_text(folder / "submitted.json", json.dumps(_submitted(folder) | new, indent=1) + "\n")
        print(f"submitted {len(due)} jobs, {ids[0]} to {ids[-1]}")
    elif due:
        failed = []
        slots = FLAGS.jobs or len(FLAGS.gpus) or 1
        for job in tqdm(run_here(due, slots, FLAGS.gpus), total=len(due), unit="job"):
            state, note = job.state()
            if state != "done":
                failed.append(job)
                tqdm.write(f"{job.name}: {state} {note} ({job.log})")
        if failed:
            raise UserError(f"{len(failed)} of {len(due)} jobs did not finish (see above); rerun to resume")


def status(jobs: list[Job], folder: Path) -> None:
    """Prints a line for each job that is not done, and the number of jobs in each state."""
    names = queued(folder)
    states = {job: job.state(job.name in names) for job in jobs}
    width = max(len(job.name) for job in jobs)
    for job, (state, note) in states.items():
        if state != "done":
            print(f"{job.name:{width}s}  {state:8s} {note}")
    print(", ".join(f"{count} {state}" for state, count in Counter(s for s, _ in states.values()).items()))


def report(directories: list[Path], output: Path) -> None:
    """Writes and prints a report on the existing runs."""
    from experiments.report.command import write_report

    print(write_report(directories, output, last=3))
    print(f"report: {output / 'report.html'}", file=sys.stderr)


def run_action(actions: Sequence[str], name: str, grid: Grid, report: Callable[[list[Path], Path], None]) -> None:
    """Starts a grid's jobs, prints their states, or reports on their runs.

    Args:
        actions: at most one of ACTIONS; default 'start'.
        name: of the grid.
        report: called with the directories of the runs or run groups, and the output directory.

    Raises:
        UserError: an unknown action, a flag of the other backend, or a failure of the action.
    """
    action, *more = actions or ["start"]
    if more or action not in ACTIONS:
        raise UserError(f"'{' '.join(actions)}' is none of {', '.join(ACTIONS)}")
    root = Path(FLAGS.save_dir).expanduser()
    folder = root / name / ".sweep"
    for backend, names in BACKEND_FLAGS.items():
        if backend != FLAGS.backend and (wrong := [name for name in names if FLAGS[name].present]):
            raise UserError(f"--{wrong[0]} is for --backend={backend}; this is {FLAGS.backend}")
    if action == "report":
        if any(FLAGS[name].present for name in SELECTIONS):
            directories = [directory for job in make_jobs(name, grid) for directory in job.directories]
        else:
            directories = [root / group_name(name, setting) for setting in grid.settings]
        report([one for one in directories if one.is_dir()] or directories[:1], root / name / "report")
        return
    jobs = make_jobs(name, grid)
    if action == "status":
        status(jobs, folder)
        return
    # A second sweep started at the same time waits until the first has submitted its jobs, or run them.
    with contextlib.nullcontext() if FLAGS.dry_run else exclusive_lock(folder.with_suffix(".lock")):
        start(jobs, folder)


def main(argv: Sequence[str]) -> None:
    """Runs the command line's action on its grid."""
    actions = parse_arguments(argv, FLAGS)
    run_action(actions, *load_grid(FLAGS.grid), report)


if __name__ == "__main__":
    run_main(main)
