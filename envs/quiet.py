"""Imports OGBench without the warnings that it always gives and that tell the user nothing."""

import ctypes.util
import os
import sys
import warnings

from utils.rendering import check_mujoco


def quiet_import_ogbench() -> None:
    """Imports ogbench, so that its environments are registered, and hides two harmless warnings.

    Hidden: GLFW without a display (MuJoCo's viewer is imported by the environments but not used), and gymnasium's
    note on the float64 bounds of the manipulation environments' action space, which comes back at each access.

    Raises:
        UserError: MuJoCo cannot be imported with the renderer that MUJOCO_GL names.
    """
    warnings.filterwarnings("ignore", message=r".*DISPLAY environment variable is missing.*")
    warnings.filterwarnings("ignore", message=r".*Box (low|high)'s precision lowered by casting.*")
    choose_renderer()
    check_mujoco()
    import ogbench  # noqa: F401


def choose_renderer() -> None:
    """Lets MuJoCo draw off screen where there is no display. It reads the variable when it is first imported."""
    headless = sys.platform == "linux" and not os.environ.get("DISPLAY")
    if headless and "MUJOCO_GL" not in os.environ and "mujoco" not in sys.modules and ctypes.util.find_library("EGL"):
        os.environ["MUJOCO_GL"] = "egl"
