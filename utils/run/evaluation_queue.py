"""A program's evaluations: of all its lanes, in the foreground or while training goes on, and never lost or doubled."""

from collections.abc import Callable, Sequence
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.serialization import to_state_dict

from utils.output.loggers import ProgressBar, read_csv
from utils.output.plotting import learning_curve
from utils.rollout.evaluator import Evaluator, Result
from utils.rollout.policy import evaluation_policy
from utils.rollout.worker_pool import WorkerError, environment_failed
from utils.run.loading import online_from, restore_agent
from utils.trees import tree_slice, tree_stack

# What evaluates a lane: (its number, stacked agents, its index in them).
Actor = tuple[int, Any, int]
ACTIONS = "the policy's actions"


class Cancelled(Exception):
    """The evaluation is not wanted any more."""


class EvaluationQueue:
    """Evaluates agents and appends to each lane's eval.csv; one evaluation at a time, in the order of their steps.

    One that overlaps with training works on a copy of the agents, since training gives theirs away. Until its rows are
    written it is owed: checkpoints hold the copy, so that a run that is taken up evaluates the same agents.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        lanes: Sequence[Any],
        episodes: int,
        check_signals: Callable[[], None],
        diverge: Callable[[int, str], None],
    ):
        """Starts nothing yet.

        Args:
            evaluator: closed by `close`. lanes: the program's runs. episodes: of one evaluation of one lane.
            check_signals: raises what ends the program.
            diverge: called with the number of a lane and what of it is not finite.
        """
        self._evaluator, self._lanes, self._episodes = evaluator, lanes, episodes
        self._check_signals, self._diverge = check_signals, diverge
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._cancelled = self._said = False
        evaluator.check = self._check
        self._step = 0
        self._actors: list[Actor] = []
        self._future: futures.Future[list[Result | None]] | None = None

    def start(self, step: int, agents: Any, numbers: Sequence[int], overlap: bool) -> None:
        """Evaluates the lanes `numbers` of stacked agents: now, or in the background once the one before has ended."""
        self.settle()
        if overlap:
            # The optimiser's state, the largest part of an agent, does not act.
            agents = jax.tree.map(jnp.copy, agents.replace(opt_state=()))
        actors = [(number, agents, number) for number in numbers]
        if overlap:
            self._begin(step, actors)
        else:
            self._record(step, actors, self._evaluate(step, actors))

    def settle(self, wait: bool = True) -> None:
        """Writes the rows of the evaluation in the background once it has ended; `wait`: waits for that.

        Raises:
            EnvironmentFailed: an environment failed in it; it stays pending.
        """
        while wait and self._future and not self._future.done():
            self._check_signals()
            futures.wait([self._future], timeout=0.2)
        if self._future and self._future.done():
            results, self._future = self._future.result(), None
            self._record(self._step, self._actors, results)

    def owed_step(self, number: int) -> int | None:
        """The step of a lane's evaluation whose row is not written yet, if there is one."""
        return self._step if self._future and any(own == number for own, *_ in self._actors) else None

    def owed(self, number: int) -> dict[str, Any]:
        """What a checkpoint holds of that evaluation: its step and the agent, as the entry 'owed'; or nothing."""
        if self.owed_step(number) is None:
            return {}
        agents, index = next((agents, index) for own, agents, index in self._actors if own == number)
        return {"owed": {"step": self._step, "agent": to_state_dict(jax.device_get(tree_slice(agents, index)))}}

    def take_up(self, owing: Sequence[dict[str, Any] | None], template: Callable[[int], Any]) -> None:
        """Goes on with what `owed` gave for each lane.

        Args:
            template: step → an agent of the kind that acts there.
        """
        for step in sorted({state["step"] for state in owing if state}):
            kind = template(step).replace(opt_state=())
            owed = {number: state["agent"] for number, state in enumerate(owing) if state and state["step"] == step}
            states = {
                n: restore_agent(kind, s, self._lanes[n].spec.directory, "the agent's file") for n, s in owed.items()
            }
            self.settle()
            self._begin(step, [(number, tree_stack([agent]), 0) for number, agent in states.items()])

    def cancel(self) -> None:
        """Lets the evaluation in the background stop, unless it has ended; it stays pending. Does not wait for it."""
        self._cancelled = True
        if self._future and self._future.done() and not self._future.exception():
            self.settle()

    def close(self) -> None:
        """Ends the thread and the evaluator's workers."""
        self._thread.shutdown()
        self._evaluator.close()

    def _begin(self, step: int, actors: list[Actor]) -> None:
        self._step, self._actors = step, actors
        self._future = self._thread.submit(self._evaluate, step, actors)

    def _check(self) -> None:
        """Ends an evaluation that is not to go on, in whichever thread."""
        if self._cancelled:
            raise Cancelled
        self._check_signals()

    def _evaluate(self, step: int, actors: list[Actor]) -> list[Result | None]:
        """Returns the evaluator's results for each of `actors`, None for one whose actions are not finite."""
        results: list[Result | None] = []
        with ProgressBar(self._episodes * len(actors), description="evaluation", unit=" episodes") as bar:
            for number, agents, index in actors:
                spec = self._lanes[number].spec
                policy, seed = evaluation_policy(spec.seed, agents, index, step)
                try:
                    results.append(self._evaluator.evaluate(policy, self._episodes, seed, lambda *_: bar.update(1)))
                except FloatingPointError:
                    results.append(None)
                except WorkerError as error:
                    raise environment_failed(error, f"evaluation of step {step} failed", spec.directory) from error
        return results

    def _record(self, step: int, actors: list[Actor], results: list[Result | None]) -> None:
        """Appends to each lane's eval.csv, draws its curve and prints a line."""
        for (number, *_), result in zip(actors, results, strict=True):
            run = self._lanes[number]
            if result is None:
                continue
            root, row = run.spec.directory, {key: value for key, value in result.items() if isinstance(value, float)}
            if "success_rate" not in row:
                # Environments may report success in solved episodes alone: no report then means that none was solved.
                if np.isfinite(read_csv(root / "eval.csv").get("success_rate", np.nan)).any():
                    row["success_rate"] = 0.0
                else:
                    self.say_return_only()
            run.log("eval", step, {"episodes": self._episodes} | row)
            picture, title = root / "learning_curve.png", run.settings["env_name"]
            learning_curve(root, picture, title=title, online_from=online_from(run.settings))
            figures = ", ".join(f"{key} {value:.3g}" for key, value in row.items())
            print(f"step {step}, {root.parent.name}/{root.name}: {figures}", flush=True)
        for (number, *_), result in zip(actors, results, strict=True):
            if result is None and not self._lanes[number].diverged:
                self._diverge(number, ACTIONS)

    def say_return_only(self) -> None:
        """Says once that the environment does not report success."""
        if not self._said:
            self._said = True
            keys = "neither info['success'] nor info['is_success']"
            print(f"{self._lanes[0].settings['env_name']}: {keys} is reported: return and length only", flush=True)
