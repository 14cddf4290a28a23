"""Settings and parameters of an agent for the LeRobot policy in real/lerobot_policy_otql.

An agent is recognised by its acting methods, so that a user's agent that inherits them can be exported as well.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from agents import base, cgql, dsrl, fedit, fql, ifql, lps, meanflowql, qam, qsm
from utils.encoders import ENCODERS
from utils.errors import UserError
from utils.networks import (
    CriticEnsemble,
    Denoiser,
    GaussianSource,
    LatentActor,
    OneStepPolicy,
    TanhGaussian,
    VectorField,
)

Tensors = dict[str, np.ndarray]

# Method → kind of sampler, guidance of the flow, ranking of candidates.
PROPOSALS = {
    base.Agent.propose: "flow",
    fql.Agent.propose: "one_step",
    dsrl.Agent.propose: "latent",
    fedit.Agent.propose: "edit",
    qsm.Agent.propose: "diffusion",
    meanflowql.Agent.propose: "meanflow",
    lps.Agent.propose: "steered",
}
GUIDED = {base.Agent.flow_actions: False, cgql.Agent.flow_actions: True}
RANKS = {base.Agent.rank: "mean", ifql.Agent.rank: "min"}
# Helpers of these methods that an agent must not override.
HELPERS: dict[str, tuple[Callable, ...]] = {
    "sample_actions": (base.Agent.sample_actions,),
    "candidates": (base.Agent.candidates,),
    "apply": (base.Agent.apply,),
    "encode": (base.Agent.encode,),
    "latents": (dsrl.Agent.latents,),
    "edit": (fedit.Agent.edit,),
    "actor": (meanflowql.Agent.actor,),
    "steered": (lps.Agent.steered,),
    **{name: (getattr(base.Agent, name),) for name in ("start_noise", "source", "standard_source")},
}


def policy_tensors(agent: base.Agent) -> tuple[dict[str, Any], Tensors]:
    """Returns the fields of the policy's configuration, and its parameters by their names in torch.

    Flows and denoisers are the Polyak averages that are sampled from; critics, one-step, MeanFlow, latent and edit
    policies are the online ones. Critics are left out if they are not used.

    Raises:
        UserError: the LeRobot policy does not support the agent's sampler or networks, or parameters are not finite.
    """
    kind, guided, rank = _methods(agent)
    cfg = agent.cfg
    hidden, dim = tuple(cfg.actor_hidden_dims), cfg.action_dim
    fields = {
        "action_dim": dim // cfg.horizon_length,
        "chunk_size": cfg.horizon_length,
        "n_action_steps": cfg.horizon_length,
        "sampler": "flow",
        "flow_steps": cfg.flow_steps,
        "actor_hidden_dims": list(hidden),
        "step_input": False,
        "source": False,
        "source_hidden_dims": [],
        "noise_scale": 1.0 if kind == "latent" else float(agent.hyper["noise_scale"]),
        "time_dim": 0,
        "latent_scale": 0.0,
        "sphere_hidden_dims": [],
        "standardised": False,
        "edit_scale": 0.0,
        "guidance_coef": 0.0,
        "inv_temp": 0.0,
        "best_of_n": cfg.best_of_n,
        "rank": rank,
        "num_qs": 0,
        "value_hidden_dims": [],
        **_encoder_fields(agent),
    }
    if kind == "one_step":
        _check(agent, "one_step", OneStepPolicy(hidden, dim))
        fields |= {"sampler": "one_step", "flow_steps": 1}
        tensors = _mlp("actor", agent.params["one_step"])
    elif kind == "meanflow":
        _check(agent, "actor", VectorField(hidden, dim, output_init=nn.initializers.zeros))
        fields |= {"sampler": "one_step", "flow_steps": 1, "standardised": True}
        mean, deviation = map(np.asarray, agent.condition_stats)
        tensors = _at_one(_mlp("actor", agent.params["actor"]), 1) | {"state_mean": mean, "state_deviation": deviation}
    elif kind == "steered":
        widths = tuple(cfg.latent_hidden_dims)
        _check(agent, "meanflow", VectorField(hidden, dim, step_input=True))
        _check(agent, "latent_actor", LatentActor(widths, dim))
        fields |= {"sampler": "one_step", "flow_steps": 1, "sphere_hidden_dims": list(widths)}
        tensors = _at_one(_mlp("actor", agent.params["meanflow"]), 2) | _mlp("latent", agent.params["latent_actor"])
    elif kind == "diffusion":
        _check(agent, "denoiser", Denoiser(hidden, dim, cfg.time_dim))
        fields |= {"sampler": cfg.sampler, "time_dim": cfg.time_dim}
        tensors = _denoiser(agent.targets["denoiser"], cfg.flow_steps, cfg.sampler)
    else:
        fields["step_input"] = agent.config.get("targets") == "shortcut"
        _check(agent, "flow", VectorField(hidden, dim, fields["step_input"]))
        tensors = _mlp("actor", agent.acting_flow)
    if "source" in agent.params:
        widths = tuple(cfg.source_hidden_dims)
        _check(agent, "source", GaussianSource(widths, dim))
        fields |= {"source": True, "source_hidden_dims": list(widths)}
        tensors |= _mlp("source", agent.targets["source"])
    if kind == "latent":
        _check(agent, "latent_actor", TanhGaussian(hidden, dim))
        fields["latent_scale"] = float(cfg.noise_scale)
        tensors |= _mlp("latent", agent.params["latent_actor"])
    if kind == "edit":
        _check(agent, "edit_actor", TanhGaussian(hidden, dim, conditioned=True))
        fields["edit_scale"] = float(cfg.edit_scale)
        tensors |= _mlp("edit", agent.params["edit_actor"])
    if guided:
        fields |= {"guidance_coef": float(cfg.guidance_coef), "inv_temp": float(cfg.inv_temp)}
    if cfg.best_of_n > 1 or guided:
        widths = tuple(cfg.value_hidden_dims)
        _check(agent, "critic", CriticEnsemble(widths, cfg.num_qs))
        fields |= {"num_qs": cfg.num_qs, "value_hidden_dims": list(widths)}
        tensors |= _mlp("critic", agent.params["critic"])
    tensors = {f"model.{name}": np.ascontiguousarray(tensor, np.float32) for name, tensor in tensors.items()}
    broken = [name for name, tensor in tensors.items() if not np.isfinite(tensor).all()]
    if broken:
        raise UserError(f"the parameters {broken[0]} are not finite: the run has diverged; export an earlier --step")
    return fields, tensors


def _methods(agent: base.Agent) -> tuple[str, bool, str]:
    """Returns the kind of sampler, True if the flow is guided, and the ranking."""
    cls, cfg = type(agent), agent.config
    kind = PROPOSALS.get(cls.propose)
    if cls.propose is qam.Agent.propose:
        kind = "one_step" if cfg.one_step else "edit" if cfg.edits else "flow"
    known = HELPERS | {"flow_actions": tuple(GUIDED), "rank": tuple(RANKS)}
    own = [name for name, methods in known.items() if hasattr(cls, name) and getattr(cls, name) not in methods]
    own += [] if kind else ["propose"]
    if own or kind is None:
        raise UserError(f"{cfg.algorithm} acts by a {own[0]} of its own, which the LeRobot policy has not")
    return kind, GUIDED[cls.flow_actions] and kind in ("flow", "latent", "edit"), RANKS[cls.rank]


def _check(agent: base.Agent, name: str, module: Any) -> None:
    """Raises a UserError if a network of the agent is not `module`."""
    if agent.networks(agent.config, agent.config.action_dim).get(name) != module:
        raise UserError(f"{agent.config.algorithm} has another network '{name}' than the LeRobot policy")


def _mlp(name: str, params: dict[str, Any]) -> Tensors:
    """Returns the parameters of an MLP or an ensemble, with a leading axis of members, and of its encoder, if any."""
    (module,) = (part for key, part in params.items() if key != "encoder")
    tensors = _layers(name, module, range(sum(key.startswith("Dense_") for key in module)))
    return tensors | _encoder(name, params)


def _at_one(tensors: Tensors, count: int) -> Tensors:
    """Returns the actor's parameters with its last `count` inputs, t and h of a MeanFlow policy, fixed at 1."""
    kernel, bias = (np.asarray(tensors[f"actor.{part}.0"], np.float64) for part in ("kernels", "biases"))
    bias = bias + kernel[:, -count:].sum(axis=1, keepdims=True)
    return tensors | {"actor.kernels.0": kernel[:, :-count], "actor.biases.0": bias}


def _layers(name: str, module: dict[str, Any], indices: range) -> Tensors:
    """Returns the Dense layers of these indices, and the LayerNorms between them: [K, in, out] and [K, 1, out]."""
    module = jax.tree.map(np.asarray, module)
    tensors = {}
    for i, index in enumerate(indices):
        kernel = module[f"Dense_{index}"]["kernel"]
        kernel = kernel[None] if kernel.ndim == 2 else kernel
        tensors[f"{name}.kernels.{i}"] = kernel
        tensors[f"{name}.biases.{i}"] = module[f"Dense_{index}"]["bias"].reshape(len(kernel), 1, -1)
        if norm := module.get(f"LayerNorm_{index}"):
            tensors[f"{name}.scales.{i}"] = norm["scale"].reshape(len(kernel), 1, -1)
            tensors[f"{name}.shifts.{i}"] = norm["bias"].reshape(len(kernel), 1, -1)
    return tensors


def _denoiser(params: dict[str, Any], num_steps: int, sampler: str) -> Tensors:
    """Returns the parameters of a denoiser, and the table of its steps t = 1 … T, [T, 4]."""
    layers = sum(key.startswith("Dense_") for key in params)
    time = range(layers // 2)  # The MLP of the time has one layer less than the body.
    schedule = np.stack([qsm.signal_powers(num_steps)[1:], *qsm.reverse_weights(num_steps, sampler)], axis=1)
    return {
        "actor.frequencies": np.asarray(params["frequencies"]),
        "actor.schedule": schedule,
        **_layers("actor.time", params, time),
        **_layers("actor.body", params, range(len(time), layers)),
        **_encoder("actor", params),
    }


def _encoder_fields(agent: base.Agent) -> dict[str, Any]:
    """Returns the fields of the policy's configuration for the image encoder."""
    seen = any("encoder" in params for params in agent.params.values())
    patch, widths, blocks, features = ENCODERS[agent.config.encoder] if seen else (1, (), 0, 0)
    return {
        "encoder_patch": patch,
        "encoder_widths": list(widths),
        "encoder_blocks": blocks,
        "encoder_features": features,
    }


def _encoder(name: str, params: dict[str, Any]) -> Tensors:
    """Returns the parameters of a network's encoder, if any, in torch's layout: [out, in, 3, 3] and [out, in]."""
    tensors = {}
    for camera, module in jax.tree.map(np.asarray, params.get("encoder", {})).items():
        prefix = f"encoders.{name}.{camera.removeprefix('camera_')}"
        stacks = [module[f"stack_{i}"] for i in range(len(module) - 1)]
        layers = [stack[f"Conv_{i}"] for stack in stacks for i in range(len(stack))]
        for i, layer in enumerate(layers):
            tensors[f"{prefix}.convs.{i}.weight"] = layer["kernel"].transpose(3, 2, 0, 1)
            tensors[f"{prefix}.convs.{i}.bias"] = layer["bias"]
        tensors[f"{prefix}.dense.weight"] = module["Dense_0"]["kernel"].T
        tensors[f"{prefix}.dense.bias"] = module["Dense_0"]["bias"]
    return tensors
