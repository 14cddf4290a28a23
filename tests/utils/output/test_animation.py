"""Images that loop, and what they are reduced to."""

import io

import numpy as np
import pytest
from PIL import Image

from utils.output.animation import FORMATS, looping_image

GREEN = (40, 180, 70)


def images(size, count=12):
    """Noise in a green frame, which no format compresses."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        image = np.full((size, 2 * size, 3), GREEN, np.uint8)
        image[8:-8, 8:-8] = rng.integers(0, 256, (size - 16, 2 * size - 16, 1))
        yield image


@pytest.mark.check
@pytest.mark.parametrize("kind", FORMATS)
def test_it_loops_in_time_and_fits(kind):
    data = looping_image(lambda: images(64), kind, 10)
    image = Image.open(io.BytesIO(data))
    assert (image.size, image.n_frames, image.format.lower(), image.info["loop"]) == ((128, 64), 12, kind, 0)
    assert np.abs(np.array(image.convert("RGB"))[2, 2].astype(int) - GREEN).max() < 25
    if kind == "gif":
        assert image.info["duration"] == 100
    limit = len(data) // 5
    small = looping_image(lambda: images(64), kind, 10, limit)
    reduced = Image.open(io.BytesIO(small))
    assert len(small) <= limit and 1 < reduced.n_frames < 12 and 20 < reduced.width < 128
    assert reduced.width == 2 * reduced.height


def test_it_is_no_wider_than_a_page():
    image = Image.open(io.BytesIO(looping_image(lambda: images(400, 1), "gif", 10)))
    assert image.size == (640, 320)


def test_a_small_object_keeps_its_colour():
    """A red square of a thousandth of the image, on a ground of a thousand greys and blues."""
    ground = np.linspace(0, 255, 200, dtype=np.uint8)
    image = np.stack(np.broadcast_arrays(ground[:, None], ground[None], np.uint8(80)), axis=-1)
    image[:, :, 1] = image[:, :, 0]
    image[100:106, 100:106] = (230, 60, 60)
    found = np.array(Image.open(io.BytesIO(looping_image(lambda: [image], "gif", 10))).convert("RGB"))
    assert np.abs(found[103, 103].astype(int) - (230, 60, 60)).max() < 30
