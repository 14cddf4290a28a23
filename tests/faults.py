"""Disturbs runs at random moments and compares what they end in with undisturbed ones.

    python tests/faults.py

Each trial starts a command, lets something happen to it at one or two random moments, reruns the same command to its
end, and compares CSV files and final checkpoint with those of an undisturbed run, bit for bit. A table of all trials is
printed; the exit code is 1 if one of them differs, leaves a traceback, or ends otherwise than it should.
"""

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
sys.path[:0] = [str(ROOT), str(TESTS)]

from faulty_env import write_data  # noqa: E402
from tiny_runs import assert_same_tree  # noqa: E402

from utils.run import checkpoints  # noqa: E402

SMALL = (
    *("--env_name=gym:faulty_env:Track-v0", "--preset=none", "--agent.batch_size=16", "--agent.num_qs=2"),
    *("--agent.actor_hidden_dims=16,16", "--agent.value_hidden_dims=16,16", "--horizon_length=3", "--eval_workers=1"),
    *("--log_interval=50", "--save_interval=100", "--eval_interval=200", "--eval_episodes=4", "--env_timeout=3"),
)
OFFLINE, ONLINE = ("--offline_steps=1500",), ("--offline_steps=300", "--online_steps=600", "--start_training=30")
SCENARIOS = {
    "offline": ("main.py", "--agent=agents/otql.py", *OFFLINE),
    "offline to online": ("main.py", "--agent=agents/otql.py", *ONLINE),
    "post-training": (
        "online_main.py",
        "--agent=agents/fql.py",
        "--rollout_steps=200",
        "--online_steps=600",
        "--utd_ratio=2",
    ),
    "several seeds": ("main.py", "--agent=agents/otql.py", *ONLINE, "--num_seeds=2", "--vary=agent.lam=0.5,2"),
}
# What happens → exit codes that are right after it (0: the run was over before).
FAULTS = {
    "SIGKILL": (-signal.SIGKILL, 0),
    "SIGTERM": (128 + signal.SIGTERM, -signal.SIGTERM, 0),
    "SIGINT": (128 + signal.SIGINT, 0),
    "full disk": (2, 0),
    "hang": (2, 0),
    "hang, then SIGTERM": (128 + signal.SIGTERM, -signal.SIGTERM, 2, 0),
    "crash": (2, 0),
}
SECONDS_TO_LEAVE = 10


class Trial:
    """A command in a directory of its own, and the variables it runs with."""

    def __init__(self, scenario: str, work: Path, save_dir: Path):
        program, *flags = SCENARIOS[scenario]
        if program == "online_main.py":
            flags += [f"--base_checkpoint={work / 'base/debug/gym_faulty_env_Track-v0/bc/sd0'}", "--distill_steps=100"]
        data = f"--dataset={work / 'data.npz'}"
        self.command = [sys.executable, str(ROOT / program), *SMALL, *flags, data, f"--save_dir={save_dir}"]
        self.save_dir, self.file, self.log = save_dir, work / "fault", work / "log.txt"
        self.environ = os.environ | {"PYTHONPATH": str(TESTS), "FAULT_FILE": str(self.file)}
        self.environ |= {"JAX_COMPILATION_CACHE_DIR": str(work / "cache")}

    def start(self) -> subprocess.Popen:
        """Starts the command; its output goes to the log."""
        with self.log.open("w") as log:
            return subprocess.Popen(self.command, env=self.environ, stdout=log, stderr=log)

    def finish(self) -> float:
        """Runs the command to its end; returns the seconds that it took."""
        clock = time.monotonic()
        code = self.start().wait()
        assert code == 0, f"exit code {code}: {self.log.read_text()[-2000:]}"
        return time.monotonic() - clock

    def disturb(self, fault: str, delay: float) -> tuple[int, float]:
        """Starts the command and lets `fault` happen after `delay` seconds; returns exit code and seconds until it."""
        process = self.start()
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(delay), 0.0
        clock, filler = time.monotonic(), self.save_dir / "filler"
        try:
            if fault.startswith("SIG"):
                process.send_signal(signal.Signals[fault])
            elif fault == "full disk":
                fill(filler)
            else:
                self.file.write_text("exit 2" if fault == "crash" else "hang 2")
                if fault.endswith("SIGTERM"):
                    time.sleep(1)
                    clock = time.monotonic()
                    process.send_signal(signal.SIGTERM)
            code = process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise AssertionError(f"still running 60 s after {fault}: {self.log.read_text()[-1000:]}") from None
        finally:
            self.file.unlink(missing_ok=True)
            filler.unlink(missing_ok=True)
        return code, time.monotonic() - clock


def fill(path: Path) -> None:
    """Writes until the disk is full."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(2**16))
    with contextlib.suppress(OSError), path.open("ab", buffering=0) as file:
        while True:
            file.write(bytes(16))


@contextlib.contextmanager
def small_disk(path: Path) -> Iterator[None]:
    """Mounts a file system of 64 MB at `path`, which takes root."""
    path.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(path)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(path)], check=True)


def assert_same(save_dir: Path, other: Path) -> None:
    """All runs below two directories ended in the same rows and the same agent."""
    found = sorted(path.parent.relative_to(other) for path in other.rglob("summary.json"))
    assert found == sorted(path.parent.relative_to(save_dir) for path in save_dir.rglob("summary.json"))
    for run in found:
        for name in ("train.csv", "eval.csv", "online.csv"):
            if (other / run / name).exists():
                assert (save_dir / run / name).read_bytes() == (other / run / name).read_bytes(), f"{run}/{name}"
        (step, state), (other_step, other_state) = (
            checkpoints.load_latest(root / run / "checkpoints") for root in (save_dir, other)
        )
        assert step == other_step
        assert_same_tree(state["agent"], other_state["agent"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=56)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("/tmp/otql_faults"))
    arguments = parser.parse_args()
    work, rng = arguments.work.resolve(), random.Random(arguments.seed)
    work.mkdir(parents=True, exist_ok=True)
    write_data(work / "data.npz")
    base = Trial("offline", work, work / "base")
    base.command[2:] = [flag for flag in base.command[2:] if not flag.startswith("--agent")]
    networks = ("--agent=agents/bc.py", "--agent.batch_size=16", "--agent.actor_hidden_dims=16,16")
    base.command += [*networks, "--offline_steps=300"]
    base.finish()
    seconds = {}
    for scenario in SCENARIOS:
        trial = Trial(scenario, work, work / "undisturbed" / scenario)
        trial.finish()  # Also compiles, so that the next start takes as long as those of the trials.
        timed = Trial(scenario, work, work / "timed" / scenario)
        seconds[scenario] = timed.finish()
        assert_same(timed.save_dir, trial.save_dir)
    print("undisturbed:", {scenario: round(value, 1) for scenario, value in seconds.items()}, flush=True)
    failed = 0
    for number in range(arguments.trials):
        scenario = list(SCENARIOS)[number % len(SCENARIOS)]
        faults = [list(FAULTS)[number // len(SCENARIOS) % len(FAULTS)], *rng.choices(list(FAULTS), k=number % 2)]
        disk = small_disk(work / "disk") if "full disk" in faults else contextlib.nullcontext()
        with disk:
            save_dir = work / ("disk" if "full disk" in faults else f"trial{number}")
            trial, notes = Trial(scenario, work, save_dir), []
            try:
                for fault in faults:
                    delay = rng.uniform(0.5, seconds[scenario])
                    code, left = trial.disturb(fault, delay)
                    notes.append(f"{fault} at {delay:.1f} s: {code} after {left:.1f} s")
                    text = trial.log.read_text()
                    assert code in FAULTS[fault], f"exit code {code}: {text[-1000:]}"
                    assert "Traceback" not in text, text[-3000:]
                    if "SIG" in fault:
                        assert left < SECONDS_TO_LEAVE, f"left after {left:.1f} s: {text[-1000:]}"
                trial.finish()
                assert_same(save_dir, work / "undisturbed" / scenario)
                outcome = "equal"
            except AssertionError as error:
                failed, outcome = failed + 1, f"FAILED: {error}"
            print(f"{number:3d} | {scenario} | {'; '.join(notes)} | {outcome}", flush=True)
    print(f"{arguments.trials - failed} of {arguments.trials} trials end in the same numbers")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
