"""Pre- and postprocessing: SmolVLA's."""

from lerobot.policies.smolvla.processor_smolvla import (
    make_smolvla_pre_post_processors as make_smolvla_otql_pre_post_processors,
)

__all__ = ["make_smolvla_otql_pre_post_processors"]
