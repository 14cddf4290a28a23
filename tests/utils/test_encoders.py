"""The encoder against convolutions written by hand, and the random shifts against cropping a padded image."""

import jax
import numpy as np
import pytest

from utils import encoders
from utils.encoders import ENCODERS, MAX_SHIFT, Encoder, augmented, encoded, random_shift
from utils.observations import Observation


def convolve(x, params):
    """3×3 with a row of zeros around, [h, w, in] → [h, w, out], pixel by pixel."""
    kernel, bias = (np.asarray(params[name], np.float64) for name in ("kernel", "bias"))
    padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
    rows, cols = x.shape[:2]
    windows = [[padded[i : i + 3, j : j + 3] for j in range(cols)] for i in range(rows)]
    return np.einsum("hwijc,ijco->hwo", np.array(windows), kernel) + bias


def pool(x):
    """Maxima of windows of 3×3 at every second place: as utils/encoders.py says where the windows lie."""
    for axis in (0, 1):
        size = x.shape[axis]
        before = 0 if size % 2 == 0 else 1
        ends = [(max(2 * i - before, 0), min(2 * i - before + 3, size)) for i in range(-(-size // 2))]
        x = np.stack([x.take(range(*end), axis=axis).max(axis=axis) for end in ends], axis=axis)
    return x


def relu(x):
    return np.maximum(x, 0)


def camera(params, image, kind):
    """The features of one image, [h, w, 3] → [f]."""
    side, widths, blocks, _ = ENCODERS[kind]
    x = np.asarray(image, np.float64) / 255
    rows, cols = (-(-n // side) for n in x.shape[:2])
    padded = np.zeros((rows * side, cols * side, 3))
    padded[: x.shape[0], : x.shape[1]] = x
    blocks_of = [[padded[side * i :][:side, side * j :][:, :side].ravel() for j in range(cols)] for i in range(rows)]
    x = np.array(blocks_of)
    for s in range(len(widths)):
        stack = params[f"stack_{s}"]
        x = pool(convolve(x, stack["Conv_0"]))
        for b in range(blocks):
            y = convolve(relu(x), stack[f"Conv_{2 * b + 1}"])
            x = x + convolve(relu(y), stack[f"Conv_{2 * b + 2}"])
    dense = {name: np.asarray(value, np.float64) for name, value in params["Dense_0"].items()}
    x = relu(x).ravel() @ dense["kernel"] + dense["bias"]
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """An encoder with two stacks of two blocks, compiled in a moment."""
    monkeypatch.setitem(ENCODERS, "small", (2, (2, 3), 2, 5))


def images_and_params(shape):
    """Random images, and an encoder's parameters."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, shape).astype(np.uint8)
    shapes = jax.eval_shape(Encoder("small").init, jax.random.key(0), images)["params"]
    return images, jax.tree.map(lambda leaf: 0.3 * rng.normal(size=leaf.shape).astype(np.float32), shapes)


@pytest.mark.check
@pytest.mark.parametrize("on_cpu", [True, False])
def test_encoder_equals_numpy(on_cpu, monkeypatch):
    """Of every camera by its own parameters, for even and odd sides; the features come in the cameras' order."""
    monkeypatch.setattr(encoders, "on_cpu", lambda: on_cpu)
    images, params = images_and_params((2, 2, 12, 9, 3))
    features = jax.jit(Encoder("small").apply)({"params": params}, images)
    expected = [[camera(params[f"camera_{c}"], image[c], "small") for c in range(2)] for image in images]
    expected = np.array(expected).reshape(2, -1)
    assert expected.std() > 0.1
    np.testing.assert_allclose(features, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


def test_features_stand_after_the_state_of_every_candidate():
    """The images of one observation serve all states that repeat it."""
    images, params = images_and_params((3, 1, 6, 6, 3))
    states = np.random.default_rng(1).normal(size=(5, 3, 2)).astype(np.float32)
    joined = jax.jit(encoded, static_argnums=0)("small", params, Observation(states, images))
    features = jax.jit(Encoder("small").apply)({"params": params}, images)
    np.testing.assert_array_equal(joined[..., :2], states)
    for i in range(5):
        np.testing.assert_allclose(joined[i, :, 2:], features, rtol=1e-5)


def shift_of(image, shifted):
    """The shift, if any, by which a crop of the image padded with its edges is the other."""
    pad = MAX_SHIFT
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode="edge")
    height, width = image.shape[:2]
    places = [(i, j) for i in range(2 * pad + 1) for j in range(2 * pad + 1)]
    fitting = [p for p in places if np.array_equal(padded[p[0] :, p[1] :][:height, :width], shifted)]
    assert len(fitting) == 1
    return fitting[0][0] - pad, fitting[0][1] - pad


def test_random_shift_crops_a_padded_image():
    """Half of the batches are shifted; there every row and camera goes its own way, and s' as s."""
    rng = np.random.default_rng(2)
    images, following = rng.integers(0, 256, (2, 40, 2, 9, 11, 3)).astype(np.uint8)
    shift, whole = jax.jit(random_shift), 0
    for seed in range(60):
        one, other = (np.asarray(x) for x in shift(jax.random.key(seed), images, following))
        assert one.dtype == np.uint8 and one.shape == images.shape
        if np.array_equal(one, images):
            whole += 1
            assert np.array_equal(other, following)
        elif seed < 8:
            shifts = [[shift_of(images[i, c], one[i, c]) for c in range(2)] for i in range(40)]
            assert shifts == [[shift_of(following[i, c], other[i, c]) for c in range(2)] for i in range(40)]
            values = np.array(shifts)
            assert values.min() == -MAX_SHIFT and values.max() == MAX_SHIFT
            assert len({tuple(own) for own in values.reshape(-1, 2)}) > 25
    assert 18 <= whole <= 42


def test_augmentation_leaves_the_state():
    """Only images of s and s' change, by the same shifts."""
    images = np.random.default_rng(3).integers(0, 256, (4, 1, 8, 8, 3)).astype(np.uint8)
    batch = {name: Observation(np.ones((4, 2)), images) for name in ("observations", "next_observations")}
    augment = jax.jit(augmented)
    changed = [augment(batch | {"rewards": np.ones(4)}, jax.random.key(seed)) for seed in range(8)]
    for other in changed:
        assert np.array_equal(other["observations"].images, other["next_observations"].images)
        assert np.array_equal(other["observations"].state, np.ones((4, 2)))
    assert 0 < sum(np.array_equal(other["observations"].images, images) for other in changed) < 8
