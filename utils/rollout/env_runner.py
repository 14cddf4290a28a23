"""Environment steps of online training, and how they resume."""

import copy
import math
from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from utils.data.replay_buffer import ReplayBuffer
from utils.data.rewards import IDENTITY, Affine
from utils.observations import columns, map_parts
from utils.rollout.worker_pool import Request, Steps

State = dict[str, Any]
Chunk = Float[np.ndarray, "H A"]  # actions
Outcome = dict[str, float]  # of an episode: success (NaN if unknown), return and length


class EnvRunner:
    """One run's episodes: the current one, its current action chunk, and their rows in the replay buffer.

    The environment is in a worker. `begin`, `act` and `restore` are dialogues (`worker_pool.converse`): they yield
    requests and are sent the replies. They leave this runner as it is and return a new one, whose `commit` writes its
    rows: a signal or crash in between leaves no trace.

    Episode i begins with a reset by `seed_of(i)`. So a killed run can return to the middle of an episode: it resets and
    repeats the episode's actions.
    """

    def __init__(
        self,
        replay: ReplayBuffer,
        run: int,
        seed_of: Callable[[int], int],
        sparse: bool = False,
        scaled: Affine = IDENTITY,
    ):
        """Initialises a runner, whose first episode `begin` starts.

        Args:
            replay: buffer that rows are written to.
            run: index on its run axis.
            seed_of: number of the episode → seed of its reset.
            sparse: True to replace each reward that is not 0 by −1.
            scaled: what rewards are then stored as; returns stay those of the environment.
        """
        self._replay, self._run, self._seed_of, self._sparse = replay, run, seed_of, sparse
        self._scaled = scaled
        self.episode, self.row, self.transitions, self.first_row = 0, 0, 0, 0
        self.reports = False  # True once an episode has reported its success
        self._width = replay.arrays["actions"].shape[-1]
        self._queue = np.zeros((0, self._width), np.float32)
        self._count = 0
        self._writes: list[Callable[[ReplayBuffer], None]] = []

    def begin(self) -> Generator[Request, Any, "EnvRunner"]:
        """Starts the first episode and returns the runner in it."""
        new = self._copy()
        yield from new._reset()
        return new

    def act(
        self, steps: int, policy: Callable[[Any, int, int], Chunk]
    ) -> Generator[Request, Any, tuple["EnvRunner", list[Outcome]]]:
        """Takes exactly `steps` environment steps, with chunks executed open loop.

        Args:
            steps: number of environment steps.
            policy: (observation [o] or with images, episode, step in it) → chunk; called at an episode's start and
                when a chunk is used up.

        Returns:
            the runner after them, and the outcome of each episode that ended. Success is NaN until an episode reports
            it; from then on, an episode that reports none has failed.
        """
        new, ended = self._copy(), []
        while steps:
            if not len(new._queue):
                new._queue = np.asarray(policy(new.observation, new.episode, new._length), np.float32)
            chunk = new._queue[:steps]
            taken: Steps = yield "record", (np.clip(chunk, -1, 1),)
            count, over = len(taken.rewards), taken.terminated or taken.truncated
            rewards = new._rewarded(taken.rewards)
            masks = [*[1.0] * (count - 1), 1.0 - taken.terminated]
            visited = map_parts(lambda parts: np.concatenate([parts[0][None], parts[1]]), [new.observation, taken[0]])
            new._write(visited, chunk[:count], rewards, masks, over, taken.terminated)
            new.observation = map_parts(lambda parts: parts[0][-1], [taken.observations])
            new._queue, steps = new._queue[count:], steps - count
            if over:
                success, new.reports = taken.success, new.reports or not math.isnan(taken.success)
                if new.reports:
                    success = float(success == 1)
                ended.append({"return": new._return, "length": new._length, "success": success})
                new.episode, new._queue = new.episode + 1, new._queue[:0]
                yield from new._reset()
        return new, ended

    def restore(self, state: State) -> Generator[Request, Any, tuple["EnvRunner", bool]]:
        """Returns to `state` by repeating the episode's actions.

        Returns:
            the runner there, and True. If the environment does not reach the same state, the episode is cut off there,
            as by a time limit, a new one starts, and the second value is False.
        """
        new = self._copy()
        for name in ("episode", "row", "transitions", "first_row"):
            setattr(new, name, int(state[name]))
        new.reports = bool(state.get("reports", False))
        new._queue = np.asarray(state["queue"], np.float32)
        rows, new._count = state["rows"], int(state["count"])
        actions = np.clip(rows["actions"][new.first_row : new.row], -1, 1)
        observation, taken = yield "retrace", (new.episode, new._seed_of(new.episode), actions)
        new._return, new._length, over = 0.0, 0, False
        if taken:
            new._rewarded(taken.rewards)
            over = taken.terminated or taken.truncated
            observation = map_parts(lambda parts: parts[0][-1], [taken.observations])
        new.observation = observation
        new._writes.append(lambda replay: replay.restore(new._run, rows, new._count))
        same = all(np.array_equal(part, rows[name][state["row"]]) for name, part in columns(observation).items())
        if same and not over:
            return new, True
        new._count = new.transitions
        new.episode, new.row, new._queue = new.episode + 1, new.row + 1, new._queue[:0]
        yield from new._reset()
        return new, False

    def commit(self) -> "EnvRunner":
        """Writes the new rows to the replay buffer and returns this runner."""
        for write in self._writes:
            write(self._replay)
        self._replay.counts[self._run], self._writes = self._count, []
        return self

    def state(self) -> State:
        """Returns everything that a checkpoint needs: rows, counters and the rest of the current chunk."""
        names = ("episode", "row", "transitions", "first_row", "reports")
        return {
            "rows": self._replay.rows_of(self._run, self.row + 1),
            "count": self._count,
            "queue": self._queue,
            **{name: getattr(self, name) for name in names},
        }

    def _copy(self) -> "EnvRunner":
        """Returns a copy with nothing to write."""
        new = copy.copy(self)
        new._writes = []
        return new

    def _reset(self) -> Generator[Request, Any, None]:
        """Starts the current episode; its first state becomes the current row."""
        self.observation = yield "reset", (self.episode, self._seed_of(self.episode))
        self.first_row, self._return, self._length = self.row, 0.0, 0
        self._write(map_parts(np.stack, [self.observation]), np.zeros((0, self._width)), [], [], False, False)

    def _rewarded(self, rewards: Sequence[float]) -> list[float]:
        """Adds rewards to the episode's return and length; returns them as training sees them."""
        rewards = [-float(reward != 0) for reward in rewards] if self._sparse else list(rewards)
        for reward in rewards:
            self._return += reward
        self._length += len(rewards)
        return [self._scaled(reward) for reward in rewards]

    def _write(
        self, visited: Any, actions: Float[np.ndarray, "n A"], rewards: list, masks: list, ended: bool, terminated: bool
    ) -> None:
        """Stores n transitions from the current row on, and the state after them, which becomes the current row.

        Args:
            visited: the n + 1 observations, [n + 1, ...].
            actions, rewards, masks: of the n transitions.
            ended: True if the episode ended with the last one.
            terminated: True if that was a true termination.
        """
        count = len(actions)
        flags = np.arange(count + 1) == count
        values = {
            **columns(visited),
            "actions": np.concatenate([actions, np.zeros((1, self._width))]).astype(np.float32),
            "rewards": np.array([*rewards, 0.0], np.float32),
            "masks": np.array([*masks, 1.0], np.float32),
            "terminals": flags.astype(np.float32),  # The current row ends the episode until its action is known.
            "terminated": (flags & terminated).astype(np.float32),
        }
        starts = self.row + np.arange(count, dtype=np.int32)
        run, row, start = self._run, self.row, self.transitions
        self._writes.append(lambda replay: replay.write(run, row, values, start, starts))
        self.row, self.transitions = self.row + count, self.transitions + count
        pending = 0 if ended else min(self._replay.horizon - 1, self.row - self.first_row)
        self._count = self.transitions - pending
        self.row += ended
