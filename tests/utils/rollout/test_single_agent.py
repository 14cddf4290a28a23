"""A single agent in an environment: evaluations, a loop of one's own, and videos."""

import functools

import imageio.v3 as imageio
import jax
import numpy as np
import pytest
from counting_env import CountingEnv

from agents import bc
from utils.errors import UserError
from utils.observations import Observation
from utils.rollout import policy as policies
from utils.rollout import video
from utils.rollout.evaluate import evaluate, record_video
from utils.rollout.policy import ChunkPolicy
from utils.rollout.video import VideoUnavailable

HORIZON = 4


@pytest.fixture(scope="module")
def agent():
    """BC with chunks of four actions in two dimensions."""
    return make_agent(np.zeros((1, 4), np.float32))


def make_agent(observations):
    config = bc.get_config()
    config.update({"actor_hidden_dims": (8, 8), "horizon_length": HORIZON, "flow_steps": 2, "encoder": "impala_tiny"})
    example = {"observations": observations, "actions": np.zeros((1, 2 * HORIZON), np.float32)}
    return bc.Agent.create(jax.random.key(0), example, config)


def own_loop(policy, episodes):
    """Success, return and length of episodes, by a loop as in a notebook."""
    outcomes = []
    for _ in range(episodes):
        env, total, over, seed = CountingEnv(), 0.0, False, policy.reset()
        np.random.seed(seed)
        env.action_space.seed(seed)
        observation, _ = env.reset(seed=seed)
        while not over:
            action = policy.act(observation)
            assert action.shape == (2,) and np.abs(action).max() <= 1
            observation, reward, over, _, info = env.step(action)
            total += reward
        outcomes.append((info["success"], total, env.steps))
    return np.array(outcomes).T


@pytest.mark.check
@pytest.mark.parametrize("horizon", [None, 3])
def test_a_loop_of_ones_own_repeats_an_evaluation(agent, horizon):
    """Chunks are executed open loop, in whole or in part; noise belongs to seed, step, episode and chunk."""
    result = evaluate(agent, CountingEnv, 6, seed=3, step=2, num_workers=1, horizon=horizon, progress=False)
    success, returns, lengths = own_loop(ChunkPolicy(agent, seed=3, step=2, horizon=horizon), 6)
    np.testing.assert_array_equal(result["success"], success)
    np.testing.assert_array_equal(result["length"], lengths)
    np.testing.assert_allclose(result["return"], returns, rtol=1e-4)
    assert result["length"].max() > 2 * HORIZON
    for seed, step in ((4, 2), (3, 1)):
        assert not np.allclose(own_loop(ChunkPolicy(agent, seed=seed, step=step, horizon=horizon), 6)[1], returns)


def test_the_first_actions_of_a_chunk_are_executed(agent):
    whole, part = ChunkPolicy(agent), ChunkPolicy(agent, horizon=3)
    for _ in range(3):
        np.testing.assert_array_equal(part.act(np.full(4, 0.1)), whole.act(np.full(4, 0.1)))


def test_a_chunk_is_used_up_before_the_next_one(agent, monkeypatch):
    """The agent is asked once in HORIZON actions, and at the start of an episode."""
    asked, act = [], policies.act
    monkeypatch.setattr(policies, "act", lambda *a: asked.append([int(n[0]) for n in a[4:]]) or act(*a))
    policy = ChunkPolicy(agent)
    first = [policy.act(np.full(4, 0.1)) for _ in range(HORIZON + 1)]
    policy.reset()
    policy.act(np.full(4, 0.1))
    policy.reset(0)
    np.testing.assert_array_equal(policy.act(np.full(4, 0.1)), first[0])
    assert asked == [[0, 0], [0, 1], [1, 0], [0, 0]]


def test_images():
    seeing = make_agent(Observation(np.zeros((1, 3), np.float32), np.zeros((1, 1, 16, 16, 3), np.uint8)))
    chunks = []
    for shade in (0, 255):
        policy, observation = ChunkPolicy(seeing), Observation(np.zeros(3), np.full((1, 16, 16, 3), shade, np.uint8))
        chunks.append(np.stack([policy.act(observation) for _ in range(HORIZON)]))
    assert chunks[0].shape == (HORIZON, 2) and not np.array_equal(*chunks)


def test_what_cannot_be_evaluated(agent):
    """Each ends in a line."""
    env = functools.partial(CountingEnv, fault="raise")
    quiet = functools.partial(evaluate, agent, num_workers=1, progress=False)
    with pytest.raises(UserError, match=r"^the evaluation failed: the environment, step 3 .*: .*the gripper fell off"):
        quiet(env, 6)
    with pytest.raises(UserError, match="episodes=0: it must be at least 1"):
        quiet(CountingEnv, 0)
    with pytest.raises(UserError, match="horizon=5: the agent's chunks have 4 actions; give 1 to 4"):
        quiet(CountingEnv, 1, horizon=5)
    for unknown in (lambda: CountingEnv(), functools.partial(in_a_notebook())):
        with pytest.raises(UserError, match=r"worker processes cannot import make_env; use functools.partial"):
            quiet(unknown, 1)
    with pytest.raises(UserError, match="observations have 3 numbers, the agent takes 4"):
        ChunkPolicy(agent).act(np.zeros(3))
    broken = agent.replace(targets=jax.tree.map(lambda x: x * np.nan, agent.targets))
    with pytest.raises(UserError, match=r"the policy's actions are not finite: .*; take an earlier checkpoint"):
        evaluate(broken, CountingEnv, 1, num_workers=1, progress=False)
    with pytest.raises(FloatingPointError):
        ChunkPolicy(broken).act(np.zeros(4))


def in_a_notebook():
    """A function that says it is of the main program."""

    def make():
        return CountingEnv()

    make.__module__, make.__qualname__ = "__main__", "make"
    return make


def test_check_ends_an_evaluation(agent):
    def check():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(agent, CountingEnv, 1, num_workers=1, progress=False, check=check)


def test_a_bar_counts_episodes(agent, capsys):
    evaluate(agent, CountingEnv, 3, num_workers=1)
    assert "evaluation: 3/3" in capsys.readouterr().err


def test_a_video_is_of_the_evaluations_episodes(agent, tmp_path, monkeypatch):
    """In all formats that are asked for."""
    monkeypatch.setattr(video, "rendering_backend", lambda: "off")
    paths = [tmp_path / f"episodes.{kind}" for kind in ("mp4", "gif", "webp")]
    result = record_video(agent, CountingEnv, paths, 2, seed=3, step=2)
    expected = evaluate(agent, CountingEnv, 2, seed=3, step=2, num_workers=1, progress=False)
    np.testing.assert_array_equal(result["length"], expected["length"])
    np.testing.assert_allclose(result["return"], expected["return"], rtol=1e-4)
    for path in paths:
        assert imageio.imread(path, index=0).shape[:2] == (34, 84)
    with pytest.raises(UserError, match="episodes=0"):
        record_video(agent, CountingEnv, paths, 0)
    with pytest.raises(VideoUnavailable, match="unexpected keyword argument 'width'"):
        record_video(agent, CountingEnv, tmp_path / "large.mp4", size=64)
    assert not (tmp_path / "large.mp4").exists()
