"""QAM-E: QAM (agents/qam.py) with an edit policy on its flow's samples.

Settings are those of QAM's experiments (arXiv 2601.14234). Where edit_scale is 0, its authors' tuning chose plain QAM.
"""

import ml_collections

from agents import base, presets, qam
from agents.qam import Agent

__all__ = ["CPU", "PRESETS", "Agent", "get_config"]


SETTINGS = qam.SETTINGS | {"edit_scale": (0.1, "bound on an edit; 0: plain QAM")}


def get_config() -> ml_collections.ConfigDict:
    """Returns QAM's defaults, with an edit policy."""
    return base.get_config(SETTINGS)


PRESETS = presets.presets(
    {
        "puzzle-3x3": {"inv_temp": 1.0, "edit_scale": 0.1},
        "puzzle-4x4": {"inv_temp": 0.1, "edit_scale": 0.9},
        "scene": {"inv_temp": 1.0, "edit_scale": 0.0},
        "cube-double": {"inv_temp": 1.0, "edit_scale": 0.0},
        "cube-triple": {"inv_temp": 3.0, "edit_scale": 0.1},
        "cube-quadruple": {"inv_temp": 3.0, "edit_scale": 0.1},
        "antmaze-large": {"inv_temp": 1.0, "edit_scale": 0.1},
        "antmaze-giant": {"inv_temp": 10.0, "edit_scale": 0.1},
        "humanoidmaze-medium": {"inv_temp": 3.0, "edit_scale": 0.1},
        "humanoidmaze-large": {"inv_temp": 3.0, "edit_scale": 0.1},
    }
)
CPU = qam.CPU | {"edit_scale": 0.1}
