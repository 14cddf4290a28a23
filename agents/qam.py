"""Q-learning with adjoint matching (QAM, arXiv 2601.14234): a flow fine-tuned towards π_β(a|s) exp(τ Q(s, a)).

v_slow is a BC flow and v̄_slow its Polyak copy. v_fast, with its own initialisation, is the policy, and its Polyak copy
v̄_fast acts (v_fast itself where flow_tau is 1). With T = flow_steps, h = 1/T, t_i = i h and
σ_i = √(2 (1 − t_i + h) / (t_i + h)), one update on a batch of m windows is a step on the sum of

    critic      ‖Q_k(s, a) − y‖²,  a' = Euler_v̄_fast(s', z')
    slow        flow matching on (s, a)
    fast        mean over the batch of Σ_i ‖(v_fast(s, x_i, t_i) − v̄_slow(s, x_i, t_i)) 2/σ_i + σ_i g_i‖²

    path        x_{i+1} = x_i + h (2 v_fast(s, x_i, t_i) − x_i / (t_i + h)) + √h σ_i ξ_i,  x_0, ξ_i ~ N(0, I);
                last step by v̄_slow alone: x_T = x_{T−1} + h v̄_slow(s, x_{T−1}, t_{T−1})
    adjoint     g_T = −τ ∇_x mean_k Q̄_k(s, clip x_T),
                g_i = g_{i+1} + h J_iᵀ g_{i+1},  J_i = ∂/∂x [2 v̄_slow(s, x, t_i + h) − x / (t_i + h)] at x_i

with path and adjoint held fixed, and the global norm of the gradient clipped at 1. At τ = 0 the third loss vanishes for
v_fast = v̄_slow. At most one of two variants, which act and bootstrap with another policy, is on:

    QAM-F (fql_alpha = α > 0)   μ(s, z) acts:  α · mean (μ(s, z) − clip Euler_v̄_fast(s, z))² − Q(s, clip μ(s, z))
    QAM-E (edit_scale > 0)      an edit policy, as in FEdit (agents/fedit.py), on samples of v̄_fast

This follows the public code, which departs from the paper. The paper

- clips each component of the gradient at 1, not its global norm;
- starts the adjoint at the online critic, without clipping x_T;
- has no + h in σ and in the drift;
- takes J_i, as in adjoint matching (arXiv 2409.08861), at the state after step i; the code takes the state before it
  and the time after it.

Unlike the code, this file acts with v̄_fast at τ = 0 too (the code acts with v_slow), and gives invalid windows zero
weight in all losses (the code does so in the first two only).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from agents import base, fedit, fql, presets
from utils.arrays import Observations, Scalar
from utils.errors import UserError
from utils.flow import unrolled
from utils.networks import OneStepPolicy, TanhGaussian, Temperature, VectorField


class Agent(fedit.EditMixin, fql.OneStepMixin):
    """QAM, QAM-F and QAM-E. The network 'flow' is v_fast."""

    TARGETS = base.Agent.TARGETS | {"slow": "tau"}
    OPTIMISER = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())
    FLOWS = ("flow", "slow")

    @classmethod
    def create(
        cls, key: PRNGKeyArray | int, example_batch: base.Batch, config: ml_collections.ConfigDict
    ) -> base.Agent:
        """Initialises an agent; see the base class. The variant becomes a static setting, as it changes the program."""
        config = ml_collections.ConfigDict(config)
        config.one_step, config.edits = config.fql_alpha > 0, config.edit_scale > 0
        if config.one_step and config.edits:
            raise UserError("fql_alpha and edit_scale exclude each other; set one of them to 0")
        return super().create(key, example_batch, config)

    @classmethod
    def networks(cls, config: Any, action_dim: int) -> dict[str, Any]:
        """Returns name → module of every network."""
        dims = tuple(config.actor_hidden_dims)
        networks = super().networks(config, action_dim) | {"slow": VectorField(dims, action_dim)}
        if config.one_step:
            networks["one_step"] = OneStepPolicy(dims, action_dim)
        if config.edits:
            networks["edit_actor"] = TanhGaussian(dims, action_dim, conditioned=True)
            networks["temperature"] = Temperature()
        return networks

    @property
    def distilled(self) -> tuple[str, ...]:
        """Returns the name of QAM-F's one-step policy."""
        return ("one_step",) if self.config.one_step else ()

    @property
    def nfe(self) -> int:
        """Returns the number of network evaluations for one candidate action."""
        return 1 if self.config.one_step else self.config.flow_steps + self.config.edits

    def propose(self, observations: Observations, key: PRNGKeyArray) -> Float[Array, "*b d"]:
        """Returns clip μ(s, z), or a sample of v̄_fast, edited or not, in [−1, 1]."""
        sample_key, edit_key = jax.random.split(key)
        if self.config.one_step:
            return self.one_step_actions(observations, sample_key)
        actions = super().propose(observations, sample_key)
        return self.edit(observations, actions, edit_key)[0] if self.config.edits else actions

    def loss(self, params: dict[str, Any], batch: base.Batch, key: PRNGKeyArray) -> tuple[Scalar, base.Info]:
        """Returns the TD loss, flow matching of v_slow, adjoint matching of v_fast and the variant's loss."""
        critic_key, slow_key, path_key, sample_key, edit_key = jax.random.split(key, 5)
        loss, _, info = self.critic_loss(params, batch, critic_key)
        parts = [self.bc_loss(params, batch, slow_key, "slow"), self.adjoint_loss(params, batch, path_key)]
        if self.config.one_step:
            parts.append(self.one_step_loss(params, batch, sample_key, self.hyper["fql_alpha"]))
        if self.config.edits:
            actions = super().propose(batch["observations"], sample_key)
            parts.append(self.edit_loss(params, batch, actions, edit_key))
        return loss + sum(part for part, _ in parts), info | {k: v for _, own in parts for k, v in own.items()}

    def adjoint_loss(self, params: dict[str, Any], batch: base.Batch, key: PRNGKeyArray) -> tuple[Scalar, base.Info]:
        """Returns the mean of valid · Σ_i ‖(v_fast − v̄_slow) 2/σ_i + σ_i g_i‖², and scalars to log."""
        observations, (times, sigmas) = batch["observations"], schedule(self.config.flow_steps)
        path = self.rollout(observations, key)
        fast = self.velocity("flow", params["flow"], observations, path, times)
        slow = self.velocity("slow", self.targets["slow"], observations, path, times)
        adjoints = self.adjoints(observations, path, path[-1] + slow[-1] / self.config.flow_steps)
        errors = (fast - slow) * 2 / sigmas + sigmas * adjoints
        loss = jnp.mean(batch["valid"] * jnp.sum(jnp.square(errors), axis=(0, 2)))
        return loss, {"flow/loss": loss, "flow/adjoint": jnp.abs(adjoints).mean()}

    def rollout(self, observations: Observations, key: PRNGKeyArray) -> Float[Array, "T m d"]:
        """Returns x_0 … x_{T−1} of the memoryless SDE of v_fast, without gradient."""
        h, (times, sigmas) = 1 / self.config.flow_steps, schedule(self.config.flow_steps)
        observations = self.encode("flow", observations)
        noise = jax.random.normal(key, (self.config.flow_steps, len(observations), self.config.action_dim))

        def step(x: Float[Array, "m d"], inputs: Any) -> tuple[Float[Array, "m d"], Float[Array, "m d"]]:
            t, sigma, xi = inputs
            drift = 2 * self.velocity("flow", self.params["flow"], observations, x, t) - x / (t + h)
            x = x + h * drift + jnp.sqrt(h) * sigma * xi
            return x, x

        _, path = jax.lax.scan(step, noise[0], (times[:-1], sigmas[:-1], noise[1:]), unroll=unrolled())
        return jnp.concatenate([noise[:1], path])

    def adjoints(
        self, observations: Observations, path: Float[Array, "T m d"], last: Float[Array, "m d"]
    ) -> Float[Array, "T m d"]:
        """Returns g_0 … g_{T−1} along the path x_0 … x_{T−1}, with `last` = x_T."""
        h, (times, _) = 1 / self.config.flow_steps, schedule(self.config.flow_steps)
        states = self.encode("slow", observations, self.targets["slow"])

        def value(x: Float[Array, "m d"]) -> Scalar:
            qs = self.apply("critic", observations, jnp.clip(x, -1.0, 1.0), params=self.targets["critic"])
            return qs.mean(axis=0).sum()

        def drift(x: Float[Array, "m d"], t: Float[Array, "1 1"]) -> Float[Array, "m d"]:
            return 2 * self.velocity("slow", self.targets["slow"], states, x, t + h) - x / (t + h)

        def transposed(x: Float[Array, "m d"], t: Float[Array, "1 1"]) -> Any:
            """Returns v ↦ J_iᵀ v."""
            return jax.vjp(functools.partial(drift, t=t), x)[1]

        def step(adjoint: Float[Array, "m d"], point: Any) -> tuple[Float[Array, "m d"], Float[Array, "m d"]]:
            adjoint = adjoint + h * (point if at_once else transposed(*point))(adjoint)[0]
            return adjoint, adjoint

        # Forward passes at all points of the path together are fewer kernels on a GPU, but slower on a CPU.
        at_once = unrolled()
        points = jax.vmap(transposed)(path, times) if at_once else (path, times)
        final = -self.hyper["inv_temp"] * jax.grad(value)(last)
        return jax.lax.scan(step, final, points, reverse=True, unroll=at_once)[1]

    def velocity(
        self,
        name: str,
        params: Any,
        observations: Observations,
        x: Float[Array, "*T m d"],
        t: Float[Array, "*T 1 1"],
    ) -> Float[Array, "*T m d"]:
        """Evaluates the flow `name` at observations [m, o] and points x [m, d] at a time, or [T, m, d] at T times."""
        observations = self.encode(name, observations, params)
        observations, t = (jnp.broadcast_to(y, (*x.shape[:-1], y.shape[-1])) for y in (observations, t))
        return self.apply(name, observations, x, t, params=params)


def schedule(num_steps: int) -> tuple[Float[Array, "T 1 1"], Float[Array, "T 1 1"]]:
    """Returns t_i and σ_i for i = 0 … T − 1."""
    h = 1 / num_steps
    t = h * jnp.arange(num_steps)[:, None, None]
    return t, jnp.sqrt(2 * (1 - t + h) / (t + h))


# Setting → default, meaning.
SETTINGS = {
    "inv_temp": (1.0, "τ, inverse temperature of the tilt by Q"),
    "fql_alpha": (0.0, "α; above 0, QAM-F: weight of the distillation of a one-step policy, which acts"),
    "edit_scale": (0.0, "bound on an edit; above 0, QAM-E: an edit policy acts"),
    "target_entropy": (0.5, "of the edit policy: −target_entropy · d"),
}


def get_config() -> ml_collections.ConfigDict:
    """Returns the defaults of this agent."""
    return base.get_config(SETTINGS)


# Settings of plain QAM in its authors' experiments (arXiv 2601.14234).
PRESETS = presets.presets(
    {
        "puzzle-3x3": {"inv_temp": 3.0},
        "puzzle-4x4": {"inv_temp": 30.0},
        "scene": {"inv_temp": 1.0},
        "cube-double": {"inv_temp": 1.0},
        "cube-triple": {"inv_temp": 3.0},
        "cube-quadruple": {"inv_temp": 1.0},
        "antmaze-large": {"inv_temp": 10.0},
        "antmaze-giant": {"inv_temp": 3.0},
        "humanoidmaze-medium": {"inv_temp": 3.0},
        "humanoidmaze-large": {"inv_temp": 3.0},
    }
)
CPU = presets.CPU | {"inv_temp": 10.0}
