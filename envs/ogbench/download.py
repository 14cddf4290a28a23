"""Download of OGBench's datasets, with distinct errors for no network, no such file, and a full disk."""

import contextlib
import errno
import http.client
import socket
import urllib.error
import zipfile
from pathlib import Path

from envs.ogbench import import_ogbench
from utils.errors import UserError
from utils.system.locks import exclusive_lock

TIMEOUT = 20.0  # Seconds without an answer from the server.
_OWN_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


def download(name: str, directory: Path) -> str | None:
    """Downloads a dataset's two files from OGBench's server.

    Args:
        name: dataset name, such as 'cube-double-play-v0'.
        directory: of the files; created if missing.

    Returns:
        None on success, else one line with the reason of the failure. An incomplete file is deleted.

    Raises:
        UserError: the directory cannot be written.
    """
    import_ogbench()
    import ogbench

    with exclusive_lock(directory / f"{name}.download.lock"):
        timeout = socket.getdefaulttimeout()
        socket.setdefaulttimeout(TIMEOUT)
        try:
            ogbench.download_datasets([name], str(directory))
        except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors.
            if isinstance(error, OSError) and error.errno in _OWN_FAULTS:
                raise UserError(f"cannot write to {directory}: {error.strerror}; free some space there") from error
            return _reason(error)
        finally:
            socket.setdefaulttimeout(timeout)
            for suffix in ("", "-val"):
                _drop_unfinished(directory / f"{name}{suffix}.npz")
    return None if (directory / f"{name}.npz").exists() else "the connection was cut"


def _reason(error: Exception) -> str:
    """Returns a short reason for a failed download."""
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answered {error.code} {error.reason}"
    return f"no connection to the server: {getattr(error, 'reason', None) or str(error) or type(error).__name__}"


def _drop_unfinished(path: Path) -> None:
    """Deletes the temporary file of a failed download, and a truncated file."""
    path.with_name(f"{path.name}.tmp").unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError):
        if not zipfile.is_zipfile(path):
            path.unlink()
