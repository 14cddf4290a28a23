"""QAM-F: QAM (agents/qam.py) with a one-step policy distilled from its flow.

Settings are those of QAM's experiments (arXiv 2601.14234). Where α is 0, its authors' tuning chose plain QAM, which
acts with `flow_steps` network evaluations.
"""

import ml_collections

from agents import base, presets, qam
from agents.qam import Agent

__all__ = ["CPU", "PRESETS", "Agent", "get_config"]


SETTINGS = qam.SETTINGS | {"fql_alpha": (30.0, "α, weight of the one-step policy's distillation; 0: plain QAM")}


def get_config() -> ml_collections.ConfigDict:
    """Returns QAM's defaults, with a one-step policy."""
    return base.get_config(SETTINGS)


PRESETS = presets.presets(
    {
        "puzzle-3x3": {"inv_temp": 3.0, "fql_alpha": 0.0},
        "puzzle-4x4": {"inv_temp": 3.0, "fql_alpha": 3.0},
        "scene": {"inv_temp": 1.0, "fql_alpha": 300.0},
        "cube-double": {"inv_temp": 1.0, "fql_alpha": 0.0},
        "cube-triple": {"inv_temp": 10.0, "fql_alpha": 300.0},
        "cube-quadruple": {"inv_temp": 0.3, "fql_alpha": 30.0},
        "antmaze-large": {"inv_temp": 3.0, "fql_alpha": 30.0},
        "antmaze-giant": {"inv_temp": 3.0, "fql_alpha": 30.0},
        "humanoidmaze-medium": {"inv_temp": 1.0, "fql_alpha": 30.0},
        "humanoidmaze-large": {"inv_temp": 0.3, "fql_alpha": 30.0},
    }
)
CPU = qam.CPU | {"fql_alpha": 100.0}
