"""Networks for acting, and sampling and ranking of candidates: agents/ in torch, forward only.

Parameters have the layout of the JAX code (kernels [in, out], ensembles stacked on a leading axis), so that the export
copies them unchanged.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lerobot_policy_otql.configuration_otql import OtqlConfig
from lerobot_policy_otql.encoders import Encoder, Observation

SOURCE_FLOOR = 0.05  # Deviation, and ...
SOURCE_BIAS = math.log(math.expm1(1.0 - SOURCE_FLOOR))  # ... softplus(SOURCE_BIAS), as in utils/networks.py.
SMALLEST_STEP = 0.125  # As in utils/flow.py.
Velocity = Callable[[Tensor], Tensor]
Guide = Callable[[Velocity, Tensor, float], Tensor]


class MLP(nn.Module):
    """Ensemble of K perceptrons on shared inputs; hidden layers are Dense → activation (→ LayerNorm).

    Args:
        widths: of the input, the hidden layers and the output.
        members: K.
        layer_norm: whether hidden layers end in a LayerNorm.
        activation: 'gelu' or 'mish'.
    """

    def __init__(self, widths: Sequence[int], members: int = 1, layer_norm: bool = False, activation: str = "gelu"):
        super().__init__()
        self.layer_norm, self.activation = layer_norm, activation

        def parameters(*shapes: tuple[int, ...]) -> nn.ParameterList:
            return nn.ParameterList(nn.Parameter(torch.zeros(members, *shape)) for shape in shapes)

        self.kernels = parameters(*itertools.pairwise(widths))
        self.biases = parameters(*((1, width) for width in widths[1:]))
        if layer_norm:
            self.scales = parameters(*((1, width) for width in widths[1:-1]))
            self.shifts = parameters(*((1, width) for width in widths[1:-1]))

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., in] to [K, ..., out]."""
        members = self.kernels[0].shape[0]
        h = x.reshape(1, -1, x.shape[-1]).expand(members, -1, -1)
        for i, (kernel, bias) in enumerate(zip(self.kernels, self.biases, strict=True)):
            if i:
                # As in flax: GELU approximated by tanh, LayerNorm with epsilon 1e-6.
                h = F.gelu(h, approximate="tanh") if self.activation == "gelu" else F.mish(h)
                if self.layer_norm:
                    h = F.layer_norm(h, h.shape[-1:], eps=1e-6) * self.scales[i - 1] + self.shifts[i - 1]
            h = torch.baddbmm(bias, h, kernel)
        return h.reshape(members, *x.shape[:-1], h.shape[-1])


class Denoiser(nn.Module):
    """Noise prediction ε(s, x, t) of a diffusion policy on learned Fourier features of t."""

    def __init__(self, input_dim: int, action_dim: int, config: OtqlConfig):
        super().__init__()
        hidden = config.actor_hidden_dims
        self.frequencies = nn.Parameter(torch.zeros(config.time_dim // 2))
        self.time = MLP((config.time_dim, *hidden), activation="mish")
        self.body = MLP((input_dim + hidden[-1], *hidden, action_dim), activation="mish")
        # For the steps t = 1 … T: ᾱ_t and the factors of x̂₀, x_t and fresh noise in x_{t−1}.
        self.register_buffer("schedule", torch.zeros(config.flow_steps, 4))

    def forward(self, observations: Tensor, x: Tensor, t: float) -> Tensor:
        """Maps observations [..., o] and points x [..., d] at step t to noise [..., d]."""
        phase = 2 * torch.pi * t * self.frequencies
        time = self.time(torch.cat([phase.cos(), phase.sin()]))[0]
        return self.body(torch.cat([observations, x, time.expand(*x.shape[:-1], -1)], dim=-1))[0]


class Sampler(nn.Module):
    """Sampler of candidates, ranked by the critics."""

    def __init__(self, config: OtqlConfig):
        super().__init__()
        self.config = config
        cameras = config.image_features
        states = sum(feature.shape[0] for key, feature in config.input_features.items() if key not in cameras)
        width = states + len(cameras) * config.encoder_features
        dim, hidden = config.chunk_size * config.action_dim, config.actor_hidden_dims
        self.action_dim = dim
        if config.sampler in ("flow", "one_step"):
            scalars = (config.sampler == "flow") + config.step_input
            self.actor = MLP((width + dim + scalars, *hidden, dim))
        else:
            self.actor = Denoiser(width + dim, dim, config)
        if config.source:
            self.source = MLP((width, *config.source_hidden_dims, 2 * dim))
        if config.latent_scale > 0:
            self.latent = MLP((width, *hidden, 2 * dim))
        if config.sphere_hidden_dims:
            self.latent = MLP((width, *config.sphere_hidden_dims, dim))
        if config.standardised:
            self.register_buffer("state_mean", torch.zeros(states))
            self.register_buffer("state_deviation", torch.ones(states))
        if config.edit_scale > 0:
            self.edit = MLP((width + dim, *hidden, 2 * dim))
        if config.num_qs:
            self.critic = MLP((width + dim, *config.value_hidden_dims, 1), config.num_qs, layer_norm=True)
        self.networks = [name for name, _ in self.named_children()]
        self.encoders = nn.ModuleDict({name: Encoder(config) for name in self.networks} if cameras else {})

    @property
    def draws(self) -> int:
        """Returns the number of normal vectors [d] per candidate: its start, the steps of a diffusion, an edit."""
        steps = self.config.flow_steps if self.config.sampler in ("estimate", "ddpm") else 0
        return 1 + steps + (self.config.edit_scale > 0)

    def forward(self, observation: Observation, noise: Tensor, guide: Guide | None = None) -> Tensor:
        """Returns the best candidates.

        Args:
            observation: state [B, o], and images.
            noise: standard normal, [N, B, draws, d].
            guide: replaces the flow's velocity; a function of v(·, t), x [N, B, d] and t.

        Returns:
            Chunks in [−1, 1], [B, d].
        """
        ranked = noise.shape[0] > 1
        seen = self.see(observation, critics=ranked or self.config.guidance_coef > 0)
        seen = {name: inputs.expand(noise.shape[0], *inputs.shape) for name, inputs in seen.items()}
        actions = self.propose(seen, noise, guide)
        if not ranked:
            return actions[0]
        qs = self.values(seen["critic"], actions)
        best = (qs.mean(dim=0) if self.config.rank == "mean" else qs.amin(dim=0)).argmax(dim=0)
        return actions.gather(0, best[None, :, None].expand(1, -1, actions.shape[-1]))[0]

    def see(self, observation: Observation, critics: bool = True) -> dict[str, Tensor]:
        """Encodes an observation for each network, for the critics only if `critics`.

        Returns:
            Name → the state joined with the image features of that network's encoder, [B, o + f].
        """
        state, images = observation
        seen = dict.fromkeys((name for name in self.networks if critics or name != "critic"), state)
        if self.config.standardised:
            seen["actor"] = (state - self.state_mean) / self.state_deviation
        if images is None:
            return seen
        return {name: torch.cat([own, self.encoders[name](images)], dim=-1) for name, own in seen.items()}

    def values(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Returns Q_k(s, a) [K, ...] of observations [..., o] and chunks [..., d]."""
        return self.critic(torch.cat([observations, actions], dim=-1))[..., 0]

    def propose(self, seen: dict[str, Tensor], noise: Tensor, guide: Guide | None) -> Tensor:
        """Returns chunks [..., d] in [−1, 1] for observations from `see` and noise [..., draws, d]."""
        config, x = self.config, self.config.noise_scale * noise[..., 0, :]
        if config.source:
            mean, raw = self.source(seen["source"])[0].chunk(2, dim=-1)
            x = mean + (SOURCE_FLOOR + F.softplus(raw + SOURCE_BIAS)) * x
        if config.latent_scale > 0:
            x = config.latent_scale * squash(self.latent(seen["latent"])[0], x)
        if config.sphere_hidden_dims:
            x = on_sphere(self.latent(seen["latent"])[0])
        if config.sampler == "flow":
            x = self.integrate(seen, x, guide)
        elif config.sampler == "one_step":
            x = self.actor(torch.cat([seen["actor"], x], dim=-1))[0]
        else:
            x = self.denoise(seen["actor"], x, noise[..., 1 : 1 + config.flow_steps, :])
        x = x.clamp(-1.0, 1.0)
        if config.edit_scale > 0:
            edits = squash(self.edit(torch.cat([seen["edit"], x], dim=-1))[0], noise[..., -1, :])
            x = (x + config.edit_scale * edits).clamp(-1.0, 1.0)
        return x

    def integrate(self, seen: dict[str, Tensor], x: Tensor, guide: Guide | None) -> Tensor:
        """Integrates the flow by Euler steps from x [..., d] at t = 0 to t = 1; not clipped."""
        size = max(1 / self.config.flow_steps, SMALLEST_STEP)
        for i in range(self.config.flow_steps):
            t = i / self.config.flow_steps

            def velocity(x: Tensor, t: float = t) -> Tensor:
                time = x.new_full((*x.shape[:-1], 1), t)
                scalars = [time, torch.full_like(time, size)] if self.config.step_input else [time]
                v = self.actor(torch.cat([seen["actor"], x, *scalars], dim=-1))[0]
                return v + self.config.guidance_coef * self.guidance(seen["critic"], x, t) if self.guided(t) else v

            x = x + (guide(velocity, x, t) if guide else velocity(x)) / self.config.flow_steps
        return x

    def guided(self, t: float) -> bool:
        """True if the critics guide the flow at time t."""
        return self.config.guidance_coef > 0 and t > 0

    def guidance(self, observations: Tensor, x: Tensor, t: float) -> Tensor:
        """Returns (x + (1 − t) τ ∇_x Q(s, x)) / t [..., d], Q the ensemble's mean (agents/cgql.py)."""
        slope = torch.func.grad(lambda y: self.values(observations, y).mean(dim=0).sum())(x)
        return (x + (1 - t) * self.config.inv_temp * slope) / t

    def denoise(self, observations: Tensor, x: Tensor, noise: Tensor) -> Tensor:
        """Runs the reverse process (agents/qsm.py) from x [..., d] with noise [..., T, d]; not clipped."""
        ddpm = self.config.sampler == "ddpm"
        for t in range(self.config.flow_steps, 0, -1):
            power, of_clean, of_x, of_noise = self.actor.schedule[t - 1]
            clean = (x - (1 - power).sqrt() * self.actor(observations, x, float(t))) / power.sqrt()
            clean = clean.clamp(-1.0, 1.0) if ddpm else clean
            x = of_clean * clean + of_x * x + of_noise * noise[..., t - 1, :]
            x = x if ddpm else x.clamp(-1.0, 1.0)
        return x


def on_sphere(x: Tensor) -> Tensor:
    """Returns x [..., d] scaled to the sphere of radius √d, as agents/lps.py does."""
    return x * math.sqrt(x.shape[-1]) / (x.square().sum(dim=-1, keepdim=True) + 1e-12).sqrt()


def squash(parameters: Tensor, noise: Tensor) -> Tensor:
    """Returns samples [..., d] of a tanh-Gaussian with (mean, log deviation) [..., 2 d], given noise [..., d]."""
    mean, log_std = parameters.chunk(2, dim=-1)
    return torch.tanh(mean + log_std.clamp(-20.0, 2.0).exp() * noise)
