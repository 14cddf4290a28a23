"""Names, environments, and the errors about them."""

import functools
import pickle
import subprocess
import sys

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict

from envs import tasks
from envs.tasks import TABLE1_TASKS, make_env, parse_task
from envs.wrappers import with_images
from utils.errors import UserError
from utils.observations import Observation


@pytest.mark.check
@pytest.mark.parametrize(
    ("name", "domain", "kind", "env_id", "dataset"),
    [
        (
            "cube-double-play-singletask-task2-v0",
            "cube-double",
            "manipulation",
            "cube-double-singletask-task2-v0",
            "cube-double-play-v0",
        ),
        (
            "antmaze-large-navigate-singletask-v0",
            "antmaze-large",
            "locomotion",
            "antmaze-large-singletask-v0",
            "antmaze-large-navigate-v0",
        ),
        (
            "scene-noisy-singletask-task5-v0",
            "scene",
            "manipulation",
            "scene-singletask-task5-v0",
            "scene-noisy-v0",
        ),
        (
            "pointmaze-medium-stitch-singletask-v0",
            "pointmaze-medium",
            "pointmaze",
            "pointmaze-medium-singletask-v0",
            "pointmaze-medium-stitch-v0",
        ),
        (
            "antsoccer-arena-navigate-singletask-v0",
            "antsoccer-arena",
            "locomotion",
            "antsoccer-arena-singletask-v0",
            "antsoccer-arena-navigate-v0",
        ),
        ("gym:Pendulum-v1", "gym", "gym", "Pendulum-v1", None),
    ],
)
def test_parse_task(name, domain, kind, env_id, dataset):
    task = parse_task(name)
    assert (task.name, task.domain, task.kind, task.env_id, task.dataset) == (name, domain, kind, env_id, dataset)


@pytest.mark.check
def test_table1_is_forty_tasks_of_eight_domains():
    assert len(set(TABLE1_TASKS)) == 40
    assert len({parse_task(name).domain for name in TABLE1_TASKS}) == 8
    assert "puzzle-3x3-play-singletask-task5-v0" in TABLE1_TASKS


def test_names_are_ogbenchs():
    import ogbench  # noqa: F401

    ids = {parse_task(name).env_id for name in tasks.task_names()}
    registered = {id for id in gymnasium.registry if "singletask" in id}
    assert ids <= registered
    # OGBench released no data for the humanoid in the teleport maze.
    assert {id for id in registered - ids if "humanoidmaze-teleport" not in id} == set()


@pytest.mark.check
@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("cube-double-play-v0", "use cube-double-play-singletask-v0 or cube-double-play-singletask-task1-v0"),
        ("cube-dubble-play-singletask-task2-v0", "cube-double-play-singletask-task2-v0"),
        ("cube-double-singletask-v0", "cube-double-play-singletask-v0"),
        ("scene-play-singletask-task6-v0", "scene-play-singletask-task"),
        ("scene-navigate-singletask-v0", "scene-"),
        ("visual-pointmaze-large-navigate-singletask-v0", "pointmaze-large-navigate-singletask-v0"),
        ("visual-scene-play-v0", "use visual-scene-play-singletask-v0"),
        ("powderworld-easy-play-v0", "discrete actions"),
        ("qwertz", "scene-play-singletask-task1-v0"),
        ("gym:", "Pendulum"),
    ],
)
def test_wrong_names(name, hint):
    with pytest.raises(UserError) as caught:
        parse_task(name)
    assert hint in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("gym:NoSuchThing-v0", "NoSuchThing"),
        ("gym:no_such_module:Env-v0", "no_such_module"),
        ("gym:CartPole-v1", "Discrete"),
    ],
)
def test_wrong_gymnasium_environments(name, hint):
    with pytest.raises(UserError, match=hint) as caught:
        make_env(name)
    assert "\n" not in str(caught.value)


def test_gymnasium_actions_are_rescaled():
    env = make_env("gym:Pendulum-v1")  # Torque in [-2, 2].
    assert (env.action_space.low, env.action_space.high) == (-1, 1)
    env.reset(seed=0)
    env.step(np.ones(1, np.float32))
    assert env.unwrapped.last_u == 2


@pytest.mark.parametrize(
    "name",
    ["scene-play-singletask-task1-v0", "cube-double-play-singletask-v0", "pointmaze-teleport-navigate-singletask-v0"],
)
def test_episode_is_a_function_of_seed_and_actions(name):
    def rollout(env):
        generator = np.random.default_rng(0)
        states = [env.reset(seed=3)[0]]
        states += [env.step(generator.uniform(-1, 1, env.action_space.shape))[0] for _ in range(15)]
        return np.stack(states)

    first = make_env(name)
    second = pickle.loads(pickle.dumps(functools.partial(make_env, name)))()
    second.reset(seed=9)
    for _ in range(7):
        second.step(np.ones(second.action_space.shape))
    expected = rollout(first)
    np.testing.assert_array_equal(rollout(second), expected)
    goals = [env.reset(seed=5)[1]["goal"] for env in (first, second)]  # Shown after a few random steps.
    np.testing.assert_array_equal(*goals)
    assert not np.array_equal(first.reset(seed=4)[0], expected[0])


def test_no_warnings_and_no_heavy_imports():
    code = (
        "import sys, envs, envs.tasks, envs.ogbench.specs, envs.collect\n"
        "heavy = {'jax', 'mujoco', 'ogbench', 'gymnasium'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "import envs.ogbench.oracles, envs.panda.experts, real.import_rollouts\n"
        "import utils.rollout.video, utils.rollout.worker_pool\n"
        "env = envs.tasks.make_env('scene-play-singletask-v0')\n"
        "env.reset(seed=0); env.step(env.action_space.sample()); env.action_space\n"
        "assert not {'jax', 'jaxtyping'} & set(sys.modules)\n"  # What workers and a robot's computer import.
        "import envs.datasets\n"
        "assert 'jax' not in sys.modules\n"
    )
    result = subprocess.run([sys.executable, "-W", "always", "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""


def test_renders():
    env = make_env("scene-play-singletask-v0", render_mode="rgb_array", width=48, height=32)
    env.reset(seed=0)
    try:
        frame = env.render()
    except Exception as error:  # A machine without OpenGL; mujoco has no common class for that.
        pytest.skip(f"no off-screen rendering here: {error}")
    assert frame.shape == (32, 48, 3)


def test_tasks_with_images_have_the_settings_of_those_without():
    task = parse_task("visual-cube-double-noisy-singletask-task2-v0")
    assert (task.domain, task.kind, task.rendered) == ("cube-double", "manipulation", True)
    assert (task.env_id, task.dataset) == ("visual-cube-double-singletask-task2-v0", "visual-cube-double-noisy-v0")
    panda = parse_task("visual-OpenMicrowave-v0")
    assert (panda.domain, panda.env_id, panda.rendered) == (
        "OpenMicrowave",
        "envs.panda:visual-OpenMicrowave-v0",
        True,
    )
    assert not parse_task("scene-play-singletask-v0").rendered


def test_no_images_without_a_renderer(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "no-such-backend")
    with pytest.raises(
        UserError, match="has images, and MuJoCo cannot render with MUJOCO_GL=no-such-backend"
    ) as caught:
        make_env("visual-scene-play-singletask-v0")
    assert "\n" not in str(caught.value)


class Shown(gymnasium.Env):
    """Gives samples of any observation space."""

    action_space = gymnasium.spaces.Box(-1, 1, (2,))

    def __init__(self, space):
        self.observation_space = space

    def reset(self, *, seed=None, options=None):
        self.observation_space.seed(seed)
        return self.observation_space.sample(), {}


PICTURE, PAIR = Box(0, 255, (6, 5, 3), np.uint8), Box(0, 255, (2, 6, 5, 3), np.uint8)


@pytest.mark.parametrize(
    ("space", "width", "shape"),
    [
        (PICTURE, 0, (1, 6, 5, 3)),
        (Dict({"images": PAIR}), 0, (2, 6, 5, 3)),
        (Dict({"images": PAIR, "state": Box(-1, 1, (4,))}), 4, (2, 6, 5, 3)),
    ],
)
def test_observations_with_images(space, width, shape):
    env = with_images(Shown(space))
    assert (env.observation_space["state"].shape, env.observation_space["images"].shape) == ((width,), shape)
    observation, raw = env.reset(seed=3)[0], Shown(space).reset(seed=3)[0]
    assert isinstance(observation, Observation) and observation.state.dtype == np.float32
    parts = raw if isinstance(raw, dict) else {"images": raw[None]}
    np.testing.assert_array_equal(observation.images, parts["images"])
    np.testing.assert_array_equal(observation.state, parts.get("state", np.zeros(0)))


@pytest.mark.parametrize(
    "space",
    [Box(0, 1, (6, 5, 3)), Dict({"images": Box(0, 1, (2, 6, 5, 3))}), Dict({"images": PAIR, "depth": PICTURE}), PAIR],
)
def test_other_pictures_are_refused(space, monkeypatch):
    monkeypatch.setattr(gymnasium, "make", lambda *_, **__: Shown(space))
    with pytest.raises(UserError, match="uint8 images"):
        make_env("gym:Shown-v0")


def test_panda_tasks_have_domains_of_their_own():
    """Their names are known without gym-hil, and a misspelling finds them."""
    task = parse_task("OpenMicrowave-v0")
    assert (task.domain, task.kind, task.env_id, task.dataset) == (
        "OpenMicrowave",
        "gym",
        "envs.panda:OpenMicrowave-v0",
        None,
    )
    with pytest.raises(UserError, match="did you mean ArrangeBoxes-v0"):
        parse_task("ArrangeBox-v0")
