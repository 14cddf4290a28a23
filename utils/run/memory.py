"""Memory that training takes on each device: said at the start, and too much of it is an error before any update."""

import math
from typing import Any

import jax

from utils.data.replay_buffer import replay_bytes
from utils.errors import UserError
from utils.run.config import CommonConfig
from utils.run.update_loop import UpdateLoop

GIB = 2**30
# Part → what makes it smaller.
ADVICE = {
    "data": "--dataset_placement=host",
    "replay": "fewer --online_steps",
    "agents": "smaller networks (--agent.actor_hidden_dims, --agent.value_hidden_dims, --agent.num_qs)",
    "evaluation": "--noeval_overlap",
    "update": "a smaller --agent.batch_size",
}


def device_limit(device: jax.Device) -> float:
    """Returns the bytes that JAX may take on a device; infinity where it does not tell, as on a CPU."""
    return float((device.memory_stats() or {}).get("bytes_limit", math.inf))


def needed_memory(
    updates: UpdateLoop, agents: Any, config: CommonConfig, online_steps: int, observation: Any, program: int
) -> dict[str, int]:
    """Returns the bytes that each part of training takes on each device, without parts that take none.

    Args:
        updates: holds the dataset. agents: stacked, placed. config: of the command.
        online_steps: environment steps of a run. observation: one of its observations.
        program: of the compiled update beside its inputs, from `UpdateLoop.compile`.
    """
    own = updates.layout.own_runs
    horizon, action_dim = agents.config.horizon_length, updates.data["actions"].shape[1]
    copied = bool(config.eval_overlap and config.eval_episodes)
    parts = {
        "data": tree_bytes(updates.data) if updates.on_device else 0,
        "replay": own * replay_bytes(online_steps, horizon, observation, action_dim) if online_steps else 0,
        "agents": own * tree_bytes(agents) // updates.layout.slots,
        # The copy that is evaluated while training continues: all but the optimiser's state.
        "evaluation": copied * own * tree_bytes(agents.replace(opt_state=())) // updates.layout.slots,
        "update": program,
    }
    return {name: size for name, size in parts.items() if size}


def check_memory(parts: dict[str, int], updates: UpdateLoop, steps: str = "--num_seeds, --vary") -> None:
    """Prints what training takes on each device, where the device tells its limit.

    Args:
        parts: of `needed_memory`. updates: theirs. steps: flags that lower the number of runs.

    Raises:
        UserError: it is more than the device has.
    """
    layout = updates.layout
    limit, needed = device_limit(layout.first), sum(parts.values())
    if math.isinf(limit):
        return
    shown = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
    which = "each device" if len(layout.devices) > 1 else "the device"
    if needed <= limit:
        print(f"memory: {needed / GIB:.2f} of {limit / GIB:.2f} GiB on {which} ({shown})", flush=True)
        return
    helps = [ADVICE[name] for name in sorted(parts, key=lambda name: -parts[name])[:2]]
    if layout.own_runs > 1:
        helps.insert(1, f"fewer runs at once ({steps}) or more --devices")
    raise UserError(
        f"training needs {needed / GIB:.2f} GiB on {which}, which has {limit / GIB:.2f} ({shown}); "
        f"what helps: {'; '.join(helps)}"
    )


def tree_bytes(tree: Any) -> int:
    """Returns the bytes of all arrays of a tree, each counted as a whole."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
