"""Recording: the same episodes in a file and in Minari's store, by random and by scripted policies."""

import gymnasium
import numpy as np
import pytest
import spot_env  # registers Spot-v0
from tiny_runs import call, refused

import envs.record
from envs import record as module
from envs.datasets import load_dataset
from envs.record import record
from envs.tasks import make_env, parse_task

PENDULUM = ("--env_name=gym:Pendulum-v1", "--max_episode_steps=9")


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "store"))


def read(path, task="gym:Pendulum-v1"):
    return load_dataset(parse_task(task), dataset_path=path, actions="scaled")


def stopped(*flags):
    """The last line of a recording that stops, after those of its progress."""
    outcome = call(*flags, program=envs.record)
    *progress, line = outcome.err.splitlines()
    assert outcome.code == 2 and line.startswith("error: ") and all(p.startswith("recording: ") for p in progress)
    return line


def test_a_file_and_minaris_store_hold_the_same_episodes(tmp_path):
    pytest.importorskip("minari", reason="Minari is an optional dependency: pip install '.[minari]'")
    record("gym:Pendulum-v1", output=str(tmp_path / "a.npz"), episodes=4, seed=3, max_episode_steps=9)
    dataset, _, info = read(tmp_path / "a.npz")
    assert (info.card.episodes, info.card.transitions, info.card.ends["cut by a time limit"]) == (4, 36, 4)
    for data_format in ("hdf5", "arrow"):
        where = f"minari:pendulum/{data_format}-v0"
        record("gym:Pendulum-v1", output=where, episodes=4, seed=3, max_episode_steps=9, data_format=data_format)
        other = load_dataset(parse_task(where))[0]
        for name, array in dataset.items():
            np.testing.assert_allclose(other[name], array, rtol=1e-5, atol=1e-5, err_msg=name)


def test_the_seed_is_that_of_the_data(tmp_path):
    for name, seed in {"a": 1, "b": 1, "c": 2}.items():
        record("gym:Pendulum-v1", output=str(tmp_path / f"{name}.npz"), episodes=2, seed=seed, max_episode_steps=5)
    a, b, c = (read(tmp_path / f"{name}.npz")[0] for name in "abc")
    np.testing.assert_array_equal(a["actions"], b["actions"])
    np.testing.assert_array_equal(a["observations"], b["observations"])
    assert (a["actions"] != c["actions"]).any() and (a["observations"][0] != c["observations"][0]).any()
    assert (a["observations"][0] != a["observations"][6]).any()  # Episodes differ, too.


def test_scripted_policies(tmp_path):
    (tmp_path / "policy.py").write_text(
        "import numpy as np\n"
        "def act(observation): return np.array([2 * observation[0]])\n"
        "def noisy(observation, random): return np.array([random.uniform(1, 2)])\n"
    )
    record(
        "gym:Pendulum-v1", f"{tmp_path}/policy.py:act", output=str(tmp_path / "a.npz"), episodes=2, max_episode_steps=9
    )
    dataset = read(tmp_path / "a.npz")[0]
    followed = dataset["terminals"] == 0
    np.testing.assert_allclose(dataset["actions"][followed, 0], dataset["observations"][followed, 0], atol=1e-4)
    record(
        "gym:Pendulum-v1",
        f"{tmp_path}/policy.py:noisy",
        output=str(tmp_path / "b.npz"),
        episodes=2,
        max_episode_steps=9,
    )
    actions = read(tmp_path / "b.npz")[0]["actions"][followed]
    assert actions.min() >= 0.5 and len(np.unique(actions)) == 18


def test_images_are_recorded(tmp_path):
    record("gym:Spot-v0", output=str(tmp_path / "a.npz"), episodes=2)
    dataset, _, info = read(tmp_path / "a.npz", "gym:Spot-v0")
    assert dataset["images"].shape[1:] == (1, 64, 64, 3) and dataset["observations"].shape[1] == 2
    env = spot_env.Spot()
    env.reset(seed=int(np.random.SeedSequence([0, 0]).generate_state(2)[0]))
    np.testing.assert_array_equal(dataset["images"][0, 0], env.image)
    assert info.card.episodes == 2


def test_an_environment_that_is_registered_by_its_class(tmp_path):
    """Is stored by the name of the class, by which it is recovered; one without a name cannot be."""
    pytest.importorskip("minari", reason="Minari is an optional dependency: pip install '.[minari]'")
    record("gym:Spot-v0", output="minari:spot/test-v0", episodes=2)
    record("gym:Spot-v0", output=str(tmp_path / "a.npz"), episodes=2)
    dataset, same = load_dataset(parse_task("minari:spot/test-v0"))[0], read(tmp_path / "a.npz", "gym:Spot-v0")[0]
    np.testing.assert_array_equal(dataset["images"], same["images"])  # Without the loss of JPEG.
    np.testing.assert_allclose(dataset["actions"], same["actions"], atol=1e-6)
    observation, _ = make_env("minari:spot/test-v0").reset(seed=0)
    assert observation.images.shape == (1, 64, 64, 3)
    gymnasium.register("Nameless-v0", entry_point=lambda **_: spot_env.Spot())
    line = stopped("--env_name=gym:Nameless-v0", "--output=minari:spot/b-v0")
    assert "registered by a function without a name" in line


def test_the_command_says_what_comes_next(tmp_path):
    outcome = call(*PENDULUM, f"--output={tmp_path}/a.npz", "--episodes=2", program=envs.record)
    assert outcome.code == 0 and f"2 episodes are in {tmp_path}/a.npz" in outcome.out
    assert (
        f"python main.py --env_name=gym:Pendulum-v1 --dataset={tmp_path}/a.npz --dataset_actions=scaled" in outcome.out
    )
    assert f"python -m envs.inspect {tmp_path}/a.npz --env_name=gym:Pendulum-v1 --actions=scaled" in outcome.out


def test_an_episode_without_an_end(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LONGEST", 5)
    line = stopped("--env_name=gym:Pendulum-v1", f"--output={tmp_path}/a.npz")
    assert "has not ended after 5 steps; give --max_episode_steps" in line
    assert not (tmp_path / "a.npz").exists()


POLICIES = """
import numpy as np
def wide(observation): return np.ones(2)
def large(observation): return np.array([2.5])
def nothing(observation): return np.array([np.nan])
def fails(observation): return observation["state"]
number = 3
"""


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        ("best", "write random, or <file.py>:<function>"),
        ("policy.py", "write random, or <file.py>:<function>"),
        ("no_such.py:act", "there is no file"),
        ("policy.py:act", "has no function 'act'"),
        ("policy.py:number", "has no function 'number'"),
        ("policy.py:wide", "returned shape [2]; an action has shape [1]"),
        ("policy.py:large", "returned 2.5 in dimension 0, beyond [-2, 2]; clip it"),
        ("policy.py:nothing", "returned numbers that are not finite"),
        ("policy.py:fails", "policy.py, line 6"),
        ("broken.py:act", "policy file"),
    ],
)
def test_policies_that_do_not_fit(policy, said, tmp_path):
    (tmp_path / "policy.py").write_text(POLICIES)
    (tmp_path / "broken.py").write_text("1 / 0")
    policy = f"{tmp_path}/{policy}" if ":" in policy else policy
    line = stopped(*PENDULUM, f"--output={tmp_path}/a.npz", f"--policy={policy}")
    assert said in line and not (tmp_path / "a.npz").exists(), line


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--env_name=",), "--env_name is missing"),
        (("--output=",), "--output is missing"),
        (("--env_name=scene-play-singletask-v0",), "python -m envs.collect"),
        (("--env_name=gym:NoSuch-v0",), "cannot make the gymnasium environment 'NoSuch-v0'"),
        (("--env_name=gym:CartPole-v1",), "actions in Discrete(2)"),
        (("--output=data.csv",), "write <file>.npz, or minari:<id>"),
        (("--output=minari:door",), "does not name a dataset"),
        (("--episodes=0",), "--episodes=0: it must be at least 1"),
        (("--max_episode_steps=0",), "it must be at least 1"),
        (("--seed=-1",), "it must not be negative"),
        (("--agent.lr=1",), "a recording has no agent"),
        (("--data_format=zarr",), "hdf5|arrow"),
    ],
)
def test_command_lines_that_do_not_fit(flags, said, tmp_path):
    line = refused(*PENDULUM, f"--output={tmp_path}/a.npz", *flags, program=envs.record)
    assert said in line, line


def test_nothing_is_overwritten(tmp_path):
    pytest.importorskip("minari", reason="Minari is an optional dependency: pip install '.[minari]'")
    for output in (f"{tmp_path}/a.npz", "minari:pendulum/a-v0"):
        flags = (*PENDULUM, f"--output={output}", "--episodes=1")
        assert call(*flags, program=envs.record).code == 0
        assert "choose another name" in refused(*flags, program=envs.record)
    assert "actions in Discrete(2)" in refused(
        "--env_name=gym:CartPole-v1", "--output=minari:cart/a-v0", program=envs.record
    )
