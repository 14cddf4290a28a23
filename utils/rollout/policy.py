"""Agents as policies: action chunks for observations."""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from utils.arrays import Observations
from utils.random_streams import Stream, stream_key, stream_seed
from utils.trees import tree_slice


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
    seconds, one = [], np.zeros(1, np.int32)
    for _ in range(calls + 1):  # The first one compiles.
        clock = time.perf_counter()
        jax.block_until_ready(act(agents, 0, observations, jax.random.PRNGKey(0), one, one))
        seconds.append(time.perf_counter() - clock)
    return seconds[1:]


def evaluation_policy(seed: int, agents: Any, index: int, step: int) -> tuple[Callable[..., Float[Array, "B d"]], int]:
    """Returns an evaluation's policy, of agent `index`, and its seed of resets: functions of (seed, step)."""
    key = stream_key(seed, Stream.EVALUATION_ACTING, step)
    episode_seed = stream_seed(seed, Stream.EVALUATION_RESET, step)
    return lambda *inputs: act(agents, index, inputs[0], key, *inputs[1:]), episode_seed
