"""Reading and writing of .npz files: writes are atomic, invalid files end in a one-line error."""

import sys
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from envs.file_kinds import other_kind
from utils.errors import UserError
from utils.system.files import atomic_open
from utils.system.resources import free_memory

Arrays = dict[str, np.ndarray]

MINARI = {"terminals": "terminations", "timeouts": "truncations"}  # Our names of arrays → Minari's.
LARGEST = 1e18  # A number beyond it overflows float32 as soon as it is squared and summed.

# Raised by NumPy for a file that is truncated, damaged, or of another kind.
BROKEN_NPZ = (zipfile.BadZipFile, EOFError, zlib.error, ValueError, KeyError, NotImplementedError)


def write_npz(path: Path, arrays: Mapping[str, Any]) -> None:
    """Writes a compressed .npz file atomically."""
    with atomic_open(path) as file:
        np.savez_compressed(file, **arrays)


def read_npz(path: Path, required: tuple[str, ...], optional: tuple[str, ...] = ()) -> Arrays:
    """Reads arrays with one row per time step.

    Args:
        path: the file.
        required: names of arrays that must exist.
        optional: names of arrays that are read if they exist.

    Returns:
        The arrays of the file, all of the same length, not empty, numeric, and finite as float32.

    Raises:
        UserError: the file is missing or invalid.
    """
    arrays: Arrays = {}
    if kind := other_kind(path):
        what = "is damaged or no .npz file" if path.suffix == ".npz" else "is no .npz file"
        raise UserError(f"{path} {what}: it is {kind}" if path.is_file() else f"cannot read {path}: it is {kind}")
    try:
        with np.load(path) as file:
            names = _names(path, file)
            missing = [name for name in required if name not in names]
            for name in () if missing else (*required, *optional):
                if name in names:
                    _check_memory(path, file, names[name])
                    arrays[name] = _load(path, file, names[name])
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}; check the path") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; check the file") from error
    except (*BROKEN_NPZ, AttributeError, TypeError) as error:  # The last two: np.load gave a plain array.
        reason = " ".join(str(error).split())[:100]
        raise UserError(
            f"{path} is damaged or no .npz file ({type(error).__name__}: {reason}); get it again, or name another file"
        ) from error
    if missing:
        raise UserError(
            f"{path} lacks the array '{missing[0]}'; it needs {', '.join(required)}, "
            f"and it has {', '.join(names)[:200] or 'none'}; np.savez(path, {missing[0]}=...) names an array"
        )
    check_rows(path, arrays)
    return arrays


def npz_names(path: Path) -> set[str]:
    """Returns the names of the arrays in a file that `read_npz` has read."""
    with np.load(path) as file:
        return set(file.files)


def _names(path: Path, file: np.lib.npyio.NpzFile) -> dict[str, str]:
    """Returns our name → the file's name of its arrays; prints which of Minari's names are read as ours."""
    names = {name: name for name in file}
    taken = {name: other for name, other in MINARI.items() if name not in names and other in names}
    if taken:
        read = ", ".join(f"'{other}' is read as '{name}'" for name, other in taken.items())
        print(f"{path}: {read}.", file=sys.stderr, flush=True)
    return names | taken


def _load(path: Path, file: np.lib.npyio.NpzFile, name: str) -> np.ndarray:
    """Returns an array of a file; rejects one of Python objects."""
    try:
        return file[name]
    except ValueError as error:
        if "allow_pickle" not in str(error):
            raise
        raise UserError(
            f"'{name}' in {path} holds Python objects, or is damaged; save it as one array of numbers: "
            f"np.savez(path, {name}=np.stack({name}).astype(np.float32))"
        ) from error


def _check_memory(path: Path, file: np.lib.npyio.NpzFile, name: str) -> None:
    """Checks that an array fits in memory before it is read: the system would kill the process."""
    assert file.zip is not None  # It is open.
    check_size(path, name, file.zip.getinfo(f"{name}.npy").file_size)


def check_size(path: Path, name: str, size: int) -> None:
    """Checks that an array of `size` bytes fits in memory.

    Raises:
        UserError: it does not.
    """
    if size > (free := free_memory()):
        raise UserError(
            f"'{name}' in {path} takes {size / 2**30:.1f} GiB of memory, {free / 2**30:.1f} are free; "
            "split the file into shards (--ogbench_dataset_dir), or use a machine with more"
        )


def check_images(path: Path, array: np.ndarray, shape: tuple[int, ...] | None) -> None:
    """Checks that an array is [N, C, h, w, 3] of uint8, with the given shape [C, h, w, 3].

    Raises:
        UserError: it is not.
    """
    if array.dtype != np.uint8:
        raise UserError(f"'images' in {path} holds {array.dtype}; images must be uint8, from 0 to 255")
    if array.ndim != 5 or array.shape[4] != 3:
        raise UserError(f"'images' in {path} has shape {list(array.shape)}; it must be [N, cameras, height, width, 3]")
    if shape is not None and array.shape[1:] != shape:
        raise UserError(
            f"'images' in {path} has shape {list(array.shape)}, the environment gives {list(shape)} per step; "
            "use images of its cameras in their size"
        )


def check_rows(path: Path, arrays: Arrays) -> None:
    """Checks that the arrays have the same number of rows, at least one, and numbers that float32 can represent.

    Raises:
        UserError: they do not.
    """
    lengths = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise UserError(f"the arrays of {path} differ in length ({listed}); give each one row per step")
    if not all(lengths.values()):
        raise UserError(f"{path} is empty: its arrays have no rows; name another file")
    for name, array in arrays.items():
        if array.dtype.kind not in "biuf":
            raise UserError(f"'{name}' in {path} holds {array.dtype}, not numbers; save it as numbers")
        if array.dtype.itemsize > 1:
            _check_finite(path, name, array)


def _check_finite(path: Path, name: str, array: np.ndarray) -> None:
    """Checks that an array is finite, also in the float32 arithmetic of training."""
    with np.errstate(over="ignore"):
        usable = np.abs(array.astype(np.float32, copy=False)) <= LARGEST  # False for NaN, too.
    if usable.all():
        return
    place = tuple(int(i) for i in np.argwhere(~usable)[0])
    value, row = array[place], place[0]
    if not np.isfinite(value):
        raise UserError(
            f"'{name}' in {path} is NaN or infinite (first in row {row}); save a file without such episodes"
        )
    raise UserError(
        f"'{name}' in {path} holds {value:.3g} (first in row {row}), too large for float32 arithmetic; "
        "if it marks a missing reading, save a file without such episodes, else rescale"
    )


def check_width(path: Path, name: str, array: np.ndarray, width: int | None) -> None:
    """Checks that an array is [N, width], or [N, any] for None.

    Raises:
        UserError: it is not.
    """
    if width is None and array.ndim != 2:
        raise UserError(f"'{name}' in {path} has shape {list(array.shape)}; it must have two axes, [N, width]")
    if width is not None and (array.ndim != 2 or array.shape[1] != width):
        raise UserError(
            f"'{name}' in {path} has shape {list(array.shape)}, the environment needs [N, {width}]; "
            "the file belongs to another environment"
        )


def check_flags(path: Path, name: str, array: np.ndarray) -> None:
    """Checks that an array is [N] of zeros and ones.

    Raises:
        UserError: it is not.
    """
    if array.ndim != 1 or not np.isin(array, (0, 1)).all():
        raise UserError(f"'{name}' in {path} must be one 0 or 1 per row; save it so")
