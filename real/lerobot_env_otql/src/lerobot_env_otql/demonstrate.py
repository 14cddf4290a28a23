"""Demonstrations of the scripted experts as a LeRobotDataset; episodes that fail are made again.

python -m lerobot_env_otql.demonstrate --root=data/demos --episodes=10 [--robot.task=ArrangeBoxes-v0]
"""

from dataclasses import dataclass, field
from pathlib import Path

import draccus
import numpy as np
from lerobot.datasets import LeRobotDataset
from lerobot.utils.feature_utils import build_dataset_frame, hw_to_dataset_features

from lerobot_env_otql.robot import OtqlSim, OtqlSimConfig
from lerobot_env_otql.tasks import ACTIONS, DESCRIPTIONS, FPS, expert, fail


@dataclass
class Settings:
    """Settings.

    Attributes:
        root: folder to write, which must not exist.
        episodes: number of demonstrations.
        robot: the task, its seed and cameras.
        expert_noise: scale of the noise on the expert's hand; 1 is a practised person's.
        video: whether images are kept as videos, not as files.
    """

    root: Path
    episodes: int = 10
    robot: OtqlSimConfig = field(default_factory=OtqlSimConfig)
    expert_noise: float = 1.0
    video: bool = True


@draccus.wrap()
def main(cfg: Settings) -> None:
    """Writes the demonstrations."""
    if cfg.root.exists():
        fail(f"{cfg.root} exists; give another --root")
    if not cfg.expert_noise >= 0 or cfg.episodes < 1:
        fail("--expert_noise must be at least 0 and --episodes at least 1")
    robot = OtqlSim(cfg.robot)
    features = hw_to_dataset_features(robot.observation_features, "observation", cfg.video)
    features |= hw_to_dataset_features(robot.action_features, "action")
    features["next.success"] = {"dtype": "bool", "shape": (1,), "names": None}
    features["next.reward"] = {"dtype": "float32", "shape": (1,), "names": None}
    dataset = LeRobotDataset.create(
        f"local/{cfg.root.name}", FPS, features, cfg.root, robot.name, cfg.video, image_writer_threads=4
    )
    robot.connect()
    while dataset.num_episodes < cfg.episodes:
        robot.reset(dataset.num_episodes)
        actions = expert(cfg.robot.task, robot.env, robot.expert_seed, cfg.expert_noise)
        while robot.success is None:
            frame = build_dataset_frame(features, robot.get_observation(), "observation")
            sent = robot.send_action(dict(zip(ACTIONS, next(actions).tolist(), strict=True)))
            frame |= build_dataset_frame(features, sent, "action")
            frame |= {"next.success": np.array([robot.success is True])}
            frame |= {"next.reward": np.array([0 if robot.success else -1], np.float32)}
            dataset.add_frame(frame | {"task": DESCRIPTIONS[cfg.robot.task]})
        if robot.success:
            dataset.save_episode()
        else:
            dataset.clear_episode_buffer()
    dataset.finalize()
    robot.disconnect()
    print(f"{cfg.root}: {dataset.num_episodes} demonstrations, {dataset.num_frames} frames")


if __name__ == "__main__":
    main()
