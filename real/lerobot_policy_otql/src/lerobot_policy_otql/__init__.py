"""LeRobot policy of type 'otql': what a run of OTQL or a baseline exported with real/export.py. Torch only, no JAX."""

from lerobot_policy_otql.configuration_otql import OtqlConfig

__all__ = ["OtqlConfig"]
