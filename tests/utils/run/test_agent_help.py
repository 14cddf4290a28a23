"""Help on agents' settings: each has one line of meaning, stated in its agent's file."""

import pytest

from agents import AGENTS
from utils.run.agent_files import load_agent
from utils.run.agent_help import meanings, settings_help

pytestmark = pytest.mark.check
SCENE = "scene-play-singletask-task1-v0"


def rows(text):
    """Returns setting → the rest of its line."""
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line.startswith("--agent.")]
    return {name.removeprefix("--agent."): rest for name, rest in lines}


@pytest.mark.parametrize("name", AGENTS)
def test_every_setting_has_a_meaning(name):
    module = load_agent(f"agents/{name}.py")
    config, about = module.get_config(), meanings(module)
    assert all(about.get(field) and "\n" not in about[field] for field in config), name
    own = getattr(module, "SETTINGS", {})
    assert set(own) <= set(config) and all(config[field] == default for field, (default, _) in own.items())
    assert all(about[field] == meaning for field, (_, meaning) in own.items())


def test_alpha_is_what_it_is_to_the_agent():
    otql, fql, qsm = (meanings(load_agent(f"agents/{name}.py"))["alpha"] for name in ("otql", "fql", "qsm"))
    assert "cost" in otql and "distillation" in fql and "data" in qsm


def test_default_and_preset():
    table = rows(settings_help("agents/otql.py", SCENE, "paper"))
    assert table["lam"].split()[:2] == ["1.0", "0.4"] and table["best_of_n"].split()[:2] == ["1", "5"]
    assert table["alpha"].split()[:2] == ["0.3", "α,"]  # The preset gives none.
    assert table["actor_hidden_dims"].startswith("512,512,512,512  ")
    assert rows(settings_help("agents/otql.py", SCENE, "none"))["lam"].split()[:2] == ["1.0", "λ,"]
    assert rows(settings_help("agents/fql.py", SCENE, "cpu"))["lr"].split()[:2] == ["0.0003", "0.001"]


def test_agents_of_users_need_no_meanings(tmp_path):
    """Shared settings have the base's, those of an agent that is extended its own."""
    path = tmp_path / "own.py"
    text = "from agents import base, otql\nclass Agent(otql.Agent):\n    pass\nPRESETS, SETTINGS = {}, [1]\n"
    text += "def get_config():\n    config = otql.get_config()\n    config.delta = 1.5\n    return config\n"
    path.write_text(text)
    table = rows(settings_help(str(path), SCENE, "paper"))
    assert table["delta"] == "1.5" and "Polyak" in table["tau"] and "cost" in table["alpha"]
    path.write_text(text.replace("[1]", "{'delta': (1.5, 'of the Huber loss'), 'lam': 2}"))
    assert "of the Huber loss" in settings_help(str(path), SCENE, "paper")
