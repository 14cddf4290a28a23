"""Creating and updating agents by hand, as in a notebook."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from agents import bc, otql
from utils.errors import UserError

BATCH = {"observations": np.zeros((4, 3), np.float32), "actions": np.zeros((4, 2), np.float32)}


def small(module):
    config = ml_collections.ConfigDict(module.get_config())
    config.update({"actor_hidden_dims": (8,), "value_hidden_dims": (8,), "num_qs": 2, "batch_size": 4})
    return config


@pytest.mark.check
def test_a_seed_is_a_key():
    agents = [bc.Agent.create(key, BATCH, small(bc)) for key in (3, jax.random.PRNGKey(3), jax.random.key(3))]
    for agent in agents[1:]:
        assert jax.tree.all(jax.tree.map(jnp.array_equal, agents[0], agent))
    assert not jnp.array_equal(agents[0].key, bc.Agent.create(4, BATCH, small(bc)).key)


@pytest.mark.check
@pytest.mark.parametrize("module", [bc, otql])
def test_missing_fields_of_a_batch_are_named(module):
    with pytest.raises(UserError, match=r"the batch lacks actions; see utils/data/batches\.py"):
        module.Agent.create(0, {"observations": BATCH["observations"]}, small(module))
    agent = module.Agent.create(0, BATCH, small(module))
    with pytest.raises(UserError, match="the batch lacks rewards, masks, next_observations, valid, action_mask"):
        agent.update(BATCH)
