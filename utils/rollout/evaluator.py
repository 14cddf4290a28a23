"""Batched evaluation: workers (worker_pool.py) step environments, and the policy acts for all of them in the parent.

The outcome of episode i is a function of (policy, seed, i) alone, whatever the number of workers and environments.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NotRequired, TypedDict

import gymnasium
import numpy as np

from utils.observations import map_parts
from utils.rollout.worker_pool import DEFAULT_TIMEOUT, MAX_WORKERS, Request, Steps, WorkerPool
from utils.system.resources import usable_cores

Policy = Callable[[Any, np.ndarray, np.ndarray], Any]
DEFAULT_BATCH = 8
# Result of `Evaluator.evaluate`; the last two are present if the environment reports success.
Result = TypedDict(
    "Result",
    {
        "return": np.ndarray,
        "length": np.ndarray,
        "return_mean": float,
        "length_mean": float,
        "success": NotRequired[np.ndarray],
        "success_rate": NotRequired[float],
    },
)


def episode_seed(seed: int, episode: int) -> int:
    """Returns the seed of the reset of episode number `episode` in an evaluation with `seed`."""
    return int(np.random.SeedSequence((seed, episode)).generate_state(1)[0])


def default_workers() -> int:
    """Returns the number of cores that this process may use, at most MAX_WORKERS."""
    return min(usable_cores(), MAX_WORKERS)


class Evaluator:
    """Runs a policy for an exact number of episodes, many at a time.

    Workers start on the first `evaluate`, each environment when it is first needed, and both are kept for later calls.
    Workers import only what `make_env` imports, and end when the parent closes its pipe or dies. Any thread may call
    `evaluate`, one at a time.
    """

    def __init__(
        self,
        make_env: Callable[[], gymnasium.Env],
        horizon: int,
        *,
        num_workers: int | None = None,
        envs_per_worker: int | None = None,
        environ: Mapping[str, str] | None = None,
        name: str = "the environment",
        timeout: float = DEFAULT_TIMEOUT,
        check: Callable[[], None] = lambda: None,
    ):
        """Initialises the evaluator. Workers start on the first call.

        Args:
            make_env: makes an environment with actions in [-1, 1] and observations that are vectors or have images
                (utils/observations.py); picklable.
            horizon: number of actions in a chunk, executed open loop.
            num_workers: number of processes (default: `default_workers`).
            envs_per_worker: environments that a worker steps one after the other (default: 8 in all, at least 1
                each). An OGBench arm takes 1 s and 150 MB to create, a worker 400 MB; small batches slow the policy.
            environ, name, timeout: see `WorkerPool`.
            check: called several times a second while `evaluate` waits; any exception it raises ends the evaluation.
        """
        num_workers = num_workers or default_workers()
        self.batch_size = num_workers * (envs_per_worker or math.ceil(DEFAULT_BATCH / num_workers))
        self._horizon, self.check = horizon, check
        self.pool = WorkerPool(make_env, num_workers, name=name, timeout=timeout, environ=environ)

    def evaluate(
        self, policy: Policy, num_episodes: int, seed: int, progress: Callable[[int, int], None] | None = None
    ) -> Result:
        """Runs episodes 0 … num_episodes - 1 to their ends.

        Args:
            policy: (observations [B, o] float32, or with images, episodes [B] int32, chunks [B] int32) -> action
                chunks [B, horizon · action_dim], which are clipped to [-1, 1]. B is always `batch_size`; rows of no
                running episode repeat an earlier one, and their actions are dropped. Noise must depend on
                (episode, chunk), not on the row.
            num_episodes: at least 1.
            seed: not negative; decides, with the number of an episode, the seed of its reset.
            progress: called with (episodes done, num_episodes) when an episode ends.

        Returns:
            'success' (0 or 1, see `episode_success`), 'return' (sum of rewards) and 'length' (environment steps),
            arrays [num_episodes] in order, and their means 'success_rate', 'return_mean' and 'length_mean'. An episode
            that reports no success, where others do, has failed; if none does, both entries of success are absent.

        Raises:
            ValueError: no episodes, or the policy's actions have the wrong shape.
            FloatingPointError: the policy's actions are not finite.
            WorkerError: an environment raised, hung or returned invalid values, or its worker died. The next call
                starts new workers.
        """
        if num_episodes < 1:
            raise ValueError(f"num_episodes is {num_episodes}; it must be at least 1")
        try:
            outcomes = self._run(policy, num_episodes, seed, progress or (lambda done, total: None))
        except BaseException:
            self.close()  # Replies may still arrive; only new workers are in a known state.
            raise
        success, returns, lengths = np.array(outcomes).T
        result: Result = {
            "return": returns,
            "length": lengths.astype(int),
            "return_mean": float(returns.mean()),
            "length_mean": float(lengths.mean()),
        }
        if not np.isnan(success).all():
            success = np.nan_to_num(success)
            result |= {"success": success, "success_rate": float(success.mean())}
        return result

    def _run(
        self, policy: Policy, num_episodes: int, seed: int, progress: Callable[[int, int], None]
    ) -> list[tuple[float, float, int]]:
        """Returns (success, return, length) of each episode, with success NaN if the environment does not report it.

        A slot is a row of the batch and its environment. A slot whose episode ends starts the next one at once, while
        other workers still step. Episodes start in order and all are finished, so there is no bias to short ones.
        """
        episodes, chunks, lengths = np.zeros((3, self.batch_size), np.int32)
        returns = [0.0] * self.batch_size
        observations: list[Any] = []
        outcomes: dict[int, tuple[float, float, int]] = {}
        queue = iter(range(num_episodes))

        def begin(slots: list[int]) -> dict[int, Request]:
            """Assigns the remaining episodes to the slots; returns the requests for their resets."""
            requests: dict[int, Request] = {}
            for slot, episode in zip(slots, queue, strict=False):
                episodes[slot], chunks[slot], lengths[slot], returns[slot] = episode, 0, 0, 0.0
                requests[slot] = "reset", (episode, episode_seed(seed, episode))
            return requests

        requests = begin(list(range(self.batch_size)))
        while requests:
            live = []
            self.pool.send(requests)
            while self.pool:
                ended = []
                for slot, reply in self.pool.receive(self.check):
                    observation, over = reply, False
                    if isinstance(reply, Steps):
                        observation = map_parts(lambda parts: parts[0][0], [reply.observations])
                        for reward in reply.rewards:
                            returns[slot] += reward
                        lengths[slot] += len(reply.rewards)
                        over = reply.terminated or reply.truncated
                    if over:
                        outcomes[int(episodes[slot])] = reply.success, returns[slot], int(lengths[slot])
                        progress(len(outcomes), num_episodes)
                        ended.append(slot)
                    else:
                        observations = observations or [observation] * self.batch_size
                        observations[slot] = observation
                        live.append(slot)
                self.pool.send(begin(ended))
            requests = {}
            if live:
                actions = self._act(policy, observations, episodes, chunks, live)
                requests = {slot: ("step", (own,)) for slot, own in zip(live, actions, strict=True)}
                chunks[live] += 1
        return [outcomes[episode] for episode in range(num_episodes)]

    def _act(
        self, policy: Policy, observations: list[Any], episodes: np.ndarray, chunks: np.ndarray, live: list[int]
    ) -> np.ndarray:
        """Returns the policy's clipped actions for the live slots, [len(live), horizon, action_dim]."""
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

    def close(self) -> None:
        """Ends the workers. A later `evaluate` starts new ones."""
        self.pool.close()

    def __enter__(self) -> "Evaluator":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
