"""Two tabletop tasks of a Panda arm, for online post-training: `ArrangeBoxes-v0` and `OpenMicrowave-v0`.

Importing this package registers them with gymnasium, and with 'visual-' before the name such as give images of two
cameras instead of what is known of the objects. Arm, gripper and the law of its operational-space control are
gym-hil's (https://github.com/huggingface/gym-hil); scenes, rewards and demonstrations are this package's.
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
    # The step limit is the environment's own: a wrapper's counter would be lost to get_state.
    gymnasium.register(name, entry_point=entry_point)
    gymnasium.register(f"{VISUAL}{name}", entry_point=entry_point, kwargs={"image_size": 64})


def gym_hil_assets() -> Path:
    """Returns the folder of gym-hil's models, without importing it: that would load viewers and input devices.

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
