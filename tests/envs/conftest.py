"""Small collected datasets, made once for all tests of this folder."""

import numpy as np
import pytest

from envs.collect import collect
from envs.npz import write_npz
from envs.ogbench.oracles import Collector
from envs.ogbench.specs import DATASET_SPECS, dataset_files, file_stem

SMALL = {
    "scene-play-v0": (3, 100),
    "cube-double-noisy-v0": (2, 40),
    "puzzle-3x3-play-v0": (2, 60),
    "pointmaze-medium-navigate-v0": (3, 60),
}


@pytest.fixture(scope="session")
def collected(tmp_path_factory):
    """Returns {dataset name: path of the training file}."""
    directory = tmp_path_factory.mktemp("collected")
    (scene, (episodes, steps)), *others = SMALL.items()
    paths = {scene: collect(scene, episodes=episodes, max_steps=steps, dataset_dir=directory, workers=2)}
    for name, (episodes, steps) in others:  # The same files without the start of more workers.
        collector = Collector(DATASET_SPECS[name], steps)
        train_path, val_path = dataset_files(directory, file_stem(DATASET_SPECS[name], episodes, 0, steps))
        for path, split, count in ((train_path, "train", episodes), (val_path, "val", 1)):
            rows = [collector.episode(0, split, index) for index in range(count)]
            write_npz(path, {key: np.concatenate([episode[key] for episode in rows]) for key in rows[0]})
        paths[name] = train_path
    return paths


@pytest.fixture
def raw_arrays(collected):
    """Returns a function that reads the raw arrays of a collected training file."""

    def read(name):
        with np.load(collected[name]) as file:
            return {key: file[key] for key in file.files}

    return read
