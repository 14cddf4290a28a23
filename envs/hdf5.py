"""Reading of HDF5 files in D4RL's layout: one dataset an array, one row a step, `timeouts` beside `terminals`."""

import sys
from pathlib import Path

import numpy as np

from envs.npz import MINARI, Arrays, check_rows, check_size
from utils.errors import UserError

MAGIC = b"\x89HDF\r\n\x1a\n"


def is_hdf5(path: Path) -> bool:
    """True if a file's content is HDF5, whatever its name is; a dataset of Minari is not read as such a file."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC and path.name != "main_data.hdf5"
    except OSError:
        return False


def read_hdf5(path: Path, required: tuple[str, ...], optional: tuple[str, ...] = ()) -> Arrays:
    """Reads arrays with one row per time step; arguments, result and errors are those of `read_npz`.

    Groups, such as D4RL's 'infos' and 'metadata', and other arrays are left out.

    Raises:
        UserError: the file is invalid, or h5py is not installed.
    """
    try:
        import h5py
    except ImportError as error:
        raise UserError(f"{path} is HDF5, which needs h5py; install it: pip install h5py") from error
    arrays: Arrays = {}
    try:
        with h5py.File(path, "r") as file:
            found = [name for name, entry in file.items() if isinstance(entry, h5py.Dataset)]
            names = {name: name for name in found}
            taken = {name: other for name, other in MINARI.items() if name not in names and other in names}
            missing = [name for name in required if name not in names | taken]
            for name in () if missing else (*required, *optional):
                if source := (names | taken).get(name):
                    entry = file[source]
                    if entry.dtype.kind not in "biuf":
                        raise UserError(f"'{source}' in {path} holds {entry.dtype}, not numbers; save it as numbers")
                    check_size(path, name, entry.nbytes)
                    arrays[name] = np.asarray(entry[()])
    except (OSError, KeyError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:100]
        raise UserError(f"{path} is damaged ({reason}); get it again, or name another file") from error
    if missing:
        raise UserError(
            f"{path} lacks the array '{missing[0]}'; it needs {', '.join(required)}, "
            f"and it has {', '.join(found)[:200] or 'none'}"
        )
    if taken:
        read = ", ".join(f"'{other}' is read as '{name}'" for name, other in taken.items())
        print(f"{path}: {read}.", file=sys.stderr, flush=True)
    check_rows(path, arrays)
    return arrays
