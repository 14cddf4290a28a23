"""Quickstart: OTQL and the BC flow on one OGBench task at laptop scale.

    make quickstart

Collects play data with OGBench's oracles (no download), trains both agents, prints their success rates, and says what
to look at and what to run next. BC gets as many updates as OTQL; more do not help it (docs/results/laptop.md). Rerun
the same command to resume after an interruption.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from envs.ogbench.specs import DEFAULT_DATASET_DIR
from experiments.report.published import NAMES
from utils.output.intervals import wilson_interval
from utils.output.loggers import read_csv
from utils.output.plotting import learning_curve
from utils.run.config import RunConfig
from utils.run.train import train
from utils.system.cli import parse
from utils.system.entry_point import run_main

FLAGS = flags.FlagValues()
flags.DEFINE_string("env_name", "scene-play-singletask-task1-v0", "OGBench task.", flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "First seed of both agents.", lower_bound=0, flag_values=FLAGS)
flags.DEFINE_integer("num_seeds", 1, "Number of seeds of both agents.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("offline_steps", 6_000, "Updates per agent.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("dataset_episodes", 80, "Episodes of play to collect.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_string("dataset_dir", DEFAULT_DATASET_DIR, "Directory of datasets.", flag_values=FLAGS)
flags.DEFINE_string("save_dir", "exp", "Directory of runs.", flag_values=FLAGS)

AGENTS = {"otql": 1, "bc": 0}  # Agent → episodes in its video.


def main(argv: Sequence[str]) -> None:
    """Trains one agent after the other and prints the comparison."""
    parse(argv, FLAGS)
    group = Path(FLAGS.save_dir) / "quickstart" / FLAGS.env_name
    for agent, videos in AGENTS.items():
        config = RunConfig(
            agent=f"agents/{agent}.py",
            env_name=FLAGS.env_name,
            preset="cpu",
            seed=FLAGS.seed,
            num_seeds=FLAGS.num_seeds,
            offline_steps=FLAGS.offline_steps,
            log_interval=500,
            eval_interval=-(-FLAGS.offline_steps // 3),
            save_interval=2000,
            dataset_source="collect",
            dataset_episodes=FLAGS.dataset_episodes,
            dataset_dir=FLAGS.dataset_dir,
            save_dir=FLAGS.save_dir,
            run_group="quickstart",
            video_episodes=videos,
        )
        print("python main.py", " ".join(config.flag_list()), flush=True)
        train(config)
    print(f"\n{FLAGS.env_name}, {FLAGS.offline_steps} updates, success rate of the final policy over 50 episodes")
    directories = {}
    for agent in AGENTS:
        for seed in range(FLAGS.seed, FLAGS.seed + FLAGS.num_seeds):
            directories[f"{NAMES[agent]} seed {seed}"] = directory = group / agent / f"sd{seed}"
            final = read_csv(directory / "eval.csv")
            rate, episodes = final["success_rate"][-1], final["episodes"][-1]
            low, high = wilson_interval(rate, episodes)
            print(f"  {NAMES[agent]:5s} seed {seed}: {rate:.2f}  (95 % interval {low:.2f} to {high:.2f})")
    learning_curve(list(directories.values()), group / "learning_curve.png", list(directories), FLAGS.env_name)
    print(f"curves: {group / 'learning_curve.png'}")
    for video in sorted(group.glob("otql/*/videos/*.mp4")):
        print(f"video: {video}")
    first = group / "otql" / f"sd{FLAGS.seed}"
    print("next:")
    print(f"  python -m experiments.evaluate {first} --nfe=1,2,3,10    # the same policy in more and fewer Euler steps")
    print(f"  python -m experiments.evaluate {first} --video_grid=9    # a video of nine episodes")
    print(f"  python main.py --agent=agents/fql.py --env_name={FLAGS.env_name} --preset=cpu    # another agent")


if __name__ == "__main__":
    run_main(main)
