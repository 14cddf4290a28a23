"""Exported parameters by their torch names, and the settings that they act with."""

import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from real.policy_tensors import policy_tensors
from utils.errors import UserError
from utils.networks import TanhGaussian

pytestmark = pytest.mark.check

make_agent = runpy.run_path(str(Path(__file__).parents[2] / "real/tests/random_agents.py"))["make_agent"]


def check_mlp(tensors, name, network):
    """Checks that the layers of an exported network are those of the agent's (ensembles: all members)."""
    (layers,) = network.values()
    for i in range(3):
        for kind, part in (("kernels", "kernel"), ("biases", "bias")):
            own = np.asarray(layers[f"Dense_{i}"][part])
            np.testing.assert_array_equal(tensors[f"model.{name}.{kind}.{i}"].reshape(own.shape), own)
    assert f"model.{name}.kernels.3" not in tensors


@pytest.mark.parametrize("n", [1, 3])
def test_a_guided_policy_has_its_online_critics(n):
    """And both numbers of the guidance, whether the critics rank or not."""
    agent = make_agent("cgql", best_of_n=n, guidance_coef=0.3, inv_temp=2.0)
    fields, tensors = policy_tensors(agent)
    assert (fields["num_qs"], fields["best_of_n"], fields["rank"]) == (3, n, "mean")
    np.testing.assert_allclose([fields["guidance_coef"], fields["inv_temp"]], [0.3, 2.0], rtol=1e-6)
    assert fields["value_hidden_dims"] == [20, 12]
    check_mlp(tensors, "critic", agent.params["critic"])
    check_mlp(tensors, "actor", agent.targets["flow"])
    for i in range(2):
        norm = agent.params["critic"]["VmapMLP_0"][f"LayerNorm_{i}"]
        for kind, part in (("scales", "scale"), ("shifts", "bias")):
            np.testing.assert_array_equal(tensors[f"model.critic.{kind}.{i}"][:, 0], norm[part])


@pytest.mark.parametrize("name", ["bc", "otql", "dsrl", "fedit"])
def test_others_have_critics_only_to_rank(name):
    fields, tensors = policy_tensors(make_agent(name, best_of_n=1))
    assert fields["guidance_coef"] == fields["inv_temp"] == fields["num_qs"] == 0
    assert not any("critic" in tensor for tensor in tensors)


@pytest.mark.parametrize(
    ("name", "network", "exported", "scale"),
    [
        ("dsrl", "latent_actor", "latent", "latent_scale"),
        ("fedit", "edit_actor", "edit", "edit_scale"),
        ("qam_e", "edit_actor", "edit", "edit_scale"),
    ],
)
def test_squashed_gaussians(name, network, exported, scale):
    """Means and deviations of the online network, with its scale and no other."""
    setting = "noise_scale" if name == "dsrl" else "edit_scale"
    agent = make_agent(name, best_of_n=1, **{setting: 0.45})
    fields, tensors = policy_tensors(agent)
    check_mlp(tensors, exported, agent.params[network])
    others = {"latent_scale", "edit_scale"} - {scale}
    np.testing.assert_allclose(fields[scale], 0.45, rtol=1e-6)
    assert all(fields[other] == 0 for other in others)


def test_a_run_that_has_diverged_is_not_exported():
    agent = make_agent("bc")
    broken = jax.tree.map(lambda leaf: leaf * np.inf, agent.targets["flow"])
    with pytest.raises(UserError, match="not finite: the run has diverged; export an earlier --step"):
        policy_tensors(agent.replace(targets=agent.targets | {"flow": broken}))


def test_deviations_are_bounded():
    """The exported policy treats a network's output as the agent's own network does."""
    params = {"params": {"MLP_0": {"Dense_0": {"kernel": np.eye(2), "bias": np.zeros(2)}}}}
    for asked, given in ((-25, -20), (-19, -19), (1.9, 1.9), (2.5, 2), (9, 2)):
        _, log_std = TanhGaussian((), 1).apply(params, jnp.float32([0, asked]))
        np.testing.assert_allclose(log_std, [given], rtol=1e-6)
