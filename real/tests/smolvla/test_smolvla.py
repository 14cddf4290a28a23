"""OTQL for SmolVLA: every piece against an independent computation, and learning where the answer is known."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from lerobot.policies.smolvla.processor_smolvla import make_smolvla_pre_post_processors
from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS
from tiny_smolvla import ACTION_DIM, CHUNK, STATE_DIM, load, observation, write_dataset

from real.smolvla import torch_coupling
from real.smolvla.data import Rows, read_rows
from real.smolvla.expert import Prefix, encode, matching_error, sample, sample_times, with_state
from real.smolvla.memory_estimate import Allocated
from real.smolvla.otql import Otql, Settings, Sft, generator, principal_components
from real.smolvla.policy_directory import add_lora, merged
from real.smolvla.prefixes import AllPrefixes, Encoder, Prefixes
from utils.errors import UserError

PAD = 32  # max_action_dim


@pytest.fixture
def policy(path: Path) -> SmolVLAPolicy:
    return load(path)


def prepared(policy: SmolVLAPolicy, count: int) -> dict:
    return make_smolvla_pre_post_processors(policy.config, None)[0](observation(count))


# ---- SmolVLA's convention


def test_prefix_and_expert_compute_what_smolvla_computes(policy: SmolVLAPolicy) -> None:
    batch = prepared(policy, 5)
    random = torch.Generator().manual_seed(1)
    actions, noise = (torch.randn(5, CHUNK, width, generator=random) for width in (ACTION_DIM, PAD))
    t, mask = sample_times(5, random), torch.ones(5, CHUNK)
    images, image_masks = policy.prepare_images(batch)
    tokens, kept = batch[OBS_LANGUAGE_TOKENS], batch[OBS_LANGUAGE_ATTENTION_MASK]
    state = policy.prepare_state(batch)
    inputs = images, image_masks, tokens, kept, state
    expected = policy.model.forward(*inputs, policy.prepare_action({"action": actions}), noise, t)[..., :ACTION_DIM]
    longer = int(kept.sum(dim=1).max()) + 3  # Padding of the language changes nothing.
    prefix, pooled = encode(policy, batch, longer)
    found = matching_error(policy, with_state(policy, prefix, state), noise, actions, t, mask)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for name in ("state_proj", "action_in_proj", "vlm_with_expert.lm_expert.layers.1.self_attn.k_proj"):
        weight = policy.model.get_submodule(name).weight
        theirs, ours = (torch.autograd.grad(loss.mean(), weight, retain_graph=True)[0] for loss in (expected, found))
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
    policy.config.num_steps = 3
    torch.testing.assert_close(
        sample(policy, with_state(policy, prefix, state), noise, 3),
        policy.model.sample_actions(*inputs, noise=noise),
        **{"rtol": 1e-4, "atol": 1e-5},
    )
    # Pooled: other images of one camera change that camera's part, and the language's, which sees it.
    assert pooled.shape == (5, 3 * 64)
    again, _ = encode(policy, batch, longer)
    torch.testing.assert_close(again.tokens, prefix.tokens, rtol=0, atol=0)


def test_padding_has_no_part_in_the_loss(policy: SmolVLAPolicy) -> None:
    batch, random = prepared(policy, 3), torch.Generator().manual_seed(2)
    prefix = with_state(policy, encode(policy, batch, 8)[0], policy.prepare_state(batch))
    actions, noise = (torch.randn(3, CHUNK, width, generator=random) for width in (ACTION_DIM, PAD))
    t, mask = sample_times(3, random), torch.ones(3, CHUNK)
    mask[1, 2:] = 0
    before = matching_error(policy, prefix, noise, actions, t, mask)
    actions[1, 2:] += 5
    after = matching_error(policy, prefix, noise, actions, t, mask)
    # A later step has no say in an earlier one: SmolVLA's expert is causal in the chunk.
    torch.testing.assert_close(after, before)
    assert (after[1, 2:] == 0).all() and (after[1, :2] > 0).all()
    (gradient,) = torch.autograd.grad(after.sum(), policy.model.action_out_proj.weight)
    assert (gradient[ACTION_DIM:] == 0).all() and (gradient[:ACTION_DIM] != 0).all()


def test_times_are_smolvlas(policy: SmolVLAPolicy) -> None:
    ours, theirs = sample_times(50_000, torch.Generator().manual_seed(0)), policy.model.sample_time(50_000, "cpu")
    levels = torch.linspace(0.05, 0.95, 10)
    torch.testing.assert_close(ours.quantile(levels), theirs.quantile(levels), atol=0.01, rtol=0)


# ---- Coupling


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
    ours = torch_coupling.tilted_marginal(torch.tensor(advantages), torch.tensor(valid), 1.0, 10.0)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)
    expected, about = jax_coupling.solve_plan(noise, source, actions, conditions, theirs, action_mask=mask, **settings)
    tensors = (torch.tensor(each) for each in (noise, source, actions, conditions, theirs))
    plan, found = torch_coupling.solve_plan(*tensors, action_mask=torch.tensor(mask), **settings)
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
        index, info = torch_coupling.couple(noise, actions, conditions, probs, random, torch.ones(32, 6), **settings)
        counts += torch.bincount(index, minlength=32)
    shares = counts.reshape(8, 4).sum(dim=0) / counts.sum()
    torch.testing.assert_close(shares, torch.tensor([0.1, 0.0, 0.6, 0.3]), atol=0.02, rtol=0)
    assert float(info["effective_sample_size"]) == pytest.approx(1 / (32 * float(probs.square().sum())))


# ---- Data


def test_windows_against_a_plain_loop() -> None:
    lengths, solved = (5, 3, 7), (True, False, False)
    ends = torch.repeat_interleave(torch.tensor(lengths).cumsum(0), torch.tensor(lengths))
    flags = torch.repeat_interleave(torch.tensor(solved), torch.tensor(lengths))
    actions = torch.arange(15.0)[:, None]
    rows = Rows(torch.zeros(15, 1), actions, torch.zeros(15, 2), ends, flags, flags)
    starts, horizon, chunk, discount = rows.starts(3), 3, 6, 0.9
    expected_starts = [0, 1, 2, 3, 4, 8, 9, 10, 11]  # None in the failure of 3; those of 7 that leave a next state.
    assert starts.tolist() == expected_starts
    windows = rows.windows(starts, horizon, chunk, discount)
    for i, start in enumerate(expected_starts):
        episode = int(np.searchsorted(np.cumsum(lengths), start, side="right"))
        last = int(np.cumsum(lengths)[episode]) - 1
        reward, mask = 0.0, 1.0
        for k in range(horizon):
            if start + k <= last:
                success = solved[episode] and start + k == last
                reward += discount**k * (0 if success else -1)
                mask *= not success
        assert float(windows["rewards"][i]) == pytest.approx(reward)
        assert float(windows["masks"][i]) == mask
        assert not mask or int(windows["next"][i]) == start + horizon
        assert windows["actions"][i, :, 0].tolist() == [min(start + k, last) for k in range(chunk)]
        assert windows["action_mask"][i].tolist() == [float(start + k <= last) for k in range(chunk)]


def test_rows_of_demonstrations_and_rollouts(dataset: Path, tmp_path: Path) -> None:
    rollouts = write_dataset(tmp_path / "rollouts", (4, 3), seed=1)
    (rollouts / "labels.jsonl").write_text(
        "".join(json.dumps({"episode_index": i, "success": i == 1}) + "\n" for i in range(2))
    )
    rows = read_rows([dataset], [rollouts], [], lambda states, actions: (2 * states, actions - 1))
    assert rows.solved.tolist() == [True] * 11 + [False] * 4 + [True] * 3
    assert rows.demonstrated.tolist() == [True] * 11 + [False] * 7
    assert rows.ends.tolist() == [6] * 6 + [11] * 5 + [15] * 4 + [18] * 3
    assert rows.frames.tolist() == [[0, i] for i in range(11)] + [[1, i] for i in range(7)]
    frame = LeRobotDataset("local/it", root=rollouts)[2]
    torch.testing.assert_close(rows.states[13], 2 * frame["observation.state"])
    torch.testing.assert_close(rows.actions[13], frame["action"] - 1)


def test_principal_components() -> None:
    random = torch.Generator().manual_seed(0)
    values = torch.randn(50, 2, generator=random) @ torch.randn(2, 6, generator=random) + 3
    components = principal_components(values, 2)
    gram = components.T @ components
    assert abs(float(gram[0, 1])) < 1e-2 < float(gram[1, 1]) < float(gram[0, 0])
    scaled = (values - values.mean(dim=0)) / values.std(dim=0, correction=0)
    torch.testing.assert_close(gram.diagonal().sum(), scaled.square().sum(), rtol=1e-3, atol=0)


# ---- Cache


def prefixes_of(policy: SmolVLAPolicy, root: Path, mode: str, cache: Path, bf16: bool = False) -> Prefixes:
    preprocess, _ = make_smolvla_pre_post_processors(policy.config, None)
    encoder = Encoder(policy, preprocess, 8, bf16)
    return Prefixes(encoder, LeRobotDataset("local/it", root=root), mode, cache)


@pytest.mark.parametrize("bf16", [False, True])
def test_cached_prefixes_give_the_same_loss(path: Path, dataset: Path, tmp_path: Path, bf16: bool) -> None:
    rows = read_rows([dataset], [], [], lambda states, actions: (states, actions))
    settings, losses = Settings(batch_size=6, bf16=bf16, horizon=2), []
    for mode in ("none", "memory", "disk", "disk"):  # The second time from the disk.
        policy = load(path)
        prefixes = AllPrefixes([prefixes_of(policy, dataset, mode, tmp_path, bf16)], rows.frames)
        index = torch.tensor([9, 0, 4])
        assert prefixes.rows(index).tokens.dtype == (torch.bfloat16 if bf16 else torch.float32)
        learner = Otql(policy, rows, prefixes, settings)
        losses.append([float(learner.update(step)["flow/loss"]) for step in range(2)])
    assert losses[1] == losses[2] == losses[3]
    # Computed anew, frames stand beside others in a batch, which changes the last digits.
    assert losses[0] == pytest.approx(losses[1], rel=1e-2 if bf16 else 1e-4)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_stale_or_damaged_cache_is_not_used(path: Path, dataset: Path, tmp_path: Path) -> None:
    policy = load(path)
    before = prefixes_of(policy, dataset, "disk", tmp_path).pooled
    with torch.no_grad():
        policy.model.vlm_with_expert.vlm.model.text_model.layers[0].mlp.up_proj.weight += 0.1
    after = prefixes_of(policy, dataset, "disk", tmp_path).pooled
    assert not torch.allclose(before, after)
    with torch.no_grad():
        policy.model.state_proj.weight += 1  # Trained, and behind the prefix.
    assert torch.equal(prefixes_of(policy, dataset, "disk", tmp_path).pooled, after)
    folders = sorted(tmp_path.iterdir())
    assert len(folders) == 2
    for folder in folders:
        (folder / "tokens.bin").write_bytes(b"")
    with pytest.raises(UserError, match="damaged"):
        prefixes_of(policy, dataset, "disk", tmp_path)


# ---- Learning


class Constant:
    """Prefixes of rows that all have one observation."""

    def __init__(self, policy: SmolVLAPolicy, count: int):
        self._prefix, pooled = encode(policy, prepared(policy, 1), 4)
        self.pooled = pooled.expand(count, -1)

    def rows(self, index: torch.Tensor) -> Prefix:
        return self._prefix[torch.zeros(len(index), dtype=torch.int64)]


def two_modes() -> Rows:
    """One observation; 4 of 10 episodes go to +0.8 and succeed in 4 steps, the others to −0.8 and fail in 9."""
    episodes = [(0.8, 4, True)] * 9 + [(-0.8, 9, False)] * 6  # 36 and 54 frames: a share of 0.4
    lengths = torch.tensor([length for _, length, _ in episodes])
    actions = torch.cat([torch.full((length, ACTION_DIM), value) for value, length, _ in episodes])
    solved = torch.repeat_interleave(torch.tensor([success for _, _, success in episodes]), lengths)
    count = int(lengths.sum())
    return Rows(
        torch.zeros(count, STATE_DIM),
        actions,
        torch.zeros(count, 2, dtype=torch.int64),
        torch.repeat_interleave(lengths.cumsum(0), lengths),
        solved,
        torch.ones(count, dtype=torch.bool),
    )


def rewarded_share(policy: SmolVLAPolicy) -> tuple[float, float]:
    """Share of LeRobot's own samples at NFE 3 that go the rewarded way, and the mean of their first action."""
    policy.config.num_steps = 3
    noise = torch.randn(256, CHUNK, PAD, generator=torch.Generator().manual_seed(0))
    batch = prepared(policy, 1)
    batch = {
        key: value.expand(256, *value.shape[1:]) for key, value in batch.items() if isinstance(value, torch.Tensor)
    }
    actions = policy.predict_action_chunk(batch, noise=noise)
    return float((actions[:, 0, 0] > 0).float().mean()), float(actions[:, 0].mean())


@pytest.mark.slow
def test_otql_goes_to_the_rewarded_mode_and_sft_stays_at_the_share(path: Path) -> None:
    policy, rows = load(path), two_modes()
    settings = Settings(batch_size=32, actor_lr=2e-3, critic_lr=3e-3, tau=0.05, horizon=4)
    prefixes = Constant(policy, len(rows.states))
    sft = Sft(policy, rows, prefixes, settings)
    losses = [float(sft.update(step)["flow/loss"]) for step in range(100)]
    assert np.mean(losses[-20:]) < 0.6 * np.mean(losses[:5])
    share, _ = rewarded_share(policy)
    assert 0.25 < share < 0.6
    otql = Otql(policy, rows, prefixes, settings)
    for step in range(60):
        info = otql.update(step)
    share, mean = rewarded_share(policy)
    assert share > 0.9
    assert mean == pytest.approx(0.8, abs=0.2)
    assert float(info["coupling/capped"]) == 0


def test_accumulated_gradients_are_those_of_one_batch(path: Path) -> None:
    weights = []
    for parts in (1, 3):
        policy, rows = load(path), two_modes()
        prefixes = Constant(policy, len(rows.states))
        learner = Otql(policy, rows, prefixes, Settings(batch_size=16, accumulate=parts, horizon=4))
        learner.update(0)
        weights.append({name: each.grad for name, each in learner.parameters.items() if each.grad is not None})
    assert len(weights[0]) > 20
    for name, gradient in weights[0].items():
        torch.testing.assert_close(weights[1][name], gradient, rtol=1e-3, atol=1e-6)


def test_padded_actions_reach_no_update(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands behind an episode's end changes neither the coupling nor the loss."""
    windows, infos = Rows.windows, []
    for filler in (0.0, 3.0):

        def filled(self: Rows, *arguments: Any, filler: float = filler) -> dict[str, torch.Tensor]:
            window = windows(self, *arguments)
            padded = window["action_mask"][..., None] == 0
            assert 0.1 < padded.float().mean() < 0.5
            return window | {"actions": window["actions"].masked_fill(padded, filler)}

        monkeypatch.setattr(Rows, "windows", filled)
        policy, rows = load(path), two_modes()
        settings = Settings(batch_size=32, horizon=1, lam=0.0)
        infos.append(Otql(policy, rows, Constant(policy, len(rows.states)), settings).update(0))
    for name, value in infos[0].items():
        torch.testing.assert_close(infos[1][name], value, msg=name)


def test_target_bootstraps_but_from_a_success(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, rows = load(path), two_modes()
    settings = Settings(batch_size=32, horizon=4)
    learner = Otql(policy, rows, Constant(policy, len(rows.states)), settings)
    monkeypatch.setattr(learner, "next_value", lambda *_: torch.full((32,), -7.0))
    start, window = learner.draw(generator(settings.seed, 0))
    # A solved episode pays −1 for each step but its last; the others go on behind all four.
    steps = (rows.ends[start] - start - 1) * rows.solved[start] + 4 * ~rows.solved[start]
    paid = -(1 - settings.discount**steps) / (1 - settings.discount)
    target = paid - 7 * settings.discount**4 * ~rows.solved[start]
    qs = learner.critic(learner.observations[start], window["actions"][:, :4].flatten(1))
    expected = (qs - target).square().mean()
    torch.testing.assert_close(learner.update(0)["critic/loss"], expected.detach())


# ---- LoRA and memory


def test_merged_lora_is_the_policy_that_was_trained(path: Path) -> None:
    policy = load(path)
    add_lora(policy, 3, seed=0)
    trained = [name for name, each in policy.named_parameters() if each.requires_grad]
    assert all("lora_" in name or "lm_expert" not in name for name in trained)
    with torch.no_grad():
        for name, each in policy.named_parameters():
            if "lora_B" in name:
                each.normal_(std=0.3)
    batch, noise = prepared(policy, 2), torch.randn(2, CHUNK, PAD)
    expected = policy.predict_action_chunk(dict(batch), noise=noise)
    assert not torch.allclose(load(path).predict_action_chunk(dict(batch), noise=noise), expected, atol=1e-3)
    torch.testing.assert_close(merged(policy).predict_action_chunk(dict(batch), noise=noise), expected)


def test_memory_is_counted() -> None:
    with Allocated() as allocated:
        weight = torch.ones(1000, requires_grad=True)  # 4 kB
        hidden = (weight * 2).exp()  # 4 kB that go, 4 kB that stay for the gradient
        hidden.sum().backward()
        held = allocated.now
        del hidden
    # The gradient and what it is computed from stand beside weight and hidden; then there is weight and its gradient.
    assert 16_000 <= allocated.peak < 20_100
    assert held in range(12_000, 12_100)
    assert allocated.now in range(8_000, 8_100)
