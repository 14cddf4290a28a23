"""Settings that change how a trained agent acts: those that `sample_actions` depends on, but no network's shape."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import ml_collections
import numpy as np

from utils.run.agent_config import CHOICES, check_config, set_field


def acting_settings(agent: Any, fields: Iterable[str], observations: Any) -> tuple[str, ...]:
    """Returns the settings that change an agent's actions and not its networks, such as flow_steps and best_of_n.

    A setting is one if `sample_actions` is another program (jaxpr) for another value of it, unless the agent says
    that it has no effect.

    Args:
        agent: not stacked.
        fields: settings to consider, such as those that its run records.
        observations: one or more, only their shape counts.
    """
    own, settings = _program(agent, observations), {**agent.config, **agent.hyper}
    found, unused = [], getattr(agent, "UNUSED", {})
    for field in fields:
        if field in unused or field not in settings or (other := _other_value(field, settings[field])) is None:
            continue
        try:
            if _program(_replaced(agent, {field: other}), observations) != own:
                found.append(field)
        except Exception:  # Other networks do not fit the parameters, and a missing one raises any error.
            continue
    return tuple(found)


def with_settings(agent: Any, values: Mapping[str, Any]) -> Any:
    """Returns an agent with other settings; text is parsed as a setting's type.

    Raises:
        UserError: there is no such setting, or the value does not fit it.
    """
    derived, name = ("action_dim", "algorithm"), agent.config.algorithm.split(".")[-2]
    settings = {**agent.config, **{field: float(value) for field, value in agent.hyper.items()}}
    config = ml_collections.ConfigDict({field: value for field, value in settings.items() if field not in derived})
    before = config.copy_and_resolve_references()
    for field, value in values.items():
        set_field(config, field, value, name)
    check_config(config, before, name)
    return _replaced(agent, {field: config[field] for field in values})


def _replaced(agent: Any, values: Mapping[str, Any]) -> Any:
    """Returns an agent with other settings, unchecked."""
    hyper = {field: np.float32(value) for field, value in values.items() if field in agent.hyper}
    static = {field: value for field, value in values.items() if field not in agent.hyper}
    config = ml_collections.FrozenConfigDict({**agent.config, **static})
    return agent.replace(hyper={**agent.hyper, **hyper}, config=config)


def _program(agent: Any, observations: Any) -> tuple[str, list[bytes]]:
    """Returns text and constants of the program that samples actions; all settings are constants."""
    agent = agent.replace(opt_state=(), hyper={field: np.float32(value) for field, value in agent.hyper.items()})

    def sample(networks: dict[str, Any], observations: Any, key: jax.Array) -> Any:
        return agent.replace(**networks).sample_actions(observations, key)

    names = ("params", "targets", "condition_stats")  # An agent's own class may lack the last.
    networks = {name: getattr(agent, name) for name in names if hasattr(agent, name)}
    program = jax.make_jaxpr(sample)(networks, observations, jax.random.PRNGKey(0))
    text = re.sub(r"0x[0-9a-f]+", "", str(program))  # Without addresses of functions.
    return text, [np.asarray(constant).tobytes() for constant in program.consts]


def _other_value(field: str, value: Any) -> Any:
    """Returns another value of a setting, or None if there is none that could keep the networks."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return next((other for other in CHOICES.get(field, ()) if other != value), None)
    return None if isinstance(value, tuple) else value + 1
