"""The training loop: phases of training, and what is due between their steps."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.serialization import to_state_dict

from utils.devices import run_of
from utils.rollout.worker_pool import EnvironmentFailed
from utils.run import checkpoints
from utils.run.evaluation_queue import ACTIONS, EvaluationQueue
from utils.run.metrics import MetricLoggers, row_of
from utils.run.phases import Phase, TrainState, success_unreported
from utils.run.runs import Runs
from utils.run.schedule import Schedule
from utils.run.update_loop import all_finite, not_finite
from utils.system.signals import Interrupted, PreemptionGuard

OnCheckpoint = Callable[[Path, int, Any], None]  # (run's directory, step, agent on the host)


class TrainingLoop:
    """Trains the active runs of a command, evaluates, logs and saves them.

    Args:
        runs: of the command. logs: of their metrics. evaluations: theirs. guard: catches signals.
        on_checkpoint: called with every checkpoint after it is written.
    """

    def __init__(
        self,
        runs: Runs,
        logs: MetricLoggers,
        evaluations: EvaluationQueue,
        guard: PreemptionGuard,
        on_checkpoint: OnCheckpoint | None = None,
    ):
        self._runs, self._logs, self._evaluations, self._guard = runs, logs, evaluations, guard
        self._schedule, self._on_checkpoint = Schedule.from_config(runs.config), on_checkpoint

    def run(self, state: TrainState, phases: Sequence[Phase]) -> TrainState:
        """Runs all phases, in order, and returns the final state.

        Raises:
            Interrupted: a signal came; everything is saved. EnvironmentFailed: an environment failed; likewise.
            Diverged: no run is left.
        """
        phase = phases[0]
        try:
            for phase in phases:
                if state.step >= phase.end:
                    continue
                with phase:
                    while state.step < phase.end:
                        self._do_due(state, phase)
                        state = self._advance(state, phase)
            self._do_due(state, phase)
            self._evaluations.drain()
        except (Interrupted, EnvironmentFailed):
            self._evaluations.cancel()
            infinite = self._infinite(state.agents)
            self._save(state, phase, [index for index in self._runs.alive if index not in infinite])
            raise
        return state

    def _do_due(self, state: TrainState, phase: Phase) -> None:
        """Evaluates and saves if that is due at this step, and raises Interrupted if a signal came."""
        evaluate, save = self._schedule.is_eval(state.step), self._schedule.is_save(state.step)
        self._evaluations.poll()
        if evaluate or save:
            for index in self._infinite(state.agents):
                self._diverge(index, state.step, not_finite({}, run_of(state.agents, index)))
        if evaluate:
            # After the last step there is no training that the evaluation could overlap with.
            overlap = self._runs.config.eval_overlap and state.step < self._runs.config.total_steps
            self._evaluations.submit(state.step, phase.actors(state), overlap)
        if save:
            self._save(state, phase, self._runs.alive)
        self._guard.check()

    def _advance(self, state: TrainState, phase: Phase) -> TrainState:
        """Trains up to the next stop and logs."""
        start, clock = state.step, time.perf_counter()
        state, progress = phase.advance(state, self._schedule.next_stop(start, phase.interval))
        info, seconds = jax.device_get(progress.info), time.perf_counter() - clock
        for index in progress.diverged:
            self._diverge(index, start, ACTIONS)
        for index, outcomes in progress.outcomes.items():
            for outcome in outcomes:
                self._logs.write(index, "online", state.step, outcome)
        if success_unreported(progress.outcomes):
            self._evaluations.report_no_success()
        due = self._schedule.is_log(state.step)
        for index in self._logs.write_training(start, state.step, info, seconds, progress.updates, due):
            self._diverge(index, state.step, not_finite(row_of(info, index), run_of(state.agents, index)))
        return state

    def _save(self, state: TrainState, phase: Phase, indices: Sequence[int]) -> None:
        """Writes a checkpoint of these runs, whose arrays are finite."""
        for index in indices:
            run, agent = self._runs.active[index], jax.device_get(run_of(state.agents, index))
            entries = {"agent": to_state_dict(agent), "csv": self._logs.positions(index)}
            entries |= phase.state_dict(index) | self._evaluations.state_dict(index, state.step)
            checkpoints.save(run.checkpoints, state.step, entries)
            if self._on_checkpoint:
                self._on_checkpoint(run.path, state.step, agent)

    def _infinite(self, agents: Any) -> list[int]:
        """Returns the indices of the alive runs whose agents have arrays that are not finite."""
        finite = np.asarray(jax.vmap(all_finite)(agents))
        return [index for index in self._runs.alive if not finite[index]]

    def _diverge(self, index: int, step: int, quantity: str) -> None:
        """Ends one run, `quantity` of which is not finite."""
        self._evaluations.drain()  # The agent of a pending evaluation was sound.
        self._runs.diverge(index, step, quantity)
