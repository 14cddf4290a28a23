"""LeRobot policy directories: their features and normalisation, and writing one by LeRobot's `save_pretrained`."""

import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import UserError
from utils.system.files import disk_errors, read_json, temporary_name

IMAGE = "observation.image"  # prefix of the names of image features
STATISTICS = {"IDENTITY": (), "MEAN_STD": ("mean", "std"), "MIN_MAX": ("min", "max")}
STATE, ENV, ACTION, VISUAL = "STATE", "ENV", "ACTION", "VISUAL"


@dataclass(frozen=True)
class Normalisation:
    """Normalisation of a training dataset.

    Attributes:
        norm_map: STATE, ENV and ACTION → IDENTITY, MEAN_STD or MIN_MAX (to [−1, 1]).
        stats: feature → statistic → value of each component; a feature without statistics stays unchanged.
        cameras: image features of the dataset, in their order; None: unknown.
        about: `state_names`, `action_names`, `fps` and `robot_type` of the recordings, if known.
    """

    norm_map: dict[str, str] = field(default_factory=lambda: dict.fromkeys((STATE, ENV, ACTION), "IDENTITY"))
    stats: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    cameras: list[str] | None = None
    about: dict[str, Any] = field(default_factory=dict)


def parse_features(text: str, width: int, cameras: int = 0) -> tuple[dict[str, int], list[str]]:
    """Parses `name:size,name:size`, or one name for the whole vector; names of images have no size.

    Returns:
        State feature → size, and image features, in their order.

    Raises:
        UserError: a name that LeRobot does not recognise as state or image, sizes that do not add up to `width`, or a
            number of images other than `cameras`.
    """
    parts = [part.strip() for part in text.split(",")]
    images = [part for part in parts if part.startswith(IMAGE)]
    vectors = [part for part in parts if part not in images]
    features: dict[str, int] = {}
    for part in vectors:
        name, colon, size = part.partition(":")
        if not name.startswith("observation.") or name in features:
            raise UserError(f"--features={text}: '{name}' must be a state such as observation.state, named once")
        if (colon or len(vectors) > 1) and not (size.isdecimal() and int(size)):
            raise UserError(f"--features={text}: write name:size,name:size, in the order of the observation vector")
        features[name] = int(size) if colon else width
    if vectors and not width:
        raise UserError(f"--features={text}: the run observes images alone; name its cameras only")
    if sum(features.values()) != width:
        raise UserError(f"--features={text}: sizes add up to {sum(features.values())}, the run observes {width} values")
    if len(images) != cameras:
        raise UserError(
            f"--features={text} names {len(images)} cameras, the run has {cameras}; "
            f"name one {IMAGE}s.<name> for each, in the order of its data"
        )
    if wrong := [name for name in images if ":" in name or images.count(name) > 1]:
        raise UserError(f"--features={text}: '{wrong[0]}' must be the name of a camera alone, named once")
    return features, images


def read_normalisation(path: Path, features: dict[str, int], action_dim: int) -> Normalisation:
    """Reads a JSON file {"norm_map": …, "stats": …}; see `Normalisation`.

    Raises:
        UserError: it is missing, damaged, or does not fit the features.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}; --normalisation takes the file written beside the dataset")
    content = read_json(path)
    try:
        norm_map, stats = dict(content["norm_map"]), dict(content["stats"])
        unknown = [*(norm_map.keys() - {STATE, ENV, ACTION}), *(set(norm_map.values()) - STATISTICS.keys())]
        if unknown:
            raise UserError(f"{path}: '{unknown[0]}' is unknown; norm_map takes STATE, ENV and ACTION to one of "
                            f"{', '.join(STATISTICS)}")  # fmt: skip
        for name, size in (features | {"action": action_dim}).items():
            for statistic in STATISTICS[norm_map.get(feature_type(name), "IDENTITY")] if name in stats else ():
                values = stats[name][statistic]
                if len(values) != size or not all(math.isfinite(value) for value in values):
                    raise UserError(f"{path}: {statistic} of {name} must be {size} finite numbers")
        missing = [
            name
            for name in (*features, "action")
            if name not in stats and norm_map.get(feature_type(name), "IDENTITY") != "IDENTITY"
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is no file of normalisation: {type(error).__name__} at {error}") from error
    if missing:
        raise UserError(f"{path} has no statistics of {missing[0]}; it has {', '.join(stats) or 'none'}")
    known = {name: stats[name] for name in (*features, "action") if name in stats}
    about = {name: content[name] for name in ("state_names", "action_names", "fps", "robot_type") if content.get(name)}
    return Normalisation(Normalisation().norm_map | norm_map, known, content.get("cameras"), about)


def feature_type(name: str) -> str:
    """Returns LeRobot's type of a feature."""
    return {"action": ACTION, "observation.environment_state": ENV}.get(name, STATE)


def save_policy(
    directory: Path,
    fields: dict[str, Any],
    tensors: dict[str, np.ndarray],
    features: dict[str, int],
    normalisation: Normalisation,
    images: dict[str, list[int]] | None = None,
) -> None:
    """Writes configuration, parameters and both processors as LeRobot does.

    Args:
        directory: to write into.
        fields: from `real.policy_tensors`.
        tensors: from `real.policy_tensors`.
        features: state feature → size, in the order of the observation vector.
        normalisation: of the dataset.
        images: image feature → [3, height, width] of the training data, in the order of the cameras.

    Raises:
        UserError: LeRobot or the policy's package is not installed.
    """
    try:
        import torch
        from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature
        from lerobot_policy_otql import OtqlConfig
        from lerobot_policy_otql.modeling_otql import OtqlPolicy
        from lerobot_policy_otql.processor_otql import make_otql_pre_post_processors
    except ImportError as error:
        raise UserError(
            f"the export needs LeRobot and real/lerobot_policy_otql ({error}); see real/README.md"
        ) from error
    inputs = {name: PolicyFeature(FeatureType(feature_type(name)), (size,)) for name, size in features.items()}
    inputs |= {name: PolicyFeature(FeatureType.VISUAL, tuple(shape)) for name, shape in (images or {}).items()}
    about = dict(normalisation.about)
    config = OtqlConfig(
        device="cpu",
        input_features=inputs,
        output_features={"action": PolicyFeature(FeatureType.ACTION, (fields["action_dim"],))},
        normalization_mapping={kind: NormalizationMode(norm) for kind, norm in normalisation.norm_map.items()},
        action_feature_names=about.pop("action_names", None),
        **fields,
        **about,
    )
    policy = OtqlPolicy(config)
    policy.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in tensors.items()})
    stats = {
        feature: {statistic: torch.tensor(values) for statistic, values in statistics.items()}
        for feature, statistics in normalisation.stats.items()
    }
    for part in (policy, *make_otql_pre_post_processors(config, stats or None)):
        part.save_pretrained(directory)


def write_directory(directory: Path, write: Callable[[Path], None]) -> None:
    """Writes a directory, in full or not at all; an existing one with the same content is left unchanged.

    Args:
        directory: to write.
        write: writes the files into a directory that exists.

    Raises:
        UserError: it has other content, or the disk is full or read-only.
    """
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory} is a file; name a directory")
    temporary = temporary_name(directory)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with disk_errors(directory):
            temporary.mkdir(parents=True)
            write(temporary)
            if not directory.is_dir() or not any(directory.iterdir()):
                os.replace(temporary, directory)
            elif _contents(directory) != _contents(temporary):
                raise UserError(f"{directory} has other content; name another directory")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
