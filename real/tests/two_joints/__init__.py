"""`--robot.type=otql_test_arm`: a robot of two joints, for `--robot.discover_packages_path=two_joints`."""

import dataclasses

from lerobot.robots import Robot, RobotConfig

JOINTS = ("joint.pos", "gripper.pos")


@RobotConfig.register_subclass("otql_test_arm")
@dataclasses.dataclass
class TwoJointsConfig(RobotConfig):
    first: str = JOINTS[0]


class TwoJoints(Robot):
    """It goes where it is sent."""

    config_class, name = TwoJointsConfig, "otql_test_arm"
    cameras: dict = {}
    is_calibrated = is_connected = True
    action_features = dict.fromkeys(JOINTS, float)

    def __init__(self, config: TwoJointsConfig):
        super().__init__(config)
        self.position = dict.fromkeys((config.first, JOINTS[1]), 0.0)

    @property
    def observation_features(self) -> dict[str, type]:
        return dict.fromkeys(self.position, float)

    def get_observation(self) -> dict[str, float]:
        return dict(self.position)

    def send_action(self, action: dict[str, float]) -> dict[str, float]:
        self.position = dict(action)
        return action

    def connect(self, calibrate: bool = True) -> None: ...
    def disconnect(self) -> None: ...
    def calibrate(self) -> None: ...
    def configure(self) -> None: ...
