import os
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
from counting_env import CountingEnv, make_in_worker

from utils.rollout.evaluator import Evaluator, episode_seed
from utils.rollout.worker_pool import WorkerError

HORIZON = 3


def policy(observations, episodes, chunks):
    """Each row depends on its observation, episode and chunk alone; some actions need clipping."""
    noise = [np.random.default_rng((e, c)).normal(size=2 * HORIZON) for e, c in zip(episodes, chunks, strict=True)]
    return np.stack(noise) + 0.1 * observations.sum(axis=1, keepdims=True)


def serial(num_episodes, seed):
    """The plain loop that the evaluator must agree with: (success, return, length) of each episode."""
    outcomes = []
    for episode in range(num_episodes):
        env, total, chunk, done = CountingEnv(), 0.0, 0, False
        np.random.seed(episode_seed(seed, episode))
        env.action_space.seed(episode_seed(seed, episode))
        observation, _ = env.reset(seed=episode_seed(seed, episode))
        while not done:
            rows = np.float32(observation)[None], np.array([episode]), np.array([chunk])
            for action in np.clip(np.float32(policy(*rows)).reshape(HORIZON, 2), -1, 1):
                observation, reward, done, _, info = env.step(action)
                total += reward
                if done:
                    break
            chunk += 1
        outcomes.append((info["success"], total, env.steps))
    return np.array(outcomes).T


def outcomes_of(result):
    return np.stack([result["success"], result["return"], result["length"]])


@pytest.fixture(scope="module")
def evaluator():
    with Evaluator(make_in_worker, HORIZON, num_workers=2, envs_per_worker=3) as evaluator:
        yield evaluator


@pytest.mark.check
def test_agrees_with_a_serial_loop(evaluator):
    progress = []
    result = evaluator.evaluate(policy, 25, seed=7, progress=lambda done, total: progress.append((done, total)))
    success, returns, lengths = serial(25, seed=7)
    assert progress == [(done, 25) for done in range(1, 26)]
    np.testing.assert_array_equal(result["success"], success)
    np.testing.assert_array_equal(result["length"], lengths)
    np.testing.assert_allclose(result["return"], returns, rtol=1e-12)
    means = [result[name] for name in ("success_rate", "return_mean", "length_mean")]
    np.testing.assert_allclose(means, [success.mean(), returns.mean(), lengths.mean()])
    assert len(set(lengths)) > 5 and 0 < success.mean() < 1  # the comparison says something


@pytest.mark.parametrize(("num_workers", "envs_per_worker"), [(1, 1), (1, 4), (3, 2)])
def test_workers_and_slots_do_not_matter(evaluator, num_workers, envs_per_worker):
    expected = outcomes_of(evaluator.evaluate(policy, 10, seed=1))
    with Evaluator(make_in_worker, HORIZON, num_workers=num_workers, envs_per_worker=envs_per_worker) as other:
        np.testing.assert_array_equal(outcomes_of(other.evaluate(policy, 10, seed=1)), expected)


def test_an_evaluation_is_repeatable_and_its_start_does_not_depend_on_its_length(evaluator):
    first = outcomes_of(evaluator.evaluate(policy, 12, seed=3))
    np.testing.assert_array_equal(outcomes_of(evaluator.evaluate(policy, 12, seed=3)), first)
    np.testing.assert_array_equal(outcomes_of(evaluator.evaluate(policy, 5, seed=3)), first[:, :5])
    assert not np.array_equal(outcomes_of(evaluator.evaluate(policy, 12, seed=4)), first)


def test_policy_gets_a_fixed_batch_and_is_asked_once_a_chunk(evaluator):
    calls, asked = [], {}

    def recorder(observations, episodes, chunks):
        calls.append((observations, episodes, chunks))
        for step, episode, chunk in zip(observations[:, 0], episodes, chunks, strict=True):
            asked.setdefault((int(episode), int(chunk)), set()).add(int(step))
        return policy(observations, episodes, chunks)

    result = evaluator.evaluate(recorder, 8, seed=0)
    for observations, episodes, chunks in calls:
        assert observations.shape == (6, 4) and observations.dtype == np.float32
        assert episodes.shape == chunks.shape == (6,) and episodes.dtype == chunks.dtype == np.int32
    for episode, length in enumerate(result["length"]):
        # Chunk c is asked for at step c * horizon; finished rows may repeat, with a chunk that goes nowhere.
        for chunk in range(-(-length // HORIZON)):
            assert HORIZON * chunk in asked[episode, chunk]
    assert len(calls) < sum(-(-result["length"] // HORIZON))  # a batch, not one after another


def test_padding_is_finite_when_there_are_fewer_episodes_than_slots(evaluator):
    def strict(observations, episodes, chunks):
        assert (observations[:, 1] > 0).all()  # a real observation, in every row
        actions = policy(observations, episodes, chunks)
        actions[1:] = np.nan  # padding: ignored
        return actions

    with Evaluator(make_in_worker, HORIZON, num_workers=2, envs_per_worker=2) as fresh:
        result = fresh.evaluate(strict, 1, seed=0)
        assert len(fresh.pool.workers) == 1  # no more than there are episodes
    np.testing.assert_array_equal(outcomes_of(result), outcomes_of(evaluator.evaluate(policy, 1, seed=0)))


def test_success_is_absent_if_the_environment_does_not_report_it():
    with Evaluator(partial(make_in_worker, success=False), HORIZON, num_workers=1) as evaluator:
        result = evaluator.evaluate(policy, 2, seed=0)
    assert set(result) == {"return", "length", "return_mean", "length_mean"}


@pytest.mark.parametrize(("fault", "message"), [("raise", "ValueError: the gripper fell off"), ("die", "SIGKILL")])
def test_a_failing_worker_is_reported(fault, message):
    with Evaluator(partial(make_in_worker, fault=fault), HORIZON, num_workers=2, envs_per_worker=1) as evaluator:
        for _ in range(2):  # the second call starts new workers
            with pytest.raises(WorkerError, match=message):
                evaluator.evaluate(policy, 20, seed=0)
            assert not evaluator.pool.workers


@pytest.mark.parametrize(
    ("actions", "error"),
    [(np.full((6, 6), np.nan), FloatingPointError), (np.zeros((6, 7)), ValueError), (np.zeros((5, 6)), ValueError)],
)
def test_bad_actions_are_refused_and_the_next_call_works(evaluator, actions, error):
    with pytest.raises(error):
        evaluator.evaluate(lambda *batch: actions, 2, seed=0)
    assert len(evaluator.evaluate(policy, 2, seed=0)["return"]) == 2
    with pytest.raises(ValueError, match="at least 1"):
        evaluator.evaluate(policy, 0, seed=0)


def test_workers_ignore_ctrl_c_and_end_on_close():
    evaluator = Evaluator(make_in_worker, HORIZON, num_workers=2, envs_per_worker=1)
    evaluator.evaluate(policy, 4, seed=0)
    processes = [worker._process for worker in evaluator.pool.workers.values()]
    for process in processes:
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
    assert len(evaluator.evaluate(policy, 4, seed=0)["return"]) == 4
    assert [worker._process for worker in evaluator.pool.workers.values()] == processes  # reused
    evaluator.close()
    assert all(process.poll() is not None for process in processes)
    evaluator.close()


def test_workers_do_not_outlive_a_killed_parent():
    program = (
        "import os; from test_evaluator import *\n"
        "evaluator = Evaluator(make_in_worker, HORIZON, num_workers=2)\n"
        "evaluator.evaluate(policy, 4, seed=0)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    start = time.monotonic()
    # The workers inherit stdout, so that its end is theirs.
    parent = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        timeout=30,
    )
    assert parent.returncode == -signal.SIGKILL and time.monotonic() - start < 30


def test_ogbench():
    ogbench = pytest.importorskip("ogbench")
    make_env = partial(
        ogbench.make_env_and_datasets,
        "antmaze-large-navigate-singletask-task1-v0",
        env_only=True,
        max_episode_steps=12,
    )

    def random_policy(observations, episodes, chunks):
        rngs = [np.random.default_rng((e, c)) for e, c in zip(episodes, chunks, strict=True)]
        return np.stack([rng.uniform(-1, 1, 5 * 8) for rng in rngs])

    seen = []
    for envs_per_worker in (1, 2):
        starts = []

        def watch(observations, episodes, chunks, starts=starts):
            starts += [
                (int(e), *map(float, o)) for o, e, c in zip(observations, episodes, chunks, strict=True) if c == 0
            ]
            return random_policy(observations, episodes, chunks)

        with Evaluator(make_env, 5, num_workers=1, envs_per_worker=envs_per_worker) as evaluator:
            result = evaluator.evaluate(watch, 3, seed=0)
        assert result["length"].tolist() == [12] * 3
        assert result["success_rate"] == 0 and result["return_mean"] == -12
        seen.append(set(starts))
    assert seen[0] == seen[1] and len({start[1:3] for start in seen[0]}) == 3
