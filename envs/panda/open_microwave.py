"""`OpenMicrowave-v0`: pull the door of a microwave oven open by its handle."""

import mujoco
import numpy as np

from envs.panda.arm import DECIMETRES, PandaEnv, place

OPEN = 1.0  # rad, the door's angle that solves the task
PLACE = np.array([[0.62, -0.05, -0.12], [0.68, 0.05, 0.12]])  # of the front's middle: x, y (m), yaw (rad)
HANDLE = (-0.073, -0.27, 0.18)  # in the door's frame (m), from the hinge: where the bar is gripped
BAR = 0.009  # m, radius of the handle's bar
FRONT = -0.022  # m, x of the door's outer face

# The cabinet is a mocap body, so that its pose is part of the state. The bar's upper end is free, so that fingers can
# hold it or reach behind it from above.
SCENE = """
<asset>
  <material name="cabinet" rgba="0.82 0.83 0.85 1" specular="0.4" shininess="0.6"/>
  <material name="door" rgba="0.24 0.25 0.28 1" specular="0.5" shininess="0.7"/>
  <material name="glass" rgba="0.07 0.09 0.11 1" specular="0.9" shininess="0.9" reflectance="0.15"/>
  <material name="handle" rgba="0.93 0.62 0.12 1" specular="0.7" shininess="0.8"/>
  <material name="inside" rgba="0.95 0.93 0.86 1"/>
  <material name="display" rgba="0.20 0.85 0.55 1" emission="0.6"/>
</asset>
<default>
  <default class="cabinet"><geom type="box" material="cabinet"/></default>
  <default class="paint"><geom type="box" contype="0" conaffinity="0" mass="0"/></default>
  <default class="handle"><geom type="capsule" size="0.009" material="handle" mass="0.05"/></default>
</default>
<worldbody>
  <camera name="view" pos="-0.10 -0.95 0.72" xyaxes="0.857 -0.514 0 0.232 0.387 0.892" fovy="40"/>
  <body name="microwave" mocap="true" pos="0.65 0 0">
    <geom class="cabinet" pos="0.14 0.2 0.13" size="0.14 0.01 0.107"/>
    <geom class="cabinet" pos="0.14 -0.155 0.13" size="0.14 0.055 0.107"/>
    <geom class="cabinet" pos="0.141 0 0.244" size="0.142 0.212 0.008"/>
    <geom class="cabinet" pos="0.141 0 0.014" size="0.142 0.212 0.011"/>
    <geom class="cabinet" pos="0.272 0 0.13" size="0.008 0.2 0.108"/>
    <geom class="paint" material="inside" pos="0.263 0.045 0.135" size="0.001 0.145 0.095"/>
    <geom class="paint" material="inside" pos="0.132 0.045 0.025" size="0.13 0.145 0.001"/>
    <geom class="paint" material="door" pos="-0.001 -0.155 0.13" size="0.001 0.048 0.1"/>
    <geom class="paint" material="display" pos="-0.002 -0.155 0.2" size="0.001 0.036 0.014"/>
    <geom class="paint" type="cylinder" material="cabinet" pos="-0.008 -0.155 0.14" size="0.02 0.007" zaxis="1 0 0"/>
    <geom class="paint" type="cylinder" material="cabinet" pos="-0.008 -0.155 0.08" size="0.02 0.007" zaxis="1 0 0"/>
    <body name="door" pos="0 0.2 0">
      <joint name="door" axis="0 0 -1" range="0 1.9" damping="0.4" frictionloss="0.4" armature="0.01"/>
      <geom type="box" material="door" pos="-0.012 -0.15 0.13" size="0.01 0.149 0.1" mass="1"/>
      <geom class="paint" material="glass" pos="-0.0225 -0.125 0.13" size="0.001 0.1 0.07"/>
      <geom name="bar" class="handle" fromto="-0.073 -0.27 0.055 -0.073 -0.27 0.205"/>
      <geom class="handle" fromto="-0.073 -0.27 0.07 -0.012 -0.27 0.07"/>
      <geom class="handle" fromto="-0.073 -0.27 0.135 -0.012 -0.27 0.135"/>
    </body>
  </body>
</worldbody>
<contact><exclude body1="microwave" body2="door"/></contact>
"""


class OpenMicrowave(PandaEnv):
    """Task that is solved when the door is open by 1 rad (57 degrees).

    Observation, after the arm's 25 numbers (see `PandaEnv`): the door's angle (rad) and its rate (rad/s), position of
    the handle (3, dm, from ORIGIN: where the bar is gripped), the same relative to the hand (3, dm), place of the oven
    (3: x, y of the front's middle, dm, from ORIGIN, and yaw, rad).
    """

    NAME = "OpenMicrowave"
    SCENE = SCENE
    START = ((0.32, -0.15, 0.26), (0.40, 0.15, 0.36))
    MAX_STEPS = 150

    def place_objects(self, random: np.random.Generator) -> None:
        """Places the oven at random in PLACE, with the door shut."""
        x, y, yaw = random.uniform(*PLACE)
        self.data.mocap_pos[0] = x, y, 0
        self.data.mocap_quat[0] = np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)

    def observe_objects(self) -> np.ndarray:
        """Returns this task's part of the observation, in the units of the arm's."""
        door, handle, quaternion = self.data.joint("door"), self.handle(), self.data.mocap_quat[0]
        oven, yaw = place(self.data.mocap_pos[0, :2]), 2 * np.arctan2(quaternion[3], quaternion[0])
        return np.concatenate([door.qpos, door.qvel, place(handle), DECIMETRES * (handle - self.hand), oven, [yaw]])

    def solved(self) -> bool:
        """True if the door is open by OPEN."""
        return self.angle >= OPEN

    @property
    def angle(self) -> float:
        """Returns the door's angle (rad), 0 when shut."""
        return float(self.data.joint("door").qpos[0])

    def handle(self, further: float = 0.0, behind: float = 0.0) -> np.ndarray:
        """Returns the position of the handle [3] (m).

        Args:
            further: angle (rad) by which the door is opened further.
            behind: distance (m) from the bar towards the door.
        """
        door, rotation = self.data.body("door"), np.empty(9)
        turn = np.array([np.cos(further / 2), 0, 0, -np.sin(further / 2)])
        mujoco.mju_quat2Mat(rotation, turn)
        local = rotation.reshape(3, 3) @ (HANDLE[0] + behind, *HANDLE[1:])
        return door.xpos + door.xmat.reshape(3, 3) @ local
