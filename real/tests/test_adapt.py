"""The rounds of an adaptation, with a program in LeRobot's place that writes recordings at once."""

import contextlib
import copy
import json
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from absl import flags
from recordings import write_recording

from real import adapt
from real.adapt import episode_success, recorded
from real.import_rollouts import import_rollouts
from real.lerobot_dataset import read_recording
from utils.errors import UserError
from utils.output.loggers import read_csv
from utils.run.agent_config import resolve_config
from utils.run.agent_files import load_agent
from utils.run.loading import load_run
from utils.system.cli import last_of_each
from utils.system.files import ROOT
from utils.system.signals import run_program

RECORD = """
import json, sys
from pathlib import Path
sys.path[:0] = [{tests!r}]
from recordings import write_recording
given = dict(argument.removeprefix("--").partition("=")[::2] for argument in sys.argv[1:])
root, episodes = Path(given["dataset.root"]), int(given["dataset.num_episodes"])
assert Path(given["policy.path"], "model.safetensors").is_file() and root.name.startswith("eval_")
write_recording(root, (24,) * episodes, seed=int(given["robot.seed"]))
lines = [json.dumps(dict(episode_index=i, success=i % 2 == 0, steps=24)) for i in range(episodes)]
(root / "labels.jsonl").write_text("\\n".join(lines) + "\\n")
"""
NETWORKS = ("--agent.actor_hidden_dims=(8,8)", "--agent.value_hidden_dims=(8,8)", "--agent.batch_size=8")


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """An adaptation of two rounds of two rollouts, and three at the end."""
    program = tmp_path / "record.py"
    program.write_text(RECORD.format(tests=str(Path(__file__).parent)))
    write_recording(tmp_path / "demos", (24, 24))
    return [
        *(sys.executable, "-m", "real.adapt", "--name=pick", f"--demos={tmp_path / 'demos'}", *NETWORKS),
        *(f"--output_dir={tmp_path / 'out'}", "--robot=--robot.type=arm --robot.seed={round}"),
        *(f"--record={sys.executable} {program}", "--rollouts=2", "--total_rollouts=4", "--final_rollouts=3"),
        *("--base_steps=3", "--round_steps=2"),
    ]


def run(command: list[str]) -> str:
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def test_person_and_program_take_turns(command: list[str], tmp_path: Path) -> None:
    """Each call stops at the next recording, whose command works as printed, and the end is the unattended run's."""
    root = tmp_path / "out" / "pick"
    for number, name in enumerate(("eval_round1", "eval_round2", "eval_final")):
        text = run(command)
        (line,) = (line for line in text.splitlines() if "--policy.path=" in line)
        policy = "base" if number == 0 else f"round{number}"
        assert f"--policy.path={root / 'policies' / policy}" in line and f"--robot.seed={number + 1}" in line
        assert "finished" not in run(command)  # Nothing is trained twice.
        subprocess.run(shlex.split(line), check=True)
        assert recorded(root / "rollouts" / name) == (3 if name == "eval_final" else 2)
    assert "adapted:" in run(command)
    table = read_csv(root / "eval.csv")
    assert list(table["step"]) == [0, 2, 4] and list(table["episodes"]) == [2, 2, 3]
    assert np.allclose(table["success_rate"], [0.5, 0.5, 2 / 3])
    assert (root / "adaptation.png").stat().st_size > 1000

    with np.load(root / "round2.npz") as last, np.load(root / "demos.npz") as first:
        assert len(last["rewards"]) == 6 * 24 and last["terminals"].sum() == 4
        np.testing.assert_array_equal(last["state_offset"], first["state_offset"])
    labels = [json.loads(line) for line in (tmp_path / "demos" / "labels.jsonl").read_text().splitlines()]
    assert [label["success"] for label in labels] == [True, True]
    settings = [load_run(root / "runs" / f"round{i}" / "robot_pick" / "otql" / "sd0")[1] for i in (1, 2)]
    assert [one["dataset"]["start"]["agent"] for one in settings] == ["bc", "otql"]
    assert [one["dataset"]["start"]["step"] for one in settings] == [3, 2]

    refused = subprocess.run(last_of_each([*command, "--round_steps=3"]), cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 2 and "--round_steps=2, not 3" in refused.stderr, refused.stderr

    other = [flag.replace(str(tmp_path / "out"), str(tmp_path / "unattended")) for flag in command]
    run([*other, "--unattended"])
    same = ["eval.csv", "round2.npz", "policies/round2/model.safetensors"]
    for name in same:
        assert (root / name).read_bytes() == (tmp_path / "unattended" / "pick" / name).read_bytes(), name


@pytest.mark.parametrize(("fps", "max_steps"), [(30, 200), (30, 150), (10, 1), (60, 149)])
def test_episodes_have_the_frames_that_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fps: int, max_steps: int
) -> None:
    """By LeRobot's clock, which it reads after each frame, a moment late."""
    values = copy.deepcopy(adapt.FLAGS)
    values(["real.adapt", "--robot=--robot.type=arm", f"--fps={fps}", f"--max_steps={max_steps}"])
    monkeypatch.setattr(adapt, "FLAGS", values)
    command = adapt.record_command(tmp_path / "policy", tmp_path / "eval_round1", 2, 1)
    given = dict(word.removeprefix("--").partition("=")[::2] for word in command[1:])
    frames, clock = 0, 0.0
    while clock < float(given["dataset.episode_time_s"]):
        frames += 1
        clock = frames / fps + 1e-3
    assert frames == max_steps


def test_successes_behind_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Are refused, of rollouts as of demonstrations: the import would count them as failures."""
    monkeypatch.setattr("real.adapt.FLAGS", SimpleNamespace(max_steps=24))
    write_recording(tmp_path / "r", (24, 25, 25))
    labels = [{"episode_index": i, "success": i < 2} for i in range(3)]
    (tmp_path / "r" / "labels.jsonl").write_text("".join(json.dumps(label) + "\n" for label in labels))
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
        (["--record="], "--record is missing"),
        (["--record=no-such-program", "--unattended"], "no program no-such-program"),
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
    (tmp_path / "r" / "labels.jsonl").write_text('{"episode_index": 0, "success": true}\n')
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
    (tmp_path / "rollouts" / "eval_final").mkdir(parents=True)
    with pytest.raises(UserError, match=r"eval_final exists"):
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
        (["--agent.lam=x"], "lam"),
        (["--features=observation.images"], "observation.images"),
    ]:
        outcome = subprocess.run([*command, *changed], cwd=ROOT, capture_output=True, text=True)
        assert outcome.returncode == 2 and says in outcome.stderr and outcome.stderr.count("\n") == 1, outcome
