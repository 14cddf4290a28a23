"""The exported policy and the agent do the same with the same noise."""

import itertools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from lerobot_policy_otql.modeling_otql import OtqlPolicy
from lerobot_policy_otql.networks import squash
from random_agents import ACTION_DIM, OBSERVATION_DIM, make_agent

from utils.errors import UserError
from utils.networks import TanhGaussian

# Every agent, with the settings that make it act differently; QSM has two samplers.
AGENTS = {
    **{name: (name, {}) for name in ("bc", "otql", "qc", "ewfm", "fql", "dsrl", "ifql", "fawac", "fedit", "cgql")},
    **{name: (name, {}) for name in ("qam", "qam_f", "qam_e", "qsm", "gfp", "optiflow", "meanflowql")},
    "lps": ("lps", {"latent_hidden_dims": (14, 10)}),
    "qsm-ddpm": ("qsm", {"sampler": "ddpm"}),
    "dsrl-scaled": ("dsrl", {"noise_scale": 0.4}),
    "source": ("otql", {"source": "noise", "noise_scale": 0.6}),
    "source of actions": ("bc", {"source": "action", "source_hidden_dims": (12,)}),
    "shortcut": ("otql", {"targets": "shortcut"}),
    **{f"{name}-scaled": (name, {"noise_scale": 0.5}) for name in ("qc", "fql", "fedit", "qsm", "cgql", "meanflowql")},
}


def drawn(agent: Any, key: jax.Array, batch: int) -> np.ndarray:
    """The noise that `sample_actions` draws from `key`, as the policy takes it: [N, B, draws, d]."""
    shape = (agent.config.best_of_n, batch, agent.config.action_dim)
    name = type(agent).__module__.split(".")[-1]
    if name == "qsm":
        start, steps = jax.random.split(key)
        keys = [start, *jax.random.split(steps, agent.config.flow_steps)]
    elif name in ("fedit", "qam"):
        keys = list(jax.random.split(key))[: 2 if name == "fedit" or agent.config.edits else 1]
    else:
        keys = [key]
    return np.stack([jax.random.normal(k, shape) for k in keys], axis=2)


def both(agent: Any, policy: OtqlPolicy, seed: int, batch: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Chunks of the agent and of the policy for random observations, [B, d] each."""
    key = jax.random.PRNGKey(seed)
    observations = np.random.default_rng(seed).standard_normal((batch, OBSERVATION_DIM)).astype(np.float32)
    noise = torch.from_numpy(drawn(agent, key, batch))
    with torch.inference_mode():
        chunk = policy.predict_action_chunk({"observation.state": torch.from_numpy(observations)}, noise=noise)
    assert chunk.shape == (batch, agent.config.horizon_length, ACTION_DIM)
    ours = jax.jit(type(agent).sample_actions)(agent, observations, key)
    return np.asarray(ours), chunk.reshape(batch, -1).numpy()


@pytest.mark.parametrize("name", AGENTS)
@pytest.mark.parametrize(("horizon", "nfe", "n"), [(1, 1, 1), (2, 3, 1), (5, 10, 5)])
def test_actions_are_the_agents(name, horizon, nfe, n, export):
    """Every kind of agent, on random networks, chunks, steps and numbers of candidates."""
    agent_name, settings = AGENTS[name]
    if agent_name == "bc" and n > 1:
        pytest.skip("BC has no critic to rank by")
    agent = make_agent(agent_name, n, horizon, flow_steps=nfe, best_of_n=n, **settings)
    policy = OtqlPolicy.from_pretrained(export(agent))
    for seed in range(3):
        ours, theirs = both(agent, policy, seed)
        np.testing.assert_allclose(theirs, ours, atol=1e-5)
        # Not all on the bounds, where the clip would hide a difference (few steps of a diffusion end there).
        assert nfe < 10 or np.any(np.abs(ours) < 1)


def test_every_agent_is_compared():
    """Each file in agents/ has a case above."""
    names = {path.stem for path in Path("agents").glob("*.py") if "def get_config(" in path.read_text()}
    assert names - {name for name, _ in AGENTS.values()} == {"base"}


def test_another_network_is_not_exported(export):
    """Not acted by in silence as if it were the one that the policy has."""
    agent = make_agent("meanflowql", actor="transformer", transformer_width=8, transformer_blocks=1)
    with pytest.raises(UserError, match="another network 'actor'"):
        export(agent)


def test_the_paper_s_networks(export):
    """4×512, ten critics."""
    wide = (512, 512, 512, 512)
    agent = make_agent("otql", 0, 5, actor_hidden_dims=wide, value_hidden_dims=wide, num_qs=10, best_of_n=5)
    ours, theirs = both(agent, OtqlPolicy.from_pretrained(export(agent)), 0)
    np.testing.assert_allclose(theirs, ours, atol=1e-5)


@pytest.mark.parametrize("name", ["otql", "ifql"])
def test_critics_and_their_ranking(name, export):
    """Each member's values agree, and so does what is ranked first."""
    agent = make_agent(name, 1, 3, best_of_n=8)
    policy = OtqlPolicy.from_pretrained(export(agent))
    generator = np.random.default_rng(0)
    observations = generator.standard_normal((64, OBSERVATION_DIM)).astype(np.float32)
    actions = generator.uniform(-1, 1, (64, 3 * ACTION_DIM)).astype(np.float32)
    ours = np.asarray(agent.apply("critic", observations, actions))
    theirs = policy.model.values(torch.from_numpy(observations), torch.from_numpy(actions)).numpy()
    np.testing.assert_allclose(theirs, ours, rtol=1e-5, atol=1e-5)
    # Mean and minimum choose differently here, so a wrong ranking would show in the actions.
    assert np.any(ours.mean(axis=0).reshape(8, 8).argmax(0) != ours.min(axis=0).reshape(8, 8).argmax(0))


@pytest.mark.parametrize("name", ["dsrl", "fedit", "qam_e"])
def test_deviations_of_squashed_gaussians_are_bounded(name, export):
    """Networks that ask for a deviation beyond e² get that, in the policy as in the agent."""
    agent = make_agent(name, 0, 2, flow_steps=2, best_of_n=1)
    actor, dim = "latent_actor" if name == "dsrl" else "edit_actor", 2 * ACTION_DIM
    last = agent.params[actor]["MLP_0"]["Dense_2"]
    last["bias"] = np.concatenate([last["bias"][:dim], np.full(dim, 6, np.float32)])
    ours, theirs = both(agent, OtqlPolicy.from_pretrained(export(agent)), 0, batch=64)
    np.testing.assert_allclose(theirs, ours, atol=1e-5)
    # Without the bound most would be at an end of their range.
    assert (np.abs(ours) < 0.9).mean() > 0.05


def test_both_bounds_of_a_squashed_gaussian():
    """As in JAX; where the mean is zero, the least deviation shows."""
    parameters = np.zeros((6, 2), np.float32)
    parameters[:, 1] = [-40, -21, -19, 1.9, 2.1, 5]
    key = jax.random.PRNGKey(0)
    noise = 0.1 * np.asarray(jax.random.normal(key, (6, 1)))
    theirs = squash(torch.from_numpy(parameters), torch.from_numpy(noise)).numpy()
    mean, log_std = TanhGaussian((), 1).apply(
        {"params": {"MLP_0": {"Dense_0": {"kernel": np.eye(2), "bias": np.zeros(2)}}}}, parameters
    )
    np.testing.assert_allclose(theirs, np.tanh(mean + np.exp(log_std) * noise), rtol=1e-5)
    np.testing.assert_allclose(theirs[:, 0] / noise[:, 0], np.exp([-20, -20, -19, 1.9, 2, 2]), rtol=0.5)


@pytest.mark.parametrize("n", [1, 3])
def test_a_guided_policy_asks_its_online_critics(n, export):
    """They bend the flow and rank: others, none, or averages of theirs would act differently."""
    agent = make_agent("cgql", 3, 2, flow_steps=5, best_of_n=n, guidance_coef=0.3, inv_temp=2.0)
    policy = OtqlPolicy.from_pretrained(export(agent))
    ours, theirs = both(agent, policy, 0, batch=32)
    np.testing.assert_allclose(theirs, ours, atol=1e-5)
    for changes in (
        {"params": agent.params | {"critic": agent.targets["critic"]}},
        {"params": agent.params | {"critic": jax.tree.map(lambda leaf: 0 * leaf, agent.params["critic"])}},
        {"hyper": agent.hyper | {"guidance_coef": np.float32(0)}},
        {"hyper": agent.hyper | {"inv_temp": np.float32(0)}},
    ):
        differently, _ = both(agent.replace(**changes), policy, 0, batch=32)
        assert np.abs(differently - ours).max() > 1e-2


def test_the_noise_that_a_diffusion_predicts(export):
    """Before any clipping."""
    agent = make_agent("qsm", flow_steps=4)
    policy = OtqlPolicy.from_pretrained(export(agent))
    generator = np.random.default_rng(0)
    observations, x = (generator.standard_normal((16, n)).astype(np.float32) for n in (OBSERVATION_DIM, 2 * ACTION_DIM))
    for t in range(1, 5):
        ours = agent.apply("denoiser", observations, x, np.float32([t]), params=agent.targets["denoiser"])
        theirs = policy.model.actor(torch.from_numpy(observations), torch.from_numpy(x), float(t))
        np.testing.assert_allclose(theirs.numpy(), ours, atol=1e-5)


def test_only_what_acts_is_exported(export):
    """Averages of the flow, online critics, and no critics where N is 1."""
    from safetensors.numpy import load_file

    agent = make_agent("otql", best_of_n=1)
    tensors = load_file(export(agent) / "model.safetensors")
    assert not any("critic" in name for name in tensors)
    flow = agent.targets["flow"]["MLP_0"]
    np.testing.assert_array_equal(tensors["model.actor.kernels.0"][0], flow["Dense_0"]["kernel"])
    agent = make_agent("otql", best_of_n=2)
    tensors = load_file(export(agent) / "model.safetensors")
    critic = agent.params["critic"]["VmapMLP_0"]
    np.testing.assert_array_equal(tensors["model.critic.kernels.1"], critic["Dense_1"]["kernel"])


def test_fewer_steps_and_candidates_on_the_command_line(export):
    """NFE and N may be changed after the export: as if the agent had been made so."""
    from lerobot.configs import PreTrainedConfig

    directory = export(make_agent("otql", 0, 2, flow_steps=10, best_of_n=5))
    for nfe, n in itertools.product((1, 3), (1, 2)):
        agent = make_agent("otql", 0, 2, flow_steps=nfe, best_of_n=n)
        config = PreTrainedConfig.from_pretrained(directory, cli_overrides=[f"--flow_steps={nfe}", f"--best_of_n={n}"])
        ours, theirs = both(agent, OtqlPolicy.from_pretrained(directory, config=config), 0)
        np.testing.assert_allclose(theirs, ours, atol=1e-5)
