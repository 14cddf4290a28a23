"""Groups of runs that differ only in the seed, and which groups of a task a report compares."""

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float, Real

from experiments.report import published
from experiments.report.runs import Run, show
from utils.output.intervals import mean_over_runs, scalar_bootstrap


@dataclass(frozen=True)
class Condition:
    """Properties that runs of one task must share to be compared.

    Attributes:
        finished: whether the runs reached their last step.
        diverged: whether their training diverged.
        metric: of the evaluations, as `Run.metric`.
        steps: updates of the evaluations that are averaged.
        data: identity of the dataset, as JSON.
        sparse: whether rewards are sparse, None if not recorded.
    """

    finished: bool
    diverged: bool
    metric: str
    steps: tuple[int, ...]
    data: str
    sparse: bool | None


@dataclass(eq=False)
class Group:
    """Runs that differ only in the seed and are averaged.

    Attributes:
        label: name in reports, unique among the compared groups of the task.
        apart: reasons why it is not compared with the others, each 'short: long'.
        notes: remarks for the reader.
    """

    env_name: str
    method: str
    condition: Condition
    runs: list[Run]
    label: str = ""
    apart: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def algorithm(self) -> str:
        """The published name of the agent, without varied settings."""
        return self.runs[0].algorithm

    @property
    def seeds(self) -> str:
        """The number of seeds, as '1 seed' or '3 seeds'."""
        return f"{len(self.runs)} seed{'s' if len(self.runs) > 1 else ''}"

    @cached_property
    def scores(self) -> Float[np.ndarray, " seeds"]:
        """Each seed's mean over the averaged evaluations, empty without evaluations."""
        if not self.condition.steps:
            return np.empty(0)
        return np.array([run.values[-len(self.condition.steps) :].mean() for run in self.runs])

    @property
    def mean(self) -> float:
        """The mean over seeds, NaN without evaluations."""
        return float(self.scores.mean()) if len(self.scores) else np.nan

    @cached_property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % bootstrap interval of the mean over seeds, None for a single seed."""
        return scalar_bootstrap([self.scores], mean_over_runs)

    def curve(self) -> tuple[Real[np.ndarray, " evaluations"], Float[np.ndarray, "seeds evaluations"]]:
        """Returns steps and values of the evaluations that all seeds have."""
        steps = self.runs[0].steps
        for run in self.runs[1:]:
            steps = np.intersect1d(steps, run.steps)
        return steps, np.stack([run.values[np.isin(run.steps, steps)] for run in self.runs])


def group_runs(found: Iterable[Run], last: int) -> list[Group]:
    """Groups runs that differ only in the seed, and determines which groups are compared.

    Args:
        last: number of each run's last evaluations that are averaged.
    """
    groups: dict[tuple, Group] = {}
    for run in sorted(found, key=lambda run: (run.settings["env_name"], published.method_order(run.method), run.seed)):
        condition = Condition(
            finished=run.finished,
            diverged=bool(run.diverged),
            metric=run.metric,
            steps=tuple(int(step) for step in run.steps[-last:]),
            data=json.dumps(run.settings.get("dataset"), sort_keys=True),
            sparse=run.settings.get("sparse"),
        )
        config = json.dumps(run.settings["config"], sort_keys=True)
        # Unfinished runs with different last steps are not averaged.
        key: tuple = (run.settings["env_name"], run.method, run.settings.get("agent_module"), config, condition)
        key += () if run.finished else (run.planned,)
        group = groups.setdefault(key, Group(run.settings["env_name"], run.method, condition, []))
        _add(group, run)
    for env_name in dict.fromkeys(group.env_name for group in groups.values()):
        _compare([group for group in groups.values() if group.env_name == env_name])
    for group in groups.values():
        group.notes = _notes(group, last) + group.notes
    return list(groups.values())


def _add(group: Group, run: Run) -> None:
    """Adds a run, unless the group has its seed: the same seed with the same settings is no second sample."""
    same = next((other for other in group.runs if other.seed == run.seed), None)
    if same:
        group.notes.append(f"seed {run.seed} exists twice, {same.directory} counted and {run.directory} not")
    else:
        group.runs.append(run)


def _compare(groups: list[Group]) -> None:
    """Labels the groups of one task, and sets the reasons why some are not compared."""
    reference = _reference(groups)
    for group in groups:
        group.label = group.method
        group.apart = _reasons(group, reference)
    shown = [group for group in groups if not group.apart]
    presets = {group: group.runs[0].settings["flags"].get("preset") for group in shown}
    for group, preset in presets.items():
        if len(set(presets.values())) > 1:
            group.notes.append(f"preset={preset}")
    for method in {group.method for group in shown}:
        variants = [group for group in shown if group.method == method]
        if len(variants) > 1:
            _label_variants(variants)
    for group in groups:
        rivals = [other for other in shown if other.method == group.method]
        if group.condition.diverged:
            seeds = ", ".join(str(run.seed) for run in group.runs)
            own = json.dumps(group.runs[0].settings["config"], sort_keys=True)
            for rival in (r for r in rivals if json.dumps(r.runs[0].settings["config"], sort_keys=True) == own):
                rival.notes.append(f"without seed {seeds}, which diverged")
        elif group.apart and len(rivals) == 1:
            changed = differences(group.runs[0].settings["config"], rivals[0].runs[0].settings["config"])
            if changed:
                text = ", ".join(f"{name} {show(own)}, not {show(other)}" for name, own, other in changed)
                group.apart.append(f"other settings: {text}")


def _reference(groups: list[Group]) -> Condition | None:
    """Returns the condition in which most methods finished; of several the one with most runs, then most updates."""
    methods: Counter[Condition] = Counter()
    sizes: Counter[Condition] = Counter()
    for condition, _ in {(group.condition, group.method) for group in groups if group.condition.finished}:
        methods[condition] += 1
    for group in groups:
        sizes[group.condition] += len(group.runs)
    return max(methods, key=lambda c: (methods[c], sizes[c], c.steps, c.data), default=None)


def _reasons(group: Group, reference: Condition | None) -> list[str]:
    """Returns the reasons why a group is not compared with those of the reference, each 'short: long'."""
    own, result = group.condition, []
    if own.diverged:
        result.append("; ".join(f"diverged: seed {run.seed} at {run.diverged}" for run in group.runs))
    elif not own.finished:
        planned = group.runs[0].planned
        reached = own.steps[-1] if own.steps else max(run.reached for run in group.runs)
        unit = "updates" if group.runs[0].rollout_steps is None else "environment steps"
        progress = f"unfinished: {show_steps(reached)} of {show_steps(planned)} {unit}"
        result.append("no evaluations" if reached >= planned and not own.steps else progress)
    if reference is None:
        return result
    if own.finished and own.steps[-1] != reference.steps[-1]:
        result.append(f"other updates: {show_steps(own.steps[-1])}, not {show_steps(reference.steps[-1])}")
    elif own.finished and own.steps != reference.steps:
        text = (", ".join(map(show_steps, steps)) for steps in (own.steps, reference.steps))
        result.append("other evaluations: averaged at {}, not {}".format(*text))
    if own.data != reference.data:
        result.append(f"other data: {show_data(own.data)}, not {show_data(reference.data)}")
    if own.sparse != reference.sparse:
        result.append(f"other rewards: sparse={own.sparse}, not {reference.sparse}")
    if own.steps and own.metric != reference.metric:
        result.append(f"other measure: {own.metric}, not {reference.metric}")
    return result


def _label_variants(groups: list[Group]) -> None:
    """Labels groups of one method by the settings in which they differ, else by presets, else by numbers."""
    firsts = [group.runs[0].settings for group in groups]
    settings = [first["config"] | {"agent_module": first.get("agent_module")} for first in firsts]
    names = [name for name in sorted(set().union(*settings)) if len({repr(own.get(name)) for own in settings}) > 1]
    texts = [", ".join(f"{name}={show(own.get(name))}" for name in names) for own in settings]
    labels = texts if len(names) <= 3 else [f"preset={first['flags'].get('preset')}" for first in firsts]
    if len(set(labels)) < len(labels):
        labels = [f"variant {index + 1}" for index in range(len(groups))]
    for group, label, text in zip(groups, labels, texts, strict=True):
        group.label = f"{group.method} ({label})"
        if label != text:
            group.notes.append(f"{label}: {text}")


def _notes(group: Group, last: int) -> list[str]:
    """Returns remarks on a group besides its scores."""
    result, used = ["1 seed"] if len(group.runs) == 1 else [], len(group.condition.steps)
    if used < last:
        result.append(f"{used or 'no'} evaluation{'s' if used != 1 else ''}, not {last}")
    episodes = {int(count) for run in group.runs for count in run.episodes[-last:] if np.isfinite(count)}
    if group.runs[0].rollout_steps is not None:
        evaluated = [run.values[run.steps < run.rollout_steps] for run in group.runs]
        means = [values.mean() for values in evaluated if values.size]
        base = f"; of the base: {np.mean(means):.2f}" if means else ""
        result.append(f"environment steps, not updates{base}")
    if len(episodes) > 1:
        result.append(f"{' and '.join(map(str, sorted(episodes)))} episodes per evaluation")
    return result


def differences(own: dict[str, Any], other: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Returns (name, own value, other value) of the settings that differ."""
    names = sorted({*own, *other})
    return [(name, own.get(name), other.get(name)) for name in names if own.get(name) != other.get(name)]


def show_steps(steps: int) -> str:
    """Formats a number of updates: 18k, 1M, 12,345."""
    for unit, letter in ((1_000_000, "M"), (1_000, "k")):
        if steps >= unit and steps % (unit // 10) == 0:
            return f"{steps / unit:g}{letter}"
    return f"{steps:,}"


def span(values: Iterable[int], unit: str = "", show: Callable[[int], str] = str) -> str:
    """Formats the least and the greatest of some counts: '3 seeds', '1 to 3 seeds'."""
    ends = min(values := sorted(values)), max(values)
    text = " to ".join(dict.fromkeys(map(show, ends)))
    return f"{text} {unit}{'' if ends[1] == 1 else 's'}" if unit else text


def show_data(data: str) -> str:
    """Describes a dataset, given its identity as JSON, in a few words."""
    content = json.loads(data)
    if not isinstance(content, dict):
        return "data not recorded"
    base = f", base {content['base'].get('checksum')}" if "base" in content else ""
    return f"{content.get('file')} ({content.get('episodes')} episodes, checksum {content.get('checksum')}{base})"
