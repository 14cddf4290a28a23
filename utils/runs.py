"""A run: its resolved settings, its directory, and the files that say what it is and whether it is finished."""

import itertools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import ml_collections
import numpy as np

from utils import checkpoints, locks
from utils.agent_files import check_module, find_modules_in, import_file
from utils.encoders import ENCODERS
from utils.errors import UserError
from utils.files import atomic_write_text, disk_errors
from utils.identity import difference, same_sources, sources
from utils.observations import blank
from utils.restoring import restore

ROOT = Path(__file__).resolve().parent.parent
PRESETS = ("paper", "cpu", "none")


def run_root(save_dir: str | Path, group: str, env_name: str) -> Path:
    """The directory of a group's runs on one task; those of an agent are in <root>/<agent>/sd<seed>."""
    return Path(save_dir).expanduser() / group / env_name.replace("/", "_").replace(":", "_")


def load_agent(path: str) -> ModuleType:
    """Imports an agent file, inside or outside agents/.

    The file defines `Agent`, `get_config()` and `PRESETS` (domain → settings); `CPU` (settings of --preset=cpu) may be
    left out.

    Raises:
        UserError: there is no such file, it does not import, or it lacks one of these.
    """
    file = Path(path).expanduser()
    file = file if file.exists() else ROOT / path
    known = ", ".join(sorted(f"agents/{p.name}" for p in (ROOT / "agents").glob("*.py") if p.stem not in NOT_AGENTS))
    if not file.is_file():
        raise UserError(f"there is no agent file {path}; use one of {known}, or the path of your own")
    own = file.resolve().parent == ROOT / "agents"
    module = import_file(file, f"{'agents.' if own else 'agent_'}{file.stem}", f"agent file {path}")
    check_module(module, path)
    return module


NOT_AGENTS = {"__init__", "base", "soft"}


def agent_module(module: ModuleType) -> str:
    """What tells agent files of one name apart: a module of the project by its name, another one by its file."""
    if module.__name__.startswith("agents."):
        return module.__name__
    assert module.__file__ is not None  # `load_agent` imports files alone.
    return os.path.realpath(module.__file__)


def resolve_config(
    module: ModuleType, domain: str, preset: str, overrides: dict[str, Any]
) -> tuple[ml_collections.ConfigDict, bool, str]:
    """Joins an agent's defaults, a preset and what the user set, which wins.

    Args:
        module: from `load_agent`. domain: key of the presets. preset: one of PRESETS. overrides: field → value;
            `sparse` and `horizon_length` may be among them.

    Returns:
        the agent's config, whether rewards are made sparse, and a line on the preset that was applied.

    Raises:
        UserError: an unknown preset, or an override of an unknown field or of the wrong type.
    """
    if preset not in PRESETS:
        raise UserError(f"unknown preset '{preset}'; use one of {', '.join(PRESETS)}")
    if isinstance(overrides.get("sparse"), str):
        raise UserError("rewards are no setting of an agent; write --sparse or --nosparse")
    values: dict[str, Any] = {}
    note = "preset none: the agent's defaults"
    if preset != "none":
        values |= module.PRESETS.get(domain, {})
        known = domain in module.PRESETS
        note = f"preset {preset}: {'settings of ' + domain if known else 'none for ' + domain + ', defaults apply'}"
    if preset == "cpu":
        values |= getattr(module, "CPU", {})
        note += ", with small networks and settings for short runs"
    values |= overrides
    sparse = bool(values.pop("sparse", False))
    config = module.get_config()
    for field, value in values.items():
        try:
            set_field(config, field, value)
        except UserError as error:
            if field in overrides:
                raise
            raise UserError(f"preset '{preset}' of {module.__file__} for {domain}: {error}") from error
    check_config(config, module.get_config())
    return config, sparse, note


def set_field(config: ml_collections.ConfigDict, field: str, value: Any) -> None:
    """Sets one field, turning text from the command line into the field's type.

    Raises:
        UserError: there is no such field, or the value does not fit it.
    """
    if field not in config:
        raise UserError(f"this agent has no setting '{field}'; it has {', '.join(sorted(config.keys()))}")
    default = config[field]
    try:
        if isinstance(value, str) and not isinstance(default, str):
            value = _parse(value, default)
        elif isinstance(default, float):
            value = float(value)
        config[field] = tuple(value) if isinstance(default, tuple) else value
    except (KeyError, TypeError, ValueError) as error:
        kind = "list of integers such as 256,256" if isinstance(default, tuple) else type(default).__name__
        raise UserError(f"--agent.{field}={value} does not fit: it must be of type {kind}") from error


def _parse(text: str, default: Any) -> Any:
    """Reads `text` as a value of the type of `default`."""
    if isinstance(default, bool):
        return {"true": True, "1": True, "false": False, "0": False}[text.lower()] if text else True
    if isinstance(default, tuple):
        kind = type(default[0])
        return tuple(kind(part) for part in text.strip("()[] ").split(",") if part.strip())
    return type(default)(text)


def check_config(config: ml_collections.ConfigDict, defaults: ml_collections.ConfigDict) -> None:
    """Refuses values that no agent can work with.

    Integers are sizes and counts, at least 1, unless the agent's own default is smaller.

    Raises:
        UserError: names the field and its bounds.
    """
    for field, value in config.items():
        least = min(_integers(defaults[field]))
        if any(number < least for number in _integers(value)):
            raise UserError(f"--agent.{field}={value}: it must be at least {least}")
        if isinstance(value, float) and not abs(value) < float("inf"):
            raise UserError(f"--agent.{field}={value}: it must be a finite number")
        if field in ("discount", "tau", "flow_tau", "kappa") and not 0 <= value <= 1:
            raise UserError(f"--agent.{field}={value}: it must be between 0 and 1")
        if field in POSITIVE and not value > 0:
            raise UserError(f"--agent.{field}={value}: it must be greater than 0")
        if field in NOT_NEGATIVE and not value >= 0:
            raise UserError(f"--agent.{field}={value}: it must not be negative")
    for field, choices in CHOICES.items():
        if field in config and config[field] not in choices:
            raise UserError(f"--agent.{field}={config[field]}: use one of {', '.join(choices)}")


def _integers(value: Any) -> list[int]:
    """The integers that a setting holds, and 1."""
    return [1, *(v for v in (value if isinstance(value, tuple) else (value,)) if type(v) is int)]


POSITIVE = ("lr", "epsilon", "w_max", "noise_scale")
NOT_NEGATIVE = ("rho", "lam", "alpha", "threshold", "inv_temp", "fql_alpha", "edit_scale", "guidance_coef")
CHOICES = {
    "window_rule": ("pad", "drop"),
    "coupling": ("ot", "independent"),
    "source_conditions": ("iid", "systematic", "resampled", "weighted"),
    "sampler": ("estimate", "ddpm"),
    "encoder": tuple(ENCODERS),
}


@dataclass(frozen=True)
class Lane:
    """One run among those trained side by side in one program."""

    seed: int
    config: ml_collections.ConfigDict
    varied: dict[str, float]
    directory: Path


def make_lanes(
    config: ml_collections.ConfigDict, seeds: range, vary: str | None, root: Path, agent_name: str
) -> list[Lane]:
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
        lanes.append(Lane(seed, own, varied, root / name / f"sd{seed}"))
    return lanes


def recorded(directory: Path) -> dict[str, Any]:
    """The settings of the run that was begun in a directory, or none."""
    path = directory / "flags.json"
    return read_json(path) if path.exists() else {}


def other_run(directory: Path, settings: dict[str, Any], defaults: dict[str, Any] | None = None) -> str:
    """Says in what the run that was begun in a directory differs from one of these settings; '' if in nothing."""
    return difference(recorded(directory), settings, defaults)


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


class RunFiles:
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
        if difference := other_run(self.directory, settings, self._defaults):
            raise UserError(f"{self.directory} {difference}; use another --run_group or --save_dir")

    def recorded(self) -> dict[str, Any]:
        """The settings of the run that was begun here, or none."""
        return recorded(self.directory)

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


NEEDED = ("agent", "agent_module", "config", "flags", "observation_dim", "chunk_dim")  # of flags.json, to load a run


def load_run(directory: str | Path, step: int | None = None) -> tuple[Any, dict[str, Any], int]:
    """Loads the agent of a run.

    Args:
        directory: of the run, with flags.json and checkpoints/.
        step: of the checkpoint; None: the newest valid one.

    Returns:
        the agent, the run's settings (flags.json), and the step of the checkpoint.

    Raises:
        UserError: there is no run, or no such checkpoint, or the agent's file is gone.
    """
    directory = Path(directory).expanduser()
    if not (directory / "flags.json").is_file():
        raise UserError(f"{directory} is not the directory of a run: it has no flags.json")
    settings, folder = read_json(directory / "flags.json"), checkpoint_dir(directory)
    if missing := [name for name in NEEDED if name not in settings]:
        raise UserError(
            f"{directory / 'flags.json'} lacks {', '.join(missing)}: it was changed, or is of an older version"
        )
    if step is None:
        found = checkpoints.load_latest(folder)
        if not found:
            raise UserError(f"{directory} has no valid checkpoint")
        step, state = found
    else:
        if step not in checkpoints.saved_steps(folder):
            raise UserError(f"{directory} has no checkpoint of step {step}; it has {checkpoints.saved_steps(folder)}")
        state = checkpoints.load(checkpoints.path_of(folder, step))
    if settings["flags"].get("dataset"):  # A task's module may lie beside it.
        find_modules_in(Path(settings["flags"]["dataset"]).expanduser().parent)
    name = settings["agent_module"]
    module = load_agent(f"{name.replace('.', '/')}.py" if name.startswith("agents.") else name)
    config = module.get_config()
    for field, value in settings["config"].items():
        set_field(config, field, value)
    example = {
        "observations": blank(1, settings["observation_dim"], settings.get("image_shape")),
        "actions": np.zeros((1, settings["chunk_dim"]), np.float32),
    }
    agent = jax.eval_shape(lambda: module.Agent.create(jax.random.PRNGKey(0), example, config))
    agent = agent.replace(hyper=agent.hyper | {k: np.float32(config[k]) for k in agent.hyper if k in config})
    return restore(agent, state["agent"], directory, name), settings, step


def online_from(settings: dict[str, Any]) -> int | None:
    """The step at which a run (flags.json) begins to learn from its own experience; None: it does not."""
    flags = settings["flags"]
    return flags.get("rollout_steps", flags.get("offline_steps") if flags.get("online_steps") else None)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file of this project.

    Raises:
        UserError: it is damaged.
    """
    advice = "restore it, or move its directory elsewhere and start again"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); {advice}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged (no JSON object); {advice}")
    return content
