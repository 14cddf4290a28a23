"""What programs and agents share.

Importing it sets how XLA compiles for a processor, unless XLA_FLAGS says so; lets output that is not UTF-8 take any
text; and gives this process and its children a home directory if they have none.
"""

import os
import sys
import tempfile
from contextlib import suppress

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


def _take_any_text() -> None:
    """Lets print write what the encoding of the output lacks as \\u03b5: a name or a Greek letter is no error."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):  # Replaced by something else, or closed.
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


_set_xla_flags()
_take_any_text()
_find_home()
