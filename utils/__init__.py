"""Modules that programs and agents share.

Importing it sets how XLA compiles for a processor, unless XLA_FLAGS says so; lets output that is closed or not UTF-8
take any text; gives this process and its children a home directory if they have none; and lets imports that fail for
the environment's sake end in a line. No Ctrl-C is lost in a garbage collection.
"""

import io
import os
import signal
import sys
import tempfile
import threading
import traceback
from contextlib import suppress
from types import FrameType, TracebackType

try:
    from jaxlib.version import __version_info__ as jaxlib_version
except ImportError:  # On a robot's PC there is no JAX, and what is imported there needs none.
    jaxlib_version = (0, 0, 0)

USER_XLA_FLAGS = os.environ.get("XLA_FLAGS", "")
_FLAG = "xla_cpu_experimental_ynn_fusion_type"


def _set_xla_flags() -> None:
    """Keeps YNNPACK to matrix products by themselves: with what surrounds them it is slower, at times by far."""
    # Older versions end the process at a flag that they do not know.
    named = USER_XLA_FLAGS and not USER_XLA_FLAGS.lstrip().startswith("-")  # A file that holds them.
    if _FLAG not in USER_XLA_FLAGS and not named and jaxlib_version >= (0, 10, 2):
        os.environ["XLA_FLAGS"] = f"{USER_XLA_FLAGS} --{_FLAG}=LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT".strip()


def _open_streams() -> None:
    """Opens standard streams that are closed, so that no other file gets their descriptors and print goes nowhere."""
    closed = [n for n, stream in enumerate((sys.stdin, sys.stdout, sys.stderr)) if stream is None]
    for descriptor in closed:
        try:
            os.fstat(descriptor)  # Some module's file may have it by now.
        except OSError:
            # Takes the lowest descriptor that is free; child processes need it too.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for descriptor in closed:
        stream = open(os.devnull, "w" if descriptor else "r", encoding="utf-8")  # noqa: SIM115
        setattr(sys, ("stdin", "stdout", "stderr")[descriptor], stream)


def _end_failed_imports(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Shows an uncaught exception; in imports, Ctrl-C and a variable that JAX cannot read are one line."""
    frames = traceback.extract_tb(trace)
    # Of the frames of the import system itself, Python removes most.
    if sum(frame.name == "<module>" for frame in frames) > 1:
        if issubclass(kind, KeyboardInterrupt):
            print("interrupted", file=sys.stderr)
            return
        if issubclass(kind, ValueError) and os.sep + os.path.join("jax", "_src", "config") in frames[-1].filename:
            print(f"error: JAX cannot be imported: {error}; unset that variable, or correct it", file=sys.stderr)
            sys.stderr.flush()
            os._exit(2)
    sys.__excepthook__(kind, error, trace)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    """Raises KeyboardInterrupt, as Python's own handler does; where it would be ignored, a moment later."""
    while frame is not None:
        # Python only prints exceptions of these: JAX's part of a garbage collection, and finalisers.
        if frame.f_code.co_name in ("_xla_gc_callback", "__del__"):
            again = threading.Timer(0.05, signal.raise_signal, (signum,))
            again.daemon = True
            again.start()
            return
        frame = frame.f_back
    raise KeyboardInterrupt


def _take_any_text() -> None:
    r"""Lets print write what the encoding of the output lacks as \u03b5: a name or a Greek letter is no error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # Else replaced by something else.
            with suppress(ValueError):  # Closed.
                stream.reconfigure(errors="backslashreplace")


def _find_home() -> None:
    """Sets HOME to a temporary directory where there is none, as for an unknown user in a container."""
    # Of an unknown user this returns '~'.
    if os.path.isdir(os.path.expanduser("~")) and os.environ.get("HOME") != "":
        return
    home = os.path.join(tempfile.gettempdir(), f"otql-home-{os.getuid() if hasattr(os, 'getuid') else ''}")
    try:
        os.makedirs(home, mode=0o700, exist_ok=True)
        own = os.lstat(home).st_uid == os.getuid()
    except (AttributeError, OSError):
        own = False
    os.environ["HOME"] = home if own else tempfile.mkdtemp(prefix="otql-home-")
    print(f"there is no home directory; {os.environ['HOME']} is used as such", file=sys.stderr)


_open_streams()
if sys.excepthook is sys.__excepthook__:
    sys.excepthook = _end_failed_imports
_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
if _default and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, _interrupt)
_set_xla_flags()
_take_any_text()
_find_home()
