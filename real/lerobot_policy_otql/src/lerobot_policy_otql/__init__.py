"""LeRobot policy of type 'otql', for runs exported by real/export.py. Needs torch, no JAX."""

from lerobot_policy_otql.configuration_otql import OtqlConfig

__all__ = ["OtqlConfig"]
