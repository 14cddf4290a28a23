"""Identity of a run: comparison of two records (flags.json), whatever the names and paths of their files."""

import json
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from envs.minari_store import content as minari_content
from envs.minari_store import is_minari
from utils.errors import UserError

# A run may be resumed with other intervals, workers and videos, but not with other values of these.
PLAIN = ("env_name", "agent", "seed", "sparse")
# Entries of the record of the data: their content and that of the run started from, not their paths.
CONTENT = ("checksum", "shards", "contents", "start", "base")
# Flag that numbers depend on → the flag that puts it in effect (or, after 'not', disables it).
ACTING = {
    **dict.fromkeys(("start_training", "utd_ratio", "balanced_sampling"), "online_steps"),
    **dict.fromkeys(("rollout_steps", "distill_steps"), "online_steps"),
    **dict.fromkeys(("base_steps", "base_seed"), "not base_checkpoint"),
    **dict.fromkeys(("demonstrations", "expert_noise"), "not dataset"),
    "dataset_replace_interval": "ogbench_dataset_dir",
    **dict.fromkeys(("eval_episodes", "max_episode_steps", "reward_scale", "reward_shift"), "env_name"),
    "matmul_precision": "env_name",
}

RENAMED = {"tremor": "expert_noise"}  # flags of older records


def difference(old: Mapping[str, Any], new: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> str:
    """Returns a phrase that names the first difference between two runs; '' if there is none.

    Entries that only one of them has are not compared: another version of the code wrote them. But a setting of the
    agent that `old` lacks must have its default.

    Args:
        old: record from flags.json, or empty.
        new: settings of a run.
        defaults: default settings of the agent.
    """
    new = json.loads(json.dumps(new, default=list))
    if old.get("flags") and new.get("flags") and (text := _other_phase(old["flags"], new["flags"])):
        return text
    defaults = json.loads(json.dumps(defaults or {}, default=list))
    for name, was, now in _pairs(old, new, defaults):
        if was != now:
            return f"holds a run with {name} = {was}, not {now}"
    return ""


def _pairs(old: Mapping[str, Any], new: Mapping[str, Any], defaults: Mapping[str, Any]) -> Iterator[tuple]:
    """Yields the name of each compared entry and its two values."""
    for key in PLAIN:
        if key in old and key in new:
            yield key, old[key], new[key]
    if "agent_module" in old and "agent_module" in new:
        names = old["agent_module"], new["agent_module"]
        yield "agent_module", *(os.path.realpath(name) if name.endswith(".py") else name for name in names)
    if "config" in old:
        for field, now in sorted(new.get("config", {}).items()):
            yield f"config.{field}", old["config"].get(field, defaults.get(field, now)), now
    was, now = ({k: v for k, v in record.get("dataset", {}).items() if k in CONTENT} for record in (old, new))
    if "dataset" in old and "dataset" in new:
        # A record without 'start' is of a run that started from none.
        was, now = {"start": None, **was}, {"start": None, **now}
    for key in (key for key in CONTENT if key in was and key in now):
        for name, *values in _leaves(f"dataset.{key}", was[key], now[key]):
            yield name, *values
    was, now = ({RENAMED.get(k, k): v for k, v in record.get("flags", {}).items()} for record in (old, new))
    for key in sorted(was.keys() & now.keys() & ACTING.keys()):
        if _acts(key, was) and _acts(key, now):
            yield key, was[key], now[key]


def _leaves(name: str, was: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yields the entries that two nested records share, without paths."""
    if not (isinstance(was, dict) and isinstance(now, dict)):
        yield name, was, now
        return
    for key in sorted(was.keys() & now.keys() - {"path"}):
        yield from _leaves(f"{name}.{key}", was[key], now[key])


def _acts(flag: str, flags: Mapping[str, Any]) -> bool:
    """True if a flag changes numbers, given the others."""
    *negated, switch = ACTING[flag].split()
    return bool(flags.get(switch)) != bool(negated)


def _other_phase(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Returns a phrase if the offline phase ends at another step and either run has an online phase; else ''."""
    keys = ("offline_steps", "online_steps")
    if not all(flags.get(key) is not None for flags in (was, now) for key in keys) or was[keys[0]] == now[keys[0]]:
        return ""
    if was["online_steps"] or sum(was[key] for key in keys) == sum(now[key] for key in keys):
        steps = f"offline_steps = {was['offline_steps']}, not {now['offline_steps']}"
        return f"is in another phase; give the same steps as before: {steps}"
    return ""


def sources(flags: Mapping[str, Any], file: str | None) -> dict[str, Any]:
    """Returns a record of the files that a command starts from, made without reading any array.

    Args:
        flags: flags of the command.
        file: name of the file in --dataset_dir that the run used, if any.

    Raises:
        UserError: a file that a flag names is missing.
    """
    found: dict[str, Any] = {"base_group": flags.get("base_group"), "file": None}
    if flags.get("dataset"):
        found["dataset"] = content(Path(flags["dataset"]).expanduser())
    elif flags.get("ogbench_dataset_dir"):
        from envs.datasets import list_shards

        found["shards"] = [content(path) for path in list_shards(flags["ogbench_dataset_dir"])]
    elif is_minari(flags.get("env_name", "")):
        found["file"] = minari_content(flags["env_name"])
    else:
        directory = Path(flags["dataset_dir"]).expanduser()
        names = ("dataset_source", "dataset_episodes")
        found |= {name: flags.get(name) for name in names} | {"dataset_dir": os.path.realpath(directory)}
        # A missing file would be made again, with the same content.
        found["file"] = content(directory / file) if file and (directory / file).exists() else None
    for name in ("start_from", "base_checkpoint"):
        if flags.get(name):
            found[name] = os.path.realpath(Path(flags[name]).expanduser())
    return found


def same_sources(old: Mapping[str, Any] | None, new: Mapping[str, Any]) -> bool:
    """True if the recorded sources `old` equal `new`; a file that is missing in --dataset_dir counts as equal."""
    return old is not None and {**old, "file": None} == {**new, "file": None} and new["file"] in (None, old["file"])


def content(path: Path) -> int | list[int]:
    """Returns a checksum of the CRCs in an .npz file's directory; of another file, its size and time.

    Raises:
        UserError: the file does not exist or cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as file:
            members = sorted((info.filename, info.CRC, info.file_size) for info in file.infolist())
        return zlib.crc32(repr(members).encode())
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return [path.stat().st_size, path.stat().st_mtime_ns]
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}; check the path") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; check the file") from error
