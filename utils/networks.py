"""Network building blocks: MLP, critic ensemble and flow vector field (paper §D.1, Table 3)."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp


class MLP(nn.Module):
    """Dense → GELU (→ LayerNorm) per hidden layer, then a linear output layer.

    Attributes:
        hidden_dims: widths of the hidden layers.
        output_dim: width of the output.
        layer_norm: normalise after each activation (critics do, actors do not).
    """

    hidden_dims: Sequence[int]
    output_dim: int
    layer_norm: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., in] to [..., output_dim]."""
        for width in self.hidden_dims:
            x = nn.gelu(nn.Dense(width, kernel_init=nn.initializers.xavier_uniform())(x))
            if self.layer_norm:
                x = nn.LayerNorm()(x)
        return nn.Dense(self.output_dim, kernel_init=nn.initializers.xavier_uniform())(x)


class CriticEnsemble(nn.Module):
    """K independently initialised critics Q_k(s, a) evaluated on shared inputs."""

    hidden_dims: Sequence[int]
    num_qs: int

    @nn.compact
    def __call__(self, observations: jax.Array, actions: jax.Array) -> jax.Array:
        """Maps observations [..., o] and actions [..., d] to values [K, ...]."""
        ensemble = nn.vmap(
            MLP, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=self.num_qs
        )
        inputs = jnp.concatenate([observations, actions], axis=-1)
        return ensemble(self.hidden_dims, 1, layer_norm=True)(inputs)[..., 0]


class VectorField(nn.Module):
    """Flow velocity v(s, x, t); time enters as a raw scalar."""

    hidden_dims: Sequence[int]
    action_dim: int

    @nn.compact
    def __call__(self, observations: jax.Array, x: jax.Array, t: jax.Array) -> jax.Array:
        """Maps observations [..., o], points x [..., d] and times t [..., 1] to velocities [..., d]."""
        return MLP(self.hidden_dims, self.action_dim)(jnp.concatenate([observations, x, t], axis=-1))
