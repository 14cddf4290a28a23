"""Every draw of a run has bits of its own: the keys that agents, trainer and policies really draw from are distinct."""

import importlib
import itertools
from contextlib import ExitStack
from unittest import mock

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_networks import make_batch
from test_images import ALL, image_agent, image_batch, linear  # noqa: F401

from agents import base, qsm
from utils import coupling
from utils.data.batches import sample_starts
from utils.random_streams import Stream, stream_key, stream_seed
from utils.rollout import policy
from utils.rollout.evaluator import episode_seed
from utils.rollout.policy import act, evaluation_policy
from utils.run.post_train import distill
from utils.run.update_loop import NOT_FINITE, UpdateLoop
from utils.trees import tree_stack

SEEDS, STEPS = (0, 1), (0, 1, 7)
USES = ("bernoulli", "choice", "normal", "permutation", "randint", "split", "uniform")


def assert_distinct(keys):
    """No key, [..., 2] each, stands twice."""
    keys = np.concatenate([np.asarray(part).reshape(-1, 2) for part in keys])
    assert len(np.unique(keys, axis=0)) == len(keys)


def drawing(function):
    """A compiled function of the same arguments that returns the keys [n, 2] that `function` draws from or splits."""
    keys = []

    def recorded(draw):
        def record(key, *rest, **named):
            if key.dtype == jnp.uint32:  # A typed key is a constant: where the search for principal components begins.
                keys.append(key)
            return draw(key, *rest, **named)

        return record

    def denoise(predict, noise, key, num_steps, sampler):
        keys.extend(jax.random.split(key, num_steps))  # which are drawn from in a scan
        return noise

    def uniform_plan(noise, *_, **__):
        return jnp.ones((len(noise), len(noise))), {}

    def run(*arguments):
        with ExitStack() as patches:
            for name in USES:
                patches.enter_context(mock.patch.object(jax.random, name, recorded(getattr(jax.random, name))))
            patches.enter_context(mock.patch.object(qsm, "denoise", denoise))
            patches.enter_context(mock.patch.object(coupling, "solve_plan", uniform_plan))
            function(*arguments)
        return jnp.stack(keys)

    return jax.jit(run)


class Revealing(flax.struct.PyTreeNode):
    """Acts by the bits of the key that it is given."""

    step: jax.Array

    def sample_actions(self, observations, key):
        return jax.lax.bitcast_convert_type(key, jnp.float32)


def acting_keys():
    """Those of evaluations (seeds, steps, episodes, chunks) and of acting online, and those above them."""
    agents, grid = tree_stack([Revealing(jnp.int32(0))]), np.array(list(itertools.product(range(6), range(4))))
    observations = np.zeros((len(grid), 1))
    with mock.patch.object(policy, "act", lambda agents, index, observations, key, *_: key):
        keys = [evaluation_policy(seed, agents, 0, step)[0](None, None, None) for seed in SEEDS for step in STEPS]
    keys += [stream_key(seed, Stream.ACTING) for seed in SEEDS]
    return keys + [np.asarray(act(agents, 0, observations, key, *grid.T)).view(np.uint32) for key in keys]


def distilling_keys(agent, root):
    """Keys that the agent and the trainer draw from while a one-step policy is distilled."""
    used = []

    class Recorder(UpdateLoop):
        def run(self, agents, step, num_updates, method):
            assert method == "distill"
            used.append((agents.key[0], self.keys[0]))
            return agents, {NOT_FINITE: np.zeros((1, 1))}

    distill(tree_stack([agent]), Recorder(root[None]), 1)
    return used


@pytest.mark.parametrize("name", ALL)
def test_no_two_draws_share_a_key(name, linear, monkeypatch):  # noqa: F811
    """Initial networks, updates with shifted images and their batches, also while distilling; evaluations; acting."""
    batch, initial = image_batch(), []
    init = base.init_network
    with monkeypatch.context() as patch:
        patch.setattr(base, "init_network", lambda key, *rest: (initial.append(key), init(key, *rest))[1])
        agent = image_agent(importlib.import_module(f"agents.{name}"), batch)
    keys, drawn = acting_keys(), drawing(lambda agent: agent.update(batch))
    rows_drawn = [drawing(lambda k, s, r=r: sample_starts(k, s, 8, 100, r)) for r in (Stream.BATCH, Stream.EXPERIENCE)]
    for stream, seed in itertools.product((Stream.TRAINING, Stream.POST_TRAINING), SEEDS):
        root = stream_key(seed, stream)
        keys.append([stream_key(root, Stream.INITIALISATION, i) for i in range(len(initial))])
        own = agent.replace(key=stream_key(root, Stream.UPDATE))
        phases = [(own.key, root), *(distilling_keys(own, root) if stream == Stream.POST_TRAINING else ())]
        for (key, rows_key), step in itertools.product(phases, STEPS):
            keys += [drawn(own.replace(key=key, step=jnp.int32(step)))]
            keys += [draw(rows_key, step) for draw in rows_drawn]
    assert_distinct(keys)


def test_a_new_agent_draws_below_its_key():
    """Its networks and its updates, each by the name of their stream."""
    keys, root = [], stream_key(3, Stream.TRAINING)
    module = importlib.import_module("agents.fql")
    config = module.get_config()
    config.update({"actor_hidden_dims": (4,), "value_hidden_dims": (4,), "num_qs": 2})
    with mock.patch.object(base, "init_network", lambda key, *_: keys.append(key) or {}):
        agent = module.Agent.create(root, make_batch(), config)
    assert np.array_equal(keys, [stream_key(root, Stream.INITIALISATION, i) for i in range(3)])
    assert np.array_equal(agent.key, stream_key(root, Stream.UPDATE))


@pytest.mark.check
def test_no_two_streams_meet():
    """Whatever the seeds, names and counters; and a name is no counter, nor a part of a split."""
    counters = [(), *itertools.product(range(4)), *itertools.product(range(4), range(4))]
    keys = [stream_key(seed, stream, *own) for seed in range(3) for stream in Stream for own in counters]
    roots = [jax.random.PRNGKey(seed) for seed in range(3)]
    assert_distinct([*keys, *roots, *(jax.random.split(root, 20) for root in roots)])


def test_no_two_episodes_share_a_seed():
    """Those learnt from and those of evaluations, of several seeds and steps."""
    resets = [stream_seed(seed, Stream.RESET, episode) for seed in range(20) for episode in range(20)]
    agents = tree_stack([Revealing(jnp.int32(0))])
    bases = [evaluation_policy(seed, agents, 0, step)[1] for seed in range(20) for step in (0, 1, 2, 50_000, 1_000_000)]
    episodes = [episode_seed(own, i) for own in bases for i in range(10)]
    assert len({*resets, *bases, *episodes}) == len(resets) + len(bases) + len(episodes)
    # Fewer counters are not the same as counters of zero.
    assert stream_seed(0, Stream.RESET, 1) != stream_seed(0, Stream.RESET, 1, 0)
