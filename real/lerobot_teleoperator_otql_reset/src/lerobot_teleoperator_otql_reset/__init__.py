"""LeRobot plugin: `--teleop.type=otql_reset`. Importing it registers it."""

from lerobot_teleoperator_otql_reset.reset import OtqlReset, OtqlResetConfig

__all__ = ["OtqlReset", "OtqlResetConfig"]
