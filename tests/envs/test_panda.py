"""The Panda tasks: control law, physics, rewards, saved states and experts."""

import importlib.util
import io
import types

import gymnasium
import mujoco
import numpy as np
import pytest
from panda_helpers import make, needs_model, run

import envs.panda
from envs.panda import TASKS, demonstrate
from envs.tasks import make_env
from utils.errors import UserError

IDLE = np.array([0, 0, 0, -1], np.float32)


@pytest.fixture
def boxes():
    return make("ArrangeBoxes-v0")


@pytest.fixture
def microwave():
    return make("OpenMicrowave-v0")


def random_actions(seed, count, hold=5):
    """Random corners of the action space, each held for some steps: as wild as a policy can be."""
    return np.random.default_rng(seed).choice([-1.0, 0.0, 1.0], (count // hold + 1, 4)).repeat(hold, axis=0)[:count]


def put(env, name, offset):
    """Puts a box at an offset (m) from the place on its plane."""
    env.data.joint(name).qpos[:] = [*(env.plane(name) + offset), 1, 0, 0, 0]
    env.data.joint(name).qvel[:] = 0
    mujoco.mj_forward(env.model, env.data)


def test_without_gym_hil(monkeypatch):
    monkeypatch.setattr(envs.panda.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="install it: pip install") as caught:
        make_env("gym:ArrangeBoxes-v0")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="gym-hil"):
        demonstrate.demonstrate("ArrangeBoxes-v0", dataset_dir="/nowhere")


@needs_model
@pytest.mark.filterwarnings("ignore:.*A Box observation space m")
@pytest.mark.parametrize("name", TASKS)
def test_gymnasiums_checker(name):
    from gymnasium.utils.env_checker import check_env

    check_env(make(name), skip_render_check=True)
    env = make_env(f"gym:{name}")
    assert (env.action_space.shape, env.action_space.low.min(), env.action_space.high.max()) == ((4,), -1, 1)
    assert env.observation_space.dtype == np.float32


@needs_model
def test_control_law_is_gym_hils(boxes):
    """With their own function as the reference, in which MuJoCo 4's change of mj_fullM is undone."""
    spec = importlib.util.spec_from_file_location(
        "reference", envs.panda.gym_hil_assets().parent / "controllers/opspace.py"
    )
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)

    def full_inertia(model, matrix, _):
        for column, unit in zip(matrix.T, np.eye(model.nv), strict=True):
            result = np.empty(model.nv)
            mujoco.mj_mulM(model, boxes.data, result, unit)
            column[:] = result

    reference.mujoco = types.SimpleNamespace(mj_jacSite=mujoco.mj_jacSite, mj_fullM=full_inertia)
    boxes.reset(seed=0)
    for i, action in enumerate(random_actions(0, 12, hold=1)):
        boxes.step(action)
        target = boxes.hand + np.random.default_rng(i).normal(0, 0.05, 3)
        data = types.SimpleNamespace(qM=None)
        for field in ("site_xpos", "site_xmat", "qpos", "qvel", "qfrc_bias"):
            setattr(data, field, getattr(boxes.data, field))
        reference.mujoco.mj_jacSite = lambda m, _, *args: mujoco.mj_jacSite(m, boxes.data, *args)
        expected = reference.opspace(
            boxes.model,
            data,
            boxes.model.site("pinch").id,
            np.arange(7),
            pos=target,
            ori=np.array([0, 1, 0, 0]),
            joint=np.array([0, -0.785, 0, -2.35, 0, 1.57, np.pi / 4]),
        )
        np.testing.assert_allclose(boxes.torques(target), expected, rtol=1e-6, atol=1e-6)


@needs_model
def test_actions_move_the_hand_and_the_gripper(boxes):
    boxes.reset(seed=0)
    for axis, sign, steps in ((0, 1, 6), (1, -1, 6), (2, 1, 4)):
        start, action = boxes.hand, np.array([0, 0, 0, 1.0])
        action[axis] = sign
        run(boxes, [action] * steps + [action * [0, 0, 0, 1]] * 8)
        np.testing.assert_allclose(boxes.hand - start, 0.02 * steps * action[:3], atol=1e-3)
    closed = run(boxes, [[0, 0, 0, 1]])[-1, 23]
    opened = run(boxes, [IDLE] * 8)[-1, 23]
    half = run(boxes, [[0, 0, 0, 0]] * 8)[-1, 23]
    assert closed > 0.95 and opened < 0.05 and 0.3 < half < 0.7
    with pytest.raises(ValueError, match="4 finite numbers"):
        boxes.step(np.array([0, 0, np.nan, 0]))


@needs_model
def test_the_command_stays_near_the_hand_and_in_the_workspace(microwave):
    microwave.reset(seed=0)
    run(microwave, [[0, 0, -1, 1]] * 12 + [[1, 0, 0, 1]] * 25)  # Down, and against the oven.
    lead = microwave.target - microwave.hand
    assert 0.04 < lead[0] < 0.062 and microwave.hand[0] < 0.66
    for action in random_actions(1, 60):
        microwave.step(action)
        assert (microwave.target >= microwave.BOUNDS[0] - 0.06).all()
        assert (microwave.target <= microwave.BOUNDS[1] + 0.06).all()


@pytest.mark.check
@needs_model
def test_observations(boxes, microwave):
    observation, info = boxes.reset(seed=3)
    assert info == {"success": False} and observation.shape == (67,)
    before = boxes.hand
    observation = run(boxes, [[1, 0.5, -0.5, -1]] * 3)[-1]
    data = boxes.data
    np.testing.assert_allclose(observation[:14], np.concatenate([data.qpos[:7], data.qvel[:7]]), atol=1e-5)
    origin = np.array([0.45, 0, 0.1])
    np.testing.assert_allclose(observation[14:17], 10 * (boxes.hand - origin), atol=1e-5)
    assert observation[17] > 1 and observation[19] < -0.5  # Velocity of the hand, dm/s.
    np.testing.assert_allclose(observation[20:23], 10 * (boxes.target - boxes.hand), atol=1e-5)
    np.testing.assert_allclose(boxes.target - before, [0.06, 0.03, -0.03], atol=1e-6)
    for name, part in zip(("red", "blue"), observation[25:].reshape(2, 21), strict=True):
        np.testing.assert_allclose(part[:3], 10 * (data.joint(name).qpos[:3] - origin), atol=1e-5)
        np.testing.assert_allclose(part[3:6], 10 * (boxes.box(name) - boxes.hand), atol=1e-5)
        np.testing.assert_allclose(part[6:9], 10 * (boxes.plane(name) - boxes.box(name)), atol=1e-5)
        matrix = np.column_stack([part[9:12], part[12:15], np.cross(part[9:12], part[12:15])])
        np.testing.assert_allclose(matrix, data.body(name).xmat.reshape(3, 3), atol=1e-6)
        np.testing.assert_allclose(part[15:], 0, atol=1e-2)
    data.joint("red").qvel[:] = np.arange(1, 7)
    np.testing.assert_allclose(boxes._observe()[40:46], [10, 20, 30, 4, 5, 6], atol=1e-5)

    microwave.reset(seed=3)
    microwave.data.joint("door").qpos[:] = 0.4
    observation = run(microwave, [IDLE])[-1]
    bar = microwave.data.geom_xpos[microwave.model.geom("bar").id]
    np.testing.assert_allclose(observation[25:27], [0.4, 0], atol=2e-3)
    np.testing.assert_allclose(observation[27:29], 10 * (bar - origin)[:2], atol=1e-4)
    np.testing.assert_allclose(observation[30:33], observation[27:30] - observation[14:17], atol=1e-4)
    oven = microwave.data.body("microwave").xpos
    np.testing.assert_allclose(observation[33:35], 10 * (oven - origin)[:2], atol=1e-5)
    front = microwave.data.body("microwave").xmat.reshape(3, 3)[:, 0]
    np.testing.assert_allclose(observation[35], np.arctan2(front[1], front[0]), atol=1e-6)


@needs_model
def test_boxes_are_solved_after_the_step_that_solves_them(boxes):
    boxes.reset(seed=0)
    put(boxes, "red", [0.02, 0.02, 0])
    put(boxes, "blue", [0, 0.035, 0])
    assert boxes.step(IDLE)[1:] == (-1.0, False, False, {"success": False})
    put(boxes, "blue", [0, 0.025, 0.03])
    assert not boxes.solved()  # In the air: it lands within a step or two.
    results = [boxes.step(IDLE)[1:] for _ in range(3)]
    assert results[-1] == (0.0, True, False, {"success": True})
    put(boxes, "red", boxes.plane("blue") - boxes.plane("red"))  # Each on the other's plane.
    put(boxes, "blue", boxes.plane("red") - boxes.plane("blue"))
    assert not boxes.step(IDLE)[2]


@needs_model
def test_boxes_are_not_solved_in_the_hand(boxes):
    from envs.panda.experts import BoxArranger

    boxes.reset(seed=0)
    put(boxes, "red", np.zeros(3))
    put(boxes, "blue", np.zeros(3))
    expert = BoxArranger(boxes, np.random.default_rng(0))
    for action in expert.move(lambda: boxes.box("blue"), -1, 0.005):
        assert boxes.step(action)[2]
    for _ in range(8):
        solved = boxes.step(np.array([0, 0, 0, 1]))[2]
    assert boxes.placed("red") and boxes.placed("blue") and not solved
    for _ in range(4):
        solved = boxes.step(IDLE)[2]
    assert solved


@needs_model
def test_the_door_is_solved_after_the_step_that_solves_it(microwave):
    microwave.reset(seed=0)
    microwave.data.joint("door").qpos[:], microwave.data.joint("door").qvel[:] = 0.9, 0.5
    assert microwave.step(IDLE)[1:] == (-1.0, False, False, {"success": False})
    microwave.data.joint("door").qvel[:] = 3
    assert not microwave.solved()
    assert microwave.step(IDLE)[1:] == (0.0, True, False, {"success": True})


@needs_model
def test_step_limit(microwave):
    env = make("OpenMicrowave-v0", max_steps=4)
    env.reset(seed=0)
    assert [env.step(IDLE)[3] for _ in range(4)] == [False] * 3 + [True]
    env.reset()
    assert not env.step(IDLE)[3]
    assert microwave.max_steps == 150


@needs_model
@pytest.mark.parametrize("name", TASKS)
def test_an_episode_is_a_function_of_seed_and_actions(name):
    first, second = make(name), make(name)
    second.reset(seed=9)
    run(second, random_actions(9, 5))
    rollouts = [(env.reset(seed=3)[0], run(env, random_actions(0, 15)), env.reset()[0]) for env in (first, second)]
    for ours, theirs in zip(*rollouts, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    starts = np.stack([first.reset(seed=seed)[0] for seed in range(8)])
    assert len(np.unique(starts[:, 14])) == len(np.unique(starts[:, 25:], axis=0)) == 8
    low, high = np.array(first.START)
    hands = starts[:, 14:17] / 10 + [0.45, 0, 0.1]
    assert (hands > low - 1e-4).all() and (hands < high + 1e-4).all()


@needs_model
def test_boxes_start_before_their_own_planes(boxes):
    """With room for the open gripper between them."""
    starts = []
    for seed in range(12):
        boxes.reset(seed=seed)
        starts.append([boxes.box(name)[:2] for name in ("red", "blue")])
    low, high = np.min(starts, axis=0), np.max(starts, axis=0)
    assert (low > [[0.33, -0.22], [0.33, 0.06]]).all() and (high < [[0.45, -0.06], [0.45, 0.22]]).all()
    assert (high - low > [0.05, 0.08]).all()


@needs_model
@pytest.mark.parametrize("name", TASKS)
def test_a_saved_state_goes_on_exactly(name):
    env = make(name)
    env.reset(seed=4)
    run(env, random_actions(2, 30))
    file = io.BytesIO()
    np.savez(file, **env.get_state())
    file.seek(0)
    state = dict(np.load(file, allow_pickle=False))
    observation, rest = env._observe(), random_actions(3, 20)

    other = gymnasium.make(name)
    other.reset(seed=77)
    np.testing.assert_array_equal(other.unwrapped.set_state(state), observation)
    np.testing.assert_array_equal(run(other, rest), run(env, rest))
    assert other.unwrapped._steps == env._steps == 50
    np.testing.assert_array_equal(other.reset()[0], env.reset()[0])


@needs_model
def test_what_is_not_touched_stays(boxes, microwave):
    for angle in (0.0, 0.5):
        microwave.reset(seed=1)
        microwave.data.joint("door").qpos[:] = angle
        run(microwave, [IDLE] * 30)
        assert abs(microwave.angle - angle) < 2e-3
    boxes.reset(seed=1)
    before = [*(boxes.box(name) for name in ("red", "blue")), boxes.hand]
    run(boxes, [IDLE] * 60)
    after = [*(boxes.box(name) for name in ("red", "blue")), boxes.hand]
    np.testing.assert_allclose(after, before, atol=1e-3)


@needs_model
def test_a_wild_policy_breaks_nothing(boxes, microwave):
    for env in (boxes, microwave):
        limits = env.model.jnt_range[:7]
        for seed in range(3):
            env.reset(seed=seed)
            for action in random_actions(seed, 60):
                env.step(action - [0, 0, 0.3, 0])
                angles = env.data.qpos[:7]
                assert (angles > limits[:, 0]).all() and (angles < limits[:, 1]).all()
                assert env.data.contact.dist.min(initial=0) > -0.01
                if env is boxes:
                    assert all(np.linalg.norm(env.data.joint(name).qvel[:3]) < 2 for name in ("red", "blue"))
                    assert all(0.01 < env.box(name)[2] < 0.5 for name in ("red", "blue"))
                else:
                    assert -0.02 < env.angle < 1.95
        assert not any(warning.number for warning in env.data.warning)


@needs_model
def test_a_grip_holds(boxes):
    from envs.panda.experts import BoxArranger

    boxes.reset(seed=0)
    expert = BoxArranger(boxes, np.random.default_rng(0))
    for action in expert.move(lambda: boxes.box("red"), -1, 0.005):
        boxes.step(action)
    run(boxes, [[0, 0, 0, 1]] * 5 + [[0, 0, 1, 1]] * 6)
    held = boxes.box("red") - boxes.hand
    assert boxes.box("red")[2] > 0.1 and boxes._touched()
    run(boxes, random_actions(0, 60) * [1, 1, 0.5, 0] + [0, 0, 0, 1])
    np.testing.assert_allclose(boxes.box("red") - boxes.hand, held, atol=2e-3)


@needs_model
@pytest.mark.parametrize("name", TASKS)
def test_experts_solve_the_tasks_in_their_ways(name):
    from envs.panda.experts import EXPERTS

    env, ways = make(name), {}
    for seed in range(20):
        expert = EXPERTS[name](env, np.random.default_rng(seed))
        way = expert.hooks if name == "OpenMicrowave-v0" else expert.order[0]
        if way in ways:
            continue
        env.reset(seed=seed)
        for action in expert.actions():
            assert action.shape == (4,) and np.abs(action).max() <= 1
            _, reward, success, truncated, _ = env.step(action)
            if success or truncated:
                ways[way] = success, reward, env._steps
                break
    assert len(ways) == 2
    assert all(success and reward == 0 and steps < 0.9 * env.max_steps for success, reward, steps in ways.values())
