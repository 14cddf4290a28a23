"""Pytrees stacked along a leading run axis."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


@jax.jit
def tree_stack(trees: list[Any]) -> Any:
    """Stacks pytrees of equal structure along a new leading axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@jax.jit
def tree_slice(tree: Any, index: int | Int[Array, ""]) -> Any:
    """Returns the pytree at one index of the leading axis."""
    return jax.tree.map(lambda leaf: leaf[index], tree)
