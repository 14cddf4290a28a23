"""Start-up and memory of main.py: seconds to the first update, of a run's first and second start; peak memory.

See `experiments.bench`. Each start is a process of its own; the first finds an empty cache of compiled programs.
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
from utils.system.files import ROOT, read_json

GIGABYTE = 1024**2  # in the kilobytes that the system counts memory in


def compare(agent: str, env_name: str, dataset: str | None, overrides: dict[str, str], lanes: list[int]) -> str:
    """Measures a run's first and second start and, for each number of `lanes`, the memory of one update.

    Args:
        agent: agent file. env_name: task. dataset: a file; None: what main.py finds. overrides: agent settings.
        lanes: numbers of seeds side by side.

    Returns:
        the tables, in Markdown.

    Raises:
        UserError: a start failed.
    """
    own = [f"--agent={agent}", f"--env_name={env_name}", *([f"--dataset={dataset}"] if dataset else [])]
    own += [f"--agent.{key}={value}" for key, value in overrides.items()]
    counts = sorted({1, *lanes})
    with tempfile.TemporaryDirectory() as directory, tqdm(total=1 + len(counts), desc="starts", unit="start") as bar:
        seconds, peaks = [], {}
        for name, steps, seeds in [("starts", 1, 1), ("starts", 2, 1), *((f"{n} seeds", 1, n) for n in counts[1:])]:
            flags = [*own, f"--save_dir={directory}", f"--run_group={name}", f"--num_seeds={seeds}"]
            until, peaks[seeds] = start(flags, Path(directory), name, steps)
            seconds.append(until)
            bar.update()
        data = read_json(next(Path(directory).rglob("flags.json")))["dataset"]
    title = f"## Start-up and memory, {Path(agent).stem} on {env_name}"
    lines = [title, "", f"{data['file']}, {data['transitions']} transitions; one process each.", ""]
    lines += ["| | seconds to the first update |", "|---|---|"]
    lines += [
        f"| {name} | {value:.1f} |" for name, value in zip(("first start", "second start"), seconds, strict=False)
    ]
    lines += ["", "| seeds side by side | peak memory, GB |", "|---|---|"]
    return "\n".join(lines + [f"| {n} | {peaks[n] / GIGABYTE:.1f} |" for n in counts])


def start(flags: list[str], directory: Path, group: str, steps: int) -> tuple[float, int]:
    """Trains from where a run is to `steps` updates: seconds until their row is logged, and peak memory (kB).

    Raises:
        UserError: it failed.
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
            said = (log.read().splitlines() or [f"exit code {child.returncode}"])[-1]
            raise UserError(f"main.py, which was to be measured, failed: {said}")
    return until, used.ru_maxrss


def _updates_logged(group: Path) -> int:
    """The last step in the train.csv of a group's first run; 0 if there is none yet."""
    path = next(group.rglob("train.csv"), None) if group.exists() else None
    table = read_csv(path) if path else {}
    return int(table["step"][-1]) if table else 0
