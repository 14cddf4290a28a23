"""Scripted experts that vary as a person at a gamepad does: strategy, order, path, speed, pauses, aim and noise.

An expert reads the environment's state before each action. It draws all variation from its own generator, so an episode
is a function of the environment's seed and the expert's.
"""

from collections.abc import Callable, Iterator

import numpy as np

from envs.panda.arm import STEP_SIZE, PandaEnv
from envs.panda.arrange_boxes import COLOURS, HALF, ArrangeBoxes
from envs.panda.open_microwave import BAR, FRONT, HANDLE, OpenMicrowave

Actions = Iterator[np.ndarray]
Goal = Callable[[], np.ndarray]
OPEN, CLOSED = -1.0, 1.0


class Expert:
    """Base of the experts: individual traits and moves.

    Args:
        env: unwrapped.
        random: source of the variation.
        expert_noise: scale of the noise on the hand; 1 is a practised person's.
    """

    SPEED: tuple[float, float]

    def __init__(self, env: PandaEnv, random: np.random.Generator, expert_noise: float = 1.0):
        self.env, self.random = env, random
        self.speed = random.uniform(*self.SPEED)  # share of the maximal speed
        self.path = random.choice(["straight", "stick", "axes"])
        self.hesitation = random.uniform(0.0, 0.4)  # probability of a pause before a move
        self.noise = expert_noise * random.uniform(
            0.05, 0.2
        )  # standard deviation of its innovations, relative to a move
        self._offset = np.zeros(3)

    def actions(self) -> Actions:
        """Yields actions [4] without end."""
        while True:
            yield from self.attempt()

    def attempt(self) -> Actions:
        """Yields the actions of an attempt at (part of) the task."""
        raise NotImplementedError

    def move(self, goal: Goal, gripper: float, tolerance: float, speed: float = 1.0, patience: int = 60) -> Actions:
        """Moves the hand until it is within `tolerance` (m) of `goal()`, for at most `patience` steps."""
        if self.random.random() < self.hesitation:
            yield from self.wait(gripper, int(self.random.integers(1, 6)))
        for _ in range(patience):
            if np.linalg.norm(goal() - self.env.hand) < tolerance:
                return
            yield self.towards(goal(), gripper, speed)

    def wait(self, gripper: float, steps: int) -> Actions:
        """Yields actions without motion for some steps."""
        for _ in range(steps):
            yield np.array([0, 0, 0, gripper])

    def towards(self, goal: np.ndarray, gripper: float, speed: float = 1.0) -> np.ndarray:
        """Returns an action towards `goal`, on a path of this expert's kind."""
        error, fastest = (goal - self.env.target) / STEP_SIZE, self.speed * speed
        if self.path == "straight":
            move = error * min(1.0, fastest / max(np.abs(error).max(), 1e-9))
        else:
            move = np.clip(error, -fastest, fastest)
            if self.path == "axes":  # Along the two axes with the largest errors.
                move[np.abs(error).argmin()] = 0
        self._offset = 0.7 * self._offset + self.random.normal(0, self.noise, 3)
        move += self._offset * np.abs(move).max()
        return np.clip([*move, gripper], -1, 1)

    def aim(self, spread: float, height: float) -> np.ndarray:
        """Draws an aiming error [3] (m): horizontally normal, clipped at two deviations; uniform in height."""
        sideways = np.clip(self.random.normal(0, spread, 2), -2 * spread, 2 * spread)
        return np.array([*sideways, self.random.uniform(-height, height)])


class BoxArranger(Expert):
    """Expert that carries the boxes to their planes in either order, and retries failures."""

    SPEED = (0.8, 1.0)
    env: ArrangeBoxes

    def __init__(self, env: ArrangeBoxes, random: np.random.Generator, expert_noise: float = 1.0):
        super().__init__(env, random, expert_noise)
        self.order = list(random.permutation(list(COLOURS)))
        self.height = random.uniform(0.07, 0.13)  # m above the boxes, for transport

    def attempt(self) -> Actions:
        """Carries the first box that is not on its plane."""
        for name in self.order:
            if not self.env.placed(name):
                yield from self.bring(name)
                return
        yield from self.rise(OPEN)

    def bring(self, name: str) -> Actions:
        """Grasps a box and puts it on its plane; returns early if the grasp failed."""
        env, above = self.env, np.array([0, 0, self.height])
        grip, spot = self.aim(0.004, 0.005), self.aim(0.008, 0.0)
        yield from self.move(lambda: env.box(name) + above + grip, OPEN, 0.02)
        yield from self.move(lambda: env.box(name) + grip, OPEN, 0.008, 0.7)
        yield from self.wait(CLOSED, int(self.random.integers(4, 7)))
        yield from self.rise(CLOSED)
        if np.linalg.norm(env.box(name) - env.hand) > 0.03:
            return
        yield from self.move(lambda: env.plane(name) + spot + above, CLOSED, 0.015)
        # The goal holds for the box, not the hand.
        yield from self.move(lambda: env.hand + env.plane(name) + spot - env.box(name), CLOSED, 0.01, 0.7)
        yield from self.wait(OPEN, int(self.random.integers(3, 6)))
        yield from self.rise(OPEN)

    def rise(self, gripper: float) -> Actions:
        """Moves straight up."""
        goal = np.array([*self.env.hand[:2], HALF + self.height])
        yield from self.move(lambda: goal, gripper, 0.03)


class MicrowaveOpener(Expert):
    """Expert that pulls the handle with the bar between the fingers, or with closed fingers behind it."""

    SPEED = (0.35, 0.65)
    env: OpenMicrowave

    def __init__(self, env: OpenMicrowave, random: np.random.Generator, expert_noise: float = 1.0):
        super().__init__(env, random, expert_noise)
        self.hooks = random.random() < 0.5
        self.height = random.uniform(0.06, 0.11)  # m above the handle, start of the descent
        self.pull = random.uniform(0.10, 0.25)  # rad, lead over the door

    def attempt(self) -> Actions:
        """Descends on the handle and pulls until it slips away."""
        env, gripper = self.env, CLOSED if self.hooks else OPEN
        behind = (FRONT - HANDLE[0] + BAR) / 2 if self.hooks else 0.0  # Halfway between bar and door.
        grip = self.aim(0.003, 0.008)
        yield from self.move(lambda: env.handle(0, behind) + grip + [0, 0, self.height], gripper, 0.015)
        yield from self.move(lambda: env.handle(0, behind) + grip, gripper, 0.01, 0.7)
        if not self.hooks:
            yield from self.wait(CLOSED, int(self.random.integers(4, 7)))
        while np.linalg.norm((env.handle(0, behind) - env.hand)[:2]) < 0.04:
            yield self.towards(env.handle(self.pull, behind) + grip, CLOSED, 0.8)
        up = env.hand + np.array([0, 0, self.height])
        yield from self.move(lambda: up, gripper, 0.03)


EXPERTS = {"ArrangeBoxes-v0": BoxArranger, "OpenMicrowave-v0": MicrowaveOpener}
