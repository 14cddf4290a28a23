"""What agents do online: the replay buffer on the device, and the environment that one lane acts in."""

from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np

from utils.datasets import Arrays
from utils.errors import UserError
from utils.memory import free_memory
from utils.observations import as_observation, columns, map_parts

State = dict[str, Any]


class Replay:
    """The rows that each lane has experienced, in the layout of utils/datasets.py, one array [lanes, rows, ...] each.

    The last row of an episode under way is its current state; it becomes a transition when the next action is known.
    `counts` [lanes] is how many of `starts` a window may begin at: whole windows, and all of a finished episode.
    """

    def __init__(self, lanes: int, max_steps: int, horizon: int, observation: Any, action_dim: int):
        """Makes room for `max_steps` environment steps of each lane, with observations of the kind of `observation`."""
        # An episode has a row more than it has steps. Windows and blocks may reach past the last row.
        rows = 2 * max_steps + 2 * (horizon + 1)
        self.horizon, self.counts = horizon, np.zeros(lanes, np.int32)
        parts = {name: np.asarray(part) for name, part in columns(observation).items()}
        _check_memory(lanes * rows * sum(part.nbytes for part in parts.values()))
        self.arrays = {
            **{name: jnp.zeros((lanes, rows, *part.shape), part.dtype) for name, part in parts.items()},
            "actions": jnp.zeros((lanes, rows, action_dim)),
            "rewards": jnp.zeros((lanes, rows)),
            "masks": jnp.ones((lanes, rows)),
            "terminals": jnp.ones((lanes, rows)),
            "terminated": jnp.zeros((lanes, rows)),
            "starts": jnp.zeros((lanes, rows), jnp.int32),
        }

    def write(self, lane: int, row: int, values: Arrays, start: int, starts: np.ndarray) -> None:
        """Writes `values` [n, ...] from `row` on and row numbers `starts` [k] from `start` on; n, k ≤ horizon + 1."""
        for names, position in ((tuple(values), row), (("starts",), start)):
            block = values if names != ("starts",) else {"starts": starts}
            # Of one size, so that one program serves all; what is written too much is overwritten by what comes next.
            padded = {k: _pad(np.asarray(v), self.horizon + 1, float(k == "terminals")) for k, v in block.items()}
            written = _write({k: self.arrays[k] for k in names}, padded, lane, position)
            self.arrays |= written

    def rows_of(self, lane: int, rows: int) -> dict[str, np.ndarray]:
        """The first `rows` rows of a lane, for a checkpoint."""
        return {k: np.asarray(v[lane, :rows]) for k, v in self.arrays.items()}

    def restore(self, lane: int, rows: dict[str, np.ndarray], count: int) -> None:
        """Puts back what `rows_of` gave."""
        for name, values in rows.items():
            self.arrays[name] = self.arrays[name].at[lane, : len(values)].set(values)
        self.counts[lane] = count


def _check_memory(needed: int) -> None:
    """Refuses a buffer that does not fit."""
    stats = jax.local_devices()[0].memory_stats()  # None on a processor.
    free = stats["bytes_limit"] - stats["bytes_in_use"] if stats else free_memory()
    if needed > free:
        sizes = f"{needed / 2**30:.1f} GiB for observations, {free / 2**30:.1f} are free"
        raise UserError(f"the experience of all steps takes {sizes}; take fewer --online_steps, or fewer seeds at once")


def _pad(values: np.ndarray, size: int, fill: float) -> np.ndarray:
    padding = np.full((size - len(values), *values.shape[1:]), fill, values.dtype)
    return np.concatenate([values, padding])


@partial(jax.jit, donate_argnums=0)
def _write(arrays: Arrays, block: Arrays, lane: jax.Array, position: jax.Array) -> Arrays:
    def put(array: jax.Array, values: jax.Array) -> jax.Array:
        start = (lane, position, *[0] * (array.ndim - 2))
        return jax.lax.dynamic_update_slice(array, values[None].astype(array.dtype), start)

    return jax.tree.map(put, arrays, block)


class Explorer:
    """One lane's environment, the chunk under way in it, and its place in the replay buffer.

    Episode i begins with a reset by `seed_of(i)`, so that a killed run can find its way back: it resets and takes the
    actions of the episode again.
    """

    def __init__(
        self, env: gymnasium.Env, replay: Replay, lane: int, seed_of: Callable[[int], int], sparse: bool = False
    ):
        """Starts the first episode.

        Args:
            env: an environment from make_env: vector observations or such with images, and actions in [-1, 1].
            replay: where rows go. lane: which of its lanes.
            seed_of: number of the episode → seed of its reset.
            sparse: give −1 for each reward that is not 0.
        """
        self._env, self._replay, self._lane, self._seed_of, self._sparse = env, replay, lane, seed_of, sparse
        self.episode, self.row, self.transitions = 0, 0, 0
        self._queue = np.zeros((0, *env.action_space.shape), np.float32)
        self._reset()

    def _reset(self) -> None:
        seed = self._seed_of(self.episode)
        np.random.seed(seed)
        observation, _ = self._env.reset(seed=seed)
        self._random_state = np.random.get_state()
        self.first_row, self._return, self._length = self.row, 0.0, 0
        self.observation = as_observation(observation)
        self._write([self.observation], [], [], [], False, False)

    def _step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict]:
        # OGBench draws from NumPy's global generator: each lane has a state of its own.
        np.random.set_state(self._random_state)
        observation, reward, terminated, truncated, info = self._env.step(np.clip(action, -1, 1))
        self._random_state = np.random.get_state()
        reward = -float(reward != 0) if self._sparse else float(reward)
        return as_observation(observation), reward, terminated, truncated, info

    def act(self, steps: int, policy: Callable[[Any, int, int], np.ndarray]) -> list[dict[str, float]]:
        """Takes exactly `steps` environment steps, chunks open loop, and stores them.

        Args:
            steps: environment steps.
            policy: (observation [o] or with images, episode, step in it) → chunk of actions [H, action_dim]; asked when
                the last chunk is used up or the episode is new.

        Returns:
            success (if the environment reports it), return and length of each episode that ended.
        """
        ended = []
        while steps:
            if not len(self._queue):
                self._queue = np.asarray(policy(self.observation, self.episode, self._length), np.float32)
            taken = {"observations": [self.observation], "actions": [], "rewards": [], "masks": []}
            terminated = truncated = False
            while steps and len(self._queue) and not (terminated or truncated):
                action, self._queue = self._queue[0], self._queue[1:]
                observation, reward, terminated, truncated, info = self._step(action)
                for name, value in zip(taken, (observation, action, reward, 1.0 - terminated), strict=True):
                    taken[name].append(value)
                self._return, self._length, steps = self._return + reward, self._length + 1, steps - 1
            self.observation = observation
            self._write(*taken.values(), terminated or truncated, terminated)
            if terminated or truncated:
                outcome = {"return": self._return, "length": self._length}
                ended.append(outcome | ({"success": float(info["success"])} if "success" in info else {}))
                self.episode, self._queue = self.episode + 1, self._queue[:0]
                self._reset()
        return ended

    def _write(
        self, observations: list, actions: list, rewards: list, masks: list, ended: bool, terminated: bool
    ) -> None:
        """Stores n transitions from the current row on and the state after them, which becomes the current row."""
        count, width = len(actions), self._env.action_space.shape[0]
        last = {"actions": np.zeros(width), "rewards": 0.0, "masks": 1.0}
        flags = np.arange(count + 1) == count
        values = {
            **columns(map_parts(np.stack, observations)),
            "actions": np.array([*actions, last["actions"]], np.float32),
            "rewards": np.array([*rewards, last["rewards"]], np.float32),
            "masks": np.array([*masks, last["masks"]], np.float32),
            "terminals": flags.astype(np.float32),  # Until it is acted from, the current row ends what is known.
            "terminated": (flags & terminated).astype(np.float32),
        }
        starts = self.row + np.arange(count, dtype=np.int32)
        self._replay.write(self._lane, self.row, values, self.transitions, starts)
        self.row, self.transitions = self.row + count, self.transitions + count
        pending = 0 if ended else min(self._replay.horizon - 1, self.row - self.first_row)
        self._replay.counts[self._lane] = self.transitions - pending
        self.row += ended

    def state(self) -> State:
        """Everything a checkpoint needs to go on: rows, counters and the chunk under way."""
        return {
            "rows": self._replay.rows_of(self._lane, self.row + 1),
            "count": int(self._replay.counts[self._lane]),
            "queue": self._queue,
            **{name: getattr(self, name) for name in ("episode", "row", "transitions", "first_row")},
        }

    def restore(self, state: State) -> bool:
        """Goes back to `state` by taking the episode's actions again.

        Returns:
            False if the environment did not come back to the same state: then the episode is cut off where it was, as
            by a time limit, and a new one has begun.
        """
        for name in ("episode", "row", "transitions", "first_row"):
            setattr(self, name, int(state[name]))
        self._queue = np.asarray(state["queue"], np.float32)
        rows = state["rows"]
        actions = rows["actions"][self.first_row : self.row]
        seed = self._seed_of(self.episode)
        np.random.seed(seed)
        observation, _ = self._env.reset(seed=seed)
        self._random_state = np.random.get_state()
        self._return, self._length, over = 0.0, 0, False
        for action in actions:
            if over:
                break
            observation, reward, terminated, truncated, _ = self._step(action)
            self._return, self._length, over = self._return + reward, self._length + 1, terminated or truncated
        self._replay.restore(self._lane, rows, int(state["count"]))
        self.observation = as_observation(observation)
        parts = columns(self.observation).items()
        if not over and all(np.array_equal(part, rows[name][state["row"]]) for name, part in parts):
            return True
        self._replay.counts[self._lane] = self.transitions
        self.episode, self.row, self._queue = self.episode + 1, self.row + 1, self._queue[:0]
        self._reset()
        return False
