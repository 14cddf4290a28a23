"""Commands and data of the golden runs; see golden.py. In a command, {dir} and {save} stand for directories."""

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import fork_env
import numpy as np
import spot_env

MODULES = ("fork_env.py", "spot_env.py", "golden_env.py")

COMMANDS = (
    *(("main.py",), ("online_main.py",), ("-m", "envs.collect"), ("-m", "envs.panda.demonstrate")),
    *(("-m", f"experiments.{name}") for name in ("quickstart", "report", "sweep", "ablate")),
    *(("-m", f"experiments.{name}") for name in ("toy", "diagnose", "coupling", "bench")),
)
TINY = (
    *("--agent.batch_size=8", "--agent.actor_hidden_dims=16,16", "--agent.value_hidden_dims=16,16", "--agent.num_qs=2"),
    *("--agent.flow_steps=3", "--agent.lr=3e-3", "--log_interval=10", "--save_interval=20", "--eval_interval=30"),
    *("--eval_workers=1", "--eval_episodes=4", "--save_dir={save}"),
)
OFFLINE = ("--offline_steps=60",)
ONLINE = ("--offline_steps=30", "--online_steps=60", "--start_training=6", "--utd_ratio=2")
POST = ("--rollout_steps=20", "--online_steps=40", "--utd_ratio=2", "--base_steps=20", "--distill_steps=20")
# Their modules lie beside the data.
FORK = ("--env_name=gym:golden_env:DenseFork-v0", "--dataset={dir}/data/fork.npz", "--horizon_length=2")
SPOT = ("--env_name=gym:golden_env:DenseSpot-v0", "--dataset={dir}/data/spot.npz", "--horizon_length=2")
IMAGES = ("--agent.encoder=impala_tiny", "--balanced_sampling")
BASE = "{dir}/runs/%s/debug/gym_golden_env_DenseFork-v0/bc/sd0"
# Tasks with presets.
MAZE = ("--env_name=pointmaze-medium-navigate-singletask-task1-v0", "--horizon_length=5", "--max_episode_steps=50")
MAZE_DATA = "{dir}/runs/collect_maze/pointmaze-medium-navigate-v0-2ep.npz"
SHARDS = ("--ogbench_dataset_dir={dir}/data/shards", "--dataset_replace_interval=20", "--dataset_placement=host")
SCENE = ("--env_name=scene-play-singletask-task1-v0", "--dataset={dir}/runs/collect_scene/scene-play-v0-1ep.npz")
DOOR = ("--env_name=OpenMicrowave-v0", "--dataset={dir}/runs/demonstrate_door/OpenMicrowave-v0-2ep.npz")
SHORT = ("--max_episode_steps=20", "--eval_episodes=1")
# The case that is interrupted, and the step at which.
INTERRUPTED, INTERRUPT_AT = "online_otql", 40


def collect(module: str, env_name: str, episodes: int) -> tuple[str, ...]:
    """Returns a command that makes a dataset."""
    return "-m", module, f"--env_name={env_name}", f"--episodes={episodes}", "--workers=1", "--dataset_dir={save}"


def train(agent: str, *flags: str) -> tuple[str, ...]:
    """Returns a command that trains an agent."""
    return "main.py", f"--agent=agents/{agent}.py", *TINY, *flags


def post_train(agent: str, *flags: str) -> tuple[str, ...]:
    """Returns a command that post-trains an agent."""
    return "online_main.py", f"--agent=agents/{agent}.py", *TINY, *POST, *flags


def groups(agents: Iterable[str]) -> Iterator[dict[str, tuple[str, ...]]]:
    """Yields commands by name, in groups: those of one need the data and runs of the ones before."""
    yield {
        "collect_maze": collect("envs.collect", "pointmaze-medium-navigate-v0", 2),
        "collect_scene": collect("envs.collect", "scene-play-v0", 1),
        "demonstrate_door": collect("envs.panda.demonstrate", "OpenMicrowave-v0", 2),
    }
    lanes = ("--preset=cpu", "--vary=agent.lam=0.5,2", "--num_seeds=2")
    yield {f"offline_{agent}": train(agent, *FORK, *OFFLINE) for agent in agents} | {
        "values_and_seeds": train("otql", *MAZE, f"--dataset={MAZE_DATA}", *OFFLINE, *lanes),
        "shards_on_host": train("fql", *MAZE, *SHARDS, *OFFLINE),
        "scene_chunks": train("otql", *SCENE, *SHORT, *OFFLINE),  # The preset: chunks of five, sparse rewards.
        "images": train("otql", *SPOT, *IMAGES, *ONLINE),
        "online_otql": train("otql", *FORK, *ONLINE),
        "online_qam_seeds": train("qam", *FORK, *ONLINE, "--num_seeds=2"),
        "post_train_otql": post_train("otql", *FORK),
        "post_train_door": post_train("ewfm", *DOOR, *SHORT),
    }
    yield {
        "start_from_bc": train("otql", *FORK, *OFFLINE, f"--start_from={BASE % 'offline_bc'}"),
        "post_train_fql": post_train("fql", *FORK, f"--base_checkpoint={BASE % 'post_train_otql'}"),
        "post_train_qam": post_train("qam", *FORK, f"--base_checkpoint={BASE % 'offline_bc'}"),
    }


def write_data(data: Path) -> None:
    """Writes demonstrations in the tests' environments, and the modules of these beside them."""
    data.mkdir(parents=True)
    fork_env.write_demonstrations(data / "fork.npz")
    spot_env.write_demonstrations(data / "spot.npz", size=16, episodes=30)
    for name in MODULES:
        shutil.copy(Path(__file__).with_name(name), data)


def write_shards(collected: Path, shards: Path) -> None:
    """Cuts a collected dataset into three files."""
    shards.mkdir()
    with np.load(collected) as file:
        for number, rows in enumerate((slice(0, 400), slice(400, 1001), slice(1001, None))):
            np.savez(shards / f"{number}.npz", **{name: file[name][rows] for name in file.files})
