"""LeRobot plugin: `--robot.type=otql_sim`, `--teleop.type=otql_expert`. Importing it registers both."""

from lerobot_robot_otql_sim.expert import OtqlExpert, OtqlExpertConfig
from lerobot_robot_otql_sim.robot import OtqlSim, OtqlSimConfig

__all__ = ["OtqlExpert", "OtqlExpertConfig", "OtqlSim", "OtqlSimConfig"]
