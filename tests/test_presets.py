"""The settings resolved for the paper's 40 tasks are the published ones."""

import pytest

from agents import (
    base,
    bc,
    cgql,
    dsrl,
    ewfm,
    fawac,
    fedit,
    fql,
    gfp,
    ifql,
    lps,
    meanflowql,
    optiflow,
    otql,
    qam,
    qam_e,
    qam_f,
    qc,
    qsm,
)
from envs.tasks import TABLE1_TASKS, parse_task
from utils.errors import UserError
from utils.run.agent_config import resolve_config

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

MODULES = [
    otql,
    bc,
    ewfm,
    fql,
    gfp,
    lps,
    meanflowql,
    optiflow,
    qc,
    qam,
    qam_f,
    qam_e,
    dsrl,
    ifql,
    fawac,
    fedit,
    cgql,
    qsm,
]
# QAM's experiments (arXiv 2601.14234): FQL α, QAM τ, QAM-F τ and α, DSRL, FEdit, FAWAC τ, IFQL κ, CGQL's
# coefficient, QSM τ and α.
BASELINES = {
    "puzzle-3x3": (300, 3, 3, 0, 1.0, 0.2, 0.8, 0.95, 0.1, 10, 30),
    "scene": (300, 1, 1, 300, 0.4, 0.2, 6.4, 0.9, 0.1, 3, 30),
    "cube-double": (300, 1, 1, 0, 1.0, 0.2, 0.8, 0.9, 0.01, 1, 10),
    "cube-triple": (30, 3, 10, 300, 1.4, 0.3, 0.8, 0.95, 0.1, 10, 10),
    "antmaze-large": (3, 10, 3, 30, 0.8, 0.2, 6.4, 0.9, 0.1, 10, 10),
    "antmaze-giant": (3, 3, 3, 30, 1.2, 0.3, 0.8, 0.8, 0.1, 10, 10),
    "humanoidmaze-medium": (30, 3, 1, 30, 0.6, 0.5, 6.4, 0.7, 0.01, 10, 30),
    "humanoidmaze-large": (30, 3, 0.3, 30, 0.8, 0.1, 0.8, 0.8, 0.01, 10, 30),
}
# Tables 5 and 6: K, ρ, H, widths, then λ, w_max, N and NFE (α for FQL).
ONLINE = {
    otql: {"lam": 1.5, "w_max": 10.0, "flow_steps": 3},
    qc: {"best_of_n": 32, "flow_steps": 10},
    fql: {"alpha": 300.0},
    ewfm: {"lam": 1.0, "w_max": 20.0, "flow_steps": 10, "best_of_n": 1},
}


@pytest.mark.check
@pytest.mark.parametrize("domain", BASELINES)
def test_baselines_have_their_published_settings(domain):
    """What QAM's authors tuned to on each domain."""
    found = [
        resolve_config(module, domain, "paper", {})[0][field]
        for module, field in [
            *((fql, "alpha"), (qam, "inv_temp"), (qam_f, "inv_temp"), (qam_f, "fql_alpha"), (dsrl, "noise_scale")),
            *((fedit, "edit_scale"), (fawac, "inv_temp"), (ifql, "kappa"), (cgql, "guidance_coef")),
            *((qsm, "inv_temp"), (qsm, "alpha")),
        ]
    ]
    assert tuple(found) == BASELINES[domain]
    assert resolve_config(cgql, domain, "paper", {})[0].inv_temp == 10


@pytest.mark.parametrize("task", ["ArrangeBoxes", "OpenMicrowave"])
@pytest.mark.parametrize("module", ONLINE)
def test_online_settings_are_published(module, task):
    """Tables 5 and 6."""
    config, sparse, _ = resolve_config(module, task, "paper", {})
    assert (config.num_qs, config.rho, config.horizon_length, config.discount, sparse) == (2, 0.0, 10, 0.99, False)
    assert config.actor_hidden_dims == config.value_hidden_dims == (256,) * 4
    assert all(config[field] == value for field, value in ONLINE[module].items())
    if module is otql:
        assert config.best_of_n == (5 if task == "ArrangeBoxes" else 1)


@pytest.mark.parametrize(
    ("module", "field", "wrong"),
    [(qam, "fql_alpha", "-1"), (dsrl, "noise_scale", "0"), (ifql, "kappa", "1.5"), (qsm, "sampler", "ddim")],
)
def test_values_that_no_agent_works_with(module, field, wrong):
    """Refused in one line, like those of OTQL."""
    with pytest.raises(UserError, match=f"--agent.{field}={wrong}"):
        resolve_config(module, "scene", "paper", {field: wrong})


def test_there_are_40_tasks():
    """Eight domains of five tasks."""
    assert len(set(TABLE1_TASKS)) == 40
    assert {parse_task(name).domain for name in TABLE1_TASKS} == set(TABLE_3)


@pytest.mark.check
@pytest.mark.parametrize("name", TABLE1_TASKS)
@pytest.mark.parametrize("module", MODULES)
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
        assert (config.best_of_n, config.flow_steps) == ({qc: 32, ifql: 32, meanflowql: 5}.get(module, 1), 10)


@pytest.mark.check
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


def test_an_agents_own_settings_win_over_those_of_the_domain():
    settings = base.presets({"scene": {"rho": 0.25, "num_qs": 4}})
    assert (settings["scene"]["rho"], settings["scene"]["num_qs"]) == (0.25, 4)
    assert settings["cube-double"]["rho"] == 0.5 and settings["scene"]["sparse"] is True


def test_domains_that_the_paper_leaves_out_take_their_nearest():
    """Each domain ends, over NEAREST, at one with settings of its own."""
    settings = base.presets({"antmaze-large": {"lam": 7.0}, "puzzle-3x3": {"lam": 8.0}})
    assert settings["antsoccer-arena"]["lam"] == settings["pointmaze-large"]["lam"] == 7.0
    assert settings["puzzle-4x6"]["lam"] == 8.0
    assert "lam" not in settings["scene"]
    assert otql.PRESETS["cube-single"]["lam"] == 0.4
    assert otql.PRESETS["humanoidmaze-giant"]["lam"] == 5.0
