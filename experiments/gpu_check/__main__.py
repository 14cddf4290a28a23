"""Command line: python -m experiments.gpu_check."""

from experiments.gpu_check.command import main
from utils.system.entry_point import run_main

if __name__ == "__main__":
    run_main(main)
