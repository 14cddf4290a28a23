"""Evaluations of all runs of a command, in the foreground or while training continues, none lost or doubled."""

from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.serialization import to_state_dict

from envs.minari_store import normalized_score, reference_scores
from utils.devices import run_of
from utils.output.loggers import ProgressBar, read_csv
from utils.output.plotting import learning_curve
from utils.rollout.evaluator import Evaluator, Result
from utils.rollout.policy import evaluation_policy
from utils.rollout.worker_pool import WorkerError, environment_failed
from utils.run.loading import online_from, restore_agent
from utils.run.metrics import MetricLoggers
from utils.run.runs import Runs
from utils.trees import tree_stack

# An agent to evaluate: index of its run, stacked agents, its index in them.
Entry = tuple[int, Any, int]
ACTIONS = "the policy's actions"


class Cancelled(Exception):
    """The evaluation is no longer wanted."""


class EvaluationQueue:
    """Evaluates agents and appends to eval.csv; one evaluation at a time, in the order of their steps.

    An evaluation that overlaps with training works on a copy of the agents, since training donates theirs. Until its
    rows are written it is pending: checkpoints hold the copy, so that a resumed run evaluates the same agents. Use as
    a context manager, which ends the thread and the workers.
    """

    def __init__(self, evaluator: Evaluator, runs: Runs, logs: MetricLoggers, check_signals: Callable[[], None]):
        """Starts the thread; workers start with the first evaluation.

        Args:
            evaluator: closed on leaving. runs: of the command. logs: theirs.
            check_signals: raises what ends the program.
        """
        self._evaluator, self._runs, self._logs, self._check_signals = evaluator, runs, logs, check_signals
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._cancelled = self._reported = False
        self._reference = reference_scores(runs.task.name)
        evaluator.check = self._check
        self._last = [-1] * len(runs.active)  # Step of each run's last evaluation, submitted or pending.
        self._step = 0
        self._entries: list[Entry] = []
        self._future: futures.Future[list[Result | None]] | None = None

    def submit(self, step: int, agents: Any, overlap: bool) -> None:
        """Evaluates the alive runs that have not been at this step.

        Args:
            step: of the agents. agents: stacked.
            overlap: in the background, once the previous evaluation has ended; else now.
        """
        missing = [index for index in self._runs.alive if not self.evaluated(index, step)]
        if not (self._runs.eval_episodes and missing):
            return
        self.drain()
        if overlap:
            # The optimiser's state, the largest part of an agent, does not act.
            agents = jax.tree.map(jnp.copy, agents.replace(opt_state=()))
        entries = [(index, agents, index) for index in missing]
        if overlap:
            self._start(step, entries)
        else:
            self._write(step, entries, self._evaluate(step, entries))
        self._last = [step] * len(self._last)

    def evaluated(self, index: int, step: int) -> bool:
        """True if a run's evaluation at `step` was submitted."""
        return self._last[index] == step

    def poll(self) -> None:
        """Writes the rows of the evaluation in the background if it has ended.

        Raises:
            EnvironmentFailed: an environment failed in it; it stays pending.
        """
        if self._future and self._future.done():
            results, self._future = self._future.result(), None
            self._write(self._step, self._entries, results)

    def drain(self) -> None:
        """Waits for the evaluation in the background and writes its rows; raises as `poll`."""
        while self._future and not self._future.done():
            self._check_signals()
            futures.wait([self._future], timeout=0.2)
        self.poll()

    def pending_step(self, index: int) -> int | None:
        """Returns the step of a run's evaluation whose row is not written yet, or None."""
        return self._step if self._future and any(own == index for own, *_ in self._entries) else None

    def state_dict(self, index: int, step: int) -> dict[str, Any]:
        """Returns the entries of a run's checkpoint at `step`: whether it is evaluated, and what is pending."""
        pending = self.pending_step(index)
        if pending == step:
            return {"evaluated": False}  # It starts anew, from the checkpoint's own agent.
        state: dict[str, Any] = {"evaluated": self.evaluated(index, step)}
        if pending is not None:
            agents, own = next((agents, own) for number, agents, own in self._entries if number == index)
            state["owed"] = {"step": pending, "agent": to_state_dict(jax.device_get(run_of(agents, own)))}
        return state

    def load_state_dict(self, states: Sequence[Mapping[str, Any]], step: int, template: Callable[[int], Any]) -> None:
        """Restores `state_dict` of every active run and restarts what is pending.

        Args:
            states: entries of the checkpoints. step: of them.
            template: step → an agent of the kind that acts there.
        """
        self._last = [step if state["evaluated"] else -1 for state in states]
        pending = [state.get("owed") if self._runs.eval_episodes else None for state in states]
        for then in sorted({state["step"] for state in pending if state}):
            kind = template(then).replace(opt_state=())
            agents = {
                index: restore_agent(kind, state["agent"], self._runs.active[index].path, "the agent's file")
                for index, state in enumerate(pending)
                if state and state["step"] == then
            }
            self.drain()
            self._start(then, [(index, tree_stack([agent]), 0) for index, agent in agents.items()])

    def cancel(self) -> None:
        """Stops the evaluation in the background without waiting, unless it has ended; it stays pending."""
        self._cancelled = True
        if self._future and self._future.done() and not self._future.exception():
            self.poll()

    def __enter__(self) -> "EvaluationQueue":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            self.cancel()
        finally:
            self._thread.shutdown()
            self._evaluator.close()

    def _start(self, step: int, entries: list[Entry]) -> None:
        self._step, self._entries = step, entries
        self._future = self._thread.submit(self._evaluate, step, entries)

    def _check(self) -> None:
        """Raises what ends an evaluation, in whichever thread."""
        if self._cancelled:
            raise Cancelled
        self._check_signals()

    def _evaluate(self, step: int, entries: list[Entry]) -> list[Result | None]:
        """Returns the evaluator's result for each entry, None where actions are not finite."""
        results: list[Result | None] = []
        episodes = self._runs.eval_episodes
        show = self._runs.config.progress
        with ProgressBar(episodes * len(entries), description="evaluation", unit=" episodes", show=show) as bar:
            for index, agents, own in entries:
                spec = self._runs.active[index].spec
                policy, seed = evaluation_policy(spec.seed, agents, own, step)
                try:
                    results.append(self._evaluator.evaluate(policy, episodes, seed, lambda *_: bar.update(1)))
                except FloatingPointError:
                    results.append(None)
                except WorkerError as error:
                    raise environment_failed(error, f"evaluation of step {step} failed", spec.directory) from error
        return results

    def _write(self, step: int, entries: list[Entry], results: list[Result | None]) -> None:
        """Appends to each run's eval.csv, draws its curve and prints a line."""
        found = {index: result for (index, *_), result in zip(entries, results, strict=True)}
        for index, result in found.items():
            if result is None:
                continue
            run = self._runs.active[index]
            row = {key: value for key, value in result.items() if isinstance(value, float)}
            if "success_rate" not in row:
                # Environments may report success in solved episodes alone: no report then means that none was solved.
                if success_reported(run.path):
                    row["success_rate"] = 0.0
                else:
                    self.report_no_success()
            if self._reference:
                row["normalized_score"] = normalized_score(self._reference, row["return_mean"])
            self._logs.write(index, "eval", step, {"episodes": self._runs.eval_episodes} | row)
            figure, title = run.path / "learning_curve.png", self._runs.config.env_name
            learning_curve(run.path, figure, title=title, online_from=online_from(run.settings))
            figures = ", ".join(f"{key} {value:.3g}" for key, value in row.items())
            print(f"step {step}, {run.path.parent.name}/{run.path.name}: {figures}", flush=True)
        for index, result in found.items():
            if result is None and not self._runs.active[index].diverged:
                self._runs.diverge(index, step, ACTIONS)

    def report_no_success(self) -> None:
        """Prints once that the environment does not report success."""
        if not self._reported:
            self._reported = True
            keys = "neither info['success'] nor info['is_success']"
            print(f"{self._runs.config.env_name}: {keys} is reported: return and length only", flush=True)


def success_reported(directory: Path) -> bool:
    """True if a row of a run's eval.csv has a success rate."""
    path = directory / "eval.csv"
    return path.exists() and bool(np.isfinite(read_csv(path).get("success_rate", np.nan)).any())
