"""Settings of runs: name, type, default, bounds and help of each, stated once. Flags are derived from them."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, get_args, get_type_hints

import numpy as np

from envs.action_units import UNITS
from envs.datasets import SOURCES
from envs.ogbench.specs import DEFAULT_DATASET_DIR
from utils.devices import parse_devices
from utils.errors import UserError, did_you_mean
from utils.random_streams import Stream
from utils.system.jax_setup import PRECISIONS

KINDS = {str: "string", int: "integer", float: "float", bool: "bool"}
WORDS = {str: "a text", int: "a whole number", float: "a number", bool: "True or False"}


def setting(
    default: Any,
    help: str,
    *,
    min: float | None = None,
    max: float | None = None,
    choices: Sequence[str] = (),
    alias: str = "",
) -> Any:
    """Returns a dataclass field that is also a flag.

    Args:
        default: value if none is given. help: one line for --help.
        min, max: bounds, inclusive. choices: allowed texts. alias: a former name of the flag.
    """
    return field(
        default=default, metadata={"help": help, "min": min, "max": max, "choices": tuple(choices), "alias": alias}
    )


@dataclass(frozen=True, kw_only=True)
class CommonConfig:
    """Settings of offline training and of post-training.

    Attributes:
        overrides: settings of the agent that differ from the preset, name → value.
        command: command line that gave this config, for the record.
    """

    agent: str = setting(
        "agents/otql.py", "Agent file; --agent.<field>=<value> changes a setting of it, --agent.help lists them."
    )
    env_name: str = setting(
        "scene-play-singletask-task1-v0",
        "OGBench single task, Panda task, either with visual-; gym:<id>; minari:<dataset>, or :list; robot:<name>.",
    )
    preset: str = setting(
        "paper", "paper: published settings of the domain; cpu: small networks, short runs; none: the agent's defaults."
    )
    seed: int = setting(0, "First seed.", min=0, max=2**31)
    num_seeds: int = setting(1, "Seeds trained in parallel in one program.", min=1)
    devices: str = setting("all", "Devices that share the runs: all, a count, or their numbers, such as 0,2.")
    shard_batch: bool = setting(False, "Split each batch over the devices instead, for one large run.")
    vary: str | None = setting(None, "Runs over values of a real-valued setting, for example agent.lam=0.2,0.4,1.")
    log_interval: int = setting(5_000, "Steps between rows of train.csv.", min=1)
    eval_interval: int = setting(50_000, "Steps between evaluations; 0: only at the end.", min=0)
    save_interval: int = setting(50_000, "Steps between checkpoints; 0: only at the end.", min=0)
    eval_episodes: int = setting(50, "Episodes an evaluation; 0: no evaluations.", min=0)
    eval_overlap: bool = setting(True, "Continue training while evaluating; the numbers are the same.")
    eval_workers: int | None = setting(None, "Processes that step environments; default: one a core.", min=1)
    env_timeout: float = setting(120.0, "Seconds that a step or a reset may take; 0: any time.", min=0)
    max_episode_steps: int | None = setting(None, "Cuts episodes, as a time limit does.", min=1)
    video_episodes: int = setting(0, "Episodes of the final policy recorded in videos/.", min=0)
    video_frame_skip: int = setting(3, "Environment steps a frame.", min=1)
    save_dir: str = setting("exp", "Runs are kept in <save_dir>/<run_group>/<env_name>/<agent>/sd<seed>.")
    run_group: str = setting("debug", "Name of a group of runs.")
    wandb: str = setting("disabled", "Weights & Biases.", choices=("online", "offline", "disabled"))
    wandb_project: str = setting("otql", "Project in Weights & Biases.")
    wandb_entity: str | None = setting(None, "User or team in Weights & Biases; default: your own.")
    wandb_tags: str = setting("", "Tags in Weights & Biases, separated by commas.")
    wandb_name: str | None = setting(None, "Name in Weights & Biases; of several runs, each appends its own.")
    progress: bool = setting(True, "Progress bars of training and evaluations.")
    tensorboard: bool = setting(False, "Also log to <run>/tensorboard, for TensorBoard.")
    horizon_length: int | None = setting(None, "Actions in a chunk; default: the preset's.", min=1)
    sparse: bool | None = setting(None, "Rewards -1 until solved, then 0; default: the preset's.")
    reward_scale: float = setting(1.0, "Agents are trained on scale · reward + shift; returns stay the environment's.")
    reward_shift: float = setting(0.0, "See --reward_scale; -1 turns rewards 0 and 1 into -1 and 0.")
    dataset: str | None = setting(None, "An .npz or HDF5 file of the data; needed for gym: and robot: tasks.")
    dataset_actions: str = setting("auto", "Units of its actions; scaled: to [-1, 1].", choices=UNITS)
    dataset_dir: str = setting(DEFAULT_DATASET_DIR, "Where datasets are.")
    matmul_precision: str | None = setting(
        None,
        "Precision of matrix products on a GPU; default: JAX's own. A CPU has only float32.",
        choices=PRECISIONS,
    )
    online_steps: int = setting(0, "Environment steps of online training, after the updates on the dataset.", min=0)
    overrides: Mapping[str, Any] = field(default_factory=dict)
    command: str = field(default="train()", compare=False)

    def __post_init__(self) -> None:
        for name in (f.name for f in settings_of(type(self))):
            if isinstance(getattr(self, name), os.PathLike):
                object.__setattr__(self, name, os.fspath(getattr(self, name)))

    @property
    def phase_ends(self) -> tuple[int, ...]:
        """Steps at which a phase ends, ascending; the last one is the run's end."""
        raise NotImplementedError

    @property
    def total_steps(self) -> int:
        """Step at which the run ends."""
        return self.phase_ends[-1]

    @property
    def stream(self) -> Stream:
        """Random stream of all updates."""
        raise NotImplementedError

    def flag_values(self) -> dict[str, Any]:
        """Returns the settings that are flags, as flags.json records them."""
        return {f.name: getattr(self, f.name) for f in settings_of(type(self))}

    def flag_list(self) -> list[str]:
        """Returns the command-line flags that give this config."""
        given = [(f.name, getattr(self, f.name)) for f in settings_of(type(self)) if getattr(self, f.name) != f.default]
        given += [(f"agent.{name}", value) for name, value in self.overrides.items()]
        values = {name: ",".join(map(str, value)) if isinstance(value, tuple) else value for name, value in given}
        return [f"--{name}={value}" for name, value in values.items()]

    def validate(self) -> None:
        """Checks every setting's type, bounds and choices.

        Raises:
            UserError: names the first setting that does not fit.
        """
        types = get_type_hints(type(self))
        for f in settings_of(type(self)):
            value, kind, about = getattr(self, f.name), types[f.name], f.metadata
            if value is None and type(None) in get_args(kind):
                continue
            kind = plain_type(kind)
            allowed: Any = {int: (int, np.integer), float: (int, float, np.number)}.get(kind, kind)
            if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
                raise UserError(f"--{f.name}={value!r}: it must be {WORDS[kind]}")
            if about["choices"] and value not in about["choices"]:
                hint = did_you_mean(value, about["choices"], f"--{f.name}={{}}")
                raise UserError(f"--{f.name}={value}: use one of {', '.join(about['choices'])}{hint}")
            if about["min"] is not None and not value >= about["min"]:
                raise UserError(f"--{f.name}={value}: it must be at least {about['min']}")
            if about["max"] is not None and value > about["max"]:
                raise UserError(f"--{f.name}={value}: it must be at most {about['max']}")
        if both := {"horizon_length", "sparse"} & self.overrides.keys() & self.chosen().keys():
            name = min(both)
            raise UserError(f"--{name} and --agent.{name} are one setting; give one of them")
        for name in ("reward_scale", "reward_shift"):
            if not np.isfinite(getattr(self, name)):
                raise UserError(f"--{name}={getattr(self, name)}: it must be a finite number")
        parse_devices(self.devices)
        if not self.reward_scale > 0:
            raise UserError(f"--reward_scale={self.reward_scale}: it must be greater than 0")
        if self.tensorboard and not find_spec("tensorboardX"):
            raise UserError("--tensorboard needs tensorboardX; install it with: pip install tensorboardX")

    def chosen(self) -> dict[str, Any]:
        """Returns the settings beside `overrides` that win over the preset's, if they are given."""
        names = ("horizon_length", "sparse")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass(frozen=True, kw_only=True)
class RunConfig(CommonConfig):
    """Settings of `train`: offline RL, then online RL."""

    offline_steps: int = setting(1_000_000, "Updates on the dataset.", min=1)
    start_training: int = setting(5_000, "Environment steps before the first online update.", min=0)
    utd_ratio: int = setting(1, "Updates an environment step.", min=1)
    balanced_sampling: bool = setting(False, "Online: half of a batch from each of dataset and experience.")
    start_from: str | None = setting(None, "Directory of a run to start from: its agent, or of another agent its flow.")
    dataset_source: str = setting("auto", "Where the dataset comes from.", choices=SOURCES)
    dataset_episodes: int | None = setting(None, "Episodes to collect; default: the official number.", min=1)
    dataset_placement: str = setting("auto", "Memory that holds it.", choices=("auto", "device", "host"))
    ogbench_dataset_dir: str | None = setting(None, "Directory of .npz shards, used one after the other.")
    dataset_replace_interval: int = setting(1_000, "Updates before the next shard.", min=1)

    @property
    def phase_ends(self) -> tuple[int, ...]:
        """Steps at which the offline phase and the run end."""
        return self.offline_steps, self.offline_steps + self.online_steps

    @property
    def stream(self) -> Stream:
        """Random stream of all updates."""
        return Stream.TRAINING

    def validate(self) -> None:
        """Checks the settings, and that they do not exclude each other."""
        super().validate()
        if self.ogbench_dataset_dir and self.dataset:
            raise UserError("--dataset and --ogbench_dataset_dir exclude each other; give one of them")


@dataclass(frozen=True, kw_only=True)
class PostTrainConfig(CommonConfig):
    """Settings of `post_train`: online RL from a pre-trained flow."""

    env_name: str = setting("OpenMicrowave-v0", "Panda task, either with visual-, or gym:<id>.")
    log_interval: int = setting(500, "Steps between rows of train.csv.", min=1)
    eval_interval: int = setting(1_000, "Steps between evaluations; 0: only at the end.", min=0)
    save_interval: int = setting(1_000, "Steps between checkpoints; 0: only at the end.", min=0)
    rollout_steps: int = setting(2_000, "Environment steps of the base.", min=0)
    online_steps: int = setting(8_000, "Environment steps after them.", min=1)
    utd_ratio: int = setting(10, "Updates an environment step.", min=1)
    balanced_sampling: bool = setting(True, "Half of a batch from the demonstrations; else uniform over all.")
    dataset: str | None = setting(None, "An .npz file of demonstrations; default: made by the scripted expert.")
    dataset_dir: str = setting(DEFAULT_DATASET_DIR, "Directory of the demonstrations that are made.")
    demonstrations: int = setting(30, "Number of demonstrations to make.", min=1)
    expert_noise: float = setting(
        1.0, "Noise of the expert that makes them; 1: as steady as a practised person.", min=0, alias="tremor"
    )
    base_checkpoint: str | None = setting(None, "Directory of the run whose flow is the base; default: trained here.")
    base_group: str | None = setting(None, "Run group of the base that is trained here; default: this run's.")
    base_steps: int = setting(20_000, "Updates of the base.", min=1)
    base_seed: int = setting(0, "Seed of the base, which all agents and seeds share.", min=0)
    distill_steps: int = setting(10_000, "Updates of a one-step policy before it acts.", min=1)
    command: str = field(default="post_train()", compare=False)

    @property
    def phase_ends(self) -> tuple[int, ...]:
        """Steps at which the rollouts of the base and the run end."""
        return self.rollout_steps, self.rollout_steps + self.online_steps

    @property
    def stream(self) -> Stream:
        """Random stream of all updates."""
        return Stream.POST_TRAINING

    def validate(self) -> None:
        """Checks the settings, and that they do not exclude each other."""
        super().validate()
        defaults = {f.name: f.default for f in settings_of(type(self))}
        names = ("demonstrations", "expert_noise")
        if self.dataset and (unused := [f"--{name}" for name in names if getattr(self, name) != defaults[name]]):
            raise UserError(
                f"{' and '.join(unused)}: --dataset names a file, so none are made; leave out one or the other"
            )


def settings_of(cls: type[CommonConfig]) -> list[dataclasses.Field]:
    """Returns the fields of a config that are flags."""
    return [f for f in dataclasses.fields(cls) if "help" in f.metadata]


def plain_type(kind: Any) -> type:
    """Returns the type of a setting without its None."""
    return next((part for part in get_args(kind) if part is not type(None)), kind)
