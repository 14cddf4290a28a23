"""A contextual bandit with four actions of known value: a problem that an agent learns in seconds.

Contexts are s ~ U[−1, 1]². The data take one of four actions, at angles that turn with s_0, at the shares SHARES;
mode k is worth VALUES[k], so the best mode is the rarest. One step, no bootstrap.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from compiling import optimised

from utils.data import batches
from utils.flow import euler
from utils.run.update_loop import UpdateLoop
from utils.trees import tree_slice, tree_stack

VALUES = np.array([0.0, 0.3, 0.6, 1.0], np.float32)
SHARES = np.array([0.35, 0.3, 0.2, 0.15])
RADIUS, SPREAD, TURN = 0.6, 0.05, 0.5
SMALL = {
    "actor_hidden_dims": (64, 64, 64),
    "value_hidden_dims": (64, 64),
    "num_qs": 2,
    "batch_size": 64,
    "lr": 2e-3,
    "flow_steps": 2,
}


def modes(contexts: np.ndarray) -> np.ndarray:
    """Centres of the four modes, [n, 4, 2]."""
    angles = np.pi / 2 * np.arange(4) + np.pi / 4 + TURN * contexts[:, :1]
    return RADIUS * np.stack([np.cos(angles), np.sin(angles)], axis=-1)


def make_data(size: int = 20_000, seed: int = 0) -> dict[str, np.ndarray]:
    """The prepared dataset: two rows a sample, the state acted from and the state after it."""
    rng = np.random.default_rng(seed)
    contexts = rng.uniform(-1, 1, (size, 2)).astype(np.float32)
    mode = rng.choice(4, size, p=SHARES)
    actions = modes(contexts)[np.arange(size), mode] + SPREAD * rng.normal(size=(size, 2))
    rows = {"observations": contexts, "actions": actions.astype(np.float32), "rewards": VALUES[mode]}
    rows = {k: np.repeat(v, 2, axis=0) for k, v in rows.items()}
    ends = np.tile(np.float32([0, 1]), size)
    return batches.prepare(rows | {"masks": np.zeros_like(ends), "terminals": ends}, True)


def train(module, data: dict[str, np.ndarray], num_updates: int, **varied_settings) -> list:
    """Trains one agent of `module` for each value in `varied_settings` (name → list), all from the same seed."""
    count = max([len(v) for v in varied_settings.values()], default=1)
    config = module.get_config()
    config.update(SMALL)
    config.update({k: v[0] for k, v in varied_settings.items()})
    create = jax.jit(lambda example: module.Agent.create(jax.random.key(0), example, config))
    first = create(batches.example_batch(data, 1))
    assert all(k in first.hyper or len(set(v)) == 1 for k, v in varied_settings.items())
    agents = []
    for i in range(count):
        varied = {k: jnp.float32(v[i]) for k, v in varied_settings.items() if k in first.hyper}
        agents.append(first.replace(hyper=first.hyper | varied))
    trainer = UpdateLoop(jax.random.split(jax.random.PRNGKey(1), count))
    trainer.set_data(data)
    agents = tree_stack(agents)
    with optimised():
        stacked, _ = trainer.run(agents, 0, num_updates)
    return [tree_slice(stacked, i) for i in range(count)]


@jax.jit
def act(agent, contexts: jax.Array) -> jax.Array:
    """Actions of an agent, [n, 2]."""
    return agent.sample_actions(contexts, jax.random.key(3))


@functools.partial(jax.jit, static_argnums=3)
def flow_samples(agent, contexts: jax.Array, noise: jax.Array, num_steps: int) -> jax.Array:
    """Samples of the trained flow, [n, 2]."""
    return euler(lambda x, t: agent.apply("flow", contexts, x, t), noise, num_steps)


@functools.partial(jax.jit, static_argnums=1)
def evaluate(agent, name: str, *inputs: jax.Array) -> jax.Array:
    """Outputs of one of an agent's networks."""
    return agent.apply(name, *inputs)


def fresh_contexts(size: int = 2000) -> jax.Array:
    """Contexts that are not in the data."""
    return jnp.asarray(np.random.default_rng(99).uniform(-1, 1, (size, 2)), jnp.float32)


def mode_shares(contexts: jax.Array, actions: jax.Array | np.ndarray, radius: float = np.inf) -> np.ndarray:
    """Share of the actions whose nearest mode is k, and lies within `radius`, [4]."""
    distances = np.linalg.norm(np.asarray(actions)[:, None] - modes(np.asarray(contexts)), axis=-1)
    return np.mean((distances.argmin(1)[:, None] == np.arange(4)) & (distances < radius), axis=0)
