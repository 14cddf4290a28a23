"""The runs of one command: those to train, in parallel, and those that have ended before."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import numpy as np
from jaxtyping import UInt32
from ml_collections import ConfigDict

from envs.tasks import Task
from utils.errors import Diverged, UserError
from utils.output.loggers import usable_wandb
from utils.random_streams import stream_key
from utils.run import checkpoints
from utils.run.agent_config import idle_settings, resolve_agent
from utils.run.agent_files import agent_module
from utils.run.config import CommonConfig
from utils.run.directory import RunDirectory, RunSpec, beyond, make_run_specs, run_root
from utils.system.files import find_modules_in
from utils.system.jax_setup import device_line
from utils.system.rendering import set_rendering_backend


@dataclass(frozen=True)
class RunPlan:
    """The runs that a config asks for.

    Attributes:
        module: of the agent. agent_config: of the first run. sparse: True if rewards are made sparse.
        preset: one line on the preset that was applied. specs: of the runs. shared: settings that they share.
    """

    module: ModuleType
    agent_config: ConfigDict
    sparse: bool
    preset: str
    specs: tuple[RunSpec, ...]
    shared: Mapping[str, Any]

    @classmethod
    def from_config(cls, config: CommonConfig, task: Task) -> "RunPlan":
        """Resolves a config's agent, preset, seeds and varied values.

        Raises:
            UserError: an unknown agent or setting, or a value that does not fit.
        """
        module, agent_config, sparse, preset = resolve_agent(config, task)
        root, agent = run_root(config.save_dir, config.run_group, config.env_name), Path(config.agent).stem
        seeds = range(config.seed, config.seed + config.num_seeds)
        specs = make_run_specs(agent_config, seeds, config.vary, root, agent)
        for field in specs[0].varied:
            if reason := idle_settings(module, agent_config).get(field):
                raise UserError(f"--vary={config.vary}: {field} has no effect: {reason}")
        shared = {"env_name": config.env_name, "agent": agent, "sparse": sparse, "domain": task.domain}
        # Two agent files of one name share a directory, but never a run.
        shared |= {"preset": preset, "agent_module": agent_module(module)}
        shared |= {"flags": config.flag_values(), "steps": config.total_steps}
        return cls(module, agent_config, sparse, preset, tuple(specs), shared)

    def settings(self, spec: RunSpec) -> dict[str, Any]:
        """Returns the settings of a run as flags.json records them, without those that its dataset adds."""
        return {**self.shared, "seed": spec.seed, "config": spec.config.to_dict(), "varied": spec.varied}


class Runs:
    """The runs of one command, their directories locked. Use as a context manager, which releases the locks.

    Attributes:
        config: of the command. task: of all runs. module: the agent's. agent_config: of the first run's agent.
        sparse: True if rewards are made sparse. eval_episodes: of one evaluation of one run; 0: none.
        all: every run. active: those to train, in the order of the agents' run axis.
        finished: those that have ended. unconfirmed: ended runs whose files may have changed since.
        wandb: mode of wandb; "disabled" also if it cannot be used.
    """

    def __init__(self, config: CommonConfig, task: Task, in_memory: bool = False):
        """Resolves the settings and opens the directories.

        Args:
            config: of the command. task: of all runs.
            in_memory: whether the dataset is no file, so that only its content can tell whether it is the same.

        Raises:
            UserError: settings that do not fit, or a directory that cannot be used.
            Diverged: all runs have diverged before.
        """
        if config.dataset:  # A task's module may lie beside it.
            find_modules_in(Path(config.dataset).expanduser().parent)
        self.config, self.task = config, task
        plan = RunPlan.from_config(config, task)
        self.module, self.agent_config, self.sparse = plan.module, plan.agent_config, plan.sparse
        self.eval_episodes = 0 if task.kind == "robot" else config.eval_episodes
        if task.kind == "robot" and (config.online_steps or config.video_episodes):
            raise UserError(f"{task.name} has no simulation, only data: no online training and no videos of it")
        if task.rendered and (self.eval_episodes or config.online_steps):
            set_rendering_backend()
        defaults = self.module.get_config().to_dict()
        self.all: list[RunDirectory] = []
        try:
            for spec in plan.specs:
                self.all.append(RunDirectory(spec, plan.settings(spec), defaults, config.command))
            self._sort(in_memory)
        except BaseException:
            self.release()
            raise
        self.wandb = usable_wandb(config.wandb) if self.active else "disabled"
        if self.active:
            more = f" and {len(self.active) - 1} more" if self.active[1:] else ""
            print(f"{device_line()}\nrun: {self.active[0].path}{more}")
            print(f"{Path(config.agent).stem} on {config.env_name}; {plan.preset}; sparse={self.sparse}")
            idle = idle_settings(self.module, self.agent_config)
            reasons = {key: f" (no effect: {reason})" for key, reason in idle.items()}
            lines = [f"  {key} = {value}{reasons.get(key, '')}" for key, value in sorted(self.agent_config.items())]
            print("\n".join(lines), flush=True)

    def _sort(self, in_memory: bool) -> None:
        """Tells active runs from ended ones."""
        total = self.config.total_steps
        for run in self.all:
            if further := beyond(run.path, total):
                raise UserError(f"{run.path} {further}")
        self.finished = [run for run in self.all if run.finished(total) and not self._lacks_video(run)]
        diverged = [run for run in self.all if run.divergence()]
        self._divergences = [f"diverged before: {run.divergence()}" for run in diverged]
        self.active = [run for run in self.all if run not in self.finished + diverged]
        self.unconfirmed = [
            run for run in self.finished + diverged if in_memory or not run.same_sources(run.settings["flags"])
        ]
        if not self.unconfirmed:
            self._report_ended()
        if self.active:
            _check_common_step(self.active)

    def __enter__(self) -> "Runs":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.release()

    def release(self) -> None:
        """Releases the locks of all directories."""
        for run in self.all:
            run.release()

    def check_dataset(self, record: dict[str, Any]) -> None:
        """Checks that existing runs were trained on this dataset.

        Raises:
            UserError: one was not.
        """
        for run in (*self.active, *self.unconfirmed):
            run.check_dataset(record)

    def confirm(self, record: dict[str, Any]) -> None:
        """Checks that all runs are of this dataset; ended ones whose files may have changed note that they have not.

        Raises:
            UserError: one is of another dataset. Diverged: no run is left to train, and some have diverged.
        """
        self.check_dataset(record)
        for run in self.unconfirmed:
            run.write_flags(run.read_flags() | {"flags": run.settings["flags"]}, record, trains=False)
        if self.unconfirmed:
            self._report_ended()

    def _report_ended(self) -> None:
        """Prints the finished runs.

        Raises:
            Diverged: no run is left to train, and some have diverged.
        """
        if self.finished:
            names = ", ".join(str(run.path) for run in self.finished)
            print(f"finished before: {names}{'' if self.active else '; nothing to do'}")
        if not self.active:
            self.raise_divergences()

    @property
    def alive(self) -> list[int]:
        """Indices of the active runs that have not diverged."""
        return [index for index, run in enumerate(self.active) if not run.diverged]

    def diverge(self, index: int, step: int, quantity: str) -> None:
        """Ends an active run, `quantity` of which is not finite.

        Raises:
            Diverged: it was the last one.
        """
        self.active[index].diverge(step, quantity)
        self._divergences.append(f"diverged: {self.active[index].divergence()}")
        if not self.alive:
            self.raise_divergences()
        print(self._divergences[-1], file=sys.stderr, flush=True)

    def raise_divergences(self) -> None:
        """Raises Diverged if a run has diverged."""
        if self._divergences:
            raise Diverged("\n".join(self._divergences))

    def keys(self) -> UInt32[np.ndarray, "L 2"]:
        """Returns the PRNG key of each active run, below which its agent and its batches have their streams."""
        return np.stack([stream_key(run.spec.seed, self.config.stream) for run in self.active])

    def video_path(self, run: RunDirectory) -> Path:
        """Returns the file of a run's video."""
        return run.path / "videos" / f"step_{self.config.total_steps}.mp4"

    def _lacks_video(self, run: RunDirectory) -> bool:
        return self.config.video_episodes > 0 and not self.video_path(run).exists()


def _check_common_step(runs: Sequence[RunDirectory]) -> None:
    """Checks that runs have a common checkpoint, or none: starting over would overwrite the one that is further.

    Raises:
        UserError: names the run that is further and one that is not.
    """
    steps = [set(checkpoints.saved_steps(run.checkpoints)) for run in runs]
    if set.intersection(*steps) or not any(steps):
        return
    # Killed between the first saves of two runs: no run has anything but that one checkpoint.
    together = all(run.exists() for run in runs) and not any(run.finished(0) for run in runs)
    if together and len(set.union(*steps)) == 1:
        return
    newest = [max(own, default=0) for own in steps]
    ahead, behind = (runs[newest.index(pick(newest))].path for pick in (max, min))
    raise UserError(
        f"{ahead} is at step {max(newest)} and {behind} at step {min(newest)}, so they cannot resume together; "
        "give each its own command (--seed, --num_seeds=1, one value of --vary), or use another --run_group"
    )
