"""Recordings become transitions; every fault of them is one line."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
from recordings import edit, write_recording

from envs.datasets import load_file
from envs.gym_dataset import read_gym_dataset
from envs.tasks import parse_task
from real import import_rollouts as program
from real import labels
from real.export import find_normalisation
from real.import_rollouts import STATS, import_rollouts, main
from real.policy_directory import read_normalisation
from utils.data.batches import describe
from utils.errors import UserError


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """A recording of two episodes, the first of them a success."""
    root = tmp_path / "recording"
    write_recording(root, success=(True, False))
    return root


def load(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)


def test_rows_and_statistics(labelled: Path, tmp_path: Path) -> None:
    recorded = write_recording(tmp_path / "same")
    line = import_rollouts([labelled], tmp_path / "a.npz")
    assert line.endswith("2 episodes, 1 solved, 9 transitions")
    arrays = load(tmp_path / "a.npz")
    for name, column, what in (("observations", "observation.state", "state"), ("actions", "action", "action")):
        raw = arrays[name] * arrays[f"{what}_scale"] + arrays[f"{what}_offset"]
        np.testing.assert_allclose(raw, recorded[column], atol=1e-5)
    np.testing.assert_allclose(arrays["observations"].mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(arrays["observations"].std(0), 1, atol=1e-6)
    np.testing.assert_allclose(arrays["actions"].min(0), -1, atol=1e-6)
    np.testing.assert_allclose(arrays["actions"].max(0), 1, atol=1e-6)
    np.testing.assert_array_equal(arrays["rewards"], [-1, -1, -1, 0, -1, -1, -1, -1, -1, -1])
    np.testing.assert_array_equal(arrays["terminals"], np.arange(10) == 3)
    np.testing.assert_array_equal(arrays["timeouts"], np.arange(10) == 9)
    about = json.loads((tmp_path / "a.json").read_text())
    assert about["state_names"] == ["a.pos", "b.pos", "c.pos"] and about["datasets"][0]["successes"] == 1


def test_normalisation_for_the_robot(tmp_path: Path) -> None:
    places = np.random.default_rng(3).normal(5, 3, (10, 2)).astype(np.float32)
    columns = {"observation.environment_state": places, "next.success": np.arange(10) == 9}
    recorded = write_recording(tmp_path / "r", columns=columns)
    features = ["observation.environment_state", "observation.state"]
    import_rollouts([tmp_path / "r"], tmp_path / "a.npz", features=features, state_norm="min_max")
    about, arrays = json.loads((tmp_path / "a.normalisation.json").read_text()), load(tmp_path / "a.npz")
    assert about["norm_map"] == {"STATE": "MEAN_STD", "ENV": "MEAN_STD", "ACTION": "MEAN_STD"}
    seen = [(recorded[name] - about["stats"][name]["mean"]) / about["stats"][name]["std"] for name in features]
    np.testing.assert_allclose(arrays["observations"], np.concatenate(seen, axis=1), atol=1e-5)
    done = arrays["actions"] * about["stats"]["action"]["std"] + about["stats"]["action"]["mean"]
    np.testing.assert_allclose(done, recorded["action"], atol=1e-5)
    import_rollouts([tmp_path / "r"], tmp_path / "b.npz", state_norm="none")
    about = json.loads((tmp_path / "b.normalisation.json").read_text())
    assert about["norm_map"]["STATE"] == "IDENTITY" and list(about["stats"]) == ["action"]


def test_the_export_trusts_the_run_s_own_data_only(labelled: Path, tmp_path: Path) -> None:
    """What is beside the dataset must be its own, and the dataset what the run was trained on."""
    places = np.random.default_rng(3).normal(5, 3, (10, 3)).astype(np.float32)
    write_recording(tmp_path / "other", columns={"observation.places": places, "next.success": np.arange(10) == 9})
    data, features = tmp_path / "a.npz", {"observation.state": 3, "observation.places": 3}
    about = tmp_path / "a.normalisation.json"
    import_rollouts([tmp_path / "other"], data, features=list(features))
    written = about.read_text()
    dataset = describe(load_file(parse_task("robot:it"), data), data.name)
    settings = {"flags": {"dataset": str(data)}, "dataset": dataset, "env_name": "robot:it", "sparse": False}
    run = SimpleNamespace(settings=settings)

    def refusal(features: dict[str, int] = features) -> str:
        with pytest.raises(UserError) as refused:
            find_normalisation(run, None, features, [], 3)
        return str(refused.value)

    assert find_normalisation(run, None, features, [], 3)[0].stats == json.loads(written)["stats"]
    assert "other statistics" in refusal(dict(reversed(features.items())))
    about.unlink()
    assert "there is no" in refusal()
    import_rollouts([tmp_path / "other"], tmp_path / "b.npz", features=list(features), state_norm="min_max")
    (tmp_path / "b.normalisation.json").rename(about)
    assert "other statistics" in refusal()
    about.write_text(written)
    data.rename(tmp_path / "gone.npz")
    assert "does not exist" in refusal()
    import_rollouts([tmp_path / "other"], data, features=list(features), max_steps=4)
    assert "differs from the data of the run" in refusal()


def test_a_killed_import_leaves_no_file_with_the_statistics_of_another(
    labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_rollouts([labelled], tmp_path / "a.npz")
    monkeypatch.setattr(program, "write_npz", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        import_rollouts([labelled], tmp_path / "a.npz", state_norm="none")
    assert not (tmp_path / "a.npz").exists()


def test_is_a_dataset_of_the_project(labelled: Path, tmp_path: Path) -> None:
    import_rollouts([labelled], tmp_path / "a.npz")
    data = read_gym_dataset(tmp_path / "a.npz", 3, 3)
    np.testing.assert_array_equal(data["terminals"], [0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1])
    np.testing.assert_array_equal(data["masks"], [1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1])
    np.testing.assert_array_equal(data["rewards"], [-1, -1, -1, 0, 0, -1, -1, -1, -1, -1, 0])


def test_later_recordings_use_the_first_ones_statistics(
    labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    import_rollouts([labelled], tmp_path / "a.npz", state_norm="min_max")
    later = tmp_path / "later"
    columns = {"action": np.full((3, 3), 30, np.float32)}
    recorded = write_recording(later, (3,), seed=1, columns=columns, success=(True,))
    import_rollouts([later], tmp_path / "b.npz", stats=tmp_path / "a.npz")
    first, second = load(tmp_path / "a.npz"), load(tmp_path / "b.npz")
    for name in STATS:
        np.testing.assert_array_equal(first[name], second[name])
    expected = (recorded["observation.state"] - first["state_offset"]) / first["state_scale"]
    np.testing.assert_allclose(second["observations"], expected, atol=1e-6)
    np.testing.assert_array_equal(second["actions"], 1)
    assert "3 of 3 actions are beyond" in capsys.readouterr().err


def test_a_number_that_never_changes(tmp_path: Path) -> None:
    column = np.tile(np.float32([7, 0.1, 0.2]), (4, 1))
    write_recording(tmp_path / "r", (4,), columns={"observation.state": column}, success=(True,))
    for norm in ("mean_std", "min_max"):
        import_rollouts([tmp_path / "r"], tmp_path / "a.npz", state_norm=norm)
        arrays = load(tmp_path / "a.npz")
        np.testing.assert_array_equal(arrays["state_scale"], 1)
        np.testing.assert_allclose(arrays["observations"], 0, atol=1e-6)


def test_a_joint_that_rests_in_the_first_recording(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Is bounded in the next one, and by the numbers that the policy has."""
    random, time = np.random.default_rng(0), np.arange(60)[:, None] / 30
    moving = np.sin(time * [3, 4, 5] + 1)
    resting = moving * [1, 0, 1] + random.normal(0, 7e-5, (60, 3))
    for name, joints in (("first", resting), ("second", moving)):
        columns = {"observation.state": joints.astype(np.float32), "action": joints.astype(np.float32)}
        write_recording(tmp_path / name, (60,), columns=columns, success=(True,))
    import_rollouts([tmp_path / "first"], tmp_path / "a.npz")
    assert "state b.pos rests" in capsys.readouterr().err
    import_rollouts([tmp_path / "second"], tmp_path / "b.npz", stats=tmp_path / "a.npz")
    seen = load(tmp_path / "b.npz")["observations"]
    assert np.abs(seen).max() < 5 and "scales from" not in capsys.readouterr().err
    found = read_normalisation(tmp_path / "a.normalisation.json", {"observation.state": 3}, 3)
    mean, deviation = (np.array(found.stats["observation.state"][name]) for name in ("mean", "std"))
    np.testing.assert_allclose((moving - mean) / deviation, seen, atol=1e-5)


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("next.success", [0, 0, 0, 0, 0, 0, 0, 1, 1, 1]),
        ("next.reward", [0, 0, 0, 0, 0, 0, 0, 1, 0, 0]),
        ("next.reward", [-1, -1, -1, -1, -1, -1, -1, 0, -1, -1]),
    ],
)
def test_success_as_recorded_ends_the_episode(tmp_path: Path, column: str, values: list[float]) -> None:
    kind = bool if column == "next.success" else np.float32
    write_recording(tmp_path / "r", columns={column: np.array(values, kind)})
    assert import_rollouts([tmp_path / "r"], tmp_path / "a.npz").endswith("2 episodes, 1 solved, 7 transitions")
    arrays = load(tmp_path / "a.npz")
    np.testing.assert_array_equal(arrays["terminals"], np.arange(8) == 7)
    np.testing.assert_array_equal(arrays["timeouts"], np.arange(8) == 3)


def test_steps_after_the_limit_do_not_count(labelled: Path, tmp_path: Path) -> None:
    line = import_rollouts([labelled], tmp_path / "a.npz", max_steps=3)
    assert line.endswith("0 solved, 4 transitions; 1 solved only after --max_steps=3 count as unsolved")
    np.testing.assert_array_equal(load(tmp_path / "a.npz")["timeouts"], [0, 0, 1, 0, 0, 1])


def test_labels_from_a_table_and_several_datasets(labelled: Path, tmp_path: Path) -> None:
    write_recording(tmp_path / "two", (5,), seed=2)
    (tmp_path / "one.csv").write_text("episode_index,success\n1,yes\n0,no\n")
    (tmp_path / "two.csv").write_text("success,episode_index\nsuccess,0\n")
    arguments = [str(labelled), str(tmp_path / "two"), f"--output={tmp_path}/a.npz"]
    main(["import_rollouts", *arguments, f"--labels={tmp_path}/one.csv,{tmp_path}/two.csv"])
    np.testing.assert_array_equal(np.flatnonzero(load(tmp_path / "a.npz")["terminals"]), [9, 14])


def test_demonstrations_without_a_record_of_success(tmp_path: Path) -> None:
    """Count as what is said; a copy with columns says it itself, as does one with a file of labels."""
    write_recording(tmp_path / "r")
    assert "2 solved" in import_rollouts([tmp_path / "r"], tmp_path / "a.npz", unlabelled="success")
    assert "0 solved" in import_rollouts([tmp_path / "r"], tmp_path / "b.npz", unlabelled="failure")
    labels.main(["labels", str(tmp_path / "r"), str(tmp_path / "all"), "--all=success"])
    import_rollouts([tmp_path / "all"], tmp_path / "c.npz")
    for name, values in load(tmp_path / "a.npz").items():
        np.testing.assert_array_equal(values, load(tmp_path / "c.npz")[name])
    (tmp_path / "labels.csv").write_bytes("\ufeffEpisode;Success\n1;yes\n0;no\n".encode())
    labels.main(["labels", str(tmp_path / "r"), str(tmp_path / "some"), f"--labels={tmp_path / 'labels.csv'}"])
    import_rollouts([tmp_path / "some"], tmp_path / "d.npz")
    np.testing.assert_array_equal(np.flatnonzero(load(tmp_path / "d.npz")["terminals"]), [9])
    with pytest.raises(UserError, match="exists; name another folder"):
        labels.main(["labels", str(tmp_path / "r"), str(tmp_path / "some"), "--all=success"])


def nan_state() -> dict[str, np.ndarray]:
    values = np.zeros((10, 3), np.float32)
    values[4, 1] = np.nan
    return {"observation.state": values}


def without(row: int):
    """Drops a frame."""
    return lambda table: table.drop(index=row)


def column(name: str, values):
    """Replaces a column."""
    return lambda table: table.__setitem__(name, values)


@pytest.mark.parametrize(
    ("recording", "change", "flags", "message"),
    [
        ({}, without(6), [], r"holds 9 frames, its info.json says 10"),
        ({}, column("frame_index", [0, 1, 2, 3, 0, 1, 3, 4, 5, 6]), [], r"episode 1 .* lacks frames \(after 2 of 6"),
        ({}, column("timestamp", np.float32(np.arange(10) / 10)), [], "episode 0 .* lacks frames"),
        ({"columns": nan_state()}, None, [], r"'observation.state' .* is NaN or infinite \(first in frame 4\)"),
        ({}, column("episode_index", np.repeat([0, 2], [4, 6])), [], "cannot be read|not numbered 0, 1, 2"),
        ({"columns": {"next.reward": np.float32(np.linspace(0, 1, 10))}}, None, [], "'next.reward' .* is not sparse"),
        ({}, None, ["--features=observation.force"], "no feature 'observation.force'; it has observation.state"),
        ({"success": (True, True)}, None, ["--action=next.success"], "of kind bool, not a vector"),
        ({}, None, ["--action=act"], "no feature 'act'"),
        ({"success": (True, True)}, None, ["--action_norm=none"], "actions are beyond"),
        ({}, None, ["--max_steps=0"], "max_steps is 0"),
        ({}, None, ["--max_steps=x"], "argument --max_steps: invalid int value: 'x'"),
        ({}, None, ["--labels=a,b"], "2 files of --labels for 1 datasets; give one for each"),
        ({}, None, ["--labels=nowhere.csv"], "cannot read the labels nowhere.csv"),
        ({"success": (True, True)}, None, ["--stats=nowhere.npz"], "there is no file nowhere.npz"),
        ({}, None, ["--stats=a.npz", "--state_norm=none"], "leave --state_norm and --action_norm out"),
        ({}, None, [], "has no record of success: give --labels, or --unlabelled=success for demonstrations"),
    ],
)
def test_faults(tmp_path: Path, recording: dict, change, flags: list[str], message: str) -> None:
    write_recording(tmp_path / "r", **recording)
    if change:
        edit(tmp_path / "r", change)
    with pytest.raises(UserError, match=message) as refused:
        main(["import_rollouts", str(tmp_path / "r"), f"--output={tmp_path}/a.npz", *flags])
    assert "\n" not in str(refused.value) and not (tmp_path / "a.npz").exists()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"fps": 10}, "has 30 fps, .* 10; import those of one rate"),
        ({"joints": ("a.pos", "b.pos")}, r"differ in state_names \(3 and 2; c.pos\)"),
        ({"joints": ("b.pos", "a.pos", "c.pos")}, r"differ in state_names \(3 and 3; their order\)"),
    ],
)
def test_datasets_that_do_not_go_together(labelled: Path, tmp_path: Path, other: dict, message: str) -> None:
    write_recording(tmp_path / "other", success=(True, True), **other)
    with pytest.raises(UserError, match=message):
        import_rollouts([labelled, tmp_path / "other"], tmp_path / "a.npz")
    import_rollouts([labelled], tmp_path / "a.npz")
    if "joints" in other:
        with pytest.raises(UserError, match=r"state numbers|other state_names"):
            import_rollouts([tmp_path / "other"], tmp_path / "b.npz", stats=tmp_path / "a.npz")


def test_folders_that_are_no_datasets(labelled: Path, tmp_path: Path) -> None:
    """Nor does LeRobot look for missing files on the hub."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="there is no LeRobotDataset in"):
        import_rollouts([tmp_path / "empty"], tmp_path / "a.npz")
    info = labelled / "meta/info.json"
    about = json.loads(info.read_text())
    for changes, message in (
        ({"codebase_version": "v2.1"}, "cannot be read"),
        ({"total_frames": 12}, "holds 10 frames, its info.json says 12"),
        ({"total_episodes": 0}, "has no episode"),
    ):
        info.write_text(json.dumps(about | changes))
        with pytest.raises(UserError, match=message):
            import_rollouts([labelled], tmp_path / "a.npz")
    info.write_text(json.dumps(about))
    (data,) = (labelled / "data").glob("*/*.parquet")
    data.write_bytes(data.read_bytes()[:200])  # As after a kill: the footer is written last.
    with pytest.raises(UserError, match=r"cannot be read .*: does it still record, or was it killed"):
        import_rollouts([labelled], tmp_path / "a.npz")
    data.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        import_rollouts([labelled], tmp_path / "a.npz")


def test_command_line(labelled: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "real.import_rollouts", str(labelled)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(program.__file__).parents[1])
    assert done.returncode == 2
    assert done.stderr == "error: the following arguments are required: --output\n"
    command += [f"--output={tmp_path}/a.txt"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(program.__file__).parents[1])
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "does not end in .npz" in done.stderr
