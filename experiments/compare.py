"""Paired differences between two groups of runs.

    python -m experiments.compare exp/source-action exp/source-independent

Pairs runs of the same task and seed, takes the difference of their last evaluations, averages it over the seeds of a
task and then over tasks, and prints it with a 95 % bootstrap interval over seeds within tasks. --step takes another
evaluation of training. --at compares evaluations after training (evaluations.csv of `experiments.evaluate`), such as
--at=flow_steps=1,noise_scale=0.5; settings that are not named have the values that the run was trained with.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from absl import flags

from experiments.report.evaluations import FILE, read_rows, same, settings_of
from experiments.report.runs import Run, find_runs
from utils.errors import UserError
from utils.output.intervals import scalar_bootstrap
from utils.output.tables import markdown_table
from utils.system.cli import parse_arguments
from utils.system.entry_point import run_main

FLAGS = flags.FlagValues()
flags.DEFINE_integer("step", None, "Step of the evaluation; default: the last.", lower_bound=0, flag_values=FLAGS)
flags.DEFINE_list("at", [], "Settings of an evaluation after training: field=value.", flag_values=FLAGS)

Scores = dict[tuple[str, int], float]


def read_scores(directory: Path, step: int | None, at: Mapping[str, str]) -> tuple[Scores, str]:
    """Returns (task, seed) → score of the runs below a directory, and the name of the score.

    Raises:
        UserError: there are no runs, a run has not finished or lacks the evaluation, or two runs have the same task and
            seed.
    """
    runs, damaged = find_runs([directory])
    if damaged:
        raise UserError(damaged[0])
    scores: Scores = {}
    ends = {int(run.steps[-1]) if len(run.steps) else 0 for run in runs}
    if step is None and (len(ends) > 1 or any(not run.finished for run in runs)):
        raise UserError(f"{directory} has runs that have not finished, or of several lengths; give --step")
    for run in runs:
        key = run.settings["env_name"], run.seed
        if key in scores:
            raise UserError(f"{directory} has several runs of {key[0]} with seed {key[1]}; give one group of runs")
        scores[key] = evaluated(run, step, at) if at else trained(run, step)
    (metric, *others) = {run.metric for run in runs}
    if others:
        raise UserError(f"{directory} has runs with success and runs without; compare them apart")
    return scores, "success_rate" if at else metric


def trained(run: Run, step: int | None) -> float:
    """Returns a run's score in eval.csv at a step, by default the last."""
    places = range(len(run.steps)) if step is None else np.flatnonzero(run.steps == step)
    if not len(places):
        raise UserError(f"{run.directory} has no evaluation{'' if step is None else f' at step {step}'}")
    return float(run.values[places[-1]])


def evaluated(run: Run, step: int | None, at: Mapping[str, str]) -> float:
    """Returns the success rate of a run's last row in evaluations.csv with these settings, all others as trained."""
    config = run.settings["config"]
    for row in reversed(read_rows(run.directory)):
        own = settings_of(row)
        wanted = {name: at.get(name, config.get(name)) for name in {*own, *at}}
        at_step = step is None or row.get("step") == str(step)
        if at_step and row.get("success_rate") and all(same(own.get(name), value) for name, value in wanted.items()):
            return float(row["success_rate"])
    settings = ", ".join(f"{name}={value}" for name, value in at.items())
    raise UserError(
        f"{run.directory / FILE} has no row with {settings}; make one by python -m experiments.evaluate {run.directory}"
    )


def paired(first: Scores, second: Scores) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns task → the scores of both groups, of the same seeds in the same order.

    Raises:
        UserError: no task and seed is in both.
    """
    tasks = dict.fromkeys(task for task, _ in first)
    seeds = {task: sorted(s for t, s in first.keys() & second.keys() if t == task) for task in tasks}
    pairs = {
        task: (np.array([first[task, seed] for seed in own]), np.array([second[task, seed] for seed in own]))
        for task, own in seeds.items()
        if own
    }
    if not pairs:
        raise UserError("no task and seed is in both groups")
    return pairs


def difference(pairs: Sequence[np.ndarray]) -> tuple[float, tuple[float, float] | None]:
    """Returns the mean over tasks of the mean over seeds, and its interval; None if a task has one seed."""
    weights = np.concatenate([np.full(len(own), 1 / (len(own) * len(pairs))) for own in pairs])
    mean = float(np.concatenate(pairs) @ weights)
    return mean, scalar_bootstrap(pairs, lambda samples: samples @ weights)


def row(name: str, first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> list[str]:
    """Returns the cells of a task, or of all tasks."""
    mean, interval = difference([a - b for a, b in zip(first, second, strict=True)])
    shown = f"{mean:+.2f}" + (f" [{interval[0]:+.2f}, {interval[1]:+.2f}]" if interval else "")
    seeds = "+".join(str(len(own)) for own in first)
    return [name, seeds, *(f"{np.mean([own.mean() for own in group]):.2f}" for group in (first, second)), shown]


def main(argv: Sequence[str]) -> None:
    """Prints the table."""
    directories = [Path(text) for text in parse_arguments(argv, FLAGS)]
    if len(directories) != 2:
        raise UserError("give two directories of runs: python -m experiments.compare exp/a exp/b")
    if any("=" not in text for text in FLAGS.at):
        raise UserError(f"--at={','.join(FLAGS.at)}: write settings as field=value, such as --at=flow_steps=1")
    at = dict(text.split("=", 1) for text in FLAGS.at)
    (first, metric), (second, other) = (read_scores(directory, FLAGS.step, at) for directory in directories)
    if metric != other:
        raise UserError(f"{directories[0]} is measured by {metric}, {directories[1]} by {other}")
    pairs = paired(first, second)
    rows = [row(task, [a], [b]) for task, (a, b) in pairs.items()]
    if len(pairs) > 1:
        rows.append(row("mean", [a for a, _ in pairs.values()], [b for _, b in pairs.values()]))
    print(markdown_table([metric, "seeds", *(directory.name for directory in directories), "difference"], rows))
    unpaired = first.keys() ^ second.keys()
    if unpaired:
        print(
            "without a partner: " + ", ".join(f"{task} seed {seed}" for task, seed in sorted(unpaired)), file=sys.stderr
        )


if __name__ == "__main__":
    run_main(main)
