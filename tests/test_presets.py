"""The settings resolved for the paper's 40 tasks are the published ones."""

import pytest

from agents import base, bc, otql
from envs.tasks import TABLE1_TASKS, parse_task
from utils.errors import UserError
from utils.runs import resolve_config

# Table 3: discount, pessimism ρ; §4.1: chunks and sparse rewards as in the QAM code base.
TABLE_3 = {
    "antmaze-large": (0.99, 0.5, 1, False),
    "antmaze-giant": (0.995, 0.5, 1, False),
    "humanoidmaze-medium": (0.995, 0.0, 1, False),
    "humanoidmaze-large": (0.995, 0.0, 1, False),
    "cube-double": (0.99, 0.5, 5, False),
    "cube-triple": (0.99, 0.5, 5, False),
    "scene": (0.99, 0.5, 5, True),
    "puzzle-3x3": (0.99, 0.5, 5, True),
}
# Table 4: λ, w_max, N, NFE.
TABLE_4 = {
    "antmaze-large": (2.0, 3.0, 1, 2),
    "antmaze-giant": (2.0, 3.0, 1, 2),
    "humanoidmaze-medium": (5.0, 1.0, 1, 2),
    "humanoidmaze-large": (5.0, 1.0, 1, 2),
    "cube-double": (0.4, 10.0, 5, 2),
    "cube-triple": (0.4, 10.0, 5, 2),
    "scene": (0.4, 10.0, 5, 2),
    "puzzle-3x3": (0.4, 10.0, 5, 2),
}


def test_there_are_40_tasks():
    """Eight domains of five tasks."""
    assert len(set(TABLE1_TASKS)) == 40
    assert {parse_task(name).domain for name in TABLE1_TASKS} == set(TABLE_3)


@pytest.mark.parametrize("name", TABLE1_TASKS)
@pytest.mark.parametrize("module", [otql, bc])
def test_resolved_settings_are_published(name, module):
    """Tables 3 and 4, with nothing on the command line."""
    domain = parse_task(name).domain
    config, sparse, _ = resolve_config(module, domain, "paper", {})
    discount, rho, horizon, is_sparse = TABLE_3[domain]
    assert (config.discount, config.rho, config.horizon_length, sparse) == (discount, rho, horizon, is_sparse)
    assert (config.batch_size, config.lr, config.tau, config.num_qs) == (256, 3e-4, 5e-3, 10)
    assert config.actor_hidden_dims == config.value_hidden_dims == (512,) * 4
    if module is otql:
        assert (config.lam, config.w_max, config.best_of_n, config.flow_steps) == TABLE_4[domain]
    else:
        assert (config.best_of_n, config.flow_steps) == (1, 10)


def test_a_flag_wins_over_the_preset():
    """Text from the command line takes the type of the field."""
    overrides = {"lam": "3", "sparse": False, "horizon_length": "2", "value_hidden_dims": "(64, 32)"}
    config, sparse, _ = resolve_config(otql, "scene", "paper", overrides)
    assert (config.lam, sparse, config.horizon_length, config.value_hidden_dims) == (3.0, False, 2, (64, 32))


def test_presets_say_what_they_did():
    """An unknown domain is said, cpu shrinks the networks, none keeps the defaults."""
    assert "none for gym" in resolve_config(otql, "gym", "paper", {})[2]
    small, sparse, _ = resolve_config(otql, "scene", "cpu", {})
    assert sparse and small.num_qs < 10 and max(small.value_hidden_dims) < 512 and small.horizon_length == 5
    plain, _, _ = resolve_config(otql, "scene", "none", {})
    assert plain.lam == otql.get_config().lam
    with pytest.raises(UserError, match="unknown preset"):
        resolve_config(otql, "scene", "papier", {})


def test_domains_that_the_paper_leaves_out_take_their_nearest():
    """Each domain ends, over NEAREST, at one with settings of its own."""
    settings = base.presets({"antmaze-large": {"lam": 7.0}, "puzzle-3x3": {"lam": 8.0}})
    assert settings["antsoccer-arena"]["lam"] == settings["pointmaze-large"]["lam"] == 7.0
    assert settings["puzzle-4x6"]["lam"] == 8.0
    assert "lam" not in settings["scene"]
    assert otql.PRESETS["cube-single"]["lam"] == 0.4
    assert otql.PRESETS["humanoidmaze-giant"]["lam"] == 5.0
