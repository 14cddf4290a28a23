"""Couplings of noise and actions with an advantage-weighted target marginal (paper §3.1, Eqs. 2-5).

The optimal-transport problem is solved by ott-jax. Everything here is traceable and takes no gradient.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray
from ott.geometry import geometry
from ott.problems.linear import linear_problem
from ott.solvers.linear import sinkhorn

from utils.arrays import Info, Number

SPARE_DIRECTIONS, SUBSPACE_ITERATIONS = 8, 4  # of the search for principal components
SOURCE_CONDITIONS = ("iid", "systematic", "resampled", "weighted")


def tilted_weights(
    advantages: Float[Array, " m"], valid: Float[Array, " m"], lam: Number, w_max: Number
) -> Float[Array, " m"]:
    """Returns w_j = min(exp(λ A_j), w_max) · valid_j over their maximum (paper Eq. 5, §3.2).

    Computed from log-weights relative to their maximum, so that no λ A overflows or leaves only zeros.

    Args:
        advantages: A.
        valid: 1 where the window is a sample, else 0.
        lam, w_max: temperature λ ≥ 0 and weight clamp.

    Returns:
        w / max w; zero on invalid rows; all zero if no row is valid.
    """
    logits = jnp.minimum(lam * advantages, jnp.log(w_max))
    logits = jnp.where(valid > 0, logits, -jnp.inf)
    peak = jnp.max(logits)
    return jnp.exp(logits - jnp.where(jnp.isfinite(peak), peak, 0.0))


def tilted_marginal(
    advantages: Float[Array, " m"], valid: Float[Array, " m"], lam: Number, w_max: Number
) -> Float[Array, " m"]:
    """Returns the target marginal p_j = w_j / Σ w of `tilted_weights`; all zero if no row is valid."""
    weights = tilted_weights(advantages, valid, lam, w_max)
    return weights / jnp.maximum(weights.sum(), 1.0)


def squared_distances(
    x: Float[Array, "n d"], y: Float[Array, "m d"], y_mask: Float[Array, "m d"] | None = None
) -> Float[Array, "n m"]:
    """‖x_i − y_j‖² for all pairs; components with y_mask = 0 do not count."""
    # Reduced-precision products of a GPU would leave errors of the size of ε in large distances.
    matmul = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    if y_mask is None:
        distances = jnp.sum(x**2, 1)[:, None] + jnp.sum(y**2, 1)[None] - 2 * matmul(x, y.T)
    else:
        distances = matmul(x**2, y_mask.T) + jnp.sum(y_mask * y**2, 1)[None] - 2 * matmul(x, (y_mask * y).T)
    return jnp.maximum(distances, 0.0)


def principal_components(features: Float[Array, "m f"], count: int) -> Float[Array, "m min({count},m)"]:
    """The scores of the leading principal components over a batch, each scaled to unit variance.

    They are √m times the leading eigenvectors of the Gram matrix of the centred features, up to their signs, which no
    distance depends on, by subspace iteration: a whole eigendecomposition can cost more than the rest of an update.
    Components without variance, as of equal images, are zero.

    Args:
        features: one row a sample.
        count: how many; m at most.
    """
    size, count = len(features), min(count, len(features))
    centred = features - features.mean(axis=0)
    gram = jnp.matmul(centred, centred.T, precision=jax.lax.Precision.HIGHEST)
    basis = jax.random.normal(jax.random.key(0), (size, min(count + SPARE_DIRECTIONS, size)))
    for _ in range(SUBSPACE_ITERATIONS):
        basis = jnp.linalg.qr(gram @ basis)[0]
    values, turn = jnp.linalg.eigh(basis.T @ gram @ basis)
    vectors = (basis @ turn)[:, ::-1][:, :count]
    # Below, there is only what rounding leaves of features that are not centred.
    present = values[::-1][:count] > 1e-6 * jnp.sum(jnp.square(features))
    return jnp.where(present, jnp.sqrt(size) * vectors, 0.0)


def solve_plan(
    noise: Float[Array, "m d"],
    source_conditions: Float[Array, "m c"],
    actions: Float[Array, "m d"],
    conditions: Float[Array, "m c"],
    probs: Float[Array, " m"],
    *,
    alpha: Number,
    epsilon: Number,
    max_iterations: int,
    threshold: Number,
    source_probs: Float[Array, " m"] | None = None,
    action_mask: Float[Array, "m d"] | None = None,
) -> tuple[Float[Array, "m m"], Info]:
    """Entropic OT plan for C_ij = ‖z_i − a_j‖² + α² ‖c̄_i − c_j‖² (paper Eqs. 2, 4).

    Args:
        noise: z. source_conditions: c̄. actions: a. conditions: c.
        probs: target marginal p, sums to 1; entries may be 0.
        alpha: weight of the condition term.
        epsilon: entropic regularisation relative to the mean of the action term ‖z_i − a_j‖² alone, so that
            neither the dimension nor α changes how far actions are blurred. The mean is over the whole batch, columns
            with p_j = 0 included: the tilt has no say in it either.
        max_iterations: cap on Sinkhorn iterations. threshold: stop at this L1 error of the column marginal.
        source_probs: source marginal; uniform if None.
        action_mask: 0 where a component of a_j is padding, which then has no say in the plan.

    Returns:
        The plan Γ and `marginal_error` (L1, columns; rows are exact: the solver updates the
        source potential last), `iterations`, `capped` (1 if it stopped at the cap unconverged), and
        `transport_cost`: Σ Γ C_action over the independent coupling's.
    """
    size = noise.shape[0]
    source_probs = jnp.full(size, 1.0 / size, noise.dtype) if source_probs is None else source_probs
    action_cost = squared_distances(noise, actions, action_mask)
    cost = action_cost + alpha**2 * squared_distances(source_conditions, conditions)
    problem = linear_problem.LinearProblem(
        geometry.Geometry(cost, epsilon=epsilon * jnp.mean(action_cost)),  # type: ignore[arg-type]  # OTT-JAX takes arrays too.
        source_probs,
        probs,
    )
    solver = sinkhorn.Sinkhorn(
        threshold=threshold,  # type: ignore[arg-type]  # OTT-JAX takes arrays too.
        max_iterations=max_iterations,
        inner_iterations=min(10, max_iterations),
    )
    output = solver(problem)
    # A zero-probability column or row has potential −inf, and its entries are exactly zero.
    plan = jnp.where((source_probs[:, None] > 0) & (probs[None] > 0), jnp.nan_to_num(output.matrix), 0.0)
    error = jnp.sum(jnp.abs(plan.sum(0) - probs))
    independent_cost = source_probs @ action_cost @ probs
    return plan, {
        "marginal_error": error,
        "iterations": jnp.asarray(output.n_iters),
        "capped": (error > threshold).astype(cost.dtype),
        "transport_cost": jnp.sum(plan * action_cost) / jnp.maximum(independent_cost, 1e-12),
    }


def couple(
    key: PRNGKeyArray,
    actions: Float[Array, "m d"],
    conditions: Float[Array, "m c"],
    weights: Float[Array, " m"],
    config: Any,
    action_mask: Float[Array, "m d"] | None = None,
) -> tuple[Float[Array, "m d"], Int[Array, " m"], Info]:
    """Draws m training pairs (z, a_j) whose actions follow the weighted target marginal (paper §3.1).

    Args:
        key: randomness of the noise, the source conditions and the pairs.
        actions: a. conditions: c, standardised.
        weights: w ≥ 0 on any scale, probabilities or not: here, and only here, they become p = w / Σ w; if all
            are zero, p is uniform.
        config: has the attributes `coupling`: 'ot', or 'independent' (same marginals, noise paired at random);
            `source_conditions`, how c̄ is chosen for 'ot' (see below); `alpha`, `epsilon`, `max_iterations` and
            `threshold`, as in `solve_plan`.
        action_mask: 0 where a component of an action is padding.

    The variants of `source_conditions`:
        iid: c̄_i ~ Categorical(p), independently, as in the paper. The drawn conditions only meet p on average,
            so part of the noise must be paired across states however large α is.
        systematic: the same draw by systematic resampling, whose counts are within one of m·p.
        resampled: j ~ p once, systematically; the resampled batch stands on both sides with uniform weights.
        weighted: c̄_i = c_i with source weights p_i; the condition marginals agree exactly.

    Returns:
        noise z, index j of the action (and of the condition to train on) for each noise, and
        diagnostics: effective sample size of p over m, share of distinct actions, share of pairs whose source
        condition is the action's own, and those of `solve_plan`.
    """
    size = actions.shape[0]
    total = weights.sum()
    probs = jnp.where(total > 0, weights / jnp.where(total > 0, total, 1.0), 1.0 / size)
    noise_key, source_key, pair_key, row_key = jax.random.split(key, 4)
    noise = jax.random.normal(noise_key, actions.shape, actions.dtype)
    if config.coupling == "independent":
        index = source = systematic_resample(source_key, probs)
        diagnostics: Info = {}
    elif config.coupling == "ot":
        targets, target_probs, source_probs = jnp.arange(size), probs, None
        if config.source_conditions == "iid":
            source = jax.random.choice(source_key, size, (size,), p=probs)
        elif config.source_conditions == "systematic":
            source = systematic_resample(source_key, probs)
        elif config.source_conditions == "resampled":
            source = targets = systematic_resample(source_key, probs)
            target_probs = jnp.full(size, 1.0 / size)
        elif config.source_conditions == "weighted":
            source, source_probs = jnp.arange(size), probs
        else:
            raise ValueError(f"source_conditions {config.source_conditions!r} is not one of {SOURCE_CONDITIONS}")
        plan, diagnostics = solve_plan(
            noise,
            conditions[source],
            actions[targets],
            conditions[targets],
            target_probs,
            alpha=config.alpha,
            epsilon=config.epsilon,
            max_iterations=config.max_iterations,
            threshold=config.threshold,
            source_probs=source_probs,
            action_mask=None if action_mask is None else action_mask[targets],
        )
        if source_probs is not None:
            rows = systematic_resample(row_key, source_probs)
            noise, source, plan = noise[rows], source[rows], plan[rows]
        index = targets[sample_conditional(pair_key, plan)]
    else:
        raise ValueError(f"coupling {config.coupling!r} is not 'ot' or 'independent'")
    counts = jnp.zeros(size).at[index].set(1.0)
    diagnostics |= {
        "effective_sample_size": 1.0 / (size * jnp.sum(probs**2)),
        "distinct_actions": counts.mean(),
        "condition_match": jnp.mean(source == index),
    }
    return noise, index, jax.tree.map(jax.lax.stop_gradient, diagnostics)


def sample_conditional(key: PRNGKeyArray, plan: Float[Array, "n m"]) -> Int[Array, " n"]:
    """Draws one column j ~ Γ_i· / Σ_j Γ_ij for each row of a plan.

    Every noise sample is used once, which has less variance than m draws from the joint plan.
    """
    cumulative = jnp.cumsum(plan, axis=1)
    # u < total, strictly, so that a trailing column of zero mass is never drawn.
    u = jax.random.uniform(key, (plan.shape[0], 1), plan.dtype) * cumulative[:, -1:]
    index = jnp.sum(cumulative <= u, axis=1)
    last = plan.shape[1] - 1 - jnp.argmax(plan[:, ::-1] > 0, axis=1)
    return jnp.minimum(index, last)


def systematic_resample(key: PRNGKeyArray, probs: Float[Array, " m"]) -> Int[Array, " m"]:
    """Draws m indices with counts within one of m·p, in random order."""
    size = probs.shape[0]
    shift_key, order_key = jax.random.split(key)
    points = (jnp.arange(size) + jax.random.uniform(shift_key)) / size
    cumulative = jnp.cumsum(probs)
    index = jnp.searchsorted(cumulative / cumulative[-1], points, side="right")
    last = size - 1 - jnp.argmax(probs[::-1] > 0)
    return jax.random.permutation(order_key, jnp.minimum(index, last))
