"""Setup of JAX and XLA: checks of their environment variables, settings that decide numbers, compilation cache."""

import contextlib
import functools
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jaxlib

from utils import USER_XLA_FLAGS
from utils.errors import UserError
from utils.system.resources import cpu_digest, usable_cores

# Settings that decide numbers and types, whatever the user's environment sets for other programs.
OWN = {
    "jax_enable_x64": False,
    "jax_numpy_rank_promotion": "allow",
    "jax_numpy_dtype_promotion": "standard",
    "jax_legacy_prng_key": "allow",
    "jax_transfer_guard": "allow",
}
PRECISIONS = ("float32", "tensorfloat32", "bfloat16")  # of matrix products, by JAX's names
CHECKED = "OTQL_XLA_FLAGS"  # environment variable: the XLA_FLAGS that a parent process has tried


def check_xla_flags() -> None:
    """Checks XLA_FLAGS in a separate process, as XLA ends the process at an invalid flag.

    Raises:
        UserError: names the flag.
    """
    if USER_XLA_FLAGS and os.environ.get(CHECKED) != USER_XLA_FLAGS:
        code = "from jaxlib import xla_client; xla_client.make_cpu_client()"
        tried = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", errors="replace")
        if tried.returncode:
            lines = [line.partition("] ")[2] for line in tried.stderr.splitlines()] or [""]
            reason = next(filter(None, lines), "it ends the process")
            raise UserError(f"XLA fails with XLA_FLAGS={USER_XLA_FLAGS}: {reason}; leave that flag out")
    os.environ[CHECKED] = os.environ.get("XLA_FLAGS", "")


def set_jax() -> None:
    """Sets the options of JAX that decide numbers."""
    for name, value in OWN.items():
        if hasattr(jax.config, name):
            jax.config.update(name, value)


@contextlib.contextmanager
def matmul_precision(name: str | None) -> Iterator[None]:
    """Sets the precision of matrix products in all threads, until the block ends; None: leaves JAX's own choice."""
    config: Any = jax.config  # Its options are added at run time.
    before = config.jax_default_matmul_precision
    jax.config.update("jax_default_matmul_precision", name or before)
    try:
        yield
    finally:
        jax.config.update("jax_default_matmul_precision", before)


def device_line() -> str:
    """Returns one line on the versions and the device that a program runs on."""
    device, count = jax.devices()[0], jax.device_count()
    kind = f"CPU with {usable_cores()} cores" if device.platform == "cpu" else f"{count} × {device.device_kind}"
    return f"jax {jax.__version__}, jaxlib {jaxlib.__version__} on {kind}"


def quick_compilation() -> dict[str, int]:
    """Returns options of jax.jit for a program that runs once: on a CPU, where compiling takes longest, unoptimised."""
    return {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else {}


def device_trouble() -> str:
    """Returns a line if JAX finds no device of the kind that JAX_PLATFORMS names, else ''."""
    config: Any = jax.config  # Its options are added at run time.
    named = config.jax_platforms
    if not named:
        return ""
    try:
        jax.devices()
    except Exception as error:  # Many types, some without a message.
        text = " ".join(str(error).split()).partition(" (set JAX_PLATFORMS")[0]
        reason = f" ({text})" if text else ""
        return f"JAX finds no device with JAX_PLATFORMS={named}{reason}; unset it, or correct it"
    return ""


_show_other: Callable[..., None] = warnings.showwarning


def enable_compilation_cache() -> None:
    """Caches compiled programs in ~/.cache/otql for later processes, unless JAX_COMPILATION_CACHE_DIR is set."""
    global _show_other
    if warnings.showwarning is not _show_warning:
        _show_other, warnings.showwarning = warnings.showwarning, _show_warning
    config: Any = jax.config  # Its options are added at run time.
    if config.jax_compilation_cache_dir:
        return
    # Code for one CPU may not run on another, and a home directory is often shared.
    root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    jax.config.update("jax_compilation_cache_dir", str(root / "otql" / f"compiled-{cpu_digest()}"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def _show_warning(message: Warning | str, *arguments: Any, **keywords: Any) -> None:
    """Shows a warning; JAX's warnings about its cache, one per program and file, are reduced to a single line."""
    if "persistent compilation cache" not in str(message):
        _show_other(message, *arguments, **keywords)
    else:
        config: Any = jax.config
        _warn_uncached(str(config.jax_compilation_cache_dir), str(message).rpartition(": ")[2])


@functools.cache
def _warn_uncached(directory: str, reason: str) -> None:
    advice = "set JAX_COMPILATION_CACHE_DIR to another directory"
    print(f"compiling again, as {directory} is damaged or not writable ({reason}); {advice}", file=sys.stderr)
