"""Measures, in one command and a given time, what the project does on one GPU.

    python -m experiments.gpu_check --minutes=9

Parts, in this order; each one is a process of its own, and what one has found is in --output before the next starts:

    tests     of the losses and the compiled loop, on the device
    trace     jax.profiler on an OTQL update: the ten kernels that take most time
    speed     updates a second of OTQL and FQL with paper networks: the compiled program of many updates with 1 and 8
              seeds, with and without XLA's command buffers for loops, and one jitted update a Python step
    coupling  the same of OTQL on independent pairs: what the coupling takes
    runs      OTQL with the paper's networks over couplings and sources, evaluated as it trains

The dataset of the runs is collected during tests and trace; --dataset names one instead. --output gets report.md with
targets beside the numbers, speed.csv, kernels.csv, runs.csv and the logs. What the time did not suffice for is listed.
A CPU is rejected without --tiny, which is for tests of this command.
"""

import itertools
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from absl import flags

from experiments.bench.updates import clean_environment
from experiments.gpu_check import training
from experiments.gpu_check.children import Budget, child, last_line, measurements, wait
from experiments.gpu_check.page import AGENTS, STEPWISE, Findings, write
from utils.errors import UserError
from utils.system.cli import parse
from utils.system.entry_point import run_main
from utils.system.files import ROOT
from utils.system.jax_setup import PRECISIONS

PARTS = ("tests", "trace", "speed", "coupling", "runs")
# Part → share of the time that is left when it starts.
SHARES = {"tests": 0.14, "trace": 0.12, "speed": 0.55, "coupling": 0.25}
TESTS = ("tests/agents/test_otql.py", "tests/agents/test_fql.py", "tests/utils/run/test_update_loop.py")
TINY_TESTS = ("tests/utils/test_flow.py",)
# XLA's command buffers for loops, whatever its defaults.
BUFFERS = {
    on: f"--xla_gpu_enable_command_buffer={sign}WHILE,{sign}CONDITIONAL" for on, sign in ((True, "+"), (False, "-"))
}
SEEDS = (1, 8)  # in parallel
TINY = {"actor_hidden_dims": "8", "value_hidden_dims": "8", "num_qs": "2", "batch_size": "4"}
TINY_OTQL = {"coupling": "ot", "max_iterations": "2", "best_of_n": "1"}

FLAGS = flags.FlagValues()
flags.DEFINE_float("minutes", 9.0, "Time of the whole command.", lower_bound=0.1, flag_values=FLAGS)
flags.DEFINE_list("part", ["all"], f"What to do: all, or some of {','.join(PARTS)}.", flag_values=FLAGS)
flags.DEFINE_string("output", "exp/gpu_check", "Directory of the report.", flag_values=FLAGS)
flags.DEFINE_string(
    "dataset", None, "Runs: a dataset file of scene-play, instead of a collected one.", flag_values=FLAGS
)
flags.DEFINE_float("seconds", 5.0, "Speed: length of a measurement.", lower_bound=0, flag_values=FLAGS)
flags.DEFINE_enum(
    *("matmul_precision", "tensorfloat32", PRECISIONS),
    "Precision of matrix products.",
    flag_values=FLAGS,
)
flags.DEFINE_bool("tiny", False, "Networks of a few units, on any device: a test of this command.", flag_values=FLAGS)


def chosen_parts() -> list[str]:
    """Returns the parts of --part, in their order.

    Raises:
        UserError: one is unknown.
    """
    named = PARTS if FLAGS.part == ["all"] else FLAGS.part
    if unknown := [name for name in named if name not in PARTS] or (not named and [""]):
        raise UserError(f"--part={unknown[0]}: give all, or some of {', '.join(PARTS)}")
    return [part for part in PARTS if part in named]


def find_machine(environment: dict[str, str]) -> str:
    """Returns a line on versions and device; a child process asks, since JAX reserves most of a GPU's memory.

    Raises:
        UserError: JAX does not start, or finds no GPU and this is not --tiny.
    """
    code = "import jax; from utils.system.jax_setup import device_line; print(jax.default_backend(), device_line())"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, encoding="utf-8"
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise UserError(f"JAX does not start: {lines[-1]}")
    backend, _, line = done.stdout.strip().splitlines()[-1].partition(" ")
    if backend != "gpu" and not FLAGS.tiny:
        raise UserError(f"JAX finds no GPU here ({line}); install jax[cuda12] or jax[cuda13], or try --tiny")
    return f"{line}, {len(os.sched_getaffinity(0))} CPU cores, {FLAGS.matmul_precision} products"


def spec(agent: str, **own: Any) -> dict[str, Any]:
    """Returns a specification for `measure.py`; `settings` among `own` are the agent's."""
    tiny = TINY | (TINY_OTQL if agent == "otql" else {}) if FLAGS.tiny else {}
    return {"agent": agent, "seconds": FLAGS.seconds, **own, "settings": tiny | own.get("settings", {})}


class Check:
    """The parts of one command, and what they have found.

    Args:
        out: directory of the results. budget: of the whole command. machine: line on it.
        environment: of child processes.
    """

    def __init__(self, out: Path, budget: Budget, machine: str, environment: dict[str, str]):
        self.out, self.budget, self.environment = out, budget, environment
        self.findings = Findings(machine)
        self.scale = training.TINY if FLAGS.tiny else training.PAPER
        self.data = [f"--dataset={Path(FLAGS.dataset).expanduser().resolve()}"] if FLAGS.dataset else []

    def seconds(self, part: str) -> float:
        """Returns the time that a part may take."""
        return SHARES[part] * self.budget.left

    def leave_out(self, part: str, problem: str) -> None:
        """Notes why a part has no result, or not all."""
        if problem:
            self.findings.missing.append(f"{part}: {problem}")

    def measure(self, part: str, specs: list[dict[str, Any]], seconds: float, buffers: bool) -> list[dict[str, Any]]:
        """Runs specifications in a child process, with or without command buffers for loops."""
        flags_of_xla = f"{self.environment.get('XLA_FLAGS', '')} {BUFFERS[buffers]}".strip()
        environment = self.environment | {"XLA_FLAGS": flags_of_xla}
        results, problem = measurements(specs, environment, seconds, self.out / f"{part}.log")
        self.leave_out(f"{part}, {'with' if buffers else 'without'} command buffers for loops", problem)
        return results

    def tests(self) -> None:
        """Runs the tests of the losses and of the compiled loop on the device."""
        files, log = TINY_TESTS if FLAGS.tiny else TESTS, self.out / "tests.log"
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
        environment = self.environment | {"JAX_DEFAULT_MATMUL_PRECISION": "float32"}  # Their tolerances are for it.
        log.unlink(missing_ok=True)
        with child(command, environment, log) as process:
            in_time = wait(process, self.seconds("tests"))
        if in_time:
            self.findings.tests = last_line(log)
            self.leave_out("tests", "not all have passed; see tests.log" if process.returncode else "")
        else:
            self.leave_out("tests", "the time was over before they ended")

    def trace(self) -> None:
        """Traces one seed of OTQL, without command buffers, which hide the kernels inside."""
        traced = self.measure("trace", [spec("otql", trace=20)], self.seconds("trace"), False)
        if traced and traced[0]["kernels"]:
            self.findings.trace = traced[0]
        elif traced:
            self.leave_out("trace", "the profiler recorded no kernel; the driver may not allow it here")

    def speed(self) -> None:
        """Measures updates a second, first without and then with command buffers for loops."""
        programs = [{"stepwise": True, "num_seeds": 1}, *({"num_seeds": seeds} for seeds in SEEDS)]
        plans = list(itertools.product(AGENTS[:1] if FLAGS.tiny else AGENTS, (False, True)))
        whole = self.seconds("speed")
        for number, (agent, buffers) in enumerate(plans):
            own = [spec(agent, **program) for program in (programs[1:] if buffers else programs)]
            seconds = min(whole * 1.5 / len(plans), self.budget.left / (len(plans) - number))
            for result in self.measure("speed", own, seconds, buffers):
                program = STEPWISE if result.get("stepwise") else "ot"
                self.findings.rates[agent, program, result["num_seeds"], buffers] = result["rate"]

    def coupling(self) -> None:
        """Measures OTQL on independent pairs, and on the plan where `speed` has not."""
        rates, specs = self.findings.rates, []
        for seeds, program in itertools.product(SEEDS, ("ot", "independent")):
            if ("otql", program, seeds, False) not in rates:
                specs.append(spec("otql", num_seeds=seeds, settings={"coupling": program}))
        for result in self.measure("coupling", specs, self.seconds("coupling"), False):
            rates["otql", result["settings"]["coupling"], result["num_seeds"], False] = result["rate"]

    def runs(self) -> None:
        """Trains OTQL over couplings and sources in the time that is left."""
        small = [f"--agent.{key}={value}" for key, value in (TINY | TINY_OTQL).items()] if FLAGS.tiny else []
        results, missing = training.train_all(self.scale, self.data, small, self.environment, self.budget, self.out)
        self.findings.groups, self.findings.missing = results, self.findings.missing + missing

    def run(self, parts: list[str]) -> None:
        """Runs the parts one after the other, data being collected during the first; rewrites the report after each."""
        with ExitStack() as stack:
            collecting = None
            if "runs" in parts and not self.data:
                command = ["nice", "-n", "10", *training.collect_command(self.scale, self.out / "data")]
                environment = self.environment | {"JAX_PLATFORMS": "cpu"}
                collecting = stack.enter_context(child(command, environment, self.out / "collect.log"))
            for part in parts:
                if collecting and part not in ("tests", "trace"):
                    # Speeds are measured on a machine that does nothing else.
                    self._await(collecting)
                    collecting = None
                if part == "runs" and not self.data:
                    continue
                if not self.budget.left:
                    self.leave_out(part, "no time is left")
                    continue
                print(f"{part}, {self.budget.left:.0f} s left", file=sys.stderr, flush=True)
                getattr(self, part)()
                write(self.findings, self.out, FLAGS.tiny)
        write(self.findings, self.out, FLAGS.tiny)

    def _await(self, collecting: subprocess.Popen) -> None:
        """Waits for the dataset, at most for half of the time that is left."""
        print(f"data, {self.budget.left:.0f} s left", file=sys.stderr, flush=True)
        in_time, log = wait(collecting, self.budget.left / 2), self.out / "collect.log"
        if in_time and not collecting.returncode:
            episodes = self.scale.episodes
            self.data = [
                "--dataset_source=collect",
                f"--dataset_episodes={episodes}",
                f"--dataset_dir={self.out / 'data'}",
            ]
            return
        self.leave_out("runs", last_line(log) if in_time else "the time was over before the data were collected")


def main(argv: Sequence[str]) -> None:
    """Runs the parts of --part within --minutes, and prints the report."""
    if parse(argv, FLAGS):
        raise UserError("--agent.… cannot be set here: the numbers are those of the paper's settings")
    parts, out = chosen_parts(), Path(FLAGS.output).expanduser().resolve()
    budget, environment = Budget(60 * FLAGS.minutes), clean_environment(FLAGS.matmul_precision)
    if FLAGS.dataset and not Path(FLAGS.dataset).expanduser().is_file():
        raise UserError(f"--dataset={FLAGS.dataset}: there is no such file")
    machine = find_machine(environment)
    if (out / "runs").exists() and "runs" in parts:
        raise UserError(f"{out} has runs of an earlier command; give another --output, or delete {out / 'runs'}")
    out.mkdir(parents=True, exist_ok=True)
    check = Check(out, budget, machine, environment)
    check.run(parts)
    print((out / "report.md").read_text(encoding="utf-8"))
    print(f"report: {out / 'report.md'}, after {budget.spent:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    run_main(main)
