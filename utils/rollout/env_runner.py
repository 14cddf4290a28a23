"""Episodes of one run in its environment, and how they resume."""

import copy
import math
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float

from utils.data.replay_buffer import ReplayBuffer
from utils.observations import columns, map_parts
from utils.rollout.worker_pool import Request, Steps

State = dict[str, Any]
Chunk = Float[np.ndarray, "H A"]  # actions
Outcome = dict[str, float]  # of an episode: success (NaN if not known), return and length


class EnvRunner:
    """One lane's episodes, the chunk under way in them, and their place in the replay buffer.

    Its environment is in a worker: `begin`, `act` and `restore` yield requests (utils/rollout/worker_pool.py) and are
    sent the replies. They change nothing but return a new runner, whose `commit` writes its rows: so what a signal or a
    crash cuts off has not happened.

    Episode i begins with a reset by `seed_of(i)`, so that a killed run can find its way back: it resets and takes the
    actions of the episode again.
    """

    def __init__(self, replay: ReplayBuffer, lane: int, seed_of: Callable[[int], int], sparse: bool = False):
        """Starts nothing yet.

        Args:
            replay: where rows go. lane: which of its lanes.
            seed_of: number of the episode → seed of its reset.
            sparse: give −1 for each reward that is not 0.
        """
        self._replay, self._lane, self._seed_of, self._sparse = replay, lane, seed_of, sparse
        self.episode, self.row, self.transitions, self.first_row = 0, 0, 0, 0
        self.reports = False  # whether an episode has reported its success
        self._width = replay.arrays["actions"].shape[-1]
        self._queue = np.zeros((0, self._width), np.float32)
        self._count = 0
        self._writes: list[Callable[[ReplayBuffer], None]] = []

    def begin(self) -> Generator[Request, Any, "EnvRunner"]:
        """Starts the first episode; returns the explorer in it."""
        new = self._copy()
        yield from new._reset()
        return new

    def act(
        self, steps: int, policy: Callable[[Any, int, int], Chunk]
    ) -> Generator[Request, Any, tuple["EnvRunner", list[Outcome]]]:
        """Takes exactly `steps` environment steps, chunks open loop.

        Args:
            steps: environment steps.
            policy: (observation [o] or with images, episode, step in it) → chunk; asked when the last one is used up
                or the episode is new.

        Returns:
            the explorer after them, and the outcome of each episode that ended. Success is NaN until an episode has
            reported it; from then on an episode that does not has failed.
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
        """Goes back to `state` by taking the episode's actions again.

        Returns:
            the explorer there, and False if the environment did not come back to the same state: then the episode is
            cut off where it was, as by a time limit, and a new one has begun.
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
        new._writes.append(lambda replay: replay.restore(new._lane, rows, new._count))
        same = all(np.array_equal(part, rows[name][state["row"]]) for name, part in columns(observation).items())
        if same and not over:
            return new, True
        new._count = new.transitions
        new.episode, new.row, new._queue = new.episode + 1, new.row + 1, new._queue[:0]
        yield from new._reset()
        return new, False

    def commit(self) -> "EnvRunner":
        """Writes the rows that are not in the replay buffer yet; returns the explorer."""
        for write in self._writes:
            write(self._replay)
        self._replay.counts[self._lane], self._writes = self._count, []
        return self

    def state(self) -> State:
        """Everything a checkpoint needs to go on: rows, counters and the chunk under way."""
        names = ("episode", "row", "transitions", "first_row", "reports")
        return {
            "rows": self._replay.rows_of(self._lane, self.row + 1),
            "count": self._count,
            "queue": self._queue,
            **{name: getattr(self, name) for name in names},
        }

    def _copy(self) -> "EnvRunner":
        """An explorer that can go on while this one stays as it is."""
        new = copy.copy(self)
        new._writes = []
        return new

    def _reset(self) -> Generator[Request, Any, None]:
        """Starts the episode; its first state becomes the current row."""
        self.observation = yield "reset", (self.episode, self._seed_of(self.episode))
        self.first_row, self._return, self._length = self.row, 0.0, 0
        self._write(map_parts(np.stack, [self.observation]), np.zeros((0, self._width)), [], [], False, False)

    def _rewarded(self, rewards: Sequence[float]) -> list[float]:
        """The rewards as they are learnt from, counted in the episode's return and length."""
        rewards = [-float(reward != 0) for reward in rewards] if self._sparse else list(rewards)
        for reward in rewards:
            self._return += reward
        self._length += len(rewards)
        return rewards

    def _write(
        self, visited: Any, actions: Float[np.ndarray, "n A"], rewards: list, masks: list, ended: bool, terminated: bool
    ) -> None:
        """Stores n transitions from the current row on and the state after them, which becomes the current row.

        Args:
            visited: n + 1 observations, [n + 1, ...].
        """
        count = len(actions)
        flags = np.arange(count + 1) == count
        values = {
            **columns(visited),
            "actions": np.concatenate([actions, np.zeros((1, self._width))]).astype(np.float32),
            "rewards": np.array([*rewards, 0.0], np.float32),
            "masks": np.array([*masks, 1.0], np.float32),
            "terminals": flags.astype(np.float32),  # Until it is acted from, the current row ends what is known.
            "terminated": (flags & terminated).astype(np.float32),
        }
        starts = self.row + np.arange(count, dtype=np.int32)
        self._writes.append(
            partial(
                ReplayBuffer.write, lane=self._lane, row=self.row, values=values, start=self.transitions, starts=starts
            )
        )
        self.row, self.transitions = self.row + count, self.transitions + count
        pending = 0 if ended else min(self._replay.horizon - 1, self.row - self.first_row)
        self._count = self.transitions - pending
        self.row += ended
