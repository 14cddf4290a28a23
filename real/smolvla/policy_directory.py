"""Policy directories: loading a SmolVLA for training, and writing one in LeRobot's format."""

import copy
import os
import shutil
from pathlib import Path
from typing import Any, Protocol

import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.types import FeatureType
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.datasets.utils import dataset_to_policy_features
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from lerobot.policies.smolvla.processor_smolvla import make_smolvla_pre_post_processors
from torch import nn

from real.smolvla.data import ACTION, STATE
from utils.errors import UserError
from utils.system.files import disk_errors


class Processor(Protocol):
    """Processing steps of LeRobot for the inputs or outputs of a policy."""

    def __call__(self, data: Any, /) -> Any:
        """Processes a batch."""

    def save_pretrained(self, directory: Path, /) -> Any:
        """Writes the steps and their state."""


_LORA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def load_config(path: str, device: str) -> SmolVLAConfig:
    """Loads the config of a SmolVLA from a folder or the hub.

    Raises:
        UserError: it does not exist, or its policy cannot be trained here.
    """
    try:
        config = PreTrainedConfig.from_pretrained(path)
    except Exception as error:  # The hub and draccus raise many types.
        raise UserError(f"there is no policy at {path} ({type(error).__name__}: {str(error)[:120]})") from error
    if config.type != "smolvla":
        raise UserError(f"{path} is a policy of type {config.type}; only smolvla is trained here")
    if config.adapt_to_pi_aloha:
        raise UserError(f"{path} has adapt_to_pi_aloha, which is not supported here")
    if "cross" not in config.attention_mode or not config.use_cache:
        raise UserError(f"{path} does not attend to a cached prefix (attention_mode, use_cache); not supported here")
    config.device = device
    return config


def adopt(config: SmolVLAConfig, dataset: LeRobotDataset, cameras: list[str]) -> None:
    """Adapts a config to the state, actions and cameras of a dataset.

    Args:
        config: changed in place.
        dataset: of the robot.
        cameras: names, in the order of the policy's cameras that they replace; default: the policy's names if the
            dataset has them, else the dataset's order.

    Raises:
        UserError: a camera does not exist, or the state or action is too wide for the policy.
    """
    features = dataset_to_policy_features(dataset.meta.features)
    known = [name for name, feature in features.items() if feature.type is FeatureType.VISUAL]
    names = [f"observation.images.{name.removeprefix('observation.images.')}" for name in cameras]
    if not names:
        names = [name for name in config.image_features if name in known] or known
    if missing := [name for name in names if name not in known]:
        raise UserError(f"{dataset.root} has no camera {missing[0]}; it has {', '.join(known) or 'none'}")
    if not names:
        raise UserError(f"{dataset.root} has no camera; SmolVLA needs one")
    for name, limit in ((STATE, config.max_state_dim), (ACTION, config.max_action_dim)):
        if name not in features or features[name].shape[0] > limit:
            raise UserError(f"{dataset.root} needs '{name}' with at most {limit} values, the limit of the policy")
    config.input_features = {name: features[name] for name in [*names, STATE]}
    config.output_features = {ACTION: features[ACTION]}


def load_policy(path: str, config: SmolVLAConfig) -> SmolVLAPolicy:
    """Loads SmolVLA with the expert in float32 and all else frozen; keeps the dtypes of its directory."""
    compiles, config.compile_model = config.compile_model, False
    policy = SmolVLAPolicy.from_pretrained(path, config=config)
    config.compile_model = compiles
    policy.directory_dtypes = {name: each.dtype for name, each in policy.named_parameters()}
    model = policy.model
    model.vlm_with_expert.vlm.requires_grad_(False)
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            policy.get_parameter(name).data = parameter.data.float()
    return policy.eval()


def load_processors(
    path: str, config: SmolVLAConfig, stats: dict[str, dict[str, Any]] | None
) -> tuple[Processor, Processor]:
    """Returns pre- and postprocessor: new ones that normalise by `stats`, or those of the policy."""
    if stats is not None:
        return make_smolvla_pre_post_processors(config, stats)
    try:
        overrides = {"device_processor": {"device": config.device}}
        return make_pre_post_processors(config, pretrained_path=path, preprocessor_overrides=overrides)
    except FileNotFoundError as error:
        raise UserError(f"{path} has no processors, so no normalisation; fine-tune it first (--sft_steps)") from error


def add_lora(policy: SmolVLAPolicy, rank: int, seed: int) -> None:
    """Adds LoRA of a rank to the expert's layers; the projections are trained directly.

    Raises:
        UserError: peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError("--lora needs peft: pip install peft") from error
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        expert = policy.model.vlm_with_expert.lm_expert.requires_grad_(False)
        settings = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(_LORA), lora_dropout=0.0)
        inject_adapter_in_model(settings, expert)


def merged(policy: SmolVLAPolicy) -> SmolVLAPolicy:
    """Returns a copy with LoRA merged into the weights, on the CPU and in the original dtypes."""
    policy = copy.deepcopy(policy).cpu()
    layers = {name: module for name, module in policy.named_modules() if hasattr(module, "lora_A")}
    for name, layer in layers.items():
        layer.merge()
        parent, _, own = name.rpartition(".")
        setattr(policy.get_submodule(parent), own, layer.get_base_layer())
    for name, parameter in policy.named_parameters():
        parameter.data = parameter.data.to(getattr(policy, "directory_dtypes", {}).get(name, parameter.dtype))
    return policy


def save_directory(
    policy: SmolVLAPolicy, processors: tuple[Processor, Processor], directory: Path, **changes: Any
) -> None:
    """Writes a policy directory, in full or not at all.

    Args:
        policy: to write.
        processors: pre- and postprocessor.
        directory: path of the directory.
        changes: changed fields of the config.

    Raises:
        UserError: the disk is full.
    """
    temporary = directory.with_name(f".{directory.name}.tmp")
    with disk_errors(directory):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        whole: nn.Module = merged(policy)
        for field, value in changes.items():
            setattr(whole.config, field, value)
        whole.save_pretrained(temporary)
        for processor in processors:
            processor.save_pretrained(temporary)
        for path in temporary.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        shutil.rmtree(directory, ignore_errors=True)
        temporary.rename(directory)
