"""LeRobot policies: 'otql', for runs exported by real/export.py, and 'smolvla_otql', which lerobot-train trains."""

from lerobot_policy_otql.configuration_otql import OtqlConfig
from lerobot_policy_otql.configuration_smolvla_otql import SmolVLAOtqlConfig

__all__ = ["OtqlConfig", "SmolVLAOtqlConfig"]
