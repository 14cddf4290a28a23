"""Environments in worker processes that hang, crash, do not end, or give what is no number."""

import os
import re
import signal
import subprocess
import sys
import time
from functools import partial

import faulty_env
import numpy as np
import pytest
from faulty_env import Track

from envs.tasks import make_env
from utils.errors import UserError
from utils.rollout.evaluator import Evaluator
from utils.rollout.worker_pool import Slot, WorkerError, WorkerPool, converse, episode_success

UP = np.ones((3, 1), np.float32)


@pytest.mark.check
@pytest.mark.parametrize(
    ("info", "success"),
    [
        ({"success": True}, 1),
        ({"success": np.bool_(False)}, 0),
        ({"success": 2}, 1),
        ({"success": 0.0}, 0),
        ({"success": np.array(1.0, np.float32)}, 1),
        ({"success": np.array([True])}, 1),
        ({"success": [0]}, 0),
        ({"is_success": np.array([[1]])}, 1),
        ({"success": None, "is_success": False}, 0),
        ({"success": False, "is_success": True}, 0),
        ({}, None),
        ({"success": None}, None),
        ({"success": float("nan")}, None),
        ({"success": "True"}, None),
        ({"success": np.array([True, False])}, None),
        ({"success": {}}, None),
    ],
)
def test_success_of_an_episode(info, success):
    found = episode_success(info)
    assert isinstance(found, float)
    assert np.isnan(found) if success is None else found == success


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("reward 2", "step failed at .*faulty_env.py, line .*: reward is nan"),
        ("observation 1", r"step failed at .*faulty_env.py, line .*: observation\[0\] is inf"),
    ],
)
def test_what_is_no_number_is_rejected(monkeypatch, fault, message):
    slot = Slot(Track())
    slot.reset(0, 5)
    monkeypatch.setenv("FAULT", fault)
    with pytest.raises(UserError, match=message):
        slot.record(UP)


def test_overflow_is_no_number(recwarn):
    class Far(Track):
        def _observation(self):
            return np.array([0, 1e300])

    with pytest.raises(UserError, match=r"reset failed at .*faulty_env.py, line .*observation\[1\] is inf"):
        Slot(Far()).reset(0, 0)
    assert not recwarn.list


@pytest.mark.parametrize("reward", [1e39, -1e39])
def test_a_reward_too_large_for_float32_is_no_number(reward):
    class Huge(Track):
        def step(self, action):
            return super().step(action)[0], reward, False, False, {}

    slot = Slot(Huge())
    slot.reset(0, 5)
    with pytest.raises(UserError, match=f"reward is {re.escape(str(reward))}"):
        slot.record(UP)


def test_an_environment_may_give_the_same_array_each_time():
    class InPlace(Track):
        given = np.zeros(2, np.float32)

        def _observation(self):
            self.given[:] = self.place, self.steps
            return self.given

    slots = Slot(InPlace()), Slot(Track())
    recorded = [(slot.reset(0, 5), slot.record(UP))[1] for slot in slots]
    np.testing.assert_array_equal(recorded[0].observations, recorded[1].observations)
    assert len(np.unique(recorded[0].observations[:, 0])) == 3


def receive(pool, requests, check=lambda: None):
    """All replies to `requests`, by slot."""
    pool.send(requests)
    replies = {}
    while pool:
        replies |= pool.receive(check)
    return replies


@pytest.mark.check
@pytest.mark.parametrize(
    ("fault", "message", "rest"),
    [
        (
            "hang 2",
            r"track, step 2 of episode 7 \(reset with seed 11\): no answer for 0.3 s; .*timeout",
            "faulty_env",
        ),
        ("exit 3", r"track, step 3 of episode 7 \(reset with seed 11\): its process died, with exit code 3", ""),
        ("raise 1", r"track, step 1 of .*failed at .*faulty_env.py, line .*: the cart left the track", "Traceback"),
    ],
)
def test_a_fault_names_its_place(monkeypatch, fault, message, rest):
    monkeypatch.setenv("FAULT", fault)
    pool = WorkerPool(Track, 1, name="track", timeout=0.3)
    receive(pool, {0: ("reset", (7, 11))})
    with pytest.raises(WorkerError) as caught:
        receive(pool, {0: ("step", (UP,))})
    pool.close()
    line, _, lines = str(caught.value).partition("\n")
    assert re.match(message, line), line
    assert rest in lines


def test_a_time_limit_is_one_of_each_step():
    """Not of what is asked for at once."""
    pool = WorkerPool(partial(Slow, 0.1), 1, timeout=0.35)
    receive(pool, {0: ("reset", (0, 0))})
    assert len(receive(pool, {0: ("step", (np.zeros((6, 1), np.float32),))})[0].rewards) == 6
    pool.close()


class Slow(Track):
    """Takes its time."""

    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds

    def step(self, action):
        time.sleep(self.seconds)
        return super().step(action)


def test_a_signal_ends_the_wait_at_once(monkeypatch):
    monkeypatch.setenv("FAULT", "hang 1")
    pool, checks = WorkerPool(Track, 1, timeout=10), []
    receive(pool, {0: ("reset", (0, 0))})

    def check():
        checks.append(time.monotonic())
        if len(checks) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        receive(pool, {0: ("step", (UP,))}, check)
    (worker,) = pool.workers.values()
    pool.close()
    assert time.monotonic() - checks[0] < 2 and worker._process.poll() == -signal.SIGKILL


def play(slot, steps):
    """A dialogue that plays over ends of episodes; returns all rewards."""
    rewards, episode = [], 0
    yield "reset", (episode, 100 * slot)
    while len(rewards) < steps:
        taken = yield "record", (UP,)
        rewards += taken.rewards
        if taken.terminated or taken.truncated:
            episode += 1
            yield "reset", (episode, 100 * slot + episode)
    return rewards


def test_workers_do_not_change_what_happens():
    found = []
    for workers in (1, 3):
        pool = WorkerPool(Track, workers)
        found.append(converse(pool, {slot: play(slot, 12) for slot in range(3)}, lambda: None))
        assert len(pool.workers) == workers
        pool.close()
    assert found[0] == found[1] and len({tuple(rewards) for rewards in found[0].values()}) > 1


def test_a_hung_worker_does_not_outlive_a_killed_parent():
    program = (
        "import os; from test_worker_pool import *\n"
        "os.environ['FAULT'] = 'hang 1'\n"
        "pool = WorkerPool(Track, 1)\n"
        "receive(pool, {0: ('reset', (0, 0))})\n"
        "pool.send({0: ('step', (UP,))})\n"
        "os.kill(os.getpid(), 9)\n"
    )
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    # The worker inherits stdout, so that its end is the worker's.
    parent = subprocess.run([sys.executable, "-c", program], env=environ, stdout=subprocess.PIPE, timeout=30)
    assert parent.returncode == -signal.SIGKILL


def test_an_episode_without_an_end_is_said_once_and_cut(capfd):
    name = f"gym:{faulty_env.__name__}:TrackEndless-v0"
    make = partial(make_env, name, max_episode_steps=10_050)
    with Evaluator(make, 50, num_workers=1, envs_per_worker=2, name=name) as evaluator:
        result = evaluator.evaluate(lambda states, *_: np.zeros((2, 50)), 2, 0)
    assert result["length"].tolist() == [10_050] * 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"{name}: episode ") and "has not ended after 10,000 steps; --max_episode_steps" in line


def test_success_is_decided_after_all_episodes():
    """An episode that says nothing where others report has failed."""

    def way(states, episodes, chunks):
        return np.where(episodes[:, None] % 2, 1.0, -1.0) * np.ones(6)

    with Evaluator(partial(Track, "solved"), 6, num_workers=1, envs_per_worker=2) as evaluator:
        result = evaluator.evaluate(way, 5, 0)
        assert result["success"].tolist() == [0, 1, 0, 1, 0] and result["success_rate"] == 0.4
        assert "success" not in evaluator.evaluate(lambda *_: -np.ones((2, 6)), 2, 0)


def test_max_episode_steps_is_a_truncation():
    env = make_env("gym:faulty_env:TrackEndless-v0", max_episode_steps=2)
    env.reset(seed=0)
    assert [env.step(UP[0])[2:4] for _ in range(2)] == [(False, False), (False, True)]
