"""lerobot-record in this process: a session of recording, with a policy that does nothing and a robot of one joint."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lerobot.robots import Robot, RobotConfig
from lerobot.scripts import lerobot_record
from lerobot_robot_otql_sim import OtqlExpertConfig


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
