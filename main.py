"""Offline RL, then online.

For example: python main.py --agent=agents/otql.py --env_name=cube-double-play-singletask-task2-v0
"""

from collections.abc import Sequence

from utils.run.config import RunConfig
from utils.run.flags import parse_flags
from utils.run.train import train
from utils.system.entry_point import run_main


def main(argv: Sequence[str]) -> None:
    """Trains as the command line asks; resumes existing runs."""
    train(parse_flags(argv, RunConfig))


if __name__ == "__main__":
    run_main(main)
