"""Cameras of recordings made through LeRobot's API become images to train on."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from lerobot.datasets import LeRobotDataset
from PIL import Image
from pyarrow import parquet

from envs.gym_dataset import read_gym_dataset
from real.export import find_normalisation
from real.import_rollouts import import_rollouts, main
from real.policy_directory import read_normalisation
from utils.errors import UserError

HEIGHT, WIDTH, LENGTHS, FPS = 64, 96, (3, 5), 10
CAMERAS = FRONT, WRIST = "observation.images.front", "observation.images.wrist"


def record(root: Path, kind: str, pixels: np.ndarray) -> Path:
    """Records episodes of LENGTHS, the first of them a success, that show pixels [N, 2, h, w, 3]."""
    shape = {"shape": pixels.shape[2:], "names": ["height", "width", "channels"]}
    vector = {"dtype": "float32", "names": None, "shape": (2,)}
    features = {"observation.state": vector, "action": vector, **{name: shape | {"dtype": kind} for name in CAMERAS}}
    features["next.success"] = {"dtype": "bool", "shape": (1,), "names": None}
    dataset = LeRobotDataset.create("local/it", FPS, features, root=root, use_videos=kind == "video")
    random, frames = np.random.default_rng(0), iter(pixels)
    for number, length in enumerate(LENGTHS):
        for step in range(length):
            numbers = {name: random.uniform(-1, 1, 2).astype(np.float32) for name in ("observation.state", "action")}
            numbers["next.success"] = np.array([number == 0 and step == length - 1])
            dataset.add_frame(numbers | dict(zip(CAMERAS, next(frames), strict=True)) | {"task": "try"})
        dataset.save_episode()
    dataset.finalize()
    return root


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    """Images without structure, so that no other resizing or order gives the same."""
    return np.random.default_rng(1).integers(0, 256, (sum(LENGTHS), 2, HEIGHT, WIDTH, 3), np.uint8)


@pytest.fixture(scope="module")
def photographed(noise: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recording that keeps PNG files."""
    return record(tmp_path_factory.mktemp("photographed") / "set", "image", noise)


@pytest.fixture(scope="module")
def shades() -> np.ndarray:
    """A grey of its own for each frame and camera, which no video codec turns into another one's."""
    greys = np.linspace(20, 235, 2 * sum(LENGTHS)).astype(np.uint8).reshape(-1, 2)
    return np.broadcast_to(greys[:, :, None, None, None], (*greys.shape, HEIGHT, WIDTH, 3)).copy()


@pytest.fixture(scope="module")
def filmed(shades: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recording that keeps videos, of both episodes in one file for each camera."""
    return record(tmp_path_factory.mktemp("filmed") / "set", "video", shades)


@pytest.fixture
def broken(photographed: Path, filmed: Path, tmp_path: Path):
    """Returns a function that copies the recording of a kind, to be damaged."""
    sources = {"image": photographed, "video": filmed}
    return lambda kind: shutil.copytree(sources[kind], tmp_path / kind)


def images_of(root: Path, path: Path, features: tuple[str, ...] = CAMERAS, **settings: int) -> np.ndarray:
    import_rollouts([root], path, features=("observation.state", *features), **settings)
    with np.load(path) as file:
        return file["images"]


def test_pixels_are_those_that_were_recorded(photographed, noise, tmp_path):
    """Exact at their own size; the cameras in the order in which they are named, whatever stands between them."""
    square = record(tmp_path / "square", "image", noise[:, :, :, :HEIGHT])
    np.testing.assert_array_equal(images_of(square, tmp_path / "a.npz"), noise[:, :, :, :HEIGHT])
    import_rollouts([square], tmp_path / "b.npz", features=(WRIST, "observation.state", FRONT))
    with np.load(tmp_path / "b.npz") as file:
        np.testing.assert_array_equal(file["images"], noise[:, ::-1, :, :HEIGHT])
    # At another size, squeezed by Pillow, whatever the aspect.
    squeezed = images_of(photographed, tmp_path / "c.npz", (WRIST,), image_size=16)
    expected = [np.asarray(Image.fromarray(one).resize((16, 16), Image.Resampling.BILINEAR)) for one in noise[:, 1]]
    np.testing.assert_array_equal(squeezed[:, 0], expected)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("tmp")] == []


def test_each_row_has_its_own_frame_of_the_video(filmed, shades, tmp_path):
    """The second episode begins within the file; what lies behind --max_steps is left out of both kinds alike."""
    np.testing.assert_allclose(images_of(filmed, tmp_path / "a.npz"), shades[:, :, :, :HEIGHT], atol=4)
    kept = [0, 1, 3, 4]
    cut = images_of(filmed, tmp_path / "b.npz", max_steps=2)
    np.testing.assert_allclose(cut, shades[kept][:, :, :, :HEIGHT], atol=4)


def test_is_a_dataset_of_the_project(photographed, noise, tmp_path):
    """Its images are those of its states; without cameras there is no difference to before; images alone will do."""
    images_of(photographed, tmp_path / "a.npz", image_size=8)
    data = read_gym_dataset(tmp_path / "a.npz")
    assert data["images"].shape == (sum(LENGTHS) + 1, 2, 8, 8, 3)  # A solved episode's last state is repeated.
    np.testing.assert_array_equal(data["images"][2], data["images"][3])
    import_rollouts([photographed], tmp_path / "b.npz")
    with np.load(tmp_path / "a.npz") as ours, np.load(tmp_path / "b.npz") as plain:
        assert set(ours) - set(plain) == {"images"}
        for name in plain:
            np.testing.assert_array_equal(ours[name], plain[name])
    for suffix in (".json", ".normalisation.json"):
        assert "cameras" not in json.loads((tmp_path / f"b{suffix}").read_text())
    import_rollouts([photographed], tmp_path / "c.npz", features=(FRONT,), image_size=8)
    assert read_gym_dataset(tmp_path / "c.npz")["observations"].shape == (sum(LENGTHS) + 1, 0)


def test_the_export_knows_the_order_of_the_cameras(photographed, tmp_path):
    """Two cameras that changed places would be noticed by nobody else."""
    images_of(photographed, tmp_path / "a.npz", image_size=8)
    path = tmp_path / "a.normalisation.json"
    assert read_normalisation(path, {"observation.state": 2}, 2).cameras == list(CAMERAS)
    run = type("Run", (), {"settings": {"flags": {}}})
    assert find_normalisation(run, str(path), {"observation.state": 2}, list(CAMERAS), 2)[1] == f"statistics of {path}"
    with pytest.raises(UserError, match=r"names the cameras observation\.images\.wrist, .*; in .* they are"):
        find_normalisation(run, str(path), {"observation.state": 2}, [WRIST, FRONT], 2)


def test_cameras_alone_go_on_with_the_first_ones_statistics(photographed, tmp_path):
    """There are none of states, which nothing asks for; states that are added are refused."""
    first, settings = tmp_path / "a.npz", {"image_size": 8, "stats": tmp_path / "a.npz"}
    import_rollouts([photographed], first, features=(FRONT,), image_size=8)
    import_rollouts([photographed], tmp_path / "b.npz", features=(FRONT,), **settings)
    with np.load(first) as ours, np.load(tmp_path / "b.npz") as later:
        np.testing.assert_array_equal(ours["actions"], later["actions"])
    with pytest.raises(UserError, match="normalises 0 state numbers, the recordings have 2"):
        import_rollouts([photographed], tmp_path / "c.npz", features=(FRONT, "observation.state"), **settings)


def test_later_recordings_have_the_first_ones_cameras(photographed, tmp_path):
    """And the size of its images."""
    images_of(photographed, tmp_path / "a.npz", image_size=8)
    for features, size, message in (
        (CAMERAS, 16, "has image_size = 8, not 16"),
        ((WRIST, FRONT), 8, "has cameras = .*, not"),
        ((), 8, "not None"),
    ):
        with pytest.raises(UserError, match=message):
            import_rollouts(
                *([photographed], tmp_path / "b.npz"),
                features=("observation.state", *features),
                stats=tmp_path / "a.npz",
                image_size=size,
            )


def empty_image(root: Path) -> None:
    """The fifth frame's image is no image."""
    (path,) = (root / "data").glob("*/*.parquet")
    table = parquet.read_table(path)
    column = table[WRIST].to_pylist()
    column[4] = {"bytes": b"nothing", "path": None}
    index = table.schema.get_field_index(WRIST)
    parquet.write_table(table.set_column(index, WRIST, [column]), path)


def late_start(root: Path) -> None:
    """The second episode is said to begin a frame later than it does, so that its last one is not there."""
    (path,) = (root / "meta/episodes").glob("*/*.parquet")
    table = parquet.read_table(path)
    name = f"videos/{FRONT}/from_timestamp"
    starts = [time + (i == 1) / FPS for i, time in enumerate(table[name].to_pylist())]
    parquet.write_table(table.set_column(table.schema.get_field_index(name), name, [starts]), path)


def garbled_column(root: Path) -> None:
    """What holds the wrist's images is overwritten."""
    (path,) = (root / "data").glob("*/*.parquet")
    group = parquet.ParquetFile(path).metadata.row_group(0)
    columns = [group.column(index) for index in range(group.num_columns)]
    (column,) = [column for column in columns if column.path_in_schema == f"{WRIST}.bytes"]
    content = bytearray(path.read_bytes())
    begin = column.dictionary_page_offset or column.data_page_offset
    content[begin : begin + column.total_compressed_size] = bytes(column.total_compressed_size)
    path.write_bytes(content)


def cut_index(root: Path) -> None:
    (path,) = (root / "meta/episodes").glob("*/*.parquet")
    path.write_bytes(path.read_bytes()[:-20])


def no_video(root: Path) -> None:
    shutil.rmtree(root / "videos" / WRIST)


def cut_video(root: Path) -> None:
    for path in (root / "videos").glob("*/*/*.mp4"):
        path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize(
    ("kind", "damage", "message"),
    [
        ("image", empty_image, r"an image of frame 1 of episode 1 of .* cannot be read"),
        ("image", garbled_column, "cannot be read"),
        ("video", cut_index, "cannot be read"),
        ("video", late_start, r"an image of frame 4 of episode 1 of .* cannot be read"),
        ("video", no_video, "cannot be read"),
        ("video", cut_video, "an image of frame 0 of episode 0 of .* cannot be read"),
    ],
)
def test_missing_frames(kind, damage, message, broken, tmp_path):
    """Nothing is written."""
    root = broken(kind)
    damage(root)
    with pytest.raises(UserError, match=message):
        images_of(root, tmp_path / "a.npz")
    assert sorted(path.name for path in tmp_path.iterdir()) == [kind]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--features=observation.state,observation.images.top"],
            r"no feature 'observation\.images\.top'; it has .*front",
        ),
        ([f"--features={FRONT}", "--image_size=0"], "image_size is 0; it must be at least 1"),
    ],
)
def test_settings_that_do_not_fit(flags, message, photographed, tmp_path):
    """One line."""
    with pytest.raises(UserError, match=message):
        main(["import_rollouts", str(photographed), f"--output={tmp_path}/a.npz", *flags])
    assert not list(tmp_path.iterdir())
