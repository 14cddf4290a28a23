"""Images of a LeRobotDataset v3, one at a time: from videos by PyAV, from image files by Pillow; no LeRobot.

The frames of a camera are in videos, where an episode starts at the time in its row of meta/episodes, or they are PNG
files in a column of `data/*/*.parquet`.
"""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from real.lerobot_dataset import WITHOUT, Recording, read_episodes, reading, video_path
from utils.errors import UserError

_BATCH = 32  # Frames of a parquet file that are read at once.
_REORDERED = 16  # Frames; more than codecs reorder.


def camera_images(recording: Recording, camera: str, lengths: list[int], size: int) -> Iterator[np.ndarray]:
    """Yields the images of one camera, resized to squares.

    Pillow's bilinear filter averages over the area of a pixel; the policy resizes the robot's images in the same way
    (`as_pixels` in real/lerobot_policy_otql). Nothing is cropped: images that are not square are distorted.

    Args:
        recording: from `read_recording`.
        camera: one of its cameras.
        lengths: number of frames of each episode, from its first.
        size: side of the squares, in pixels.

    Yields:
        uint8 [size, size, 3], in the order of episodes and frames.

    Raises:
        UserError: a file or a frame is missing or damaged.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise UserError("images are resized by Pillow: pip install pillow") from error
    read = _from_video if recording.cameras[camera] == "video" else _from_files
    for image in read(recording, camera, lengths):
        if image.shape[:2] != (size, size):
            image = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))
        yield image


def _from_files(recording: Recording, camera: str, lengths: list[int]) -> Iterator[np.ndarray]:
    """Yields images [h, w, 3] from a column of files."""
    from PIL import Image
    from pyarrow import parquet

    kept = [np.arange(len(one.states)) < length for one, length in zip(recording.episodes, lengths, strict=True)]
    wanted, begin = np.concatenate(kept), 0
    for path in sorted((recording.root / "data").glob("*/*.parquet")):
        with reading(path), parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(_BATCH, columns=[camera]):
                for row in np.flatnonzero(wanted[begin : begin + len(batch)]):
                    content = (batch.column(0)[int(row)].as_py() or {}).get("bytes")
                    try:
                        with Image.open(io.BytesIO(content or b"")) as image:
                            yield np.asarray(image.convert("RGB"))
                    except OSError as error:
                        place = f"frame {begin + row} of {recording.root}"
                        raise UserError(f"{place} has no readable image '{camera}'; {WITHOUT}") from error
                begin += len(batch)


def _from_video(recording: Recording, camera: str, lengths: list[int]) -> Iterator[np.ndarray]:
    """Yields images [h, w, 3] from videos."""
    rows = read_episodes(recording.root)
    for episode, length in enumerate(lengths):
        row, found = rows.get(episode, {}), 0
        if f"videos/{camera}/from_timestamp" not in row:
            raise UserError(f"{recording.root} lacks the video of episode {episode} of '{camera}'; record again")
        path, start = video_path(recording.root, camera, row), row[f"videos/{camera}/from_timestamp"]
        for image in _frames(path, start, length, recording.fps):
            yield image
            found += 1
        if found < length:
            raise UserError(
                f"{path} lacks frame {found} of episode {episode} (at {start + found / recording.fps:.2f} s); {WITHOUT}"
            )


def _frames(path: Path, start: float, count: int, fps: float) -> Iterator[np.ndarray]:
    """Yields images [h, w, 3] of `count` frames from `start` (s) on, up to the first missing one."""
    try:
        import av
    except ImportError as error:
        raise UserError("the images are in videos, which need PyAV: pip install av") from error
    if not path.is_file():
        raise UserError(f"there is no video {path}; copy the whole folder of the dataset")
    try:
        with av.open(path) as container:
            stream, index = container.streams.video[0], 0
            # Seeks to an earlier key frame, by decoding times, which for HEVC are some frames earlier.
            container.seek(max(0, int((start - _REORDERED / fps) / stream.time_base)), stream=stream)
            for frame in container.decode(stream):
                late = frame.time - start - index / fps
                if index == count or late > 0.5 / fps:
                    return
                if late > -0.5 / fps:
                    yield frame.to_ndarray(format="rgb24")
                    index += 1
    except (av.FFmpegError, IndexError) as error:
        raise UserError(
            f"{path} cannot be read ({error}): is the recording still running, or was it killed?"
        ) from error
