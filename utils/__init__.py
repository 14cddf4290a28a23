"""What programs and agents share. Importing it sets how XLA compiles for a processor, unless XLA_FLAGS says so."""

import os

try:
    from jaxlib.version import __version_info__ as jaxlib_version
except ImportError:  # On a robot's PC there is no JAX, and what is imported there needs none.
    jaxlib_version = (0, 0, 0)

USER_XLA_FLAGS = os.environ.get("XLA_FLAGS", "")
_FLAG = "xla_cpu_experimental_ynn_fusion_type"


def _set_xla_flags() -> None:
    """Keeps YNNPACK to matrix products by themselves: with what surrounds them it is slower, at times by far."""
    # Older versions end the process at a flag that they do not know.
    if _FLAG not in USER_XLA_FLAGS and jaxlib_version >= (0, 10, 2):
        os.environ["XLA_FLAGS"] = f"{USER_XLA_FLAGS} --{_FLAG}=LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT".strip()


_set_xla_flags()
