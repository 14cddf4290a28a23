"""Networks: MLP, critic ensemble and flow vector field (paper §D.1, Table 3), and those of the baselines."""

import math
from collections.abc import Sequence
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from utils.arrays import Scalar

SOURCE_FLOOR = 0.05  # Deviation; a component that never varies would otherwise send the likelihood to infinity.
SOURCE_BIAS = math.log(math.expm1(1.0 - SOURCE_FLOOR))  # softplus(SOURCE_BIAS) = 1 − SOURCE_FLOOR.
TIME_FREQUENCIES = 128  # Of the time in TokenTransformer, each with a cosine and a sine.


class MLP(nn.Module):
    """Dense → GELU (→ LayerNorm) per hidden layer, then a linear output layer.

    Attributes:
        hidden_dims: widths of the hidden layers.
        output_dim: width of the output.
        layer_norm: True to normalise after each activation, as critics do and actors do not.
        output_init: initialiser of the output layer's kernel.
    """

    hidden_dims: Sequence[int]
    output_dim: int
    layer_norm: bool = False
    output_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()

    @nn.compact
    def __call__(self, x: Float[Array, "*b in"]) -> Float[Array, "*b {self.output_dim}"]:
        """Evaluates the network."""
        for width in self.hidden_dims:
            x = nn.gelu(nn.Dense(width, kernel_init=nn.initializers.xavier_uniform())(x))
            if self.layer_norm:
                x = nn.LayerNorm()(x)
        return nn.Dense(self.output_dim, kernel_init=self.output_init)(x)


class CriticEnsemble(nn.Module):
    """K independently initialised critics Q_k(s, a) on shared inputs."""

    hidden_dims: Sequence[int]
    num_qs: int

    @nn.compact
    def __call__(self, observations: Float[Array, "*b o"], actions: Float[Array, "*b d"]) -> Float[Array, " K *b"]:
        """Maps observations and actions to values."""
        ensemble = nn.vmap(
            MLP, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=self.num_qs
        )
        inputs = jnp.concatenate([observations, actions], axis=-1)
        # One batch axis: with several, XLA is up to a third slower on a CPU.
        flat = inputs.reshape(-1, inputs.shape[-1])
        return ensemble(self.hidden_dims, 1, layer_norm=True)(flat).reshape(self.num_qs, *inputs.shape[:-1])


class VectorField(nn.Module):
    """Flow velocity v(s, x, t), or v(s, x, t, h) of a step h if `step_input`; t and h enter as raw scalars."""

    hidden_dims: Sequence[int]
    action_dim: int
    step_input: bool = False
    output_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()

    @nn.compact
    def __call__(
        self,
        observations: Float[Array, "*b o"],
        x: Float[Array, "*b d"],
        t: Float[Array, "*b 1"],
        h: Float[Array, "*b 1"] | None = None,
    ) -> Float[Array, "*b d"]:
        """Maps observations, points x, times t and, if `step_input`, sizes h of the step to velocities."""
        inputs = [observations, x, t]
        if self.step_input:
            assert h is not None
            inputs.append(h)
        return MLP(self.hidden_dims, self.action_dim, output_init=self.output_init)(jnp.concatenate(inputs, axis=-1))


class GaussianSource(nn.Module):
    """Source of a flow at a state, N(m(s), diag σ(s)²); N(0, I) when it is initialised."""

    hidden_dims: Sequence[int]
    action_dim: int

    @nn.compact
    def __call__(self, observations: Float[Array, "*b o"]) -> tuple[Float[Array, "*b d"], Float[Array, "*b d"]]:
        """Maps observations to mean and deviation; the deviation stays above SOURCE_FLOOR."""
        outputs = MLP(self.hidden_dims, 2 * self.action_dim, output_init=nn.initializers.zeros)(observations)
        mean, raw = jnp.split(outputs, 2, axis=-1)
        return mean, SOURCE_FLOOR + jax.nn.softplus(raw + SOURCE_BIAS)


class StateValue(nn.Module):
    """State value V(s), with layer norm like the critics."""

    hidden_dims: Sequence[int]

    @nn.compact
    def __call__(self, observations: Float[Array, "*b o"]) -> Float[Array, "*b"]:
        """Maps observations to values."""
        return MLP(self.hidden_dims, 1, layer_norm=True)(observations)[..., 0]


class OneStepPolicy(nn.Module):
    """Policy μ(s, z) that maps noise to an action in one pass."""

    hidden_dims: Sequence[int]
    action_dim: int

    @nn.compact
    def __call__(self, observations: Float[Array, "*b o"], x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        """Maps observations and noise x to actions, not clipped."""
        return MLP(self.hidden_dims, self.action_dim)(jnp.concatenate([observations, x], axis=-1))


class LatentActor(nn.Module):
    """Deterministic latent ζ(s) on the sphere of radius √d."""

    hidden_dims: Sequence[int]
    action_dim: int

    @nn.compact
    def __call__(self, observations: Float[Array, "*b o"]) -> Float[Array, "*b d"]:
        """Maps observations to latents."""
        outputs = MLP(self.hidden_dims, self.action_dim)(observations)
        norm = jnp.sqrt(jnp.sum(jnp.square(outputs), axis=-1, keepdims=True) + 1e-12)  # Its slope at 0 is finite.
        return outputs * jnp.sqrt(self.action_dim) / norm


class TanhGaussian(nn.Module):
    """Gaussian squashed by tanh, π(u | s) or, if `conditioned`, π(u | s, x)."""

    hidden_dims: Sequence[int]
    action_dim: int
    conditioned: bool = False

    @nn.compact
    def __call__(
        self, observations: Float[Array, "*b o"], x: Float[Array, "*b d"] | None = None
    ) -> tuple[Float[Array, "*b d"], Float[Array, "*b d"]]:
        """Maps observations, and points x if `conditioned`, to mean and log deviation before the tanh."""
        inputs = observations
        if self.conditioned:
            assert x is not None
            inputs = jnp.concatenate([observations, x], axis=-1)
        mean, log_std = jnp.split(MLP(self.hidden_dims, 2 * self.action_dim)(inputs), 2, axis=-1)
        return mean, jnp.clip(log_std, -20.0, 2.0)


def output_of(network: nn.Module, variables: Any, *inputs: Any) -> Array:
    """Returns `network.apply(variables, *inputs)` as an array; Flax's type includes a tuple with variables."""
    return cast(Array, network.apply(variables, *inputs))


def sample_tanh_gaussian(
    key: PRNGKeyArray, mean: Float[Array, "*b d"], log_std: Float[Array, "*b d"]
) -> tuple[Float[Array, "*b d"], Float[Array, "*b"]]:
    """Draws tanh(u), u ~ N(mean, exp(log_std)²), and its log-density."""
    noise = jax.random.normal(key, mean.shape)
    u = mean + jnp.exp(log_std) * noise
    log_prob = jax.scipy.stats.norm.logpdf(noise) - log_std
    # log(1 − tanh²u) in a form that does not underflow.
    log_prob -= 2 * (jnp.log(2.0) - u - jax.nn.softplus(-2 * u))
    return jnp.tanh(u), log_prob.sum(axis=-1)


class Temperature(nn.Module):
    """Positive scalar, exp of its parameter; initially 1."""

    @nn.compact
    def __call__(self) -> Scalar:
        """Returns the temperature."""
        return jnp.exp(self.param("log_value", nn.initializers.zeros, ()))


class Denoiser(nn.Module):
    """Noise prediction ε(s, x, t) of a diffusion policy, as in IDQL: Mish, and an MLP on learned Fourier features of t.

    Attributes:
        hidden_dims: widths of the hidden layers, and of the layers of the time's MLP, whose last one is linear.
        action_dim: d.
        time_dim: number of Fourier features, a cosine and a sine for each frequency.
    """

    hidden_dims: Sequence[int]
    action_dim: int
    time_dim: int = 64

    @nn.compact
    def __call__(
        self, observations: Float[Array, "*b o"], x: Float[Array, "*b d"], t: Float[Array, "*b 1"] | Float[Array, "1"]
    ) -> Float[Array, "*b d"]:
        """Maps observations, points x and times t, one per point or one for all, to noise."""

        def mlp(h: Float[Array, "*b in"], widths: Sequence[int]) -> Float[Array, "*b out"]:
            for i, width in enumerate(widths):
                h = nn.Dense(width, kernel_init=nn.initializers.xavier_uniform())(jax.nn.mish(h) if i else h)
            return h

        phase = 2 * jnp.pi * t * self.param("frequencies", nn.initializers.normal(0.2), (self.time_dim // 2,))
        time = mlp(jnp.concatenate([jnp.cos(phase), jnp.sin(phase)], axis=-1), self.hidden_dims)
        time = jnp.broadcast_to(time, (*x.shape[:-1], time.shape[-1]))
        return mlp(jnp.concatenate([observations, x, time], axis=-1), (*self.hidden_dims, self.action_dim))


class TokenTransformer(nn.Module):
    """Transformer g(s, x, t) on the single token [s, x], in blocks that the time modulates (MeanFlowQL's actor).

    With c an embedding of t and n the normalisation to a root mean square of √width, with a gain, a block is

        y ← h + γ₁(c) W_o W_v m₁(n(h), c)
        y ← y + γ₂(c) W₂ gelu(W₁ m₂(n(y), c)),   m_i(u, c) = u (1 + β_i(c)) + δ_i(c)
        h ← h + 0.1 (y − h)

    and the output is W m(n(h), c). Attention over one token has weight 1, so that queries and keys have no effect and
    are left out. All functions of c and the output layer start at zero, and so does the output.

    Attributes:
        width: of the token and of c; even. blocks: their number. action_dim: d.
    """

    width: int
    blocks: int
    action_dim: int

    @nn.compact
    def __call__(
        self, observations: Float[Array, "*b o"], x: Float[Array, "*b d"], t: Float[Array, "*b 1"]
    ) -> Float[Array, "*b d"]:
        """Maps observations, points x and times t to points."""
        width, small = self.width, nn.initializers.variance_scaling(0.01, "fan_in", "truncated_normal")

        def dense(size: int, h: Float[Array, "*b in"]) -> Float[Array, "*b out"]:
            return nn.Dense(size, kernel_init=small)(h)

        def modulated(h: Float[Array, "*b w"], scale: Array, shift: Array) -> Float[Array, "*b w"]:
            return math.sqrt(width) * nn.RMSNorm()(h) * (1 + scale) + shift

        phase = t * jnp.exp(-math.log(1e4) * jnp.arange(TIME_FREQUENCIES) / TIME_FREQUENCIES)
        features = jnp.concatenate([jnp.cos(phase), jnp.sin(phase)], axis=-1)
        time = nn.silu(dense(width, nn.silu(dense(width, features))))
        position = self.param("position", nn.initializers.normal(0.005), (width,))
        h = dense(width, jnp.concatenate([observations, x], axis=-1)) + position
        for _ in range(self.blocks):
            parts = nn.Dense(6 * width, kernel_init=nn.initializers.zeros)(time)
            shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(parts, 6, axis=-1)
            y = h + gate1 * dense(width, dense(width, modulated(h, scale1, shift1)))
            y = y + gate2 * dense(width, nn.gelu(dense(4 * width, modulated(y, scale2, shift2))))
            h = h + 0.1 * (y - h)
        shift, scale = jnp.split(nn.Dense(2 * width, kernel_init=nn.initializers.zeros)(time), 2, axis=-1)
        return nn.Dense(self.action_dim, kernel_init=nn.initializers.zeros)(modulated(h, scale, shift))
