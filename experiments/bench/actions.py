"""Time to decide on an action chunk, as ratios between agents; see `experiments.bench`."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from agents.base import Agent
from envs.tasks import make_env, parse_task
from envs.wrappers import action_box
from utils.observations import map_parts
from utils.output.tables import markdown_table
from utils.rollout.policy import decision_seconds
from utils.run.agent_config import resolve_config
from utils.run.agent_files import load_agent
from utils.trees import tree_stack


def compare(names: Sequence[str], env_name: str, overrides: dict[str, str], rounds: int, preset: str = "paper") -> str:
    """Measures untrained agents on one observation.

    Args:
        names: of files in agents/.
        env_name: task, for the agents' settings, observations and actions.
        overrides: settings that replace the preset's, field → text.
        rounds: measurements per agent.
        preset: of the settings.

    Returns:
        a table in Markdown: network evaluations, candidates, and the least time relative to the first agent's.
    """
    env, domain = make_env(env_name), parse_task(env_name).domain
    observation, width = map_parts(np.stack, [env.reset(seed=0)[0]]), action_box(env).shape[0]
    agents = {name: new_agent(f"agents/{name}.py", domain, overrides, observation, width, preset) for name in names}
    least = dict.fromkeys(names, np.inf)
    for _ in range(rounds):
        for name, agent in agents.items():
            least[name] = min(least[name], *decision_seconds(agent, observation))
    first = least[names[0]]
    rows = [
        [name, str(agent.nfe), str(agent.config.best_of_n), f"{least[name] / first:.2f}"]
        for name, agent in agents.items()
    ]
    table = markdown_table(["agent", "NFE", "N", f"time per chunk, relative to {names[0]}'s"], rows)
    return f"## Actions, {env_name}\n\n{table}\n\n{names[0]}: {1000 * first:.2f} ms on this machine."


def new_agent(
    path: str, domain: str, overrides: dict[str, str], observation: Any, width: int, preset: str = "paper"
) -> Agent:
    """Creates an untrained agent with the settings of a preset, as a stack of one, for actions of `width` numbers."""
    module = load_agent(path)
    config = resolve_config(module, domain, preset, overrides)[0]
    example = {"observations": observation, "actions": np.zeros((1, config.horizon_length * width), np.float32)}
    return tree_stack([module.Agent.create(jax.random.PRNGKey(0), example, config)])
