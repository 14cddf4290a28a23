"""Faults of a user's agent file: one line that names the file and the line, and what is expected."""

import re
import sys
from pathlib import Path

import ml_collections
import numpy as np
import pytest

from utils.errors import UserError
from utils.run.agent_config import resolve_config
from utils.run.agent_files import check_agent, load_agent
from utils.system.files import find_modules_in

START = """
import jax, jax.numpy as jnp
from agents import bc, base
PRESETS = base.presets({})
def get_config():
    return base.get_config()
class Agent(bc.Agent):
    pass
"""
MODULE = {
    "get_config\\(\\) of agent file .* failed at .*own.py, line 10: RuntimeError: no; it has to return": (
        "def get_config():\n    raise RuntimeError('no')"
    ),
    "failed at .*own.py, line 9: TypeError: it returned a dict; it has to return an ml_collections.ConfigDict": (
        "def get_config():\n    return {'lr': 1}"
    ),
    "lacks the setting 'batch_size'; begin with agents.base.get_config": (
        "import ml_collections\ndef get_config():\n    return ml_collections.ConfigDict({'lr': 1.0})"
    ),
    "PRESETS in agent file .*own.py is a list": "PRESETS = []",
    "PRESETS\\['scene'\\] in agent file .* is a int": "PRESETS = {'scene': 3}",
    "CPU in agent file .* is a NoneType": "CPU = None",
    "Agent in agent file .* is no class with create, update": "Agent = lambda: None",
    "does not import: SystemExit: 3 \\(.*own.py, line 9\\) \\(traceback: ": "raise SystemExit(3)",
    "preset 'paper' of .*own.py for scene: agent own has no setting 'bath_size'": (
        "PRESETS = {'scene': {'bath_size': 3}}"
    ),
}
LOSS = "def loss(self, params, batch, key):\n        "
METHODS = {
    "create": ("@classmethod\n    def create(cls, key, example, config):\n        return 3 / 0", "ZeroDivisionError"),
    "loss": ("def loss(self, params, batch, key):\n        return batch['actions'].nothing, {}", "AttributeError"),
    "loss ": (
        "def loss(self, params, batch, key):\n        return batch['actions'], {}",
        r"it returned \(\[2, 2\], \{\}\)",
    ),
    "loss  ": (
        "def loss(self, params, batch, key):\n        return batch['actions'].sum()",
        r"it returned \[\]; it has",
    ),
    "loss   ": ("def loss(self, params, key):\n        return 0, {}", "positional arguments"),
    "loss    ": (
        "def loss(self, params, batch, key):\n        x = params['flow']\n"
        "        return self.apply('value', x, params=x), {}",
        "KeyError: 'value'",
    ),
    "update": ("def update(self, batch):\n        return self.replace(step=self.step + 0.5), {}", "the same names"),
    "sample_actions": (
        "def sample_actions(self, observations, key):\n        return jnp.zeros(3)",
        r"it returned \[3\]; it has to return actions \[2\] for one observation",
    ),
}


def load(tmp_path: Path, text: str):
    path = tmp_path / "own.py"
    path.write_text(START + text + "\n")
    return load_agent(str(path))


@pytest.mark.check
@pytest.mark.parametrize("message", MODULE)
def test_what_a_file_defines(message, tmp_path):
    with pytest.raises(UserError, match=message):
        resolve_config(load(tmp_path, MODULE[message]), "scene", "paper", {})


@pytest.mark.check
@pytest.mark.parametrize("name", METHODS)
def test_what_its_agent_does(name, tmp_path):
    code, message = METHODS[name]
    module = load(tmp_path, f"class Agent(bc.Agent):\n    {code}")
    with pytest.raises(UserError) as told:
        check(module)
    line = str(told.value)
    assert re.match(rf"{name.strip()}\(\) of agent file own.py failed at .*own.py, line \d+: ", line), line
    assert re.search(message, line) and "it has to return" in line and "(traceback: " in line and "\n" not in line


def check(module):
    config = module.get_config()
    config.update({"actor_hidden_dims": (4,), "batch_size": 4})
    rows = {"observations": 3, "next_observations": 3, "actions": 2, "action_mask": 2}
    example = {name: np.zeros((5, width), np.float32) for name, width in rows.items()}
    example |= {name: np.zeros(5, np.float32) for name in ("rewards", "masks", "valid")}
    check_agent(module, ml_collections.ConfigDict(config), example, "own.py")


@pytest.mark.check
def test_a_good_one_passes_and_imports_its_neighbours(tmp_path):
    (tmp_path / "my_losses.py").write_text("SCALE = 2")
    (tmp_path / "utils.py").write_text("raise ImportError('this is not the project')")
    check(load(tmp_path, "import my_losses\nfrom utils import flow\nassert my_losses.SCALE == 2"))


@pytest.mark.check
def test_a_directory_is_searched_last_and_once(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path.copy())
    for spelling in (tmp_path, tmp_path / "x" / ".."):
        find_modules_in(spelling)
    assert sys.path[-1] == str(tmp_path) and sys.path.count(str(tmp_path)) == 1


@pytest.mark.check
def test_a_file_whose_name_is_not_a_python_files_is_refused(tmp_path):
    path = tmp_path / "own.txt"
    path.write_text(START)
    with pytest.raises(UserError, match=r"^agent file .*own\.txt does not import: its name must end in \.py$"):
        load_agent(str(path))
