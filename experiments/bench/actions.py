"""Time to decide on a chunk of actions, as ratios between agents. See `experiments.bench`."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from agents.base import Agent
from envs.tasks import make_env, parse_task
from envs.wrappers import action_box
from utils.observations import map_parts
from utils.rollout.policy import decision_seconds
from utils.run.agent_config import resolve_config
from utils.run.agent_files import load_agent
from utils.trees import tree_stack


def compare(names: Sequence[str], env_name: str, overrides: dict[str, str], rounds: int) -> str:
    """Measures untrained agents on one observation.

    Args:
        names: of files in agents/. env_name: whose settings and widths agents have.
        overrides: settings that replace the preset's, field → text. rounds: turns of each agent.

    Returns:
        a table in Markdown: network evaluations, candidates, and the least time over that of the first agent.
    """
    env, domain = make_env(env_name), parse_task(env_name).domain
    observation, width = map_parts(np.stack, [env.reset(seed=0)[0]]), action_box(env).shape[0]
    agents = {name: new_agent(f"agents/{name}.py", domain, overrides, observation, width) for name in names}
    least = dict.fromkeys(names, np.inf)
    for _ in range(rounds):
        for name, agent in agents.items():
            least[name] = min(least[name], *decision_seconds(agent, observation))
    lines = [f"## Actions, {env_name}", "", f"| | NFE | N | time of a chunk over {names[0]}'s |", "|---|---|---|---|"]
    for name, agent in agents.items():
        ratio = f"{least[name] / least[names[0]]:.2f}"
        lines.append(f"| {name} | {agent.nfe} | {agent.config.best_of_n} | {ratio} |")
    return "\n".join([*lines, "", f"{names[0]}: {1000 * least[names[0]]:.2f} ms on this machine."])


def new_agent(path: str, domain: str, overrides: dict[str, str], observation: Any, width: int) -> Agent:
    """An untrained agent at the paper's settings, alone in a stack; `width`: of an action."""
    module = load_agent(path)
    config = resolve_config(module, domain, "paper", overrides)[0]
    example = {"observations": observation, "actions": np.zeros((1, config.horizon_length * width), np.float32)}
    return tree_stack([module.Agent.create(jax.random.PRNGKey(0), example, config)])
