"""Configs: settings stated once, as fields, as flags and as checks."""

import dataclasses
from pathlib import Path

import pytest

from utils.errors import UserError
from utils.run import config as config_module
from utils.run.config import PostTrainConfig, RunConfig, settings_of
from utils.run.flags import define_flags, parse_flags
from utils.system.cli import last_of_each

pytestmark = pytest.mark.check


def unchecked(config, **settings):
    """Sets what the tests' check of types would not let pass."""
    for name, value in settings.items():
        object.__setattr__(config, name, value)
    return config


@pytest.mark.parametrize("cls", [RunConfig, PostTrainConfig])
def test_every_setting_is_a_flag_of_the_same_default(cls):
    values = define_flags(cls)
    for field in settings_of(cls):
        assert values[field.name].value == field.default and values[field.name].help
    assert set(values) - {field.name for field in settings_of(cls)} <= {"tremor"}
    assert parse_flags(["main.py"], cls) == cls()


@pytest.mark.parametrize("cls", [RunConfig, PostTrainConfig])
def test_flags_give_the_config_they_were_made_from(cls):
    config = cls(agent="mine.py", seed=3, eval_overlap=False, vary="agent.lam=1,2", sparse=False, env_timeout=2.5)
    config = dataclasses.replace(config, overrides={"lr": "1e-3", "actor_hidden_dims": "16,16"})
    assert parse_flags(["main.py", *config.flag_list()], cls) == config


def test_a_config_is_frozen_and_takes_paths():
    config = unchecked(RunConfig(), dataset=Path("a.npz"), save_dir=Path("runs"))
    config.__post_init__()
    assert config.flag_values()["dataset"] == "a.npz" and config.save_dir == "runs"
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": -1}, "--seed=-1: it must be at least 0"),
        ({"seed": 2**31 + 1}, "it must be at most"),
        ({"seed": 1.5}, "--seed=1.5: it must be a whole number"),
        ({"seed": True}, "--seed=True: it must be a whole number"),
        ({"seed": None}, "--seed=None: it must be a whole number"),
        ({"offline_steps": "100"}, "--offline_steps='100': it must be a whole number"),
        ({"env_timeout": float("nan")}, "--env_timeout=nan: it must be at least 0"),
        ({"env_name": 3}, "--env_name=3: it must be a text"),
        ({"sparse": "yes"}, "--sparse='yes': it must be True or False"),
        ({"matmul_precision": "float16"}, "--matmul_precision=float16: use one of float32, tensorfloat32, bfloat16"),
        ({"wandb": "maybe"}, "--wandb=maybe: use one of online, offline, disabled"),
        ({"dataset": "a", "ogbench_dataset_dir": "b"}, "exclude each other"),
        ({"horizon_length": 5, "overrides": {"horizon_length": 4}}, "are one setting"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(UserError) as error:
        unchecked(RunConfig(), **settings).validate()
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (["--seed=1", "--seed=1"], "seed"),
        (["--seed=1", "--seed", "2"], "seed"),
        (["--sparse", "--nosparse"], "sparse"),
        (["--tremor=1", "--expert_noise=2"], "expert_noise"),
        (["--agent.lr=1", "--agent.lr=2"], "agent.lr"),
    ],
)
def test_of_a_flag_given_twice_the_last_value_counts_and_a_line_says_so(given, name, capsys):
    config = parse_flags(["online_main.py", *given], PostTrainConfig)
    value = config.overrides["lr"] if name == "agent.lr" else getattr(config, name)
    assert f"--{name} is given more than once; the last value counts: {value}\n" in capsys.readouterr().out
    assert str(value) == {"seed": given[-1][-1], "sparse": "False", "expert_noise": "2.0", "agent.lr": "2"}[name]


def test_the_command_is_recorded():
    assert parse_flags(["main.py", "--run_group=a b"], RunConfig).command == "main.py '--run_group=a b'"
    assert (RunConfig().command, PostTrainConfig().command) == ("train()", "post_train()")


def test_last_of_each():
    flags = ("--a=1", "--b", "x", "--nob", "--a=2", "--agent.a=3")
    assert last_of_each(flags) == ["x", "--nob", "--a=2", "--agent.a=3"]


def test_tensorboard_needs_its_library(monkeypatch):
    monkeypatch.setattr(config_module, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"^--tensorboard needs tensorboardX; install it with: pip install tensorboardX$"
    ):
        RunConfig(tensorboard=True).validate()
    RunConfig().validate()


def test_demonstrations_and_a_file_exclude_each_other():
    with pytest.raises(UserError, match="--expert_noise: --dataset names a file"):
        PostTrainConfig(dataset="a.npz", expert_noise=3.0).validate()


def test_ends_of_the_phases():
    assert RunConfig(offline_steps=10, online_steps=5).phase_ends == (10, 15)
    assert PostTrainConfig(rollout_steps=0, online_steps=5).phase_ends == (0, 5)
