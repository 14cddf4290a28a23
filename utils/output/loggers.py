"""Where numbers go: CSV files that resume exactly, a progress bar, and optionally wandb."""

import csv
import io
import math
import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsFloat

import numpy as np
from tqdm import tqdm

from utils.errors import UserError
from utils.system.files import atomic_write_text, disk_errors


class CsvLogger:
    """Appends rows to a CSV file, each one on disk for other readers as soon as `log` returns.

    The first column is `step`, the others are `columns`, or the keys of the first row. A key that is not known yet then
    is given as NaN: columns stay fixed, because byte positions in earlier checkpoints must stay good. A file of an
    earlier version may lack columns: what has none is left out, which is said once.

    To resume, store `position()` in the checkpoint and open with it: rows written later are cut off and will be
    written again. Opened without (or with 0) the file starts anew.

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
            # Unbuffered, so that a row the disk refused is not tried again on closing.
            self._file = open(path, "r+b" if kept else "wb", buffering=0)  # noqa: SIM115
            if kept:
                self._file.truncate(len(kept))
                self._file.seek(len(kept))
        self._resumed = self._has_header = bool(kept)
        self._told = False

    def log(self, step: int, row: Mapping[str, SupportsFloat]) -> None:
        """Appends one row; numbers are written so that they read back bit for bit, NaN and missing keys as empty.

        Raises:
            UserError: the disk is full.
            ValueError: `row` has a key without a column, in a file that was not resumed.
        """
        lines = []
        self._columns = self._columns or ["step", *row]
        if unknown := sorted(row.keys() - set(self._columns)):
            if not self._resumed:
                raise ValueError(f"{self.path.name}: no column for {unknown}; give it as NaN in the first row")
            if not self._told:
                print(f"{self.path}: it has no column for {', '.join(unknown)}, which is left out", file=sys.stderr)
            self._told = True
        if not self._has_header:
            lines.append(self._columns)
            self._has_header = True
        lines.append([str(step), *(_cell(row.get(column, math.nan)) for column in self._columns[1:])])
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(lines)
        data = text.getvalue().encode()
        with disk_errors(self.path):
            while data:
                data = data[self._file.write(data) :]

    def position(self) -> int:
        """Length of the file in bytes, once these bytes are durable; for the checkpoint."""
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
    """The first `position` bytes of `path`; the whole rows among them, with a warning, if the file was altered."""
    if not position:
        return b""
    data = path.read_bytes()[:position] if path.exists() else b""
    if len(data) == position and data.endswith(b"\n"):
        return data
    # Rows are lost, but the checkpoint is not: going on is worth more to the user than stopping.
    data = data[: data.rfind(b"\n") + 1]
    print(f"{path}: rows logged before the checkpoint are missing, going on after {len(data)} bytes", file=sys.stderr)
    return data


def read_csv(path: Path) -> dict[str, np.ndarray]:
    """Reads a file of `CsvLogger`: column name → float64 [rows]; an empty cell is NaN.

    A last line without its newline, half written by a live or killed run, is left out. No rows: an empty dict.

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
        raise UserError(f"{path} is damaged ({error}); mend the lines that are not numbers") from error


class ProgressBar:
    """Progress with rate, ETA and a few metrics: a bar on a terminal, else a line every 30 s at most.

    Args:
        total: updates of the whole run.
        initial: updates done before, by the run that this one resumes; not counted in the rate.
    """

    def __init__(self, total: int, initial: int = 0, description: str = "", unit: str = " updates"):
        terminal = sys.stderr.isatty()
        interval = 0.5 if terminal else 30.0
        self._bar = tqdm(
            total=total,
            initial=initial,
            desc=f"{description}: " if description else None,
            unit=unit,
            file=sys.stderr if terminal else _Lines(sys.stderr),
            dynamic_ncols=terminal,
            # A bar drawn in a log file is noise.
            bar_format=None if terminal else "{desc}{n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]",
            miniters=1,
            mininterval=interval,
            maxinterval=interval,
        )

    def update(self, count: int, metrics: Mapping[str, SupportsFloat] | None = None) -> None:
        """Counts `count` more updates and shows `metrics` (kept until the next ones) at three digits."""
        if metrics:
            self._bar.set_postfix({name: f"{float(value):.3g}" for name, value in metrics.items()}, refresh=False)
        self._bar.update(count)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        self._bar.close()

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Lines:
    """A text stream in which what tqdm redraws in place becomes a line of its own."""

    def __init__(self, stream: Any):
        self._stream = stream
        self.encoding = getattr(stream, "encoding", None)

    def write(self, text: str) -> None:
        text = text.replace("\x1b[A", "").strip()  # cursor moves between nested bars
        if text:
            self._stream.write(text + "\n")

    def flush(self) -> None:
        self._stream.flush()


class WandbLogger:
    """Mirrors rows to Weights & Biases; whatever goes wrong there costs one warning line and never the run.

    The wandb id is kept in `run_dir`, so a resumed run goes on with its wandb run. Rows carry their own `step` as x
    axis: rows logged again after a resume are accepted, where wandb's counter would drop them.

    Args:
        mode: "disabled" (imports nothing), "online" or "offline" (files under `run_dir`/wandb, for `wandb sync`).
        run_dir: one logger and one wandb run per directory; several may be open at once.
        group: wandb group, e.g. the run group.
        name: display name.
        config: resolved flags.
    """

    def __init__(self, mode: str, run_dir: Path, group: str, name: str, config: Mapping[str, Any]):
        self._run: Any = None  # wandb's, which may not be installed
        if mode != "disabled":
            self._guard(lambda: self._start(mode, run_dir, group=group, name=name, config=dict(config)))

    def log(self, step: int, row: Mapping[str, SupportsFloat]) -> None:
        """Sends one row; put the CSV's name in front of its keys ("eval/success_rate")."""
        if self._run is not None:
            self._guard(lambda: self._run.log({"step": step, **{name: float(value) for name, value in row.items()}}))

    def close(self) -> None:
        """Finishes the run on the server, if there is one."""
        if self._run is not None:
            self._guard(lambda: self._run.finish())

    def _start(self, mode: str, run_dir: Path, **description: Any) -> None:
        import wandb

        # Random, not a hash of the path: equal paths on two computers must not end up in one wandb run.
        id_file = run_dir / "wandb_id.txt"
        if not id_file.exists():
            atomic_write_text(id_file, secrets.token_hex(8))
        # Bounds on waiting for the server and, at the end, for a dead network; older versions lack the second.
        limits = {"init_timeout": 30, "finish_timeout": 300}
        limits = {name: limit for name, limit in limits.items() if hasattr(wandb.Settings(), name)}
        settings = wandb.Settings(console="off", silent=True, **limits)
        wandb.setup(settings)  # silent before the login too: no prompt in the middle of a run
        self._run = wandb.init(
            project="otql",
            id=id_file.read_text(encoding="utf-8").strip(),
            resume="allow" if mode == "online" else None,
            dir=run_dir,
            mode=mode,
            reinit="create_new",
            settings=settings,
            **description,
        )
        self._run.define_metric("*", step_metric="step")

    def _guard(self, call: Any) -> None:
        try:
            call()
        except Exception as error:  # any failure of an optional service
            self._run = None
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            print(f"wandb is off for the rest of this run: {reason}", file=sys.stderr)
