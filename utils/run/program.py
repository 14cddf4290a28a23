"""A training program: the lanes it trains side by side, their logs and checkpoints, and what is due along the way."""

import functools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium
import jax
import numpy as np
from absl import flags
from flax.serialization import to_state_dict
from jaxtyping import UInt32
from ml_collections import ConfigDict

from envs.tasks import Task
from utils.data.batches import Arrays, example_batch
from utils.errors import Diverged, UserError
from utils.observations import map_parts, shapes
from utils.output.loggers import CsvLogger, ProgressBar, WandbLogger
from utils.random_streams import Stream, stream_key
from utils.rollout.evaluator import Evaluator
from utils.rollout.policy import decision_seconds, evaluation_policy
from utils.rollout.video import VideoUnavailable, record
from utils.rollout.worker_pool import EnvironmentFailed
from utils.run import checkpoints
from utils.run.agent_config import resolve_config
from utils.run.agent_files import agent_module, check_agent, load_agent
from utils.run.directory import RunDirectory, RunSpec, beyond, checkpoint_dir, make_run_specs, run_root
from utils.run.evaluation_queue import EvaluationQueue
from utils.run.loading import restore_agent
from utils.run.update_loop import NOT_FINITE, UPDATES_PER_CALL, all_finite, capped_warning, not_finite
from utils.system.files import find_modules_in
from utils.system.rendering import set_rendering_backend
from utils.system.signals import Interrupted, PreemptionGuard
from utils.trees import tree_slice, tree_stack

LOGS = ("train", "eval", "timing")
# Of files whose later rows may know more than the first.
COLUMNS = {
    "eval": ("episodes", "return_mean", "length_mean", "success_rate"),
    "online": ("return", "length", "success"),
}


def define_flag(values: flags.FlagValues, kind: str, name: str, default: Any, text: str, **bounds: Any) -> None:
    """Defines a flag of absl's kind `kind` in `values`."""
    getattr(flags, f"DEFINE_{kind}")(name=name, default=default, help=text, flag_values=values, **bounds)


def define_flags(values: flags.FlagValues, env_name: str, log: int, evaluate: int, save: int) -> None:
    """Defines what every training program has.

    Args:
        env_name: default task. log, evaluate, save: default intervals.
    """
    flag = functools.partial(define_flag, values)
    flag("string", "agent", "agents/otql.py", "Agent file; --agent.<field>=<value> changes a setting of it.")
    flag(
        "string", "env_name", env_name, "OGBench single task, Panda task, either with visual-; gym:<id>; robot:<name>."
    )
    flag("string", "preset", "paper", "paper: published settings of the domain; cpu: small networks, short runs; none.")
    flag("integer", "seed", 0, "First seed.", lower_bound=0, upper_bound=2**31)
    flag("integer", "num_seeds", 1, "Seeds trained side by side in one program.", lower_bound=1)
    flag("string", "vary", None, "Lanes over a real-valued setting, for example agent.lam=0.2,0.4,1.")
    flag("integer", "log_interval", log, "Steps between rows of train.csv.", lower_bound=1)
    flag("integer", "eval_interval", evaluate, "Steps between evaluations; 0: only at the end.", lower_bound=0)
    flag("integer", "save_interval", save, "Steps between checkpoints; 0: only at the end.", lower_bound=0)
    flag("integer", "eval_episodes", 50, "Episodes an evaluation; 0: no evaluations.", lower_bound=0)
    flag("bool", "eval_overlap", True, "Train on while evaluating; the numbers are the same.")
    flag("integer", "eval_workers", None, "Processes that step environments; default: one a core.", lower_bound=1)
    flag("float", "env_timeout", 120.0, "Seconds that a step or a reset may take; 0: any time.", lower_bound=0.0)
    flag("integer", "max_episode_steps", None, "Cuts episodes, as a time limit does.", lower_bound=1)
    flag("integer", "video_episodes", 0, "Episodes of the final policy in videos/.", lower_bound=0)
    flag("integer", "video_frame_skip", 3, "Environment steps a frame.", lower_bound=1)
    flag("string", "save_dir", "exp", "Runs are kept in <save_dir>/<run_group>/<env_name>/<agent>/sd<seed>.")
    flag("string", "run_group", "debug", "Name of a group of runs.")
    flag("enum", "wandb", "disabled", "Weights & Biases.", enum_values=["online", "offline", "disabled"])
    flag("integer", "horizon_length", None, "Actions in a chunk; default: the preset's.", lower_bound=1)
    flag("bool", "sparse", None, "Rewards -1 until solved, then 0; default: the preset's.")


def resolve(
    values: flags.FlagValues, task: Task, overrides: dict[str, str]
) -> tuple[ModuleType, ConfigDict, bool, str]:
    """What flags ask for: the agent's module, its config, whether rewards are made sparse, a line on the preset.

    Args:
        values: the parsed flags of `define_flags`. overrides: from `cli.parse`.

    Raises:
        UserError: an agent or a setting that there is not.
    """
    given = {k: values[k].value for k in ("horizon_length", "sparse") if values[k].value is not None}
    if given.keys() & overrides.keys():
        raise UserError("--horizon_length and --agent.horizon_length are one setting; give one of them")
    module = load_agent(values.agent)
    return module, *resolve_config(module, task.domain, values.preset, overrides | given)


class Run:
    """One lane's directory, logs and checkpoints."""

    def __init__(self, spec: RunSpec, settings: dict[str, Any], defaults: dict[str, Any]):
        self.spec = spec
        self.diverged = ""  # What is not finite, once training has diverged.
        self.settings = settings | {"seed": spec.seed, "config": spec.config.to_dict(), "varied": spec.varied}
        self.files = RunDirectory(spec.directory, self.settings, defaults)
        self.checkpoints = checkpoint_dir(spec.directory)
        self._warned = False

    def open_logs(self, logs: Sequence[str], positions: dict[str, int], mode: str, group: str) -> None:
        """Opens the CSV files `logs` at the positions of a checkpoint, or anew."""
        root = self.spec.directory
        self.csv = {name: CsvLogger(root / f"{name}.csv", positions.get(name), COLUMNS.get(name)) for name in logs}
        name = f"{root.parent.name}-{self.settings['env_name']}-{root.name}"
        self.wandb = WandbLogger(mode, root, group, name, self.settings)

    def log(self, name: str, step: int, row: dict[str, float]) -> None:
        """Appends a row to <name>.csv, and warns once if its couplings do not converge."""
        # Wall-clock times have a file of their own: the others must resume to the same bytes.
        self.csv[name].log(step, row)
        self.wandb.log(step, {f"{name}/{key}": value for key, value in row.items()})
        if not self._warned and (warning := capped_warning(row)):
            self._warned = True
            print(f"warning: {self.spec.directory}, step {step}: {warning}", file=sys.stderr)

    def close(self) -> None:
        """Closes the logs."""
        loggers: list[CsvLogger | WandbLogger] = [*self.csv.values(), self.wandb]
        for logger in loggers:
            logger.close()

    def save(self, step: int, agent: Any, evaluated: bool, extra: dict[str, Any]) -> None:
        """Writes a checkpoint of everything that the run needs to resume; `agent`: on the host."""
        positions = {name: self.csv[name].position() for name in self.csv}
        state = {"agent": to_state_dict(agent), "csv": positions, "evaluated": evaluated}
        checkpoints.save(self.checkpoints, step, state | extra)

    def diverge(self, step: int, quantity: str) -> None:
        """Ends the run at a step at which `quantity` is not finite; its last checkpoint stays."""
        self.diverged = quantity
        self.files.finish({"step": step, "diverged": quantity})

    def divergence(self) -> str:
        """Returns one line that says where the run diverged and what usually helps."""
        summary, saved = self.files.diverged(), checkpoints.saved_steps(self.checkpoints)
        assert summary is not None  # Asked only of a run that has diverged.
        kept = f"the checkpoint of step {saved[-1]} is sound" if saved else "there is no checkpoint"
        advice = "a smaller --agent.lr in another --run_group usually helps, or rewards of a smaller scale"
        where = f"{self.spec.directory} at step {summary['step']}"
        return f"{where}, not finite: {summary['diverged']}; {kept}; {advice}"


class Program:
    """Trains the lanes of one command to `total` steps, and takes up what was begun before.

    A phase of training is a loop of `visit` (what is due at this step), some training up to `until` at most, and
    `advance`, up to one of `ends`. Use as a context manager around all phases: a signal then saves before it ends the
    program.

    Attributes:
        flags: of the command line. config: the first lane's. sparse: whether rewards are to be made sparse.
        lanes: the runs that are not finished. agents: stacked along a lane axis. step: steps done.
        ends: steps at which a phase ends; what happens at intervals happens there too.
        base, base_steps: what acts and is evaluated before step `base_steps`, stacked as the agents are.
        extra: what a phase adds to the checkpoint of a lane, as a function of the lane's index.
        restored: the state of each lane's checkpoint, or None for a new run.
    """

    def __init__(
        self,
        values: flags.FlagValues,
        task: Task,
        overrides: dict[str, str],
        ends: Sequence[int],
        logs: Sequence[str] = (),
        stream: Stream = Stream.TRAINING,
    ):
        """Resolves the settings and opens the directories.

        Args:
            values: the parsed flags of `define_flags`. task: from parse_task. overrides: from `cli.parse`.
            ends: steps at which a phase ends, ascending; the last one is the program's end.
            logs: CSV files besides LOGS.
            stream: of all updates.
        """
        self.flags, self.task, self.ends, self.stream = values, task, tuple(ends), stream
        if values.dataset:  # A task's module may lie beside it.
            find_modules_in(Path(values.dataset).expanduser().parent)
        self.module, self.config, self.sparse, note = resolve(values, task, overrides)
        self.total, self._logs = self.ends[-1], (*LOGS, *logs)
        self._episodes = 0 if task.kind == "robot" else values.eval_episodes
        if task.kind == "robot" and (logs or values.video_episodes):
            raise UserError(f"{task.name} has no simulation, only data: no online training and no videos of it")
        if task.rendered and (self._episodes or logs):
            set_rendering_backend()
        agent, env_name = Path(values.agent).stem, values.env_name
        root = run_root(values.save_dir, values.run_group, env_name)
        seeds = range(values.seed, values.seed + values.num_seeds)
        settings = {"env_name": env_name, "agent": agent, "sparse": self.sparse, "domain": task.domain, "preset": note}
        # Two agent files of one name share a directory, but never a run.
        settings["agent_module"] = agent_module(self.module)
        settings |= {"flags": values.flag_values_dict(), "steps": self.total}
        self.base: Any = None
        self.base_steps = 0
        specs = make_run_specs(self.config, seeds, values.vary, root, agent)
        lanes = [Run(spec, settings, self.module.get_config().to_dict()) for spec in specs]
        for run in lanes:
            if further := beyond(run.spec.directory, self.total):
                raise UserError(f"{run.spec.directory} {further}")
        self.finished = [run for run in lanes if run.files.finished(self.total) and not self._lacks_video(run)]
        diverged = [run for run in lanes if run.files.diverged()]
        self.lanes = [run for run in lanes if run not in self.finished + diverged]
        self._divergences = [f"diverged before: {run.divergence()}" for run in diverged]
        # Ended on files that may be others: `confirm` compares what is in them.
        ended = self.finished + diverged
        self.unconfirmed = [run for run in ended if not run.files.same_sources(settings["flags"])]
        if not self.unconfirmed:
            self._say_finished()
        if diverged and not (self.lanes or self.unconfirmed):
            raise Diverged("\n".join(self._divergences))
        if self.lanes:
            check_together(self.lanes)
            print(f"{agent} on {env_name}; {note}; sparse={self.sparse}")
            print("\n".join(f"  {key} = {value}" for key, value in sorted(self.config.items())), flush=True)

    def check(self, dataset: dict[str, Any]) -> None:
        """Checks that runs begun before are of these data.

        Raises:
            UserError: one is not.
        """
        for run in (*self.lanes, *self.unconfirmed):
            run.files.check(dataset)

    def confirm(self, dataset: dict[str, Any]) -> None:
        """Checks that ended runs are of these data, where their files are not known to be the same.

        Raises:
            UserError: they are of others.
        """
        self.check(dataset)
        for run in self.unconfirmed:
            run.files.settle(run.files.recorded() | {"flags": run.settings["flags"]}, dataset)
        if self.unconfirmed:
            self._say_finished()
            if self._divergences and not self.lanes:
                raise Diverged("\n".join(self._divergences))

    def _say_finished(self) -> None:
        if self.finished:
            names = ", ".join(str(run.spec.directory) for run in self.finished)
            print(f"finished before: {names}{'' if self.lanes else '; nothing to do'}")

    def _video_path(self, run: Run) -> Path:
        return run.spec.directory / "videos" / f"step_{self.total}.mp4"

    def _lacks_video(self, run: Run) -> bool:
        """Whether a finished run is to be taken up again for its video."""
        return self.flags.video_episodes > 0 and not self._video_path(run).exists()

    def batch_keys(self) -> UInt32[np.ndarray, "L 2"]:
        """Each lane's key for the sampling of batches: that of its agent, below which it has its stream."""
        return np.stack([stream_key(run.spec.seed, self.stream) for run in self.lanes])

    def new_agents(self, data: dict[str, np.ndarray]) -> Any:
        """Stacks a new agent for each lane; a lane's seed fixes its initialisation and all that it draws."""
        example, agents = example_batch(data, self.config.horizon_length), []
        creators: dict[tuple, Callable[..., Any]] = {}
        check_agent(self.module, self.config, example, self.flags.agent)
        for spec in (run.spec for run in self.lanes):
            create = functools.partial(self.module.Agent.create, config=spec.config)
            creator = creators.setdefault(tuple(spec.varied.items()), jax.jit(create))
            agents.append(creator(stream_key(spec.seed, self.stream), example))
        if len({jax.tree.structure(agent) for agent in agents}) > 1:
            raise UserError(f"--vary={self.flags.vary}: the values need different networks; give each its own command")
        return tree_stack(agents)

    def start(
        self,
        agents: Any,
        dataset: dict[str, Any],
        observation: Any,
        make_env: Callable[..., gymnasium.Env],
        data_card: dict[str, Any],
    ) -> None:
        """Writes the settings, takes up the newest common checkpoint, and opens the logs there.

        Args:
            agents: new agents, as they are if there is no checkpoint. dataset: what flags.json says of the data.
            observation: any, [o] or with images. make_env: makes an environment, picklable; takes make_env's keywords.
            data_card: what flags.json says of the data besides, which no start is compared by.
        """
        self.check(dataset)
        found = checkpoints.load_common([run.checkpoints for run in self.lanes])
        self.restored: list[dict[str, Any]] | None
        self.step, self.restored = found or (0, None)
        if self.step > self.total:
            directory = self.lanes[0].spec.directory
            raise UserError(f"{directory} is at step {self.step} already; give {self.step} steps or more in all")
        if self.restored:
            agents = tree_stack(
                [
                    restore_agent(tree_slice(agents, i), state["agent"], run.spec.directory, self.flags.agent)
                    for i, (run, state) in enumerate(zip(self.lanes, self.restored, strict=True))
                ]
            )
            print(f"resuming at step {self.step}")
        widths = shapes(observation) | {"chunk_dim": agents.config.action_dim, "nfe": agents.nfe}
        for run in self.lanes:
            run.files.settle(run.settings | widths | {"data_card": data_card}, dataset)
        self.agents, self.observation, self.make_env = agents, observation, make_env
        if self.flags.max_episode_steps:
            self.make_env = functools.partial(make_env, max_episode_steps=self.flags.max_episode_steps)
        states = self.restored or [{"csv": {}, "evaluated": False}] * len(self.lanes)
        self.evaluated = [bool(state["evaluated"]) for state in states]
        for run, state in zip(self.lanes, states, strict=True):
            run.open_logs(self._logs, state["csv"], self.flags.wandb, self.flags.run_group)

    def __enter__(self) -> "Program":
        self.signals, self._spent, self._updates = PreemptionGuard(), 0.0, 0
        self.extra: Callable[[int], dict[str, Any]] = lambda index: {}
        patience = {"name": self.task.name, "timeout": self.flags.env_timeout}
        workers = self.flags.eval_workers
        evaluator = Evaluator(self.make_env, self.config.horizon_length, num_workers=workers, **patience)
        self.evaluations = EvaluationQueue(evaluator, self.lanes, self._episodes, self.signals.check, self.diverge)
        if self.restored and self._episodes:
            owing = [state.get("owed") for state in self.restored]
            self.evaluations.take_up(owing, lambda step: tree_slice(self.actors_at(step), 0))
        self._clock, self._bar = time.perf_counter(), ProgressBar(self.total, initial=self.step)
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            self.evaluations.cancel()
            if kind and issubclass(kind, (Interrupted, EnvironmentFailed)):
                self.save()
        finally:
            self._bar.close()
            self.evaluations.close()
            for run in self.lanes:
                run.close()
            self.signals.release()

    def check_phase(self, name: str, first_step: int) -> None:
        """Refuses a checkpoint from before `first_step` that has what the phase after it adds, `name`, or the reverse.

        Raises:
            UserError: the steps of the phases are not those of the run that is taken up.
        """
        if not self.restored:
            return
        has = name in self.restored[0]
        if (has and self.step < first_step) or (not has and self.step > first_step):
            directory = self.lanes[0].spec.directory
            raise UserError(f"{directory} is at step {self.step}, in another phase; give the same steps as before")

    @property
    def alive(self) -> list[int]:
        """Numbers of the lanes that have not diverged."""
        return [index for index, run in enumerate(self.lanes) if not run.diverged]

    @property
    def actors(self) -> Any:
        """What acts at this step: the agents, or before them the base."""
        return self.actors_at(self.step)

    def actors_at(self, step: int) -> Any:
        """What acts at `step`."""
        return self.base if step < self.base_steps else self.agents

    def due(self, interval: int) -> bool:
        """Whether what happens every `interval` steps (0: only at the end) is due at this step."""
        return self.step in self.ends or bool(interval and self.step and self.step % interval == 0)

    def until(self, *intervals: int) -> int:
        """The first step from here at which a segment ends or something is due."""
        own = (
            UPDATES_PER_CALL,
            self.flags.log_interval,
            self.flags.eval_interval,
            self.flags.save_interval,
            *intervals,
        )
        return min(
            *(end for end in self.ends if end > self.step),
            *((self.step // interval + 1) * interval for interval in own if interval),
        )

    def visit(self) -> None:
        """Evaluates and saves if that is due at this step, and ends the program if a signal came.

        Raises:
            Interrupted: a signal came.
        """
        self.evaluations.settle(wait=False)
        if self.due(self.flags.eval_interval) or self.due(self.flags.save_interval):
            for index in self._broken():
                self.diverge(index, not_finite({}, tree_slice(self.agents, index)))
        missing = [number for number in self.alive if not self.evaluated[number]]
        if self._episodes and self.due(self.flags.eval_interval) and missing:
            # There is no training after the last step that the evaluation could overlap with.
            overlap = self.flags.eval_overlap and self.step < self.total
            self.evaluations.start(self.step, self.actors, missing, overlap)
            self.evaluated = [True] * len(self.lanes)
        if self.due(self.flags.save_interval):
            self.save()
        self.signals.check()
        self._clock = time.perf_counter()

    def advance(self, until: int, info: Arrays, updates: int) -> None:
        """Notes that training went on to step `until` with `updates` updates, whose infos were `info`, each [lanes]."""
        info = jax.device_get(info)
        failed = info.pop(NOT_FINITE, np.zeros(len(self.lanes)))
        self._spent, self._updates = self._spent + time.perf_counter() - self._clock, self._updates + updates
        self._bar.update(until - self.step, {k: float(value[0]) for k, value in info.items() if k.endswith("loss")})
        self.step, self.evaluated, self._clock = until, [False] * len(self.lanes), time.perf_counter()
        diverged = [index for index in self.alive if failed[index]]
        due = self.due(self.flags.log_interval) and info
        for index in self.alive if due else diverged:
            row = {key: float(value[index]) for key, value in info.items()}
            self.lanes[index].log("train", self.step, row)
            self.lanes[index].log("timing", self.step, {"seconds": self._spent, "updates": self._updates})
        if due:
            self._spent, self._updates = 0.0, 0
        for index in diverged:
            row = {key: float(value[index]) for key, value in info.items()}
            self.diverge(index, not_finite(row, tree_slice(self.agents, index)))

    def _broken(self) -> list[int]:
        """Returns the numbers of the lanes that have diverged unseen: with parameters that are not finite."""
        finite = np.asarray(jax.vmap(all_finite)(self.agents))
        return [index for index in self.alive if not finite[index]]

    def diverge(self, index: int, quantity: str) -> None:
        """Ends one lane, `quantity` of which is not finite, and the program if it was the last one.

        Raises:
            Diverged: no lane is left.
        """
        self.evaluations.settle()  # The agent that it has a copy of was sound.
        self.lanes[index].diverge(self.step, quantity)
        self._divergences.append(f"diverged: {self.lanes[index].divergence()}")
        if not self.alive:
            raise Diverged("\n".join(self._divergences))
        print(self._divergences[-1], file=sys.stderr, flush=True)

    def save(self) -> None:
        """Writes a checkpoint of every lane whose parameters are finite."""
        broken = self._broken()
        for index in (index for index in self.alive if index not in broken):
            # An evaluation of this very step starts again from the checkpoint's own agent.
            due = self.evaluations.owed_step(index) == self.step
            owed = {} if due else self.evaluations.owed(index)
            agent, evaluated = jax.device_get(tree_slice(self.agents, index)), self.evaluated[index] and not due
            self.lanes[index].save(self.step, agent, evaluated, self.extra(index) | owed)

    def finish(self) -> None:
        """Waits for evaluations, records videos and marks the runs as finished."""
        self.evaluations.settle()
        cost = {"milliseconds_per_action": self._milliseconds_per_action()}
        for index in self.alive:
            run = self.lanes[index]
            if self.flags.video_episodes:
                make = functools.partial(self.make_env, render_mode="rgb_array", width=320, height=320)
                policy, seed = evaluation_policy(run.spec.seed, self.agents, index, self.step)
                episodes, video, horizon = self.flags.video_episodes, self._video_path(run), self.config.horizon_length
                try:
                    skip = self.flags.video_frame_skip
                    patience = {"timeout": self.flags.env_timeout, "check": self.signals.check}
                    record(make, policy, episodes, seed, video, horizon, frame_skip=skip, **patience)
                except VideoUnavailable as reason:
                    print(f"no video: {reason}", file=sys.stderr)
            run.files.finish({"step": self.step} | cost)
            print(f"finished: {run.spec.directory}")
        if self._divergences:
            raise Diverged("\n".join(self._divergences))

    def _milliseconds_per_action(self) -> float:
        """Median time to choose one environment action; a chunk, chosen for one observation, has several."""
        seconds = decision_seconds(self.agents, map_parts(np.stack, [self.observation]))
        return 1000 * float(np.median(seconds)) / self.config.horizon_length


def check_together(lanes: Sequence[Run]) -> None:
    """Refuses to train side by side what is not at the same step: starting over would overwrite what is further on.

    Raises:
        UserError: names the run that is further on and one that is not.
    """
    steps = [set(checkpoints.saved_steps(run.checkpoints)) for run in lanes]
    if set.intersection(*steps) or not any(steps):
        return
    # Killed between the first saves of two lanes: no run has anything but that one checkpoint.
    together = all(run.files.begun() for run in lanes) and not any(run.files.finished(0) for run in lanes)
    if together and len(set.union(*steps)) == 1:
        return
    newest = [max(own, default=0) for own in steps]
    ahead, behind = (lanes[newest.index(pick(newest))].spec.directory for pick in (max, min))
    raise UserError(
        f"{ahead} is at step {max(newest)} and {behind} at step {min(newest)}, so they cannot go on side by side; "
        "give each its own command (--seed, --num_seeds=1, one value of --vary), or use another --run_group"
    )
