"""Files that are no .npz, and arrays by other names: one line says what they are and what to do."""

import gzip
import io
import json
import os
import pickle
import zipfile

import numpy as np
import pytest

from envs.datasets import check_horizon, load_dataset
from envs.gym_dataset import read_gym_dataset
from envs.npz import read_npz
from envs.tasks import parse_task
from utils.errors import UserError

pytestmark = pytest.mark.check

ARRAYS = {"observations": np.zeros((4, 3)), "actions": np.zeros((4, 1)), "terminals": np.array([0, 0, 0, 1])}
HDF5 = b"\x89HDF\r\n\x1a\n" + bytes(600)
PARQUET = b"PAR1" + bytes(80) + b"PAR1"


def archive(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in files.items():
            file.writestr(name.replace("__", "/").replace("_dot_", "."), content)
    return buffer.getvalue()


def saved(array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def refusal(path) -> str:
    with pytest.raises(UserError) as refused:
        read_npz(path, (*ARRAYS, "rewards"))
    line = str(refused.value)
    assert str(path) in line and "\n" not in line and "delete" not in line
    return line


@pytest.mark.parametrize(
    ("names", "content", "said"),
    [
        (("a.hdf5", "a.h5", "a.npz", "a"), HDF5, ("it is HDF5;", "h5py", "np.savez('data.npz', observations=...")),
        (("main_data.hdf5",), HDF5, ("a Minari dataset (HDF5)", "--env_name=minari:<id>")),
        (("a.h5", "a.HDF5"), b"\x00\x01 cut short", ("HDF5 by name, and damaged",)),
        (("a.pkl", "a.npz", "a"), pickle.dumps(ARRAYS), ("it is a pickle;", "np.savez")),
        (("a.pkl",), pickle.dumps(ARRAYS, protocol=0), ("a pickle by name",)),
        (("a.pt", "a.npz"), archive(archive__data_dot_pkl=b"", archive__data__0=b"00"), ("torch.save", "torch.load")),
        (("a.pt", "a.pth"), b"\x00legacy", ("a pickle by name", "np.savez")),
        (("a.parquet", "a.npz"), PARQUET, ("it is parquet", "pandas.read_parquet")),
        (("a.csv",), b"o1,o2,reward\n0,1,2\n", ("a table of text", "np.genfromtxt")),
        (("a.npz", "a.txt"), b"o1,o2,reward\n0,1,2\n", ("a table of text",)),
        (("a.json", "a.npz"), json.dumps({"observations": [[0.0] * 2000]}).encode(), ("it is JSON", "json.load")),
        (("a.jsonl",), b'{"obs": 1}\n{"obs": 2}\n', ("lines of JSON",)),
        (("a.npy", "a.npz"), saved(np.zeros(3)), ("np.save;", "np.savez")),
        (("a.npy",), saved(np.array(ARRAYS, object)), ("pickled object", "allow_pickle=True")),
        (("a.zip", "a.npz"), archive(readme_dot_txt=b"hello"), ("a zip archive without arrays (readme.txt)",)),
        (("a.zip",), archive(data__train_dot_npz=b""), ("unpack it, and give data/train.npz",)),
        (("a.npz.gz", "a.npz"), gzip.compress(b"data", mtime=0), ("a gzip archive; unpack it",)),
        (("a.npz",), b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", ("Git LFS", "git lfs pull")),
        (("a.npz", "a"), b"<!DOCTYPE html>\n<html>", ("a web page", "direct address")),
        (("a.npz", "a.dat"), "größer".encode(), ("it is text", "np.savez")),
        (("a.npz", "a.h5", "a"), b"", ("it is empty; get it again",)),
        (("a.npz",), b"PK\x03\x04" + bytes(50), ("is damaged or no .npz file", "get it again, or name another")),
    ],
)
def test_other_kinds(names, content, said, tmp_path):
    for name in names:
        (tmp_path / name).write_bytes(content)
        line = refusal(tmp_path / name)
        assert all(part in line for part in said), line
        if name.endswith(".npz"):
            assert "is damaged or no .npz file" in line


def test_folders_and_pipes(tmp_path):
    for place, said in {
        "minari/data/main_data.hdf5": "it is a Minari dataset; put it into Minari's local store",
        "lerobot/meta/info.json": "it is a LeRobotDataset; import it: python -m real.import_rollouts",
        "shards/a.npz": "name one of its .npz files (shards of one dataset: --ogbench_dataset_dir)",
        "other/a.txt": "it is a folder; name an .npz file",
    }.items():
        (tmp_path / place).parent.mkdir(parents=True)
        (tmp_path / place).write_bytes(b"")
        assert said in refusal(tmp_path / place.split("/")[0])
    os.mkfifo(tmp_path / "pipe")
    assert "a device or pipe; name a file" in refusal(tmp_path / "pipe")


def test_whole_files_are_no_other_kind(tmp_path):
    """Whatever their names are."""
    for name in ("a.npz", "a.h5", "a.csv", "a"):
        with (tmp_path / name).open("wb") as file:
            np.savez(file, **ARRAYS)
        assert read_npz(tmp_path / name, tuple(ARRAYS)).keys() == ARRAYS.keys()


def test_pickled_arrays_and_unnamed_ones(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, **ARRAYS, rewards=np.array([0.0, None, 1.0, 2.0], object))
    assert "'rewards' in" in (line := refusal(path)) and "holds Python objects" in line and "astype" in line
    np.savez(path, ARRAYS)
    line = refusal(path)
    assert (
        "lacks the array 'observations'" in line
        and "it has arr_0" in line
        and "np.savez(path, observations=...)" in line
    )


def test_minaris_names(tmp_path, capsys):
    """Are read as ours, and that is said; ours win, and are not spoken of."""
    arrays, path = ARRAYS | {"rewards": np.arange(4.0)}, tmp_path / "a.npz"
    cut = np.array([0, 1, 0, 0])
    np.savez(path, **arrays, timeouts=cut)
    expected = read_gym_dataset(path)
    assert capsys.readouterr().err == ""
    other = {name: array for name, array in arrays.items() if name != "terminals"}
    np.savez(path, **other, terminations=arrays["terminals"] > 0, truncations=cut > 0)
    found = read_gym_dataset(path)
    said = "'terminations' is read as 'terminals', 'truncations' is read as 'timeouts'"
    assert capsys.readouterr().err == f"{path}: {said}.\n"
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)
    np.savez(path, **arrays, timeouts=cut, terminations=np.ones(4), truncations=np.ones(4))
    np.testing.assert_array_equal(read_gym_dataset(path)["terminals"], expected["terminals"])
    assert capsys.readouterr().err == ""


def test_episodes_of_one_row(tmp_path):
    """Have no state after theirs, so no horizon is short enough; with next observations they have."""
    arrays = {"observations": np.zeros((1, 3)), "actions": np.zeros((1, 1)), "rewards": np.ones(1), "terminals": [0]}
    path = tmp_path / "a.npz"
    np.savez(path, **arrays, timeouts=[1])
    task = parse_task("robot:it")
    with pytest.raises(UserError, match=r"no transition: each episode is a single row.*give next_observations"):
        check_horizon(load_dataset(task, dataset_path=path)[0], 1)
    np.savez(path, **arrays, next_observations=np.ones((1, 3)))
    dataset = load_dataset(task, dataset_path=path)[0]
    check_horizon(dataset, 1)
    with pytest.raises(UserError, match="use a smaller --horizon_length"):
        check_horizon(dataset, 2)
