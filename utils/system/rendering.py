"""Selection of MuJoCo's rendering backend for machines without a display."""

import ctypes.util
import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from utils.errors import UserError

PROBE_SECONDS = 120
CHECKED = "OTQL_RENDERS_WITH"  # environment variable: the MUJOCO_GL that a parent process has tried
# Skips the interpreter's teardown, in which OpenGL contexts print errors.
PROBE = """
import os, mujoco
with mujoco.Renderer(mujoco.MjModel.from_xml_string("<mujoco/>"), 8, 8) as renderer:
    renderer.render()
os._exit(0)
"""


def rendering_backend() -> str | None:
    """Returns the value of MUJOCO_GL that renders off screen here: the user's own if set, else 'egl' or 'osmesa'.

    Each is tried once, in a separate process, since a broken driver can end the process.

    Returns:
        the value, or None if none renders.
    """
    own = os.environ.get("MUJOCO_GL")
    candidates = (own,) if own else ("egl", "osmesa") if sys.platform == "linux" else ("glfw",)
    return next(filter(_renders, candidates), None)


@functools.cache
def _renders(backend: str) -> bool:
    """True if MuJoCo can render with MUJOCO_GL=`backend`."""
    try:
        probe = subprocess.run(
            [sys.executable, "-c", PROBE],
            env=os.environ | {"MUJOCO_GL": backend},
            capture_output=True,
            timeout=PROBE_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return False
    return probe.returncode == 0


def check_mujoco() -> None:
    """Imports MuJoCo, which reads MUJOCO_GL.

    Raises:
        UserError: the import fails with the renderer that MUJOCO_GL names.
    """
    try:
        import mujoco  # noqa: F401
    except Exception as error:  # The renderer's library raises errors of many types.
        raise UserError(f"MuJoCo fails with MUJOCO_GL={os.environ.get('MUJOCO_GL')} ({error}); unset it") from error


@contextmanager
def mujoco_errors() -> Iterator[None]:
    """Turns the error of an import of MuJoCo in the block into that of `check_mujoco`."""
    try:
        yield
    except Exception:
        # A failed import leaves submodules behind; without them, MuJoCo was never imported.
        if "mujoco" not in sys.modules and any(name.startswith("mujoco.") for name in sys.modules):
            check_mujoco()
        raise


def no_rendering() -> str:
    """Returns one line: MuJoCo cannot render here, and what to do."""
    own = os.environ.get("MUJOCO_GL")
    return f"MuJoCo cannot render {f'with MUJOCO_GL={own}; unset it' if own else 'here; install libegl1 or libosmesa6'}"


def set_rendering_backend() -> None:
    """Sets MUJOCO_GL so that MuJoCo, if not imported yet, renders in this process and its children.

    Raises:
        UserError: no backend renders here.
    """
    if os.environ.get(CHECKED, "") == os.environ.get("MUJOCO_GL"):
        return
    backend = rendering_backend()
    if backend is None:
        raise UserError(f"this task has images, and {no_rendering()}")
    os.environ |= {"MUJOCO_GL": backend, CHECKED: backend}


def choose_renderer() -> None:
    """Sets MUJOCO_GL to EGL on a machine without a display, if MuJoCo, which reads it, is not imported yet."""
    headless = sys.platform == "linux" and not os.environ.get("DISPLAY")
    if headless and "MUJOCO_GL" not in os.environ and "mujoco" not in sys.modules and ctypes.util.find_library("EGL"):
        os.environ["MUJOCO_GL"] = "egl"
