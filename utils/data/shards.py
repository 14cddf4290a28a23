"""Datasets larger than memory, in shards."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any


class ShardRotation:
    """Shards that serve the updates one after the other, cyclically; the next one is loaded in the background.

    Args:
        paths: files of the shards, in order.
        load: path → arrays of `prepare`, on the host.
        interval: number of updates per shard.
    """

    def __init__(self, paths: list, load: Any, interval: int):
        self.paths, self.load, self.interval = paths, load, interval
        self._pool = ThreadPoolExecutor(1)
        self._pending: tuple[int, Any] | None = None
        self._current: tuple[int, Any] | None = None

    def index(self, step: int) -> int:
        """Returns the index of the shard that serves the update at `step`."""
        return (step // self.interval) % len(self.paths)

    def next_switch(self, step: int) -> int:
        """Returns the first step after `step` that begins with another shard."""
        return (step // self.interval + 1) * self.interval

    def at(self, step: int) -> Any:
        """Returns the shard for `step` and starts loading the one after it; raises what `load` raises."""
        wanted = self.index(step)
        if self._current is None or self._current[0] != wanted:
            pending = self._pending if self._pending and self._pending[0] == wanted else None
            self._current = (wanted, pending[1].result() if pending else self.load(self.paths[wanted]))
            following = self.index(self.next_switch(step))
            if following != wanted:
                self._pending = (following, self._pool.submit(self.load, self.paths[following]))
        return self._current[1]

    def close(self) -> None:
        """Stops the background loading."""
        self._pool.shutdown(wait=False, cancel_futures=True)
