import errno
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from utils.errors import UserError
from utils.run import checkpoints
from utils.run.checkpoints import CorruptCheckpoint
from utils.system import files

STATE = {
    "agent": {"w": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4), "rng": np.uint32([1, 2**32 - 1])},
    "step": 7,
}


def bits(tree):
    """Nested dict with leaves (type, dtype, shape, bytes): equal only if dtypes and bits are."""
    if isinstance(tree, dict):
        return {key: bits(value) for key, value in tree.items()}
    return (type(tree), np.asarray(tree).dtype.str, np.shape(tree), np.asarray(tree).tobytes())


def damage(path: Path, rng: np.random.Generator) -> None:
    """Truncates the file or flips one of its bits."""
    data = bytearray(path.read_bytes())
    if rng.random() < 0.5:
        data = data[: rng.integers(len(data))]
    else:
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    path.write_bytes(data)


@pytest.mark.check
def test_round_trip_keeps_types_dtypes_and_bits(tmp_path):
    dtypes = ["f2", "f4", "f8", ">f4", "i1", "i8", "u4", "u8", "?", "c8", "U3", "M8[s]"]
    state = {
        "dtypes": {dtype: np.arange(6).astype(dtype).reshape(2, 3) for dtype in dtypes},
        "nan": np.array([np.nan, -0.0, np.inf, 5e-324]),
        "payload_nan": np.array([0x7FF8DEADBEEF0001], np.uint64).view(np.float64),
        "empty": np.zeros((0, 4), np.float32),
        "scalar_array": np.array(3, np.uint32),
        "transposed": np.arange(6, dtype=np.int16).reshape(2, 3).T,
        "python": {"int": -(2**62), "float": 0.1, "str": "α = 1", "bool": True, "none": {}},
        "numpy_scalar": np.float32(0.1),
    }
    loaded = checkpoints.load(checkpoints.save(tmp_path, 0, state))
    assert bits(loaded) == bits(state)
    loaded["nan"][0] = 1  # arrays are the caller's own


def test_round_trip_of_jax_arrays(tmp_path):
    state = {"a": jnp.arange(3, dtype=jnp.bfloat16), "key": jax.random.PRNGKey(1)}
    assert bits(checkpoints.load(checkpoints.save(tmp_path, 0, state))) == bits(jax.tree.map(np.asarray, state))


@pytest.mark.parametrize("leaf", [[1], np.array([None]), np.zeros(1, "i4,f4"), object(), jax.random.key(0)])
def test_other_leaves_are_refused_and_nothing_is_written(tmp_path, leaf):
    with pytest.raises(TypeError):
        checkpoints.save(tmp_path, 0, {"leaf": leaf})
    assert not list(tmp_path.iterdir())


@pytest.mark.check
def test_any_damage_is_detected(tmp_path):
    rng = np.random.default_rng(0)
    path = checkpoints.save(tmp_path, 1, STATE)
    whole = path.read_bytes()
    for length in range(0, len(whole), 3):
        path.write_bytes(whole[:length])
        with pytest.raises(CorruptCheckpoint):
            checkpoints.load(path)
    for position in range(len(whole)):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << rng.integers(8)
        path.write_bytes(flipped)
        with pytest.raises(CorruptCheckpoint):
            checkpoints.load(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(CorruptCheckpoint):
        checkpoints.load(path)
    path.write_bytes(whole)
    assert bits(checkpoints.load(path)) == bits(STATE)


def test_newer_format_version_says_so(tmp_path):
    path = checkpoints.save(tmp_path, 1, STATE)
    path.write_bytes(path.read_bytes().replace(b"CHECKPOINT 0001", b"CHECKPOINT 0002"))
    with pytest.raises(CorruptCheckpoint, match="format version 2, this code reads 1"):
        checkpoints.load(path)


@pytest.mark.parametrize("seed", range(5))
def test_a_damaged_newest_one_is_replaced_by_the_one_before(tmp_path, capsys, seed):
    checkpoints.save(tmp_path, 10, {"step": 10})
    newest = checkpoints.save(tmp_path, 20, {"step": 20})
    damage(newest, np.random.default_rng(seed))
    assert checkpoints.load_latest(tmp_path) == (10, {"step": 10})
    (line,) = capsys.readouterr().err.splitlines()
    assert str(newest) in line and line.endswith("step 10 is used instead")
    assert checkpoints.valid_steps(tmp_path) == [10] and checkpoints.saved_steps(tmp_path) == [10, 20]


def test_training_starts_over_when_none_is_valid(tmp_path, capsys):
    assert checkpoints.load_latest(tmp_path / "missing") is None
    assert not capsys.readouterr().err
    checkpoints.save(tmp_path, 10, STATE).write_bytes(b"")
    assert checkpoints.load_latest(tmp_path) is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("training starts over")


def test_keep_and_stale_later_steps(tmp_path):
    for step in (10, 20, 30, 40):
        checkpoints.save(tmp_path, step, STATE, keep=2)
    assert checkpoints.saved_steps(tmp_path) == [30, 40]
    checkpoints.save(tmp_path, 35, STATE, keep=2)  # resumed from 30 because 40 was damaged
    assert checkpoints.saved_steps(tmp_path) == [30, 35]


def test_runs_resume_from_the_newest_step_valid_in_all(tmp_path, capsys, monkeypatch):
    seeds = [tmp_path / "sd0", tmp_path / "sd1"]
    for step in (10, 20, 30):
        for seed, directory in enumerate(seeds):
            checkpoints.save(directory, step, {"seed": seed, "step": step}, keep=5)
    checkpoints.save(seeds[0], 40, {}, keep=5)  # killed before the save of sd1
    (seeds[1] / "step_0000000030.ckpt").write_bytes(b"bad")
    loads = []
    load = checkpoints.load
    monkeypatch.setattr(checkpoints, "load", lambda path: (loads.append(path), load(path))[1])
    assert checkpoints.load_common(seeds) == (20, [{"seed": 0, "step": 20}, {"seed": 1, "step": 20}])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "sd1/step_0000000040.ckpt: No such file" in lines[0] and "30.ckpt: not a" in lines[1]
    assert len(loads) == len(set(loads)) and not any("0000000010" in path.name for path in loads)


SAVE_FOREVER = """
import sys, numpy as np
from pathlib import Path
from utils.run import checkpoints
for step in range(1, 10**6):
    checkpoints.save(Path(sys.argv[1]), step, {"step": step, "array": np.full(500_000, step)})
    print(step, flush=True)
"""


@pytest.mark.parametrize("delay", [0.01, 0.05, 0.12])
def test_kill_during_save(tmp_path, capsys, delay):
    command = [sys.executable, "-c", SAVE_FOREVER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3]) as child:
        child.stdout.readline()
        time.sleep(delay)
        child.kill()
        finished = [int(line) for line in child.stdout]
    step, state = checkpoints.load_latest(tmp_path)
    assert step >= max(finished, default=1) and (state["array"] == step).all() and state["step"] == step
    assert not capsys.readouterr().err
    assert checkpoints.valid_steps(tmp_path) == checkpoints.saved_steps(tmp_path)


def test_what_a_killed_save_left_is_removed_by_the_next(tmp_path):
    (tmp_path / ".step_0000000020.ckpt.tmp").write_bytes(b"half")
    (tmp_path / "notes.tmp").write_bytes(b"the user's")
    assert checkpoints.load_latest(tmp_path) is None
    path = checkpoints.save(tmp_path, 30, STATE)
    assert set(tmp_path.iterdir()) == {path, tmp_path / "notes.tmp"}


def test_full_disk(tmp_path, monkeypatch):
    first = checkpoints.save(tmp_path, 10, STATE)

    def fsync(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", fsync)
    with pytest.raises(UserError, match=r"^No space left on device: .*20\.ckpt; free some space.*$"):
        checkpoints.save(tmp_path, 20, STATE, keep=1)
    assert list(tmp_path.iterdir()) == [first] and checkpoints.load_latest(tmp_path)[0] == 10


def test_write_refused_halfway(tmp_path):
    first = checkpoints.save(tmp_path, 10, STATE)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"^File too large: "):
            checkpoints.save(tmp_path, 20, {"large": np.zeros(100_000)}, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == [first] and checkpoints.load_latest(tmp_path)[0] == 10


def test_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as error:
        checkpoints.save(tmp_path / "file" / "checkpoints", 1, STATE)
    assert re.fullmatch(r"Not a directory: cannot write .*", str(error.value))


def test_atomic_write_keeps_the_old_content_on_failure(tmp_path):
    path = tmp_path / "new" / "flags.json"
    files.atomic_write_text(path, "α")
    with pytest.raises(KeyboardInterrupt), files.atomic_open(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_text(encoding="utf-8") == "α" and list(path.parent.iterdir()) == [path]
