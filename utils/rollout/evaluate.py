"""Evaluation and videos of a single agent, such as that of `load_run`."""

import contextlib
import functools
import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gymnasium

from utils.errors import UserError, traceback_note
from utils.output.loggers import ProgressBar
from utils.rollout.evaluator import Evaluator, Result
from utils.rollout.policy import agent_policy, chunk_length
from utils.rollout.video import record
from utils.rollout.worker_pool import DEFAULT_TIMEOUT, WorkerError


def evaluate(
    agent: Any,
    make_env: Callable[[], gymnasium.Env],
    episodes: int = 50,
    *,
    seed: int = 0,
    step: int = 0,
    num_workers: int | None = None,
    horizon: int | None = None,
    env_timeout: float = DEFAULT_TIMEOUT,
    progress: bool = True,
    check: Callable[[], None] = lambda: None,
) -> Result:
    """Evaluates an agent over an exact number of episodes, in worker processes.

    With a run's seed, the step of the agent's checkpoint and the run's number of workers, the first episodes are those
    of the evaluation in training: `evaluate(*args, seed=settings["seed"], step=step)` gives the row of eval.csv.

    Args:
        agent: not stacked.
        make_env: makes an environment with actions in [-1, 1]; picklable, such as `functools.partial(make_env, name)`
            (envs/tasks.py).
        episodes: at least 1.
        seed, step: decide all initial states and noise.
        num_workers: number of processes; default: one a core.
        horizon: number of actions of a chunk that are executed; default: all.
        env_timeout: limit in seconds of a reset or step; 0: none.
        progress: True to show a progress bar on stderr.
        check: called several times a second; any exception it raises ends the evaluation.

    Returns:
        the episodes' success (if the environment reports it), return and length, and their means; see
        `Evaluator.evaluate`.

    Raises:
        UserError: the environment fails or does not fit the agent, or actions are not finite.
    """
    if episodes < 1:
        raise UserError(f"episodes={episodes}: it must be at least 1")
    check_picklable(make_env)
    policy, reset_seed = agent_policy(agent, seed=seed, step=step, horizon=horizon)
    limits: dict[str, Any] = {"num_workers": num_workers, "timeout": env_timeout, "check": check}
    with evaluation_errors("the evaluation"), contextlib.ExitStack() as stack:
        evaluator = stack.enter_context(Evaluator(make_env, chunk_length(agent, horizon), **limits))
        if not progress:
            return evaluator.evaluate(policy, episodes, reset_seed)
        bar = stack.enter_context(ProgressBar(episodes, description="evaluation", unit=" episodes"))
        return evaluator.evaluate(policy, episodes, reset_seed, lambda *_: bar.update(1))


def record_video(
    agent: Any,
    make_env: Callable[..., gymnasium.Env],
    path: str | Path | Sequence[str | Path],
    episodes: int = 1,
    *,
    seed: int = 0,
    step: int = 0,
    size: int | None = None,
    horizon: int | None = None,
    frame_skip: int = 3,
    fps: int = 15,
    env_timeout: float = DEFAULT_TIMEOUT,
    check: Callable[[], None] = lambda: None,
) -> Result:
    """Records the first episodes of `evaluate` with the same seed and step, in a grid.

    Args:
        agent, seed, step, horizon, env_timeout, check: see `evaluate`.
        make_env: as for `evaluate`; it also takes the keyword `render_mode`, and `width` and `height` if `size` is
            given.
        path, frame_skip, fps: see `record`.
        episodes: number of episodes.
        size: width and height of an episode's image, in pixels; default: the environment's.

    Returns:
        the result of `evaluate` for these episodes.

    Raises:
        UserError: the environment cannot be rendered or fails, or a file cannot be written.
    """
    if episodes < 1:
        raise UserError(f"episodes={episodes}: it must be at least 1")
    check_picklable(make_env)
    policy, reset_seed = agent_policy(agent, seed=seed, step=step, horizon=horizon)
    make = functools.partial(make_env, render_mode="rgb_array", **({"width": size, "height": size} if size else {}))
    rates: dict[str, Any] = {"frame_skip": frame_skip, "fps": fps, "timeout": env_timeout, "check": check}
    with evaluation_errors("the recording"):
        return record(make, policy, episodes, reset_seed, path, chunk_length(agent, horizon), **rates)


@contextlib.contextmanager
def evaluation_errors(what: str) -> Iterator[None]:
    """Turns failures of environments and of policies in the block into one-line errors; `what` names the block."""
    try:
        yield
    except WorkerError as error:
        raise UserError(f"{what} failed: {str(error).splitlines()[0]}{traceback_note(error)}") from error
    except FloatingPointError as error:
        raise UserError(f"{what} failed: {error}; take an earlier checkpoint") from error


def check_picklable(make_env: Any) -> None:
    """Checks that `make_env` can be sent to worker processes, which do not know the functions of a notebook.

    Raises:
        UserError: it cannot.
    """
    function = make_env
    while isinstance(function, functools.partial):
        function = function.func
    try:
        pickle.dumps(make_env)
        fits = getattr(function, "__module__", "") != "__main__"
    except Exception:  # Of many types.
        fits = False
    if not fits:
        advice = "use functools.partial(make_env, name), or a function of a module that can be imported"
        raise UserError(f"worker processes cannot import make_env; {advice}")
