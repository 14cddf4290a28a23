"""Files of a LeRobot policy directory, as LeRobot 0.4.4 writes them, without LeRobot and torch."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from utils.errors import UserError
from utils.system.files import read_json

FORMAT_VERSION = 1  # as in lerobot_policy_otql
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
    """

    norm_map: dict[str, str] = field(default_factory=lambda: dict.fromkeys((STATE, ENV, ACTION), "IDENTITY"))
    stats: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    cameras: list[str] | None = None


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
    return Normalisation(Normalisation().norm_map | norm_map, known, content.get("cameras"))


def feature_type(name: str) -> str:
    """Returns LeRobot's type of a feature."""
    return {"action": ACTION, "observation.environment_state": ENV}.get(name, STATE)


def policy_files(
    fields: dict[str, Any],
    tensors: dict[str, np.ndarray],
    features: dict[str, int],
    normalisation: Normalisation,
    images: dict[str, list[int]] | None = None,
) -> dict[str, bytes]:
    """Returns name → content of the files that LeRobot loads: configuration, parameters and both processors.

    Args:
        fields: from `real.policy_tensors`.
        tensors: from `real.policy_tensors`.
        features: state feature → size, in the order of the observation vector.
        normalisation: of the dataset.
        images: image feature → [3, height, width] of the training data, in the order of the cameras.
    """
    inputs = {name: {"type": feature_type(name), "shape": [size]} for name, size in features.items()}
    inputs |= {name: {"type": VISUAL, "shape": shape} for name, shape in (images or {}).items()}
    outputs = {"action": {"type": ACTION, "shape": [fields["action_dim"]]}}
    config = {
        "type": "otql",
        "n_obs_steps": 1,
        "input_features": inputs,
        "output_features": outputs,
        "device": "cpu",
        "use_amp": False,
        "use_peft": False,
        "push_to_hub": False,
        "repo_id": None,
        "private": None,
        "tags": None,
        "license": None,
        "pretrained_path": None,
        "format_version": FORMAT_VERSION,
        **fields,
        "normalization_mapping": normalisation.norm_map,
        "compile_model": False,
        "compile_mode": "default",
        "rtc_config": None,
    }
    device = {"registry_name": "device_processor", "config": {"device": "cpu", "float_dtype": None}}
    before = [
        {"registry_name": "rename_observations_processor", "config": {"rename_map": {}}},
        {"registry_name": "to_batch_processor", "config": {}},
        device,
        _normaliser("normalizer_processor", inputs | outputs, normalisation),
    ]
    after = [_normaliser("unnormalizer_processor", outputs, normalisation), device]
    files = {"config.json": _json(config), "model.safetensors": save(tensors, metadata={"format": "pt"})}
    for name, steps in (("policy_preprocessor", before), ("policy_postprocessor", after)):
        if normalisation.stats:
            index = next(i for i, step in enumerate(steps) if "normalizer" in step["registry_name"])
            state = f"{name}_step_{index}_{steps[index]['registry_name']}.safetensors"
            steps[index]["state_file"] = state
            files[state] = save(
                {
                    f"{feature}.{statistic}": np.asarray(values, np.float32)
                    for feature, statistics in normalisation.stats.items()
                    for statistic, values in statistics.items()
                }
            )
        files[f"{name}.json"] = _json({"name": name, "steps": steps})
    return files


def _normaliser(name: str, features: dict[str, Any], normalisation: Normalisation) -> dict[str, Any]:
    """Returns the configuration of a step that normalises, or reverts it."""
    return {
        "registry_name": name,
        "config": {"eps": 1e-8, "features": features, "norm_map": dict(normalisation.norm_map)},
    }


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
