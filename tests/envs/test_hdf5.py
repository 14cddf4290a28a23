"""HDF5 files in D4RL's layout are read as .npz files of the same arrays are."""

import numpy as np
import pytest

from envs.datasets import load_dataset
from envs.hdf5 import is_hdf5, read_hdf5
from envs.tasks import parse_task
from utils.errors import UserError

h5py = pytest.importorskip("h5py", reason="h5py is an optional dependency: pip install '.[minari]'")
TASK = parse_task("gym:Pendulum-v1")


def rows(count=40):
    random = np.random.default_rng(0)
    return {
        "observations": random.normal(size=(count, 3)).astype(np.float32),
        "actions": random.uniform(-1, 1, (count, 1)).astype(np.float32),
        "rewards": random.normal(size=count).astype(np.float32),
        "terminals": np.arange(count) % 10 == 9,
        "timeouts": np.arange(count) % 20 == 14,
    }


def write(path, arrays):
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = array
        file["infos/qpos"] = np.zeros((len(next(iter(arrays.values()))), 2))
        file["metadata/algorithm"] = "SAC"
    return path


@pytest.mark.parametrize("name", ["hopper.hdf5", "hopper.npz", "hopper"])
def test_hdf5_equals_npz(name, tmp_path):
    """Whatever its name is; terminations and time limits are D4RL's."""
    arrays = rows()
    np.savez(tmp_path / "same.npz", **arrays)
    expected, _, info = load_dataset(TASK, dataset_path=tmp_path / "same.npz", actions="scaled")
    found, _, other = load_dataset(TASK, dataset_path=write(tmp_path / name, arrays), actions="scaled")
    assert expected.keys() == found.keys()
    for key, array in expected.items():
        np.testing.assert_array_equal(found[key], array)
    assert info.card.ends == other.card.ends and info.card.ends["truly terminated"] == 4


def test_minaris_names(tmp_path, capsys):
    arrays = rows()
    names = {"terminals": "terminations", "timeouts": "truncations"}
    path = write(tmp_path / "a.h5", {names.get(name, name): array for name, array in arrays.items()})
    found = read_hdf5(path, ("terminals",), ("timeouts",))
    np.testing.assert_array_equal(found["terminals"], arrays["terminals"])
    np.testing.assert_array_equal(found["timeouts"], arrays["timeouts"])
    assert "'terminations' is read as 'terminals'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rewards": None}, "lacks the array 'rewards'"),
        ({"rewards": np.full(40, np.nan)}, "NaN or infinite"),
        ({"rewards": np.array([b"high"] * 40)}, "not numbers"),
        ({"actions": np.zeros((39, 1))}, "differ in length"),
        ({"observations": np.zeros((40, 5))}, "the environment needs [N, 3]"),
        ({"terminals": np.full(40, 2)}, "one 0 or 1 per row"),
    ],
)
def test_invalid_files(change, said, tmp_path):
    arrays = {name: array for name, array in (rows() | change).items() if array is not None}
    with pytest.raises(UserError) as error:
        load_dataset(TASK, dataset_path=write(tmp_path / "a.hdf5", arrays), actions="scaled")
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_cut_short(tmp_path):
    path = write(tmp_path / "a.hdf5", rows())
    path.write_bytes(path.read_bytes()[:2000])
    assert is_hdf5(path)
    with pytest.raises(UserError, match="is damaged"):
        read_hdf5(path, ("actions",))
    assert not is_hdf5(tmp_path / "none") and not is_hdf5(tmp_path)


def test_minaris_own_files_are_no_such_files(tmp_path):
    path = write(tmp_path / "main_data.hdf5", rows())
    with pytest.raises(UserError, match="give --env_name=minari:<id>"):
        load_dataset(TASK, dataset_path=path)
