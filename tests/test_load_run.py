"""Runs as other programs load them: the agent of a checkpoint, and its diagnosis."""

import copy
import json
import shutil
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from tiny_runs import BC, OTQL, POINTMAZE, refused, run_dir, run_dirs, run_main

from experiments import diagnose
from utils.coupling import solve_plan
from utils.errors import UserError
from utils.run import checkpoints
from utils.run.loading import load_run


@pytest.fixture(scope="module")
def directory(pointmaze, tmp_path_factory):
    """A tiny run with two checkpoints."""
    save_dir = tmp_path_factory.mktemp("exp")
    flags = (f"--env_name={POINTMAZE}", f"--dataset={pointmaze}", f"--save_dir={save_dir}")
    run_main(*OTQL, *flags, "--offline_steps=4", "--save_interval=2")
    return run_dir(save_dir)


def test_the_agent_of_a_run_loads(directory):
    """Parameters, settings and step are those of the checkpoint, and it acts."""
    agent, settings, step = load_run(directory)
    assert step == 4
    state = checkpoints.load_latest(directory / "checkpoints")[1]["agent"]
    jax.tree.map(np.testing.assert_array_equal, agent.params, state["params"])
    assert agent.hyper["lam"] == np.float32(settings["config"]["lam"])
    observations = jnp.zeros((3, settings["observation_dim"]))
    assert agent.sample_actions(observations, jax.random.PRNGKey(0)).shape == (3, settings["chunk_dim"])
    earlier = load_run(directory, 2)[0]
    assert earlier.step == 2 and not np.array_equal(
        *(jax.tree.leaves(a.params)[0] for a in (earlier, agent))
    )  # fmt: skip


def test_a_run_from_before_learned_sources_loads(directory, tmp_path):
    """Settings that a record and a checkpoint lack are those of the paper: N(0, I), velocities, all of the noise."""
    old = tmp_path / "old"
    shutil.copytree(directory, old)
    settings = json.loads((old / "flags.json").read_text())
    for name in ("source", "source_hidden_dims", "targets", "noise_scale"):
        del settings["config"][name]
    (old / "flags.json").write_text(json.dumps(settings))
    folder = old / "checkpoints"
    state = checkpoints.load(checkpoints.path_of(folder, 4))
    del state["agent"]["hyper"]["noise_scale"]
    checkpoints.path_of(folder, 4).unlink()
    checkpoints.save(folder, 4, state)
    observations = jnp.ones((3, settings["observation_dim"]))
    agents = [load_run(place)[0] for place in (directory, old)]
    actions = [agent.sample_actions(observations, jax.random.PRNGKey(0)) for agent in agents]
    np.testing.assert_array_equal(*actions)


def test_a_base_with_a_source_needs_an_agent_with_it(pointmaze, tmp_path):
    """--start_from brings flow and source; an agent that starts elsewhere, or learns other steps, is refused."""
    flags = (f"--env_name={POINTMAZE}", f"--dataset={pointmaze}", "--offline_steps=2", "--agent.source_hidden_dims=6")
    action, shortcut = "--agent.source=action", "--agent.targets=shortcut"
    run_main(*BC, *flags, f"--save_dir={tmp_path / 'bc'}", action)
    (base,) = run_dirs(tmp_path / "bc")
    refusals = {
        ("--agent.source=standard",): "source = action, the agent standard",
        (action, "--agent.source_hidden_dims=7"): "source_hidden_dims",
        (action, shortcut): "targets = velocity, the agent shortcut",
    }
    for own, message in refusals.items():
        assert message in refused(*OTQL, *flags, f"--save_dir={tmp_path / 'no'}", f"--start_from={base}", *own)
    run_main(
        *OTQL, *flags, f"--save_dir={tmp_path / 'otql'}", f"--start_from={base}", action, "--agent.lr=1e-30",
        "--agent.flow_tau=0",
    )  # fmt: skip
    (trained,) = run_dirs(tmp_path / "otql")
    expected, found = load_run(base)[0].targets, load_run(trained)[0].targets
    for name in ("flow", "source"):
        jax.tree.map(np.testing.assert_array_equal, found[name], expected[name])


def test_what_cannot_be_loaded(directory, tmp_path):
    """No run, no such step, no checkpoint: one line each."""
    with pytest.raises(UserError, match="not the directory of a run"):
        load_run(tmp_path)
    with pytest.raises(UserError, match=r"no checkpoint of step 3; it has \[2, 4\]"):
        load_run(directory, 3)
    (tmp_path / "flags.json").write_bytes((directory / "flags.json").read_bytes())
    with pytest.raises(UserError, match="no valid checkpoint"):
        load_run(tmp_path)


def test_a_record_that_lacks_what_loading_needs(directory, tmp_path):
    settings = json.loads((directory / "flags.json").read_text())
    del settings["chunk_dim"]
    (tmp_path / "flags.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"flags.json lacks chunk_dim: it was changed, or is of an older version"):
        load_run(tmp_path)


def test_diagnose(directory, capsys, monkeypatch):
    """Each combination of flow and critic is evaluated, and more value samples come closer."""
    monkeypatch.setattr(sys, "argv", ["diagnose"])
    diagnose.main(["diagnose", str(directory), "--episodes=1"])
    out = capsys.readouterr().out
    assert all(f"flow of {a}, critic of {b}: success" in out for a in (2, 4) for b in (2, 4))
    correlations = [float(line.split("A ")[1].split(",")[0]) for line in out.splitlines() if "value samples" in line]
    assert len(correlations) == 5 and correlations[-1] > correlations[0]


def test_diagnose_between_runs(directory, capsys, monkeypatch):
    """Runs of the same task and networks are swapped; others are rejected in one line."""
    agent, settings, step = load_run(directory)
    agents = {
        "one": agent,
        "other": agent.replace(hyper=agent.hyper | {"lam": 7.0}),
        "wider": agent.replace(params=jax.tree.map(lambda x: x[..., None], agent.params)),
    }
    monkeypatch.setattr(diagnose, "FLAGS", copy.deepcopy(diagnose.FLAGS))
    tasks = {"elsewhere": "pointmaze-large-navigate-singletask-task1-v0"}
    loaded = lambda name: (agents.get(name, agent), settings | {"env_name": tasks.get(name, POINTMAZE)}, step)  # noqa: E731
    monkeypatch.setattr(diagnose, "load", loaded)
    monkeypatch.setattr(diagnose, "success", lambda agent, _: str(float(agent.hyper["lam"])))
    diagnose.main(["diagnose", "one", "other", "--between"])
    out = capsys.readouterr().out
    for flow, lam in ((1, settings["config"]["lam"]), (2, 7.0)):
        assert all(f"flow of {flow}, critic of {critic}: success {lam}\n" in out for critic in (1, 2))
    lines = [line for line in out.splitlines() if "flow samples" in line]
    assert all("spread of the mean action 1.000, predicted 0." in line for line in lines) and len(lines) == 2
    refused = {"at least two runs": (), "the networks of wider and one differ": ("wider",)}
    refused["elsewhere has env_name pointmaze-large.*, one pointmaze-medium"] = ("elsewhere",)
    for message, others in refused.items():
        with pytest.raises(UserError, match=message):
            diagnose.main(["diagnose", "one", *others, "--between"])


@pytest.mark.parametrize(("task", "kept"), [("gym:Pendulum-v1", True), ("robot:arm", True), (POINTMAZE, False)])
def test_diagnose_takes_ends_as_training_does(task, kept, monkeypatch):
    """Windows that a terminal state cuts short count where training counts them: not on OGBench's play."""
    ends = np.arange(120) % 4 == 3
    raw = {"observations": np.zeros((120, 2)), "actions": np.zeros((120, 1)), "rewards": np.zeros(120)}
    raw |= {"masks": np.roll(~ends, -1), "terminals": ends}
    raw = {name: value.astype(np.float32) for name, value in raw.items()}
    monkeypatch.setattr(diagnose, "load_dataset", lambda *_, **__: (raw, None, None))
    settings = {"env_name": task, "sparse": False, "config": {"horizon_length": 3}}
    settings["flags"] = {"dataset_dir": None, "dataset": None}
    agent = SimpleNamespace(cfg=SimpleNamespace(discount=0.9, window_rule="pad"))
    batch = diagnose.windows(agent, settings)
    cut = np.asarray(batch["action_mask"]).min(axis=1) == 0
    assert 0.5 < cut.mean() < 0.8
    assert np.all(np.asarray(batch["valid"])[cut] == kept)


@pytest.mark.check
def test_relative_spread():
    """Means 0.9 times as far apart have a relative spread of 0.9, whatever their offset and the samples' deviation."""
    rng = np.random.default_rng(0)
    means, spread = rng.normal(size=(50, 3)), rng.normal(size=(40, 50, 3))
    spread -= spread.mean(axis=0)
    np.testing.assert_allclose(diagnose.relative_spread(5 + 0.9 * means + 2 * spread, means + spread), 0.9)


@pytest.mark.parametrize("epsilon", [1.0, 2.0])
def test_predicted_spread(epsilon):
    """Normal actions, of two covariances in two kinds of states: the plan's own noise gives the same spread."""
    rng, size = np.random.default_rng(0), 2000
    turn = scipy.stats.ortho_group.rvs(3, random_state=0)
    roots = np.stack([turn @ np.diag(d) @ turn.T for d in ([0.1, 0.2, 0.8], [0.3, 0.1, 0.2])])  # Σ^½
    half = np.arange(size) % 2
    means = rng.normal(size=(size, 3)) * np.array([0.5, 1.0, 0.7]) + np.array([1.0, -1.0, 0.5])
    draw = lambda *shape: means + np.einsum("ijk,...ik->...ij", roots[half], rng.normal(size=(*shape, size, 3)))  # noqa: E731
    actions, noise = np.float32(draw()), np.float32(rng.normal(size=(size, 3)))
    arrays = (jnp.asarray(array) for array in (noise, means, actions, means, np.full(size, 1 / size)))
    plan, _ = solve_plan(*arrays, alpha=0.0, epsilon=epsilon, max_iterations=200, threshold=1e-3)
    seen = size * np.asarray(plan).T @ noise  # E[z | a_j]
    centred = means - means.mean(axis=0)
    mean_noise = centred @ np.linalg.lstsq(centred, seen - seen.mean(axis=0))[0]  # E[z | s_j]
    missed = np.einsum("ijk,ik->ij", roots[half], mean_noise)  # what Σ^½ makes of it, where acting has noise around 0
    left = 1 - np.sum(missed * centred) / np.sum(centred**2)
    assert left < 0.98
    np.testing.assert_allclose(1 - diagnose.predicted_spread(draw(400), actions, epsilon), 1 - left, rtol=0.1)


def test_mixed_policies(directory):
    """The flow comes from one agent and the critic from the other."""
    early, late = load_run(directory, 2)[0], load_run(directory, 4)[0]
    agent = diagnose.mixed(early, late)
    same = lambda a, b: all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))  # noqa: E731
    assert same(agent.targets["flow"], early.targets["flow"])
    assert same(agent.params["critic"], late.params["critic"])
    assert same(diagnose.mixed(early, late, averaged=False).targets["flow"], early.params["flow"])
