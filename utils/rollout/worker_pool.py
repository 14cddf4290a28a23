"""Environments in worker processes: a simulator that hangs or crashes ends in a one-line error of the parent.

A worker imports only what makes its environments. On a shared page it notes its current call, so that the parent can
name the episode and step of a hang or crash.
"""

import faulthandler
import math
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Generator, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np

from utils.errors import UserError, failure_line
from utils.observations import as_observation, map_parts, state_of
from utils.system.files import atomic_write_text

Request = tuple[str, tuple[Any, ...]]  # a method of `Slot` and its arguments
DEFAULT_TIMEOUT = 120.0  # seconds per reset or step
START_SECONDS = 60.0  # additional seconds for a constructor, imports included
LONG_EPISODE = 10_000  # steps after which an unfinished episode gives a warning
MAX_WORKERS = 16
_LARGEST = float(np.finfo(np.float32).max)
_POLL = 0.1  # seconds between checks of signals and clocks
_PAGE = mmap.PAGESIZE
# Fields of the page: number of calls; episode, seed of its reset and step (0: the reset, -1: a constructor) of the
# current call; 1 + the number of a long episode, or 0.
_FIELDS = 5
_CALLS, _EPISODE, _SEED, _STEP, _LONG = range(_FIELDS)
# Only the parent handles signals. Not multiprocessing's spawn, which imports the main program, and with it JAX, in each
# worker.
_PROGRAM = (
    "import signal; [signal.signal(s, signal.SIG_IGN) for s in (signal.SIGINT, signal.SIGTERM)]; "
    "from {module} import _serve; _serve({connection}, {page}, {parent})"
)


class WorkerError(RuntimeError):
    """Failure of an environment: the first line of the message says what happened, the rest is a traceback."""


class EnvironmentFailed(UserError):
    """Failure of an environment between two boundaries of training: the state at the last one can be saved."""


def environment_failed(error: WorkerError, what: str, directory: Path) -> EnvironmentFailed:
    """Returns the one-line error to raise for `error`; writes the traceback into a run's directory."""
    report = directory / "worker_error.txt"
    atomic_write_text(report, f"{error}\n")
    return EnvironmentFailed(f"{what}: {str(error).splitlines()[0]} (traceback: {report})")


def episode_success(info: Mapping[str, Any]) -> float:
    """Returns the success, 1.0 or 0.0, that an episode's last `info` reports; NaN if it reports none.

    Keys are 'success' and 'is_success', values numbers, booleans or arrays of one; None, NaN and text do not count.
    """
    for key in ("success", "is_success"):
        value = np.asarray(info.get(key))
        if value.size == 1 and value.dtype.kind in "biuf" and not np.isnan(value).any():
            return float(value.item() != 0)
    return math.nan


class Steps(NamedTuple):
    """Outcome of n steps of one episode.

    Attributes:
        observations: those after each step, [n, ...].
        rewards: n floats.
        terminated, truncated: of the last step.
        success: `episode_success` of the last step.
    """

    observations: Any
    rewards: list[float]
    terminated: bool
    truncated: bool
    success: float


class Slot:
    """A worker's environment, with its own state of NumPy's global generator, from which OGBench partly draws.

    Requests name its public methods. It rejects observations and rewards that are not finite, for every environment.
    """

    def __init__(self, env: gymnasium.Env, page: np.ndarray | None = None):
        self._env, self._page = env, np.zeros(_FIELDS, np.int64) if page is None else page
        self._episode = self._seed = self._length = 0

    def reset(self, episode: int, seed: int) -> Any:
        """Starts an episode and returns its first observation."""
        self._episode, self._seed, self._length = episode, seed, 0
        self._note()
        np.random.seed(seed)
        self._env.unwrapped.action_space.seed(seed)  # OGBench's mazes draw random actions in their reset.
        observation, _ = self._env.reset(seed=seed)
        with np.errstate(over="ignore"):
            observation = as_observation(observation)
        self._random_state = np.random.get_state()
        self._check("reset", "observation", state_of(observation))
        return observation

    def record(self, actions: np.ndarray) -> Steps:
        """Executes a chunk, [n, action_dim], up to the end of the episode."""
        observations, rewards = [], []
        np.random.set_state(self._random_state)
        for action in actions:
            self._length += 1
            self._note()
            observation, reward, terminated, truncated, info = self._env.step(action)
            with np.errstate(over="ignore"):  # _check rejects inf.
                observation, reward = as_observation(observation), float(reward)
            self._check("step", "reward", reward)
            self._check("step", "observation", state_of(observation))
            # Copied, since an environment may change the array that it returned.
            observations.append(map_parts(lambda parts: parts[0].copy(), [observation]))
            rewards.append(reward)
            if terminated or truncated:
                break
        self._random_state = np.random.get_state()
        stacked = map_parts(np.stack, observations)
        return Steps(stacked, rewards, bool(terminated), bool(truncated), episode_success(info))

    def step(self, actions: np.ndarray) -> Steps:
        """Executes a chunk like `record`, but returns only the last observation, [1, ...]."""
        steps = self.record(actions)
        return steps._replace(observations=map_parts(lambda parts: parts[0][-1:], [steps.observations]))

    def retrace(self, episode: int, seed: int, actions: np.ndarray) -> tuple[Any, Steps | None]:
        """Starts an episode and repeats `actions`; returns the first observation and the result of `step`."""
        return self.reset(episode, seed), self.step(actions) if len(actions) else None

    def _check(self, method: str, name: str, value: Any) -> None:
        """Checks that numbers are finite.

        Raises:
            UserError: names the number and the environment's method that returned it.
        """
        # A reward is stored as float32.
        if abs(value) <= _LARGEST if isinstance(value, float) else np.isfinite(value).all():
            return
        index = np.argwhere(~np.isfinite(value)).tolist()[0] if np.ndim(value) else []
        error = ValueError(f"{name}{index or ''} is {np.asarray(value)[tuple(index)]}")
        source = getattr(type(self._env.unwrapped), method)
        raise UserError(failure_line(error, method, "observations and rewards must be finite numbers", source))

    def _note(self) -> None:
        """Notes the current call on the page."""
        page = self._page
        page[_EPISODE], page[_SEED], page[_STEP] = self._episode, self._seed, self._length
        page[_CALLS] += 1
        if self._length == LONG_EPISODE:
            page[_LONG] = self._episode + 1


class WorkerPool:
    """Environments in worker processes: slot i is in worker i % num_workers."""

    def __init__(
        self,
        make_env: Callable[[], gymnasium.Env],
        num_workers: int,
        *,
        name: str = "the environment",
        timeout: float = DEFAULT_TIMEOUT,
        environ: Mapping[str, str] | None = None,
    ):
        """Initialises the pool. Each worker starts on the first request to it.

        Args:
            make_env: makes an environment; picklable.
            num_workers: number of processes.
            name: name of the environment in messages.
            timeout: limit in seconds of a reset or step, with START_SECONDS more for a constructor; 0: none.
            environ: environment variables of the workers, besides those of the parent.
        """
        self._make_env, self._num_workers, self._name = make_env, num_workers, name
        self._timeout, self._environ = timeout, dict(environ or {})
        self.workers: dict[int, _Worker] = {}
        self._busy: dict[Connection, _Worker] = {}
        self._warned = False

    def __bool__(self) -> bool:
        """True while replies are pending."""
        return bool(self._busy)

    def send(self, requests: Mapping[int, Request]) -> None:
        """Sends each slot's request; the workers of these slots must have no pending replies."""
        shares: dict[int, dict[int, Request]] = {}
        for slot, request in requests.items():
            shares.setdefault(slot % self._num_workers, {})[slot] = request
        for index, share in shares.items():
            if index not in self.workers:
                self.workers[index] = _Worker(self._make_env, self._environ)
            worker = self.workers[index]
            worker.send(share)
            self._busy[worker.connection] = worker

    def receive(self, check: Callable[[], None]) -> list[tuple[int, Any]]:
        """Waits for replies and returns those that have arrived, (slot, result of the method).

        Args:
            check: called several times a second; any exception it raises ends the wait.

        Raises:
            WorkerError: an environment raised, its worker died, or it took too long.
        """
        while True:
            check()
            replies: list[tuple[int, Any]] = []
            ready = wait(list(self._busy), _POLL)
            for connection in [c for c in self._busy if c in ready]:
                replies += self._busy[connection].receive(self._name)
                del self._busy[connection]
            self._warn_of_long_episodes()
            for worker in self._busy.values():
                worker.watch(self._name, self._timeout)
            if replies:
                return replies

    def _warn_of_long_episodes(self) -> None:
        """Warns once of an episode that does not end."""
        if not self._warned and (long := [int(w.page[_LONG]) for w in self.workers.values() if w.page[_LONG]]):
            self._warned = True
            what = f"episode {long[0] - 1} has not ended after {LONG_EPISODE:,} steps"
            print(f"{self._name}: {what}; --max_episode_steps=<n> truncates such episodes", file=sys.stderr)

    def close(self) -> None:
        """Ends the workers. Later requests start new ones."""
        for worker in self.workers.values():
            worker.kill()
        self.workers.clear()
        self._busy.clear()


def converse(
    pool: WorkerPool, dialogues: Mapping[int, Generator[Request, Any, Any]], check: Callable[[], None]
) -> dict[int, Any]:
    """Runs dialogues to their ends: generators that yield requests to a slot and are sent its replies.

    Args:
        pool: workers of the slots.
        dialogues: slot → its dialogue.
        check: see `WorkerPool.receive`.

    Returns:
        slot → return value of its dialogue.
    """
    results: dict[int, Any] = {}

    def advance(slot: int, reply: Any) -> dict[int, Request]:
        try:
            return {slot: dialogues[slot].send(reply)}
        except StopIteration as end:
            results[slot] = end.value
            return {}

    pool.send({s: request for slot in dialogues for s, request in advance(slot, None).items()})
    while pool:
        answers = pool.receive(check)
        pool.send({s: request for slot, reply in answers for s, request in advance(slot, reply).items()})
    return results


class _Worker:
    """The parent's end of a worker process."""

    def __init__(self, make_env: Callable[[], gymnasium.Env], environ: dict[str, str]):
        self.connection, other_end = Pipe()
        with other_end:
            self._file = _shared_page()
            self.page = np.frombuffer(mmap.mmap(self._file, _PAGE), np.int64)
            self.page[_STEP] = -1
            ends = {"connection": other_end.fileno(), "page": self._file, "parent": os.getpid()}
            self._process = subprocess.Popen(
                # -u: no output lost in a buffer; -P: the parent's search path and nothing before it.
                [sys.executable, "-u", "-P", "-c", _PROGRAM.format(module=__name__, **ends)],
                pass_fds=[ends["connection"], ends["page"]],
                stdin=subprocess.DEVNULL,
                # Its own process group: processes of the simulator end with it, and Ctrl-C does not reach it.
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environ},
            )
        self._calls, self._silent, self._looked = 0, 0.0, time.monotonic()
        self.send(make_env)

    def send(self, message: Any) -> None:
        """Sends a message; if the worker is dead, `receive` raises the reason."""
        self._silent, self._looked = 0.0, time.monotonic()
        with suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send(message)

    def receive(self, name: str) -> list[tuple[int, Any]]:
        """Returns the worker's replies, (slot, reply).

        Raises:
            WorkerError: the worker raised or died.
        """
        try:
            reply = self.connection.recv()
        except (EOFError, ConnectionResetError):
            raise self._death(name) from None
        if isinstance(reply, tuple):
            line, lines = reply
            raise WorkerError(f"{name}, {self._place()}: {line}\n{lines}")
        return reply

    def watch(self, name: str, timeout: float) -> None:
        """Checks that a worker with a pending reply is alive and within its time limit.

        Raises:
            WorkerError: it has died, or a call has taken more than `timeout` seconds (0: no limit).
        """
        # A process of the simulator may hold the pipe open.
        if self._process.poll() is not None and not self.connection.poll():
            raise self._death(name)
        now, calls = time.monotonic(), int(self.page[_CALLS])
        # Time in which the computer was suspended does not count.
        self._silent = 0.0 if calls != self._calls else self._silent + min(now - self._looked, 1.0)
        self._looked, self._calls = now, calls
        limit = timeout + (START_SECONDS if self.page[_STEP] < 0 else 0)
        if timeout and self._silent > limit:
            self._process.send_signal(signal.SIGUSR1)  # Makes faulthandler write the current traceback.
            time.sleep(0.2)
            advice = "give a longer --env_timeout if it needs more"
            raise WorkerError(f"{name}, {self._place()}: no answer for {limit:g} s; {advice}\n{self._trace()}")

    def kill(self) -> None:
        """Ends the process and its children, and waits at most 2 s for its end."""
        self.connection.close()
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=2)
        os.close(self._file)

    def _death(self, name: str) -> WorkerError:
        code = self._process.wait()
        died = f"killed by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        hint = "; too little memory?" if code == -signal.SIGKILL else ""
        return WorkerError(f"{name}, {self._place()}: its process died, {died}{hint}\n{self._trace()}")

    def _place(self) -> str:
        """Returns a phrase that names the current or last call."""
        if self.page[_STEP] < 0:
            return "its constructor"
        episode, seed, step = (int(self.page[field]) for field in (_EPISODE, _SEED, _STEP))
        if not step:
            return f"the reset of episode {episode} with seed {seed}"
        return f"step {step} of episode {episode} (reset with seed {seed})"

    def _trace(self) -> str:
        """Returns the traceback that a dying or hanging worker has written behind the page."""
        return os.pread(self._file, 1_000_000, _PAGE).decode(errors="replace")


def _shared_page() -> int:
    """Returns the descriptor of a page of zeros to share between processes, in memory where the system can."""
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("otql")
    else:
        with tempfile.TemporaryFile() as temporary:
            file = os.dup(temporary.fileno())
    os.ftruncate(file, _PAGE)
    return file


def _serve(connection_fd: int, page_fd: int, parent: int) -> None:
    """Runs a worker's main loop.

    The first message is make_env, each later one {slot: request}. A reply is a list of (slot, result), or a tuple
    (line, traceback) if the worker fails.
    """
    for fd in (connection_fd, page_fd):
        os.set_inheritable(fd, False)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    os.lseek(page_fd, _PAGE, os.SEEK_SET)
    faulthandler.enable(page_fd)
    faulthandler.register(signal.SIGUSR1, page_fd)
    page = np.frombuffer(mmap.mmap(page_fd, _PAGE), np.int64)
    connection, slots = Connection(connection_fd), {}
    try:
        make_env = connection.recv()
        while True:
            replies = []
            for slot, (method, arguments) in connection.recv().items():
                if slot not in slots:
                    page[_STEP], page[_CALLS] = -1, page[_CALLS] + 1
                    slots[slot] = Slot(make_env(), page)
                replies.append((slot, getattr(slots[slot], method)(*arguments)))
            connection.send(replies)
    except BaseException as error:  # EOFError if the parent has died; nobody reads the message then.
        line = getattr(error, "line", str(error)) if isinstance(error, UserError) else failure_line(error, "its code")
        with suppress(OSError):
            connection.send((line, traceback.format_exc()))
    os._exit(0)  # Skips the interpreter's teardown, in which OpenGL contexts print errors.


def _end_with(parent: int) -> None:
    """Ends this process soon after its parent, whatever the simulator does."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
