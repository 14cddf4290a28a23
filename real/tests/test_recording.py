"""lerobot-record with the project's robot and teleoperators, run in this process unless said otherwise."""

import builtins
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import gymnasium
import numpy as np
import pytest
import torch
from lerobot.robots import Robot, RobotConfig, robot
from lerobot.scripts import lerobot_record
from lerobot.teleoperators import teleoperator
from lerobot_robot_otql_sim import OtqlExpertConfig, OtqlSimConfig
from lerobot_teleoperator_otql_reset import OtqlResetConfig

from envs.gym_data import read_gym_dataset
from envs.panda.experts import EXPERTS
from real.import_rollouts import import_rollouts
from real.lerobot_files import read_recording

TASK = "OpenMicrowave-v0"


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A command line without arguments, no keyboard, calibrations elsewhere than at home."""
    monkeypatch.setattr(sys, "argv", ["lerobot-record"])
    for module in (robot, teleoperator):
        monkeypatch.setattr(module, "HF_LEROBOT_CALIBRATION", tmp_path)
    monkeypatch.setattr(lerobot_record, "is_headless", lambda: True)
    events = {"exit_early": False, "rerecord_episode": False, "stop_recording": False}
    monkeypatch.setattr(lerobot_record, "init_keyboard_listener", lambda: (None, dict(events)))


def record(root: Path, robot: RobotConfig, teleop: Any = None, policy: Any = None, **settings: Any) -> None:
    """lerobot-record, at 1000 frames a second."""
    resume = settings.pop("resume", False)
    defaults = {"fps": 1000, "num_episodes": 2, "push_to_hub": False, "single_task": "open"}
    name = "test/eval_it" if policy else "test/it"
    dataset = lerobot_record.DatasetRecordConfig(repo_id=name, root=root, **(defaults | settings))
    config = lerobot_record.RecordConfig(
        robot=robot, dataset=dataset, teleop=teleop or OtqlExpertConfig(), play_sounds=False, resume=resume
    )
    config.policy, config.teleop = policy, teleop
    lerobot_record.record(config)


def labels_of(root: Path) -> list[dict[str, Any]]:
    path = root / "labels.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def simulate(
    index: int, attempt: int = 0, seed: int = 0, max_steps: int | None = None, tremor: float = 1.0
) -> dict[str, np.ndarray]:
    """An episode of the expert as envs.panda.demonstrate makes it: states [T + 1], actions, rewards, success."""
    env = gymnasium.make(TASK, max_steps=max_steps).unwrapped
    words = np.random.SeedSequence(entropy=seed, spawn_key=(index, attempt)).generate_state(2)
    state, _ = env.reset(seed=int(words[0]))
    actions = EXPERTS[TASK](env, np.random.default_rng(int(words[1])), tremor).actions()
    states, taken, rewards, ended = [state], [], [], False
    while not ended:
        taken.append(next(actions).astype(np.float32))
        state, reward, success, truncated, _ = env.step(taken[-1])
        states.append(state)
        rewards.append(reward)
        ended = success or truncated
    return {"states": np.array(states), "actions": np.array(taken), "rewards": np.array(rewards), "success": success}


@pytest.mark.slow
def test_unattended_command_and_import(tmp_path: Path) -> None:
    root = tmp_path / "demonstrations"
    command = [
        *(str(Path(sys.executable).with_name("lerobot-record")), "--robot.type=otql_sim", f"--robot.task={TASK}"),
        *("--teleop.type=otql_expert", "--teleop.tremor=2", f"--dataset.root={root}"),
        *("--dataset.repo_id=local/demonstrations", "--dataset.single_task=open the microwave"),
        *("--dataset.num_episodes=3", "--dataset.fps=100", "--dataset.push_to_hub=false", "--play_sounds=false"),
    ]
    environment = os.environ | {"HF_LEROBOT_HOME": str(tmp_path)}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=tmp_path, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr[-2000:]
    episodes = [simulate(index, tremor=2.0) for index in range(3)]
    assert labels_of(root) == [
        {"episode_index": i, "success": bool(episode["success"]), "steps": len(episode["actions"])}
        for i, episode in enumerate(episodes)
    ]
    import_rollouts([root], tmp_path / "d.npz", state_norm="none", action_norm="none")
    data = read_gym_dataset(tmp_path / "d.npz", 36, 4)
    rows = np.flatnonzero(data["terminals"] == 0)
    assert all(episode["success"] for episode in episodes)
    np.testing.assert_array_equal(data["observations"][rows], np.concatenate([e["states"][:-1] for e in episodes]))
    np.testing.assert_array_equal(data["actions"][rows], np.concatenate([e["actions"] for e in episodes]))
    np.testing.assert_array_equal(data["rewards"][rows], np.concatenate([e["rewards"] for e in episodes]))
    np.testing.assert_array_equal(data["masks"][rows], data["rewards"][rows] != 0)


@pytest.mark.slow
def test_plugins_are_found_without_jax(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "sys.modules |= dict.fromkeys(('jax', 'jaxlib'))  # As if they were not installed.\n"
        "from lerobot.utils.import_utils import register_third_party_plugins\n"
        "register_third_party_plugins()\n"
        "from lerobot.robots import RobotConfig, make_robot_from_config\n"
        "from lerobot.teleoperators import TeleoperatorConfig, make_teleoperator_from_config\n"
        "robot = make_robot_from_config(RobotConfig.get_choice_class('otql_sim')(task='ArrangeBoxes-v0'))\n"
        "assert 'mujoco' not in sys.modules\n"
        "robot.connect()\n"
        "assert list(robot.get_observation()) == list(robot.observation_features)\n"
        "ones = dict.fromkeys(robot.action_features, 1.0)\n"
        "assert robot.send_action(dict.fromkeys(robot.action_features, 2.0)) == ones\n"
        "robot.disconnect()\n"
        "names = ('otql_reset', 'otql_expert')\n"
        "print([make_teleoperator_from_config(TeleoperatorConfig.get_choice_class(name)()).name for name in names])\n"
    )
    environment = os.environ | {"HF_LEROBOT_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.splitlines()[-1:] == ["['otql_reset', 'otql_expert']"], done.stderr


def test_failures_are_recorded_again(tmp_path: Path) -> None:
    robot = OtqlSimConfig(task=TASK, max_steps=80, only_successes=True)
    record(tmp_path / "r", robot, OtqlExpertConfig())
    first = [simulate(0, max_steps=80)]
    attempts = [simulate(1, attempt, max_steps=80) for attempt in range(5)]
    assert first[0]["success"] and not attempts[0]["success"]
    expected = [*first, next(attempt for attempt in attempts if attempt["success"])]
    recording = read_recording(tmp_path / "r", ["observation.state"], "action")
    for episode, simulated in zip(recording.episodes, expected, strict=True):
        np.testing.assert_array_equal(episode.states, simulated["states"][:-1])
    assert [label["success"] for label in labels_of(tmp_path / "r")] == [True, True]


def test_resumed_recording_goes_on_with_the_next_episode(tmp_path: Path) -> None:
    robot = OtqlSimConfig(task=TASK, max_steps=5)
    record(tmp_path / "r", robot, OtqlExpertConfig(), num_episodes=1)
    record(tmp_path / "r", robot, OtqlExpertConfig(), num_episodes=1, resume=True)
    recording = read_recording(tmp_path / "r", ["observation.state"], "action")
    for index, episode in enumerate(recording.episodes):
        np.testing.assert_array_equal(episode.actions, simulate(index, max_steps=5)["actions"])
    assert [label["episode_index"] for label in labels_of(tmp_path / "r")] == [0, 1]


@pytest.mark.parametrize("reset_time_s", [60, 0])
def test_lerobots_clock_ends_an_episode(tmp_path: Path, reset_time_s: int, caplog: pytest.LogCaptureFixture) -> None:
    times = {"episode_time_s": 0.1, "reset_time_s": reset_time_s}
    record(tmp_path / "r", OtqlSimConfig(task=TASK), OtqlExpertConfig(), **times)
    recording = read_recording(tmp_path / "r", ["observation.state"], "action")
    assert len(recording.episodes) == 2
    for index, (episode, label) in enumerate(zip(recording.episodes, labels_of(tmp_path / "r"), strict=True)):
        steps = len(episode.actions)
        assert label == {"episode_index": index, "success": False, "steps": steps} and steps < 50
        np.testing.assert_array_equal(episode.states, simulate(index)["states"][:steps])


def fake_policy(monkeypatch: pytest.MonkeyPatch, width: int) -> SimpleNamespace:
    """A policy whose action is 0.25 everywhere; returns its configuration."""
    config = SimpleNamespace(type="fake", device="cpu", use_amp=False, pretrained_path=None)
    policy = SimpleNamespace(config=config, reset=lambda: None, select_action=lambda _: torch.full((1, width), 0.25))

    class Identity:
        def __call__(self, what: Any) -> Any:
            return what

        def reset(self) -> None: ...

    monkeypatch.setattr(lerobot_record, "make_policy", lambda *_, **__: policy)
    monkeypatch.setattr(lerobot_record, "make_pre_post_processors", lambda *_, **__: (Identity(), Identity()))
    return config


@pytest.mark.parametrize("teleop", [None, OtqlResetConfig()])
def test_policy_on_the_simulated_robot_needs_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, teleop: OtqlResetConfig | None
) -> None:
    policy = fake_policy(monkeypatch, 4)
    record(tmp_path / "r", OtqlSimConfig(task=TASK, max_steps=7), teleop, policy, num_episodes=3)
    recording = read_recording(tmp_path / "r", ["observation.state"], "action")
    assert [len(episode.actions) for episode in recording.episodes] == [7, 7, 7]
    for index, episode in enumerate(recording.episodes):
        np.testing.assert_array_equal(episode.actions, 0.25)
        np.testing.assert_array_equal(episode.states[0], simulate(index, max_steps=1)["states"][0])
    assert [label["success"] for label in labels_of(tmp_path / "r")] == [False] * 3


@RobotConfig.register_subclass("otql_test_arm")
@dataclasses.dataclass
class ArmConfig(RobotConfig):
    observed: str = "joint.pos"


class Arm(Robot):
    """A robot of one joint that goes where it is sent."""

    config_class, name = ArmConfig, "otql_test_arm"
    cameras: dict = {}
    is_calibrated = is_connected = True
    action_features = {"joint.pos": float}
    sent: list[float] = []

    @property
    def observation_features(self) -> dict[str, type]:
        return {self.config.observed: float}

    def __init__(self, config: ArmConfig):
        super().__init__(config)
        self.config, self.position = config, 0.0
        Arm.sent = []

    def get_observation(self) -> dict[str, float]:
        return {self.config.observed: self.position}

    def send_action(self, action: dict[str, float]) -> dict[str, float]:
        self.position = action["joint.pos"] + 1  # It never comes to rest quite where it is sent.
        self.sent.append(action["joint.pos"])
        return action

    def connect(self, calibrate: bool = True) -> None: ...
    def disconnect(self) -> None: ...
    def calibrate(self) -> None: ...
    def configure(self) -> None: ...


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What the person at the terminal answers, to be filled by the test; all of it must be asked for."""
    given: list[str] = []
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(builtins, "input", lambda question: given.pop(0))
    yield given
    assert not given


def test_person_resets_a_real_robot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: list[str]) -> None:
    answers += ["y", "", "perhaps", "r", "", "n", "", "y"]  # Episode 0, 1 (thrown away), 1, 2.
    policy = fake_policy(monkeypatch, 1)
    times = {"episode_time_s": 0.05, "num_episodes": 3, "fps": 100}
    record(tmp_path / "r", ArmConfig(), OtqlResetConfig(), policy, **times)
    assert [label["success"] for label in labels_of(tmp_path / "r")] == [True, False, True]
    assert Arm.sent.count(1.25) == 3  # Where it stood, at each of the three resets.
    line = import_rollouts([tmp_path / "r"], tmp_path / "a.npz")
    assert "3 episodes, 2 solved" in line


@pytest.mark.parametrize("when", ["episode", "reset"])
def test_label_is_of_the_try_that_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: list[str], when: str
) -> None:
    """Also if ← throws the first try of the last episode away, or of one whose second try Esc makes the last."""
    events = {"exit_early": False, "rerecord_episode": False, "stop_recording": False}
    monkeypatch.setattr(lerobot_record, "init_keyboard_listener", lambda: (None, events))
    policy, tries = fake_policy(monkeypatch, 1), []

    def press_back(*_: Any) -> torch.Tensor:
        """The first try's ← is pressed while it runs, or at the second question that follows; then comes Esc."""
        if when == "episode" and not tries:
            tries.append(events.update(rerecord_episode=True, exit_early=True))
        if when == "reset" and tries:
            events.update(stop_recording=True, exit_early=True)
        return torch.zeros(1, 1)

    def answer(_: str) -> str:
        if when == "reset" and answers == ["", "n"]:
            tries.append(events.update(rerecord_episode=True))
        return answers.pop(0)

    monkeypatch.setattr(builtins, "input", answer)
    monkeypatch.setattr(lerobot_record.make_policy(), "select_action", press_back)
    answers += ["", "n"] if when == "episode" else ["y", "", "n"]
    episodes = 1 if when == "episode" else 2
    times = {"episode_time_s": 0.03, "num_episodes": episodes, "fps": 100}
    record(tmp_path / "r", ArmConfig(), OtqlResetConfig(), policy, **times)
    assert [label["success"] for label in labels_of(tmp_path / "r")] == [False]


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, EOFError])
@pytest.mark.parametrize(
    ("given", "success"), [(["y", None], [True]), ([None, "n"], [False]), ([None, None], []), (["r", None], [])]
)
def test_interrupted_questions_end_the_recording(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: list, success: list[bool], interrupt: type[BaseException]
) -> None:
    """What is recorded is saved, what is answered kept; only what `r` throws away is lost."""
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    replies = iter([interrupt if answer is None else answer for answer in given])
    monkeypatch.setattr(builtins, "input", Mock(side_effect=replies))
    policy = fake_policy(monkeypatch, 1)
    record(tmp_path / "r", ArmConfig(), OtqlResetConfig(), policy, episode_time_s=0.03, fps=100)
    assert [label["success"] for label in labels_of(tmp_path / "r")] == success
    assert json.loads((tmp_path / "r/meta/info.json").read_text())["total_episodes"] == (given[0] != "r")
    assert next(replies, None) is None


def test_resets_longer_than_lerobots_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: list[str]) -> None:
    """End by it; a flag beside it would end the next episode before its first frame."""
    answers += ["y", "", "y", "", "y"]
    monkeypatch.setattr(builtins, "input", lambda _: time.sleep(0.03) or answers.pop(0))
    policy = fake_policy(monkeypatch, 1)
    times = {"episode_time_s": 0.05, "reset_time_s": 0.04, "num_episodes": 3, "fps": 100}
    record(tmp_path / "r", ArmConfig(), OtqlResetConfig(), policy, **times)
    assert len(labels_of(tmp_path / "r")) == 3 and Arm.sent.count(1.25) == 2


def test_reset_without_questions_on_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: list[str]
) -> None:
    answers += [""]
    policy = fake_policy(monkeypatch, 1)
    teleop = OtqlResetConfig(ask=False, hold={"joint.pos": -3.0})
    record(tmp_path / "r", ArmConfig(observed="angle"), teleop, policy, episode_time_s=0.05)
    assert -3.0 in Arm.sent and not (tmp_path / "r/labels.jsonl").exists()


@pytest.mark.parametrize(
    ("robot", "teleop", "terminal", "message"),
    [
        (
            {"task": "Fold-v0"},
            OtqlExpertConfig(),
            True,
            "there is no task 'Fold-v0'; use --robot.task=ArrangeBoxes-v0 or",
        ),
        ({}, OtqlExpertConfig(tremor=-1.0), True, "give --teleop.tremor a number of at least 0"),
        ({"max_steps": 0}, OtqlExpertConfig(), True, "--robot.max_steps at least 1"),
        (None, OtqlExpertConfig(), True, "otql_expert acts in lerobot-record on --robot.type=otql_sim only"),
        ({}, OtqlResetConfig(), True, "otql_reset only resets; name what acts by --policy.path"),
        (None, OtqlResetConfig(), False, "otql_reset asks at the terminal, and there is none"),
        ({"observed": "angle"}, OtqlResetConfig(), True, "keeps otql_test_arm still ('joint.pos' is not observed)"),
    ],
)
def test_mistakes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    robot: dict | None,
    teleop: Any,
    terminal: bool,
    message: str,
) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: terminal, raising=False)
    arm = robot is None or "observed" in robot
    config = (ArmConfig if arm else OtqlSimConfig)(**(robot or {}))
    policy = fake_policy(monkeypatch, 1) if arm else None
    with pytest.raises(SystemExit) as ended:
        record(tmp_path / "r", config, teleop, policy)
    assert ended.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0]


def test_outside_lerobot_record(capsys: pytest.CaptureFixture) -> None:
    from lerobot_robot_otql_sim import OtqlExpert, OtqlSim
    from lerobot_teleoperator_otql_reset import OtqlReset

    robot = OtqlSim(OtqlSimConfig(task=TASK, max_steps=2))
    with robot:
        firsts = []
        for _ in range(2):
            firsts.append(robot.get_observation())
            for _ in range(2):
                robot.send_action(dict.fromkeys(robot.action_features, 0.1))
        assert firsts[0] != firsts[1]
    for teleop in (OtqlExpert(OtqlExpertConfig()), OtqlReset(OtqlResetConfig())):
        with pytest.raises(SystemExit):
            teleop.connect()
    assert capsys.readouterr().err.count("error: ") == 2


def test_images_are_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under their cameras' names, as they were when the state was; the state is the arm's."""
    from lerobot_robot_otql_sim import OtqlSim

    def picture(env: Any, size: tuple[int, int], camera: str) -> np.ndarray:
        return np.full((*size, 3), {"view": 10, "handcam_rgb": 20}[camera] + round(10 * env.data.time))

    monkeypatch.setattr("envs.panda.arm.PandaEnv._picture", picture)
    monkeypatch.setattr("utils.rendering.set_rendering_backend", lambda: None)
    blind, robot = OtqlSim(OtqlSimConfig(task=TASK)), OtqlSim(OtqlSimConfig(task=TASK, image_size=8))
    with blind, robot:
        for steps in range(2):
            state, seen = blind.get_observation(), robot.get_observation()
            assert list(seen) == list(robot.observation_features)
            assert {name: state.get(name) for name in list(seen)[:25]} == dict(list(seen.items())[:25])
            np.testing.assert_array_equal(seen["front"], np.full((8, 8, 3), 10 + steps))
            np.testing.assert_array_equal(seen["wrist"], np.full((8, 8, 3), 20 + steps))
            for each in (blind, robot):
                each.send_action(dict.fromkeys(robot.action_features, 0.5))


def test_images_that_cannot_be_drawn(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    from lerobot_robot_otql_sim import OtqlSim

    monkeypatch.setenv("MUJOCO_GL", "no-such-backend")
    with pytest.raises(SystemExit) as ended:
        OtqlSim(OtqlSimConfig(image_size=8)).connect()
    assert ended.value.code == 2
    assert (
        "error: this task has images, and MuJoCo cannot render with MUJOCO_GL=no-such-backend"
        in capsys.readouterr().err
    )
