"""`ArrangeBoxes-v0`: put two boxes on the planes of their colours."""

import numpy as np

from envs.panda.arm import DECIMETRES, PandaEnv, place

COLOURS = {"red": "0.85 0.15 0.12", "blue": "0.15 0.36 0.92"}
HALF = 0.02  # m, half an edge of a box
PLANES = {"red": (0.56, -0.13), "blue": (0.56, 0.13)}  # centres (m); half an edge is 5 cm
REGIONS = {"red": ((0.33, -0.22), (0.45, -0.06)), "blue": ((0.33, 0.06), (0.45, 0.22))}  # where boxes start (m)
MAX_YAW = 0.3  # rad, of a box at the start
ON_PLANE = 0.03  # m, from the plane's centre
AT_REST = 0.05  # m/s


def _scene() -> str:
    """Returns the MJCF of the boxes, the planes and the camera."""
    bodies = ""
    for name, colour in COLOURS.items():
        x, y = PLANES[name]
        bodies += f"""
        <geom name="{name}_plane" type="box" pos="{x} {y} 0.0005" size="0.05 0.05 0.0005" contype="0" conaffinity="0"
          rgba="{colour} 0.55"/>
        <body name="{name}" pos="0.4 {y} {HALF}">
          <freejoint name="{name}"/>
          <geom name="{name}" type="box" size="{HALF} {HALF} {HALF}" mass="0.1" rgba="{colour} 1"/>
        </body>"""
    camera = '<camera name="view" pos="1.25 -0.42 0.70" xyaxes="0.452 0.892 0 -0.484 0.245 0.840" fovy="32"/>'
    return f"<worldbody>{camera}{bodies}</worldbody>"


class ArrangeBoxes(PandaEnv):
    """Task that is solved when both boxes lie still on their planes and the hand touches neither.

    Observation, after the arm's 25 numbers (see `PandaEnv`), for the red and then the blue box: position (3, dm, from
    ORIGIN), the same relative to the hand (3, dm), the place on its plane relative to it (3, dm), rotation (6: the
    first two columns of its matrix), velocity (3, dm/s) and, in its own frame, angular velocity (3, rad/s).
    """

    NAME = "ArrangeBoxes"
    SCENE = _scene()
    START = ((0.36, -0.06, 0.18), (0.44, 0.06, 0.26))
    MAX_STEPS = 200

    def place_objects(self, random: np.random.Generator) -> None:
        """Places each box at random on the side of its plane, turned by up to MAX_YAW."""
        for name, region in REGIONS.items():
            spot, yaw = random.uniform(*region), random.uniform(-MAX_YAW, MAX_YAW)
            self.data.joint(name).qpos[:] = *spot, HALF, np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)

    def observe_objects(self) -> np.ndarray:
        """Returns this task's part of the observation, in the units of the arm's."""
        parts = []
        for name in COLOURS:
            position, body = self.box(name), self.data.body(name)
            relative = DECIMETRES * (position - self.hand), DECIMETRES * (self.plane(name) - position)
            velocity, spin = np.split(self.data.joint(name).qvel, 2)
            rotation = body.xmat.reshape(3, 3)[:, :2].T.ravel()
            parts += [place(position), *relative, rotation, DECIMETRES * velocity, spin]
        return np.concatenate(parts)

    def solved(self) -> bool:
        """True if each box lies on its plane, untouched by the gripper."""
        return not self._touched() and all(map(self.placed, COLOURS))

    def box(self, name: str) -> np.ndarray:
        """Returns the position of a box's centre [3] (m)."""
        return self.data.body(name).xpos.copy()

    def plane(self, name: str) -> np.ndarray:
        """Returns the centre [3] (m) of a box that lies in the middle of its plane."""
        return np.array([*PLANES[name], HALF])

    def placed(self, name: str) -> bool:
        """True if a box lies still on its plane, at most ON_PLANE from the middle."""
        offset = self.box(name) - self.plane(name)
        still = np.linalg.norm(self.data.joint(name).qvel[:3]) < AT_REST
        return bool(np.linalg.norm(offset[:2]) <= ON_PLANE and abs(offset[2]) < HALF / 4 and still)

    def _touched(self) -> bool:
        """True if the arm or the gripper touches a box."""
        boxes = [self.model.geom(name).id for name in COLOURS]
        resting_on = [*boxes, self.model.geom("table").id]
        pairs = self.data.contact.geom
        return bool((np.isin(pairs, boxes).any(axis=1) & ~np.isin(pairs, resting_on).all(axis=1)).any())
