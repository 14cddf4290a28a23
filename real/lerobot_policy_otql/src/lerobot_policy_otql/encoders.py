"""Image encoders: utils/encoders.py of the training code in torch, forward only.

The architecture is described there; the export converts its kernels to torch's layout.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from lerobot_policy_otql.configuration_otql import OtqlConfig


class Observation(NamedTuple):
    """Observation of a policy.

    Attributes:
        state: [..., o].
        images: uint8 [B, C, h, w, 3], B the last of the state's leading axes; None: no cameras.
    """

    state: Tensor
    images: Tensor | None = None


def as_pixels(image: Tensor, height: int, width: int) -> Tensor:
    """Converts a camera's images to the format of the training data.

    Images of another size are resized as in real/import_rollouts.py, by Pillow on bytes (bilinear, averaging over the
    area of a pixel), so that recorded images and the robot's are processed alike.

    Args:
        image: [B, 3, H, W] in [0, 1], as LeRobot gives it.
        height: of the training images.
        width: of the training images.

    Returns:
        uint8 [B, height, width, 3].
    """
    pixels = (image.float() * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    if pixels.shape[1:3] == (height, width):
        return pixels
    resized = [
        np.asarray(Image.fromarray(one).resize((width, height), Image.Resampling.BILINEAR))
        for one in pixels.contiguous().cpu().numpy()
    ]
    return torch.from_numpy(np.stack(resized)).to(image.device)


class CameraEncoder(nn.Module):
    """Encoder of one camera's images.

    Args:
        height: of the images, in pixels.
        width: of the images, in pixels.
        config: its fields `encoder_…` are used.
    """

    def __init__(self, height: int, width: int, config: OtqlConfig):
        super().__init__()
        self.patch, self.blocks, depth = config.encoder_patch, config.encoder_blocks, 3 * config.encoder_patch**2
        height, width = -(-height // self.patch), -(-width // self.patch)
        convs = []
        for channels in config.encoder_widths:
            convs += [nn.Conv2d(depth, channels, 3, padding=1)]
            convs += [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2 * self.blocks)]
            height, width, depth = -(-height // 2), -(-width // 2), channels
        self.convs = nn.ModuleList(convs)
        self.dense = nn.Linear(height * width * depth, config.encoder_features)

    def forward(self, images: Tensor) -> Tensor:
        """Maps uint8 [B, h, w, 3] to [B, features]."""
        x, convs = self.patches(images.float() / 255).permute(0, 3, 1, 2), iter(self.convs)
        for _ in range(len(self.convs) // (1 + 2 * self.blocks)):
            x = next(convs)(x)
            # 'SAME' padding with −∞: an odd number of rows gets one on either side, an even one only one at the end.
            x = F.max_pool2d(x, 3, 2, padding=(x.shape[2] % 2, x.shape[3] % 2), ceil_mode=True)
            for _ in range(self.blocks):
                y = next(convs)(F.relu(x))
                x = x + next(convs)(F.relu(y))
        return F.gelu(self.dense(F.relu(x).permute(0, 2, 3, 1).flatten(1)), approximate="tanh")

    def patches(self, x: Tensor) -> Tensor:
        """Concatenates the pixels of each patch: [B, h, w, 3] to [B, ⌈h/p⌉, ⌈w/p⌉, p·p·3]."""
        p, (size, height, width, depth) = self.patch, x.shape
        x = F.pad(x, (0, 0, 0, -width % p, 0, -height % p))
        x = x.reshape(size, x.shape[1] // p, p, x.shape[2] // p, p, depth).transpose(2, 3)
        return x.reshape(size, x.shape[1], x.shape[2], p * p * depth)


class Encoder(nn.ModuleList):
    """Encoders of all cameras for one network."""

    def __init__(self, config: OtqlConfig):
        shapes = [feature.shape for feature in config.image_features.values()]
        super().__init__(CameraEncoder(height, width, config) for _, height, width in shapes)

    def forward(self, images: Tensor) -> Tensor:
        """Maps uint8 [B, C, h, w, 3] to [B, C · features]."""
        return torch.cat([encoder(images[:, i]) for i, encoder in enumerate(self)], dim=-1)
