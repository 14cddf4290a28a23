"""The former name of `python -m experiments.coupling_study`."""

from experiments.coupling_study import main
from utils.system.entry_point import run_main

if __name__ == "__main__":
    run_main(main)
