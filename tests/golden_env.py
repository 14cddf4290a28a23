"""The tests' small environments with rewards that every action moves, so that an evaluation tells actions apart."""

import gymnasium
from fork_env import Fork
from spot_env import Spot


class Dense:
    """Adds the position to the reward."""

    def step(self, action):
        observation, reward, *rest = super().step(action)
        return observation, reward + float(self.position.sum()), *rest


class DenseFork(Dense, Fork):
    """Fork with such a reward."""


class DenseSpot(Dense, Spot):
    """Spot with such a reward."""


gymnasium.register("DenseFork-v0", entry_point=DenseFork)
gymnasium.register("DenseSpot-v0", entry_point=DenseSpot)
