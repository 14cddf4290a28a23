"""Exports a run as a LeRobot policy.

    python -m real.export RUN_DIR OUT_DIR --features=observation.state:39

Writes a directory that `lerobot-record --policy.path=OUT_DIR` and LeRobot's other programs load if
real/lerobot_policy_otql is installed beside LeRobot. Needs neither torch nor LeRobot. Only the networks used for acting
are exported: the flow that is sampled from, the networks that modify its samples, and the critics that rank them.
"""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from envs.datasets import load_file
from envs.tasks import parse_task
from experiments.report.runs import Run, read_run, show
from real.import_rollouts import for_export, read_statistics
from real.lerobot_policy import Normalisation, parse_features, policy_files, read_normalisation
from real.policy_tensors import policy_tensors
from utils.data.batches import describe
from utils.errors import UserError
from utils.output.intervals import wilson_interval
from utils.run.loading import load_run
from utils.system.cli import parse_arguments
from utils.system.entry_point import run_main
from utils.system.files import atomic_write_bytes, disk_errors, read_json, temporary_name

FLAGS = flags.FlagValues()
flags.DEFINE_string(
    *(
        "features",
        "observation.state",
        "LeRobot's observation features: name:size in the order of the vector, and cameras in the order of the data.",
    ),
    flag_values=FLAGS,
)
flags.DEFINE_string(
    *(
        "normalisation",
        None,
        "JSON file of the dataset's statistics, or 'none'; default: the file beside the dataset, if any.",
    ),
    flag_values=FLAGS,
)
flags.DEFINE_integer("step", None, "Checkpoint to export; default: the newest.", lower_bound=0, flag_values=FLAGS)


def find_normalisation(
    run: Run, given: str | None, features: dict[str, int], cameras: list[str], action_dim: int
) -> tuple[Normalisation, str]:
    """Returns the normalisation of the file `given`, of the file beside the run's dataset, or none; and a description.

    Raises:
        UserError: the dataset is gone, so that its normalisation is unknown; the file is missing, does not fit, or
            belongs to other data; or its cameras differ, or their order.
    """
    dataset = run.settings["flags"].get("dataset")
    path = Path(given).expanduser() if given and given != "none" else None
    if dataset and not given:
        path = _beside(run, Path(dataset).expanduser(), features)
    if path is None:
        return Normalisation(), "none: the networks get the robot's raw values, and it gets actions in [−1, 1]"
    found = read_normalisation(path, features, action_dim)
    if found.cameras not in (None, cameras):
        raise UserError(f"--features names the cameras {', '.join(cameras)}; in {path} they are {found.cameras}")
    return found, f"statistics of {path}"


def _beside(run: Run, dataset: Path, features: dict[str, int]) -> Path | None:
    """Returns the normalisation file beside a run's dataset, if any; an import must have one, and unchanged."""
    path = dataset.with_suffix(".normalisation.json")
    if not dataset.is_file():
        advice = f"give --normalisation={path.name}, or --normalisation=none if its values were not normalised"
        raise UserError(f"the run's dataset {dataset} does not exist, so its normalisation is unknown; {advice}")
    numbers = read_statistics(dataset)
    if not numbers["action_offset"].size:
        return path if path.is_file() else None
    units = run.settings["flags"].get("dataset_actions", "auto")
    recorded, task = run.settings["dataset"].get("checksum"), parse_task(run.settings["env_name"])
    if recorded != describe(load_file(task, dataset, run.settings["sparse"], units), dataset.name)["checksum"]:
        raise UserError(f"{dataset} differs from the data of the run; import those again, or give --normalisation")
    content = read_json(path, missing_ok=True)
    if not content:
        raise UserError(f"there is no {path}, which the import writes beside the dataset; import again")
    expected = for_export(features, numbers)
    if any(content.get(key) != value for key, value in expected.items()):
        given = ",".join(f"{name}:{size}" for name, size in features.items())
        raise UserError(
            f"{path} has other statistics than {dataset} for --features={given}; "
            "give the import's features in its order, or import again"
        )
    return path


def performance(run: Run, step: int) -> str:
    """Returns a description of the last evaluation up to `step`."""
    rows = [i for i, at in enumerate(run.steps) if at <= step]
    if not rows:
        return "not evaluated"
    value, episodes, at = run.values[rows[-1]], run.episodes[rows[-1]], int(run.steps[rows[-1]])
    if run.metric != "success_rate":
        return f"mean return {value:.2f} over {episodes:.0f} episodes at step {at}"
    low, high = wilson_interval(value, episodes)
    return f"success rate {value:.2f} ({low:.2f} to {high:.2f}) over {episodes:.0f} episodes at step {at}"


def card(run: Run, step: int, state: str, features: dict[str, Any], normalisation: str) -> bytes:
    """Returns the model card, README.md of the directory."""
    settings, head = run.settings, {"library_name": "lerobot", "pipeline_tag": "robotics"}
    rows: dict[str, Any] = {
        "task": settings["env_name"],
        "algorithm": run.algorithm,
        "seed": run.seed,
        "checkpoint": f"step {step} of {run.planned} ({state})",
        "simulation": performance(run, step),
        "observation": ", ".join(f"{name} ({size})" for name, size in features.items()),
        "normalisation": normalisation,
        "rewards": "sparse" if settings.get("sparse") else "the task's",
        "dataset": json.dumps(settings.get("dataset", {}), sort_keys=True),
    }
    rows |= {f"`{name}`": show(value) for name, value in sorted(settings["config"].items())}
    lines = ["---", *(f"{key}: {value}" for key, value in head.items()), "tags: [robotics, lerobot, otql]", "---", ""]
    lines += [f"# {run.algorithm} on {settings['env_name']}", "", "Exported by real/export.py. To use it, install"]
    lines += ["`lerobot_policy_otql` beside LeRobot 0.4.4 and give this directory as `--policy.path`.", ""]
    lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items()), ""]
    return "\n".join(lines).encode()


def write_directory(directory: Path, files: dict[str, bytes]) -> None:
    """Writes a directory, in full or not at all; an existing one with the same content is left unchanged.

    Raises:
        UserError: it has other content, or the disk is full or read-only.
    """
    if directory.is_dir() and any(directory.iterdir()):
        found = {str(path.relative_to(directory)): path for path in directory.rglob("*") if not path.is_dir()}
        if found.keys() != files.keys() or any(path.read_bytes() != files[name] for name, path in found.items()):
            raise UserError(f"{directory} has other content; name another directory")
        return
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory} is a file; name a directory")
    temporary = temporary_name(directory)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        for name, content in files.items():
            atomic_write_bytes(temporary / name, content)
        with disk_errors(directory):
            os.replace(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def export(
    directory: Path, out: Path, feature_names: str, normalisation_file: str | None = None, step: int | None = None
) -> None:
    """Exports a run and prints a summary.

    Args:
        directory: of the run. out: directory of the policy to write.
        feature_names, normalisation_file, step: see the flags.

    Raises:
        UserError: the run cannot be loaded, its features do not fit, or `out` cannot be written.
    """
    agent, settings, step = load_run(directory, step)
    run = read_run(directory)
    fields, tensors = policy_tensors(agent)
    number, height, width, _ = settings.get("image_shape") or (0, 0, 0, 3)
    features, cameras = parse_features(feature_names, settings["observation_dim"], number)
    images = {name: [3, height, width] for name in cameras}
    normalisation, note = find_normalisation(run, normalisation_file, features, cameras, fields["action_dim"])
    # Not run.finished, which needs an evaluation: runs on robots have none.
    ended = read_json(directory / "summary.json", missing_ok=True).get("step", -1) >= run.planned
    state = "not finished" if not ended else "finished" if step >= run.planned else "earlier"
    files = policy_files(fields, tensors, features, normalisation, images)
    write_directory(out, files | {"README.md": card(run, step, state, features | images, note)})
    number = sum(tensor.size for tensor in tensors.values())
    print(f"{out}: {run.algorithm}, step {step} of {run.planned} ({state}), {number} parameters")
    print(f"{performance(run, step)}\nnormalisation: {note}")


def main(argv: Sequence[str]) -> None:
    """Exports the run of the command line."""
    arguments = parse_arguments(argv, FLAGS)
    if len(arguments) != 2:
        raise UserError("give two directories: that of a run, and that of the policy to write")
    directory, out = (Path(argument).expanduser() for argument in arguments)
    export(directory, out, FLAGS.features, FLAGS.normalisation, FLAGS.step)


if __name__ == "__main__":
    run_main(main)
