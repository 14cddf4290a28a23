"""Phases of a run: training on the dataset; acting in the environment and training on both."""

import functools
import math
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from utils.data.batches import Arrays
from utils.data.replay_buffer import ReplayBuffer
from utils.devices import part_with
from utils.errors import UserError
from utils.observations import map_parts
from utils.random_streams import Stream, stream_key, stream_seed
from utils.rollout.env_runner import Chunk, EnvRunner, Outcome
from utils.rollout.evaluator import default_workers
from utils.rollout.policy import act
from utils.rollout.worker_pool import WorkerError, WorkerPool, converse, environment_failed
from utils.run.dataset import Dataset, rewards_of
from utils.run.runs import Runs
from utils.run.update_loop import UpdateLoop
from utils.system.signals import PreemptionGuard


@dataclass(frozen=True)
class TrainState:
    """Progress of the active runs.

    Attributes:
        step: updates on the dataset and environment steps done. agents: stacked along the run axis.
    """

    step: int
    agents: Any


@dataclass(frozen=True)
class Progress:
    """Progress of a phase between two steps.

    Attributes:
        info: of its updates, each [runs], on the device; empty if there were none. updates: how many.
        outcomes: run → its episodes that ended. diverged: runs whose actions are not finite.
    """

    info: Arrays = field(default_factory=dict)
    updates: int = 0
    outcomes: Mapping[int, list[Outcome]] = field(default_factory=dict)
    diverged: Sequence[int] = ()


class OfflinePhase:
    """Training on the dataset alone. Use as a context manager around its steps.

    Attributes:
        end: step at which the phase ends. interval: steps between its own stops of training; 0: none.
    """

    def __init__(self, end: int, updates: UpdateLoop, dataset: Dataset):
        self.end, self.interval = end, dataset.interval
        self._updates, self._dataset = updates, dataset

    def __enter__(self) -> "OfflinePhase":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def actors(self, state: TrainState) -> Any:
        """Returns the stacked agents that are evaluated at this step."""
        return state.agents

    def advance(self, state: TrainState, stop: int) -> tuple[TrainState, Progress]:
        """Updates the agents up to the step `stop`."""
        if self.interval and state.step % self.interval == 0:
            self._updates.set_data(self._dataset.at(state.step))
        count = stop - state.step
        agents, info = self._updates.run(state.agents, state.step, count)
        return TrainState(stop, agents), Progress(info, count)

    def state_dict(self, index: int) -> dict[str, Any]:
        """Returns the entries that the phase adds to a run's checkpoint: none."""
        return {}


class OnlinePhase:
    """Acting in the environments of all runs, one chunk at a time, each followed by its updates.

    Use as a context manager around its steps: it starts the environments, in worker processes, and ends them.

    Attributes:
        end: step at which the phase ends. interval: 0.
    """

    interval = 0

    def __init__(
        self,
        runs: Runs,
        updates: UpdateLoop,
        make_env: Callable[..., Any],
        observation: Any,
        guard: PreemptionGuard,
        first_step: int,
        start_training: int,
        saved: Sequence[Mapping[str, Any]] = (),
        base: Any = None,
    ):
        """Prepares the phase; environments start on entering it.

        Args:
            runs: of the command. updates: holds the dataset.
            make_env: makes an environment; picklable. observation: one of its observations.
            guard: ends the phase if a signal came. first_step: at which the phase starts.
            start_training: environment steps without updates.
            saved: each active run's checkpoint, if it is of this phase.
            base: stacked agents that act during the steps without updates, if not the agents themselves.

        Raises:
            UserError: the dataset is not on the device.
        """
        if not updates.on_device:
            raise UserError("online training needs the dataset on the device; give --dataset_placement=device, or less")
        self.config: Any = runs.config
        self.end = self.config.total_steps
        self._runs, self._updates, self._saved, self._guard = runs, updates, saved, guard
        self._start_training, self._base, self._first_step = start_training, base, first_step
        self._horizon, self._observation = runs.agent_config.horizon_length, observation
        self._workers = min(len(runs.active), self.config.eval_workers or default_workers())
        self._make_env, self._runners = make_env, list[EnvRunner]()
        self._keys = [stream_key(run.spec.seed, Stream.ACTING) for run in runs.active]

    def __enter__(self) -> "OnlinePhase":
        runs, action_dim = self._runs, self._updates.data["actions"].shape[1]
        steps, layout = self.end - self._first_step, self._updates.layout
        self._replay = ReplayBuffer(len(runs.active), steps, self._horizon, self._observation, action_dim, layout)
        self._pool = WorkerPool(self._make_env, self._workers, name=runs.task.name, timeout=self.config.env_timeout)
        started = self._converse({index: self._start(index) for index in range(len(runs.active))}, self._first_step)
        self._runners = [started[index].commit() for index in range(len(runs.active))]
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.close()

    def actors(self, state: TrainState) -> Any:
        """Returns the stacked agents that act and are evaluated at this step: the base's, or the trained ones."""
        return state.agents if self._base is None or state.step >= self._start_training else self._base

    def advance(self, state: TrainState, stop: int) -> tuple[TrainState, Progress]:
        """Executes one chunk, or its part up to `stop`, in every run, then its updates."""
        stop = min(stop, state.step + self._horizon)
        steps, alive = stop - state.step, self._runs.alive
        policies = {index: self._policy(index, self.actors(state)) for index in alive}
        results = self._converse({index: self._act(index, steps, policies[index]) for index in alive}, state.step)
        outcomes, diverged = {}, [index for index in alive if results[index] is None]
        for index in (index for index in alive if index not in diverged):
            runner, outcomes[index] = results[index]
            self._runners[index] = runner.commit()
        alive = list(outcomes)
        if not alive:
            return TrainState(stop, state.agents), Progress(diverged=diverged)
        agents, info, updates = state.agents, Arrays(), 0
        trained = min(steps, self._runners[alive[0]].transitions - self._start_training)
        if trained > 0 and self._replay.counts[alive].min() > 0:
            updates = trained * self.config.utd_ratio
            agents, info = self._updates.run_online(agents, self._replay, updates, self.config.balanced_sampling)
        return TrainState(stop, agents), Progress(info, updates, outcomes, diverged)

    def state_dict(self, index: int) -> dict[str, Any]:
        """Returns the entry that the phase adds to a run's checkpoint, also before the environments are restored."""
        if self._runners:
            return {"explorer": self._runners[index].state()}
        return {"explorer": self._saved[index]["explorer"]} if self._saved else {}

    def _start(self, index: int) -> Generator[Any, Any, EnvRunner]:
        """Starts a run's first episode, or restores the episode of its checkpoint."""
        run = self._runs.active[index]
        seed_of = functools.partial(stream_seed, run.spec.seed, Stream.RESET)
        runner = EnvRunner(self._replay, index, seed_of, self._runs.sparse, rewards_of(self.config))
        if not self._saved:
            return (yield from runner.begin())
        runner, same = yield from runner.restore(self._saved[index]["explorer"])
        if not same:
            print(
                f"{run.path}: its environment did not return to the same state: the current episode is cut off there",
                file=sys.stderr,
            )
        return runner

    def _policy(self, index: int, agents: Any) -> Callable[[Any, int, int], Chunk]:
        """Returns a run's policy: (observation, episode, step in it) → chunk [H, A].

        It raises FloatingPointError if actions are not finite.
        """
        key, (agents, index) = self._keys[index], part_with(agents, index)

        def policy(observation: Any, episode: int, step: int) -> Chunk:
            numbers = np.full(1, episode, np.int32), np.full(1, step, np.int32)
            chunk = np.asarray(act(agents, index, map_parts(np.stack, [observation]), key, *numbers))
            if not np.isfinite(chunk).all():
                raise FloatingPointError
            return chunk.reshape(self._horizon, -1)

        return policy

    def _act(
        self, index: int, steps: int, policy: Callable[[Any, int, int], Chunk]
    ) -> Generator[Any, Any, tuple[EnvRunner, list[Outcome]] | None]:
        """Takes `steps` environment steps of a run; returns None if actions are not finite."""
        try:
            return (yield from self._runners[index].act(steps, policy))
        except FloatingPointError:
            return None

    def _converse(self, dialogues: dict[int, Generator[Any, Any, Any]], step: int) -> dict[int, Any]:
        """Runs the dialogues of runs with their environments in parallel; nothing changes if one fails."""
        try:
            return converse(self._pool, dialogues, self._guard.check)
        except WorkerError as error:
            self._pool.close()
            what = f"acting online from step {step} on failed"
            raise environment_failed(error, what, self._runs.active[0].path) from error
        except BaseException:
            self._pool.close()
            raise


Phase = OfflinePhase | OnlinePhase


def success_unreported(outcomes: Mapping[int, list[Outcome]]) -> bool:
    """True if an episode ended without a report of success."""
    return any(math.isnan(outcome["success"]) for ended in outcomes.values() for outcome in ended)
