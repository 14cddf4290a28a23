"""LeRobot plugin: `--env.type=otql` and `--robot.type=otql_sim`, the project's simulated Panda tasks."""

from lerobot_env_otql.env import OtqlEnv
from lerobot_env_otql.robot import OtqlSim, OtqlSimConfig

__all__ = ["OtqlEnv", "OtqlSim", "OtqlSimConfig"]
