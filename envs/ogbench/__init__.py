"""OGBench: import without harmless warnings, datasets and oracles."""

import warnings

from utils.system.rendering import check_mujoco, choose_renderer


def import_ogbench() -> None:
    """Imports ogbench, so that its environments are registered, and hides two harmless warnings.

    Hidden: GLFW without a display (MuJoCo's viewer is imported by the environments but not used), and gymnasium's
    note on the float64 bounds of the manipulation environments' action space, repeated at each access.

    Raises:
        UserError: MuJoCo cannot be imported with the renderer that MUJOCO_GL names.
    """
    warnings.filterwarnings("ignore", message=r".*DISPLAY environment variable is missing.*")
    warnings.filterwarnings("ignore", message=r".*Box (low|high)'s precision lowered by casting.*")
    choose_renderer()
    check_mujoco()
    import ogbench  # noqa: F401
