"""The advantage-weighted coupling of utils/coupling.py in torch: the same plan, solved by POT, without gradients.

Actions and noise are chunks with padded steps, flattened to d components.
"""

import math
from typing import Any

import torch
from torch import Tensor

_INNER = 10  # Iterations between checks of the marginal.


def tilted_marginal(advantages: Tensor, valid: Tensor, lam: float, w_max: float) -> Tensor:
    """Returns p_j = w_j / Σ w with w_j = min(exp(λ A_j), w_max) · valid_j (paper Eq. 5, §3.2): [m] → [m].

    At least one window must be valid.
    """
    logits = (lam * advantages).clamp(max=math.log(w_max)).masked_fill(valid == 0, -math.inf)
    return torch.softmax(logits, dim=0)


def squared_distances(x: Tensor, y: Tensor, y_mask: Tensor | None = None) -> Tensor:
    """Returns ‖x_i − y_j‖² [n, m] for x [n, d] and y [m, d], without components where y_mask [m, d] is 0."""
    kept = torch.ones_like(y) if y_mask is None else y_mask
    distances = x.square() @ kept.T + (kept * y.square()).sum(dim=1) - 2 * x @ (kept * y).T
    return distances.clamp(min=0)


def solve_plan(
    noise: Tensor,
    source_conditions: Tensor,
    actions: Tensor,
    conditions: Tensor,
    probs: Tensor,
    *,
    alpha: float,
    epsilon: float,
    max_iterations: int,
    threshold: float,
    action_mask: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the entropic OT plan for C_ij = ‖z_i − a_j‖² + α² ‖c̄_i − c_j‖² (paper Eqs. 2, 4).

    Args:
        noise: z, [m, d].
        source_conditions: c̄, [m, c].
        actions: a, [m, d].
        conditions: c, [m, c].
        probs: target marginal p, [m], sums to 1; entries may be 0.
        alpha: weight of the condition term.
        epsilon: entropic regularisation relative to the mean of the action term.
        max_iterations: cap on Sinkhorn iterations.
        threshold: L1 error of the column marginal at which to stop.
        action_mask: [m, d], 0 where a component of a_j is padding.

    Returns:
        The plan Γ [m, m], whose rows are exact, and scalars `marginal_error`, `capped`, `transport_cost`.
    """
    import ot  # Not needed for acting.

    action_cost = squared_distances(noise, actions, action_mask)
    cost = action_cost + alpha**2 * squared_distances(source_conditions, conditions)
    uniform, potentials = torch.full_like(probs, 1 / len(noise)), None
    for _ in range(0, max_iterations, _INNER):
        plan, log = ot.bregman.sinkhorn_log(
            *(uniform, probs, cost, epsilon * action_cost.mean()),
            **{"numItermax": min(_INNER, max_iterations), "stopThr": 0, "warn": False, "log": True},
            warmstart=potentials,
        )
        potentials = log["log_u"], log["log_v"]
        error = (plan.sum(dim=0) - probs).abs().sum()
        if error < threshold:
            break
    independent_cost = uniform @ action_cost @ probs
    return plan, {
        "marginal_error": error,
        "capped": (error > threshold).float(),
        "transport_cost": (plan * action_cost).sum() / independent_cost.clamp(min=1e-12),
    }


def couple(
    noise: Tensor,
    actions: Tensor,
    conditions: Tensor,
    probs: Tensor,
    action_mask: Tensor,
    random: torch.Generator | None = None,
    **settings: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Pairs each noise with an action, so that the actions follow `probs` (paper §3.1).

    Args:
        noise: z, [m, d].
        actions: a, [m, d].
        conditions: c, [m, c], standardised.
        probs: p, [m].
        action_mask: [m, d].
        random: generator on the CPU, which draws c̄_i ~ Categorical(p) and the pairs; default: torch's.
        settings: of `solve_plan`.

    Returns:
        Index j [m] of each noise's action, and diagnostics: effective sample size of p over m, share of distinct
        actions, share of pairs whose source condition is that of the action, and those of `solve_plan`.
    """
    size = len(noise)
    source = torch.multinomial(probs.cpu(), size, replacement=True, generator=random).to(noise.device)
    plan, diagnostics = solve_plan(
        noise, conditions[source], actions, conditions, probs, action_mask=action_mask, **settings
    )
    index = torch.multinomial(plan.cpu(), 1, generator=random)[:, 0].to(noise.device)
    return index, diagnostics | {
        "effective_sample_size": 1 / (size * probs.square().sum()),
        "distinct_actions": torch.tensor(len(index.unique()) / size),
        "condition_match": (source == index).float().mean(),
    }
