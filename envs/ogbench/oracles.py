"""Episodes of OGBench datasets, made with the oracles that ship in the ogbench package.

An episode is a pure function of (spec, seed, split, index): the environment's generator and NumPy's global one,
which OGBench's oracles and mazes draw from, are both set from a SeedSequence before each attempt.
"""

import functools
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np

from envs.ogbench import import_ogbench
from envs.ogbench.specs import DatasetSpec

Rows = dict[str, np.ndarray]
SPLITS = ("train", "val")
_DTYPES = {"terminals": np.bool_, "button_states": np.int64}


class Collector:
    """Makes the episodes of one dataset.

    Args:
        spec: the dataset's settings.
        max_steps: rows of an episode.
    """

    def __init__(self, spec: DatasetSpec, max_steps: int) -> None:
        import_ogbench()
        kwargs: dict[str, Any] = {"terminate_at_goal": False, "max_episode_steps": max_steps}
        self._spec = spec
        self._dtypes = _DTYPES | ({"observations": np.uint8} if spec.rendered else {})
        self._is_maze = spec.style in ("navigate", "stitch")
        if not self._is_maze:
            kwargs["mode"] = "data_collection"
        self._env = gymnasium.make(spec.env_id, disable_env_checker=True, **kwargs)
        self._env.reset(seed=0)  # Builds the model, which _forget_targets needs.
        self._oracles = {} if self._is_maze else _make_oracles(self._env, spec)

    def episode(self, seed: int, split: str, index: int) -> Rows:
        """Collects one episode, independent of those collected before.

        Args:
            seed: the dataset's seed.
            split: 'train' or 'val'.
            index: number of the episode within its split.

        Returns:
            Arrays with T rows in OGBench's format: observations f32 [T, o] or uint8 [T, h, w, 3], actions f32 [T, a],
            terminals bool [T] (true on the last row), qpos and qvel f32, and button_states int64 [T, b] with buttons.
        """
        attempt = 0
        while True:
            sequence = np.random.SeedSequence(entropy=seed, spawn_key=(SPLITS.index(split), index, attempt))
            env_seed, space_seed, *global_seed = (int(word) for word in sequence.generate_state(6))
            np.random.seed(global_seed)
            if self._is_maze:
                self._env.action_space.seed(space_seed)  # The reset samples a few actions from it.
                rows = _maze_rollout(self._env, self._spec, env_seed)
            else:
                _forget_targets(self._env.unwrapped)
                rows = _manipulation_rollout(self._env, self._spec, self._oracles, env_seed)
            if self._spec.domain != "scene" or _cube_stays_visible(rows["qpos"]):
                return {key: np.asarray(value, self._dtypes.get(key, np.float32)) for key, value in rows.items()}
            attempt += 1


def _forget_targets(env: Any) -> None:
    """Clears the targets of the previous episode.

    The first action of a closed-loop oracle follows the previous target of its kind of object (see
    _manipulation_rollout), which a reset does not clear.
    """
    for name, value in {"block": 0, "button": 0, "drawer_pos": 0.0, "window_pos": 0.0}.items():
        if hasattr(env, f"_target_{name}"):
            setattr(env, f"_target_{name}", value)
    if hasattr(env, "_target_button_states"):
        env._target_button_states[:] = 0
    if hasattr(env, "_target_drawer_pos"):
        env.model.site("drawer_handle_center_target").pos[1] = 0.0
        env.model.site("window_handle_center_target").pos[0] = 0.0


def _make_oracles(env: gymnasium.Env, spec: DatasetSpec) -> dict[str, Any]:
    """Returns the oracle of each kind of target: 'cube', 'button', 'drawer', 'window'."""
    if spec.style == "play":
        from ogbench.manipspace.oracles.plan import button_plan, cube_plan, drawer_plan, window_plan

        kinds = {
            "cube": cube_plan.CubePlanOracle,
            "button": button_plan.ButtonPlanOracle,
            "drawer": drawer_plan.DrawerPlanOracle,
            "window": window_plan.WindowPlanOracle,
        }
        common = {"env": env, "noise": spec.noise, "noise_smoothing": 0.5}
    else:
        from ogbench.manipspace.oracles.markov import button_markov, cube_markov, drawer_markov, window_markov

        kinds = {
            "cube": cube_markov.CubeMarkovOracle,
            "button": button_markov.ButtonMarkovOracle,
            "drawer": drawer_markov.DrawerMarkovOracle,
            "window": window_markov.WindowMarkovOracle,
        }
        common = {"env": env, "min_norm": 0.4}
    extra: dict[str, dict] = defaultdict(dict)
    if spec.domain.startswith("puzzle"):
        extra["button"] = {"gripper_always_closed": True}  # Open fingers would press the neighbours.
    if spec.domain == "scene" and spec.style == "noisy":
        extra["cube"] = {"max_step": 100}
    return {kind: oracle(**common, **extra[kind]) for kind, oracle in kinds.items()}


def _manipulation_rollout(
    env: gymnasium.Env, spec: DatasetSpec, oracles: dict[str, Any], env_seed: int
) -> dict[str, list]:
    """Runs the oracles of random targets until the time limit; returns the rows."""
    manipulation: Any = env.unwrapped  # OGBench's
    observation, info = env.reset(seed=env_seed)
    p_stack = np.random.uniform(*spec.p_stack)
    noise = _action_noise(spec)
    oracle = oracles[info["privileged/target_task"]]
    oracle.reset(observation, info)
    rows: dict[str, list] = defaultdict(list)
    done = False
    while not done:
        if np.random.uniform() < spec.p_random:
            # Not env.action_space.sample(): that property is a new, unseeded space at each access.
            action = np.random.uniform(-1, 1, size=5)
        else:
            action = np.asarray(oracle.select_action(observation, info)) + noise()
        action = np.clip(action, -1, 1)
        next_observation, _, terminated, truncated, info = env.step(action)
        done = terminated or truncated
        if oracle.done:
            # As in the released data, the next action still uses this step's info, from before the new target.
            target_observation, target_info = manipulation.set_new_target(p_stack=p_stack)
            oracle = oracles[target_info["privileged/target_task"]]
            oracle.reset(target_observation, target_info)
        _append(rows, observation, action, done, info)
        observation = next_observation
    return rows


def _action_noise(spec: DatasetSpec) -> Callable[[], Any]:
    """Returns a function that draws the noise on the oracle's action; its level is drawn once per episode.

    Plan oracles add noise to the plan, so none is added to their actions.
    """
    if spec.style == "play":
        return lambda: 0.0
    level = np.random.uniform(0, spec.noise)
    scale = level * np.array([1.0, 1.0, 1.0, 3.0, 10.0])  # x, y, z, yaw, gripper
    return lambda: np.random.normal(0, scale)


def _maze_rollout(env: gymnasium.Env, spec: DatasetSpec, env_seed: int) -> dict[str, list]:
    """Moves to the next cell on the way to a goal, which 'navigate' redraws when reached; returns the rows."""
    maze: Any = env.unwrapped  # OGBench's
    free = [(i, j) for i, j in np.argwhere(maze.maze_map == 0).tolist()]
    corners = [cell for cell in free if not _in_corridor(maze.maze_map, cell)]
    start = free[np.random.randint(len(free))]
    if spec.style == "navigate":
        goal = corners[np.random.randint(len(corners))]
    else:
        nearby = _cells_at_distance(maze.maze_map, start, 4)
        goal = nearby[np.random.randint(len(nearby))] if nearby else start
    task = {"init_ij": start, "goal_ij": goal}
    observation, _ = env.reset(seed=env_seed, options={"task_info": task})
    next_cell = functools.lru_cache(maxsize=None)(lambda here, there: _next_cell(maze, here, there))
    rows: dict[str, list] = defaultdict(list)
    done = False
    while not done:
        xy = maze.get_xy()
        direction = np.asarray(next_cell(maze.xy_to_ij(xy), maze.xy_to_ij(maze.cur_goal_xy))) - xy
        direction /= np.linalg.norm(direction) + 1e-6
        action = np.clip(direction + np.random.normal(0, spec.noise, direction.shape), -1, 1)
        next_observation, _, terminated, truncated, info = env.step(action)
        done = terminated or truncated
        if info["success"] and spec.style == "navigate":
            goal = corners[np.random.randint(len(corners))]
            maze.set_goal(goal_xy=maze.add_noise(maze.ij_to_xy(goal)))
        _append(rows, observation, action, done, info)
        observation = next_observation
    return rows


def _next_cell(maze: Any, here: tuple[int, int], there: tuple[int, int]) -> np.ndarray:
    """Returns the centre (xy) of the next cell on a shortest path between two cells."""
    return maze.get_oracle_subgoal(maze.ij_to_xy(here), maze.ij_to_xy(there))[0]


def _in_corridor(maze_map: np.ndarray, cell: tuple[int, int]) -> bool:
    """True if the cell is open to two opposite sides and walled on the other two."""
    i, j = cell
    vertical = maze_map[i - 1, j], maze_map[i + 1, j]
    horizontal = maze_map[i, j - 1], maze_map[i, j + 1]
    return (vertical, horizontal) in (((0, 0), (1, 1)), ((1, 1), (0, 0)))


def _cells_at_distance(maze_map: np.ndarray, start: tuple[int, int], distance: int) -> list[tuple[int, int]]:
    """Returns the free cells whose shortest path from `start` has exactly `distance` steps."""
    seen, front = {start}, [start]
    for _ in range(distance):
        neighbours = [(i + di, j + dj) for i, j in front for di, dj in ((-1, 0), (0, -1), (1, 0), (0, 1))]
        front = [cell for cell in dict.fromkeys(neighbours) if maze_map[cell] == 0 and cell not in seen]
        seen.update(front)
    return front


def _append(rows: dict[str, list], observation: np.ndarray, action: np.ndarray, done: bool, info: dict) -> None:
    """Appends one row; `prev_*` is the physical state in which the action was taken."""
    rows["observations"].append(observation)
    rows["actions"].append(action)
    rows["terminals"].append(done)
    rows["qpos"].append(info["prev_qpos"])
    rows["qvel"].append(info["prev_qvel"])
    if "prev_button_states" in info:
        rows["button_states"].append(info["prev_button_states"])


def _cube_stays_visible(qpos: list[np.ndarray]) -> bool:
    """True if the scene's cube stays on the reachable table (m); goal images of other states would be ambiguous."""
    _, y, z = np.asarray(qpos)[:, 14:17].T
    in_drawer = (z >= 0.06) & (z <= 0.08)
    return not ((y >= 0.29) | ((y <= -0.3) & ~in_drawer)).any()
