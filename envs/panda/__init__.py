"""Two tabletop tasks of a Panda arm, for online post-training: `ArrangeBoxes-v0` and `OpenMicrowave-v0`.

Importing this package registers them with gymnasium, and with the prefix 'visual-' variants with images of two
cameras instead of the objects' states. Arm, gripper and the operational-space control law come from gym-hil
(https://github.com/huggingface/gym-hil); scenes, rewards and demonstrations are this package's.
"""

import importlib.util
from pathlib import Path

import gymnasium

from envs.tasks import VISUAL
from utils.errors import UserError

TASKS = {
    "ArrangeBoxes-v0": "envs.panda.arrange_boxes:ArrangeBoxes",
    "OpenMicrowave-v0": "envs.panda.open_microwave:OpenMicrowave",
}

for name, entry_point in TASKS.items():
    # The environment itself limits the steps: get_state could not save a wrapper's counter.
    gymnasium.register(name, entry_point=entry_point)
    gymnasium.register(f"{VISUAL}{name}", entry_point=entry_point, kwargs={"image_size": 64})


def gym_hil_assets() -> Path:
    """Returns the folder of gym-hil's models without importing gym-hil, which would load viewers and input devices.

    Raises:
        UserError: it is not installed.
    """
    package = importlib.util.find_spec("gym_hil")
    places = package.submodule_search_locations if package else None
    folder = Path(places[0]) / "assets" if places else None
    if folder is None or not (folder / "panda.xml").is_file():
        raise UserError(
            "the Panda tasks need the arm's model from gym-hil; install it: pip install --no-deps 'gym-hil>=0.1.14'"
        )
    return folder
