"""Looping images (GIF, WebP) small enough for a README."""

import io
import itertools
from collections.abc import Callable, Iterable

import numpy as np
from PIL import Image

FORMATS = ("gif", "webp")
MAX_BYTES, MAX_WIDTH = 2_000_000, 640
COLOURS = 128  # of a GIF's palette; with 256 there is none left for "unchanged", and the file is three times as large


def looping_image(
    images: Callable[[], Iterable[np.ndarray]], kind: str, fps: float, max_bytes: int = MAX_BYTES
) -> bytes:
    """Encodes images as an animation that loops.

    Frame rate and size are reduced until the file fits; an image is at most MAX_WIDTH pixels wide.

    Args:
        images: returns the images anew at each call.
        kind: one of FORMATS.
        fps: of the images.
        max_bytes: limit of the file's size.
    """
    width = np.shape(next(iter(images())))[1]
    every, scale = 1, min(1.0, MAX_WIDTH / width)
    while len(data := _encode(itertools.islice(images(), 0, None, every), kind, scale, every / fps)) > max_bytes:
        every, scale = (every + 1, scale) if every < 2 / scale else (every, 0.75 * scale)
    return data


def _encode(images: Iterable[np.ndarray], kind: str, scale: float, seconds: float) -> bytes:
    """Encodes images at a scale, each shown for some seconds."""
    frames = [_resized(Image.fromarray(image), scale) for image in images]
    options: dict[str, int] = {"quality": 70}
    if kind == "gif":
        palette = _palette([frames[0], frames[len(frames) // 2], frames[-1]])
        frames, options = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames], {}
    data, duration = io.BytesIO(), round(100 * seconds) * 10  # A GIF counts in hundredths of a second.
    frames[0].save(data, kind, save_all=True, append_images=frames[1:], duration=duration, loop=0, **options)
    return data.getvalue()


def _resized(image: Image.Image, scale: float) -> Image.Image:
    """Returns a copy of an image at a scale, at least one pixel wide and high."""
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))


def _palette(images: list[Image.Image]) -> Image.Image:
    """Returns an image whose palette suits several images: one palette for all frames keeps a GIF small."""
    joined = Image.fromarray(np.concatenate([np.asarray(image) for image in images]))
    # Keeps the colours of small objects, which the default averages away.
    return joined.quantize(COLOURS, Image.Quantize.MAXCOVERAGE)
