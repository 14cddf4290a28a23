"""The metrics of the active runs: their CSV files, wandb, TensorBoard and a user's hook, and the progress bar."""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from envs.minari_store import reference_scores
from utils.output.loggers import CsvLogger, ProgressBar, TensorboardLogger, WandbLogger
from utils.run.directory import RunDirectory
from utils.run.runs import Runs
from utils.run.update_loop import NOT_FINITE, capped_warning

OnMetrics = Callable[[Path, str, int, Mapping[str, float]], None]  # (run's directory, CSV file, step, row)
FILES = ("train", "eval", "timing")
# Of files whose later rows may have more columns than the first.
COLUMNS = {
    "eval": ("episodes", "return_mean", "length_mean", "success_rate"),
    "online": ("return", "length", "success"),
}


class MetricLoggers:
    """Loggers of all active runs. Use as a context manager.

    Args:
        runs: of the command.
        positions: lengths of the CSV files in the checkpoint of each active run, by name; none for new runs.
        step: of that checkpoint. on_metrics: called with every row after it is written.
    """

    def __init__(
        self, runs: Runs, positions: Sequence[Mapping[str, int]], step: int, on_metrics: OnMetrics | None = None
    ):
        files = (*FILES, "online") if runs.config.online_steps else FILES
        columns = dict(COLUMNS)
        if reference_scores(runs.task.name):
            columns["eval"] = (*COLUMNS["eval"], "normalized_score")
        self._runs, self._on_metrics = runs, on_metrics
        self._csv = [
            {name: CsvLogger(run.path / f"{name}.csv", known.get(name), columns.get(name)) for name in files}
            for run, known in zip(runs.active, positions or [{}] * len(runs.active), strict=True)
        ]
        self._wandb = [self._open_wandb(run) for run in runs.active]
        active = runs.active if runs.config.tensorboard else ()
        self._tensorboard = [TensorboardLogger(run.path / "tensorboard", step) for run in active]
        self._bar = ProgressBar(runs.config.total_steps, initial=step, show=runs.config.progress)
        self._warned: set[int] = set()
        self._seconds, self._updates = 0.0, 0

    def _open_wandb(self, run: RunDirectory) -> WandbLogger:
        config, agent, seed = self._runs.config, run.path.parent.name, run.path.name
        name = config.wandb_name or f"{agent}-{config.env_name}-{seed}"
        if config.wandb_name and len(self._runs.all) > 1:
            name = f"{name}-{agent}-{seed}"
        return WandbLogger(
            self._runs.wandb,
            run.path,
            project=config.wandb_project,
            entity=config.wandb_entity,
            group=config.run_group,
            name=name,
            tags=[tag.strip() for tag in config.wandb_tags.split(",") if tag.strip()],
            config=run.settings,
        )

    def write(self, index: int, name: str, step: int, row: Mapping[str, float]) -> None:
        """Appends a row to the file <name>.csv of a run; warns once if its couplings do not converge."""
        self._csv[index][name].log(step, row)
        for service in self._services(index):
            service.log(step, {f"{name}/{key}": value for key, value in row.items()})
        path = self._runs.active[index].path
        if index not in self._warned and (warning := capped_warning(row)):
            self._warned.add(index)
            print(f"warning: {path}, step {step}: {warning}", file=sys.stderr)
        if self._on_metrics:
            self._on_metrics(path, name, step, row)

    def write_training(
        self, start: int, step: int, info: Mapping[str, Any], seconds: float, updates: int, due: bool
    ) -> list[int]:
        """Counts updates, shows their losses, and appends rows to train.csv and timing.csv if `due`.

        Args:
            start, step: first and last step. info: of the updates, each [runs], on the host; empty without updates.
            seconds, updates: duration and number of the updates.

        Returns:
            the alive runs whose losses or parameters are not finite; they get a row in any case.
        """
        self._seconds, self._updates = self._seconds + seconds, self._updates + updates
        flags = info.get(NOT_FINITE, [0.0] * len(self._csv))
        info = {name: values for name, values in info.items() if name != NOT_FINITE}
        self._bar.update(
            step - start, {name: float(values[0]) for name, values in info.items() if name.endswith("loss")}
        )
        diverged, due = [index for index in self._runs.alive if flags[index]], due and bool(info)
        for index in self._runs.alive if due else diverged:
            self.write(index, "train", step, row_of(info, index))
            # Wall-clock times have their own file: the others must resume to the same bytes.
            self.write(index, "timing", step, {"seconds": self._seconds, "updates": self._updates})
        if due:
            self._seconds, self._updates = 0.0, 0
        return diverged

    def _services(self, index: int) -> list[WandbLogger | TensorboardLogger]:
        return [self._wandb[index], *self._tensorboard[index : index + 1]]

    def positions(self, index: int) -> dict[str, int]:
        """Returns the lengths of a run's CSV files, once these bytes are durable."""
        for tensorboard in self._tensorboard[index : index + 1]:
            tensorboard.flush()
        return {name: file.position() for name, file in self._csv[index].items()}

    def __enter__(self) -> "MetricLoggers":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._bar.close()
        for index, files in enumerate(self._csv):
            for file in files.values():
                file.close()
            for service in self._services(index):
                service.close()


def row_of(info: Mapping[str, Any], index: int) -> dict[str, float]:
    """Returns one run's row of infos, each [runs]."""
    return {name: float(values[index]) for name, values in info.items() if name != NOT_FINITE}
