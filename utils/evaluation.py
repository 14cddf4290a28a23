"""Batched evaluation: worker processes step the environments, the policy acts for all of them at once in the parent.

The outcome of episode i is a function of (policy, seed, i) alone, whatever the number of workers and environments.
"""

import math
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any

import gymnasium
import numpy as np

from utils.observations import as_observation, map_parts

Policy = Callable[[Any, np.ndarray, np.ndarray], Any]
MAX_WORKERS, DEFAULT_BATCH = 16, 8
# Ctrl-C and SIGTERM, which may reach the whole group, are the parent's business, from the first line on. A program of
# its own, not multiprocessing's spawn, because that imports the main program, and with it JAX, in each worker.
WORKER = (
    "import signal; [signal.signal(s, signal.SIG_IGN) for s in (signal.SIGINT, signal.SIGTERM)]; "
    "from {module} import _serve; _serve({fd})"
)


class WorkerError(RuntimeError):
    """A worker raised or died; the first line says what happened, the rest is the worker's traceback."""


def episode_seed(seed: int, episode: int) -> int:
    """The seed that episode number `episode` of an evaluation with `seed` resets with."""
    return int(np.random.SeedSequence((seed, episode)).generate_state(1)[0])


class Evaluator:
    """Runs a policy for an exact number of episodes, many at a time.

    Workers start at the first `evaluate`, each environment when it is first needed, and both are kept for later
    calls. Workers import what `make_env` imports, nothing else, and end when the parent closes its pipe or dies.
    One call at a time; any thread may make it.
    """

    def __init__(
        self,
        make_env: Callable[[], gymnasium.Env],
        horizon: int,
        *,
        num_workers: int | None = None,
        envs_per_worker: int | None = None,
        environ: Mapping[str, str] | None = None,
    ):
        """Starts nothing yet.

        Args:
            make_env: makes an environment with actions in [-1, 1], and observations that are vectors or have images
                (utils/observations.py); picklable.
            horizon: actions in a chunk, executed open loop.
            num_workers: processes (default: one a core that this process may use, at most 16).
            envs_per_worker: environments that a worker steps in turn (default: 8 in all, at least 1 each). An OGBench
                arm takes 1 s and 150 MB, and 400 MB for a worker; small batches waste the policy's time.
            environ: environment variables of the workers, besides the parent's.
        """
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._num_workers = num_workers or min(cores, MAX_WORKERS)
        self.batch_size = self._num_workers * (envs_per_worker or math.ceil(DEFAULT_BATCH / self._num_workers))
        self._make_env, self._horizon, self._environ = make_env, horizon, dict(environ or {})
        self._workers: dict[int, _Worker] = {}

    def evaluate(
        self, policy: Policy, num_episodes: int, seed: int, progress: Callable[[int, int], None] | None = None
    ) -> dict[str, np.ndarray | float]:
        """Runs episodes 0 … num_episodes - 1 to their end.

        Args:
            policy: (observations [B, o] float32, or with images, episodes [B] int32, chunks [B] int32) -> chunks of
                actions [B, horizon · action_dim], clipped to [-1, 1] here. B is always `batch_size`; rows that no
                running episode uses repeat an earlier one and their actions are dropped. Noise must depend on
                (episode, chunk), not on the row.
            num_episodes: at least 1.
            seed: not negative; with the number of an episode it gives the seed of its reset.
            progress: called with (episodes done, num_episodes) when an episode ends.

        Returns:
            'success' (info['success'] at the end, 0 or 1), 'return' (sum of rewards), 'length' (environment steps),
            arrays [num_episodes] in order, and their means 'success_rate', 'return_mean', 'length_mean'.
            The two on success are absent unless the environment reports it at the end of every episode.

        Raises:
            ValueError: no episodes, or the policy's actions have the wrong shape.
            FloatingPointError: the policy's actions are not finite.
            WorkerError: an environment raised or its worker died. The next call starts new workers.
        """
        if num_episodes < 1:
            raise ValueError(f"num_episodes is {num_episodes}; it must be at least 1")
        try:
            outcomes = self._run(policy, num_episodes, seed, progress or (lambda done, total: None))
        except BaseException:
            self.close()  # Replies may be on their way: new workers are the only clean start.
            raise
        success, returns, lengths = np.array(outcomes).T
        result = {
            "return": returns,
            "length": lengths.astype(int),
            "return_mean": returns.mean(),
            "length_mean": lengths.mean(),
        }
        if not np.isnan(success).any():
            result |= {"success": success, "success_rate": success.mean()}
        return {name: value if value.ndim else float(value) for name, value in result.items()}

    def _run(
        self, policy: Policy, num_episodes: int, seed: int, progress: Callable[[int, int], None]
    ) -> list[tuple[float, float, int]]:
        """The (success, return, length) of each episode.

        A slot is a row of the batch and an environment. A slot whose episode ends starts the next one at once, while
        other workers still step. Episodes are started in order and all are finished, so short ones are not favoured.
        """
        episodes, chunks = np.zeros((2, self.batch_size), np.int32)
        observations: list[Any] = []
        outcomes: dict[int, tuple[float, float, int]] = {}
        queue = iter(range(num_episodes))

        def begin(slots: list[int]) -> dict[int, int]:
            """Gives the slots the next episodes, as far as there are any; returns the seeds of their resets."""
            seeds = {}
            for slot, episode in zip(slots, queue, strict=False):
                episodes[slot], chunks[slot], seeds[slot] = episode, 0, episode_seed(seed, episode)
            return seeds

        requests: dict[int, Any] = begin(list(range(self.batch_size)))
        while True:
            live, busy = [], self._send(requests)
            while busy:
                for connection in wait(list(busy)):
                    ended = []
                    for slot, observation, outcome in busy[connection].receive():
                        if outcome is None:
                            observations = observations or [observation] * self.batch_size
                            observations[slot] = observation
                            live.append(slot)
                        else:
                            outcomes[int(episodes[slot])] = outcome
                            progress(len(outcomes), num_episodes)
                            ended.append(slot)
                    if resets := begin(ended):
                        busy[connection].send(resets)
                    else:
                        del busy[connection]
            if not live:
                return [outcomes[episode] for episode in range(num_episodes)]
            actions = self._act(policy, observations, episodes, chunks, live)
            requests = dict(zip(live, actions, strict=True))
            chunks[live] += 1

    def _act(
        self, policy: Policy, observations: list[Any], episodes: np.ndarray, chunks: np.ndarray, live: list[int]
    ) -> np.ndarray:
        """The policy's clipped actions for the live slots, [len(live), horizon, action_dim]."""
        # Copies: a policy may keep its arguments, and JAX on a CPU shares their memory.
        stacked = map_parts(np.stack, observations)
        actions = np.asarray(policy(stacked, episodes.copy(), chunks.copy()), np.float32)
        if actions.ndim != 2 or len(actions) != self.batch_size or actions.shape[1] % self._horizon:
            expected = f"[{self.batch_size}, {self._horizon} * action_dim]"
            raise ValueError(f"the policy returned actions of shape {actions.shape}, not {expected}")
        actions = actions[live].reshape(len(live), self._horizon, -1)
        if not np.isfinite(actions).all():
            raise FloatingPointError("the policy's actions are not finite: training has diverged")
        return np.clip(actions, -1, 1)

    def _send(self, requests: dict[int, Any]) -> dict[Connection, "_Worker"]:
        """Sends each slot's request to its worker; returns the workers that now owe a reply, by connection."""
        shares: dict[int, dict[int, Any]] = {}
        for slot, request in requests.items():
            shares.setdefault(slot % self._num_workers, {})[slot] = request
        for index in shares.keys() - self._workers.keys():
            self._workers[index] = _Worker(self._make_env, self._environ)
        for index, share in shares.items():
            self._workers[index].send(share)
        return {self._workers[index].connection: self._workers[index] for index in shares}

    def close(self) -> None:
        """Ends the workers; a later `evaluate` starts new ones."""
        for worker in self._workers.values():
            worker.kill()
        self._workers.clear()

    def __enter__(self) -> "Evaluator":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Worker:
    """The parent's end of a worker process."""

    def __init__(self, make_env: Callable[[], gymnasium.Env], environ: dict[str, str]):
        self.connection, other_end = Pipe()
        with other_end:
            self._process = subprocess.Popen(
                # -u: no output lost in a buffer; -P: the parent's search path and nothing before it.
                [sys.executable, "-u", "-P", "-c", WORKER.format(module=__name__, fd=other_end.fileno())],
                pass_fds=[other_end.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environ},
            )
        self.send(make_env)

    def send(self, message: Any) -> None:
        """Sends a message; if the worker is dead, `receive` says why."""
        with suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send(message)

    def receive(self) -> list[tuple[int, Any, tuple[float, float, int] | None]]:
        """The worker's replies, (slot, observation, outcome if the episode has ended).

        Raises:
            WorkerError: the worker raised or died.
        """
        try:
            reply = self.connection.recv()
        except (EOFError, ConnectionResetError):
            code = self._process.wait()
            died = f"killed by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
            hint = "; too little memory?" if code == -signal.SIGKILL else ""
            raise WorkerError(f"an evaluation worker died, {died}{hint}") from None
        if isinstance(reply, str):
            raise WorkerError(reply)
        return reply

    def kill(self) -> None:
        """Ends the process, which has nothing to save, and waits for its end."""
        self.connection.close()
        self._process.kill()
        self._process.wait()


class _Slot:
    """A worker's environment, with a state of NumPy's global generator of its own, which OGBench partly draws from."""

    def __init__(self, env: gymnasium.Env):
        self._env = env

    def reset(self, seed: int) -> tuple[Any, None]:
        """Starts an episode; returns its first observation."""
        np.random.seed(seed)
        self._env.unwrapped.action_space.seed(seed)  # OGBench's mazes draw random actions in their reset.
        observation, _ = self._env.reset(seed=seed)
        self._random_state = np.random.get_state()
        self._return, self._length = 0.0, 0
        return as_observation(observation), None

    def step(self, actions: np.ndarray) -> tuple[Any, tuple[float, float, int] | None]:
        """Executes a chunk, [horizon, action_dim], or its part up to the end of the episode.

        Returns:
            the last observation and, if the episode has ended, (success, return, length), success NaN if unknown.
        """
        np.random.set_state(self._random_state)
        outcome = None
        for action in actions:
            observation, reward, terminated, truncated, info = self._env.step(action)
            self._return += float(reward)
            self._length += 1
            if terminated or truncated:
                outcome = float(info.get("success", np.nan)), self._return, self._length
                break
        self._random_state = np.random.get_state()
        return as_observation(observation), outcome


def _serve(fd: int) -> None:
    """A worker's main loop, on the pipe with descriptor `fd`.

    The first message is make_env, each later one {slot: seed to reset with, or chunk to execute}. Replies are lists of
    (slot, observation, outcome or None), or one string that says why the worker gives up.
    """
    connection, slots = Connection(fd), {}
    try:
        make_env = connection.recv()
        while True:
            replies = []
            for slot, request in connection.recv().items():
                if slot not in slots:
                    slots[slot] = _Slot(make_env())
                act = slots[slot].reset if isinstance(request, int) else slots[slot].step
                replies.append((slot, *act(request)))
            connection.send(replies)
    except Exception as error:  # EOFError: the parent has died; nobody reads the message.
        with suppress(OSError):
            connection.send(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
    os._exit(0)  # Without the interpreter's teardown: OpenGL contexts fail noisily in it.
