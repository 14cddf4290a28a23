"""Pytrees stacked along a leading run axis."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

SMALL = 2**13  # numbers in an array; the biases of an ensemble of ten critics have 5120


@jax.jit
def tree_stack(trees: list[Any]) -> Any:
    """Stacks pytrees of equal structure along a new leading axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@jax.jit
def tree_slice(tree: Any, index: int | Int[Array, ""]) -> Any:
    """Returns the pytree at one index of the leading axis."""
    return jax.tree.map(lambda leaf: leaf[index], tree)


def pack(tree: Any) -> tuple[Float[Array, " n"], Any]:
    """Returns a tree's small arrays of float32, scalars excepted, as one vector, and the tree with None for them."""
    small = [leaf for leaf in jax.tree.leaves(tree) if _is_small(leaf)]
    vector = jnp.concatenate([jnp.ravel(leaf) for leaf in small] or [jnp.zeros(0)])
    return vector, jax.tree.map(lambda leaf: None if _is_small(leaf) else leaf, tree)


def unpack(packed: tuple[Float[Array, " n"], Any], like: Any) -> Any:
    """Returns the tree of which `pack` made `packed`; like: a tree of the same shapes and types."""
    (vector, rest), start = packed, 0

    def restore(shape: Any, leaf: Any) -> Any:
        nonlocal start
        if not _is_small(shape):
            return leaf
        start += shape.size
        return vector[start - shape.size : start].reshape(shape.shape)

    return jax.tree.map(restore, like, rest)


def _is_small(leaf: Any) -> bool:
    """True for arrays that `pack` joins."""
    return leaf.dtype == jnp.float32 and leaf.ndim > 0 and leaf.size <= SMALL
