"""Golden runs: small commands whose numbers a change of the code must not move by a single bit.

    python tests/golden.py record DIR [--jobs=2]
    python tests/golden.py compare DIR [--only=TEXT] [--jobs=2]

`record` runs the commands of golden_cases.py with the code of this checkout and keeps in the new directory DIR their
data and runs, the help of the README's commands, and manifest.json: the commands, the commit, versions and processor.
`compare` runs the recorded commands with the code of this checkout. CSV files (except seconds), datasets, the settings
of the agent and the agent of the last checkpoint must be equal. A line is printed for each case and way; the exit code
is 1 if one differs.

    anew              in an empty directory
    finished          in a copy of the recorded run: the command must say so and change no file
    resumed           in a copy of the recorded run as of its last checkpoint but one
    SIGTERM, SIGKILL  in an empty directory, interrupted at a step and started again
    flags             the recorded flags of a command are all there, with their defaults

DIR must stay where it was recorded: some commands start from runs in it, which are known by their path.
"""

import argparse
import functools
import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import golden_cases
from run_contents import contents, difference, files, runs, timings

# Recorded name → name now, of columns of CSV files, settings and keys in a checkpoint's agent.
RENAMED: dict[str, str] = {}
FINISHED = "finished before"  # A command says it of a finished run.

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 600  # Seconds for a command.
PACKAGES = ("jax", "jaxlib", "numpy", "mujoco", "flax", "optax", "ott-jax", "gymnasium", "ogbench", "scipy")


class Failed(Exception):
    """A command that ended otherwise than it should."""


def run(golden: Path, command: Sequence[str], save: Path = ROOT, signum: int = 0, expected: int = 0) -> str:
    """Runs a command of this checkout, and sends it a signal at a step if `signum` says so; returns what it prints.

    Raises:
        Failed: its exit code is not the expected one.
    """
    filled = [part.replace("{dir}", str(golden)).replace("{save}", str(save)) for part in command]
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_", "OTQL_"))
    } | {
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(golden / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "SPOT_SIZE": "16",
        "FORK_SECONDS": "0.03" if signum else "0",  # So that there is time for the signal.
    }
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen([sys.executable, *filled], cwd=ROOT, env=environment, stdout=out, stderr=err)
        try:
            while signum and process.poll() is None:
                logged = "".join(path.read_text() for path in save.rglob("train.csv"))
                if any(int(step) >= golden_cases.INTERRUPT_AT for step in re.findall(r"(?m)^(\d+),", logged)):
                    process.send_signal(signum)
                    break
                time.sleep(0.02)
            code = process.wait(LIMIT)
        finally:
            process.kill()
        said, complaints = ((file.seek(0), file.read())[1] for file in (out, err))
    if code != expected:
        raise Failed(f"exit code {code}, not {expected}: {' | '.join(complaints.splitlines()[-2:])}")
    return said + complaints


def check(golden: Path, scratch: Path, name: str, command: Sequence[str], way: str) -> str:
    """Runs a recorded command in one of the ways; says what is wrong with what it leaves, '' if nothing."""
    recorded, save, kept = golden / "runs" / name, scratch / f"{name}-{way}", {}
    if way in ("finished", "resumed"):
        shutil.copytree(recorded, save)
    if way == "finished":
        said = run(golden, command, save)
        return difference(files(recorded), files(save)) or ("" if FINISHED in said else f"it says {said[-200:]!r}")
    if way == "resumed":
        for directory, checkpoints in runs(save):
            checkpoints[-1].unlink()
            (directory / "summary.json").unlink()
    if way.startswith("SIG"):
        signum = signal.Signals[way]
        run(golden, command, save, signum, -signum if signum == signal.SIGKILL else 128 + signum)
    if way != "anew":
        kept = timings(save)
    run(golden, command, save)
    lost = [path.relative_to(save) for path, rows in kept.items() if not path.read_bytes().startswith(rows)]
    return f"started over: {lost[0]}" if lost else difference(contents(recorded, RENAMED), contents(save, {}))


def help_of(golden: Path, command: Sequence[str]) -> str:
    """Returns the help of a command, without the place of this checkout."""
    return run(golden, (*command, "--help")).replace(str(ROOT), ".")


def flags_of(text: str) -> dict[str, str]:
    """Returns the flags in a help and their defaults."""
    parts = re.split(r"(?m)^  --(?:\[no\])?(\w+):", text)
    defaults = (" ".join(re.findall(r"\(default: (.*)\)", about)) for about in parts[2::2])
    return dict(zip(parts[1::2], defaults, strict=True))


def check_flags(golden: Path, command: Sequence[str]) -> str:
    """Says which recorded flag of a command is gone or has another default; '' if none."""
    old = flags_of((golden / "flags" / f"{command[-1]}.txt").read_text())
    new = flags_of(help_of(golden, command))
    return difference(old, {name: default for name, default in new.items() if name in old})


def machine() -> dict[str, Any]:
    """Returns what numbers depend on besides the code."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpu = sorted(set(re.findall(r"(?m)^(?:model name|flags|Features)\s*: (.*)", info))) or [platform.machine()]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    return {"python": platform.python_version(), **versions, "cores": cores, "cpu": cpu}


def record(golden: Path, jobs: int) -> int:
    """Runs all cases and keeps what they leave; returns the exit code."""
    golden_cases.write_data(golden / "data")
    known = run(golden, ("main.py", "--agent=agents/none.py"), expected=2).partition("use one of")[2]
    commands: dict[str, Sequence[str]] = {}
    with ThreadPoolExecutor(jobs) as pool:
        for group in golden_cases.groups(re.findall(r"agents/(\w+)\.py", known)):
            for _ in pool.map(lambda item: run(golden, item[1], golden / "runs" / item[0]), group.items()):
                pass  # Raises what a command raised.
            commands |= group
            print("recorded:", ", ".join(group), flush=True)
            if "collect_maze" in group:
                collected = golden_cases.MAZE_DATA.replace("{dir}", str(golden))
                golden_cases.write_shards(Path(collected), golden / "data" / "shards")
        (golden / "flags").mkdir()
        helps = pool.map(functools.partial(help_of, golden), golden_cases.COMMANDS)
        for command, text in zip(golden_cases.COMMANDS, helps, strict=True):
            (golden / "flags" / f"{command[-1]}.txt").write_text(text)
    git = [["rev-parse", "HEAD"], ["status", "--porcelain"]]
    commit, changes = (subprocess.check_output(["git", "-C", ROOT, *arguments], text=True) for arguments in git)
    about = {"commit": commit.strip(), "changes": changes.splitlines(), "machine": machine(), "commands": commands}
    (golden / "manifest.json").write_text(json.dumps(about, indent=1) + "\n")
    return 0


def compare(golden: Path, jobs: int, only: str) -> int:
    """Runs the recorded commands in all ways and prints what comes of them; returns the exit code."""
    manifest = json.loads((golden / "manifest.json").read_text())
    scratch = Path(tempfile.mkdtemp(prefix="otql-golden-"))
    print(f"recorded from {manifest['commit'][:9]}; scratch directory {scratch}")
    if other := difference(manifest["machine"], machine()):
        print(f"warning: recorded elsewhere, numbers may differ for that reason: {other}")
    checks: dict[str, Callable[[], str]] = {}
    for name, command in manifest["commands"].items():
        ways = ["anew"] if command[0] == "-m" else ["anew", "finished", "resumed"]
        for way in ways + ["SIGTERM", "SIGKILL"] * (name == golden_cases.INTERRUPTED):
            checks[f"{name} {way}"] = functools.partial(check, golden, scratch, name, command, way)
    for command in golden_cases.COMMANDS:
        checks[f"{command[-1]} flags"] = functools.partial(check_flags, golden, command)
    checks = {name: call for name, call in checks.items() if only in name}

    def timed(call: Callable[[], str]) -> tuple[str, float]:
        clock = time.monotonic()
        try:
            wrong = call()
        except Exception as error:  # Whatever the code that is compared has left.
            wrong = f"{type(error).__name__}: {error}"
        return wrong, time.monotonic() - clock

    clock, failed = time.monotonic(), 0
    with ThreadPoolExecutor(jobs) as pool:
        for name, (wrong, seconds) in zip(checks, pool.map(timed, checks.values()), strict=True):
            failed += bool(wrong)
            print(f"{name:36} {seconds:6.1f} s  {wrong or 'equal'}", flush=True)
    print(f"{len(checks) - failed} of {len(checks)} equal, {time.monotonic() - clock:.0f} s")
    if not failed:
        shutil.rmtree(scratch)
    return 0 if checks and not failed else 1


def main() -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["record", "compare"])
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--only", default="", help="compare: only lines whose name contains this text")
    parser.add_argument("--jobs", type=int, default=2, help="commands at a time")
    asked = parser.parse_args()
    golden = asked.directory.resolve()
    if golden.exists() != (asked.command == "compare"):
        parser.error(f"{golden} {'exists already' if golden.exists() else 'does not exist'}")
    return record(golden, asked.jobs) if asked.command == "record" else compare(golden, asked.jobs, asked.only)


if __name__ == "__main__":
    sys.exit(main())
