"""otql-rollout, LeRobot's tools over what it records, and lerobot-eval: the real programs."""

import os
import pty
import select
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lerobot.scripts import lerobot_edit_dataset
from lerobot_env_otql import OtqlEnv, OtqlSim, OtqlSimConfig
from lerobot_env_otql.demonstrate import main as demonstrate
from lerobot_env_otql.tasks import ACTIONS, ARM, STATES
from lerobot_policy_otql import rollout
from random_agents import make_agent
from recordings import write_recording
from two_joints import JOINTS

from real.dataset import read_recording
from real.import_rollouts import import_rollouts
from real.labels import successes
from real.policy_directory import Normalisation

TASK = "OpenMicrowave-v0"
BIN = Path(sys.executable).parent


def joint_policy(export: Any) -> Path:
    """A policy of the robot of two joints."""
    agent = make_agent("otql", horizon=2, state_dim=2, action_dim=2)
    about = {"state_names": list(JOINTS), "action_names": list(JOINTS), "fps": 100, "robot_type": "otql_test_arm"}
    return export(agent, {"observation.state": 2}, Normalisation(about=about))


def sim_policy(export: Any) -> Path:
    """A policy of the simulated robot."""
    agent = make_agent("otql", horizon=4, state_dim=len(STATES[TASK]), action_dim=len(ACTIONS))
    return export(agent, {"observation.state": len(STATES[TASK])})


def flags(policy: Path, root: Path, robot: str, *more: str, fps: int = 100, episodes: int = 2) -> list[str]:
    """Arguments of otql-rollout."""
    return [
        *(f"--policy.path={policy}", f"--robot.type={robot}", f"--dataset.root={root}"),
        *("--dataset.repo_id=local/rollout_it", "--dataset.no_stamp=true", "--dataset.single_task=try"),
        *(f"--fps={fps}", f"--dataset.fps={fps}", f"--dataset.num_episodes={episodes}"),
        *("--dataset.push_to_hub=false", "--play_sounds=false", "--robot.discover_packages_path=two_joints", *more),
    ]


class Person:
    """Somebody at the terminal of a program."""

    def __init__(self, command: list[str]):
        self._master, slave = pty.openpty()
        self._seen = ""
        self.process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
        os.close(slave)

    def wait(self, text: str, seconds: float = 120) -> None:
        """Reads until `text` is shown."""
        end = time.monotonic() + seconds
        while text not in self._seen:
            assert time.monotonic() < end and self._read(), self._seen[-3000:]
        self._seen = self._seen.split(text, 1)[1]

    def press(self, key: str) -> None:
        os.write(self._master, key.encode())

    def leave(self) -> int:
        """Reads to the end; returns the exit code."""
        while self._read():
            pass
        return self.process.wait(60)

    def _read(self) -> bool:
        if not select.select([self._master], [], [], 60)[0]:
            return False
        try:
            data = os.read(self._master, 4096)
        except OSError:
            return False
        self._seen += data.decode(errors="replace")
        return bool(data)


def test_a_person_labels_episodes(tmp_path: Path, export: Any, monkeypatch: pytest.MonkeyPatch, request: Any) -> None:
    """Ends them by a key or after their time, repeats one, resets the scene, and stops in the last one."""
    root, policy = tmp_path / "r", joint_policy(export)
    command = flags(policy, root, "otql_test_arm", "--dataset.episode_time_s=1", episodes=5)
    person = Person([str(BIN / "otql-rollout"), *command])
    request.addfinalizer(person.process.kill)
    person.wait("Episode 0")
    time.sleep(0.3)
    person.press("y")
    person.wait("Reset the scene")
    person.press("\n")
    person.wait("Episode 1")
    person.press("r")  # Thrown away.
    person.wait("Reset the scene")
    person.press("\n")
    person.wait("Success?")  # It was left alone for its second.
    person.press("x")
    person.press("n")
    person.wait("Reset the scene")
    person.press("\n")
    person.wait("Episode 2")
    person.press("q")
    assert person.leave() == 0
    recording = read_recording(root, ["observation.state"])
    assert successes(recording) == [
        (True, len(recording.episodes[0].actions)),
        (False, len(recording.episodes[1].actions)),
    ]
    first, second = (len(episode.actions) for episode in recording.episodes)
    assert 5 < first < 90 and 30 < second <= 100
    solved, failed = (episode.outcomes for episode in recording.episodes)
    np.testing.assert_array_equal(solved["next.success"], np.arange(first) == first - 1)
    np.testing.assert_array_equal(solved["next.reward"], (np.arange(first) == first - 1) - 1.0)
    assert not failed["next.success"].any() and (failed["next.reward"] == -1).all()
    assert recording.robot_type == "otql_test_arm" and recording.state_names == list(JOINTS)

    # LeRobot's own tools keep the labels.
    for operation in (
        ["--repo_id=local/it", f"--root={root}", f"--new_root={tmp_path / 'fewer'}", "--new_repo_id=local/fewer",
         "--operation.type=delete_episodes", "--operation.episode_indices=[0]"],
        ["--repo_id=local/it", f"--root={root}", f"--new_root={tmp_path / 'parts'}",
         "--operation.type=split", '--operation.splits={"train": [1], "val": [0]}'],
        ["--new_repo_id=local/both", f"--new_root={tmp_path / 'both'}", "--operation.type=merge",
         "--operation.repo_ids=['local/a', 'local/b']", f"--operation.roots=['{root}', '{tmp_path / 'fewer'}']"],
    ):  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["lerobot-edit-dataset", "--push_to_hub=false", *operation])
        lerobot_edit_dataset.main()
    (val,) = (path.parents[1] for path in tmp_path.rglob("meta/info.json") if "val" in str(path))
    for folder, expected in ((tmp_path / "fewer", [False]), (val, [True]), (tmp_path / "both", [True, False, False])):
        edited = read_recording(folder, ["observation.state"])
        assert [good for good, _ in successes(edited)] == expected
    assert "3 episodes, 1 solved" in import_rollouts([tmp_path / "both"], tmp_path / "a.npz")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """otql-rollout in this process."""
    monkeypatch.setattr(sys, "argv", ["otql-rollout", *arguments])
    rollout.main()


@pytest.fixture
def signals(monkeypatch: pytest.MonkeyPatch) -> None:
    """LeRobot's handlers of signals are not left behind."""
    monkeypatch.setattr("lerobot.utils.process.signal.signal", lambda *_: None)


@pytest.mark.usefixtures("signals")
def test_the_simulated_robot_needs_nobody(tmp_path: Path, export: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its episodes are those of their numbers and seed, also when a recording is resumed."""
    root, policy = tmp_path / "r", sim_policy(export)
    limit = ("--robot.max_steps=7", "--robot.seed=3", "--dataset.fps=10")  # Driven faster than its own time.
    run(monkeypatch, *flags(policy, root, "otql_sim", *limit))
    run(monkeypatch, *flags(policy, root, "otql_sim", *limit, "--resume=true", episodes=1))
    recording = read_recording(root, ["observation.state"])
    assert successes(recording) == [(False, 7)] * 3 and recording.state_names == STATES[TASK]
    robot = OtqlSim(OtqlSimConfig(seed=3))
    robot.connect()
    for number, episode in enumerate(recording.episodes):
        robot._attempts.clear()
        robot.reset(number)
        np.testing.assert_array_equal(episode.states[0], np.float32(list(robot.get_observation().values())))
    robot.disconnect()


@pytest.mark.usefixtures("signals")
def test_real_time_chunking(tmp_path: Path, export: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a background thread, by lerobot-rollout's own engine."""
    root, policy = tmp_path / "r", sim_policy(export)
    engine = ("--inference.type=rtc", "--inference.queue_threshold=2", "--inference.rtc.execution_horizon=2")
    run(monkeypatch, *flags(policy, root, "otql_sim", "--robot.max_steps=12", *engine, episodes=1))
    (episode,) = read_recording(root, ["observation.state"]).episodes
    assert len(episode.actions) == 12 and len(np.unique(episode.actions, axis=0)) > 4


@pytest.mark.usefixtures("signals")
def test_mistakes(tmp_path: Path, export: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    """One line each, before anything is recorded."""
    policy, resumed = joint_policy(export), tmp_path / "unlabelled"
    write_recording(resumed, fps=100, joints=JOINTS)
    for arguments, message in [
        (flags(policy, tmp_path / "a", "otql_test_arm"), "success is asked for at the terminal, and there is none"),
        (
            flags(policy, tmp_path / "b", "otql_test_arm", fps=30),
            "frames a second differ: --dataset.fps has 30, --fps has 30, the policy's data has 100",
        ),
        (
            flags(policy, tmp_path / "c", "otql_test_arm", "--robot.first=other.pos"),
            "was trained with the states joint.pos, gripper.pos; the robot has other.pos",
        ),
        (flags(policy, resumed, "otql_test_arm", "--resume=true"), "was recorded without success"),
        (flags(sim_policy(export), tmp_path / "d", "otql_sim", "--robot.task=Fold-v0"), "unknown task 'Fold-v0'; use"),
    ]:
        with pytest.raises(SystemExit) as ended:
            run(monkeypatch, *arguments)
        assert ended.value.code == 2
        lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and message in lines[0]


def test_demonstrations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Are successes, of their seeds; what fails is made again; another folder is not written over."""
    monkeypatch.setattr(
        sys, "argv", ["demonstrate", f"--root={tmp_path / 'd'}", "--episodes=2", "--robot.max_steps=80"]
    )
    demonstrate()
    recording = read_recording(tmp_path / "d", ["observation.state"])
    assert successes(recording) == [(True, len(episode.actions)) for episode in recording.episodes]
    with pytest.raises(SystemExit):
        demonstrate()


def test_lerobot_eval(tmp_path: Path, export: Any) -> None:
    """Two environments at once, on the task as the project has it."""
    command = [
        *(str(BIN / "lerobot-eval"), f"--policy.path={sim_policy(export)}", "--env.type=otql", "--env.max_steps=5"),
        *(
            "--eval.n_episodes=2",
            "--eval.batch_size=2",
            "--eval.use_async_envs=false",
            f"--output_dir={tmp_path / 'e'}",
        ),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert '"n_episodes": 2' in (tmp_path / "e" / "eval_info.json").read_text()


def test_the_environment_is_the_task(tmp_path: Path) -> None:
    """With the project's numbers, and with cameras the arm's alone."""
    import gymnasium

    import envs.panda  # noqa: F401

    (env,) = OtqlEnv(max_steps=3).create_envs(1)["otql"].values()
    seen, _ = env.reset(seed=[5])
    plain = gymnasium.make(TASK).unwrapped
    expected, _ = plain.reset(seed=5)
    np.testing.assert_array_equal(seen["agent_pos"][0], expected)
    for _ in range(3):
        seen, reward, _, truncated, info = env.step(np.full((1, 4), 0.5, np.float32))
    assert reward[0] == -1 and truncated[0] and not info["final_info"]["is_success"][0]
    config = OtqlEnv(image_size=32)
    assert config.features["agent_pos"].shape == (len(ARM),)
    assert config.features_map["observation.images.front"] == "observation.images.front"


def test_policy_server(tmp_path: Path, export: Any) -> None:
    """LeRobot's client on the simulated robot gets chunks of this policy from the server."""
    policy, port = sim_policy(export), 18080 + os.getpid() % 1000
    server = subprocess.Popen(
        [str(BIN / "otql-policy-server"), f"--port={port}", "--fps=20"], stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    client = None
    try:
        client = subprocess.Popen(
            [
                *(sys.executable, "-m", "lerobot.async_inference.robot_client", "--robot.type=otql_sim"),
                *("--policy_type=otql", f"--pretrained_name_or_path={policy}", "--actions_per_chunk=4"),
                *(f"--server_address=localhost:{port}", "--policy_device=cpu", "--fps=20", "--task=open"),
            ],
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            cwd=tmp_path,
        )
        threading.Timer(120, server.kill).start()
        chunks = 0
        for line in server.stderr:
            chunks += "Action chunk" in line and "generated" in line
            if chunks == 5:
                break
        assert chunks == 5
    finally:
        for process in filter(None, (client, server)):
            process.kill()
            process.wait()
