"""SmolVLA whose action expert lerobot-train fine-tunes by OTQL, with the vision-language model frozen.

An update, on a batch of m windows (s_j, a_j, R_j, s'_j) of H executed actions (the paper's Algorithm 1):

    critic      a'_j ← best of N Euler samples of v_θ at s'_j;  TD step on Q_φ
    advantage   A_j ← Q_φ(s_j, a_j) − V̂(s_j),  V̂(s_j) = mean of Q_φ(s_j, â) over Euler samples â of v_θ at s_j
    marginal    p_j ∝ min(exp(λ A_j), w_max)
    coupling    z_i ~ N(0, I), c̄_i ~ Categorical(p) over the c_j;  Γ* ← entropic OT between (z, αc̄; 1/m) and (a, αc; p)
    flow        (z_i, a_j, s_j) ~ Γ*;  step on ‖v_θ(s_j, t z_i + (1−t) a_j, t) − (z_i − a_j)‖²

Q_φ sees the state, the frozen model's last hidden states averaged over each camera's tokens and over the language's,
and the H actions; c is the state and principal components of these averages. The flow generates whole chunks, and its
loss is LeRobot's own. A window that leaves an episode which failed has no successor, so it has no weight.
"""

import itertools
from typing import Any

import torch
from lerobot.policies.common.vla_utils import make_att_2d_masks
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from lerobot.utils.constants import ACTION, OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE, REWARD
from torch import Tensor, nn

from lerobot_policy_otql.configuration_smolvla_otql import SmolVLAOtqlConfig
from lerobot_policy_otql.coupling import couple, tilted_marginal

_FAR = 10.0  # Deviations; a joint that hardly moved in the data has a tiny one, and would reach thousands.
Prefix = tuple[Tensor, Any, Tensor]  # padding mask [m, L], keys and values, features [m, f]


class Critic(nn.Module):
    """Ensemble of K networks of Linear → GELU → LayerNorm, as the critics of agents/.

    Args:
        inputs: width of observation and action.
        hidden: widths of the hidden layers.
        members: K.
    """

    def __init__(self, inputs: int, hidden: list[int], members: int):
        super().__init__()
        widths = list(itertools.pairwise([inputs, *hidden]))
        self.members = nn.ModuleList(
            nn.Sequential(
                *(layer for a, b in widths for layer in (nn.Linear(a, b), nn.GELU(), nn.LayerNorm(b))),
                nn.Linear(hidden[-1], 1),
            )
            for _ in range(members)
        )

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Returns Q_k(s, a): [m, f], [m, d] → [K, m]."""
        inputs = torch.cat([observations, actions], dim=-1)
        return torch.stack([member(inputs)[:, 0] for member in self.members])


class SmolVLAOtqlPolicy(SmolVLAPolicy):
    """SmolVLA with critics; it acts as SmolVLA does."""

    config_class = SmolVLAOtqlConfig
    name = "smolvla_otql"

    def __init__(self, config: SmolVLAOtqlConfig, **kwargs: Any):
        super().__init__(config, **kwargs)
        hidden = self.model.vlm_with_expert.config.text_config.hidden_size
        state, action = config.input_features[OBS_STATE].shape[0], config.action_feature.shape[0]
        inputs = state + (len(config.image_features) + 1) * hidden + config.n_action_steps * action
        self.critic, self.target = (Critic(inputs, config.critic_dims, config.num_qs) for _ in range(2))
        self.target.load_state_dict(self.critic.state_dict())
        self.target.requires_grad_(False)

    def get_optim_params(self) -> list[dict[str, Any]]:
        """Returns the parameters of the expert, and those of the critics with their own rate."""
        critic = {id(each) for each in self.critic.parameters()}
        actor = [each for each in self.parameters() if each.requires_grad and id(each) not in critic]
        return [{"params": actor}, {"params": list(self.critic.parameters()), "lr": self.config.critic_lr}]

    def update(self) -> None:
        """Moves the target critics towards the critics; lerobot-train calls it after each step."""
        with torch.no_grad():
            for average, each in zip(self.target.parameters(), self.critic.parameters(), strict=True):
                average.lerp_(each, self.config.target_tau)

    def prepare_state(self, batch: dict[str, Tensor]) -> Tensor:
        """Returns the padded state, bounded."""
        return super().prepare_state(batch).clamp(-_FAR, _FAR)

    def forward(
        self, batch: dict[str, Tensor], noise: Tensor | None = None, time: Tensor | None = None, reduction: str = "mean"
    ) -> tuple[Tensor, dict[str, float]]:
        """Returns the loss of an update, the flow's and the critics', and numbers for the log.

        Args:
            batch: windows from lerobot-train: observations [m, 2, …] of steps 0 and H, rewards [m, H], actions
                [m, chunk, A], and what of them is padding.
            noise: z, [m, chunk, max_action_dim]; default: drawn.
            time: t, [m]; default: drawn.
            reduction: 'mean'.
        """
        config, actions = self.config, batch[ACTION]
        now, then = (_step(batch, index) for index in (0, 1))
        real = ~batch[f"{REWARD}_is_pad"]
        rewards, discounts = batch[REWARD].float(), config.discount ** torch.arange(real.shape[1], device=real.device)
        solved = ((rewards >= 0) & real).any(dim=1)
        valid = (solved | ~batch[f"{OBS_STATE}_is_pad"][:, 1]).float()
        executed = self._executed(actions)
        with torch.no_grad():
            here, there = self._prefix(now), self._prefix(then)
            target = (rewards * discounts * real).sum(dim=1)
            target += config.discount**config.n_action_steps * (1 - solved.float()) * self._next_value(there)
            samples = [self.critic(here[2], self._sample(here)).mean(dim=0) for _ in range(config.value_samples)]
        qs = self.critic(here[2], executed)
        critic_loss = ((qs - target).square() * valid).sum() / (config.num_qs * valid.sum().clamp(min=1))
        with torch.no_grad():
            advantages = qs.mean(dim=0) - torch.stack(samples).mean(dim=0)
            probs = tilted_marginal(advantages, valid, config.lam, config.w_max) if valid.any() else valid + 1
            noise = self._noise(len(actions)) if noise is None else noise
            index, about = couple(
                noise[..., : actions.shape[2]].flatten(1),
                actions.flatten(1),
                self._conditions(here[2]),
                probs / probs.sum(),
                action_mask=(~batch["action_is_pad"]).float().repeat_interleave(actions.shape[2], dim=1),
                **{name: getattr(config, name) for name in ("alpha", "epsilon", "max_iterations", "threshold")},
            )
        pairs = {key: value[index] for key, value in now.items() if isinstance(value, Tensor)}
        pairs |= {key: batch[key][index] for key in (ACTION, "action_is_pad")}
        flow_loss, _ = super().forward(pairs, noise=noise, time=time)
        about |= {"flow_loss": flow_loss, "critic_loss": critic_loss, "q": qs.mean(), "advantage_std": advantages.std()}
        return flow_loss + critic_loss, {name: float(value.detach()) for name, value in about.items()}

    def _noise(self, count: int) -> Tensor:
        """Draws noise [count, chunk, max_action_dim]."""
        shape = (count, self.config.chunk_size, self.config.max_action_dim)
        return self.model.sample_noise(shape, next(self.critic.parameters()).device)

    def _executed(self, chunks: Tensor) -> Tensor:
        """Flattens the H executed actions of [m, chunk, ≥ A] to [m, H · A]."""
        return chunks[:, : self.config.n_action_steps, : self.config.action_feature.shape[0]].flatten(1).float()

    def _prefix(self, batch: dict[str, Tensor]) -> Prefix:
        """Runs the frozen model on m observations."""
        model = self.model
        images, image_masks = self.prepare_images(batch)
        tokens, mask = batch[OBS_LANGUAGE_TOKENS], batch[OBS_LANGUAGE_ATTENTION_MASK]
        state = self.prepare_state(batch)
        embeddings, padding, blocks = model.embed_prefix(images, image_masks, tokens, mask, state=state)
        (hidden, _), cache = model.vlm_with_expert.forward(
            attention_mask=make_att_2d_masks(padding, blocks),
            position_ids=torch.cumsum(padding, dim=1) - 1,
            past_key_values=None,
            inputs_embeds=[embeddings, None],
            use_cache=True,
        )
        count = hidden.shape[1] - tokens.shape[1] - 1  # Tokens of the images; the state's is the last.
        sizes = [*[count // len(images)] * len(images), tokens.shape[1], 1]
        groups = zip(hidden.float().split(sizes, dim=1)[:-1], padding.split(sizes, dim=1)[:-1], strict=True)
        means = [_mean(group, kept) for group, kept in groups]
        return padding, cache, torch.cat([state[:, : self.config.input_features[OBS_STATE].shape[0]], *means], dim=1)

    def _sample(self, prefix: Prefix) -> Tensor:
        """Samples the policy once for each observation by Euler steps; returns the executed actions [m, H · A]."""
        padding, cache, _ = prefix
        x, steps = self._noise(len(padding)), self.config.num_steps
        for step in range(steps):
            t = torch.full((len(x),), 1 - step / steps, device=x.device)
            x = x - self.model.denoise_step(padding, cache, x, t) / steps
        return self._executed(x)

    def _next_value(self, prefix: Prefix) -> Tensor:
        """Returns the bootstrap value [m]: target critics at the critics' best of N samples, mean − ρ · deviation."""
        candidates = torch.stack([self._sample(prefix) for _ in range(self.config.best_of_n)])
        ranks = torch.stack([self.critic(prefix[2], each).mean(dim=0) for each in candidates])
        best = candidates[ranks.argmax(dim=0), torch.arange(len(prefix[2]), device=ranks.device)]
        qs = self.target(prefix[2], best)
        return qs.mean(dim=0) - self.config.rho * qs.std(dim=0, correction=0)

    def _conditions(self, features: Tensor) -> Tensor:
        """Returns the conditions of the coupling [m, c]: state and principal components, standardised in the batch."""
        state = self.config.input_features[OBS_STATE].shape[0]
        pooled = standardised(features[:, state:])
        _, _, directions = torch.linalg.svd(pooled, full_matrices=False)
        return standardised(torch.cat([features[:, :state], pooled @ directions[: self.config.components].T], dim=1))


def _step(batch: dict[str, Any], index: int) -> dict[str, Any]:
    """Returns a batch with one of the two observations."""
    steps = {key: value[:, index] for key, value in batch.items() if _is_observation(key, value)}
    return {key: value for key, value in batch.items() if key.startswith("observation.language")} | steps


def _is_observation(key: str, value: Any) -> bool:
    named = key.startswith("observation.") and not key.startswith("observation.language")
    return named and not key.endswith("_is_pad") and isinstance(value, Tensor)


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """Returns the mean over tokens except padding: [m, n, w], [m, n] → [m, w]; zero if all are padding."""
    weights = mask[..., None].float()
    return (values * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def standardised(values: Tensor) -> Tensor:
    """Standardises columns to mean 0 and deviation 1; those that hardly vary get no scale of their own."""
    deviation = values.std(dim=0, correction=0)
    varies = deviation > 1e-3 * deviation.max().clamp(min=1e-6)
    return (values - values.mean(dim=0)) / torch.where(varies, deviation, torch.ones_like(deviation))
