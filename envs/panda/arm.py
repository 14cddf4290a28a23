"""A Panda arm with a Robotiq 2F-85 gripper that points down, moved by operational-space control, at 10 Hz.

Model and control law are gym-hil's (PyPI gym-hil, Apache-2.0). The model is read from the installed package. The law is
reimplemented: gym-hil's function needs MuJoCo 3, runs at each physics step, and costs four times the physics.

    τ = Jᵀ Λ ẍ + (I − Jᵀ Λ J M⁻¹) q̈ + bias,   Λ = (J M⁻¹ Jᵀ)⁻¹,
    ẍ = k (x* − x) − 2 √k ẋ   (position, orientation; k = 200),   q̈ likewise towards a home posture (k = 0.5)
"""

from typing import Any
from xml.sax.saxutils import quoteattr

import gymnasium
import mujoco
import numpy as np

from envs.panda import gym_hil_assets

CONTROL_STEP = 0.1  # s, duration of an action
STEP_SIZE = 0.02  # m, translation of the commanded position by an action of 1
MAX_LEAD = 0.06  # m, maximal distance of the commanded position from the hand; bounds the force against a wall
PHYSICS_STEP = 0.002  # s
TORQUE_STEPS = 5  # physics steps per torque
POSTURE = np.array([0, -0.785, 0, -2.35, 0, 1.57, np.pi / 4])  # joint angles (rad)
TASK_STIFFNESS, POSTURE_STIFFNESS = 200.0, 0.5  # k, 1/s²
DOWN = np.array([0.0, 1.0, 0.0, 0.0])  # orientation of the hand, a quaternion
CLOSED = 255.0  # gripper command
# Lengths in observations are in decimetres, as for OGBench's arms: in metres, positions vary too little for a policy.
DECIMETRES, ORIGIN = 10.0, np.array([0.45, 0.0, 0.1])  # per metre; origin of positions (m)
CAMERAS = ("view", "handcam_rgb")  # of the scene, and gym-hil's at the wrist

# Common part of the scenes, added to gym-hil's panda.xml; noslip keeps gripped objects from creeping out.
WORLD = """
<mujoco model="{name}">
  <include file={panda}/>
  <compiler meshdir={meshes}/>
  <option timestep="{timestep}" noslip_iterations="5" noslip_tolerance="0"/>
  <statistic center="0.4 0 0.2" extent="0.8"/>
  <visual>
    <headlight diffuse="0.35 0.35 0.35" ambient="0.35 0.35 0.35" specular="0 0 0"/>
    <global offwidth="1920" offheight="1440"/>
    <quality shadowsize="4096" offsamples="8"/>
  </visual>
  <asset>
    <texture type="skybox" builtin="gradient" rgb1="0.86 0.90 0.94" rgb2="0.55 0.62 0.70" width="32" height="256"/>
    <texture name="table" type="2d" builtin="checker" width="256" height="256" mark="edge"
      rgb1="0.80 0.78 0.74" rgb2="0.76 0.74 0.70" markrgb="0.70 0.68 0.64"/>
    <material name="table" texture="table" texrepeat="5 5" texuniform="true"/>
  </asset>
  <worldbody>
    <light pos="0.3 -0.5 2.2" dir="0.1 0.25 -1" diffuse="0.6 0.6 0.6" specular="0.2 0.2 0.2"/>
    <geom name="table" type="plane" size="3 3 0.01" material="table"/>
  </worldbody>
  {scene}
</mujoco>
"""


class PandaEnv(gymnasium.Env):
    """Base of the tasks. A task sets NAME, SCENE, START and MAX_STEPS and overrides the three methods at the end.

    Action, in [-1, 1]: translation of the commanded position along x, y, z in units of 2 cm (x away from the base,
    y to its left, z up), and the gripper (-1 open, 1 closed). One action takes 0.1 s.

    Observation: of the arm, joint angles (7, rad) and velocities (7, rad/s), position (3, dm, from ORIGIN) and velocity
    (3, dm/s) of the hand (the point between the finger tips), lead of the commanded position over the hand (3, dm),
    gripper closure (1, 0 open to 1 closed) and its rate (1, 1/s); then the task's. With images, a dict of `state`,
    these numbers of the arm alone, and `images` of CAMERAS, uint8 [2, image_size, image_size, 3].

    Reward: -1 per step; 0, with termination, if the state AFTER the step is solved (OGBench's single tasks judge the
    state acted from). An unsolved episode is truncated after `max_steps` actions. `info['success']` is True if solved.

    Args:
        render_mode: None or 'rgb_array'. Without images, OpenGL is not touched before the first `render`.
        width: of rendered images (pixels).
        height: of rendered images (pixels).
        max_steps: step limit; default: that of the task.
        image_size: side (pixels) of images that replace the objects' states in observations; 0: no images.
    """

    NAME: str
    SCENE: str  # MJCF: sections of a model
    START: tuple[tuple[float, ...], tuple[float, ...]]  # lowest and highest first position of the hand (m)
    MAX_STEPS: int
    BOUNDS = np.array([[0.31, -0.35, 0.02], [0.68, 0.35, 0.45]])  # of the commanded position (m)

    metadata = {"render_modes": ["rgb_array"], "render_fps": round(1 / CONTROL_STEP)}

    def __init__(
        self,
        render_mode: str | None = None,
        width: int = 320,
        height: int = 240,
        max_steps: int | None = None,
        image_size: int = 0,
    ):
        self.render_mode, self._size = render_mode, (height, width)
        self._renderers: dict[Any, Any] = {}
        self.max_steps = max_steps or self.MAX_STEPS
        assets = gym_hil_assets()
        xml = WORLD.format(
            name=self.NAME,
            panda=quoteattr(str(assets / "panda.xml")),
            meshes=quoteattr(str(assets)),
            timestep=PHYSICS_STEP,
            scene=self.SCENE,
        )
        self.model = mujoco.MjModel.from_xml_string(xml)
        self.data = mujoco.MjData(self.model)
        joints = [self.model.joint(f"joint{i}") for i in range(1, 8)]
        self._qpos = np.array([joint.qposadr[0] for joint in joints])
        self._dofs = np.array([joint.dofadr[0] for joint in joints])
        self._motors = np.array([self.model.actuator(f"actuator{i}").id for i in range(1, 8)])
        self._gripper_motor = self.model.actuator("fingers_actuator").id
        self._gripper = self.model.joint("right_driver_joint")
        self._site = self.model.site("pinch").id
        self._inertia = _dense_index(self.model, self._dofs)
        self._jacobian = np.zeros((6, self.model.nv))
        self._target, self._steps = np.zeros(3), 0
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (4,), np.float32)
        mujoco.mj_forward(self.model, self.data)
        self.image_size = image_size
        if image_size:
            self.model.vis.quality.offsamples = 0
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, self._state().shape, np.float32)
        if image_size:
            images = gymnasium.spaces.Box(0, 255, (len(CAMERAS), image_size, image_size, 3), np.uint8)
            self.observation_space = gymnasium.spaces.Dict({"state": self.observation_space, "images": images})

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        """Puts the arm at rest at a random position in START, and the objects where `place_objects` draws them."""
        super().reset(seed=seed)
        mujoco.mj_resetData(self.model, self.data)
        self.place_objects(self.np_random)
        self._reach(self.np_random.uniform(*self.START))
        mujoco.mj_forward(self.model, self.data)
        self._target, self._steps = self.hand, 0
        return self._observe(), {"success": False}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Executes one action (clipped to [-1, 1]) for 0.1 s."""
        action = np.clip(np.asarray(action, np.float64), -1, 1)
        if action.shape != (4,) or not np.isfinite(action).all():
            raise ValueError(f"an action is 4 finite numbers, not {action}")
        before, self._target = self._target, self._command(action[:3])
        self.data.ctrl[self._gripper_motor] = CLOSED * (1 + action[3]) / 2
        rounds = round(CONTROL_STEP / PHYSICS_STEP / TORQUE_STEPS)
        for i in range(1, rounds + 1):
            mujoco.mj_step1(self.model, self.data)
            self.data.ctrl[self._motors] = self.torques(before + (self._target - before) * i / rounds)
            mujoco.mj_step2(self.model, self.data)
            mujoco.mj_step(self.model, self.data, TORQUE_STEPS - 1)
        mujoco.mj_forward(self.model, self.data)  # Updates positions and contacts to the new state.
        self._steps += 1
        success = self.solved()
        truncated = not success and self._steps >= self.max_steps
        return self._observe(), 0.0 if success else -1.0, success, truncated, {"success": success}

    def _command(self, translation: np.ndarray) -> np.ndarray:
        """Returns the commanded position (m) after a translation in [-1, 1]³."""
        target = np.clip(self._target + STEP_SIZE * translation, *self.BOUNDS)
        lead = target - self.hand
        return self.hand + lead * min(1.0, MAX_LEAD / max(float(np.linalg.norm(lead)), 1e-9))

    def torques(self, target: np.ndarray) -> np.ndarray:
        """Returns the joint torques [7] (N m) that pull the hand to `target` [3] (m), by the module's control law."""
        data, velocity = self.data, self.data.qvel[self._dofs]
        jacobian = self._hand_jacobian()
        inverse_inertia = np.linalg.solve(data.M[self._inertia], jacobian.T).T  # J M⁻¹
        mobility = inverse_inertia @ jacobian.T
        singular = abs(np.linalg.det(mobility)) < 1e-2
        inertia = np.linalg.pinv(mobility, rcond=1e-2) if singular else np.linalg.inv(mobility)  # Λ
        error = np.concatenate([target - self.hand, self._rotation_error()])
        acceleration = TASK_STIFFNESS * error - 2 * np.sqrt(TASK_STIFFNESS) * (jacobian @ velocity)
        posture = POSTURE_STIFFNESS * (POSTURE - data.qpos[self._qpos]) - 2 * np.sqrt(POSTURE_STIFFNESS) * velocity
        force = inertia @ (acceleration - inverse_inertia @ posture)
        return jacobian.T @ force + posture + data.qfrc_bias[self._dofs]

    def _hand_jacobian(self) -> np.ndarray:
        """Returns the Jacobian [6, 7] of the hand: linear and angular velocity by joint velocities."""
        mujoco.mj_jacSite(self.model, self.data, self._jacobian[:3], self._jacobian[3:], self._site)
        return self._jacobian[:, self._dofs]

    def _rotation_error(self) -> np.ndarray:
        """Returns the rotation (axis times angle [3], rad) that points the hand down."""
        quaternion, difference, vector = np.empty(4), np.empty(4), np.empty(3)
        mujoco.mju_mat2Quat(quaternion, self.data.site_xmat[self._site])
        quaternion[1:] *= -1
        mujoco.mju_mulQuat(difference, DOWN, quaternion)
        mujoco.mju_quat2Vel(vector, difference, 1.0)
        return vector

    def _reach(self, position: np.ndarray) -> None:
        """Sets the joint angles so that the hand is at `position` [3] (m) and points down."""
        self.data.qpos[self._qpos] = POSTURE
        for _ in range(20):  # Damped Newton steps of at most 0.1 m.
            mujoco.mj_kinematics(self.model, self.data)
            mujoco.mj_comPos(self.model, self.data)
            error = np.concatenate([position - self.hand, self._rotation_error()])
            error *= min(1.0, 0.1 / max(float(np.linalg.norm(error)), 1e-9))
            jacobian = self._hand_jacobian()
            self.data.qpos[self._qpos] += jacobian.T @ np.linalg.solve(jacobian @ jacobian.T + 1e-5 * np.eye(6), error)

    def _observe(self) -> Any:
        """Returns the observation: the state or, with images, both."""
        if not self.image_size:
            return self._state()
        size = (self.image_size, self.image_size)
        return {"state": self._state(), "images": np.stack([self._render_image(size, name) for name in CAMERAS])}

    def _state(self) -> np.ndarray:
        """Returns the state part of the observation, float32."""
        data, gripper = self.data, self._gripper
        arm = [
            data.qpos[self._qpos],
            data.qvel[self._dofs],
            place(self.hand),
            DECIMETRES * self._hand_jacobian()[:3] @ data.qvel[self._dofs],
            DECIMETRES * (self.target - self.hand),
        ]
        closure = [data.qpos[gripper.qposadr] / 0.8, data.qvel[gripper.dofadr] / 0.8]
        objects = [] if self.image_size else [self.observe_objects()]
        return np.concatenate([*arm, *closure, *objects]).astype(np.float32)

    @property
    def hand(self) -> np.ndarray:
        """Returns the position of the point between the finger tips [3] (m)."""
        return self.data.site_xpos[self._site].copy()

    @property
    def target(self) -> np.ndarray:
        """Returns the commanded position of the hand [3] (m)."""
        return self._target.copy()

    def get_state(self) -> dict[str, np.ndarray]:
        """Returns the full state, which determines this episode and later ones, as plain arrays; see `set_state`."""
        physics = np.empty(mujoco.mj_stateSize(self.model, mujoco.mjtState.mjSTATE_INTEGRATION))
        mujoco.mj_getState(self.model, self.data, physics, mujoco.mjtState.mjSTATE_INTEGRATION)
        generator = self.np_random.bit_generator.state
        words = [generator["state"][key] >> shift & 2**64 - 1 for key in ("state", "inc") for shift in (0, 64)]
        random = np.array([*words, generator["has_uint32"], generator["uinteger"]], np.uint64)
        return {"physics": physics, "target": self.target, "steps": np.array(self._steps), "random": random}

    def set_state(self, state: dict[str, np.ndarray]) -> Any:
        """Restores a state from `get_state`, of this process or another; returns the observation.

        A wrapped environment needs a `reset` before its next `step`: reset it, then call this on `env.unwrapped`.
        """
        physics = np.ascontiguousarray(state["physics"], np.float64)
        mujoco.mj_setState(self.model, self.data, physics, mujoco.mjtState.mjSTATE_INTEGRATION)
        mujoco.mj_forward(self.model, self.data)
        self._target, self._steps = np.array(state["target"], np.float64), int(state["steps"])
        *words, has_uint32, uinteger = (int(word) for word in state["random"])
        halves = {"state": words[0] | words[1] << 64, "inc": words[2] | words[3] << 64}
        bits = {"bit_generator": "PCG64", "state": halves, "has_uint32": has_uint32, "uinteger": uinteger}
        self.np_random.bit_generator.state = bits
        return self._observe()

    def render(self) -> np.ndarray | None:
        """Returns an image of the scene, uint8 [height, width, 3]."""
        return None if self.render_mode is None else self._render_image(self._size, "view")

    def _render_image(self, size: tuple[int, int], camera: str) -> np.ndarray:
        """Returns the image of a camera, uint8 [height, width, 3]."""
        if size not in self._renderers:
            self._renderers[size] = mujoco.Renderer(self.model, *size)
            # Shadows and reflections make software rendering several times slower; a policy does not need them.
            for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
                self._renderers[size].scene.flags[flag] = not self.image_size
        self._renderers[size].update_scene(self.data, camera)
        return self._renderers[size].render()

    def close(self) -> None:
        """Frees the renderers."""
        while self._renderers:
            self._renderers.popitem()[1].close()

    def place_objects(self, random: np.random.Generator) -> None:
        """Sets the initial state of the objects."""
        raise NotImplementedError

    def observe_objects(self) -> np.ndarray:
        """Returns the objects' part of the observation."""
        raise NotImplementedError

    def solved(self) -> bool:
        """True if the current state solves the task."""
        raise NotImplementedError


def place(position: np.ndarray) -> np.ndarray:
    """Converts a position (m) to the units of observations: dm, from ORIGIN."""
    return DECIMETRES * (position - ORIGIN[: len(position)])


def _dense_index(model: mujoco.MjModel, dofs: np.ndarray) -> np.ndarray:
    """Returns the indices in the sparse, lower-triangular `data.M` of the dense inertia matrix of `dofs`."""
    index = np.zeros((len(dofs), len(dofs)), int)
    for i, dof in enumerate(dofs):
        start, count = model.M_rowadr[dof], model.M_rownnz[dof]
        for address in range(start, start + count):
            for j in np.flatnonzero(dofs == model.M_colind[address]):
                index[i, j] = index[j, i] = address
    return index
