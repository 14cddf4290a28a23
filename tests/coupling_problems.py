"""Random problems for the tests of the coupling, and what solves them, compiled once."""

from functools import cache
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from utils.coupling import couple, solve_plan

# Compiled once for each shape.
solve = jax.jit(solve_plan, static_argnames="max_iterations")
BATCHES = 400


def problem(size, width, marginal="random", seed=0):
    """Random noise, source conditions, actions, conditions [m, 3] and target marginal."""
    rng = np.random.default_rng([size, width, seed])
    probs = {"uniform": np.ones(size), "random": rng.exponential(size=size), "zeros": rng.exponential(size=size)}
    probs = probs[marginal]
    if marginal == "zeros":
        probs[rng.permutation(size)[: size // 2]] = 0
    probs /= probs.sum()
    conditions = rng.normal(size=(size, 3))
    source = conditions[rng.choice(size, size, p=probs)]
    arrays = rng.normal(size=(size, width)), source, np.clip(rng.normal(size=(size, width)), -1, 1), conditions, probs
    return tuple(jnp.asarray(array, jnp.float32) for array in arrays)


def normalised(probs):
    """A marginal that sums to 1 in float64, as POT asks."""
    return np.asarray(probs, np.float64) / np.asarray(probs, np.float64).sum()


def config(**changes):
    """Settings of `couple`."""
    values = {"coupling": "ot", "source_conditions": "iid", "alpha": 1.0, "epsilon": 0.1, "max_iterations": 200}
    return SimpleNamespace(**values | {"threshold": 1e-3} | changes)


@cache
def compiled_couple(kind, source):
    """`couple` over a batch of keys, compiled once for each shape: the tests below share 16 rows and d = 2."""

    def run(keys, actions, conditions, probs, alpha, epsilon, mask):
        settings = config(coupling=kind, source_conditions=source, alpha=alpha, epsilon=epsilon)
        return jax.vmap(lambda key: couple(key, actions, conditions, probs, settings, mask))(keys)

    return jax.jit(run)


def draw_pairs(kind, source, actions, conditions, probs, alpha=1.0, epsilon=0.1, mask=None):
    """Noise [b, 16, 2], indices [b, 16] and diagnostics [b] of many batches, as NumPy arrays."""
    keys, mask = jax.random.split(jax.random.key(1), BATCHES), jnp.ones_like(actions) if mask is None else mask
    conditions = jnp.pad(conditions, ((0, 0), (0, 16 - conditions.shape[1])))  # one shape, one program
    arrays = compiled_couple(kind, source)(
        keys, actions, conditions, jnp.float32(probs), jnp.float32(alpha), jnp.float32(epsilon), mask
    )
    return jax.tree.map(np.asarray, arrays)
