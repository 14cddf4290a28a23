"""Advice on flags of other code bases: they are unknown here, and what takes their place exists."""

import re

import pytest

from agents import AGENTS
from utils.run.agent_files import load_agent
from utils.run.config import RunConfig, settings_of
from utils.run.foreign_flags import REPLACED

pytestmark = pytest.mark.check


def test_advice_names_what_exists():
    configs = [load_agent(f"agents/{name}.py").get_config() for name in AGENTS]
    known = {field.name for field in settings_of(RunConfig)} | {
        f"agent.{name}" for config in configs for name in config
    }
    assert not known & REPLACED.keys()
    for flag, advice in REPLACED.items():
        assert set(re.findall(r"--([\w.]+)", advice)) <= known, flag


@pytest.mark.parametrize("flag", ["restore_path", "restore_epoch", "buffer_size", "frame_stack", "p_aug", "tags"])
def test_flags_of_fql_and_qam_are_known(flag):
    assert REPLACED[flag]
