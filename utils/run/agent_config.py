"""Settings of agents: defaults, presets and a user's overrides, merged and checked."""

from collections.abc import Collection, Mapping, Sequence
from types import ModuleType
from typing import Any

import ml_collections

from envs.tasks import Task
from utils.encoders import ENCODERS
from utils.errors import UserError, did_you_mean
from utils.run.agent_files import load_agent
from utils.run.config import CommonConfig, PostTrainConfig, RunConfig, settings_of
from utils.run.foreign_flags import REPLACED

PRESETS = ("paper", "cpu", "none")


def resolve_agent(config: CommonConfig, task: Task) -> tuple[ModuleType, ml_collections.ConfigDict, bool, str]:
    """Returns an agent's module and what `resolve_config` gives for it.

    Raises:
        UserError: an unknown agent or setting.
    """
    module = load_agent(config.agent)
    return module, *resolve_config(module, task.domain, config.preset, {**config.overrides, **config.chosen()})


def resolve_config(
    module: ModuleType, domain: str, preset: str, overrides: dict[str, Any]
) -> tuple[ml_collections.ConfigDict, bool, str]:
    """Merges an agent's defaults, a preset and overrides, in this order.

    Args:
        module: from `load_agent`. domain: key of the presets. preset: one of PRESETS. overrides: field → value;
            `sparse` and `horizon_length` may be among them.

    Returns:
        the agent's config, whether rewards are made sparse, and a line on the preset that was applied.

    Raises:
        UserError: an unknown preset, or an override of an unknown field, of the wrong type or without effect.
    """
    if preset not in PRESETS:
        hint = did_you_mean(preset, PRESETS, "--preset={}")
        raise UserError(f"unknown preset '{preset}'; use one of {', '.join(PRESETS)}{hint}")
    if isinstance(overrides.get("sparse"), str):
        raise UserError("rewards are no setting of an agent; write --sparse or --nosparse")
    values: dict[str, Any] = {}
    note = "preset none: the agent's defaults"
    if preset != "none":
        values |= module.PRESETS.get(domain, {})
        known = domain in module.PRESETS
        note = f"preset {preset}: {'settings of ' + domain if known else 'none for ' + domain + ', defaults apply'}"
    if preset == "cpu":
        values |= getattr(module, "CPU", {})
        note += ", with small networks and settings for short runs"
    values |= overrides
    sparse = bool(values.pop("sparse", False))
    config, agent = module.get_config(), module.__name__.removeprefix("agents.").removeprefix("agent_")
    for field, value in values.items():
        try:
            set_field(config, field, value, agent)
        except UserError as error:
            if field in overrides:
                raise
            raise UserError(f"preset '{preset}' of {module.__file__} for {domain}: {error}") from error
    check_config(config, module.get_config(), agent)
    check_used(module, overrides, agent, getattr(module, "CPU", {}) if preset == "cpu" else {})
    return config, sparse, note


def set_field(config: ml_collections.ConfigDict, field: str, value: Any, agent: str) -> None:
    """Sets a field of the config of `agent`, which errors name; text is parsed as the field's type.

    Raises:
        UserError: there is no such field, or the value does not fit it.
    """
    if field not in config:
        raise UserError(f"agent {agent} has no setting '{field}'{_advice(field, list(config.keys()))}")
    default = config[field]
    try:
        if isinstance(value, str) and not isinstance(default, str):
            value = _parse(value, default)
        elif isinstance(default, float):
            value = float(value)
        config[field] = tuple(value) if isinstance(default, tuple) else value
    except (KeyError, TypeError, ValueError) as error:
        kind = "list of integers such as 256,256" if isinstance(default, tuple) else type(default).__name__
        raise UserError(f"--agent.{field}={value} does not fit: it must be of type {kind} (agent {agent})") from error


def _advice(field: str, known: Sequence[str]) -> str:
    """Returns what to give in place of an unknown setting."""
    if replaced := REPLACED.get(f"agent.{field}"):
        return f"; {replaced}"
    if field in {f.name for cls in (RunConfig, PostTrainConfig) for f in settings_of(cls)}:
        return f"; did you mean --{field}?"
    return did_you_mean(field, known, "--agent.{}") or f"; it has {', '.join(sorted(known))}"


def _parse(text: str, default: Any) -> Any:
    """Parses `text` as a value of the type of `default`."""
    if isinstance(default, bool):
        return {"true": True, "1": True, "false": False, "0": False}[text.lower()] if text else True
    if isinstance(default, tuple):
        kind = type(default[0])
        return tuple(kind(part) for part in text.strip("()[] ").split(",") if part.strip())
    return type(default)(text)


def check_config(config: ml_collections.ConfigDict, defaults: ml_collections.ConfigDict, agent: str) -> None:
    """Checks values that no agent can work with.

    Integers are sizes and counts, at least 1, unless the agent's own default is smaller.

    Raises:
        UserError: names the field, its bounds and `agent`.
    """
    whose = f"(agent {agent})"
    for field, value in config.items():
        least = min(_integers(defaults[field]))
        if any(number < least for number in _integers(value)):
            raise UserError(f"--agent.{field}={value}: it must be at least {least} {whose}")
        if isinstance(value, float) and not abs(value) < float("inf"):
            raise UserError(f"--agent.{field}={value}: it must be a finite number {whose}")
        if field in ("discount", "tau", "flow_tau", "kappa") and not 0 <= value <= 1:
            raise UserError(f"--agent.{field}={value}: it must be between 0 and 1 {whose}")
        if field in POSITIVE and not value > 0:
            raise UserError(f"--agent.{field}={value}: it must be greater than 0 {whose}")
        if field in NOT_NEGATIVE and not value >= 0:
            raise UserError(f"--agent.{field}={value}: it must not be negative {whose}")
    for field, choices in CHOICES.items():
        if field in config and config[field] not in choices:
            hint = did_you_mean(str(config[field]), choices, f"--agent.{field}={{}}")
            raise UserError(f"--agent.{field}={config[field]}: use one of {', '.join(choices)} {whose}{hint}")
    if config.get("source") == "noise" and config.get("coupling") != "ot":
        hint = "; add --agent.coupling=ot" if "coupling" in config else ""
        raise UserError(f"--agent.source=noise: the noise of independent pairs is N(0, I) at every state {whose}{hint}")


def unused(module: ModuleType) -> dict[str, str]:
    """Returns the settings that an agent's file says to have no effect → why."""
    return dict(getattr(getattr(module, "Agent", None), "UNUSED", {}))


def check_used(module: ModuleType, fields: Collection[str], agent: str, small: Mapping[str, Any]) -> None:
    """Checks that the settings `fields` that a user gives have an effect.

    Those of a critic may be given to an agent without one. A setting that another one makes idle is an error only if
    the preset cpu, with the settings `small`, has chosen that one.

    Raises:
        UserError: names the first that has no effect, and why.
    """
    for field, reason in unused(module).items():
        if field in fields and field not in OF_CRITICS:
            raise UserError(f"--agent.{field} has no effect: {reason} (agent {agent})")
    for (field, value), idle in IDLE.items():
        given = [name for name in idle if name in fields]
        if given and field not in fields and small.get(field) == value:
            hint = " or ".join(f"--agent.{field}={other}" for other in CHOICES.get(field, ()) if other != value)
            raise UserError(f"--agent.{given[0]} has no effect: preset cpu has {field}={value}; add {hint}")


def idle_settings(module: ModuleType, config: ml_collections.ConfigDict) -> dict[str, str]:
    """Returns the settings that have no effect on this agent with this config → why."""
    idle = unused(module)
    for (field, value), others in IDLE.items():
        if config.get(field) == value:
            idle |= dict.fromkeys(others, f"{field} is {value}")
    return {field: reason for field, reason in idle.items() if field in config}


def _integers(value: Any) -> list[int]:
    """Returns the integers in a setting, and 1."""
    return [1, *(v for v in (value if isinstance(value, tuple) else (value,)) if type(v) is int)]


POSITIVE = ("lr", "epsilon", "w_max", "noise_scale")
NOT_NEGATIVE = ("rho", "lam", "alpha", "threshold", "inv_temp", "fql_alpha", "edit_scale", "guidance_coef", "eta")
# A grid may give these to all its agents.
OF_CRITICS = ("num_qs", "value_hidden_dims", "rho", "tau", "discount")
# Setting and value → settings that then have no effect.
IDLE: dict[tuple[str, str | int], tuple[str, ...]] = {
    ("coupling", "independent"): ("alpha", "epsilon", "max_iterations", "threshold", "source_conditions"),
    ("source", "standard"): ("source_hidden_dims",),
    ("actor", "mlp"): ("transformer_width", "transformer_blocks"),
    ("actor", "transformer"): ("actor_hidden_dims",),
    ("eta", 0): ("reference",),
    ("lam", 0): ("w_max",),
    ("edit_scale", 0): ("target_entropy",),
    ("guidance_coef", 0): ("inv_temp",),
    ("num_qs", 1): ("rho",),
    ("horizon_length", 1): ("window_rule",),
}
CHOICES = {
    "window_rule": ("pad", "drop"),
    "coupling": ("ot", "independent"),
    "source": ("standard", "noise", "action"),
    "targets": ("velocity", "shortcut"),
    "target_actions": ("policy", "both"),
    "reference": ("policy", "min"),
    "actor": ("mlp", "transformer"),
    "source_conditions": ("iid", "systematic", "resampled", "weighted"),
    "sampler": ("estimate", "ddpm"),
    "encoder": tuple(ENCODERS),
}
