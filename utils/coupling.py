"""Couplings of noise and actions with an advantage-weighted target marginal (paper §3.1, Eqs. 2-5).

ott-jax solves the optimal-transport problem. All functions can be traced; none is differentiated.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from utils.arrays import Info, Number

SPARE_DIRECTIONS, SUBSPACE_ITERATIONS = 8, 4  # of the subspace iteration for principal components
SOURCE_CONDITIONS = ("iid", "systematic", "resampled", "weighted")


def tilted_weights(
    advantages: Float[Array, " m"], valid: Float[Array, " m"], lam: Number, w_max: Number
) -> Float[Array, " m"]:
    """Returns w_j = min(exp(λ A_j), w_max) · valid_j over their maximum (paper Eq. 5, §3.2).

    Log-weights are taken relative to their maximum, so that no λ A overflows or leaves only zeros.

    Args:
        advantages: A.
        valid: 1 where the window is a sample, else 0.
        lam: temperature λ ≥ 0.
        w_max: clamp of the weights.

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
    """Returns ‖x_i − y_j‖² for all pairs, without components where y_mask is 0."""
    # A GPU's reduced-precision products would leave errors as large as ε in large distances.
    matmul = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    if y_mask is None:
        distances = jnp.sum(x**2, 1)[:, None] + jnp.sum(y**2, 1)[None] - 2 * matmul(x, y.T)
    else:
        distances = matmul(x**2, y_mask.T) + jnp.sum(y_mask * y**2, 1)[None] - 2 * matmul(x, (y_mask * y).T)
    return jnp.maximum(distances, 0.0)


def principal_components(features: Float[Array, "m f"], count: int) -> Float[Array, "m min({count},m)"]:
    """Returns the scores of the leading principal components over a batch, each scaled to unit variance.

    They are √m times the leading eigenvectors of the Gram matrix of the centred features, up to signs, on which no
    distance depends. Subspace iteration finds them: a full eigendecomposition can cost more than the rest of an update.
    Components without variance, as with equal images, are zero.

    Args:
        features: one row per sample.
        count: number of components, m at most.
    """
    size, count = len(features), min(count, len(features))
    centred = features - features.mean(axis=0)
    gram = jnp.matmul(centred, centred.T, precision=jax.lax.Precision.HIGHEST)
    basis = jax.random.normal(jax.random.key(0), (size, min(count + SPARE_DIRECTIONS, size)))
    for _ in range(SUBSPACE_ITERATIONS):
        basis = jnp.linalg.qr(gram @ basis)[0]
    values, turn = jnp.linalg.eigh(basis.T @ gram @ basis)
    vectors = (basis @ turn)[:, ::-1][:, :count]
    # Smaller values are rounding errors of the centring.
    present = values[::-1][:count] > 1e-6 * jnp.sum(jnp.square(features))
    return jnp.where(present, jnp.sqrt(size) * vectors, 0.0)


def solve_plan(
    noise: Float[Array, "n d"],
    source_conditions: Float[Array, "n c"],
    actions: Float[Array, "m d"],
    conditions: Float[Array, "m c"],
    probs: Float[Array, " m"],
    *,
    alpha: Number,
    epsilon: Number,
    max_iterations: int,
    threshold: Number,
    source_probs: Float[Array, " n"] | None = None,
    action_mask: Float[Array, "m d"] | None = None,
) -> tuple[Float[Array, "n m"], Info]:
    """Computes the entropic OT plan for C_ij = ‖z_i − a_j‖² + α² ‖c̄_i − c_j‖² (paper Eqs. 2, 4).

    Args:
        noise: z.
        source_conditions: c̄.
        actions: a.
        conditions: c.
        probs: target marginal p, sums to 1; entries may be 0.
        alpha: weight of the condition term.
        epsilon: entropic regularisation relative to the mean of the action term ‖z_i − a_j‖² alone, so that neither the
            dimension nor α changes the blur between actions. The mean is over the whole batch, columns with p_j = 0
            included, so the tilt does not change it either.
        max_iterations: cap on Sinkhorn iterations.
        threshold: L1 error of the column marginal at which Sinkhorn stops.
        source_probs: source marginal; uniform if None.
        action_mask: 0 where a component of a_j is padding, which does not enter the cost.

    Returns:
        the plan Γ, and diagnostics: `marginal_error` (L1, columns; rows are exact, as the solver updates the source
        potential last), `iterations`, `capped` (1 if Sinkhorn stopped at the cap), and `transport_cost`, Σ Γ C_action
        relative to that of the independent coupling.
    """
    # Importing ott takes two seconds, which independent pairs do not need.
    from ott.geometry import geometry
    from ott.problems.linear import linear_problem
    from ott.solvers.linear import sinkhorn

    size = noise.shape[0]
    source_probs = jnp.full(size, 1.0 / size, noise.dtype) if source_probs is None else source_probs
    action_cost = squared_distances(noise, actions, action_mask)
    cost = action_cost + alpha**2 * squared_distances(source_conditions, conditions)
    problem = linear_problem.LinearProblem(
        geometry.Geometry(cost, epsilon=epsilon * jnp.mean(action_cost)),  # type: ignore[arg-type]  # Arrays work too.
        source_probs,
        probs,
    )
    solver = sinkhorn.Sinkhorn(
        threshold=threshold,  # type: ignore[arg-type]  # Arrays work too.
        max_iterations=max_iterations,
        inner_iterations=min(10, max_iterations),
    )
    with jax.default_matmul_precision("highest"):
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
        key: PRNG key of the noise, the source conditions and the pairs.
        actions: a.
        conditions: c, standardised.
        weights: w ≥ 0 on any scale; p = w / Σ w, or uniform if all are zero.
        config: settings `coupling`: 'ot', or 'independent' (same marginals, random pairs); `source_conditions`: choice
            of c̄ for 'ot', see below; `alpha`, `epsilon`, `max_iterations` and `threshold`: see `solve_plan`.
        action_mask: 0 where a component of an action is padding.

    The variants of `source_conditions`:
        iid: c̄_i ~ Categorical(p), independently, as in the paper. The drawn conditions match p only on average, so some
            noise is paired across states however large α is.
        systematic: the same draw by systematic resampling, whose counts are within one of m·p.
        resampled: j ~ p once, systematically; the resampled batch is on both sides, with uniform weights.
        weighted: c̄_i = c_i with source weights p_i; the condition marginals agree exactly.

    Returns:
        noise z, the index j of the action (and of the condition to train on) for each z, and diagnostics: effective
        sample size of p over m, share of distinct actions, share of pairs whose source condition is the action's own,
        and those of `solve_plan`.
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
            source = categorical(source_key, probs)
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

    Every noise sample is used once, with less variance than m draws from the joint plan.
    """
    cumulative = jnp.cumsum(plan, axis=1)
    # u < total, so that a trailing column of zero mass is never drawn.
    u = jax.random.uniform(key, (plan.shape[0], 1), plan.dtype) * cumulative[:, -1:]
    index = jnp.sum(cumulative <= u, axis=1)
    last = plan.shape[1] - 1 - jnp.argmax(plan[:, ::-1] > 0, axis=1)
    return jnp.minimum(index, last)


def categorical(key: PRNGKeyArray, probs: Float[Array, " m"]) -> Int[Array, " m"]:
    """Draws m indices i ~ p: the draws of `jax.random.choice`, but without the loop of its search."""
    cumulative = jnp.cumsum(probs)
    points = cumulative[-1] * (1 - jax.random.uniform(key, probs.shape, probs.dtype))
    return jnp.searchsorted(cumulative, points, method="compare_all")


def systematic_resample(key: PRNGKeyArray, probs: Float[Array, " m"]) -> Int[Array, " m"]:
    """Draws m indices, each i within one of m·p_i times, in random order."""
    size = probs.shape[0]
    shift_key, order_key = jax.random.split(key)
    points = (jnp.arange(size) + jax.random.uniform(shift_key)) / size
    cumulative = jnp.cumsum(probs)
    index = jnp.searchsorted(cumulative / cumulative[-1], points, side="right", method="compare_all")
    last = size - 1 - jnp.argmax(probs[::-1] > 0)
    return jax.random.permutation(order_key, jnp.minimum(index, last))
