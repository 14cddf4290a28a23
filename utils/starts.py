"""What a run starts from that another run has learnt."""

from pathlib import Path
from typing import Any

import jax

from utils import runs
from utils.datasets import checksum
from utils.errors import UserError
from utils.observations import shapes
from utils.training import lane, stack


def load_base(directory: Path, config: Any, chunk_dim: int, observation: Any) -> tuple[Any, dict[str, Any]]:
    """The base agent, and what a run records of it; `observation`: any of the agent's.

    Raises:
        UserError: there is no run, or its flow does not fit the agent.
    """
    base, settings, step = runs.load_run(directory)
    if "flow" not in base.targets:
        raise UserError(f"{directory} is a run of {settings['agent']}, which has no flow to start from")
    wanted = {
        "horizon_length": config.horizon_length,
        "actor_hidden_dims": tuple(config.actor_hidden_dims),
        "chunk_dim": chunk_dim,
        "image_shape": None,
        **shapes(observation),
    }
    if wanted["image_shape"]:
        wanted["encoder"] = config.encoder
    had = settings["config"] | {key: settings.get(key) for key in ("chunk_dim", "observation_dim", "image_shape")}
    for key, value in wanted.items():
        own = tuple(had[key]) if isinstance(value, tuple) else had[key]
        if own != value:
            raise UserError(f"the base in {directory} has {key} = {own}, the agent {value}; they must be equal")
    crc = checksum(jax.tree.leaves(jax.device_get(base.acting_flow)))
    return base, {"agent": settings["agent"], "step": step, "nfe": int(base.nfe), "checksum": crc}


def go_on_from(agents: Any, directory: Path, observation: Any) -> tuple[Any, dict[str, Any]]:
    """New stacked agents with what another run has learnt: all of it if it is of the same agent, else its flow.

    Args:
        agents: as initialised; their keys, steps and settings stay. observation: any of theirs.

    Returns:
        the agents, and what a run records of the other.

    Raises:
        UserError: there is no run, or its networks do not fit the agents.
    """
    if not agents.FLOWS:
        raise UserError("this agent has no flow, so it cannot start from a run (--start_from)")
    other, origin = load_base(directory, agents.config, agents.config.action_dim, observation)
    lanes = len(agents.step)
    if other.config.algorithm != agents.config.algorithm:
        return agents.with_flow(stack([other.acting_flow] * lanes)), origin
    learnt = {name: getattr(other, name) for name in ("params", "targets", "opt_state")}
    own = {name: getattr(lane(agents, 0), name) for name in learnt}
    if jax.tree.map(lambda x: x.shape, learnt) != jax.tree.map(lambda x: x.shape, own):
        raise UserError(f"{directory} has other networks than this agent; give the same settings of its networks")
    return agents.replace(**stack([learnt] * lanes)), origin
