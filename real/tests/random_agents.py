"""Agents of random networks."""

from typing import Any

import jax
import numpy as np

from utils.observations import blank
from utils.run.agent_files import load_agent

OBSERVATION_DIM, ACTION_DIM = 6, 3


def make_agent(
    name: str,
    seed: int = 0,
    horizon: int = 2,
    *,
    state_dim: int = OBSERVATION_DIM,
    action_dim: int = ACTION_DIM,
    image_shape: tuple[int, ...] | None = None,
    **settings: Any,
) -> Any:
    """An agent of agents/ with small networks, whose parameters and averages are drawn independently, all non-zero."""
    module = load_agent(f"agents/{name}.py")
    config = module.get_config()
    config.update({"actor_hidden_dims": (24, 16), "value_hidden_dims": (20, 12), "num_qs": 3, **settings})
    config.horizon_length = horizon
    example = {
        "observations": blank(1, state_dim, image_shape),
        "actions": np.zeros((1, horizon * action_dim), np.float32),
    }
    # Shapes alone: to compile an initialisation for each agent would take most of the time of the tests.
    agent = jax.eval_shape(lambda: module.Agent.create(jax.random.PRNGKey(0), example, config))
    generator = np.random.default_rng(seed)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        kind, values = path[-1].key, generator.standard_normal(leaf.shape).astype(np.float32)
        if kind != "kernel":
            return 0.2 * values + (kind == "scale")
        inputs = leaf.shape[-2] * (9 if leaf.ndim == 4 else 1)  # Of a convolution, or not.
        return values / np.float32(inputs**0.5)

    params, targets = (jax.tree_util.tree_map_with_path(draw, tree) for tree in (agent.params, agent.targets))
    hyper = {name: np.float32(config[name]) for name in agent.hyper}
    mean, deviation = (generator.standard_normal(state_dim).astype(np.float32) for _ in range(2))
    stats = 0.3 * mean, 0.5 + np.abs(deviation)
    return agent.replace(params=params, targets=targets, hyper=hyper, condition_stats=stats)
