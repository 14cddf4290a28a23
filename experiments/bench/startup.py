"""Start-up time and memory of main.py: seconds to the first update of a new and a resumed run, and peak memory.

See `experiments.bench`. Each start is a process of its own; the first one has an empty compilation cache.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

from utils.errors import UserError
from utils.output.loggers import read_csv
from utils.output.tables import markdown_table
from utils.system.files import ROOT, read_json

GIGABYTE = 1024**2  # In kilobytes, the unit of `ru_maxrss`.


def compare(agent: str, env_name: str, dataset: str | None, overrides: dict[str, str], counts: list[int]) -> str:
    """Measures a run's first and second start, and the peak memory of one update for each number of seeds.

    Args:
        agent: agent file.
        env_name: task.
        dataset: a file; None for the one that main.py finds.
        overrides: agent settings, field → text.
        counts: numbers of seeds in parallel; 1 is always measured.

    Returns:
        two tables in Markdown.

    Raises:
        UserError: a start failed.
    """
    own = [f"--agent={agent}", f"--env_name={env_name}", *([f"--dataset={dataset}"] if dataset else [])]
    own += [f"--agent.{key}={value}" for key, value in overrides.items()]
    counts = sorted({1, *counts})
    with tempfile.TemporaryDirectory() as directory, tqdm(total=1 + len(counts), desc="starts", unit="start") as bar:
        seconds, peaks = [], {}
        for name, steps, seeds in [("starts", 1, 1), ("starts", 2, 1), *((f"{n} seeds", 1, n) for n in counts[1:])]:
            flags = [*own, f"--save_dir={directory}", f"--run_group={name}", f"--num_seeds={seeds}"]
            until, peaks[seeds] = start(flags, Path(directory), name, steps)
            seconds.append(until)
            bar.update()
        data = read_json(next(Path(directory).rglob("flags.json")))["dataset"]
    title = f"## Start-up and memory, {Path(agent).stem} on {env_name}"
    starts = [[name, f"{value:.1f}"] for name, value in zip(("first", "second"), seconds, strict=False)]
    memory = [[str(n), f"{peaks[n] / GIGABYTE:.1f}"] for n in counts]
    return "\n\n".join(
        [
            title,
            f"{data['file']}, {data['transitions']} transitions; one process each.",
            markdown_table(["start", "seconds to the first update"], starts),
            markdown_table(["seeds in parallel", "peak memory, GB"], memory),
        ]
    )


def start(flags: list[str], directory: Path, group: str, steps: int) -> tuple[float, int]:
    """Starts or resumes a run and trains it to `steps` updates.

    Returns:
        seconds until the row of the last update is logged, and the peak memory in kB.

    Raises:
        UserError: main.py failed.
    """
    command = [sys.executable, str(ROOT / "main.py"), *flags, f"--offline_steps={steps}", "--log_interval=1"]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(directory / "compiled")}
    with (directory / "log").open("w+", encoding="utf-8") as log:
        clock, until = time.perf_counter(), None
        child = subprocess.Popen([*command, "--eval_episodes=0"], stdout=log, stderr=log, env=environment)
        ended = 0
        while not ended:
            ended, status, used = os.wait4(child.pid, os.WNOHANG)
            if until is None and _updates_logged(directory / group) >= steps:
                until = time.perf_counter() - clock
            time.sleep(0.02)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode or until is None:
            log.seek(0)
            message = (log.read().splitlines() or [f"exit code {child.returncode}"])[-1]
            raise UserError(f"main.py failed: {message}")
    return until, used.ru_maxrss


def _updates_logged(group: Path) -> int:
    """Returns the last step in the train.csv of a group's first run, 0 without one."""
    path = next(group.rglob("train.csv"), None) if group.exists() else None
    table = read_csv(path) if path else {}
    return int(table["step"][-1]) if table else 0
