"""Environment variables of JAX and XLA: rejected in a line where they cannot be followed, kept off the numbers."""

import os
import subprocess
import sys
from typing import Any

import jax

from utils import USER_XLA_FLAGS
from utils.errors import UserError

# Numbers and types are the program's own, whatever other programs of the user want of JAX.
OWN = {
    "jax_enable_x64": False,
    "jax_numpy_rank_promotion": "allow",
    "jax_numpy_dtype_promotion": "standard",
    "jax_legacy_prng_key": "allow",
    "jax_transfer_guard": "allow",
}
CHECKED = "OTQL_XLA_FLAGS"  # environment variable: the XLA_FLAGS that a process before this one has tried


def check_xla_flags() -> None:
    """Checks XLA_FLAGS in a process of its own: XLA ends the process at what it cannot read.

    Raises:
        UserError: names the flag.
    """
    if USER_XLA_FLAGS and os.environ.get(CHECKED) != USER_XLA_FLAGS:
        code = "from jaxlib import xla_client; xla_client.make_cpu_client()"
        tried = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", errors="replace")
        if tried.returncode:
            lines = [line.partition("] ")[2] for line in tried.stderr.splitlines()] or [""]
            reason = next(filter(None, lines), "it ends the process")
            raise UserError(f"XLA fails with XLA_FLAGS={USER_XLA_FLAGS}: {reason}; leave that out")
    os.environ[CHECKED] = os.environ.get("XLA_FLAGS", "")


def set_jax() -> None:
    """Sets what decides about numbers."""
    for name, value in OWN.items():
        if hasattr(jax.config, name):
            jax.config.update(name, value)


def device_trouble() -> str:
    """Says that JAX has no device of the kind that JAX_PLATFORMS names; '' if it has, or none is named."""
    config: Any = jax.config  # Its options are added at run time.
    named = config.jax_platforms
    if not named:
        return ""
    try:
        jax.devices()
    except Exception as error:  # Of many types, some without a text.
        text = " ".join(str(error).split()).partition(" (set JAX_PLATFORMS")[0]
        reason = f" ({text})" if text else ""
        return f"JAX finds no device with JAX_PLATFORMS={named}{reason}; unset it, or correct it"
    return ""
