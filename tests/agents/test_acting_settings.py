"""Settings that change how a trained agent acts, of every agent."""

import importlib

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from numpy_networks import make_agent, make_batch

from agents import AGENTS, base, cgql
from utils.errors import UserError
from utils.run.acting_settings import acting_settings, with_settings
from utils.run.agent_config import idle_settings, resolve_config

FLOW = {"flow_steps", "best_of_n", "noise_scale"}
ACTING = dict.fromkeys(AGENTS, FLOW) | {
    "bc": FLOW - {"best_of_n"},  # It has no critic to rank by.
    "cgql": FLOW | {"guidance_coef", "inv_temp"},
    "fedit": FLOW | {"edit_scale"},
    **dict.fromkeys(("fql", "gfp", "optiflow"), FLOW - {"flow_steps"}),  # One-step policies act.
    "meanflowql": FLOW - {"flow_steps"},
    "lps": set(),  # One step from a latent that is not drawn.
    "qam_e": FLOW | {"edit_scale"},
    "qam_f": FLOW - {"flow_steps"},
    "qsm": FLOW | {"sampler"},
}


@pytest.mark.check
@pytest.mark.parametrize("name", AGENTS)
def test_settings_of_acting(name):
    """Those of training, such as lam, rho or batch_size, and of networks, such as num_qs or time_dim, are none."""
    module, batch = importlib.import_module(f"agents.{name}"), make_batch()
    config = module.get_config()
    config.update({"actor_hidden_dims": (8, 8), "value_hidden_dims": (8, 8), "num_qs": 3, "horizon_length": 2})
    agent = jax.eval_shape(lambda: module.Agent.create(jax.random.key(0), batch, config))
    agent = agent.replace(hyper={field: config[field] for field in agent.hyper})
    assert set(acting_settings(agent, tuple(config), batch["observations"][:1])) == ACTING[name]


class Hyper(dict):
    """Real-valued settings that remember which were read."""

    def __init__(self, values, read):
        super().__init__(values)
        self.read = read

    def __getitem__(self, name):
        self.read.add(name)
        return super().__getitem__(name)


# Read by what makes batches, where there are images, and as an agent is created.
ELSEWHERE = {"batch_size", "horizon_length", "window_rule", "encoder", "image_components", "fql_alpha", "edit_scale"}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *((name, {}) for name in AGENTS),
        ("otql", {"coupling": "independent"}),
        ("bc", {"source": "action"}),
        ("meanflowql", {"actor": "transformer"}),
        ("qam_e", {"edit_scale": 0.0}),
    ],
)
def test_settings_without_effect_are_named(name, changes, monkeypatch):
    """An update and acting read all settings but those that a user is told have no effect."""
    module, batch, read = importlib.import_module(f"agents.{name}"), make_batch(), set()
    config = module.get_config()
    config.update({"actor_hidden_dims": (8, 8), "value_hidden_dims": (8, 8), "num_qs": 3, "horizon_length": 2})
    config.update({k: v for k, v in {"transformer_width": 8, "transformer_blocks": 1}.items() if k in config})
    config.update(changes)
    agent = jax.eval_shape(lambda: module.Agent.create(jax.random.key(0), batch, config))
    settings, idle = set(config), set(idle_settings(module, config))
    hyper = Hyper({field: jnp.float32(config[field]) for field in agent.hyper}, read)

    def recorded(method):
        return lambda self, name, *default: (read.add(name), method(self, name, *default))[1]

    for method in ("__getattr__", "__getitem__", "get"):
        monkeypatch.setattr(ml_collections.ConfigDict, method, recorded(getattr(ml_collections.ConfigDict, method)))
    both = type("Both", (), {"__getattr__": lambda _, name: hyper[name] if name in hyper else agent.config[name]})()
    monkeypatch.setattr(base.Agent, "cfg", both)

    def everything(parts):
        own = agent.replace(**parts, hyper=hyper)
        return own.update(batch)[0].params, own.sample_actions(batch["observations"], own.key)

    fields = ("params", "targets", "opt_state", "key", "step", "condition_stats")
    jax.eval_shape(everything, {field: getattr(agent, field) for field in fields})
    unread = settings - read
    assert unread - ELSEWHERE <= idle
    # N is read by agents that gain nothing by it.
    assert set(module.Agent.UNUSED) - {"best_of_n"} <= unread


def test_an_agent_outside_the_project():
    """The method that acts decides, not a list of names."""

    class Own(base.Agent):
        def sample_actions(self, observations, key):
            return super().sample_actions(observations, key) * self.hyper["own"]

    config = base.get_config()
    config.update({"actor_hidden_dims": (8, 8), "value_hidden_dims": (8, 8), "own": 1.0, "other": 2.0})
    agent = Own.create(jax.random.key(0), make_batch(), ml_collections.ConfigDict(config))
    assert set(acting_settings(agent, tuple(config), make_batch()["observations"])) == FLOW | {"own"}


@pytest.fixture(scope="module")
def agent():
    """CGQL."""
    return make_agent(cgql, make_batch())


def test_other_settings_act_and_keep_all_others(agent):
    other = with_settings(agent, {"flow_steps": "3", "inv_temp": "2.5"})
    assert (other.config.flow_steps, other.hyper["inv_temp"]) == (3, np.float32(2.5))
    kept = lambda agent: {**agent.config, **agent.hyper, "flow_steps": 0, "inv_temp": 0}  # noqa: E731
    assert kept(other) == kept(agent) and agent.config.flow_steps == 10
    states, key = make_batch()["observations"], jax.random.key(0)
    retrained = make_agent(cgql, make_batch(), flow_steps=3, inv_temp=2.5)
    np.testing.assert_array_equal(*(one.sample_actions(states, key) for one in (other, retrained)))


@pytest.mark.parametrize(
    ("name", "field", "reason"),
    [
        ("lps", "flow_steps", "a MeanFlow policy takes one step"),
        ("lps", "noise_scale", "the policy is deterministic"),
        ("lps", "best_of_n", "the policy is deterministic"),
        ("meanflowql", "flow_tau", "the trained MeanFlow policy itself acts"),
        ("bc", "best_of_n", "BC has no critic"),
    ],
)
def test_settings_without_effect_are_refused(name, field, reason):
    """A preset may have them, a user may not ask for them."""
    module = importlib.import_module(f"agents.{name}")
    assert field in resolve_config(module, "scene", "cpu", {})[0]
    with pytest.raises(UserError, match=f"--agent.{field} has no effect: {reason} .agent {name}."):
        resolve_config(module, "scene", "cpu", {field: "1"})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"flow_steps": "two"}, "--agent.flow_steps=two does not fit: it must be of type int"),
        ({"best_of_n": "0"}, "--agent.best_of_n=0: it must be at least 1"),
        ({"guidance_coef": "-1"}, "--agent.guidance_coef=-1.0: it must not be negative"),
        ({"nfe": "1"}, "agent cgql has no setting 'nfe'"),
    ],
)
def test_values_that_do_not_fit(agent, values, message):
    with pytest.raises(UserError, match=message):
        with_settings(agent, values)
