"""A run: its resolved settings, its directory, and the files that say what it is and whether it is finished."""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_collections

from utils.errors import UserError
from utils.run.agent_config import check_config
from utils.run.identity import difference, same_sources, sources
from utils.system import locks
from utils.system.files import atomic_write_text, disk_errors, read_json


def run_root(save_dir: str | Path, group: str, env_name: str) -> Path:
    """The directory of a group's runs on one task; those of an agent are in <root>/<agent>/sd<seed>."""
    return Path(save_dir).expanduser() / group / env_name.replace("/", "_").replace(":", "_")


@dataclass(frozen=True)
class RunSpec:
    """One run among those trained side by side in one program."""

    seed: int
    config: ml_collections.ConfigDict
    varied: dict[str, float]
    directory: Path


def make_run_specs(
    config: ml_collections.ConfigDict, seeds: range, vary: str | None, root: Path, agent_name: str
) -> list[RunSpec]:
    """The lanes of a program: every seed with every value of the varied setting.

    Args:
        vary: 'agent.lam=0.2,0.4,1' or None. Only real-valued settings can differ within one program.
        root: directory of the environment in the run group; a lane's is <root>/<agent>[_lam=0.2]/sd<seed>.

    Raises:
        UserError: the text cannot be read, or the field is unknown or not real-valued.
    """
    field, values = "", [0.0]
    if vary:
        name, _, text = vary.partition("=")
        field = name.removeprefix("agent.")
        if not text or field not in config:
            raise UserError(f"--vary={vary} cannot be read; write for example --vary=agent.lam=0.2,0.4,1")
        if not isinstance(config[field], float):
            raise UserError(f"--vary={vary}: {field} changes the program; only real-valued settings can be varied")
        try:
            values = [float(part) for part in text.split(",")]
        except ValueError as error:
            raise UserError(f"--vary={vary}: {text} is not a list of numbers") from error
        if len(set(values)) < len(values):
            raise UserError(f"--vary={vary} names a value twice")
    lanes = []
    for value, seed in itertools.product(values, seeds):
        own, name = config.copy_and_resolve_references(), agent_name
        varied: dict[str, float] = {}
        if field:
            # Short where that is exact, so that no two values share a directory.
            text = f"{value:g}" if float(f"{value:g}") == value else repr(value)
            own[field], varied, name = value, {field: value}, f"{agent_name}_{field}={text}"
            check_config(own, config)
        lanes.append(RunSpec(seed, own, varied, root / name / f"sd{seed}"))
    return lanes


def read_flags(directory: Path) -> dict[str, Any]:
    """The settings of the run that was begun in a directory, or none."""
    path = directory / "flags.json"
    return read_json(path) if path.exists() else {}


def settings_conflict(directory: Path, settings: dict[str, Any], defaults: dict[str, Any] | None = None) -> str:
    """Says in what the run that was begun in a directory differs from one of these settings; '' if in nothing."""
    return difference(read_flags(directory), settings, defaults)


def read_summary(directory: Path) -> dict[str, Any] | None:
    """Returns what an ended run says of its end: its last step, and 'diverged' if it did; None while it goes on.

    Raises:
        UserError: the file is damaged.
    """
    path = directory / "summary.json"
    summary = read_json(path) if path.exists() else None
    if summary is not None and type(summary.get("step")) is not int:
        raise UserError(
            f"{path} is damaged (no whole number 'step'); restore it, or move it elsewhere: the run resumes"
        )
    return summary


def beyond(directory: Path, step: int) -> str:
    """Says that the finished run in a directory went further than `step`; '' if it did not."""
    summary = read_summary(directory)
    further = summary["step"] if summary and "diverged" not in summary and summary["step"] > step else 0
    return f"is at step {further} already; give {further} steps or more in all" if further else ""


class RunDirectory:
    """The directory of one run: settings, finish mark and lock.

    Args:
        directory: made if missing. settings: of the run. defaults: of its agent's settings, as older runs lack some.

    Raises:
        UserError: the directory cannot be written, another process works in it, or it holds a run of other settings.
    """

    def __init__(self, directory: Path, settings: dict[str, Any], defaults: dict[str, Any] | None = None):
        self.directory, self._defaults = directory, defaults
        with disk_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)
        try:
            # For the life of this object.
            self._lock = locks.take(directory / ".lock")
        except locks.Held as held:
            advice = "wait for it, or use another --run_group"
            raise UserError(f"another process is working on {directory}; {advice}{held}") from held
        self._refuse_other(settings)

    def check(self, dataset: dict[str, Any]) -> None:
        """Checks that a run begun here is of these data.

        Raises:
            UserError: it is not.
        """
        self._refuse_other({"dataset": dataset})

    def settle(self, settings: dict[str, Any], dataset: dict[str, Any]) -> None:
        """Writes flags.json, once all settings are known, and what the data are."""
        settings = settings | {"dataset": dataset, "sources": sources(settings["flags"], dataset.get("file"))}
        text = json.dumps(settings, indent=2, sort_keys=True, default=list)
        atomic_write_text(self.directory / "flags.json", text + "\n")

    def same_sources(self, flags: dict[str, Any]) -> bool:
        """True if a command with these flags starts from the very files that the run began with."""
        old = self.recorded()
        return same_sources(old.get("sources"), sources(flags, old.get("dataset", {}).get("file")))

    def _refuse_other(self, settings: dict[str, Any]) -> None:
        if difference := settings_conflict(self.directory, settings, self._defaults):
            raise UserError(f"{self.directory} {difference}; use another --run_group or --save_dir")

    def recorded(self) -> dict[str, Any]:
        """The settings of the run that was begun here, or none."""
        return read_flags(self.directory)

    def begun(self) -> bool:
        """Whether the run was ever started, even if it has no checkpoint yet."""
        return (self.directory / "flags.json").exists()

    def finished(self, step: int) -> dict[str, Any] | None:
        """The summary of the run if it went to `step`."""
        summary = read_summary(self.directory)
        return summary if summary and "diverged" not in summary and summary["step"] >= step else None

    def diverged(self) -> dict[str, Any] | None:
        """Returns the summary of the run if it has diverged."""
        summary = read_summary(self.directory)
        return summary if summary and "diverged" in summary else None

    def finish(self, summary: dict[str, Any]) -> None:
        """Marks the run as ended."""
        atomic_write_text(self.directory / "summary.json", json.dumps(summary, indent=2, sort_keys=True) + "\n")


def checkpoint_dir(directory: str | Path) -> Path:
    """Where a run keeps its checkpoints."""
    return Path(directory).expanduser() / "checkpoints"
