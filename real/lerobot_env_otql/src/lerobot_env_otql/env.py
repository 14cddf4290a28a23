"""`--env.type=otql`: the tasks of envs/panda for lerobot-eval and for evaluations in lerobot-train."""

from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs import EnvConfig

from lerobot_env_otql.tasks import ACTIONS, ARM, CAMERAS, DESCRIPTIONS, FPS, STATES, check, make


class PandaTask(gymnasium.Wrapper):
    """A task with LeRobot's names of observations: `agent_pos`, the state, and `pixels`, images by camera."""

    env: Any

    def __init__(self, task: str, max_steps: int | None = None, image_size: int = 0):
        super().__init__(make(task, max_steps, image_size, videos=True))
        self.task, self.task_description = task, DESCRIPTIONS[task]
        self._max_episode_steps = self.env.max_steps
        spaces = {"agent_pos": self.env.observation_space}
        if image_size:
            state, images = (self.env.observation_space[name] for name in ("state", "images"))
            image = gymnasium.spaces.Box(0, 255, images.shape[1:], np.uint8)
            spaces = {"agent_pos": state, "pixels": gymnasium.spaces.Dict(dict.fromkeys(CAMERAS, image))}
        self.observation_space = gymnasium.spaces.Dict(spaces)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        """Starts an episode."""
        observation, info = self.env.reset(seed=seed)
        return self._named(observation), info | {"is_success": False}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict]:
        """Executes one action."""
        observation, reward, success, truncated, info = self.env.step(action)
        return self._named(observation), reward, success, truncated, info | {"is_success": success}

    def render(self) -> Any:
        """Returns an image of the scene, uint8 [240, 320, 3]; black where MuJoCo cannot render."""
        image = self.env.render()
        return np.zeros((240, 320, 3), np.uint8) if image is None else image

    def _named(self, observation: Any) -> dict[str, Any]:
        if not isinstance(observation, dict):
            return {"agent_pos": observation}
        return {"agent_pos": observation["state"], "pixels": dict(zip(CAMERAS, observation["images"], strict=True))}


@EnvConfig.register_subclass("otql")
@dataclass
class OtqlEnv(EnvConfig):
    """Settings.

    Attributes:
        task: 'ArrangeBoxes-v0' or 'OpenMicrowave-v0'.
        max_steps: step limit; default: that of the task.
        image_size: side (pixels) of the images of two cameras, `front` and `wrist`; the state is then only that of the
            arm, as for a real robot. 0: no cameras.
    """

    task: str = "OpenMicrowave-v0"
    fps: int = FPS
    max_steps: int | None = None
    image_size: int = 0

    def __post_init__(self) -> None:
        check(self.task, self.max_steps, self.image_size)
        states, image = ARM if self.image_size else STATES[self.task], (self.image_size, self.image_size, 3)
        self.features = {
            "action": PolicyFeature(FeatureType.ACTION, (len(ACTIONS),)),
            "agent_pos": PolicyFeature(FeatureType.STATE, (len(states),)),
        }
        self.features_map = {"action": "action", "agent_pos": "observation.state"}
        for camera in CAMERAS if self.image_size else ():
            self.features[f"observation.images.{camera}"] = PolicyFeature(FeatureType.VISUAL, image)
            self.features_map[f"observation.images.{camera}"] = f"observation.images.{camera}"

    @property
    def gym_id(self) -> str:
        """Returns the name under which this module registers the task."""
        return f"otql/{self.task}"

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        """Returns the arguments of `PandaTask`."""
        return {"task": self.task, "max_steps": self.max_steps, "image_size": self.image_size}


for name in STATES:
    gymnasium.register(f"otql/{name}", entry_point="lerobot_env_otql.env:PandaTask")
