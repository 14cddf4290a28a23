"""Q-learning with adjoint matching (QAM, arXiv 2601.14234): a flow fine-tuned towards π_β(a|s) exp(τ Q(s, a)).

v_slow is a BC flow, v̄_slow its Polyak copy, v_fast the policy, of its own initialisation, v̄_fast its Polyak copy, which
acts (v_fast itself where flow_tau is 1). With T = flow_steps, h = 1/T, t_i = i h and
σ_i = √(2 (1 − t_i + h) / (t_i + h)), one update on a batch of m windows is a step on the sum of

    critic      ‖Q_k(s, a) − y‖²,  a' = Euler_v̄_fast(s', z')
    slow        flow matching on (s, a)
    fast        mean over the batch of Σ_i ‖(v_fast(s, x_i, t_i) − v̄_slow(s, x_i, t_i)) 2/σ_i + σ_i g_i‖²

    path        x_{i+1} = x_i + h (2 v_fast(s, x_i, t_i) − x_i / (t_i + h)) + √h σ_i ξ_i,  x_0, ξ_i ~ N(0, I);
                the last step by the base alone, x_T = x_{T−1} + h v̄_slow(s, x_{T−1}, t_{T−1})
    adjoint     g_T = −τ ∇_x mean_k Q̄_k(s, clip x_T),
                g_i = g_{i+1} + h J_iᵀ g_{i+1},  J_i = ∂/∂x [2 v̄_slow(s, x, t_i + h) − x / (t_i + h)] at x_i

with path and adjoint held fixed, and the norm of the gradient of all parameters together clipped at 1. At τ = 0 the
third loss vanishes for v_fast = v̄_slow. Variants, of which one at most is on, act and bootstrap otherwise:

    QAM-F (fql_alpha = α > 0)   μ(s, z) acts:  α · mean (μ(s, z) − clip Euler_v̄_fast(s, z))² − Q(s, clip μ(s, z))
    QAM-E (edit_scale > 0)      an edit policy, as FEdit's (agents/fedit.py), on samples of v̄_fast

This is the public code. The paper clips each component of the gradient at 1, takes the online critic without the clip
at the boundary, has no + h in σ and in the drift, and, as adjoint matching (arXiv 2409.08861), J_i at the state after
step i; the code takes the state before step i and the time after it. The code acts with v_slow where τ = 0, and lets
invalid windows weigh in all but the first two losses; neither is done here.
"""

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from agents import base, fedit, fql, presets
from utils.arrays import Observations, Scalar
from utils.errors import UserError
from utils.networks import OneStepPolicy, TanhGaussian, Temperature, VectorField


class Agent(fedit.Editing, fql.OneStep):
    """QAM, QAM-F and QAM-E. The network 'flow' is v_fast."""

    TARGETS = base.Agent.TARGETS | {"slow": "tau"}
    OPTIMISER = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())
    FLOWS = ("flow", "slow")

    @classmethod
    def create(cls, key: PRNGKeyArray, example_batch: base.Batch, config: ml_collections.ConfigDict) -> base.Agent:
        """Initialises an agent; see the base. Which variant it is, is a part of the program, and no leaf."""
        config = ml_collections.ConfigDict(config)
        config.one_step, config.edits = config.fql_alpha > 0, config.edit_scale > 0
        if config.one_step and config.edits:
            raise UserError("fql_alpha and edit_scale exclude each other; set one of them to 0")
        return super().create(key, example_batch, config)

    @classmethod
    def networks(cls, config: Any, action_dim: int) -> dict[str, Any]:
        """Name → module of every network."""
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
        """QAM-F's one-step policy."""
        return ("one_step",) if self.config.one_step else ()

    @property
    def nfe(self) -> int:
        """Network evaluations that a candidate action costs at acting."""
        return 1 if self.config.one_step else self.config.flow_steps + self.config.edits

    def propose(self, observations: Observations, key: PRNGKeyArray) -> Float[Array, "*b d"]:
        """Returns clip μ(s, z), or a sample of v̄_fast, edited or not, in [−1, 1]."""
        sample_key, edit_key = jax.random.split(key)
        if self.config.one_step:
            noise = jax.random.normal(sample_key, (*observations.shape[:-1], self.config.action_dim))
            return jnp.clip(self.apply("one_step", observations, noise), -1.0, 1.0)
        actions = super().propose(observations, sample_key)
        return self.edit(observations, actions, edit_key)[0] if self.config.edits else actions

    def loss(self, params: dict[str, Any], batch: base.Batch, key: PRNGKeyArray) -> tuple[Scalar, base.Info]:
        """TD loss, flow matching of v_slow, adjoint matching of v_fast, and the loss of the variant."""
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
        """Returns the mean of valid · Σ_i ‖(v_fast − v̄_slow) 2/σ_i + σ_i g_i‖², and what to log."""
        observations, (times, sigmas) = batch["observations"], schedule(self.config.flow_steps)
        path = self.rollout(observations, key)
        fast = self.velocity("flow", params["flow"], observations, path, times)
        slow = self.velocity("slow", self.targets["slow"], observations, path, times)
        adjoints = self.adjoints(observations, path, path[-1] + slow[-1] / self.config.flow_steps)
        errors = (fast - slow) * 2 / sigmas + sigmas * adjoints
        loss = jnp.mean(batch["valid"] * jnp.sum(jnp.square(errors), axis=(0, 2)))
        return loss, {"flow/loss": loss, "flow/adjoint": jnp.abs(adjoints).mean()}

    def rollout(self, observations: Observations, key: PRNGKeyArray) -> Float[Array, "T m d"]:
        """x_0 … x_{T−1} of the memoryless SDE of v_fast, without gradient."""
        h, (times, sigmas) = 1 / self.config.flow_steps, schedule(self.config.flow_steps)
        observations = self.encode("flow", observations)
        noise = jax.random.normal(key, (self.config.flow_steps, len(observations), self.config.action_dim))

        def step(x: Float[Array, "m d"], inputs: Any) -> tuple[Float[Array, "m d"], Float[Array, "m d"]]:
            t, sigma, xi = inputs
            drift = 2 * self.velocity("flow", self.params["flow"], observations, x, t) - x / (t + h)
            x = x + h * drift + jnp.sqrt(h) * sigma * xi
            return x, x

        _, path = jax.lax.scan(step, noise[0], (times[:-1], sigmas[:-1], noise[1:]))
        return jnp.concatenate([noise[:1], path])

    def adjoints(
        self, observations: Observations, path: Float[Array, "T m d"], last: Float[Array, "m d"]
    ) -> Float[Array, "T m d"]:
        """g_0 … g_{T−1} along the path x_0 … x_{T−1} and the last x_T."""
        h, (times, _) = 1 / self.config.flow_steps, schedule(self.config.flow_steps)
        states = self.encode("slow", observations, self.targets["slow"])

        def value(x: Float[Array, "m d"]) -> Scalar:
            qs = self.apply("critic", observations, jnp.clip(x, -1.0, 1.0), params=self.targets["critic"])
            return qs.mean(axis=0).sum()

        def step(adjoint: Float[Array, "m d"], inputs: Any) -> tuple[Float[Array, "m d"], Float[Array, "m d"]]:
            x, t = inputs

            def drift(x: Float[Array, "m d"]) -> Float[Array, "m d"]:
                return 2 * self.velocity("slow", self.targets["slow"], states, x, t + h) - x / (t + h)

            adjoint = adjoint + h * jax.vjp(drift, x)[1](adjoint)[0]
            return adjoint, adjoint

        final = -self.hyper["inv_temp"] * jax.grad(value)(last)
        return jax.lax.scan(step, final, (path, times), reverse=True)[1]

    def velocity(
        self,
        name: str,
        params: Any,
        observations: Observations,
        x: Float[Array, "*T m d"],
        t: Float[Array, "*T 1 1"],
    ) -> Float[Array, "*T m d"]:
        """The flow `name` at observations [m, o] and points x at a time, or at points of T times."""
        observations = self.encode(name, observations, params)
        observations, t = (jnp.broadcast_to(y, (*x.shape[:-1], y.shape[-1])) for y in (observations, t))
        return self.apply(name, observations, x, t, params=params)


def schedule(num_steps: int) -> tuple[Float[Array, "T 1 1"], Float[Array, "T 1 1"]]:
    """t_i and σ_i for i = 0 … T − 1."""
    h = 1 / num_steps
    t = h * jnp.arange(num_steps)[:, None, None]
    return t, jnp.sqrt(2 * (1 - t + h) / (t + h))


def get_config() -> ml_collections.ConfigDict:
    """Defaults of this agent."""
    config = base.get_config()
    config.update(
        {
            "inv_temp": 1.0,  # τ, of the tilt by Q
            "fql_alpha": 0.0,  # α; above 0, QAM-F: a one-step policy acts
            "edit_scale": 0.0,  # above 0, QAM-E: bound on the edits of an edit policy
            "target_entropy": 0.5,  # of the edit policy: −target_entropy · d
        }
    )
    return config


# Its authors' settings, of plain QAM.
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
