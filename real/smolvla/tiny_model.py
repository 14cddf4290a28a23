"""Untrained SmolVLA of a given size with a byte tokenizer, without the hub. For tests, experiments and estimates.

    python -m real.smolvla.tiny_model DIRECTORY [--chunk_size=10]

writes a tiny one as a policy directory; the first fine-tuning adapts it to the state, actions and cameras of its data.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from lerobot.policies.smolvla.processor_smolvla import make_smolvla_pre_post_processors
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

from real.command_line import Parser
from real.smolvla.policy_directory import save_directory
from utils.system.entry_point import run_main

# Widths of the vision and text models; 'base' is that of lerobot/smolvla_base, SmolVLM2-500M-Video-Instruct.
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vision": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
        "image": {"image_size": 32, "patch_size": 8},
        "scale_factor": 2,
        "text": {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
        },
    },
    "base": {
        "vision": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
        "image": {"image_size": 512, "patch_size": 16},
        "scale_factor": 4,
        "text": {
            "hidden_size": 960,
            "intermediate_size": 2560,
            "num_hidden_layers": 16,
            "num_attention_heads": 15,
            "num_key_value_heads": 5,
            "head_dim": 64,
            "vocab_size": 49280,
            "rope_theta": 100_000,
        },
    },
}
SPECIAL = {
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "image_token": "<image>",
    "end_of_utterance_token": "<end_of_utterance>",
}


def write_vlm(directory: Path, size: str = "tiny") -> None:
    """Writes a vision-language model for LeRobot's SmolVLA: config, tokenizer, processor."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", extra_special_tokens=SPECIAL
    )
    SmolVLMProcessor(SmolVLMImageProcessor(), fast, SmolVLMVideoProcessor()).save_pretrained(directory)
    widths = SIZES[size]
    text = {"model_type": "llama", "vocab_size": len(fast), "pad_token_id": fast.pad_token_id} | widths["text"]
    SmolVLMConfig(
        vision_config=widths["vision"] | widths["image"],
        text_config=text,
        scale_factor=widths["scale_factor"],
        image_token_id=fast.image_token_id,
    ).save_pretrained(directory)


def make_config(
    vlm: Path, cameras: list[str], state_dim: int, action_dim: int, size: str = "tiny", **changes: Any
) -> SmolVLAConfig:
    """Returns a SmolVLA config for the directory of `write_vlm`, with `changes` of further fields."""
    side = SIZES[size]["image"]["image_size"]
    inputs = {f"observation.images.{name}": PolicyFeature(FeatureType.VISUAL, (3, side, side)) for name in cameras}
    inputs["observation.state"] = PolicyFeature(FeatureType.STATE, (state_dim,))
    return SmolVLAConfig(
        **{
            "input_features": inputs,
            "output_features": {"action": PolicyFeature(FeatureType.ACTION, (action_dim,))},
            "vlm_model_name": str(vlm),
            "resize_imgs_with_padding": (side, side),
            "num_vlm_layers": SIZES[size]["text"]["num_hidden_layers"],
            "device": "cpu",
            "push_to_hub": False,
        }
        | changes
    )


def write_policy(directory: Path, config: SmolVLAConfig, seed: int = 0) -> None:
    """Writes an untrained SmolVLA, with processors that do not normalise yet."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        policy = SmolVLAPolicy(config)
    save_directory(policy, make_smolvla_pre_post_processors(config, None), directory)


def main(argv: Sequence[str]) -> None:
    """Runs the command line."""
    parser = Parser("python -m real.smolvla.tiny_model", __doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--chunk_size", type=int, default=10)
    args = parser.parse_args(argv[1:])
    vlm = args.directory.absolute() / "vlm"
    write_vlm(vlm)
    sizes = {"chunk_size": args.chunk_size, "n_action_steps": args.chunk_size}
    write_policy(args.directory / "policy", make_config(vlm, ["front"], 1, 1, **sizes))


if __name__ == "__main__":
    run_main(main)
