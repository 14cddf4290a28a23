"""Scripted demonstrators with the variety of a person at a gamepad: way, order, path, speed, pauses, aim, tremor.

An expert looks at the environment before each action. All that varies is drawn from a generator of its own, so an
episode is a function of the environment's seed and the expert's.
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
    """What all demonstrators have: a temperament and moves.

    Args:
        env: unwrapped.
        random: source of the variation.
        expert_noise: scale of the noise on the hand; 1 is a practised person's.
    """

    SPEED: tuple[float, float]

    def __init__(self, env: PandaEnv, random: np.random.Generator, expert_noise: float = 1.0):
        self.env, self.random = env, random
        self.speed = random.uniform(*self.SPEED)  # of the fastest
        self.path = random.choice(["straight", "stick", "axes"])
        self.hesitation = random.uniform(0.0, 0.4)  # probability of a pause before a move
        self.noise = expert_noise * random.uniform(0.05, 0.2)  # deviation of what is new in it, over a move's size
        self._tremble = np.zeros(3)

    def actions(self) -> Actions:
        """Actions [4], without an end; the episode decides it."""
        while True:
            yield from self.attempt()

    def attempt(self) -> Actions:
        """Tries to do (part of) what is not done yet."""
        raise NotImplementedError

    def move(self, goal: Goal, gripper: float, tolerance: float, speed: float = 1.0, patience: int = 60) -> Actions:
        """Moves the hand until it is within `tolerance` (m) of `goal()`, for `patience` steps at most."""
        if self.random.random() < self.hesitation:
            yield from self.wait(gripper, int(self.random.integers(1, 6)))
        for _ in range(patience):
            if np.linalg.norm(goal() - self.env.hand) < tolerance:
                return
            yield self.towards(goal(), gripper, speed)

    def wait(self, gripper: float, steps: int) -> Actions:
        """Lets go of the stick for some steps."""
        for _ in range(steps):
            yield np.array([0, 0, 0, gripper])

    def towards(self, goal: np.ndarray, gripper: float, speed: float = 1.0) -> np.ndarray:
        """One action towards `goal`, along a path of this person's kind."""
        error, fastest = (goal - self.env.target) / STEP_SIZE, self.speed * speed
        if self.path == "straight":
            move = error * min(1.0, fastest / max(np.abs(error).max(), 1e-9))
        else:
            move = np.clip(error, -fastest, fastest)
            if self.path == "axes":  # The two axes that are furthest off.
                move[np.abs(error).argmin()] = 0
        self._tremble = 0.7 * self._tremble + self.random.normal(0, self.noise, 3)
        move += self._tremble * np.abs(move).max()
        return np.clip([*move, gripper], -1, 1)

    def aim(self, spread: float, height: float) -> np.ndarray:
        """An error of aim [3] (m): horizontally normal, two standard deviations at most; in height uniform."""
        sideways = np.clip(self.random.normal(0, spread, 2), -2 * spread, 2 * spread)
        return np.array([*sideways, self.random.uniform(-height, height)])


class BoxArranger(Expert):
    """Carries the boxes to their planes, one after the other, in either order; tries again what went wrong."""

    SPEED = (0.8, 1.0)
    env: ArrangeBoxes

    def __init__(self, env: ArrangeBoxes, random: np.random.Generator, expert_noise: float = 1.0):
        super().__init__(env, random, expert_noise)
        self.order = list(random.permutation(list(COLOURS)))
        self.height = random.uniform(0.07, 0.13)  # m above the boxes, at which it travels

    def attempt(self) -> Actions:
        """Brings the first box that is not in its place."""
        for name in self.order:
            if not self.env.placed(name):
                yield from self.bring(name)
                return
        yield from self.rise(OPEN)

    def bring(self, name: str) -> Actions:
        """Grasps a box and puts it on its plane; gives up if it is not in the hand."""
        env, above = self.env, np.array([0, 0, self.height])
        grip, spot = self.aim(0.004, 0.005), self.aim(0.008, 0.0)
        yield from self.move(lambda: env.box(name) + above + grip, OPEN, 0.02)
        yield from self.move(lambda: env.box(name) + grip, OPEN, 0.008, 0.7)
        yield from self.wait(CLOSED, int(self.random.integers(4, 7)))
        yield from self.rise(CLOSED)
        if np.linalg.norm(env.box(name) - env.hand) > 0.03:
            return
        yield from self.move(lambda: env.plane(name) + spot + above, CLOSED, 0.015)
        # It is the box that is to be there, not the hand.
        yield from self.move(lambda: env.hand + env.plane(name) + spot - env.box(name), CLOSED, 0.01, 0.7)
        yield from self.wait(OPEN, int(self.random.integers(3, 6)))
        yield from self.rise(OPEN)

    def rise(self, gripper: float) -> Actions:
        """Goes straight up."""
        goal = np.array([*self.env.hand[:2], HALF + self.height])
        yield from self.move(lambda: goal, gripper, 0.03)


class MicrowaveOpener(Expert):
    """Pulls the handle: the bar between the fingers, or the closed fingers behind it."""

    SPEED = (0.35, 0.65)
    env: OpenMicrowave

    def __init__(self, env: OpenMicrowave, random: np.random.Generator, expert_noise: float = 1.0):
        super().__init__(env, random, expert_noise)
        self.hooks = random.random() < 0.5
        self.height = random.uniform(0.06, 0.11)  # m above the handle, from which it comes down
        self.pull = random.uniform(0.10, 0.25)  # rad that it leads the door by

    def attempt(self) -> Actions:
        """Comes down on the handle and pulls until it slips away."""
        env, gripper = self.env, CLOSED if self.hooks else OPEN
        behind = (FRONT - HANDLE[0] + BAR) / 2 if self.hooks else 0.0  # Half-way between bar and door.
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
