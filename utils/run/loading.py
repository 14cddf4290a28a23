"""Agents of existing runs: loading, restoring, and starting other runs from them."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.serialization import from_state_dict, to_state_dict

from utils.data.batches import checksum
from utils.errors import UserError
from utils.observations import blank, shapes
from utils.run import checkpoints
from utils.run.agent_config import set_field
from utils.run.agent_files import load_agent
from utils.run.directory import checkpoint_dir
from utils.system.files import find_modules_in, read_json
from utils.trees import tree_slice, tree_stack


def load_base(directory: Path, config: Any, chunk_dim: int, observation: Any) -> tuple[Any, dict[str, Any]]:
    """Returns the base agent, and the record of it that a run keeps.

    Args:
        directory: of the base's run. config: of the agent that starts from it. chunk_dim: width of its chunks.
        observation: one of its observations.

    Raises:
        UserError: there is no run, or its flow does not fit the agent.
    """
    base, settings, step = load_run(directory)
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
    wanted["targets"] = config.get("targets", "velocity")
    if "source" in base.targets:  # Without one the base starts from N(0, I), where the agent's own source begins.
        wanted["source"] = config.get("source", "standard")
        wanted["source_hidden_dims"] = tuple(config.get("source_hidden_dims", ()))
    had = {"targets": "velocity"} | settings["config"]
    had |= {key: settings.get(key) for key in ("chunk_dim", "observation_dim", "image_shape")}
    for key, value in wanted.items():
        own = tuple(had[key]) if isinstance(value, tuple) else had[key]
        if own != value:
            raise UserError(f"the base in {directory} has {key} = {own}, the agent {value}; they must be equal")
    crc = checksum(jax.tree.leaves(jax.device_get((base.acting_flow, base.targets.get("source")))))
    return base, {"agent": settings["agent"], "step": step, "nfe": int(base.nfe), "checksum": crc}


def warm_start(agents: Any, directory: Path, observation: Any) -> tuple[Any, dict[str, Any]]:
    """Returns new agents with another run's parameters and optimiser state, or of another kind of agent its flow.

    Args:
        agents: stacked, as initialised; their keys, steps and settings stay. directory: of the other run.
        observation: one of theirs.

    Returns:
        the agents, and the record of the other run.

    Raises:
        UserError: there is no run, or its networks do not fit the agents.
    """
    if not agents.FLOWS:
        raise UserError("this agent has no flow, so it cannot start from a run (--start_from)")
    other, origin = load_base(directory, agents.config, agents.config.action_dim, observation)
    count = len(agents.step)
    if other.config.algorithm != agents.config.algorithm:
        return agents.with_flow(*tree_stack([(other.acting_flow, other.targets.get("source"))] * count)), origin
    learnt = {name: getattr(other, name) for name in ("params", "targets", "opt_state")}
    own = {name: getattr(tree_slice(agents, 0), name) for name in learnt}
    if jax.tree.map(lambda x: x.shape, learnt) != jax.tree.map(lambda x: x.shape, own):
        raise UserError(f"{directory} has other networks than this agent; give the same settings of its networks")
    return agents.replace(**tree_stack([learnt] * count)), origin


NEEDED = ("agent", "agent_module", "config", "flags", "observation_dim", "chunk_dim")  # of flags.json, to load a run


def load_run(directory: str | Path, step: int | None = None) -> tuple[Any, dict[str, Any], int]:
    """Loads the agent of a run.

    Args:
        directory: of the run, with flags.json and checkpoints/.
        step: of the checkpoint; None: the newest valid one.

    Returns:
        the agent, the run's settings (flags.json), and the step of the checkpoint.

    Raises:
        UserError: there is no run, or no such checkpoint, or the agent's file is gone.
    """
    directory = Path(directory).expanduser()
    if not (directory / "flags.json").is_file():
        raise UserError(f"{directory} is not the directory of a run: it has no flags.json")
    settings, folder = read_json(directory / "flags.json"), checkpoint_dir(directory)
    if missing := [name for name in NEEDED if name not in settings]:
        raise UserError(
            f"{directory / 'flags.json'} lacks {', '.join(missing)}: it was changed, or is of an older version"
        )
    if step is None:
        found = checkpoints.load_latest(folder)
        if not found:
            raise UserError(f"{directory} has no valid checkpoint")
        step, state = found
    else:
        if step not in checkpoints.saved_steps(folder):
            raise UserError(f"{directory} has no checkpoint of step {step}; it has {checkpoints.saved_steps(folder)}")
        state = checkpoints.load(checkpoints.path_of(folder, step))
    if settings["flags"].get("dataset"):  # A task's module may lie beside it.
        find_modules_in(Path(settings["flags"]["dataset"]).expanduser().parent)
    name = settings["agent_module"]
    module = load_agent(f"{name.replace('.', '/')}.py" if name.startswith("agents.") else name)
    config = module.get_config()
    for field, value in settings["config"].items():
        set_field(config, field, value, settings["agent"])
    example = {
        "observations": blank(1, settings["observation_dim"], settings.get("image_shape")),
        "actions": np.zeros((1, settings["chunk_dim"]), np.float32),
    }
    agent = jax.eval_shape(lambda: module.Agent.create(jax.random.PRNGKey(0), example, config))
    agent = agent.replace(hyper=agent.hyper | {k: np.float32(config[k]) for k in agent.hyper if k in config})
    return restore_agent(agent, state["agent"], directory, name), settings, step


def online_from(settings: dict[str, Any]) -> int | None:
    """Returns the step from which a run (flags.json) trains on its own experience, or None if it does not."""
    flags = settings["flags"]
    return flags.get("rollout_steps", flags.get("offline_steps") if flags.get("online_steps") else None)


SHOWN = 3  # misfits in a message


def restore_agent(agent: Any, state: Mapping[str, Any], place: Any, file: str) -> Any:
    """Returns `agent` with the state of a checkpoint; settings that the checkpoint lacks keep their values.

    Args:
        agent: of the right structure; its leaves may be shapes alone. state: from a checkpoint.
        place: the run's directory. file: the agent's, or its module; both for the message.

    Raises:
        UserError: names the parameters that do not fit.
    """
    now = to_state_dict(agent)
    # Floats of the config, which the run's record is compared by.
    state = {**state, "hyper": {name: state["hyper"].get(name, value) for name, value in now["hyper"].items()}}
    for part in sorted(state.keys() | now.keys(), key=lambda name: (name != "params", name != "targets", name)):
        if misfits := list(_misfits(part, state, now)):
            more = f" and {len(misfits) - SHOWN} more" if len(misfits) > SHOWN else ""
            raise UserError(
                f"the checkpoint in {place} does not fit the agent: {'; '.join(misfits[:SHOWN])}{more}; "
                f"restore {file} as it was, or start another run (--run_group)"
            )
    return from_state_dict(agent, state)


def _misfits(key: str, was: Mapping[str, Any], now: Mapping[str, Any], above: str = "") -> Iterator[str]:
    """Yields how the entry `key` of two nested states differs."""
    name = f"{above}{key}"
    if key not in was:
        yield f"{name}: not in the checkpoint"
    elif key not in now:
        yield f"{name}: in the checkpoint only"
    elif isinstance(was[key], dict) and isinstance(now[key], dict):
        for part in sorted(was[key].keys() | now[key].keys()):
            yield from _misfits(part, was[key], now[key], f"{name}.")
    elif isinstance(was[key], dict) or isinstance(now[key], dict):
        yield f"{name}: of another structure"
    elif np.shape(was[key]) != np.shape(now[key]):
        yield f"{name}: {list(np.shape(was[key]))} in the checkpoint, {list(np.shape(now[key]))} now"
