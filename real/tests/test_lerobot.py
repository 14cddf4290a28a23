"""Exported directories in LeRobot's hands: its loaders, its factory, the calls of lerobot-rollout and lerobot-eval."""

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from lerobot.configs import PreTrainedConfig
from lerobot.policies.factory import make_policy, make_pre_post_processors
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from lerobot.policies.utils import prepare_observation_for_inference
from lerobot.processor import PolicyProcessorPipeline
from lerobot.processor.rename_processor import rename_stats
from lerobot.scripts.lerobot_eval import rollout
from lerobot.utils.import_utils import register_third_party_plugins
from random_agents import ACTION_DIM, make_agent

from real.policy_directory import Normalisation

FEATURES = {"observation.state": 4, "observation.environment_state": 2}
STATS = {
    "observation.state": {"mean": [1.0, 2.0, 3.0, 4.0], "std": [0.5, 1.0, 2.0, 4.0]},
    "action": {"min": [-10.0, 0.0, 5.0], "max": [10.0, 1.0, 25.0]},
}
NORMALISATION = Normalisation({"STATE": "MEAN_STD", "ENV": "IDENTITY", "ACTION": "MIN_MAX"}, STATS)


@pytest.fixture(autouse=True, scope="module")
def plugins():
    """As LeRobot's programs begin: policies are found by the name of their distribution."""
    register_third_party_plugins()
    assert {"otql", "smolvla_otql"} <= PreTrainedConfig.get_known_choices().keys()


def dataset_meta(features: dict[str, int] = FEATURES, action_dim: int = ACTION_DIM) -> SimpleNamespace:
    """What `make_policy` asks of a dataset; its statistics are wrong, and must not be used."""
    shapes = features | {"action": action_dim}
    rows = {name: {"dtype": "float32", "shape": (size,), "names": None} for name, size in shapes.items()}
    stats = {name: {"mean": np.full(n, 7.0), "std": np.full(n, 9.0)} for name, n in shapes.items()}
    return SimpleNamespace(features=rows, stats=stats)


def load(directory: Path, *overrides: str, meta: SimpleNamespace | None = None, rename: dict[str, str] | None = None):
    """Policy and processors as lerobot-rollout makes them from --policy.path and other --policy flags."""
    config = PreTrainedConfig.from_pretrained(directory, cli_overrides=list(overrides))
    config.pretrained_path = directory
    meta = meta or dataset_meta()
    policy = make_policy(config, ds_meta=meta)
    before, after = make_pre_post_processors(
        policy_cfg=config,
        pretrained_path=config.pretrained_path,
        dataset_stats=rename_stats(meta.stats, rename or {}),
        preprocessor_overrides={
            "device_processor": {"device": config.device},
            "rename_observations_processor": {"rename_map": rename or {}},
        },
    )
    return policy, before, after


def act(policy, before, after, observation: dict[str, np.ndarray]) -> torch.Tensor:
    """One step of lerobot-rollout's loop."""
    with torch.inference_mode():
        seen = prepare_observation_for_inference(observation, torch.device(policy.config.device), "task", "robot")
        return after(policy.select_action(before(seen)))


def observation(seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {name: generator.standard_normal(size).astype(np.float32) for name, size in FEATURES.items()}


@pytest.mark.parametrize("name", ["otql", "fql", "dsrl", "fedit", "cgql", "qsm"])
def test_the_loop_of_lerobot_rollout(name, export):
    """A chunk is executed in full, then another is drawn; normalised by the stored statistics."""
    agent = make_agent(name, horizon=3, best_of_n=2)
    policy, before, after = load(export(agent, FEATURES, NORMALISATION))
    for part in (policy, before, after):
        part.reset()
    torch.manual_seed(0)
    rows = [act(policy, before, after, observation(i)) for i in range(4)]
    assert all(row.shape == (1, ACTION_DIM) and row.device.type == "cpu" for row in rows)
    torch.manual_seed(0)
    for start, steps in ((0, 3), (3, 1)):
        raw = observation(start)
        state = (raw["observation.state"] - STATS["observation.state"]["mean"]) / STATS["observation.state"]["std"]
        vector = np.concatenate([state, raw["observation.environment_state"]]).astype(np.float32)
        policy.reset()
        parts = {"observation.state": vector[:4], "observation.environment_state": vector[4:]}
        chunk = policy.predict_action_chunk({k: torch.from_numpy(v)[None] for k, v in parts.items()})[0]
        low, high = (torch.tensor(STATS["action"][name]) for name in ("min", "max"))
        expected = (chunk + 1) / 2 * (high - low) + low
        torch.testing.assert_close(torch.cat(rows[start : start + steps]), expected[:steps], atol=1e-4, rtol=1e-5)


def test_identity_by_default(export):
    """Without statistics the networks see the robot's values and the robot gets theirs."""
    _, before, after = load(export(make_agent("otql"), FEATURES))
    raw = {name: torch.from_numpy(value)[None] for name, value in observation().items()}
    seen = before(dict(raw))
    for name in FEATURES:
        torch.testing.assert_close(seen[name], raw[name], rtol=0, atol=0)
    action = torch.full((1, ACTION_DIM), 0.3)
    torch.testing.assert_close(after(action), action, rtol=0, atol=0)


def test_renamed_features(export):
    """LeRobot's --dataset.rename_map takes effect."""
    meta = dataset_meta({"observation.joints": 4, "observation.environment_state": 2})
    rename = {"observation.joints": "observation.state"}
    policy, before, after = load(export(make_agent("otql"), FEATURES), meta=meta, rename=rename)
    own = observation()
    own["observation.joints"] = own.pop("observation.state")
    assert act(policy, before, after, own).shape == (1, ACTION_DIM)


def test_fewer_actions_of_a_chunk(export):
    """--policy.n_action_steps: the policy is asked again before the chunk's end."""
    policy, before, after = load(export(make_agent("otql", horizon=5), FEATURES), "--n_action_steps=2")
    asked = []
    policy.predict_action_chunk = lambda batch, noise=None: asked.append(1) or torch.zeros(1, 5, ACTION_DIM)
    for step in range(5):
        act(policy, before, after, observation())
        assert len(asked) == step // 2 + 1


def test_a_batch_of_environments(export):
    """lerobot-eval steps several at once."""
    policy, *_ = load(export(make_agent("otql", horizon=2, best_of_n=3), FEATURES))
    batch = {name: torch.randn(7, size) for name, size in FEATURES.items()}
    assert policy.select_action(batch).shape == (7, ACTION_DIM)


class Reach(gymnasium.Env):
    """An environment as lerobot-eval takes them, of ten steps."""

    observation_space = gymnasium.spaces.Dict({"agent_pos": Box(-1, 1, (4,)), "environment_state": Box(-1, 1, (2,))})
    action_space = Box(-1, 1, (ACTION_DIM,))
    _max_episode_steps = 10

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        self.steps += 1
        return self.observation_space.sample(), 0.0, False, self.steps >= 10, {"is_success": False}


def test_the_loop_of_lerobot_eval(export):
    """Several environments at once; its features are agent_pos and environment_state."""
    policy, before, after = load(export(make_agent("otql", horizon=4, best_of_n=2), FEATURES))
    identity = PolicyProcessorPipeline(steps=[])
    env = gymnasium.vector.SyncVectorEnv([Reach] * 3)
    result = rollout(env, policy, identity, identity, before, after, seeds=[0, 1, 2])
    assert result["action"].shape == (3, 10, ACTION_DIM) and result["done"][:, -1].all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"meta": dataset_meta(action_dim=6)}, r"acts in 3 dimensions, the robot in \(6,\)"),
        ({"meta": dataset_meta(FEATURES | {"observation.state": 9})}, "'observation.state' has 9 values"),
    ],
)
def test_another_robot_is_refused(changes, message, export):
    """An action or observation of another width, before the robot moves."""
    with pytest.raises(ValueError, match=message):
        load(export(make_agent("otql"), FEATURES), **changes)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--n_action_steps=3", "n_action_steps = 3 must be 1 to 2"),
        ("--best_of_n=2", "none were exported"),
        ("--rank=max", "neither mean nor min"),
        ("--n_obs_steps=2", "n_obs_steps"),
    ],
)
def test_settings_that_do_not_fit(override, message, export):
    """On the command line of LeRobot."""
    with pytest.raises(ValueError, match=message):
        load(export(make_agent("otql"), FEATURES), override)


def test_another_format_and_missing_parameters(export):
    """A directory of another format, or of damaged parameters, does not act."""
    with pytest.raises(ValueError, match="format 2 is not 1"):
        load(export(make_agent("otql"), FEATURES, format_version=2))
    with pytest.raises(RuntimeError, match=r"model\.edit"):
        load(export(make_agent("otql"), FEATURES, edit_scale=0.1))


def test_a_missing_feature(export):
    """An observation that lacks what the networks see."""
    policy, before, after = load(export(make_agent("otql"), FEATURES))
    with pytest.raises(ValueError, match=r"no 'observation\.environment_state'"):
        act(policy, before, after, {"observation.state": np.zeros(4, np.float32)})


@pytest.mark.parametrize("name", ["otql", "cgql"])
def test_compiled(name, export):
    """torch.compile changes no action; reset() is what compiles."""
    directory = export(make_agent(name, flow_steps=2, best_of_n=3), FEATURES)
    policy, before, after = load(directory)
    compiled, *_ = load(directory, "--compile_model=true")
    compiled.reset()
    actions = []
    for each in (policy, compiled):
        torch.manual_seed(0)
        with torch._dynamo.config.patch(error_on_recompile=True):
            actions.append(act(each, before, after, observation()))
    torch.testing.assert_close(*actions, atol=1e-5, rtol=0)


@pytest.mark.parametrize("nfe", [1, 3, 10])
def test_real_time_chunking(nfe, export):
    """A new chunk begins as what is left of the one before, the closer the more steps; the first chunk is free."""
    agent = make_agent("otql", horizon=8, flow_steps=nfe, best_of_n=2)
    policy, *_ = load(export(agent, FEATURES))
    batch = {name: torch.from_numpy(value)[None] for name, value in observation().items()}
    noise = torch.randn(2, 1, 1, 8 * ACTION_DIM)
    free = policy.predict_action_chunk(batch, noise=noise)
    policy.config.rtc_config = RTCConfig(enabled=True, execution_horizon=6)
    policy.init_rtc_processor()
    torch.testing.assert_close(policy.predict_action_chunk(batch, noise=noise), free)
    left = torch.rand(5, ACTION_DIM) - 0.5
    with torch.inference_mode():
        joined = policy.predict_action_chunk(batch, noise=noise, inference_delay=3, prev_chunk_left_over=left)
    distance, before = ((chunk[0, :3] - left[:3]).abs().max() for chunk in (joined, free))
    assert distance < 0.15 * before
    assert joined.abs().max() <= 1
    with pytest.raises(ValueError, match=r"rtc_config\.enabled"):
        policy.select_action(batch)


def test_no_real_time_chunking_without_a_flow(export):
    """One line, when the settings are read or taken up later."""
    with pytest.raises(ValueError, match="needs a flow"):
        load(export(make_agent("fql"), FEATURES), "--rtc_config.enabled=true")
    policy, *_ = load(export(make_agent("fql"), FEATURES))
    policy.config.rtc_config = RTCConfig(enabled=True)
    with pytest.raises(ValueError, match="needs a flow"):
        policy.init_rtc_processor()


def test_the_package_alone_runs_an_exported_policy(export, tmp_path):
    """Installed elsewhere, beside LeRobot, with nothing of this repository: no JAX, no `utils`, `envs`, `agents`."""
    directory, site = export(make_agent("otql", best_of_n=2), FEATURES, NORMALISATION), tmp_path / "site"
    package = Path(__file__).parents[1] / "lerobot_policy_otql"
    source = shutil.copytree(package, tmp_path / "source", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*install, f"--target={site}", str(source)], check=True)
    assert {path.name.split("-")[0] for path in site.iterdir()} == {"bin", "lerobot_policy_otql"}
    code = (
        "import sys, torch\n"
        f"sys.path.insert(0, {str(site)!r})\n"
        "absent = ('jax', 'flax', 'utils', 'envs', 'agents', 'real', 'mujoco', 'transformers', 'peft', 'ot')\n"
        "sys.modules.update(dict.fromkeys(absent))\n"
        "import lerobot_policy_otql\n"
        f"assert lerobot_policy_otql.__file__.startswith({str(site)!r})\n"
        "from lerobot.configs import PreTrainedConfig\n"
        "from lerobot.policies.factory import get_policy_class, make_pre_post_processors\n"
        f"config = PreTrainedConfig.from_pretrained({str(directory)!r})\n"
        f"policy = get_policy_class(config.type).from_pretrained({str(directory)!r}, config=config)\n"
        f"before, after = make_pre_post_processors(config, {str(directory)!r})\n"
        "seen = {'observation.state': torch.zeros(4), 'observation.environment_state': torch.zeros(2)}\n"
        "print(tuple(after(policy.select_action(before(seen))).shape))\n"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.splitlines()[-1:] == ["(1, 3)"], done.stderr[-2000:]


def test_not_trained_here(export):
    """lerobot-train is told so."""
    policy, *_ = load(export(make_agent("bc"), FEATURES))
    for call in (policy.get_optim_params, policy.config.get_optimizer_preset, lambda: policy.forward({})):
        with pytest.raises(NotImplementedError, match=r"main\.py"):
            call()
