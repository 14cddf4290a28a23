"""Plants the faults of mutants.toml one at a time in a copy of the project and runs the tests that must fall.

    python tests/mutants.py [--list] [--baseline] [--jobs=N] [names or their beginnings]

A fault that its tests do not see survives. One whose text no longer stands in its file, or whose tests end in another
way than by failing (none collected, an error of usage), is an error. Either ends the program with exit code 1.
"""

import argparse
import compileall
import os
import py_compile
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 300.0  # Seconds; tests that take longer hang, which is a way to fall.
CAUGHT, SURVIVED, ERROR = "caught", "SURVIVED", "ERROR"


@dataclass(frozen=True)
class Mutant:
    """A fault of one line.

    Attributes:
        name: unique, '<area>: <what is wrong>'. path: of the file. text, replacement: within a line of it.
        tests: ids of the tests of which one must fall. occurrence: which one, from 1; None: there is one only.
    """

    name: str
    path: str
    text: str
    replacement: str
    tests: tuple[str, ...]
    occurrence: int | None = None

    def applied(self, source: str) -> str:
        """Returns the source with the fault.

        Raises:
            ValueError: the text is not in it, or in more places than one, or not within a line.
        """
        parts, number = source.split(self.text), self.occurrence or 1
        if "\n" in self.text + self.replacement:
            raise ValueError("text and replacement must stand within a line")
        if number >= len(parts) or (self.occurrence is None and len(parts) > 2):
            raise ValueError(f"its text stands in {len(parts) - 1} places of {self.path}")
        return self.text.join(parts[:number]) + self.replacement + self.text.join(parts[number:])


def load(path: Path) -> list[Mutant]:
    """Returns the faults of a file.

    Raises:
        ValueError: two have one name.
    """
    entries = tomllib.loads(path.read_text(encoding="utf-8"))["mutant"]
    found = [Mutant(**{key: tuple(value) if key == "tests" else value for key, value in e.items()}) for e in entries]
    names = [mutant.name for mutant in found]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"{path} has two faults with the name '{min(twice)}'")
    return found


def copy_tracked(root: Path, target: Path) -> None:
    """Copies the files that git knows, as they are now."""
    listed = subprocess.run(["git", "-C", root, "ls-files", "-z"], capture_output=True, check=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (root / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, target / name)
    # Told by hash: a fault of equal length, planted within a second, has its original's time and size.
    compileall.compile_dir(target, quiet=2, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH)


def run_tests(tree: Path, tests: Iterable[str], compiled: Path, limit: float | None) -> tuple[int | None, str]:
    """Runs tests in a copy; returns pytest's exit code, None if it took longer than `limit` s, and the last lines."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(tree),
        "PYTHONDONTWRITEBYTECODE": "1",
        "COLUMNS": "160",
        "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(compiled)),
    }
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    with subprocess.Popen(
        command,
        cwd=tree,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            output, code = process.communicate(timeout=limit)[0], process.returncode
        except subprocess.TimeoutExpired:
            output, code = "", None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # What it started and left.
    return code, "\n".join(output.splitlines()[-15:])


@contextmanager
def planted(mutant: Mutant, tree: Path) -> Iterator[None]:
    """Has the fault in the copy for the length of the block."""
    path = tree / mutant.path
    source = path.read_text(encoding="utf-8")
    path.write_text(mutant.applied(source), encoding="utf-8")
    try:
        yield
    finally:
        path.write_text(source, encoding="utf-8")


def outcome_of(mutant: Mutant, tree: Path, compiled: Path) -> tuple[str, str]:
    """Plants one fault; returns one of CAUGHT, SURVIVED and ERROR, and why."""
    try:
        with planted(mutant, tree):
            code, said = run_tests(tree, mutant.tests, compiled, LIMIT)
    except (ValueError, OSError) as error:
        return ERROR, str(error)
    if code == 0:
        return SURVIVED, f"{mutant.path}: '{mutant.text}' → '{mutant.replacement}' is not seen by {mutant.tests}"
    if code is None:
        return CAUGHT, f"more than {LIMIT:g} s"
    if code != 1:
        return ERROR, f"exit code {code}: {said}"
    return CAUGHT, next((line for line in said.splitlines() if line.startswith(("FAILED", "ERROR"))), "")


def main(arguments: Sequence[str], root: Path = ROOT, file: Path = ROOT / "tests/mutants.toml") -> int:
    """Runs the faults that are asked for; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="names, or their beginnings; default: all")
    parser.add_argument("--list", action="store_true", help="only print names")
    parser.add_argument("--baseline", action="store_true", help="first check that the tests pass without a fault")
    parser.add_argument("--jobs", type=int, default=1, help="faults at a time, each in a copy of its own")
    asked = parser.parse_args(arguments)
    mutants = [m for m in load(file) if not asked.names or m.name.startswith(tuple(asked.names))]
    if asked.list or not mutants:
        print("\n".join(mutant.name for mutant in mutants) or "no fault has such a name")
        return 0 if mutants else 1
    clock, failures = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="otql-mutants-", ignore_cleanup_errors=True) as scratch:
        trees: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for number in range(max(asked.jobs, 1)):
            copy_tracked(root, Path(scratch) / str(number))
            trees.put(Path(scratch) / str(number))
        compiled = Path(scratch) / "compiled"
        if asked.baseline:
            tests = dict.fromkeys(test for mutant in mutants for test in mutant.tests)
            code, said = run_tests(Path(scratch) / "0", tests, compiled, None)
            print(f"without a fault: {said.splitlines()[-1] if said else ''}", flush=True)
            if code:
                print(said)
                return 1

        def plant(mutant: Mutant) -> tuple[str, str, float]:
            tree, begun = trees.get(), time.monotonic()
            try:
                return *outcome_of(mutant, tree, compiled), time.monotonic() - begun
            finally:
                trees.put(tree)

        pool = ThreadPoolExecutor(max(asked.jobs, 1))
        try:
            for mutant, (outcome, why, seconds) in zip(mutants, pool.map(plant, mutants), strict=True):
                print(f"{outcome:8} {seconds:5.1f} s  {mutant.name}\n    {why}", flush=True)
                failures += [f"{outcome}: {mutant.name}"] if outcome != CAUGHT else []
        finally:  # Ctrl-C, too, ends after the faults under way.
            pool.shutdown(cancel_futures=True)
    print(f"{len(mutants)} faults, {len(failures)} not caught, {time.monotonic() - clock:.0f} s", *failures, sep="\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
