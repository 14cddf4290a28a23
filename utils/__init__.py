"""Modules that programs and agents share.

Importing this package prepares the process:

- XLA's CPU compiler gets a faster setting, unless XLA_FLAGS has one;
- output streams that are closed or not UTF-8 accept any text;
- a missing home directory is replaced by a temporary one, for child processes too;
- imports that fail because of the environment end in a one-line error;
- Ctrl-C during a garbage collection is not lost.
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
except ImportError:  # A robot's PC has no JAX, and the modules that it imports need none.
    jaxlib_version = (0, 0, 0)

USER_XLA_FLAGS = os.environ.get("XLA_FLAGS", "")
_FLAG = "xla_cpu_experimental_ynn_fusion_type"


def _set_xla_flags() -> None:
    """Restricts YNNPACK to single matrix products: with fused operations it is slower, at times by far."""
    # Older versions end the process at an unknown flag.
    named = USER_XLA_FLAGS and not USER_XLA_FLAGS.lstrip().startswith("-")  # The name of a file of flags.
    if _FLAG not in USER_XLA_FLAGS and not named and jaxlib_version >= (0, 10, 2):
        os.environ["XLA_FLAGS"] = f"{USER_XLA_FLAGS} --{_FLAG}=LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT".strip()


def _open_streams() -> None:
    """Opens closed standard streams to /dev/null, so that no other file gets their descriptors."""
    closed = [n for n, stream in enumerate((sys.stdin, sys.stdout, sys.stderr)) if stream is None]
    for descriptor in closed:
        try:
            os.fstat(descriptor)  # Another file may have it by now.
        except OSError:
            # The lowest free descriptor; child processes need it too.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for descriptor in closed:
        stream = open(os.devnull, "w" if descriptor else "r", encoding="utf-8")  # noqa: SIM115
        setattr(sys, ("stdin", "stdout", "stderr")[descriptor], stream)


def _end_failed_imports(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Prints an uncaught exception, as one line if imports were interrupted or JAX rejects a variable."""
    frames = traceback.extract_tb(trace)
    # More than one module is being executed: an import. Python hides most frames of the import system itself.
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
    """Raises KeyboardInterrupt like Python's own handler, but later where it would be ignored."""
    while frame is not None:
        # Python only prints exceptions of JAX's garbage-collection hook and of finalisers.
        if frame.f_code.co_name in ("_xla_gc_callback", "__del__"):
            again = threading.Timer(0.05, signal.raise_signal, (signum,))
            again.daemon = True
            again.start()
            return
        frame = frame.f_back
    raise KeyboardInterrupt


def _take_any_text() -> None:
    r"""Makes print write characters that the output's encoding lacks as escapes, such as \u03b5, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # Not if something replaced the stream.
            with suppress(ValueError):  # Closed.
                stream.reconfigure(errors="backslashreplace")


def _find_home() -> None:
    """Sets HOME to a temporary directory if there is no home, as for an unknown user in a container."""
    # For an unknown user this returns '~'.
    if os.path.isdir(os.path.expanduser("~")) and os.environ.get("HOME") != "":
        return
    home = os.path.join(tempfile.gettempdir(), f"otql-home-{os.getuid() if hasattr(os, 'getuid') else ''}")
    try:
        os.makedirs(home, mode=0o700, exist_ok=True)
        own = os.lstat(home).st_uid == os.getuid()
    except (AttributeError, OSError):
        own = False
    os.environ["HOME"] = home if own else tempfile.mkdtemp(prefix="otql-home-")
    print(f"there is no home directory; using {os.environ['HOME']}", file=sys.stderr)


_open_streams()
if sys.excepthook is sys.__excepthook__:
    sys.excepthook = _end_failed_imports
_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
if _default and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, _interrupt)
_set_xla_flags()
_take_any_text()
_find_home()
