"""Datasets larger than memory: shards used in turn."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any


class ShardRotation:
    """Data that do not fit in memory at once: shards used in turn, the next one loaded in the background.

    Args:
        paths: the shards, in order.
        load: path → arrays from `prepare` on the host.
        interval: updates before the next shard takes over.
    """

    def __init__(self, paths: list, load: Any, interval: int):
        self.paths, self.load, self.interval = paths, load, interval
        self._pool = ThreadPoolExecutor(1)
        self._pending: tuple[int, Any] | None = None
        self._current: tuple[int, Any] | None = None

    def index(self, step: int) -> int:
        """Which shard serves the updates from `step` on."""
        return (step // self.interval) % len(self.paths)

    def next_switch(self, step: int) -> int:
        """The first step after `step` at which another shard takes over."""
        return (step // self.interval + 1) * self.interval

    def at(self, step: int) -> Any:
        """The shard for `step`; starts to load the one after it. Raises what `load` raises."""
        wanted = self.index(step)
        if self._current is None or self._current[0] != wanted:
            pending = self._pending if self._pending and self._pending[0] == wanted else None
            self._current = (wanted, pending[1].result() if pending else self.load(self.paths[wanted]))
            following = self.index(self.next_switch(step))
            if following != wanted:
                self._pending = (following, self._pool.submit(self.load, self.paths[following]))
        return self._current[1]

    def close(self) -> None:
        """Stops the background load."""
        self._pool.shutdown(wait=False, cancel_futures=True)
