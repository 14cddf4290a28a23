"""Agents on observations with images: what is encoded and where, what learns from it, and a bandit that needs it."""

import importlib

import bandit
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_networks import make_batch, random_params

from agents import base, otql
from utils import encoders
from utils.coupling import principal_components
from utils.data import batches
from utils.observations import Observation

ALL = [
    "bc",
    "cgql",
    "dsrl",
    "ewfm",
    "fawac",
    "fedit",
    "fql",
    "gfp",
    "ifql",
    "otql",
    "qam",
    "qam_e",
    "qam_f",
    "qc",
    "qsm",
]


class Linear(nn.Module):
    """An encoder that is compiled in a moment."""

    kind: str

    @nn.compact
    def __call__(self, images):
        return nn.Dense(5)(images.reshape(*images.shape[:-4], -1) / 255)


@pytest.fixture
def linear(monkeypatch):
    """Lets agents have that."""
    for module in (base, encoders):
        monkeypatch.setattr(module, "Encoder", Linear)


def image_batch(size=12, seed=0):
    """A batch whose observations have images of two cameras."""
    rng, batch = np.random.default_rng(seed), make_batch(size)
    for name in ("observations", "next_observations"):
        images = rng.integers(0, 256, (size, 2, 6, 6, 3)).astype(np.uint8)
        batch[name] = Observation(batch[name], jnp.asarray(images))
    return batch


def image_agent(module, batch, **changes):
    """A small agent."""
    config = module.get_config()
    config.update({"actor_hidden_dims": (8, 8), "value_hidden_dims": (8, 8), "num_qs": 2, "horizon_length": 2})
    config.update({"encoder": "impala_tiny", "flow_steps": 3, "best_of_n": 2} | changes)
    return jax.jit(lambda b: module.Agent.create(jax.random.key(0), b, config))(batch)


def inner_jaxprs(equation):
    """The programs that an equation calls."""
    for value in equation.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if hasattr(item, "jaxpr"):
                yield item.jaxpr
            elif hasattr(item, "eqns"):
                yield item


def convolutions(jaxpr, looped=False):
    """Whether each convolution of a program stands in a loop."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "conv_general_dilated":
            found.append(looped)
        for inner in inner_jaxprs(equation):
            found += convolutions(inner, looped or equation.primitive.name in ("scan", "while"))
    return found


@pytest.mark.parametrize("name", ALL)
def test_no_network_encodes_in_a_loop(name, monkeypatch):
    """An update encodes images outside of all Euler steps, adjoints and denoising; each network has its own encoder."""
    module, batch = importlib.import_module(f"agents.{name}"), image_batch()
    agent = jax.eval_shape(lambda: image_agent(module, batch))
    seen = {key for key, params in agent.params.items() if "encoder" in params}
    assert seen == set(agent.params) - {"temperature"}
    monkeypatch.setattr(encoders, "on_cpu", lambda: False)
    found = convolutions(jax.make_jaxpr(lambda a, b: a.update(b)[1])(agent, batch).jaxpr)
    assert found and not any(found)


def plain_encoding(kind, params, observations):
    """Features without parameters, in place of the encoder: the mean colours."""
    features = observations.images.mean(axis=(-3, -2)).reshape(*observations.images.shape[:-4], -1) / 255
    features = jnp.broadcast_to(features, (*observations.state.shape[:-1], features.shape[-1]))
    return jnp.concatenate([observations.state, features], axis=-1)


@pytest.mark.parametrize("name", ["cgql", "qam", "qsm"])
def test_an_agent_sees_what_its_encoders_make_of_images(name, linear, monkeypatch):
    """With a fixed encoding the loss is that of an agent whose state holds the same numbers: all else is the same."""
    module, batch = importlib.import_module(f"agents.{name}"), image_batch()
    monkeypatch.setattr(base, "encoded", plain_encoding)
    agent = image_agent(module, batch, augment=False)
    names = ("observations", "next_observations")
    joined = batch | {key: plain_encoding("", {}, batch[key]) for key in names}
    other = image_agent(module, joined)
    assert other.condition_stats[0].shape == (9,) and agent.condition_stats[0].shape == (3,)
    bodies = {key: {k: v for k, v in params.items() if k != "encoder"} for key, params in agent.params.items()}
    other = other.replace(params=bodies, targets={key: bodies[key] for key in agent.targets})
    key = jax.random.key(5)
    loss, info = jax.jit(lambda a, b: a.loss(a.params, b, key))(agent, batch)
    expected, expected_info = jax.jit(lambda a, b: a.loss(a.params, b, key))(other, joined)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    for entry in info:
        np.testing.assert_allclose(info[entry], expected_info[entry], rtol=1e-3, atol=1e-5, err_msg=entry)


def test_encoders_learn_from_their_own_loss_alone(linear):
    """The critics' encoder learns from the TD loss, the flow's from the flow loss: not through V̂ or the coupling."""
    batch = image_batch()
    agent = image_agent(otql, batch, max_iterations=10)

    @jax.jit
    def gradients(agent):
        def losses(params):
            total, info = agent.loss(params, batch, agent.key)
            return jnp.stack([total, info["critic/loss"], info["flow/loss"]])

        return jax.jacrev(losses)(agent.params)

    tree = gradients(agent)
    for name, own, other in (("critic", 1, 2), ("flow", 2, 1)):
        leaves = jax.tree.leaves(tree[name]["encoder"])
        for leaf in leaves:
            assert np.abs(leaf[own]).max() > 0
            assert np.all(leaf[other] == 0)
            np.testing.assert_allclose(leaf[0], leaf[own], rtol=1e-4, atol=1e-6)


def test_condition_of_the_coupling(linear):
    """The standardised state, then principal components of the averaged flow's features."""
    batch = image_batch()
    agent = image_agent(otql, batch, image_components=3)
    agent = agent.replace(targets=agent.targets | {"flow": random_params(agent.targets["flow"], 1)})
    observations = batch["observations"]
    conditions = np.asarray(agent.conditions(observations))
    states = np.asarray(observations.state)
    np.testing.assert_allclose(conditions[:, :3], (states - states.mean(0)) / states.std(0), atol=1e-5)
    features = agent.encode("flow", observations, agent.targets["flow"])[:, 3:]
    np.testing.assert_allclose(conditions[:, 3:], principal_components(features, 3), atol=1e-5)
    other = agent.encode("flow", observations, agent.params["flow"])[:, 3:]
    assert np.abs(np.abs(conditions[:, 3:]) - np.abs(principal_components(other, 3))).max() > 0.05


def test_update_augments(linear):
    """An update sees shifted images, by its own key and step, unless that is turned off."""
    batch = image_batch()
    step = jax.jit(lambda a, s: a.replace(step=s).update(batch)[1]["critic/q"])
    agents = [image_agent(base, batch, augment=on) for on in (True, False)]
    shifting, still = (np.array([float(step(agent, s)) for s in range(12)]) for agent in agents)
    assert len(set(still)) == 1  # Q of the batch's own actions has no other randomness.
    shifted = np.abs(shifting - still) > 1e-4
    assert 2 <= shifted.sum() <= 10 and len(set(shifting[shifted])) == shifted.sum()


# ---- the bandit: which of four actions is worth most, a spot in the image says


def spots(quarters, size, rng):
    """Images [n, 1, size, size, 3] with a bright spot somewhere in the given quarter, on noise."""
    images = rng.integers(0, 60, (len(quarters), 1, size, size, 3))
    half = size // 2
    for i, quarter in enumerate(quarters):
        row, col = rng.integers(0, half - 2, 2) + half * np.array(divmod(quarter, 2))
        images[i, 0, row : row + 3, col : col + 3, 0] = 255
    return images.astype(np.uint8)


def image_bandit(size=3000, pixels=8, seed=0):
    """Its data, no state at all: four equally frequent actions, of which that of the spot's quarter is worth 1."""
    rng = np.random.default_rng(seed)
    quarters, mode = rng.integers(0, 4, (2, size))
    contexts = np.zeros((size, 2), np.float32)
    actions = bandit.modes(contexts)[np.arange(size), mode] + bandit.SPREAD * rng.normal(size=(size, 2))
    rows = {"observations": contexts[:, :0], "images": spots(quarters, pixels, rng)}
    rows |= {"actions": actions.astype(np.float32), "rewards": (mode == quarters).astype(np.float32)}
    rows = {k: np.repeat(v, 2, axis=0) for k, v in rows.items()}
    ends = np.tile(np.float32([0, 1]), size)
    return batches.prepare(rows | {"masks": np.zeros_like(ends), "terminals": ends}, True)


def test_bandit_is_solved_by_looking(monkeypatch):
    """OTQL takes the action that the image asks for, and no better than chance where it is black."""
    monkeypatch.setitem(encoders.ENCODERS, "impala_tiny", (2, (8,), 1, 32))
    # Shifts would carry the spot of so small an image to another quarter.
    settings = {"augment": False, "lam": 10.0, "w_max": 100.0, "max_iterations": 10, "encoder": "impala_tiny"}
    (agent,) = bandit.train(otql, image_bandit(), 300, **{k: [v] for k, v in settings.items()})
    rng = np.random.default_rng(7)
    quarters = rng.integers(0, 4, 400)
    right = bandit.modes(np.zeros((400, 2)))[np.arange(400), quarters]
    act, images, shares = jax.jit(lambda a, o: a.sample_actions(o, jax.random.key(1))), spots(quarters, 8, rng), []
    for seen in (images, 0 * images):
        actions = np.asarray(act(agent, Observation(np.zeros((400, 0), np.float32), seen)))
        shares.append(np.mean(np.linalg.norm(actions - right, axis=1) < 0.4))
    print("seeing, blind:", shares)
    assert shares[0] > 0.85
    assert shares[1] < 0.45
