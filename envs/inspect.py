"""Describes a dataset before anything is trained on it: its data card, signs of faults with what to do, and a figure.

    python -m envs.inspect data.npz --env_name=gym:Pendulum-v1
    python -m envs.inspect minari:D4RL/door/human-v2

DATA is a file (.npz, or HDF5 in D4RL's layout; see envs/gym_dataset.py) or a dataset of Minari. What training would
reject is an error here, too, after a table of the file's arrays, and the exit code is 2.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from envs import minari_store
from envs.action_units import UNITS
from envs.data_card import DataCard
from envs.data_figure import draw
from envs.datasets import load_dataset
from envs.hdf5 import is_hdf5
from envs.npz import BROKEN_NPZ, Arrays
from envs.tasks import Task, parse_task
from utils.errors import UserError
from utils.system.cli import parse_arguments
from utils.system.entry_point import run_main
from utils.system.files import find_modules_in

NEUTRAL = "robot:data"  # a task without an environment, for files that are described as they are
_SPARSE = 3  # Rewards of at most so many values are listed.
_CUSTOMARY = 1000.0  # range of returns that D4RL's users scale dense rewards to


def inspect(
    data: str,
    *,
    env_name: str | None = None,
    actions: str = "auto",
    figure: str | Path | None = None,
) -> tuple[list[str], tuple[str, ...]]:
    """Reads a dataset as training does, and draws its figure.

    Args:
        data: a file, or 'minari:<id>'.
        env_name: task that the file is for; None: none, and its actions must be in [-1, 1].
        actions: units of the file's actions, one of UNITS (envs/action_units.py).
        figure: file to draw into; None: no figure.

    Returns:
        The lines of the description, and warnings, one line each.

    Raises:
        UserError: training would reject the dataset.
    """
    task, path = _task(data, env_name), None if minari_store.is_minari(data) else Path(data).expanduser()
    if path:
        find_modules_in(path.parent)
    arrays, _, info = load_dataset(task, dataset_path=path, actions=actions, with_val=False)
    card = info.card
    lines = [f"{data}", *card.lines(), f"  {'rewards':9}{rewards_line(arrays, card)}"]
    if "images" in arrays:
        cameras, height, width, _ = arrays["images"].shape[1:]
        lines.append(f"  {'images':9}{cameras} of {height} x {width} a step")
    if figure:
        draw(arrays, card, Path(figure).expanduser(), title=data)
        lines.append(f"  {'figure':9}{figure}")
    return lines, card.warnings


def _task(data: str, env_name: str | None) -> Task:
    """Returns the task that a dataset is read for.

    Raises:
        UserError: a dataset of Minari is given another task.
    """
    if not minari_store.is_minari(data):
        return parse_task(env_name or NEUTRAL)
    if env_name and env_name != data:
        raise UserError(f"{data} names its environment itself; leave out --env_name")
    return parse_task(data)


def rewards_line(arrays: Arrays, card: DataCard) -> str:
    """Returns the values of the rewards and, if they are dense, the scale that is customary for them."""
    rewards = arrays["rewards"][arrays["terminals"] == 0]
    values, counts = np.unique(rewards, return_counts=True)
    if len(values) <= _SPARSE:
        return "sparse: " + ", ".join(
            f"{value:g} in {count} steps" for value, count in zip(values, counts, strict=True)
        )
    spread = card.returns[2] - card.returns[0]
    text = "min {:.4g}, median {:.4g}, max {:.4g}".format(*np.quantile(rewards, (0, 0.5, 1)))
    if spread > 0:
        text += f"; for returns that span {_CUSTOMARY:g}, as is customary: --reward_scale={_CUSTOMARY / spread:.3g}"
    return text


def table(path: Path) -> list[str]:
    """Returns a line for each array of a file, whatever is wrong with it; none if the file cannot be read."""
    lines = []
    try:
        for name, array in _arrays(path).items():
            text = f"  {name:20} {list(array.shape)!s:20} {array.dtype!s:8}"
            if array.dtype.kind in "biuf" and array.size:
                finite = np.isfinite(array)
                low, high = (array[finite].min(), array[finite].max()) if finite.any() else (np.nan, np.nan)
                text += f" {float(low):.4g} to {float(high):.4g}"
                if bad := int((~finite).sum()):
                    text += f", {bad} not finite"
            lines.append(text)
    except (OSError, ImportError, RuntimeError, AttributeError, TypeError, *BROKEN_NPZ):
        return lines
    return lines


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """Returns the arrays of a file by name, without any check."""
    if is_hdf5(path):
        import h5py

        with h5py.File(path, "r") as file:
            return {name: np.asarray(entry[()]) for name, entry in file.items() if isinstance(entry, h5py.Dataset)}
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def _define_flags() -> flags.FlagValues:
    """Returns the flags, in a set of their own: importing this module must not add flags to another program's."""
    values = flags.FlagValues()
    flags.DEFINE_string("env_name", None, "Task of the file, such as gym:Pendulum-v1.", flag_values=values)
    flags.DEFINE_enum("actions", "auto", list(UNITS), "Units of the file's actions.", flag_values=values)
    flags.DEFINE_string("figure", None, "PNG to draw; default: <name>_card.png here.", flag_values=values)
    return values


def main(argv: Sequence[str]) -> None:
    """Runs the command line."""
    values = _define_flags()
    arguments = parse_arguments(argv, values)
    if len(arguments) != 1:
        raise UserError("name one dataset: python -m envs.inspect data.npz, or minari:<id>")
    data = arguments[0]
    stem = re.sub(r"[^\w.-]+", "_", data.removeprefix("minari:") if minari_store.is_minari(data) else Path(data).stem)
    given: dict[str, Any] = {name: values[name].value for name in ("env_name", "actions")}
    try:
        lines, warnings = inspect(data, figure=values.figure or f"{stem}_card.png", **given)
    except UserError as error:
        if not minari_store.is_minari(data) and (rows := table(Path(data).expanduser())):
            print("\n".join([data, *rows]), flush=True)
        hint = ""
        if not values.env_name and "must be in [-1, 1]" in str(error):
            hint = "; or give --env_name=gym:<id>, if they are in the environment's units"
        raise UserError(f"{error}{hint}") from error
    print("\n".join(lines))
    if not warnings:
        print("no signs of faults")
    for number, warning in enumerate(warnings, 1):
        print(f"sign {number} of a fault: {warning}")


if __name__ == "__main__":
    run_main(main)
