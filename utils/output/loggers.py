"""Loggers of metrics: CSV files that resume exactly, a progress bar, and optionally wandb and TensorBoard."""

import csv
import math
import netrc
import os
import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsFloat
from urllib.parse import urlsplit

import numpy as np
from tqdm import tqdm

from utils.errors import UserError
from utils.output.tables import csv_text
from utils.system.files import atomic_write_text, disk_errors

SUCCESS = "success_rate"
# Columns of eval.csv by which runs are compared, the best first, and their names.
MEASURES = {SUCCESS: "success rate", "normalized_score": "normalised score", "return_mean": "return"}


class CsvLogger:
    """A CSV file to which rows are appended; other processes see a row as soon as `log` returns.

    The first column is `step`, the others are `columns`, or the keys of the first row. They stay fixed, so that byte
    positions in earlier checkpoints remain valid: give a value that comes later as NaN in the first row. A resumed file
    of an earlier version may lack columns; their values are left out, with one warning.

    To resume, store `position()` in the checkpoint and pass it to the constructor: rows written after it are cut off
    and will be written again. Without a position (or with 0) the file is overwritten.

    Raises:
        UserError: the disk is full or the file cannot be written.
    """

    def __init__(self, path: Path, position: int | None = None, columns: Sequence[str] | None = None):
        self.path = path
        self._columns = ["step", *columns] if columns else []
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = _first_bytes(path, position or 0)
            if kept:
                self._columns = next(csv.reader([kept.split(b"\n", 1)[0].decode("utf-8", "replace")]))
                if self._columns[0] != "step":
                    raise UserError(f"{path} was changed: its first column is not 'step'; restore the file")
            # Unbuffered, so that a row that failed to be written is not written on closing.
            self._file = open(path, "r+b" if kept else "wb", buffering=0)  # noqa: SIM115
            if kept:
                self._file.truncate(len(kept))
                self._file.seek(len(kept))
        self._resumed = self._has_header = bool(kept)
        self._warned = False

    def log(self, step: int, row: Mapping[str, SupportsFloat]) -> None:
        """Appends one row; numbers read back bit for bit, NaN and missing keys are empty cells.

        Raises:
            UserError: the disk is full.
            ValueError: `row` has a key without a column, and the file was not resumed.
        """
        lines = []
        self._columns = self._columns or ["step", *row]
        if unknown := sorted(row.keys() - set(self._columns)):
            if not self._resumed:
                raise ValueError(f"{self.path.name} has no column for {unknown}; give it as NaN in the first row")
            if not self._warned:
                print(f"warning: {self.path} has no column for {', '.join(unknown)}: left out", file=sys.stderr)
            self._warned = True
        if not self._has_header:
            lines.append(self._columns)
            self._has_header = True
        lines.append([str(step), *(_cell(row.get(column, math.nan)) for column in self._columns[1:])])
        data = csv_text(lines).encode()
        with disk_errors(self.path):
            while data:
                data = data[self._file.write(data) :]

    def position(self) -> int:
        """Returns the length of the file in bytes, for the checkpoint, after making these bytes durable."""
        with disk_errors(self.path):
            os.fsync(self._file.fileno())
            return self._file.tell()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _cell(value: SupportsFloat) -> str:
    number = float(value)
    return "" if math.isnan(number) else repr(number)


def _first_bytes(path: Path, position: int) -> bytes:
    """Returns the first `position` bytes of `path`, or if the file was altered, with a warning, its whole rows."""
    if not position:
        return b""
    data = path.read_bytes()[:position] if path.exists() else b""
    if len(data) == position and data.endswith(b"\n"):
        return data
    # Rows are lost, but the checkpoint is intact: better to continue than to stop.
    data = data[: data.rfind(b"\n") + 1]
    print(f"{path}: rows logged before the checkpoint are missing; continuing after {len(data)} bytes", file=sys.stderr)
    return data


def read_csv(path: Path) -> dict[str, np.ndarray]:
    """Reads a file of `CsvLogger`.

    A last line without its newline, half written by a running or killed process, is left out.

    Returns:
        column name → float64 [rows], empty cells as NaN; an empty dict if there are no rows.

    Raises:
        UserError: the file is missing, or a line does not fit the header.
    """
    try:
        text = path.read_text(encoding="utf-8")
        header, *rows = list(csv.reader(text[: text.rfind("\n") + 1].splitlines())) or [[]]
        values = np.array([[float(cell or "nan") for cell in row] for row in rows])
        return dict(zip(header, values.reshape(len(rows), len(header)).T, strict=True)) if rows else {}
    except OSError as error:
        raise UserError(f"{error.strerror}: cannot read {path}") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); correct the lines that are not numbers") from error


def measure_of(*tables: Mapping[str, np.ndarray]) -> str:
    """Returns the first of MEASURES that has a number in a column of one of the tables, by default the return."""
    return next(
        (name for name in MEASURES if any(np.isfinite(t.get(name, np.nan)).any() for t in tables)), "return_mean"
    )


class ProgressBar:
    """A progress bar with rate, ETA and a few metrics on a terminal; elsewhere a line at most every 30 s.

    Args:
        total: updates of the whole run.
        initial: updates done before the run was resumed, which the rate does not count.
        description: text before the bar.
        unit: of progress.
        show: False to show nothing.
    """

    def __init__(self, total: int, initial: int = 0, description: str = "", unit: str = " updates", show: bool = True):
        terminal = sys.stderr.isatty()
        interval = 0.5 if terminal else 30.0
        self._bar = tqdm(
            disable=not show,
            total=total,
            initial=initial,
            desc=f"{description}: " if description else None,
            unit=unit,
            file=sys.stderr if terminal else _Lines(sys.stderr),
            dynamic_ncols=terminal,
            # Log files get no bar.
            bar_format=None if terminal else "{desc}{n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]",
            miniters=1,
            mininterval=interval,
            maxinterval=interval,
        )

    def update(self, count: int, metrics: Mapping[str, SupportsFloat] | None = None) -> None:
        """Adds `count` updates and shows `metrics`, kept until the next ones, with three digits."""
        if metrics:
            self._bar.set_postfix({name: f"{float(value):.3g}" for name, value in metrics.items()}, refresh=False)
        self._bar.update(count)

    def close(self) -> None:
        """Ends the display and leaves the last state on screen."""
        self._bar.close()

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Lines:
    """A text stream that turns tqdm's updates in place into separate lines."""

    def __init__(self, stream: Any):
        self._stream = stream
        self.encoding = getattr(stream, "encoding", None)

    def write(self, text: str) -> None:
        text = text.replace("\x1b[A", "").strip()  # cursor moves between nested bars
        if text:
            self._stream.write(text + "\n")

    def flush(self) -> None:
        self._stream.flush()


class _Service:
    """An optional copy of the logged rows; a failure there costs one warning line, never the run."""

    name: str

    def __init__(self) -> None:
        self._backend: Any = None

    def log(self, step: int, row: Mapping[str, SupportsFloat]) -> None:
        """Sends one row; its keys start with the name of the CSV file ("eval/success_rate")."""
        if self._backend is not None:
            self._guard(lambda: self._log(step, row))

    def close(self) -> None:
        """Finishes what was logged."""
        if self._backend is not None:
            self._guard(self._close)

    def _log(self, step: int, row: Mapping[str, SupportsFloat]) -> None:
        raise NotImplementedError

    def _close(self) -> None:
        raise NotImplementedError

    def _guard(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # An optional service may fail in any way.
            self._backend = None
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            print(f"{self.name} is off for the rest of this run: {reason}", file=sys.stderr)


def usable_wandb(mode: str) -> str:
    """Returns the mode of wandb: the one given, or "disabled" after a line on stderr that says why wandb is off."""
    if mode == "disabled":
        return mode
    try:
        import wandb

        trouble = "" if hasattr(wandb, "init") else "it is not installed; pip install wandb"
    except Exception as error:  # An optional service may fail in any way.
        missing = isinstance(error, ModuleNotFoundError) and error.name == "wandb"
        trouble = "it is not installed; pip install wandb" if missing else f"{type(error).__name__}: {error}"
    if not trouble and mode == "online" and not _logged_in():
        trouble = "you are not logged in; run: wandb login, or use --wandb=offline"
    if trouble:
        print(f"wandb is off: {' '.join(trouble.split())}", file=sys.stderr, flush=True)
    return "disabled" if trouble else mode


def _logged_in() -> bool:
    """True if wandb finds credentials, or its settings may name a server with others; asks no network."""
    if any(os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")):
        return True
    folder = Path(os.environ.get("WANDB_CONFIG_DIR", "~/.config/wandb")).expanduser()
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    files = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    try:
        found = [netrc.netrc(file) for file in map(os.path.expanduser, files) if os.path.exists(file)]
    except (netrc.NetrcParseError, OSError):
        return True  # wandb reports what is wrong with it.
    return (folder / "settings").exists() or any(file.authenticators(host) for file in found)


class WandbLogger(_Service):
    """A copy of the logged rows in Weights & Biases.

    The wandb id is stored in `run_dir`, so a resumed run continues its wandb run. Rows have their own `step` as x axis,
    because wandb's counter would drop rows that are logged again after resuming.

    Args:
        mode: "disabled" (imports nothing), "online" or "offline" (files under `run_dir`/wandb, for `wandb sync`).
        run_dir: directory of the run; each has a logger and a wandb run of its own.
        description: arguments of `wandb.init`: project, entity, group, name, tags, and config, the resolved flags.
    """

    name = "wandb"

    def __init__(self, mode: str, run_dir: Path, **description: Any):
        super().__init__()
        if mode != "disabled":
            self._guard(lambda: self._start(mode, run_dir, description))

    def _log(self, step: int, row: Mapping[str, SupportsFloat]) -> None:
        self._backend.log({"step": step, **{name: float(value) for name, value in row.items()}})

    def _close(self) -> None:
        self._backend.finish()

    def _start(self, mode: str, run_dir: Path, description: dict[str, Any]) -> None:
        import wandb

        # Random, not a hash of the path: equal paths on two computers must not share a wandb run.
        id_file = run_dir / "wandb_id.txt"
        if not id_file.exists():
            atomic_write_text(id_file, secrets.token_hex(8))
        # Time limits for the server and, at the end, the network; older versions lack the second.
        limits = {"init_timeout": 30, "finish_timeout": 300}
        limits = {name: limit for name, limit in limits.items() if hasattr(wandb.Settings(), name)}
        settings = wandb.Settings(console="off", silent=True, **limits)
        wandb.setup(settings)  # Before the login, so that it does not prompt during a run.
        self._backend = wandb.init(
            id=id_file.read_text(encoding="utf-8").strip(),
            resume="allow" if mode == "online" else None,
            dir=run_dir,
            mode=mode,
            reinit="create_new",
            settings=settings,
            **description,
        )
        self._backend.define_metric("*", step_metric="step")


class TensorboardLogger(_Service):
    """A copy of the logged rows in event files for TensorBoard, written by tensorboardX.

    Each start of a run has a file of its own. It begins with a mark that makes TensorBoard drop the points of earlier
    files after the checkpoint from which the run was resumed: they are logged again.

    Args:
        directory: of the event files.
        step: of the checkpoint from which the run starts; 0 for a new run.
    """

    name = "TensorBoard"

    def __init__(self, directory: Path, step: int):
        super().__init__()
        self._guard(lambda: self._start(directory, step))

    def flush(self) -> None:
        """Makes what was logged durable."""
        if self._backend is not None:
            self._guard(self._backend.flush)

    def _start(self, directory: Path, step: int) -> None:
        # Not SummaryWriter: it writes in a thread, in which errors are lost and which `flush` does not wait for.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        directory.mkdir(parents=True, exist_ok=True)
        # Names have a resolution of a second; the number tells apart what starts within one.
        number = len(list(directory.iterdir()))
        self._backend = EventsWriter(str(directory / "events"), f".{number}")
        start = SessionLog(status=SessionLog.START)
        self._backend.write_event(Event(wall_time=time.time(), step=step + 1, session_log=start))

    def _log(self, step: int, row: Mapping[str, SupportsFloat]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        points = {name: float(value) for name, value in row.items() if not math.isnan(float(value))}
        summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in points.items()])
        self._backend.write_event(Event(wall_time=time.time(), step=step, summary=summary))

    def _close(self) -> None:
        self._backend.close()
        self._backend = None
