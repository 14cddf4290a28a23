"""Converts recordings of LeRobot (LeRobotDataset v3) to a training dataset.

    python -m real.import_rollouts DATASET [DATASET …] --output=FILE.npz [--stats=FIRST.npz]

The file has the second convention of envs/gym_dataset.py: `observations` [N, o], `actions` [N, a] in [-1, 1], `rewards`
[N] (-1, and 0 in the last row of a solved episode), `terminals` [N] (1 there), `timeouts` [N] (1 in the last row of
any other episode: a state whose successor is not recorded). It also holds, float32, `state_offset` and `state_scale`
[o], if there are states, `action_offset` and `action_scale` [a]:

    normalised = (recorded − offset) / scale

A camera among --features, such as observation.images.front, gives `images` [N, C, s, s, 3], uint8, C cameras in their
order: each image is resized to s × s pixels, --image_size=64, whatever its aspect ratio (real/dataset.py).

By default states get mean 0 and standard deviation 1, actions the range [-1, 1]; a resting joint gets the median scale
of those that move (real/statistics.py), which is printed. On the robot, a policy's inputs are normalised as in its
training file, so later recordings must be as well: `--stats=FIRST.npz` uses that file's statistics. Recordings of
`otql_sim` that must fit its environment stay unchanged: `--state_norm=none --action_norm=none`. Beside the file,
FILE.json holds the settings and datasets, and FILE.normalisation.json the normalisation that real/export.py gives the
policy: LeRobot's MEAN_STD with offset and scale, whatever the norm.
"""

import contextlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from envs.npz import Arrays, read_npz, write_npz
from real.command_line import Parser
from real.dataset import Recording, images, read_recording
from real.labels import UNLABELLED, Lengths, successes
from real.statistics import NORMS, offset_and_scale
from utils.errors import UserError
from utils.system.entry_point import run_main
from utils.system.files import disk_errors, read_json, write_json

STATS = ("state_offset", "state_scale", "action_offset", "action_scale")
_FAR = 100  # Scales from the offset: beyond any motion of the robot in the first import.


def import_rollouts(
    roots: Sequence[str | Path],
    output: str | Path,
    *,
    features: Sequence[str] = ("observation.state",),
    action: str = "action",
    labels: Sequence[str | Path] = (),
    unlabelled: str = "error",
    max_steps: int = 150,
    state_norm: str | None = None,
    action_norm: str | None = None,
    stats: str | Path | None = None,
    image_size: int = 64,
) -> str:
    """Imports recordings; returns a one-line summary of the file.

    Args:
        roots: folders of the datasets.
        output: the file, '.npz'.
        features: features of the observation, in this order: states and cameras.
        action: feature of the action.
        labels: files of labels, one per dataset; default: the datasets' own columns.
        unlabelled: 'success' or 'failure', what episodes without either are; default: an error.
        max_steps: frames per episode; later ones, and a success there, do not count.
        state_norm: 'mean_std' (default), 'min_max' (to [-1, 1]) or 'none'.
        action_norm: 'min_max' (default) or 'none' (they are in [-1, 1]).
        stats: an earlier file, whose normalisation is used instead.
        image_size: side of the images, in pixels.

    Raises:
        UserError: a dataset, label or setting is invalid, or the datasets do not match.
    """
    output = Path(output).expanduser()
    if output.suffix != ".npz":
        raise UserError(f"{output} does not end in .npz; choose such a name for --output")
    if output.exists() and not output.with_suffix(".json").exists():
        raise UserError(f"{output} exists and was not imported (there is no {output.stem}.json); name another --output")
    if labels and len(labels) != len(roots):
        raise UserError(f"there are {len(labels)} files of --labels for {len(roots)} datasets; give one for each")
    files: list[Path | None] = [Path(file).expanduser() for file in labels]
    files = files or [None] * len(roots)
    if not features:
        raise UserError("--features is empty; name those of the observation, such as observation.state")
    for name, value in (("max_steps", max_steps), ("image_size", image_size)):
        if value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1")
    for name, norm, known in (("state_norm", state_norm, NORMS), ("action_norm", action_norm, NORMS[1:])):
        if norm not in (None, *known):
            raise UserError(f"{name} is {norm}; use one of {', '.join(known)}")
    if stats and (state_norm or action_norm):
        raise UserError("--stats brings its normalisation; leave --state_norm and --action_norm out")
    recordings = [read_recording(Path(root).expanduser(), list(features), action) for root in roots]
    _check_alike(recordings)
    outcomes = [successes(one, file, unlabelled) for one, file in zip(recordings, files, strict=True)]
    arrays = _rows(recordings, outcomes, max_steps)
    record = {
        "action": action,
        "action_names": recordings[0].action_names,
        "features": list(features),
        "fps": recordings[0].fps,
        "max_steps": max_steps,
        "robot_type": recordings[0].robot_type,
        "state_names": recordings[0].state_names,
    }
    cameras = recordings[0].cameras
    if cameras:
        record |= {"cameras": cameras, "image_size": image_size}
    if stats:
        numbers = _read_stats(Path(stats).expanduser(), record)
        record["stats"] = str(stats)
    else:
        record |= {"state_norm": state_norm or "mean_std", "action_norm": action_norm or "min_max"}
        numbers = _statistics(arrays, record)
    _normalise(arrays, numbers, record)
    record["datasets"] = [
        {"root": str(recording.root), "episodes": len(outcome), "successes": sum(success for success, _ in outcome)}
        for recording, outcome in zip(recordings, outcomes, strict=True)
    ]
    lengths = [[min(length, max_steps) for _, length in outcome] for outcome in outcomes]
    with _images(recordings, lengths, image_size, output.parent) as seen:
        with disk_errors(output):
            output.unlink(missing_ok=True)  # So that after a kill, the files beside it are never of another import.
        write_json(output.with_suffix(".json"), record)
        names = ("fps", "robot_type", "state_names", "action_names")
        exported = for_export(recordings[0].widths, numbers) | {name: record[name] for name in names}
        exported |= {"cameras": cameras} if cameras else {}
        write_json(output.with_suffix(".normalisation.json"), exported)
        write_npz(output, arrays | {name: values for name, values in numbers.items() if values.size} | seen)
    return _summary(output, arrays, outcomes, max_steps)


def _check_alike(recordings: list[Recording]) -> None:
    """Checks that datasets have the same rate and names."""
    first = recordings[0]
    for other in recordings[1:]:
        if other.fps != first.fps:
            raise UserError(f"{first.root} has {first.fps:g} fps, {other.root} {other.fps:g}; import those of one rate")
        for what in ("state_names", "action_names"):
            ours, theirs = getattr(first, what), getattr(other, what)
            if ours != theirs:
                differing = sorted(set(ours) ^ set(theirs)) or ["their order"]
                raise UserError(
                    f"{first.root} and {other.root} differ in {what} ({len(ours)} and {len(theirs)}; {differing[0]}): "
                    "they are not of one robot"
                )


def _rows(recordings: list[Recording], outcomes: list[Lengths], max_steps: int) -> Arrays:
    """Returns the rows of all episodes, before normalisation."""
    parts: dict[str, list[np.ndarray]] = {}
    for recording, outcome in zip(recordings, outcomes, strict=True):
        for episode, (success, length) in zip(recording.episodes, outcome, strict=True):
            solved, size = success and length <= max_steps, min(length, max_steps)
            last = (np.arange(size) == size - 1).astype(np.float32)
            rows = {"observations": episode.states[:size], "actions": episode.actions[:size]}
            rows |= {"rewards": last * solved - 1, "terminals": last * solved, "timeouts": last * (not solved)}
            for name, values in rows.items():
                parts.setdefault(name, []).append(values)
    return {name: np.concatenate(values) for name, values in parts.items()}


@contextlib.contextmanager
def _images(recordings: list[Recording], lengths: list[list[int]], size: int, folder: Path) -> Iterator[Arrays]:
    """Yields `images` [N, C, size, size, 3] of the rows of all episodes, or nothing without cameras.

    They are in an unnamed temporary file in `folder`, not in memory.
    """
    cameras = len(recordings[0].cameras)
    if not cameras:
        yield {}
        return
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            for recording, own in zip(recordings, lengths, strict=True):
                for row in images(recording, own, size):
                    file.write(np.ascontiguousarray(row).data)
            file.flush()
            yield {"images": np.memmap(file, np.uint8, "r").reshape(-1, cameras, size, size, 3)}


def _statistics(arrays: Arrays, record: dict) -> Arrays:
    """Returns the STATS of recorded rows; prints the resting dimensions, and adds their names to `record`."""
    ends = np.flatnonzero(arrays["terminals"] + arrays["timeouts"])
    numbers: Arrays = {}
    lengths = np.diff(ends, prepend=-1)
    for name, what in (("observations", "state"), ("actions", "action")):
        offset, scale, rests = offset_and_scale(arrays[name], lengths, record[f"{what}_norm"])
        numbers |= {f"{what}_offset": offset, f"{what}_scale": scale}
        record[f"{what}_resting"] = [one for one, still in zip(record[f"{what}_names"], rests, strict=True) if still]
        if rests.any() and not rests.all():
            print(
                f"{what} {', '.join(record[f'{what}_resting'])} rests: scaled by {scale[rests][0]:.3g}, "
                "the median of those that move.",
                file=sys.stderr,
            )
    return numbers


def read_statistics(path: Path) -> Arrays:
    """Returns the STATS of a file: empty for states if it has none, and all empty if it was not imported.

    Raises:
        UserError: the file does not exist or is damaged.
    """
    empty = dict.fromkeys(STATS, np.zeros(0, np.float32))
    return empty | read_npz(path, (), STATS[:2]) | read_npz(path, (), STATS[2:])


def _read_stats(path: Path, record: dict) -> Arrays:
    """Returns the STATS of an earlier file; checks that it is of the same robot."""
    before, numbers = read_json(path.with_suffix(".json"), missing_ok=True) or record, read_statistics(path)
    for pair, names in ((STATS[:2], "state_names"), (STATS[2:], "action_names")):
        width = len(record[names])
        if any(numbers[name].shape != (width,) for name in pair):
            found = numbers[pair[0]].shape[0]
            raise UserError(f"{path} normalises {found} {names[:-6]} numbers, the recordings have {width}")
        if before.get(names) not in (None, record[names]):
            differing = [ours for ours, theirs in zip(record[names], before[names], strict=False) if ours != theirs]
            raise UserError(f"{path} has other {names} than the recordings (first: {differing[0]})")
    for name in ("cameras", "image_size"):
        if before.get(name) != record.get(name):
            raise UserError(f"{path} has {name} = {before.get(name)}, not {record.get(name)}; they must be equal")
    return numbers


def _normalise(arrays: Arrays, numbers: Arrays, record: dict) -> None:
    """Normalises states and actions in `arrays`; actions beyond the range of --stats are clipped.

    Prints a warning for states far beyond those of --stats.
    """
    for name, what in (("observations", "state"), ("actions", "action")):
        values = arrays[name].astype(np.float64)
        arrays[name] = ((values - numbers[f"{what}_offset"]) / numbers[f"{what}_scale"]).astype(np.float32)
    far = np.abs(arrays["observations"]).max(axis=0)
    if "stats" in record and (far > _FAR).any():
        worst = int(far.argmax())
        print(
            f"{record['state_names'][worst]} is up to {far[worst]:.3g} scales from the middle of {record['stats']}: "
            "were these recordings made in other units? If not, import all of them together, without --stats.",
            file=sys.stderr,
        )
    beyond = np.abs(arrays["actions"]).max(axis=1) > 1 + 1e-3
    if beyond.any() and _is_identity(numbers, "action"):
        raise UserError("actions are beyond [-1, 1], the range of --action_norm=none; leave that out")
    if beyond.any():
        print(
            f"{beyond.sum()} of {len(beyond)} actions are beyond the range that actions are normalised by "
            f"(up to {np.abs(arrays['actions']).max():.3g} times) and were clipped.",
            file=sys.stderr,
        )
    arrays["actions"] = np.clip(arrays["actions"], -1, 1)


def for_export(widths: dict[str, int], numbers: Arrays) -> dict[str, dict]:
    """Returns STATS in LeRobot's format, given the widths of the state's features in their order."""
    parts, end = {"action": ("action", slice(None))}, 0
    for feature, width in widths.items():
        parts[feature] = ("state", slice(end, end + width))
        end += width
    raw = {what: _is_identity(numbers, what) for what in ("state", "action")}
    kinds = {"STATE": "state", "ENV": "state", "ACTION": "action"}
    return {
        "norm_map": {kind: "IDENTITY" if raw[what] else "MEAN_STD" for kind, what in kinds.items()},
        "stats": {
            feature: {"mean": numbers[f"{what}_offset"][part].tolist(), "std": numbers[f"{what}_scale"][part].tolist()}
            for feature, (what, part) in parts.items()
            if not raw[what]
        },
    }


def _is_identity(numbers: Arrays, what: str) -> bool:
    """True if states or actions stay unchanged."""
    return bool((numbers[f"{what}_offset"] == 0).all() and (numbers[f"{what}_scale"] == 1).all())


def _summary(output: Path, arrays: Arrays, outcomes: list[Lengths], max_steps: int) -> str:
    """Returns a one-line summary of the file."""
    episodes, solved = sum(map(len, outcomes)), int(arrays["terminals"].sum())
    transitions = len(arrays["rewards"]) - (episodes - solved)
    late = sum(success for outcome in outcomes for success, _ in outcome) - solved
    note = f"; {late} solved only after --max_steps={max_steps} count as unsolved" if late else ""
    return f"{output}: {episodes} episodes, {solved} solved, {transitions} transitions{note}"


def main(argv: Sequence[str]) -> None:
    """Runs the command line."""
    parser = Parser("python -m real.import_rollouts", __doc__)
    parser.add_argument("roots", nargs="+", metavar="DATASET", help="folder that LeRobot wrote")
    parser.add_argument("--output", required=True, help="the file (.npz)")
    parser.add_argument("--features", default="observation.state", help="states and cameras of the observation, a,b,…")
    parser.add_argument("--action", default="action", help="feature of the action")
    parser.add_argument("--labels", default="", help="files of labels, one per dataset, a,b,…")
    parser.add_argument("--unlabelled", choices=UNLABELLED, default="error", help="episodes without record of success")
    parser.add_argument("--max_steps", type=int, default=150, help="frames per episode that count")
    parser.add_argument("--state_norm", choices=NORMS, help="default: mean_std")
    parser.add_argument("--action_norm", choices=NORMS[1:], help="default: min_max")
    parser.add_argument("--image_size", type=int, default=64, help="side of the images, pixels")
    parser.add_argument("--stats", help="an earlier file, whose normalisation to use")
    values = vars(parser.parse_args(argv[1:]))
    for name in ("features", "labels"):
        values[name] = [part for part in values[name].split(",") if part]
    print(import_rollouts(values.pop("roots"), values.pop("output"), **values))


if __name__ == "__main__":
    run_main(main)
