"""The networks written by hand in float64 NumPy, from an agent's own parameters, and a batch to evaluate them on."""

from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from agents import base


def as_float64(tree):
    """A pytree of float64 NumPy arrays."""
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def mlp(params, x, layer_norm):
    """Dense → GELU (tanh form) → LayerNorm per hidden layer, then Dense."""
    depth = sum(name.startswith("Dense") for name in params)
    for i in range(depth):
        x = x @ params[f"Dense_{i}"]["kernel"] + params[f"Dense_{i}"]["bias"]
        if i == depth - 1:
            return x
        x = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
        if layer_norm:
            x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
            x = x * params[f"LayerNorm_{i}"]["scale"] + params[f"LayerNorm_{i}"]["bias"]


def critic(params, observations, actions):
    """Q_k(s, a), [K, ...]: the members one by one."""
    (members,) = as_float64(params).values()
    inputs = np.concatenate([observations, actions], axis=-1).astype(np.float64)
    count = len(members["Dense_0"]["bias"])
    return np.stack([mlp(jax.tree.map(lambda p, k=k: p[k], members), inputs, True)[..., 0] for k in range(count)])


def velocity(params, observations, x, t):
    """v(s, x, t)."""
    (field,) = as_float64(params).values()
    return mlp(field, np.concatenate([observations, x, t], axis=-1).astype(np.float64), False)


def random_params(params, seed):
    """The same tree with random entries, so that neither biases nor norm scales are trivial."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.6 + 0.05, jnp.float32), params)


def make_batch(size=12, width=4, seed=0):
    """Windows with invalid rows, zero masks and padded action tails."""
    rng = np.random.default_rng(seed)
    batch = {
        "observations": rng.normal(size=(size, 3)),
        "actions": rng.uniform(-1, 1, (size, width)),
        "rewards": rng.normal(size=size),
        "masks": (np.arange(size) % 3 > 0),
        "next_observations": rng.normal(size=(size, 3)),
        "valid": (np.arange(size) % 4 > 0),
        "action_mask": np.ones((size, width)),
    }
    batch["action_mask"][2::5, width // 2 :] = 0
    return {k: jnp.asarray(v, jnp.float32) for k, v in batch.items()}


def fixed_policy(agent, actions):
    """The agent with a flow that gives, once clipped, the action `actions` (of entries ±1) on any noise and state."""
    (field,) = agent.targets["flow"].values()
    last = max(name for name in field if name.startswith("Dense"))
    field = field | {last: {"kernel": 0 * field[last]["kernel"], "bias": 100.0 * jnp.asarray(actions, jnp.float32)}}
    return agent.replace(targets=agent.targets | {"flow": {next(iter(agent.targets["flow"])): field}})


def blank_network(*inputs, init=base.init_network):
    """Zeros in place of the first parameters of a network: of all that an agent begins with they compile longest."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(partial(init, *inputs)))


def make_agent(module, batch, seed=0, **changes):
    """A small agent with random parameters, its targets unlike its online networks."""
    config = module.get_config()
    config.update({"actor_hidden_dims": (8, 8), "value_hidden_dims": (8, 8), "num_qs": 3, "horizon_length": 2})
    config.update(changes)
    with mock.patch.object(base, "init_network", blank_network):
        agent = jax.jit(lambda key, example: module.Agent.create(key, example, config))(jax.random.key(seed), batch)
    return agent.replace(params=random_params(agent.params, seed), targets=random_params(agent.targets, seed + 1))
