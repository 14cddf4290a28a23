"""Minari's local store: where its datasets are, what they hold, and their reference scores."""

import os
import re
import warnings
import zlib
from pathlib import Path
from types import ModuleType
from typing import Any

from utils.errors import UserError, did_you_mean
from utils.system.files import read_json

PREFIX = "minari:"
LISTING = "minari:list"
_ID = re.compile(r"(?:[-\w]+/)*[-\w]+-v\d+")


def is_minari(env_name: str) -> bool:
    """True for the name of a task whose data are a dataset of Minari."""
    return env_name.startswith(PREFIX)


def dataset_id(env_name: str) -> str:
    """Returns Minari's name of the dataset of a task 'minari:<id>'.

    Raises:
        UserError: it is no name of a dataset.
    """
    name = env_name.removeprefix(PREFIX)
    if not _ID.fullmatch(name):
        raise UserError(
            f"'{env_name}' does not name a dataset; write for example minari:D4RL/door/human-v2 "
            f"(--env_name={LISTING} lists those in the local store)"
        )
    return name


def store() -> Path:
    """Returns the directory of the local store: $MINARI_DATASETS_PATH, else ~/.minari/datasets."""
    own = os.environ.get("MINARI_DATASETS_PATH")
    return Path(own) if own is not None else Path("~/.minari/datasets").expanduser()


def data_folder(env_name: str) -> Path:
    """Returns the folder of a dataset's files in the local store, whether it exists or not."""
    return store() / dataset_id(env_name) / "data"


def metadata(env_name: str) -> dict[str, Any]:
    """Returns a dataset's metadata, empty if it is not in the local store."""
    return read_json(data_folder(env_name) / "metadata.json", missing_ok=True) or {}


def reference_scores(env_name: str) -> tuple[float, float] | None:
    """Returns the returns (low, high) that a dataset of Minari scores as 0 and 1; None for tasks without.

    Minari takes a random policy's mean return for the first, an expert's for the second.
    """
    if not is_minari(env_name) or env_name == LISTING:
        return None
    found = metadata(env_name)
    low, high = found.get("ref_min_score"), found.get("ref_max_score")
    return None if low is None or high is None or low == high else (float(low), float(high))


def normalized_score(reference: tuple[float, float], returns: Any) -> Any:
    """Returns (return − low) / (high − low), Minari's normalised score; papers print it times 100."""
    low, high = reference
    return (returns - low) / (high - low)


def content(env_name: str) -> int | None:
    """Returns a checksum of the names, sizes and times of a dataset's files; None if there are none."""
    folder = data_folder(env_name)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    stats = [(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return zlib.crc32(repr(stats).encode()) if stats else None


def import_minari() -> ModuleType:
    """Returns the library.

    Raises:
        UserError: it is not installed.
    """
    try:
        import minari
    except ImportError as error:
        raise UserError(
            f"datasets of Minari need its library ({error}); install it: pip install '.[minari]'"
        ) from error
    return minari


def local_datasets() -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Returns the metadata of the datasets in the local store, by their ids, and warnings of Minari.

    Raises:
        UserError: Minari is not installed, or the store cannot be read.
    """
    library = import_minari()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = library.list_local_datasets()
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"cannot list the local store {store()}: {' '.join(str(error).split())}") from error
    return found, [" ".join(str(one.message).split()) for one in caught]


def listing() -> str:
    """Returns a table of the datasets in the local store."""
    found, problems = local_datasets()
    lines = [f"Minari's local store {store()} holds {len(found) or 'no'} dataset{'s' * (len(found) != 1)}."]
    if not found:
        lines.append("  minari download D4RL/door/human-v2 gets one, python -m envs.record makes one.")
    width = max(map(len, found), default=0)
    for name, about in found.items():
        spec = re.search(r'"id": "([^"]*)"', about.get("env_spec") or "")
        size = f"{about['total_episodes']} episodes, {about['total_steps']} steps, {about.get('dataset_size', '?')} MB"
        scored = ", with reference scores" if reference_scores(PREFIX + name) else ""
        environment = spec[1] if spec else "no environment"
        lines.append(f"  {PREFIX}{name:{width}}  {size}; {environment}; {about.get('data_format', '?')}{scored}")
    return "\n".join([*lines, *(f"warning: {problem}" for problem in problems)])


def suggestion(name: str) -> str:
    """Returns '; did you mean …?' with the most similar dataset of the local store, or ''."""
    return did_you_mean(name, local_datasets()[0], f"--env_name={PREFIX}{{}}")
