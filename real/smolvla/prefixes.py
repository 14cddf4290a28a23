"""Prefixes of all frames: cached on disk (memory-mapped) or in memory, or computed on demand.

A cache on disk is a folder named by a fingerprint of everything that its content depends on: the weights of the
vision-language model, the preprocessor, fields of the config, and the dataset's files. So a stale cache is never read.
The folder gets its name when it is complete.
"""

import dataclasses
import hashlib
import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from torch import Tensor

from real.smolvla.data import STATE
from real.smolvla.expert import Prefix, encode
from real.smolvla.policy_directory import Processor
from utils.errors import UserError
from utils.output.loggers import ProgressBar
from utils.system.files import disk_errors, read_json, write_json

MODES = ("disk", "memory", "none")
_BATCH = 16  # Frames per batch of the encoder.
_TOKENS, _MASK, _POOLED, _ABOUT = "tokens.bin", "mask.npy", "pooled.npy", "about.json"


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Encoder of frames to prefixes.

    Attributes:
        policy: SmolVLA, whose frozen part is used.
        preprocess: the policy's preprocessor.
        language_length: number of language tokens in a prefix.
        bf16: whether the model runs in bfloat16, whatever its weights.
    """

    policy: SmolVLAPolicy
    preprocess: Processor
    language_length: int
    bf16: bool = False

    def __call__(self, frames: list[dict[str, Any]]) -> tuple[Prefix, Tensor]:
        """Returns prefix and pooled features of frames from the dataset."""
        keys = [STATE, *(key for key in self.policy.config.image_features if key in frames[0])]
        batch = {key: torch.stack([frame[key] for frame in frames]) for key in keys}
        batch = self.preprocess(batch | {"task": [frame["task"] for frame in frames]})
        with torch.autocast(torch.device(self.policy.config.device).type, torch.bfloat16, enabled=self.bf16):
            return encode(self.policy, batch, self.language_length)

    def fingerprint(self, root: Path) -> str:
        """Returns a fingerprint of everything that the prefixes of a dataset depend on."""
        digest, config = hashlib.blake2b(digest_size=16), self.policy.config
        fields = {
            name: getattr(config, name)
            for name in ("resize_imgs_with_padding", "empty_cameras", "add_image_special_tokens", "num_vlm_layers")
        }
        digest.update(repr((fields, list(config.image_features), self.language_length, self.bf16)).encode())
        for name, tensor in self.policy.model.vlm_with_expert.vlm.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        with tempfile.TemporaryDirectory() as folder:
            self.preprocess.save_pretrained(Path(folder))
            for path in sorted(Path(folder).iterdir()):
                digest.update(path.read_bytes())
        for path in sorted(path for part in ("meta", "data", "videos", "images") for path in (root / part).rglob("*")):
            if path.is_file():
                digest.update(str(path.relative_to(root)).encode())
                digest.update(path.read_bytes())
        return digest.hexdigest()


class Prefixes:
    """Prefixes and pooled features of the N frames of a dataset.

    Args:
        encoder: computes them.
        dataset: with the frames.
        mode: one of `MODES`; 'none' keeps only the features, and `rows` computes prefixes on demand.
        directory: of the caches on disk.

    Attributes:
        pooled: [N, f] float32.

    Raises:
        UserError: the disk is full.
    """

    def __init__(self, encoder: Encoder, dataset: LeRobotDataset, mode: str, directory: Path):
        self._encoder, self._dataset = encoder, dataset
        self._tokens: np.ndarray | None = None
        if mode == "disk":
            self._folder = directory / f"{dataset.root.name}-{encoder.fingerprint(dataset.root)}"
            with disk_errors(self._folder):
                self._open() if self._folder.exists() else self._build(self._folder)
        else:
            self._build(None, keep=mode == "memory")

    def rows(self, index: np.ndarray) -> tuple[Tensor, Tensor]:
        """Returns tokens and mask of the prefixes of frames `index` [m], on the CPU."""
        if self._tokens is None:
            prefix, _ = self._encoder([self._dataset[int(i)] for i in index])
            return prefix.tokens.cpu(), prefix.mask.cpu()
        return torch.from_numpy(self._tokens[index]).view(self._dtype), torch.from_numpy(self._mask[index])

    def _build(self, folder: Path | None, keep: bool = True) -> None:
        """Encodes all frames."""
        count, pooled, masks = len(self._dataset), [], []
        temporary = folder.with_name(f".{folder.name}.tmp") if folder else None
        if temporary:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        with ProgressBar(count, description=f"prefixes of {self._dataset.root.name}", unit=" frames") as bar:
            for start in range(0, count, _BATCH):
                frames = [self._dataset[i] for i in range(start, min(start + _BATCH, count))]
                prefix, features = self._encoder(frames)
                tokens = prefix.tokens.cpu().contiguous()
                if start == 0 and keep:
                    self._dtype = tokens.dtype
                    shape, kind = (count, *tokens.shape[1:]), _numbers(tokens).dtype
                    self._tokens = _reserve(temporary / _TOKENS, shape, kind) if temporary else np.empty(shape, kind)
                if self._tokens is not None:
                    self._tokens[start : start + len(frames)] = _numbers(tokens)
                pooled.append(features.cpu())
                masks.append(prefix.mask.cpu().numpy())
                bar.update(len(frames))
        self.pooled, self._mask = torch.cat(pooled), np.concatenate(masks)
        if folder and temporary:
            assert isinstance(self._tokens, np.memmap)  # From `_reserve`.
            self._tokens.flush()
            np.save(temporary / _MASK, self._mask)
            np.save(temporary / _POOLED, self.pooled.numpy())
            about = {"shape": self._tokens.shape, "dtype": str(self._dtype).removeprefix("torch.")}
            write_json(temporary / _ABOUT, about | {"bytes": self._tokens.nbytes})
            temporary.rename(folder)
            self._open()

    def _open(self) -> None:
        """Opens a cache on disk."""
        about = read_json(self._folder / _ABOUT, missing_ok=True)
        path = self._folder / _TOKENS
        if not path.exists() or path.stat().st_size != about.get("bytes"):
            raise UserError(
                f"the cache {self._folder} is damaged; give another --cache_dir (what is in that one is temporary)"
            )
        self._dtype = getattr(torch, about["dtype"])
        kind = _numbers(torch.empty(1, dtype=self._dtype)).dtype
        self._tokens = np.memmap(path, kind, "r", shape=tuple(about["shape"]))
        self._mask = np.load(self._folder / _MASK)
        self.pooled = torch.from_numpy(np.load(self._folder / _POOLED))


def _reserve(path: Path, shape: tuple[int, ...], kind: np.dtype) -> np.ndarray:
    """Returns a file as an array; allocates it now, since a full disk would kill a process that maps it."""
    with open(path, "wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, math.prod(shape) * kind.itemsize)
        else:
            file.truncate(math.prod(shape) * kind.itemsize)
    return np.memmap(path, kind, "r+", shape=shape)


def _numbers(tensor: Tensor) -> np.ndarray:
    """Converts to NumPy, which has no bfloat16: that becomes int16."""
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


class AllPrefixes:
    """Prefixes of several datasets, by rows of `Rows`.

    Args:
        parts: one per dataset.
        frames: [N, 2], dataset and frame of each row.
    """

    def __init__(self, parts: list[Prefixes], frames: Tensor):
        self.parts, self._frames = parts, frames.numpy()
        self.pooled = torch.cat([part.pooled for part in parts])[self._flat()]

    def _flat(self) -> np.ndarray:
        offsets = np.cumsum([0, *(len(part.pooled) for part in self.parts)])
        return offsets[self._frames[:, 0]] + self._frames[:, 1]

    def rows(self, index: Tensor) -> Prefix:
        """Returns the prefixes of rows `index` [m], on the CPU."""
        dataset, frame = self._frames[index.numpy()].T
        order, tokens, masks = [], [], []
        for number in np.unique(dataset):
            at = np.flatnonzero(dataset == number)
            own_tokens, own_mask = self.parts[number].rows(frame[at])
            order.append(at)
            tokens.append(own_tokens)
            masks.append(own_mask)
        back = torch.from_numpy(np.argsort(np.concatenate(order)))
        return Prefix(torch.cat(tokens)[back], torch.cat(masks)[back])
