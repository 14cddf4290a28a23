"""Optimal Transport Q-Learning (OTQL): a flow trained on pairs from an advantage-weighted optimal-transport coupling.

One update, on a batch {(s_j, a_j, R_j, s'_j)} of m windows (paper Algorithm 1), with v̄ the Polyak copy of v_θ (v_θ
itself where flow_tau is 1, as in the paper):

    critic      a'_j ← best of N Euler samples of v̄ at s'_j;  TD step on Q_φ
    advantage   A_j ← Q_φ(s_j, a_j) − V̂(s_j),  V̂(s_j) = mean of Q_φ(s_j, â) over Euler samples â of v̄ at s_j
    marginal    p_j ∝ min(exp(λ A_j), w_max) · valid_j
    coupling    z_i ~ N(0, I), c̄_i ~ Categorical(p) over the s_j;  Γ* ← entropic OT from (z, αc̄; 1/m) to (a, αs; p)
    flow        (z_i, a_j, s_j) ~ Γ*;  step on ‖v_θ(s_j, t a_j + (1−t) z_i, t) − (a_j − z_i)‖²

Beyond the paper, off by default: the policy can start from a normal N(m(s), diag σ(s)²), a small network's, instead of
N(0, I). A step on −log N(·; m(s_j), σ(s_j)²) of the drawn pairs fits it, and m̄, σ̄ is its Polyak copy:

    source=noise    fits z_i. The plan pairs a state with some noise more than with other noise, so that training sees
                    another start there than N(0, I); acting from the fitted start undoes this.
    source=action   fits a_j. Pairs are drawn for z_i and (a_j − m̄(s_j)) / σ̄(s_j), and the flow starts at
                    m̄(s_j) + σ̄(s_j) z_i. LeaP (arXiv 2606.17408) and CSFM (2602.05951) learn starts, without a tilt.

TD target: Eq. 10; advantage: §3.2; marginal p: Eq. 5; plan Γ*: Eqs. 2 and 4 (utils/coupling.py); flow loss: Eq. 1.
Where the paper is inconsistent or silent:

- Algorithm 1 prints V̂ with s' and as a sum. §3.2 defines V̂(s) as the mean over π_θ(·|s), which is followed.
- Algorithm 1 omits the clamp w_max of §3.2, which is followed.
- Both losses are differentiated at the same parameters, as in the public Q-chunking code: Q_φ(s_j, a_j) is evaluated
  once.
- The paper gives no value of α, ε or the number k of samples in V̂. They are settings with measured defaults.
- s_j in the coupling is standardised by the statistics of the data. With cameras, leading principal components of the
  image features join it. The paper does not say what it takes there. Its first author's COT Policy (arXiv 2505.01179)
  takes, in its public code, the state and 100 components of the pixels, fitted to the whole dataset and not scaled,
  replaces them by cluster centres, and sets α from each batch. Here the components are those of the features of v̄, over
  the batch and scaled to unit variance: features hold what the task needs, whereas most pixels show the arm, and α
  weighs a component like an entry of the state.
"""

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jaxtyping import Array, Float, PRNGKeyArray

from agents import base, presets
from utils.arrays import Observations, Scalar
from utils.coupling import couple, principal_components, tilted_weights
from utils.observations import Observation, state_of

# In standard deviations. What hardly varies in the data can be hundreds of them away online, and a single such entry
# keeps Sinkhorn from converging within its cap.
CONDITION_BOUND = 5.0
PAIRED = ("observations", "actions", "valid", "action_mask")  # Parts of a batch that a pair takes.


class Agent(base.Agent):
    """OTQL."""

    def loss(self, params: dict[str, Any], batch: base.Batch, key: PRNGKeyArray) -> tuple[Scalar, base.Info]:
        """Returns the TD loss plus flow matching on pairs of the coupling (Algorithm 1), and scalars to log."""
        cfg = self.cfg
        critic_key, value_key, couple_key, time_key = jax.random.split(key, 4)
        next_value, value = self.values(batch, critic_key, value_key)
        critic_loss, qs, info = self.td_loss(params, batch, next_value)

        advantages = jax.lax.stop_gradient(qs.mean(axis=0)) - value
        weights = tilted_weights(advantages, batch["valid"], cfg.lam, cfg.w_max)
        # Where training starts; with `source` 'noise' acting starts elsewhere, where the plan's noise of a state is.
        fitted = cfg.source == "action"
        mean, deviation = self.source(batch["observations"]) if fitted else self.standard_source(batch["observations"])
        noise, index, diagnostics = couple(
            couple_key,
            (batch["actions"] - mean) / deviation,
            self.conditions(batch["observations"]),
            weights,
            cfg,
            action_mask=batch["action_mask"],
        )
        noise = mean[index] + deviation[index] * noise
        pairs = jax.tree.map(lambda x: x[index], {k: batch[k] for k in PAIRED})
        kept = pairs["valid"][:, None] * pairs["action_mask"]
        flow_loss = self.flow_loss(params, pairs["observations"], time_key, noise, pairs["actions"], kept)
        samples = pairs["actions"] if fitted else noise
        source_loss, source_info = self.source_loss(params, pairs["observations"], samples, kept)
        info |= {f"coupling/{k}": v for k, v in diagnostics.items()} | source_info
        info |= {"flow/loss": flow_loss, "advantage/mean": advantages.mean(), "advantage/std": advantages.std()}
        return critic_loss + flow_loss + source_loss, info

    def conditions(self, observations: Observations) -> Float[Array, "*b c"]:
        """Returns the conditions of the coupling's cost, without gradient: observations standardised and bounded.

        Images add the leading principal components of their features in v̄.
        """
        mean, deviation = self.condition_stats
        states = (state_of(observations) - mean) / deviation
        if isinstance(observations, Observation):
            features = self.encode("flow", observations, self.acting_flow)[:, len(mean) :]
            states = jnp.concatenate([states, principal_components(features, self.config.image_components)], axis=1)
        return jnp.clip(states, -CONDITION_BOUND, CONDITION_BOUND)

    def values(
        self, batch: base.Batch, next_key: PRNGKeyArray, key: PRNGKeyArray
    ) -> tuple[Float[Array, " m"], Float[Array, " m"]]:
        """Returns V(s') of the TD target, as `next_value` does, and V̂(s).

        V̂(s) is the mean over `value_samples` flow samples â of the ensemble mean of Q_φ(s, â) (§3.2). The N candidates
        at s' and the samples at s pass through flow and critic together.
        """
        n, k = self.config.best_of_n, self.config.value_samples
        groups = self.broadcast(batch["next_observations"], n), self.broadcast(batch["observations"], k)
        noise = jnp.concatenate([self.start_noise(x, own) for x, own in zip(groups, (next_key, key), strict=True)])
        states = jnp.concatenate([self.encode("flow", x, self.acting_flow) for x in groups])
        actions = self.flow_actions(states, noise)
        ranked = n if n > 1 else 0  # A single candidate needs no critic.
        inputs = jnp.concatenate([self.encode("critic", x) for x in groups])
        qs = self.apply("critic", inputs[n - ranked :], actions[n - ranked :])
        next_actions = self.best(actions[:n], qs[:, :n]) if ranked else actions[0]
        return self.pessimistic_q(batch["next_observations"], next_actions), qs[:, ranked:].mean(axis=(0, 1))


# Setting → default, meaning.
SETTINGS = {
    **base.FLOW_SETTINGS,
    "source": (
        "standard",
        "start of the flow: 'standard', N(0, I), or a normal fitted at each state to the 'noise' or 'action' of pairs",
    ),
    "flow_steps": (2, "NFE, Euler steps of the flow"),
    "lam": (1.0, "λ, temperature of the tilt"),
    "w_max": (10.0, "clamp on the weights exp(λ A)"),
    "value_samples": (2, "k, flow samples in V̂"),
    "coupling": ("ot", "'ot', or 'independent': the same weights, but random pairs"),
    "source_conditions": ("iid", "'iid' (the paper), 'systematic', 'resampled' or 'weighted'"),
    "alpha": (0.3, "α, weight of the condition in the cost of the coupling, on standardised observations"),
    "epsilon": (0.5, "ε, entropic regularisation relative to the mean of ‖z − a‖²"),
    "max_iterations": (50, "limit on Sinkhorn iterations"),
    "threshold": (1e-2, "Sinkhorn stops at this L1 error of the marginal p"),
    "image_components": (16, "principal components of image features in the condition"),
}


def get_config() -> ml_collections.ConfigDict:
    """Returns the defaults of this agent."""
    return base.get_config(SETTINGS)


MAZE, MANIPULATION = {"lam": 2.0, "w_max": 3.0, "best_of_n": 1}, {"lam": 0.4, "w_max": 10.0, "best_of_n": 5}
HUMANOID, PANDA = {"lam": 5.0, "w_max": 1.0, "best_of_n": 1}, {"lam": 1.5, "w_max": 10.0, "flow_steps": 3}
# Tables 4 (offline), 6 (online) and 8 (robot) of the paper.
PRESETS = presets.presets(
    {
        "antmaze-large": MAZE,
        "antmaze-giant": MAZE,
        "humanoidmaze-medium": HUMANOID,
        "humanoidmaze-large": HUMANOID,
        "cube-double": MANIPULATION,
        "cube-triple": MANIPULATION,
        "scene": MANIPULATION,
        "puzzle-3x3": MANIPULATION,
        "ArrangeBoxes": PANDA | {"best_of_n": 5},
        "OpenMicrowave": PANDA | {"best_of_n": 1},
        "robot": PANDA | {"lam": 0.75, "best_of_n": 5},
    }
)
# With few updates, a start fitted to the actions beats the paper's pairs and start (docs/results/start.md).
CPU = presets.CPU | {"lam": 1.0, "coupling": "independent", "source": "action"}
