"""Specs of the OGBench datasets that can be collected, and the names of their files.

The settings are those of OGBench's released datasets. Only datasets that OGBench's package can generate standalone are
listed: manipulation (scripted oracles) and pointmaze (the direction to the next cell). The experts of ant and humanoid
are trained networks that are not part of the package.
"""

import dataclasses
import difflib
import itertools
import re
from pathlib import Path
from typing import Any

from envs.tasks import VISUAL
from utils.errors import UserError

DEFAULT_DATASET_DIR = "~/.ogbench/data"


@dataclasses.dataclass(frozen=True)
class DatasetSpec:
    """Settings of a dataset.

    Attributes:
        name: dataset name, such as 'cube-double-play-v0', or 'visual-cube-double-play-v0' with images.
        env_id: the goal-conditioned environment it is collected in, such as 'cube-double-v0'.
        style: 'play' (open-loop plans), 'noisy' (closed-loop oracle), 'navigate' or 'stitch' (pointmaze).
        episodes: number of training episodes of the released dataset; validation has a tenth of it.
        max_steps: rows of an episode (the last one is a state whose successor is not recorded).
        noise: action noise; in units of the action range for mazes, a scale of it for manipulation.
        p_random: probability of a uniformly random action ('noisy' only).
        p_stack: range of the per-episode probability to stack a cube on another, or a constant as (p, p).
    """

    name: str
    env_id: str
    style: str
    episodes: int = 1000
    max_steps: int = 1001
    noise: float = 0.1
    p_random: float = 0.0
    p_stack: tuple[float, float] = (0.5, 0.5)

    @property
    def domain(self) -> str:
        """Returns the environment's name without 'visual-' and version, such as 'cube-double'."""
        return self.env_id.removeprefix(VISUAL).removesuffix("-v0")

    @property
    def rendered(self) -> bool:
        """True if the observations are images that MuJoCo renders."""
        return self.name.startswith(VISUAL)


def _manipulation_specs() -> list[DatasetSpec]:
    """Returns two styles for each of the nine manipulation environments, without and with images."""
    cube_stacking = {"single": (0.0, 0.0), "double": (0.0, 0.25), "triple": (0.05, 0.35), "quadruple": (0.1, 0.5)}
    larger = {"cube-triple": 3000, "cube-quadruple": 5000, "puzzle-4x5": 3000, "puzzle-4x6": 5000}
    domains = [f"cube-{size}" for size in cube_stacking]
    domains += ["scene", "puzzle-3x3", "puzzle-4x4", "puzzle-4x5", "puzzle-4x6"]
    specs = []
    for prefix, domain in itertools.product(("", VISUAL), domains):
        common: dict[str, Any] = {
            "env_id": f"{prefix}{domain}-v0",
            "episodes": larger.get(domain, 1000),
            "p_stack": cube_stacking.get(domain.removeprefix("cube-"), (0.5, 0.5)),
        }
        p_random = 0.2 if domain.startswith("puzzle") else 0.1
        specs.append(DatasetSpec(f"{prefix}{domain}-play-v0", style="play", **common))
        specs.append(DatasetSpec(f"{prefix}{domain}-noisy-v0", style="noisy", p_random=p_random, **common))
    return specs


def _pointmaze_specs() -> list[DatasetSpec]:
    """Returns two styles for each of the four mazes; in the giant one 'navigate' has fewer, longer episodes."""
    specs = []
    for size in ("medium", "large", "giant", "teleport"):
        env_id = f"pointmaze-{size}-v0"
        episodes, max_steps = (500, 2001) if size == "giant" else (1000, 1001)
        navigate = f"pointmaze-{size}-navigate-v0"
        specs.append(DatasetSpec(navigate, env_id, "navigate", episodes, max_steps, noise=0.5))
        specs.append(DatasetSpec(f"pointmaze-{size}-stitch-v0", env_id, "stitch", 5000, 201, noise=0.5))
    return specs


DATASET_SPECS: dict[str, DatasetSpec] = {spec.name: spec for spec in _manipulation_specs() + _pointmaze_specs()}


def dataset_name_of(name: str) -> str:
    """Returns the dataset of a single task ('scene-play-singletask-task2-v0' → 'scene-play-v0'), or `name` itself."""
    return re.sub(r"-singletask(-task\d+)?-", "-", name)


def find_spec(name: str) -> DatasetSpec:
    """Returns the spec of a dataset (or of a single task's dataset).

    Raises:
        UserError: no oracle for it ships with OGBench, or the name is unknown.
    """
    name = dataset_name_of(name)
    if name in DATASET_SPECS:
        return DATASET_SPECS[name]
    if re.match(r"(antmaze|humanoidmaze|antsoccer)-", name.removeprefix(VISUAL)):
        raise UserError(
            f"'{name}' cannot be collected: its expert policy does not ship with ogbench; "
            f"get {name}.npz and {name}-val.npz from OGBench and put them into the dataset directory"
        )
    near = difflib.get_close_matches(name, DATASET_SPECS, n=3) or sorted(DATASET_SPECS)[:3]
    raise UserError(f"no dataset called '{name}' can be collected; did you mean {' or '.join(near)}?")


def val_episodes(episodes: int) -> int:
    """Returns a tenth of the training episodes, at least 1, since OGBench's loader needs the file."""
    return max(1, episodes // 10)


def file_stem(spec: DatasetSpec, episodes: int, seed: int = 0, max_steps: int | None = None) -> str:
    """Returns the file name, without '.npz', of a collected dataset; `find_collected` reads the same names.

    OGBench's own name is kept for the released size, length and seed 0. Other values are part of the name, so that
    no two datasets share one: 'scene-play-v0-200ep-sd3', and '-50steps' for another length.
    """
    stem = spec.name
    if episodes != spec.episodes:
        stem += f"-{episodes}ep"
    if seed != 0:
        stem += f"-sd{seed}"
    if max_steps is not None and max_steps != spec.max_steps:
        stem += f"-{max_steps}steps"
    return stem


def dataset_files(directory: str | Path, stem: str) -> tuple[Path, Path]:
    """Returns the paths of the training and the validation file."""
    directory = Path(directory).expanduser()
    return directory / f"{stem}.npz", directory / f"{stem}-val.npz"


@dataclasses.dataclass(frozen=True)
class CollectedFile:
    """A collected training file in a directory; the fields are parsed from its name."""

    path: Path
    episodes: int
    seed: int
    max_steps: int


def find_collected(directory: str | Path, name: str) -> list[CollectedFile]:
    """Returns the collected training files of a dataset, most episodes first (then full length, lower seed).

    A file with OGBench's own name is not listed: it counts as the released dataset, wherever it comes from.
    """
    spec = DATASET_SPECS.get(name)
    directory = Path(directory).expanduser()
    if spec is None or not directory.is_dir():
        return []
    pattern = re.compile(re.escape(name) + r"(?:-(\d+)ep)?(?:-sd(\d+))?(?:-(\d+)steps)?\.npz")
    found = []
    for path in directory.iterdir():
        match = pattern.fullmatch(path.name)
        if match and path.name != f"{name}.npz":
            defaults = (spec.episodes, 0, spec.max_steps)
            fields = [int(text) if text else default for text, default in zip(match.groups(), defaults, strict=True)]
            found.append(CollectedFile(path, *fields))
    return sorted(found, key=lambda file: (-file.episodes, -file.max_steps, file.seed))
