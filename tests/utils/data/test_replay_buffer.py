"""The replay buffer against plain lists of what happened, and the way back into an episode after a kill."""

import gymnasium
import jax
import numpy as np
import pytest
from counting_env import CountingEnv
from recorder_agent import Recorder

from envs.wrappers import SeededReset
from utils.data.batches import assemble, gather, prepare
from utils.data.replay_buffer import ReplayBuffer
from utils.errors import UserError
from utils.observations import Observation
from utils.rollout.env_runner import EnvRunner
from utils.rollout.worker_pool import Slot
from utils.run.update_loop import UpdateLoop
from utils.trees import tree_slice, tree_stack

HORIZON = 3
STATE = np.zeros(4, np.float32)


class Logged(gymnasium.Wrapper):
    """Keeps every transition of every episode."""

    def __init__(self, env):
        super().__init__(env)
        self.episodes = []

    def reset(self, **kwargs):
        observation, info = self.env.reset(**kwargs)
        self.episodes.append([np.float32(observation)])
        return observation, info

    def step(self, action):
        outcome = self.env.step(action)
        self.episodes[-1].append((np.float32(action), outcome[1], outcome[2], np.float32(outcome[0])))
        return outcome


class Pictured(gymnasium.ObservationWrapper):
    """With two images that show the state."""

    def observation(self, observation):
        images = (np.zeros((2, 4, 5, 3)) + 50 * np.asarray(observation)[:, None, None] % 256).astype(np.uint8)
        return Observation(np.float32(observation[:1]), images)


class Alone:
    """A runner and its environment in this process, as one object."""

    def __init__(self, env, *arguments, **options):
        self._slot = Slot(env)
        self.runner = EnvRunner(*arguments, **options)
        self.runner = self._run(self.runner.begin()).commit()

    def _run(self, dialogue):
        reply = None
        while True:
            try:
                method, arguments = dialogue.send(reply)
            except StopIteration as end:
                return end.value
            reply = getattr(self._slot, method)(*arguments)

    def act(self, steps, policy):
        new, ended = self._run(self.runner.act(steps, policy))
        self.runner = new.commit()
        return ended

    def restore(self, state):
        new, same = self._run(self.runner.restore(state))
        self.runner = new.commit()
        return same

    def seed_by(self, seed_of):
        self.runner._seed_of = seed_of

    def __getattr__(self, name):
        return getattr(self.runner, name)


def policy(observation, episode, step):
    """A chunk that shows when it was asked for."""
    rng = np.random.default_rng((episode, step))
    return rng.uniform(-1, 1, (HORIZON, 2)).astype(np.float32)


def explore(ticks, env=None, max_steps=400, seed=0):
    """A runner that has taken `ticks` (a list of numbers of steps), its environment and its buffer."""
    replay, env = ReplayBuffer(1, max_steps, HORIZON, STATE, 2), Logged(SeededReset(env or CountingEnv()))
    runner = Alone(env, replay, 0, lambda episode: 1000 * seed + episode)
    ended = [outcome for steps in ticks for outcome in runner.act(steps, policy)]
    return runner, env, replay, ended


def expected_windows(episodes, discount):
    """Every whole window, and every one that a true termination ends, as dicts, from the log alone."""
    windows = []
    for episode in episodes:
        states = [episode[0], *[step[3] for step in episode[1:]]]
        for t in range(len(episode) - 1):
            steps = episode[1 + t : 1 + t + HORIZON]
            done = [step[2] for step in steps]
            if len(steps) < HORIZON and not any(done):
                continue
            actions = [step[0] for step in steps]
            windows.append(
                {
                    "observations": states[t],
                    "actions": np.concatenate(actions + [actions[-1]] * (HORIZON - len(steps))),
                    "rewards": sum(discount**i * step[1] for i, step in enumerate(steps)),
                    "masks": 1.0 - any(done),
                    "executed": len(steps),
                    "next": states[t + HORIZON] if len(steps) == HORIZON else None,
                }
            )
    return windows


@pytest.mark.parametrize(
    "ticks", [[3] * 40, [1] * 90, pytest.param([5, 2, 7, 1, 3] * 9, marks=pytest.mark.check), [100]]
)
def test_windows_are_what_happened(ticks):
    """Windows from the buffer equal those of the log: none crosses a reset, none is missing, whatever the ticks."""
    runner, env, replay, _ = explore(ticks)
    own, count = tree_slice(replay.arrays, 0), int(replay.counts[0])
    batch = assemble(gather(own, own["starts"][:count], HORIZON), 0.9, "pad")
    expected = expected_windows(env.episodes, 0.9)
    assert len(env.episodes) > 2 and any(w["executed"] < HORIZON for w in expected)
    assert count == len(expected) and np.all(np.asarray(batch["valid"]) == 1)
    for i, window in enumerate(expected):
        for name in ("observations", "actions", "rewards", "masks"):
            np.testing.assert_allclose(batch[name][i], window[name], rtol=1e-5, atol=1e-6, err_msg=name)
        assert np.sum(batch["action_mask"][i]) == 2 * window["executed"]
        if window["next"] is not None:
            np.testing.assert_array_equal(batch["next_observations"][i], window["next"])
    assert runner.transitions == sum(ticks) == sum(len(episode) - 1 for episode in env.episodes)


def test_images_are_stored_beside_their_states():
    """As uint8, one a state, for s and s' alike; and a restored run finds its way back by them."""
    env = Pictured(CountingEnv())
    replay = ReplayBuffer(1, 100, HORIZON, env.observation(STATE), 2)
    runner = Alone(SeededReset(env), replay, 0, lambda episode: episode)
    runner.act(50, policy)
    assert replay.arrays["images"].dtype == np.uint8
    own, count = tree_slice(replay.arrays, 0), int(replay.counts[0])
    batch = assemble(gather(own, own["starts"][:count], HORIZON), 0.9, "drop")
    for name in ("observations", "next_observations"):
        seen = batch[name]
        whole = np.asarray(batch["valid"]) > 0
        steps = np.asarray(seen.state)[whole, 0]
        np.testing.assert_array_equal(np.asarray(seen.images)[whole, 0, 0, 0, 0], 50 * steps % 256)
    state = jax.device_get(runner.state())
    other = Alone(SeededReset(Pictured(CountingEnv())), ReplayBuffer(1, 100, HORIZON, runner.observation, 2), 0, int)
    assert other.restore(state)
    state["rows"]["images"] = 255 - state["rows"]["images"]
    assert not other.restore(state)


def test_too_little_memory(monkeypatch):
    monkeypatch.setattr("utils.data.replay_buffer.free_memory", lambda: 10_000_000)
    images = Observation(np.zeros(2, np.float32), np.zeros((1, 64, 64, 3), np.uint8))
    ReplayBuffer(1, 300, HORIZON, images, 2)
    with pytest.raises(UserError, match="fewer --online_steps"):
        ReplayBuffer(1, 500, HORIZON, images, 2)


def test_ticks_change_nothing():
    """The rows are a function of the steps taken, not of how they were divided."""
    one, many = explore([90])[2], explore([4, 5] * 10)[2]
    assert one.counts == many.counts
    count = int(one.counts[0])
    for name in one.arrays:
        np.testing.assert_array_equal(one.arrays[name][0, :count], many.arrays[name][0, :count], err_msg=name)


def test_chunks_are_open_loop():
    """The policy is asked at an episode's start and whenever a chunk is used up, and for nothing else."""
    asked = []
    replay, env = ReplayBuffer(1, 100, HORIZON, STATE, 2), Logged(CountingEnv())
    runner = Alone(env, replay, 0, lambda episode: episode)
    runner.act(60, lambda *a: (asked.append(a[1:]), policy(*a))[1])
    due = [(i, t) for i, e in enumerate(env.episodes) for t in range(0, max(len(e) - 1, 1), HORIZON) if len(e) > 1]
    assert asked == due


@pytest.mark.check
@pytest.mark.parametrize("steps", [1, 7, 23, 60])
def test_restore_finds_the_way_back(steps):
    """A run that is restored in the middle of an episode continues as if nothing had happened."""
    runner, _, replay, _ = explore([steps])
    state = jax.device_get(runner.state())
    runner.act(50, policy)
    other, _, other_replay, _ = explore([3], seed=7)
    other.seed_by(lambda episode: episode)
    assert other.restore(state)
    other.act(50, policy)
    assert (other.row, other.transitions, other.episode) == (runner.row, runner.transitions, runner.episode)
    assert np.array_equal(other_replay.counts, replay.counts)
    for name in replay.arrays:
        used = slice(0, runner.transitions if name == "starts" else runner.row + 1)
        np.testing.assert_array_equal(replay.arrays[name][0, used], other_replay.arrays[name][0, used], err_msg=name)


@pytest.mark.parametrize("longer", [False, True])
def test_an_environment_that_cannot_come_back(longer):
    """It ends before, or is in another state: the episode is cut as by a time limit and a new one begins.

    No transition is lost, none doubled.
    """
    runner, _, _, _ = explore([30])
    state = jax.device_get(runner.state())
    other, env, replay, _ = explore([3])
    taken, lengths = state["row"] - state["first_row"], {}
    for seed in range(555, 655):
        env.unwrapped.reset(seed=seed)
        lengths[seed] = env.unwrapped.length
    wrong = next(seed for seed, length in lengths.items() if (length > taken) == longer)
    other.seed_by(lambda episode: wrong + episode - state["episode"])
    transitions = state["transitions"]
    assert not other.restore(state)
    assert other.transitions == transitions and other.episode == state["episode"] + 1
    assert replay.counts[0] == transitions
    own = tree_slice(replay.arrays, 0)
    batch = assemble(gather(own, own["starts"][:transitions], HORIZON), 0.9, "pad")
    crossing = np.asarray(own["starts"][:transitions]) + HORIZON > state["row"]
    crossing &= np.asarray(own["starts"][:transitions]) >= state["first_row"]
    assert crossing.any() and np.all(np.asarray(batch["valid"])[crossing] == 0)


def test_sparse_rewards():
    """−1 for each reward that is not 0."""
    replay = ReplayBuffer(1, 50, HORIZON, STATE, 2)
    Alone(CountingEnv(), replay, 0, lambda episode: episode, sparse=True).act(20, policy)
    assert set(np.unique(np.asarray(replay.arrays["rewards"][0, :20]))) <= {-1.0, 0.0}


def offline_data():
    """Episodes whose observations are negative, so that they can be told from those of the environment."""
    size = 60
    arrays = {"observations": -np.ones((size, 4)), "actions": np.zeros((size, 2)), "rewards": np.zeros(size)}
    arrays |= {"masks": np.ones(size), "terminals": np.tile(np.arange(20) == 19, 3)}
    return prepare({k: v.astype(np.float32) for k, v in arrays.items()}, False)


class Wide(Recorder):
    """A recorder of this file's widths."""

    @classmethod
    def create(cls, discount, updates):
        agent = Recorder.create(discount, updates)
        widths = {"observations": 4, "actions": 6, "next_observations": 4, "action_mask": 6}
        batches = agent.batches | {k: np.zeros((updates, 32, n), np.float32) for k, n in widths.items()}
        config = type(agent.config)({"batch_size": 32, "horizon_length": HORIZON, "window_rule": "pad"})
        return cls(batches, agent.step, agent.hyper, config)


@pytest.mark.parametrize("balanced", [True, False])
def test_shares_of_experience_in_a_batch(balanced):
    """Balanced: half from each. Else: by their numbers. Each run meets its own experience only."""
    replay = ReplayBuffer(2, 100, HORIZON, STATE, 2)
    for index, steps in enumerate((90, 30)):
        Alone(CountingEnv(), replay, index, lambda episode, i=index: 50 * i + episode).act(steps, policy)
    data, updates = offline_data(), 40
    trainer = UpdateLoop(jax.random.split(jax.random.PRNGKey(0), 2))
    trainer.set_data(data)
    agents, _ = trainer.run_online(tree_stack([Wide.create(0.9, updates)] * 2), replay, updates, balanced)
    for index in range(2):
        seen = np.asarray(tree_slice(agents, index).batches["observations"])
        share = np.mean(seen[..., 0] >= 0)
        count, offline = int(replay.counts[index]), len(data["starts"])
        expected = 0.5 if balanced else count / (count + offline)
        assert abs(share - expected) < (1e-9 if balanced else 0.05)
        own = np.asarray(replay.arrays["observations"][index])[np.asarray(replay.arrays["starts"][index, :count])]
        met = {tuple(row) for row in seen[seen[..., 0] >= 0]}
        assert met <= {tuple(row) for row in own} and len(met) > 0.9 * len({tuple(row) for row in own})
