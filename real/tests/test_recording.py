"""lerobot-record with the project's robot and teleoperators, run in this process unless said otherwise."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from lerobot_robot_otql_sim import OtqlExpertConfig, OtqlSimConfig
from lerobot_teleoperator_otql_reset import OtqlResetConfig
from sessions import ArmConfig, fake_policy, labels_of, record

from envs.gym_dataset import read_gym_dataset
from envs.panda.experts import EXPERTS
from real.import_rollouts import import_rollouts
from real.lerobot_dataset import read_recording

pytestmark = pytest.mark.usefixtures("alone")

TASK = "OpenMicrowave-v0"


def simulate(
    index: int, attempt: int = 0, seed: int = 0, max_steps: int | None = None, noise: float = 1.0
) -> dict[str, np.ndarray]:
    """An episode of the expert as envs.panda.demonstrate makes it: states [T + 1], actions, rewards, success."""
    env = gymnasium.make(TASK, max_steps=max_steps).unwrapped
    words = np.random.SeedSequence(entropy=seed, spawn_key=(index, attempt)).generate_state(2)
    state, _ = env.reset(seed=int(words[0]))
    actions = EXPERTS[TASK](env, np.random.default_rng(int(words[1])), noise).actions()
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
    episodes = [simulate(index, noise=2.0) for index in range(3)]
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


@pytest.mark.parametrize(
    ("robot", "teleop", "terminal", "message"),
    [
        (
            {"task": "Fold-v0"},
            OtqlExpertConfig(),
            True,
            "unknown task 'Fold-v0'; use --robot.task=ArrangeBoxes-v0 or",
        ),
        ({}, OtqlExpertConfig(expert_noise=-1.0), True, "--teleop.expert_noise must be at least 0"),
        ({"max_steps": 0}, OtqlExpertConfig(), True, "--robot.max_steps at least 1"),
        (None, OtqlExpertConfig(), True, "otql_expert acts in lerobot-record on --robot.type=otql_sim only"),
        ({}, OtqlResetConfig(), True, "otql_reset only resets; name a policy by --policy.path"),
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

    monkeypatch.setattr("envs.panda.arm.PandaEnv._render_image", picture)
    monkeypatch.setattr("utils.system.rendering.set_rendering_backend", lambda: None)
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
