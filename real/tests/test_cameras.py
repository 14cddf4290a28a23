"""Policies that see images: the exported one and the agent do the same with the same images and noise."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from lerobot.configs import PreTrainedConfig
from lerobot_policy_otql.encoders import CameraEncoder, as_pixels
from lerobot_policy_otql.modeling_otql import OtqlPolicy
from PIL import Image
from random_agents import ACTION_DIM, OBSERVATION_DIM, make_agent
from test_parity import drawn

from utils.observations import Observation

CAMERAS = ("observation.images.front", "observation.images.wrist")


def exported(export: Any, agent: Any, state_dim: int, shape: tuple[int, ...]) -> Path:
    """The agent's directory, for as many cameras as it has."""
    images = {name: [3, *shape[1:3]] for name in CAMERAS[: shape[0]]}
    return export(agent, {"observation.state": state_dim} if state_dim else {}, images=images)


def observe(seed: int, batch: int, state_dim: int, shape: tuple[int, ...]) -> tuple[Observation, dict[str, Any]]:
    """A random observation as the agents have it, and as LeRobot gives it."""
    generator = np.random.default_rng(seed)
    state = generator.standard_normal((batch, state_dim)).astype(np.float32)
    images = generator.integers(0, 256, (batch, *shape), np.uint8)
    inputs = {name: torch.from_numpy(images[:, i]) for i, name in enumerate(CAMERAS[: shape[0]])}
    # As LeRobot's prepare_observation_for_inference.
    inputs = {name: (image.type(torch.float32) / 255).permute(0, 3, 1, 2) for name, image in inputs.items()}
    return Observation(state, images), inputs | {"observation.state": torch.from_numpy(state)}


# Agent, its settings, width of the state, shape of the images, H, NFE, N.
CASES = {
    "tiny, two cameras": ("otql", {"encoder": "impala_tiny"}, 6, (2, 13, 18, 3), 2, 3, 4),
    "tiny, images alone": ("otql", {"encoder": "impala_tiny"}, 0, (1, 16, 16, 3), 1, 1, 1),
    "small": ("bc", {"encoder": "impala_small"}, 6, (2, 12, 9, 3), 5, 10, 1),
    "full": ("ifql", {"encoder": "impala"}, 6, (1, 8, 11, 3), 2, 1, 3),
    "one step": ("fql", {"encoder": "impala_tiny"}, 6, (1, 16, 16, 3), 2, 3, 2),
    "latent": ("dsrl", {"encoder": "impala_tiny"}, 6, (1, 16, 16, 3), 2, 3, 2),
    "edit": ("fedit", {"encoder": "impala_tiny"}, 6, (1, 16, 16, 3), 2, 3, 2),
    "guided": ("cgql", {"encoder": "impala_tiny"}, 6, (1, 16, 16, 3), 2, 3, 2),
    "diffusion": ("qsm", {"encoder": "impala_tiny"}, 6, (2, 16, 16, 3), 2, 10, 2),
}


@pytest.mark.parametrize("case", CASES)
def test_actions_are_the_agents(case, export):
    """Each way of acting and each encoder; odd and even sizes; every encoder is asked once for an observation."""
    name, settings, state_dim, shape, horizon, nfe, n = CASES[case]
    sizes = {"state_dim": state_dim, "image_shape": shape}
    agent = make_agent(name, n, horizon, flow_steps=nfe, best_of_n=n, **sizes, **settings)
    policy = OtqlPolicy.from_pretrained(exported(export, agent, state_dim, shape))
    assert len(policy.model.encoders) == len(policy.model.networks) and len(policy.model.encoders["actor"]) == shape[0]
    calls = []
    for module in policy.modules():
        if isinstance(module, CameraEncoder):
            module.register_forward_hook(lambda module, *_: calls.append(module))
    sample = jax.jit(type(agent).sample_actions)
    for seed in range(2):
        key = jax.random.PRNGKey(seed)
        observation, batch = observe(seed, 3, state_dim, shape)
        calls.clear()
        with torch.inference_mode():
            chunk = policy.predict_action_chunk(batch, noise=torch.from_numpy(drawn(agent, key, 3)))
        assert len(calls) == len(set(calls)) == len(policy.model.networks) * shape[0]
        ours = np.asarray(sample(agent, observation, key))
        np.testing.assert_allclose(chunk.reshape(3, -1).numpy(), ours, atol=1e-5)
        black = observation._replace(images=np.zeros_like(observation.images))
        assert np.abs(np.asarray(sample(agent, black, key)) - ours).max() > 1e-2


@pytest.mark.parametrize("encoder", ["impala_tiny", "impala_small"])
def test_critics(encoder, export):
    """Each member's values agree, from the critics' own encoder."""
    shape = (2, 10, 13, 3)
    agent = make_agent("otql", 1, 3, best_of_n=2, encoder=encoder, image_shape=shape)
    policy = OtqlPolicy.from_pretrained(exported(export, agent, OBSERVATION_DIM, shape))
    observation, batch = observe(0, 8, OBSERVATION_DIM, shape)
    actions = np.random.default_rng(0).uniform(-1, 1, (8, 3 * ACTION_DIM)).astype(np.float32)
    ours = np.asarray(jax.jit(lambda *inputs: agent.apply("critic", *inputs))(observation, actions))
    seen = policy.model.see(policy._observe(batch))
    theirs = policy.model.values(seen["critic"], torch.from_numpy(actions)).numpy()
    np.testing.assert_allclose(theirs, ours, rtol=1e-5, atol=1e-5)
    assert np.abs(policy.model.values(seen["actor"], torch.from_numpy(actions)).numpy() - ours).max() > 0.1


@pytest.fixture
def directory(export) -> Path:
    """A policy of two cameras, 8 pixels high and 12 wide."""
    shape = (2, 8, 12, 3)
    agent = make_agent("otql", horizon=2, best_of_n=2, flow_steps=3, encoder="impala_tiny", image_shape=shape)
    return exported(export, agent, OBSERVATION_DIM, shape)


def test_images_of_another_size_become_those_of_the_training():
    """The same bytes as Pillow makes of the recorded ones; those of the right size stay as they are."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, 48, 64, 3), np.uint8)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    np.testing.assert_array_equal(as_pixels(images, 48, 64).numpy(), pixels)
    squeezed = as_pixels(images, 8, 12).numpy()
    expected = [np.asarray(Image.fromarray(one).resize((12, 8), Image.Resampling.BILINEAR)) for one in pixels]
    np.testing.assert_array_equal(squeezed, expected)
    # A mean over what a pixel covers, so that no noise of single pixels gets through.
    assert squeezed.std() < 0.3 * pixels.std()


def test_large_images_and_a_queue_of_actions(directory):
    """select_action takes the robot's images, and one by hand before them is the same."""
    policy = OtqlPolicy.from_pretrained(directory)
    _, batch = observe(0, 1, OBSERVATION_DIM, (2, 32, 40, 3))
    noise = torch.randn(2, 1, 1, 2 * ACTION_DIM)
    actions = [policy.select_action(batch, noise=noise) for _ in range(2)]
    small = {name: as_pixels(batch[name], 8, 12).permute(0, 3, 1, 2) / 255 for name in CAMERAS}
    chunk = policy.predict_action_chunk(batch | small, noise=noise)
    torch.testing.assert_close(torch.stack(actions, dim=1), chunk, rtol=0, atol=0)


def test_saved_by_lerobot_and_loaded_again(directory, tmp_path):
    """The same configuration, order of the cameras, and actions."""
    policy = OtqlPolicy.from_pretrained(directory)
    policy.save_pretrained(tmp_path / "again")
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (directory, tmp_path / "again"))
    assert ours | {"pretrained_path": theirs["pretrained_path"]} == theirs
    again = OtqlPolicy.from_pretrained(tmp_path / "again")
    assert list(again.config.image_features) == list(CAMERAS)
    _, batch = observe(0, 2, OBSERVATION_DIM, (2, 8, 12, 3))
    noise = torch.randn(2, 2, 1, 2 * ACTION_DIM)
    chunks = [each.predict_action_chunk(batch, noise=noise) for each in (policy, again)]
    torch.testing.assert_close(*chunks, rtol=0, atol=0)
    swapped = batch | dict(zip(CAMERAS, [batch[name] for name in reversed(CAMERAS)], strict=True))
    assert (policy.predict_action_chunk(swapped, noise=noise) - chunks[0]).abs().max() > 1e-3


def test_what_does_not_fit(directory):
    """An observation without a camera, or with a depth image; an encoder without images."""
    policy = OtqlPolicy.from_pretrained(directory)
    _, batch = observe(0, 1, OBSERVATION_DIM, (2, 8, 12, 3))
    with pytest.raises(ValueError, match=r"no 'observation\.images\.wrist'"):
        policy.predict_action_chunk({name: batch[name] for name in ("observation.state", CAMERAS[0])})
    with pytest.raises(ValueError, match=r"'observation\.images\.wrist' has shape \[1, 1, 8, 12\]"):
        policy.predict_action_chunk(batch | {CAMERAS[1]: batch[CAMERAS[1]][:, :1]})
    config = PreTrainedConfig.from_pretrained(directory, cli_overrides=["--encoder_widths=[]"])
    with pytest.raises(ValueError, match="images need an encoder"):
        OtqlPolicy.from_pretrained(directory, config=config)
