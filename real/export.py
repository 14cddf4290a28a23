"""Exports a run as a LeRobot policy.

    python -m real.export RUN_DIR OUT_DIR --features=observation.state:39 [--push_to_hub=USER/NAME]

Writes a directory that LeRobot's programs take as `--policy.path`, if real/lerobot_policy_otql is installed beside it.
Only the networks used for acting are exported: the flow that is sampled from, the networks that modify its samples, and
the critics that rank them.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from envs.datasets import load_file
from envs.tasks import parse_task
from experiments.report.runs import Run, read_run, show
from real.import_rollouts import for_export, read_statistics
from real.policy_directory import Normalisation, parse_features, read_normalisation, save_policy, write_directory
from real.policy_tensors import policy_tensors
from utils.data.batches import describe
from utils.errors import UserError
from utils.output.intervals import wilson_interval
from utils.run.loading import load_run
from utils.system.cli import parse_arguments
from utils.system.entry_point import run_main
from utils.system.files import read_json

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
for name, text in (
    ("license", "Licence of the policy, as the hub names them, such as 'mit'; it is in the card."),
    ("push_to_hub", "Repository of the Hugging Face hub, USER/NAME, to which to upload the directory as well."),
):
    flags.DEFINE_string(name, None, text, flag_values=FLAGS)
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


def card(
    run: Run,
    step: int,
    state: str,
    inputs: dict[str, Any],
    normalisation: Normalisation,
    note: str,
    license: str | None,
) -> str:
    """Returns the model card, README.md of the directory."""
    settings, about = run.settings, normalisation.about
    task, config = settings["env_name"], settings["config"]
    head = {"library_name": "lerobot", "pipeline_tag": "robotics", "tags": "[robotics, lerobot, otql]"}
    head |= {"license": license} if license else {}
    names = {"states": about.get("state_names"), "actions": about.get("action_names")}
    record = read_json(Path(settings["flags"].get("dataset") or "none").with_suffix(".json"), missing_ok=True)
    rows: dict[str, Any] = {
        "task": task,
        "algorithm": run.algorithm,
        "seed": run.seed,
        "checkpoint": f"step {step} of {run.planned} ({state})",
        "success in simulation": performance(run, step),
        "steps of the flow (NFE), candidates (N)": f"{config.get('flow_steps', 1)}, {config.get('best_of_n', 1)}",
        "observation": ", ".join(f"{name} ({size})" for name, size in inputs.items()),
        **{name: ", ".join(values) for name, values in names.items() if values},
        "frames per second": about.get("fps", "unknown"),
        "units": f"those of the robot type {about['robot_type']}" if "robot_type" in about else "those of the data",
        "normalisation": note,
        "rewards": "sparse" if settings.get("sparse") else "the task's",
        "data": json.dumps(settings.get("dataset", {}), sort_keys=True),
        "recordings": "; ".join(
            f"{Path(one['root']).name}: {one['successes']} of {one['episodes']} episodes succeed"
            for one in record.get("datasets", [])
        ),
        "licence": license or "not stated",
    }
    rows |= {f"`{name}`": show(value) for name, value in sorted(config.items())}
    lines = ["---", *(f"{key}: {value}" for key, value in head.items()), "---", ""]
    rate = f" --fps={about['fps']:g} --dataset.fps={about['fps']:g}" if "fps" in about else ""
    robot = about.get("robot_type", "…")
    lines += [f"# {run.algorithm} on {task}", "", "A policy for LeRobot (0.6.1 to 0.7), exported from a JAX run:", ""]
    lines += ["```bash", "pip install 'lerobot[core_scripts]' real/lerobot_policy_otql  # from the OTQL repository"]
    lines += [f"otql-rollout --policy.path=. --robot.type={robot} --dataset.repo_id=local/rollout_1{rate}", "```", ""]
    lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items() if value != "")]
    return "\n".join([*lines, ""])


def export(
    directory: Path,
    out: Path,
    feature_names: str,
    normalisation_file: str | None = None,
    step: int | None = None,
    license: str | None = None,
) -> None:
    """Exports a run and prints a summary.

    Args:
        directory: of the run. out: directory of the policy to write.
        feature_names, normalisation_file, step, license: see the flags.

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
    text = card(run, step, state, features | images, normalisation, note, license)

    def write(folder: Path) -> None:
        save_policy(folder, fields | {"license": license}, tensors, features, normalisation, images)
        (folder / "README.md").write_text(text, encoding="utf-8")

    write_directory(out, write)
    number = sum(tensor.size for tensor in tensors.values())
    print(f"{out}: {run.algorithm}, step {step} of {run.planned} ({state}), {number} parameters")
    print(f"{performance(run, step)}\nnormalisation: {note}")


def upload(directory: Path, repository: str) -> None:
    """Uploads a policy's directory with the client that LeRobot uses.

    Raises:
        UserError: the hub cannot be reached or rejects it.
    """
    from huggingface_hub import HfApi

    try:
        name = HfApi().create_repo(repository, exist_ok=True).repo_id
        commit = HfApi().upload_folder(repo_id=name, folder_path=directory, commit_message="Upload policy")
    except Exception as error:  # The client's errors, those of the network and of the name are of many types.
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{directory} is written, but could not be uploaded to {repository}: {reason}") from error
    print(f"uploaded: {commit.repo_url}")


def main(argv: Sequence[str]) -> None:
    """Exports the run of the command line."""
    arguments = parse_arguments(argv, FLAGS)
    if len(arguments) != 2:
        raise UserError("give two directories: that of a run, and that of the policy to write")
    directory, out = (Path(argument).expanduser() for argument in arguments)
    export(directory, out, FLAGS.features, FLAGS.normalisation, FLAGS.step, FLAGS.license)
    if FLAGS.push_to_hub:
        upload(out, FLAGS.push_to_hub)


if __name__ == "__main__":
    run_main(main)
