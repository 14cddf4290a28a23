"""Whether and how MuJoCo renders without a display."""

import ctypes.util
import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from utils.errors import UserError

PROBE_SECONDS = 120
CHECKED = "OTQL_RENDERS_WITH"  # environment variable: the MUJOCO_GL that a process before this one has tried
# Ends without the interpreter's teardown: OpenGL contexts fail noisily in it.
PROBE = """
import os, mujoco
with mujoco.Renderer(mujoco.MjModel.from_xml_string("<mujoco/>"), 8, 8) as renderer:
    renderer.render()
os._exit(0)
"""


def rendering_backend() -> str | None:
    """The value of MUJOCO_GL that renders without a display here: the user's own if set, else 'egl' or 'osmesa'.

    Each is tried once, in a process of its own, since a broken driver can end the process.

    Returns:
        None if nothing renders.
    """
    own = os.environ.get("MUJOCO_GL")
    candidates = (own,) if own else ("egl", "osmesa") if sys.platform == "linux" else ("glfw",)
    return next(filter(_renders, candidates), None)


@functools.cache
def _renders(backend: str) -> bool:
    """Whether MuJoCo can render with MUJOCO_GL=`backend`."""
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
    """Imports MuJoCo, which reads MUJOCO_GL then.

    Raises:
        UserError: it cannot be imported with the renderer that MUJOCO_GL names.
    """
    try:
        import mujoco  # noqa: F401
    except Exception as error:  # Of many types: what the renderer's library raises.
        raise UserError(f"MuJoCo fails with MUJOCO_GL={os.environ.get('MUJOCO_GL')} ({error}); unset it") from error


@contextmanager
def mujoco_errors() -> Iterator[None]:
    """Turns what an import of MuJoCo in the block raised into the line of `check_mujoco`."""
    try:
        yield
    except Exception:
        # What a failed import leaves behind; who needs no MuJoCo never tried.
        if "mujoco" not in sys.modules and any(name.startswith("mujoco.") for name in sys.modules):
            check_mujoco()
        raise


def no_rendering() -> str:
    """Says that nothing renders, and what to do."""
    own = os.environ.get("MUJOCO_GL")
    return f"MuJoCo cannot render {f'with MUJOCO_GL={own}; unset it' if own else 'here; install libegl1 or libosmesa6'}"


def set_rendering_backend() -> None:
    """Lets MuJoCo render in this process, if it is not imported yet, and in those that it starts.

    Raises:
        UserError: nothing renders here.
    """
    if os.environ.get(CHECKED, "") == os.environ.get("MUJOCO_GL"):
        return
    backend = rendering_backend()
    if backend is None:
        raise UserError(f"this task has images, and {no_rendering()}")
    os.environ |= {"MUJOCO_GL": backend, CHECKED: backend}


def choose_renderer() -> None:
    """Lets MuJoCo draw off screen where there is no display. It reads the variable when it is first imported."""
    headless = sys.platform == "linux" and not os.environ.get("DISPLAY")
    if headless and "MUJOCO_GL" not in os.environ and "mujoco" not in sys.modules and ctypes.util.find_library("EGL"):
        os.environ["MUJOCO_GL"] = "egl"
