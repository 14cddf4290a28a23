"""Provenance of a run: command line, commit, versions, device and host, recorded in flags.json but never compared."""

import datetime
import functools
import importlib.metadata
import os
import platform
import socket
import subprocess
from collections.abc import Mapping
from typing import Any

import jax

from utils.system.files import ROOT
from utils.system.resources import usable_cores

PACKAGES = ("jax", "jaxlib", "flax", "optax", "ott-jax", "numpy", "mujoco", "gymnasium", "ogbench", "otql")
# A run that is resumed elsewhere in one of these gets another record.
PLACE = ("commit", "host", "device", "device_count")


def provenance(command: str) -> dict[str, Any]:
    """Returns the provenance of a run that this process trains.

    Args:
        command: command line, or the function that was called.
    """
    devices = jax.devices()
    return {
        "command": command,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **_commit(),
        **_versions(),
        "device": devices[0].device_kind,
        "device_count": len(devices),
        "host": socket.gethostname(),
        "cores": usable_cores(),
    }


def resumed_provenance(flags: Mapping[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Returns the entry 'provenance' of a run's flags.json.

    Args:
        flags: existing record, or empty. new: provenance of this process.

    Returns:
        that of the run's start; under 'resumed' a list of those of later processes at another place.
    """
    if not flags:
        return new
    first = flags.get("provenance", {})  # Older versions recorded none.
    resumed = first.get("resumed", [])
    last = resumed[-1] if resumed else first
    if all(last.get(key) == new.get(key) for key in PLACE):
        return first
    return first | {"resumed": [*resumed, new]}


@functools.cache
def _commit() -> dict[str, Any]:
    """Returns the commit of the project's checkout and whether files differ from it; nothing without a checkout."""
    if not (ROOT / ".git").exists():
        return {}
    command = ["git", "--no-optional-locks", "-C", str(ROOT), "status", "--porcelain=v2", "--branch"]
    # Within a git hook, these name another repository.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        ended = subprocess.run(
            [*command, "--untracked-files=no"], env=environment, capture_output=True, text=True, timeout=2, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    header = [line.split() for line in ended.stdout.splitlines() if line.startswith("# ")]
    (commit,) = (words[2] for words in header if words[1] == "branch.oid")
    return {"commit": commit, "dirty": len(header) < len(ended.stdout.splitlines())}


@functools.cache
def _versions() -> dict[str, Any]:
    """Returns the platform and the versions of Python and of the installed PACKAGES."""
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"platform": platform.platform(), "python": platform.python_version(), "packages": packages}
