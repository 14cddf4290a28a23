"""A run's directory: the settings that identify it (flags.json), its end (summary.json), its lock and checkpoints."""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_collections

from utils.errors import UserError, did_you_mean
from utils.run import checkpoints
from utils.run.agent_config import check_config
from utils.run.identity import difference, same_sources, sources
from utils.run.provenance import provenance, resumed_provenance
from utils.system import locks
from utils.system.files import disk_errors, read_json, write_json


def run_root(save_dir: str | Path, group: str, env_name: str) -> Path:
    """Returns the directory of a group's runs on one task; an agent's are in <root>/<agent>/sd<seed>."""
    return Path(save_dir).expanduser() / group / env_name.replace("/", "_").replace(":", "_")


def checkpoint_dir(directory: str | Path) -> Path:
    """Returns the directory of a run's checkpoints."""
    return Path(directory).expanduser() / "checkpoints"


@dataclass(frozen=True)
class RunSpec:
    """One run of a command.

    Attributes:
        seed: of the run. config: of its agent. varied: the field of --vary and its value, or nothing.
        directory: of its files.
    """

    seed: int
    config: ml_collections.ConfigDict
    varied: dict[str, float]
    directory: Path


def make_run_specs(
    config: ml_collections.ConfigDict, seeds: range, vary: str | None, root: Path, agent_name: str
) -> list[RunSpec]:
    """Returns the runs of a command: every seed with every value of the varied setting.

    Args:
        config: of the agent. seeds: of the runs.
        vary: 'agent.lam=0.2,0.4,1' or None. Only real-valued settings can differ within one program.
        root: directory of the environment in the run group; a run's is <root>/<agent>[_lam=0.2]/sd<seed>.
        agent_name: name of the agent's file.

    Raises:
        UserError: the text cannot be read, or the field is unknown or not real-valued.
    """
    field, values = "", [0.0]
    if vary:
        name, _, text = vary.partition("=")
        field = name.removeprefix("agent.")
        if text and field not in config:
            hint = did_you_mean(field, config.keys(), "agent.{}")
            raise UserError(f"--vary={vary}: agent {agent_name} has no setting '{field}'{hint}")
        if not text:
            raise UserError(f"--vary={vary} cannot be read; write for example --vary=agent.lam=0.2,0.4,1")
        if not isinstance(config[field], float):
            raise UserError(f"--vary={vary}: {field} changes the program; only real-valued settings can be varied")
        try:
            values = [float(part) for part in text.split(",")]
        except ValueError as error:
            raise UserError(f"--vary={vary}: {text} is not a list of numbers") from error
        if len(set(values)) < len(values):
            raise UserError(f"--vary={vary} names a value twice")
    specs = []
    for value, seed in itertools.product(values, seeds):
        own, name = config.copy_and_resolve_references(), agent_name
        varied: dict[str, float] = {}
        if field:
            # Short where that is exact, so that no two values share a directory.
            text = f"{value:g}" if float(f"{value:g}") == value else repr(value)
            own[field], varied, name = value, {field: value}, f"{agent_name}_{field}={text}"
            check_config(own, config, agent_name)
        specs.append(RunSpec(seed, own, varied, root / name / f"sd{seed}"))
    return specs


def read_flags(directory: Path) -> dict[str, Any]:
    """Returns the settings of the run in a directory, or nothing if there is none."""
    path = directory / "flags.json"
    return read_json(path) if path.exists() else {}


def settings_conflict(directory: Path, settings: dict[str, Any], defaults: dict[str, Any] | None = None) -> str:
    """Returns how the run in a directory differs from one of these settings; '' if it does not, or there is none."""
    return difference(read_flags(directory), settings, defaults)


def read_summary(directory: Path) -> dict[str, Any] | None:
    """Returns the summary of an ended run: its last step, and 'diverged' if it did; None if it has not ended.

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
    """Returns a message if the finished run in a directory is longer than `step`, else ''."""
    summary = read_summary(directory)
    further = summary["step"] if summary and "diverged" not in summary and summary["step"] > step else 0
    return f"is at step {further} already; give {further} steps or more in all" if further else ""


class RunDirectory:
    """The locked directory of a run: its settings, its checkpoints, and how it ended.

    Attributes:
        spec: of the run. settings: as flags.json records them, without what the dataset adds.
        command: command line, for the record.
        checkpoints: directory of its checkpoints. diverged: what became not finite in this process, or ''.
    """

    def __init__(
        self,
        spec: RunSpec,
        settings: dict[str, Any],
        defaults: dict[str, Any] | None = None,
        command: str = "train()",
    ):
        """Creates the directory if it is missing and locks it.

        Args:
            spec: of the run. settings: of the run.
            defaults: of the agent's settings, for runs of older versions that lack some.
            command: command line, for the record.

        Raises:
            UserError: the directory cannot be written, another process uses it, or it holds a run of other settings.
        """
        self.spec, self.settings, self._defaults, self.diverged = spec, settings, defaults, ""
        self.command = command
        self.checkpoints = checkpoint_dir(spec.directory)
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock = locks.take(self.path / ".lock")
        except locks.Held as held:
            advice = "wait for it, or use another --run_group"
            raise UserError(f"another process is working on {self.path}; {advice}{held}") from held
        try:
            self._check_settings(self.settings)
        except BaseException:
            self.release()
            raise

    @property
    def path(self) -> Path:
        """The directory."""
        return self.spec.directory

    def release(self) -> None:
        """Releases the lock."""
        self._lock.release()

    def check_dataset(self, record: dict[str, Any]) -> None:
        """Checks that an existing run here was trained on this dataset.

        Raises:
            UserError: it was not.
        """
        self._check_settings({"dataset": record})

    def write_flags(self, settings: dict[str, Any], record: dict[str, Any], trains: bool = True) -> None:
        """Writes flags.json: the settings, the record of the dataset, and the files that the command starts from.

        Args:
            settings: of the run. record: of the dataset.
            trains: True to add the provenance of this process, False if the run has ended.
        """
        settings = settings | {"dataset": record, "sources": sources(settings["flags"], record.get("file"))}
        if trains:
            settings["provenance"] = resumed_provenance(self.read_flags(), provenance(self.command))
        write_json(self.path / "flags.json", settings)

    def read_flags(self) -> dict[str, Any]:
        """Returns the settings of the existing run, or nothing if there is none."""
        return read_flags(self.path)

    def exists(self) -> bool:
        """True if a run was started here, even if it has no checkpoint yet."""
        return (self.path / "flags.json").exists()

    def same_sources(self, flags: dict[str, Any]) -> bool:
        """True if a command with these flags starts from the very files that the existing run started from."""
        old = self.read_flags()
        return same_sources(old.get("sources"), sources(flags, old.get("dataset", {}).get("file")))

    def finished(self, step: int) -> bool:
        """True if the run ended at `step` or later without divergence."""
        summary = read_summary(self.path)
        return summary is not None and "diverged" not in summary and summary["step"] >= step

    def divergence(self) -> str:
        """Returns one line on where the run diverged and what usually helps; '' if it has not."""
        summary, saved = read_summary(self.path), checkpoints.saved_steps(self.checkpoints)
        if not summary or "diverged" not in summary:
            return ""
        kept = f"the checkpoint of step {saved[-1]} is sound" if saved else "there is no checkpoint"
        advice = "a smaller --agent.lr in another --run_group usually helps, or rewards of a smaller scale"
        return f"{self.path} at step {summary['step']}, not finite: {summary['diverged']}; {kept}; {advice}"

    def diverge(self, step: int, quantity: str) -> None:
        """Ends the run at a step at which `quantity` is not finite; its last checkpoint stays."""
        self.diverged = quantity
        self.write_summary({"step": step, "diverged": quantity})

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Marks the run as ended."""
        write_json(self.path / "summary.json", summary)

    def _check_settings(self, settings: dict[str, Any]) -> None:
        if difference := settings_conflict(self.path, settings, self._defaults):
            raise UserError(f"{self.path} {difference}; use another --run_group or --save_dir")
