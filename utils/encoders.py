"""Image encoders, and random shifts as augmentation.

The encoder is that of IMPALA (Espeholt et al., arXiv 1802.01561) as in FQL's code, one for each network and camera. Its
layout, for implementations elsewhere, is S stacks of widths c_s with B residual blocks each, on images [h, w, 3]:

    x        uint8 / 255; for patches of p×p pixels with p > 1, padded with zeros below and on the right to multiples
             of p, and [⌈h/p⌉, ⌈w/p⌉, p·p·3] with row in the patch, column in it, colour, the last varying fastest
    stack s  Conv_0           3×3, stride 1, 'SAME' (one row of zeros around), kernel [3, 3, in, c_s], bias [c_s]
             max pooling      3×3, stride 2, 'SAME': ⌈n/2⌉ of n rows remain; padding is one row of −∞ after the last
                              row for even n, one on either side for odd n
             B blocks         x ← x + Conv_{2b+2}(relu Conv_{2b+1}(relu x)), 3×3 'SAME', kernels [3, 3, c_s, c_s]
    end      relu, flattened with channels varying fastest, Dense_0 with kernel [h'·w'·c_S, features], GELU (tanh form)

Parameters in a network: encoder/camera_<i>/stack_<s>/Conv_<j>/{kernel, bias} and encoder/camera_<i>/Dense_0/{kernel,
bias}. A network's input is the state followed by the features of the cameras in their order.
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from utils.networks import output_of
from utils.observations import Observation

# Name → side of a patch, widths of the stacks, residual blocks per stack, features per camera. The first two are FQL's,
# the last suits a CPU.
ENCODERS: dict[str, tuple[int, tuple[int, ...], int, int]] = {
    "impala": (1, (16, 32, 32), 2, 512),
    "impala_small": (1, (16, 32, 32), 1, 512),
    "impala_tiny": (4, (16, 16), 1, 128),
}
MAX_SHIFT = 3  # pixels
INIT = nn.initializers.xavier_uniform()


def neighbours(
    x: Float[Array, "b h w c"], axis: int, stride: int = 1, fill: float = 0.0
) -> list[Float[Array, "b _ _ c"]]:
    """Returns the three shifts of x that windows of three with padding 'SAME' cover; ⌈n/stride⌉ of n entries remain."""
    size = -(-x.shape[axis] // stride)
    missing = max((size - 1) * stride + 3 - x.shape[axis], 0)
    padding = [(missing // 2, missing - missing // 2) if i == axis else (0, 0) for i in range(x.ndim)]
    x, length = jnp.pad(x, padding, constant_values=fill), (size - 1) * stride + 1
    return [jax.lax.slice_in_dim(x, i, i + length, stride, axis) for i in range(3)]


def max_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b (h+1)//2 (w+1)//2 c"]:
    """Max pooling: 3×3, stride 2, 'SAME'."""
    for axis in (1, 2):
        x = functools.reduce(jnp.maximum, neighbours(x, axis, stride=2, fill=-jnp.inf))
    return x


def on_cpu() -> bool:
    """True if JAX runs on a CPU, where XLA's convolutions, trained in a loop, are far slower than matrix products."""
    return jax.default_backend() == "cpu"


class Conv(nn.Module):
    """Convolution, 3×3, 'SAME'."""

    width: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w {self.width}"]:
        """Evaluates the layer."""
        kernel = self.param("kernel", INIT, (3, 3, x.shape[-1], self.width))
        bias = self.param("bias", nn.initializers.zeros, (self.width,))
        if on_cpu():
            for axis in (2, 1):
                x = jnp.concatenate(neighbours(x, axis), axis=-1)
            return x @ kernel.reshape(-1, self.width) + bias
        return (
            jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")) + bias
        )


class Stack(nn.Module):
    """Convolution, max pooling by two, and residual blocks."""

    width: int
    blocks: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b (h+1)//2 (w+1)//2 {self.width}"]:
        """Evaluates the stack."""
        x = max_pool(Conv(self.width, name="Conv_0")(x))
        for block in range(self.blocks):
            y = Conv(self.width, name=f"Conv_{2 * block + 1}")(nn.relu(x))
            x = x + Conv(self.width, name=f"Conv_{2 * block + 2}")(nn.relu(y))
        return x


def patches(x: Float[Array, "b h w c"], side: int) -> Float[Array, "b (h-1)//{side}+1 (w-1)//{side}+1 {side}*{side}*c"]:
    """Joins the pixels of each patch along the last axis."""
    x = jnp.pad(x, [(0, 0), *((0, -n % side) for n in x.shape[1:3]), (0, 0)])
    size, rows, cols, depth = len(x), x.shape[1] // side, x.shape[2] // side, x.shape[3]
    x = x.reshape(size, rows, side, cols, side, depth).swapaxes(2, 3)
    return x.reshape(size, rows, cols, side * side * depth)


class CameraEncoder(nn.Module):
    """Encoder of one camera's images."""

    patch: int
    widths: Sequence[int]
    blocks: int
    features: int

    @nn.compact
    def __call__(self, images: UInt8[Array, "b h w 3"]) -> Float[Array, "b {self.features}"]:
        """Maps images to features."""
        x = patches(images.astype(jnp.float32) / 255.0, self.patch)
        for i, width in enumerate(self.widths):
            x = Stack(width, self.blocks, name=f"stack_{i}")(x)
        x = nn.relu(x).reshape(len(x), -1)
        return nn.gelu(nn.Dense(self.features, kernel_init=INIT)(x))


class Encoder(nn.Module):
    """An encoder for each camera: a view from outside and one from the wrist have little to share.

    Attributes:
        kind: key of ENCODERS.
    """

    kind: str

    @nn.compact
    def __call__(self, images: UInt8[Array, "*b C h w 3"]) -> Float[Array, "*b f"]:
        """Maps images of C cameras to their features, joined."""
        flat = images.reshape(-1, *images.shape[-4:])
        encoders = [CameraEncoder(*ENCODERS[self.kind], name=f"camera_{i}") for i in range(flat.shape[1])]
        features = [encoder(flat[:, i]) for i, encoder in enumerate(encoders)]
        return jnp.concatenate(features, axis=-1).reshape(*images.shape[:-4], -1)


def random_shift(key: PRNGKeyArray, *batches: UInt8[Array, "m C h w 3"]) -> tuple[UInt8[Array, "m C h w 3"], ...]:
    """Shifts images at random, as in FQL: with probability 1/2 all of them, each row and camera by its own offset.

    Offsets are up to MAX_SHIFT pixels on either axis; the edge is repeated. DrQ (arXiv 2004.13649) shifts in all
    updates, by up to 4 of 84 pixels.

    Args:
        key: PRNG key.
        *batches: arrays of images, such as those of s and s', which are shifted alike.

    Returns:
        the shifted arrays.
    """
    whether_key, shift_key = jax.random.split(key)
    shifts = jax.random.randint(shift_key, (*batches[0].shape[:2], 2), -MAX_SHIFT, MAX_SHIFT + 1)
    shifts = shifts * jax.random.bernoulli(whether_key)

    def shifted(image: UInt8[Array, "h w 3"], shift: Int[Array, "2"]) -> UInt8[Array, "h w 3"]:
        rows, cols = (jnp.clip(jnp.arange(n) + by, 0, n - 1) for n, by in zip(image.shape, shift, strict=False))
        return image[rows][:, cols]

    return tuple(jax.vmap(jax.vmap(shifted))(images, shifts) for images in batches)


def encoded(kind: str, params: Any, observations: Observation) -> Float[Array, "*b e"]:
    """Returns states joined with the features of their images by an encoder: e = o + f."""
    states, features = observations.state, output_of(Encoder(kind), {"params": params}, observations.images)
    features = jnp.broadcast_to(features, (*states.shape[:-1], features.shape[-1]))
    return jnp.concatenate([states, features], axis=-1)


def augmented(batch: dict[str, Any], key: PRNGKeyArray) -> dict[str, Any]:
    """Returns a batch with its images shifted, those of s and s' alike."""
    names = ("observations", "next_observations")
    images = random_shift(key, *(batch[name].images for name in names))
    return batch | {name: batch[name]._replace(images=own) for name, own in zip(names, images, strict=True)}
