"""Command line: python -m experiments.toy."""

from experiments.toy.command import main
from utils.system.entry_point import run_main

if __name__ == "__main__":
    run_main(main)
