"""Shapes in signatures are checked while the tests run, also where broadcasting would let others pass."""

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError
from numpy_networks import make_agent, make_batch

from agents import base
from utils.flow import flow_matching_loss


def test_a_function_refuses_other_shapes():
    with pytest.raises(TypeCheckError, match="actions"):
        flow_matching_loss(lambda x, t: x, jax.random.key(0), jnp.zeros((6, 4)), jnp.zeros((1, 4)), jnp.ones(6))


def test_a_method_of_an_agent_refuses_other_shapes():
    agent = make_agent(base, make_batch())
    with pytest.raises(TypeCheckError, match="qs"):
        agent.rank(jnp.zeros((3, 12), int))
