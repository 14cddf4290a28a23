"""The rounds of an adaptation, with otql-rollout on the simulated robot."""

import contextlib
import copy
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from absl import flags
from lerobot_env_otql.demonstrate import main as demonstrate
from recordings import write_recording
from tiny_runs import refused, run_main

from real import adapt
from real.adapt import episode_success, recorded
from real.dataset import read_recording
from real.import_rollouts import import_rollouts
from utils.errors import UserError
from utils.output.loggers import read_csv
from utils.run.agent_config import resolve_config
from utils.run.agent_files import load_agent
from utils.run.loading import load_run
from utils.system.signals import run_program

NETWORKS = ("--agent.actor_hidden_dims=(8,8)", "--agent.value_hidden_dims=(8,8)", "--agent.batch_size=8")


@pytest.fixture(autouse=True)
def defaults() -> Iterator[None]:
    """Flags of one call are not those of the next."""
    values = adapt.FLAGS
    yield
    for name in values:
        values[name].unparse()


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """An adaptation of one round of two rollouts, and one at the end."""
    return [
        *(sys.executable, "-m", "real.adapt", "--name=pick", f"--demos={tmp_path / 'demos'}", *NETWORKS, "--fps=10"),
        *(
            f"--output_dir={tmp_path / 'out'}",
            "--robot=--robot.type=otql_sim --robot.max_steps=24 --robot.seed={round}",
        ),
        *(f"--rollout={Path(sys.executable).with_name('otql-rollout')}", "--rollouts=2", "--total_rollouts=2"),
        *("--final_rollouts=1", "--base_steps=3", "--round_steps=2"),
        *("--rollout_flags=--fps=1000", "--episode_time_s=60", "--state_norm=none", "--action_norm=none"),
    ]


def run(command: list[str]) -> str:
    """real.adapt in this process."""
    return run_main(*command[3:], program=adapt).out


def test_person_and_program_take_turns(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call stops at the next recording, whose command works as printed; unattended, nothing stops it."""
    root = tmp_path / "out" / "pick"
    monkeypatch.setattr(sys, "argv", ["demonstrate", f"--root={tmp_path / 'demos'}", "--episodes=2"])
    demonstrate()
    for name, policy, seed, episodes in (("round1", "base", 1, 2), ("final", "round1", 2, 1)):
        (line,) = (line for line in run(command).splitlines() if "--policy.path=" in line)
        assert f"--policy.path={root / 'policies' / policy}" in line and f"--robot.seed={seed}" in line
        subprocess.run(shlex.split(line), check=True, capture_output=True)
        assert recorded(root / "rollouts" / name) == episodes
    assert "adapted:" in run(command)
    table = read_csv(root / "eval.csv")
    assert list(table["step"]) == [0, 2] and list(table["episodes"]) == [2, 1]
    assert list(table["success_rate"]) == [0, 0]  # Within 24 steps nothing is opened.
    assert (root / "adaptation.png").stat().st_size > 1000

    with np.load(root / "round1.npz") as last, np.load(root / "demos.npz") as first:
        assert len(last["rewards"]) == len(first["rewards"]) + 48 and last["terminals"].sum() == 2
        np.testing.assert_array_equal(last["state_offset"], first["state_offset"])
    settings = load_run(root / "runs" / "round1" / "robot_pick" / "otql" / "sd0")[1]
    assert settings["dataset"]["start"]["agent"] == "bc" and settings["dataset"]["start"]["step"] == 3
    config = json.loads((root / "policies" / "round1" / "config.json").read_text())
    assert config["fps"] == 10 and config["robot_type"] == "otql_sim" and len(config["state_names"]) == 36

    assert "--round_steps=2, not 3" in refused(*command[3:], "--round_steps=3", program=adapt)

    other = [flag.replace(str(tmp_path / "out"), str(tmp_path / "unattended")) for flag in command]
    run([*other, "--unattended"])
    assert recorded(tmp_path / "unattended" / "pick" / "rollouts" / "final") == 1
    weights = [
        folder / "pick/policies/base/model.safetensors" for folder in (tmp_path / "out", tmp_path / "unattended")
    ]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.parametrize(("fps", "max_steps"), [(30, 200), (30, 150), (10, 1), (60, 149)])
def test_episodes_have_the_frames_that_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fps: int, max_steps: int
) -> None:
    """By LeRobot's clock, which it reads after each frame, a moment late."""
    values = copy.deepcopy(adapt.FLAGS)
    values(["real.adapt", "--robot=--robot.type=arm", f"--fps={fps}", f"--max_steps={max_steps}"])
    monkeypatch.setattr(adapt, "FLAGS", values)
    command = adapt.rollout_command(tmp_path / "policy", tmp_path / "round1", 2, 1)
    given = dict(word.removeprefix("--").partition("=")[::2] for word in command[1:])
    frames, clock = 0, 0.0
    while clock < float(given["dataset.episode_time_s"]):
        frames += 1
        clock = frames / fps + 1e-3
    assert frames == max_steps


def test_successes_behind_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Are refused, of rollouts as of demonstrations: the import would count them as failures."""
    monkeypatch.setattr("real.adapt.FLAGS", SimpleNamespace(max_steps=24))
    write_recording(tmp_path / "r", (24, 25, 25), success=(True, True, False))
    recording = read_recording(tmp_path / "r", ["observation.state"], "action")
    with pytest.raises(UserError, match=r"episode 1 of .* succeeds after --max_steps=24 frames.*: advice"):
        episode_success(recording, "advice")
    monkeypatch.setattr("real.adapt.FLAGS", SimpleNamespace(max_steps=25))
    assert episode_success(recording, "advice") == [True, True, False]


OWN = """
from agents.otql import PRESETS, get_config
from agents import otql

class Agent(otql.Agent):
    def propose(self, observations, key):
        return super().propose(observations, key) / 2
"""


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (["--name=pick/cube"], "'robot:' needs a name of letters"),
        (["--rollout="], "--rollout is missing"),
        (["--rollout=no-such-program", "--unattended"], "no program no-such-program"),
        (["--agent=agents/qsm.py"], "has no flow to warm-start from the base"),
        (["--agent=own.py"], "acts by a propose of its own, which the LeRobot policy has not"),
        (["--max_steps=3"], "episode 0 of .* succeeds after --max_steps=3 frames"),
        ([], None),
    ],
)
def test_mistakes_are_noticed_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: list[str], says: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(OWN)
    write_recording(tmp_path / "r", (4,))
    values = copy.deepcopy(adapt.FLAGS)
    values(["real.adapt", "--robot=--robot.type=arm", *changed])
    monkeypatch.setattr(adapt, "FLAGS", values)
    recording = read_recording(tmp_path / "r", ["observation.state"], "action")
    config, _, _ = resolve_config(load_agent(values.agent), "robot", "paper", {})
    with pytest.raises(UserError, match=says) if says else contextlib.nullcontext():
        adapt.check_settings(recording, config)


@pytest.mark.parametrize(("code", "error"), [(2, SystemExit), (3, UserError)])
def test_a_program_that_has_said_why_has_the_last_word(code: int, error: type[BaseException]) -> None:
    with pytest.raises(error) as ended:
        run_program([sys.executable, "-c", f"raise SystemExit({code})"], "it")
    assert error is UserError or ended.value.code == 2


BEGUN = {"agent": "agents/otql.py", "rollouts": 10, "total_rollouts": 50, "final_rollouts": 0, "agent.dims": (8, 8)}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, None),
        ({"total_rollouts": 60, "final_rollouts": 20}, None),
        ({"rollouts": 5}, "--rollouts=10, not 5"),
        ({"total_rollouts": 40}, "--total_rollouts=50, not 40"),
        ({"agent.dims": (8, 9)}, r"--agent.dims=\[8, 8\], not \[8, 9\]"),
        ({"agent.lam": 0.5}, "--agent.lam=None, not 0.5"),
    ],
)
def test_an_adaptation_goes_on_with_its_own_settings(tmp_path: Path, change: dict, says: str | None) -> None:
    """As do older ones, which know none."""
    adapt.check_settings_unchanged(tmp_path, BEGUN)
    if says is None:
        adapt.check_settings_unchanged(tmp_path, BEGUN | change)
        assert (
            json.loads((tmp_path / "adaptation.json").read_text())["total_rollouts"]
            == (BEGUN | change)["total_rollouts"]
        )
        return
    with pytest.raises(UserError, match=f"was started with {says}"):
        adapt.check_settings_unchanged(tmp_path, BEGUN | change)
    adapt.check_settings_unchanged(tmp_path, BEGUN)


def test_a_number_that_an_older_adaptation_lacks_is_another_setting(tmp_path: Path) -> None:
    adapt.check_settings_unchanged(tmp_path, {name: value for name, value in BEGUN.items() if name != "final_rollouts"})
    with pytest.raises(UserError, match=r"started with --final_rollouts=None, not 7; use that"):
        adapt.check_settings_unchanged(tmp_path, BEGUN | {"final_rollouts": 7})


def test_rounds_are_added_to_whole_ones_only(tmp_path: Path) -> None:
    """And not where another policy's last rollouts are there."""
    adapt.check_settings_unchanged(tmp_path / "part", BEGUN | {"total_rollouts": 45})
    with pytest.raises(UserError, match=r"--total_rollouts=45 \(its last round is incomplete\)"):
        adapt.check_settings_unchanged(tmp_path / "part", BEGUN)
    adapt.check_settings_unchanged(tmp_path, BEGUN)
    (tmp_path / "rollouts" / "final").mkdir(parents=True)
    with pytest.raises(UserError, match=r"final exists"):
        adapt.check_settings_unchanged(tmp_path, BEGUN | {"total_rollouts": 60})


@pytest.mark.parametrize("flag", ["--action_norm=mean_std", "--state_norm=mean-std"])
def test_normalisation_that_there_is_not(tmp_path: Path, flag: str) -> None:
    """Neither on the command line nor in the import."""
    with pytest.raises(flags.Error, match="should be one of"):
        copy.deepcopy(adapt.FLAGS)(["real.adapt", flag])
    name, _, value = flag.removeprefix("--").partition("=")
    with pytest.raises(UserError, match=f"{name} is {value}; use one of .*min_max, none"):
        import_rollouts([tmp_path / "r"], tmp_path / "a.npz", **{name: value})


def test_refusals(command: list[str], tmp_path: Path) -> None:
    for changed, says in [
        (["--demos="], "--demos is missing"),
        (["--robot="], "--robot is missing"),
        ([f"--demos={tmp_path / 'none'}"], "no LeRobotDataset"),
    ]:
        assert says in refused(*command[3:], *changed, program=adapt)
