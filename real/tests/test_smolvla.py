"""SmolVLA trained by OTQL: pieces against an independent computation, and lerobot-train where the answer is known."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.datasets import LeRobotDataset
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from lerobot_policy_otql import SmolVLAOtqlConfig, coupling
from lerobot_policy_otql.modeling_smolvla_otql import SmolVLAOtqlPolicy, standardised
from tiny_model import SIDE, flags, write_vlm

STATE_DIM, ACTION_DIM, CHUNK, HORIZON = 3, 2, 4, 2
CAMERAS = ("front", "wrist")
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vlm(tmp_path_factory.mktemp("smolvla") / "vlm")


def make_policy(vlm: Path, **changes: Any) -> SmolVLAOtqlPolicy:
    """An untrained policy."""
    inputs = {f"observation.images.{name}": PolicyFeature(FeatureType.VISUAL, (3, SIDE, SIDE)) for name in CAMERAS}
    inputs["observation.state"] = PolicyFeature(FeatureType.STATE, (STATE_DIM,))
    outputs = {"action": PolicyFeature(FeatureType.ACTION, (ACTION_DIM,))}
    settings = flags(vlm, CHUNK, HORIZON) | {"critic_dims": [16, 16]} | changes
    torch.manual_seed(0)
    return SmolVLAOtqlPolicy(SmolVLAOtqlConfig(input_features=inputs, output_features=outputs, **settings))


def windows(count: int, seed: int = 0) -> dict[str, Any]:
    """A random batch as lerobot-train gives it: every third window succeeds, every other third leaves a failure."""
    random = torch.Generator().manual_seed(seed)
    kind = torch.arange(count) % 3
    rewards = torch.full((count, HORIZON), -1.0)
    rewards[kind == 0, -1] = 0
    tokens = torch.randint(0, 200, (count, 5), generator=random)
    return {
        **{f"observation.images.{name}": torch.rand(count, 2, 3, SIDE, SIDE, generator=random) for name in CAMERAS},
        "observation.state": torch.randn(count, 2, STATE_DIM, generator=random),
        "observation.state_is_pad": torch.stack([kind < 0, kind != 1], dim=1),
        "observation.language.tokens": tokens,
        "observation.language.attention_mask": torch.arange(5) < 3 + kind[:, None] % 2,
        "action": torch.randn(count, CHUNK, ACTION_DIM, generator=random),
        "action_is_pad": (torch.arange(CHUNK) >= 3) & (kind == 0)[:, None],
        "next.reward": rewards,
        "next.reward_is_pad": torch.zeros(count, HORIZON, dtype=torch.bool),
        "task": ["open it"] * count,
    }


def test_the_flow_s_loss_is_lerobots(vlm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the pairs of the coupling: here, each noise with its own action."""
    policy, batch = make_policy(vlm), windows(6)
    noise, time = torch.randn(6, CHUNK, 32), torch.rand(6)
    monkeypatch.setattr("lerobot_policy_otql.modeling_smolvla_otql.couple", lambda *_, **__: (torch.arange(6), {}))
    loss, about = policy.forward(batch, noise=noise, time=time)
    now = {
        key: value[:, 0] if value.ndim > 2 and "images" in key else value
        for key, value in batch.items()
        if key != "task"
    }
    now["observation.state"] = batch["observation.state"][:, 0]
    expected, _ = SmolVLAPolicy.forward(policy, now, noise=noise, time=time)
    assert about["flow_loss"] == pytest.approx(float(expected), rel=1e-5)
    assert float(loss) == pytest.approx(about["flow_loss"] + about["critic_loss"], rel=1e-5)


def test_samples_are_lerobots(vlm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the prefix that is computed once, at the policy's number of steps."""
    policy, batch = make_policy(vlm), windows(4)
    policy.eval()
    noise = torch.randn(4, CHUNK, 32)
    monkeypatch.setattr(policy, "_noise", lambda count: noise)
    now = {key: value[:, 0] for key, value in batch.items() if "images" in key}
    now |= {"observation.state": batch["observation.state"][:, 0]}
    now |= {key: value for key, value in batch.items() if "language" in key}
    with torch.no_grad():
        prefix = policy._prefix(now)
        ours = [policy._sample(prefix) for _ in range(2)]
        theirs = policy.predict_action_chunk(now, noise=noise)
    torch.testing.assert_close(ours[0], theirs[:, :HORIZON].flatten(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours[1], ours[0], rtol=0, atol=0)
    assert prefix[2].shape == (4, STATE_DIM + 3 * 64)


def test_target_bootstraps_but_from_a_success(vlm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a window that leaves a failure has no part in it."""
    policy, batch = make_policy(vlm, discount=0.9), windows(6)
    monkeypatch.setattr(policy, "_next_value", lambda prefix: torch.full((6,), -7.0))
    _, about = policy.forward(batch)
    now = {key: value[:, 0] for key, value in batch.items() if "images" in key}
    now |= {"observation.state": batch["observation.state"][:, 0]}
    now |= {key: value for key, value in batch.items() if "language" in key}
    qs = policy.critic(policy._prefix(now)[2], batch["action"][:, :HORIZON].flatten(1))
    targets = torch.tensor([-1.0, -1.9 - 0.81 * 7, 0] * 2)
    expected = (qs - targets).square()[:, [0, 1, 3, 4]].mean()
    assert about["critic_loss"] == pytest.approx(float(expected), rel=1e-4)


def test_what_an_update_trains(vlm: Path) -> None:
    """Expert and critics at their own rates, not the language model; the targets follow."""
    policy = make_policy(vlm, target_tau=0.5)
    actor, critic = policy.get_optim_params()
    names = {id(each): name for name, each in policy.named_parameters()}
    trained = [names[id(each)] for each in actor["params"]]
    assert any("lm_expert" in name for name in trained) and any("state_proj" in name for name in trained)
    assert not any(".vlm." in name or "critic" in name or "target" in name for name in trained)
    assert critic["lr"] == 3e-4 and all("critic" in names[id(each)] for each in critic["params"])
    before = [each.clone() for each in policy.target.parameters()]
    with torch.no_grad():
        for each in policy.critic.parameters():
            each += 1
    policy.update()
    for old, new in zip(before, policy.target.parameters(), strict=True):
        torch.testing.assert_close(new, old + 0.5)


@pytest.mark.parametrize(
    ("alpha", "epsilon", "max_iterations", "threshold"),
    [(0.3, 0.5, 50, 1e-2), (2, 0.1, 200, 1e-4)],
)
def test_coupling_is_the_one_in_jax(alpha: float, epsilon: float, max_iterations: int, threshold: float) -> None:
    from utils import coupling as jax_coupling

    random = np.random.default_rng(0)
    noise, actions = random.normal(size=(2, 32, 12)).astype(np.float32)
    source, conditions = random.normal(size=(2, 32, 5)).astype(np.float32)
    mask = (random.random((32, 12)) < 0.8).astype(np.float32)
    advantages, valid = 4 * random.normal(size=32).astype(np.float32), (np.arange(32) > 2).astype(np.float32)
    settings = {"alpha": alpha, "epsilon": epsilon, "max_iterations": max_iterations, "threshold": threshold}
    theirs = np.array(jax_coupling.tilted_marginal(advantages, valid, 1.0, 10.0))
    ours = coupling.tilted_marginal(torch.tensor(advantages), torch.tensor(valid), 1.0, 10.0)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)
    expected, about = jax_coupling.solve_plan(noise, source, actions, conditions, theirs, action_mask=mask, **settings)
    tensors = (torch.tensor(each) for each in (noise, source, actions, conditions, theirs))
    plan, found = coupling.solve_plan(*tensors, action_mask=torch.tensor(mask), **settings)
    np.testing.assert_allclose(32 * plan, 32 * np.array(expected), rtol=1e-3, atol=1e-5)
    assert {name: float(value) for name, value in found.items()} == pytest.approx(
        {name: float(about[name]) for name in found}, rel=1e-3, abs=1e-5
    )


def test_pairs_follow_the_marginal() -> None:
    probs, counts = torch.tensor([0.1, 0.0, 0.6, 0.3] * 8) / 8, torch.zeros(32)
    for seed in range(150):
        random = torch.Generator().manual_seed(seed)
        noise, actions, conditions = (torch.randn(32, width, generator=random) for width in (6, 6, 3))
        settings = {"alpha": 0.3, "epsilon": 0.5, "max_iterations": 50, "threshold": 1e-2}
        index, info = coupling.couple(noise, actions, conditions, probs, torch.ones(32, 6), random, **settings)
        counts += torch.bincount(index, minlength=32)
    shares = counts.reshape(8, 4).sum(dim=0) / counts.sum()
    torch.testing.assert_close(shares, torch.tensor([0.1, 0.0, 0.6, 0.3]), atol=0.02, rtol=0)
    assert float(info["effective_sample_size"]) == pytest.approx(1 / (32 * float(probs.square().sum())))


def test_a_joint_that_rests_has_no_scale(vlm: Path) -> None:
    """Neither in the conditions of the coupling nor in what the expert sees: 7e-5 there was once a state of 28459."""
    values = torch.randn(64, 3) * torch.tensor([1.0, 7e-5, 0.5])
    own = standardised(values)
    assert own[:, 1].abs().max() < 1e-3 and own[:, [0, 2]].std(dim=0, correction=0).allclose(torch.ones(2))
    policy = make_policy(vlm)
    state = policy.prepare_state({"observation.state": torch.tensor([[28459.0, -0.5, 2.0]])})
    torch.testing.assert_close(state[0, :3], torch.tensor([10.0, -0.5, 2.0]))


def two_modes(root: Path) -> None:
    """Episodes from one observation: 9 go to +0.8 and succeed in 4 steps, 6 to −0.8 and fail in 9."""
    vector = {"dtype": "float32", "names": None}
    image = {"dtype": "image", "shape": (SIDE, SIDE, 3), "names": ["height", "width", "channels"]}
    features = {"observation.state": vector | {"shape": (2,)}, "action": vector | {"shape": (ACTION_DIM,)}}
    features |= {"observation.images.front": image, "next.reward": vector | {"shape": (1,)}}
    dataset = LeRobotDataset.create("local/modes", 10, features, root=root, use_videos=False)
    for value, length, success in [(0.8, 4, True)] * 9 + [(-0.8, 9, False)] * 6:
        for step in range(length):
            frame = {"observation.state": np.zeros(2, np.float32), "action": np.full(ACTION_DIM, value, np.float32)}
            frame |= {"observation.images.front": np.full((SIDE, SIDE, 3), 128, np.uint8), "task": "go"}
            frame |= {"next.reward": np.array([0 if success and step == length - 1 else -1], np.float32)}
            dataset.add_frame(frame)
        dataset.save_episode()
    dataset.finalize()


def train(root: Path, output: Path, *arguments: str) -> None:
    """lerobot-train."""
    command = [
        *(str(BIN / "lerobot-train"), f"--dataset.repo_id=local/{root.name}", f"--dataset.root={root}"),
        *(f"--output_dir={output}", "--batch_size=32", "--num_workers=0", "--log_freq=20", "--wandb.enable=false"),
        *("--env_eval_freq=0", "--dataset.video_backend=pyav", *arguments),
    ]
    threads = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=output.parent, env=threads)
    assert done.returncode == 0, done.stderr[-3000:]


def share_of_the_rewarded(policy: SmolVLAPolicy) -> tuple[float, float]:
    """Share of samples that go the rewarded way, and the mean of their first action, normalised."""
    batch = {
        "observation.state": torch.zeros(256, 2),
        "observation.images.front": torch.full((256, 3, SIDE, SIDE), 128 / 255),
        "observation.language.tokens": torch.tensor([[74, 82, 189]]).expand(256, -1),
        "observation.language.attention_mask": torch.ones(256, 3, dtype=torch.bool),
    }
    noise = torch.randn(256, CHUNK, 32, generator=torch.Generator().manual_seed(0))
    actions = policy.predict_action_chunk(batch, noise=noise)[:, 0]
    return float((actions[:, 0] > 0).float().mean()), float(actions.mean())


def test_lerobot_train_goes_to_the_rewarded_mode(vlm: Path, tmp_path: Path) -> None:
    """At NFE 3, where supervised fine-tuning stays at the data's share of 0.4; a run resumes; LeRobot loads it."""
    two_modes(tmp_path / "modes")
    settings = [
        f"--policy.{name}={json.dumps(value).strip(chr(34))}" for name, value in flags(vlm, CHUNK, CHUNK).items()
    ]
    rates = ["--policy.optimizer_lr=2e-3", "--policy.num_steps=3"]
    train(
        *(tmp_path / "modes", tmp_path / "sft", "--policy.type=smolvla", *settings, *rates, "--steps=100"),
        *("--policy.scheduler_warmup_steps=0", "--policy.scheduler_decay_lr=2e-3", "--save_freq=100"),
    )
    sft = tmp_path / "sft/checkpoints/last/pretrained_model"
    share, _ = share_of_the_rewarded(SmolVLAPolicy.from_pretrained(sft))
    assert 0.25 < share < 0.6
    own = ["--policy.critic_lr=3e-3", "--policy.target_tau=0.05", "--policy.critic_dims=[16,16]"]
    train(
        *(tmp_path / "modes", tmp_path / "otql", "--policy.type=smolvla_otql", f"--policy.pretrained_path={sft}"),
        *(*settings, *rates, *own, "--steps=30", "--save_freq=30"),
    )
    halfway = tmp_path / "otql/checkpoints/000030/pretrained_model/train_config.json"
    train(tmp_path / "modes", tmp_path / "otql", f"--config_path={halfway}", "--resume=true", "--steps=60")
    policy = SmolVLAOtqlPolicy.from_pretrained(tmp_path / "otql/checkpoints/last/pretrained_model")
    share, mean = share_of_the_rewarded(policy)
    assert share > 0.9 and mean == pytest.approx(0.96 / 0.784, abs=0.25)  # 0.8, as it is normalised.
