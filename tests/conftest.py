"""Small datasets and processes for the tests of the command line."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_runs

from utils.runs import ROOT


@pytest.fixture(scope="session")
def pointmaze(tmp_path_factory) -> Path:
    """A small dataset of the medium point maze."""
    from envs.collect import collect

    directory = tmp_path_factory.mktemp("pointmaze")
    return collect(tiny_runs.POINTMAZE, episodes=3, max_steps=60, dataset_dir=directory, workers=1)


@pytest.fixture
def write_data(pointmaze, tmp_path):
    """Returns a function that writes a copy of the dataset's first rows, with some arrays replaced."""

    def write(name: str = "data.npz", rows: int | None = None, **replaced: np.ndarray) -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        with np.load(pointmaze) as file:
            np.savez(path, **{key: replaced.get(key, file[key])[:rows] for key in file.files})
        return path

    return write


@pytest.fixture
def start(tmp_path, tmp_path_factory):
    """Returns a function that starts main.py as a process, stderr in a file. What still runs is ended afterwards."""
    processes = []
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.getbasetemp() / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
    }

    def popen(*flags: str) -> tuple[subprocess.Popen, Path]:
        log = tmp_path / f"stderr{len(processes)}.txt"
        with log.open("w") as file:
            command = [sys.executable, str(ROOT / "main.py"), *flags]
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file, env=os.environ | cache)
        processes.append(process)
        return process, log

    yield popen
    for process in processes:
        process.kill()
        process.wait()
