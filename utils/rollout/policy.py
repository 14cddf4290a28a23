"""Agents as policies: action chunks for observations."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Float32, Int, UInt32

from utils.arrays import Observations
from utils.devices import part_with
from utils.errors import UserError
from utils.observations import as_observation, map_parts, state_of
from utils.random_streams import Stream, stream_key, stream_seed
from utils.rollout.evaluator import Policy, episode_seed
from utils.trees import tree_slice, tree_stack


@jax.jit
def act(
    agents: Any,
    index: Int[Array, ""],
    observations: Observations,
    key: UInt32[Array, "2"],
    episodes: Int[Array, "*b"],
    chunks: Int[Array, "*b"],
) -> Float[Array, "*b d"]:
    """Samples action chunks of one of several stacked agents.

    A row's noise is a function of (key, episode, chunk), whatever the other rows.

    Args:
        agents: agents stacked along the run axis.
        index: of the agent.
        observations: one per row.
        key: PRNG key of this evaluation.
        episodes, chunks: number of each row's episode, and of the chunk in it.
    """
    agent = tree_slice(agents, index)
    keys = jax.vmap(lambda e, c: jax.random.fold_in(jax.random.fold_in(key, e), c))(episodes, chunks)
    return jax.vmap(agent.sample_actions)(observations, keys)


def decision_seconds(agents: Any, observations: Any, calls: int = 20) -> list[float]:
    """Measures the seconds of `calls` decisions of the first agent, without compilation; observations: one, [1, o]."""
    seconds, one, (agents, index) = list[float](), np.zeros(1, np.int32), part_with(agents, 0)
    for _ in range(calls + 1):  # The first one compiles.
        clock = time.perf_counter()
        jax.block_until_ready(act(agents, index, observations, jax.random.PRNGKey(0), one, one))
        seconds.append(time.perf_counter() - clock)
    return seconds[1:]


def evaluation_policy(seed: int, agents: Any, index: int, step: int) -> tuple[Callable[..., Float[Array, "B d"]], int]:
    """Returns an evaluation's policy, of agent `index`, and its seed of resets: functions of (seed, step)."""
    key = stream_key(seed, Stream.EVALUATION_ACTING, step)
    episode_seed = stream_seed(seed, Stream.EVALUATION_RESET, step)
    agents, index = part_with(agents, index)
    return lambda *inputs: act(agents, index, inputs[0], key, *inputs[1:]), episode_seed


def agent_policy(agent: Any, *, seed: int = 0, step: int = 0, horizon: int | None = None) -> tuple[Policy, int]:
    """Returns a single agent's policy for `Evaluator`, and its seed of resets.

    Args:
        agent: not stacked.
        seed, step: decide all noise. With a run's seed and the step of the agent's checkpoint, they are those of the
            evaluation in training.
        horizon: number of actions of a chunk that are executed; default: all.

    Raises:
        UserError: a chunk is shorter than `horizon`.
    """
    length = chunk_length(agent, horizon)
    # The optimiser's state, the largest part of an agent, does not act.
    whole, reset_seed = evaluation_policy(seed, tree_stack([agent.replace(opt_state=())]), 0, step)
    width = agent.config.action_dim // agent.config.horizon_length * length
    states = np.shape(agent.condition_stats[0])[-1]

    def policy(observations: Any, episodes: np.ndarray, chunks: np.ndarray) -> Any:
        if (found := state_of(observations).shape[-1]) != states:
            advice = "give the environment that it was trained for"
            raise UserError(f"observations have {found} numbers, the agent takes {states}; {advice}")
        return whole(observations, episodes, chunks)[:, :width]

    return policy, reset_seed


def chunk_length(agent: Any, horizon: int | None = None) -> int:
    """Returns the number of actions to execute of an agent's chunks: `horizon`, by default all.

    Raises:
        UserError: a chunk has not that many.
    """
    longest = agent.config.horizon_length
    if horizon is not None and not 1 <= horizon <= longest:
        raise UserError(f"horizon={horizon}: the agent's chunks have {longest} actions; give 1 to {longest}")
    return horizon or longest


class ChunkPolicy:
    """An agent as a policy of single actions, for loops of one's own: chunks are executed open loop.

        policy = ChunkPolicy(agent, seed=0)
        observation, _ = env.reset(seed=policy.reset())
        action = policy.act(observation)

    Noise is a function of (seed, step, episode, chunk), as in `evaluate`, whose episodes are numbered from 0.
    """

    def __init__(self, agent: Any, seed: int = 0, *, step: int = 0, horizon: int | None = None):
        """Initialises the policy; agent, seed, step, horizon: see `agent_policy`."""
        self._policy, self._reset_seed = agent_policy(agent, seed=seed, step=step, horizon=horizon)
        self._length, self._episode = chunk_length(agent, horizon), -1

    def reset(self, episode: int | None = None) -> int:
        """Starts an episode: the next one, or that of the given number.

        Returns:
            the seed with which `evaluate` resets the environment for this episode.
        """
        self._episode = self._episode + 1 if episode is None else episode
        self._chunk, self._actions = 0, iter(np.zeros((0, 1), np.float32))
        return episode_seed(self._reset_seed, self._episode)

    def act(self, observation: Any) -> Float32[np.ndarray, " A"]:
        """Returns the next action, in [−1, 1].

        Args:
            observation: vector [o], or `Observation` with images; the agent sees it only if a new chunk starts.

        Raises:
            FloatingPointError: the actions are not finite.
        """
        if self._episode < 0:
            self.reset()
        action = next(self._actions, None)
        if action is None:
            action = next(self._next_chunk(as_observation(observation)))
        return action

    def _next_chunk(self, observation: Any) -> Iterator[np.ndarray]:
        """Asks the agent for a chunk and returns its actions, which `act` continues with."""
        numbers = np.full(1, self._episode, np.int32), np.full(1, self._chunk, np.int32)
        chunk = np.array(self._policy(map_parts(np.stack, [observation]), *numbers), np.float32)
        if not np.isfinite(chunk).all():
            raise FloatingPointError("the policy's actions are not finite: training has diverged")
        self._chunk += 1
        self._actions = iter(np.clip(chunk, -1, 1).reshape(self._length, -1))
        return self._actions
