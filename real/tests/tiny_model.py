"""A vision-language model of a few thousand weights with a byte tokenizer, in SmolVLM's place, without the hub."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SIDE = 32  # Pixels of an image.
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
SPECIAL = {
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "image_token": "<image>",
    "end_of_utterance_token": "<end_of_utterance>",
}


def write_vlm(directory: Path) -> Path:
    """Writes a vision-language model for LeRobot's SmolVLA: config, tokenizer, processor; returns its directory."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", extra_special_tokens=SPECIAL
    )
    SmolVLMProcessor(SmolVLMImageProcessor(), fast, SmolVLMVideoProcessor()).save_pretrained(directory)
    text = {"model_type": "llama", "vocab_size": len(fast), "pad_token_id": fast.pad_token_id} | TEXT
    SmolVLMConfig(
        vision_config=VISION | {"image_size": SIDE, "patch_size": 8},
        text_config=text,
        scale_factor=2,
        image_token_id=fast.image_token_id,
    ).save_pretrained(directory)
    return directory


def flags(vlm: Path, chunk: int, executed: int) -> dict[str, Any]:
    """Returns SmolVLA's settings for the directory of `write_vlm`; `--policy.<name>=<value>` of lerobot-train."""
    return {
        "vlm_model_name": str(vlm),
        "resize_imgs_with_padding": [SIDE, SIDE],
        "num_vlm_layers": TEXT["num_hidden_layers"],
        "chunk_size": chunk,
        "n_action_steps": executed,
        "device": "cpu",
        "push_to_hub": False,
    }
