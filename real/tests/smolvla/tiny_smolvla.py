"""A SmolVLA small enough to train in a test, and a dataset of images for it."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

from real.smolvla.policy_directory import load_config, load_policy
from real.smolvla.tiny_model import make_config, write_policy, write_vlm

CAMERAS = ("front", "wrist")
STATE_DIM, ACTION_DIM, CHUNK, SIDE = 3, 2, 4, 32


def write_tiny(directory: Path, **changes: Any) -> Path:
    """Writes an untrained policy; returns its directory."""
    write_vlm(directory / "vlm")
    sizes = {"chunk_size": CHUNK, "n_action_steps": CHUNK}
    write_policy(
        directory / "policy",
        make_config(directory / "vlm", list(CAMERAS), STATE_DIM, ACTION_DIM, **(sizes | changes)),
    )
    return directory / "policy"


def load(path: Path) -> SmolVLAPolicy:
    """The policy, to train."""
    return load_policy(str(path), load_config(str(path), "cpu"))


def write_dataset(root: Path, lengths: tuple[int, ...], seed: int = 0, tasks: tuple[str, ...] = ("open it",)) -> Path:
    """Writes a dataset of noise, as images."""
    vector = {"dtype": "float32", "names": None}
    features = {
        "observation.state": vector | {"shape": (STATE_DIM,)},
        "action": vector | {"shape": (ACTION_DIM,)},
        **{
            f"observation.images.{name}": {
                "dtype": "image",
                "shape": (SIDE, SIDE, 3),
                "names": ["height", "width", "channels"],
            }
            for name in CAMERAS
        },
    }
    dataset = LeRobotDataset.create("local/it", 10, features, root=root, use_videos=False)
    random = np.random.default_rng(seed)
    for number, length in enumerate(lengths):
        for _ in range(length):
            images = {
                f"observation.images.{name}": random.integers(0, 256, (SIDE, SIDE, 3), np.uint8) for name in CAMERAS
            }
            numbers = {"observation.state": random.normal(3, 2, STATE_DIM), "action": random.normal(1, 2, ACTION_DIM)}
            frame = images | {name: values.astype(np.float32) for name, values in numbers.items()}
            dataset.add_frame(frame | {"task": tasks[number % len(tasks)]})
        dataset.save_episode()
    dataset.finalize()
    return root


def observation(count: int, seed: int = 0) -> dict[str, Any]:
    """Random observations as a dataset gives them, with instructions of different lengths."""
    random = torch.Generator().manual_seed(seed)
    images = {f"observation.images.{name}": torch.rand(count, 3, SIDE, SIDE, generator=random) for name in CAMERAS}
    state = torch.randn(count, STATE_DIM, generator=random)
    return images | {"observation.state": state, "task": ["open" + i % 3 * "!" for i in range(count)]}
