"""SmolVLA split into its frozen part, whose outputs are computed once as a prefix, and the trained expert.

SmolVLA's vision-language model reads image, language and state tokens; at each layer the action expert attends to their
keys and values. Images and language do not attend to the state, and the model is frozen, so their keys and values are
constants of an observation: the `Prefix`. The state token passes through `state_proj`, which SmolVLA trains, so it is
recomputed each time, one token through the layers of the language model, with a gradient.

SmolVLA's convention: t = 1 is noise, x_t = t z + (1 − t) a, the velocity is z − a; the first A of `max_action_dim`
components are the action, the others are padding.
"""

from dataclasses import dataclass

import torch
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy, make_att_2d_masks
from lerobot.policies.smolvla.smolvlm_with_expert import apply_rope
from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS
from torch import Tensor


@dataclass(frozen=True)
class Prefix:
    """Keys and values that the expert attends to, for m observations of L tokens.

    Attributes:
        tokens: [m, L, layers, 2, heads, width] keys (rotated by their positions) and values.
        mask: [m, L] bool, False where a token is padding.
    """

    tokens: Tensor
    mask: Tensor

    def __getitem__(self, rows: Tensor | slice) -> "Prefix":
        return Prefix(self.tokens[rows], self.mask[rows])

    def to(self, device: torch.device) -> "Prefix":
        """Returns a copy on a device."""
        return Prefix(self.tokens.to(device, non_blocking=True), self.mask.to(device, non_blocking=True))


@torch.no_grad()
def encode(policy: SmolVLAPolicy, batch: dict[str, Tensor], language_length: int) -> tuple[Prefix, Tensor]:
    """Returns the prefix of m observations, and their pooled features for the critic.

    Args:
        policy: SmolVLA.
        batch: observations from the policy's preprocessor.
        language_length: number of language tokens, by cutting or adding padding.

    Returns:
        The prefix, without the state token; and [m, (cameras + 1) · hidden] float32: the last hidden states averaged
        over the tokens of each camera, and over those of the language.
    """
    model, vlm = policy.model, policy.model.vlm_with_expert
    images, image_masks = policy.prepare_images(batch)
    tokens, mask = (
        torch.nn.functional.pad(batch[key][:, :language_length], (0, language_length - batch[key].shape[1]))
        if batch[key].shape[1] < language_length
        else batch[key][:, :language_length]
        for key in (OBS_LANGUAGE_TOKENS, OBS_LANGUAGE_ATTENTION_MASK)
    )
    embeddings, pad_mask, block = model.embed_prefix(
        images, image_masks, tokens, mask.bool(), state=policy.prepare_state(batch)
    )
    count = int(block[0].int().argmax())  # Tokens before that of the state, which starts a separate block.
    embeddings, pad_mask, block = embeddings[:, :count], pad_mask[:, :count], block[:, :count]
    (hidden, _), layers = vlm.forward(
        attention_mask=make_att_2d_masks(pad_mask, block),
        position_ids=torch.cumsum(pad_mask, dim=1) - 1,
        past_key_values=None,
        inputs_embeds=[embeddings, None],
        use_cache=True,
        fill_kv_cache=True,
    )
    pairs = [torch.stack([layers[i]["key_states"], layers[i]["value_states"]], dim=2) for i in range(len(layers))]
    groups = [*hidden[:, :-language_length].chunk(len(images), dim=1), hidden[:, -language_length:]]
    masks = [*pad_mask[:, :-language_length].chunk(len(images), dim=1), pad_mask[:, -language_length:]]
    means = [_mean(group.float(), kept) for group, kept in zip(groups, masks, strict=True)]
    return Prefix(torch.stack(pairs, dim=2), pad_mask), torch.cat(means, dim=1)


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """Returns the mean over tokens except padding: [m, n, w], [m, n] → [m, w]; zero if all are padding."""
    weights = mask[..., None].float()
    return (values * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def with_state(policy: SmolVLAPolicy, prefix: Prefix, state: Tensor) -> Prefix:
    """Returns the prefix with the token of the state [m, max_state_dim] appended."""
    model, vlm = policy.model, policy.model.vlm_with_expert
    mask = torch.cat([prefix.mask, prefix.mask.new_ones(len(state), 1)], dim=1)
    position, hidden = prefix.mask.sum(dim=1, keepdim=True), model.state_proj(state)[:, None]
    pairs = []
    for i, layer in enumerate(vlm.get_vlm_model().text_model.layers):
        attention = layer.self_attn
        normed = layer.input_layernorm(hidden).to(attention.q_proj.weight.dtype)
        query, key, value = (
            project(normed).unflatten(-1, (-1, attention.head_dim))
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        query, key = apply_rope(query, position), apply_rope(key, position)
        keys, values = (
            torch.cat([before, own.to(before.dtype)], dim=1)
            for before, own in zip(prefix.tokens[:, :, i].unbind(dim=2), (key, value), strict=True)
        )
        pairs.append(torch.stack([keys, values], dim=2))
        attended = vlm.eager_attention_forward(
            mask[:, None], len(state), attention.head_dim, query, keys, values.to(query.dtype)
        )
        weight = attention.o_proj.weight
        middle = (attention.o_proj(attended.to(weight.dtype)) + hidden).to(weight.dtype)
        hidden = layer.mlp(layer.post_attention_layernorm(middle)) + middle
    return Prefix(torch.stack(pairs, dim=2), mask)


def velocity(policy: SmolVLAPolicy, prefix: Prefix, x: Tensor, t: Tensor) -> Tensor:
    """Returns v(x, t), of the shape of x, for a prefix with its state; x [m, chunk, max_action_dim], t [m]."""
    layers = {
        i: {"key_states": pair[:, :, 0], "value_states": pair[:, :, 1]}
        for i, pair in enumerate(prefix.tokens.unbind(dim=2))
    }
    return policy.model.denoise_step(prefix.mask, layers, x, t)


@torch.no_grad()
def sample(policy: SmolVLAPolicy, prefix: Prefix, noise: Tensor, num_steps: int) -> Tensor:
    """Returns Euler samples with steps at t = 1, 1 − 1/n, …, as SmolVLA does, from noise [m, chunk, max_action_dim]."""
    x = noise
    for step in range(num_steps):
        t = torch.full((len(x),), 1 - step / num_steps, device=x.device)
        x = x - velocity(policy, prefix, x, t) / num_steps
    return x


def matching_error(
    policy: SmolVLAPolicy, prefix: Prefix, noise: Tensor, actions: Tensor, t: Tensor, mask: Tensor
) -> Tensor:
    """Returns the squared flow-matching errors of given pairs (paper Eq. 1, in SmolVLA's convention).

    Args:
        policy: SmolVLA.
        prefix: of m observations, with their states.
        noise: z, [m, chunk, max_action_dim].
        actions: a, [m, chunk, A].
        t: [m].
        mask: [m, chunk], 0 on padded steps.

    Returns:
        mask · (v(x_t, t) − (z − a))² on the A components of the action, [m, chunk, A].
    """
    size = actions.shape[-1]
    padded = torch.nn.functional.pad(actions, (0, noise.shape[-1] - size))
    x = t[:, None, None] * noise + (1 - t[:, None, None]) * padded
    error = velocity(policy, prefix, x, t)[..., :size] - (noise[..., :size] - actions)
    return mask[..., None] * error.square()


def sample_times(count: int, random: torch.Generator) -> Tensor:
    """Draws t ~ 0.001 + 0.999 Beta(1.5, 1), as in SmolVLA's training; the Beta is u^(1/1.5) of a uniform u."""
    return 0.001 + 0.999 * torch.rand(count, generator=random) ** (1 / 1.5)
