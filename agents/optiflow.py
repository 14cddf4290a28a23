"""OptiFlow (arXiv 2609.15883): a one-step policy moved, by optimal transport at each state, to the better flow samples.

One update, on a batch {(s, a, R, s')} of m windows, with a flow v_θ, its Polyak copy v̄ (v_θ itself where flow_tau is
1), a one-step policy μ_ω(s, z), Q the mean of the critics, and N and M samples at each state:

    critic      as in GFP (agents/gfp.py)
    guidance    g ← σ((Q(s, a) − Q(s, clip μ_ω(s, z))) / (η mean |Q(s, a)|));  η = 0: g = 1
    flow        step on g · ‖v_θ(s, t a + (1−t) x, t) − (a − x)‖²,  x ~ N(0, I)
    samples     x_i ← μ_ω(s, z_i), i ≤ N;   y_j ← clip Euler(v̄, s, z_j), j ≤ M
    plan        Γ ← entropic OT from (x_i; 1/N) to (y_j; q),  q = softmax_j (Q(s, y_j) / τ_w),  without gradient
    one step    j*(i) ← argmax_j Γ_ij;  step on mean over states of Σ_i Γ_{i,j*(i)} ‖x_i − y_{j*(i)}‖²

No gradient of Q reaches the policy. Only μ_ω acts, at one network evaluation. No public code was at hand; where the
paper leaves a choice, this file does the following:

- ε is relative to the mean cost at each state, as in the paper's Eq. 11; its appendix takes the mean over the batch.
- Sinkhorn runs a fixed number of iterations, 30.
- The TD target has the pessimism of all agents here in place of the minimum of two critics on some tasks.
- Means leave out invalid windows.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jaxtyping import Array, Float, PRNGKeyArray

from agents import base, gfp, presets
from agents.losses import inverse_scale
from utils.arrays import Scalar
from utils.coupling import solve_plan


class Agent(gfp.Agent):
    """OptiFlow: networks, sampler and TD target of GFP."""

    def loss(self, params: dict[str, Any], batch: base.Batch, key: PRNGKeyArray) -> tuple[Scalar, base.Info]:
        """Returns the TD loss, guided flow matching and the distance of policy to anchors, and scalars to log."""
        critic_key, flow_key, policy_key, sample_key = jax.random.split(key, 4)
        critic_loss, qs, info = self.critic_loss(params, batch, critic_key)
        policy = self.policy_samples(params, batch, policy_key)
        q = qs.mean(axis=0)
        reference = self.apply("critic", batch["observations"], jnp.clip(policy[0], -1.0, 1.0)).mean(axis=0)
        guidance = self.guidance(inverse_scale(q, batch["valid"]) * (q - reference))
        flow_loss, flow_info = self.bc_loss(params, batch, flow_key, row_weights=guidance)
        one_step_loss, plan_info = self.transport_loss(batch, policy, sample_key)
        info |= flow_info | plan_info | {"guidance/mean": guidance.mean(), "guidance/std": guidance.std()}
        return critic_loss + flow_loss + one_step_loss, info

    def policy_samples(self, params: dict[str, Any], batch: base.Batch, key: PRNGKeyArray) -> Float[Array, "N m d"]:
        """Returns N actions of the one-step policy at each state, not clipped."""
        observations, noise = self.repeated(batch, key, self.config.policy_samples)
        return self.apply("one_step", observations, noise, params=params["one_step"])

    def repeated(self, batch: base.Batch, key: PRNGKeyArray, count: int) -> tuple[Any, Float[Array, "k m d"]]:
        """Returns the observations `count` times, images not repeated, and as much noise."""
        noise = jax.random.normal(key, (count, *batch["actions"].shape))
        return self.broadcast(batch["observations"], count), noise

    def transport_loss(
        self, batch: base.Batch, policy: Float[Array, "N m d"], key: PRNGKeyArray
    ) -> tuple[Scalar, base.Info]:
        """Returns the mean over states of Σ_i Γ_{i,j*} ‖x_i − y_{j*}‖², and scalars to log."""
        cfg = self.cfg
        observations, noise = self.repeated(batch, key, cfg.flow_samples)
        anchors = jax.lax.stop_gradient(self.flow_actions(observations, noise))
        values = self.apply("critic", observations, anchors).mean(axis=0)
        probs = jax.nn.softmax(values / cfg.tau_w, axis=0)
        solve = partial(solve_plan, alpha=0.0, epsilon=cfg.epsilon, max_iterations=cfg.max_iterations, threshold=0.0)

        def plan_at(x: Float[Array, "N d"], y: Float[Array, "M d"], q: Float[Array, " M"]) -> Float[Array, "N M"]:
            return solve(x, jnp.zeros((len(x), 1)), y, jnp.zeros((len(y), 1)), q)[0]

        x, y = policy.swapaxes(0, 1), anchors.swapaxes(0, 1)
        plan = jax.lax.stop_gradient(jax.vmap(plan_at)(jax.lax.stop_gradient(x), y, probs.T))
        chosen = plan.argmax(axis=2)
        mass = jnp.take_along_axis(plan, chosen[..., None], axis=2)[..., 0]
        distances = jnp.sum(jnp.square(x - jnp.take_along_axis(y, chosen[..., None], axis=1)), axis=2)
        loss = jnp.mean(batch["valid"] * jnp.sum(mass * distances, axis=1))
        effective = 1 / (cfg.flow_samples * jnp.sum(jnp.square(probs), axis=0))
        return loss, {"one_step/loss": loss, "plan/effective_sample_size": effective.mean()}


# Setting → default, meaning.
SETTINGS = {
    "policy_samples": (16, "N, actions of the policy at each state"),
    "flow_samples": (64, "M, samples of the flow at each state"),
    "tau_w": (1.0, "τ_w, temperature of the flow samples' weights, on the scale of Q"),
    "eta": (1e-3, "η, temperature of the guidance, on the scale of the normalised Q; 0: none"),
    "epsilon": (0.05, "ε, entropic regularisation relative to the mean cost at a state"),
    "max_iterations": (30, "Sinkhorn iterations"),
    "target_actions": ("policy", "of the TD target: 'policy', or 'both', the mean with the flow's"),
}


def get_config() -> ml_collections.ConfigDict:
    """Returns the defaults of this agent."""
    return base.get_config(SETTINGS)


def tuned(tau_w: float, eta: float, target_actions: str = "policy") -> dict[str, Any]:
    """Returns the settings of one domain."""
    return {"tau_w": tau_w, "eta": eta, "target_actions": target_actions}


# The paper's, found with single actions and OGBench's dense rewards; discounts and chunks are those of all agents here.
PRESETS = presets.presets(
    {
        "antmaze-large": tuned(2.0, 1e-2),
        "antmaze-giant": tuned(1.0, 1e-3),
        "humanoidmaze-medium": tuned(1.0, 1e-3, "both"),
        "humanoidmaze-large": tuned(2.0, 0.1),
        "cube-double": tuned(2.0, 1e-2, "both"),
        "cube-triple": tuned(1.0, 1e-5, "both"),
        "scene": tuned(1.0, 1e-2),
        "puzzle-3x3": tuned(1.0, 1e-3),
        "puzzle-4x4": tuned(2.0, 1e-2),
    }
)
# A twentieth of the flow evaluations.
CPU = presets.CPU | {"policy_samples": 8, "flow_samples": 8, "flow_steps": 4}
