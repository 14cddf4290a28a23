"""Small datasets and processes for the tests of the command line."""

import gc
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import costs
import jaxtyping
import numpy as np
import pytest

import utils
from utils.system.resources import cpu_digest

CHECKED = ("agents", "envs", "experiments", "utils", "main", "online_main")
CHECKER = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"  # An int will do for a float.
# XLA's older emitters take a third of the time of the newer ones. The level is that of `compiling.optimised`.
QUICK_TO_COMPILE = (
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1 --xla_backend_optimization_level=1"
)
LARGEST_CACHE = 2e9  # bytes
MEMORY = 0.8e9  # bytes that a test process may hold at the end of a file before it drops compiled programs
ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser):
    """Adds --costs."""
    parser.addoption("--costs", action="store_true", help="print what each test file costs")


def pytest_configure(config):
    """Lets all tests, the processes they start and later sessions share compiled programs; checks types of calls.

    JAX reads these variables when it is imported.
    """
    assert "jax" not in sys.modules
    if config.getoption("--costs"):
        config.pluginmanager.register(costs.Costs())
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(compiled_programs()))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")
    # Most tests compile much and compute little; for the others there is compiling.optimised.
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    if utils.jaxlib_version >= (0, 10, 2):  # Older ones may not know the flags.
        os.environ["XLA_FLAGS"] = f"{os.environ['XLA_FLAGS']} {QUICK_TO_COMPILE}"
    os.environ["OTQL_XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "")  # Child processes need not try them.
    if config.option.markexpr != "check":  # It takes seconds in each process.
        jaxtyping.install_import_hook(CHECKED, CHECKER)


def compiled_programs() -> Path:
    """The directory of compiled programs, which later sessions reuse; it is emptied when it has grown large."""
    directory = ROOT / ".pytest_cache" / f"compiled-{cpu_digest()}"
    if sum(path.stat().st_size for path in directory.glob("*")) > LARGEST_CACHE:
        shutil.rmtree(directory, ignore_errors=True)
    return directory


def resident() -> float:
    """Bytes of memory that this process holds, 0 where that is not known."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


@pytest.fixture(scope="module", autouse=True)
def bounded_memory():
    """Drops what JAX has compiled after a file at which a process has grown large."""
    yield
    if "jax" in sys.modules and resident() > MEMORY:
        sys.modules["jax"].clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def pointmaze(tmp_path_factory) -> Path:
    """A small dataset of the medium point maze."""
    from envs.collect import collect

    directory = tmp_path_factory.mktemp("pointmaze")
    return collect("pointmaze-medium-navigate-v0", episodes=3, max_steps=60, dataset_dir=directory, workers=1)


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn."""
    from utils.output import plotting

    drawn, canvas = [], plotting.FigureCanvasAgg
    monkeypatch.setattr(plotting, "FigureCanvasAgg", lambda figure: (drawn.append(figure), canvas(figure))[1])
    return drawn


@pytest.fixture
def write_data(pointmaze, tmp_path):
    """Returns a function that writes a copy of the dataset's first rows, with some arrays replaced."""

    def write(name: str = "data.npz", rows: int | None = None, **replaced: np.ndarray) -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        with np.load(pointmaze) as file:
            np.savez(path, **{key: replaced.get(key, file[key])[:rows] for key in file.files})
        return path

    return write


@pytest.fixture
def start(tmp_path):
    """Returns a function that starts main.py as a process, stderr in a file. What still runs is ended afterwards."""
    from utils.system.cli import last_of_each

    processes = []

    def popen(*flags: str) -> tuple[subprocess.Popen, Path]:
        log = tmp_path / f"stderr{len(processes)}.txt"
        with log.open("w") as file:
            command = [sys.executable, str(ROOT / "main.py"), *last_of_each(flags)]
            processes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file))
        return processes[-1], log

    yield popen
    for process in processes:
        process.kill()
        process.wait()


@pytest.fixture
def interrupt_at(monkeypatch):
    """Returns a function that lets the next run get a SIGTERM when it logs a row of train.csv at or after a step."""
    from utils.run.metrics import MetricLoggers

    write = MetricLoggers.write

    def arm(step: int, of: str = "train") -> None:
        def write_and_raise(logs, index, name, at, row):
            write(logs, index, name, at, row)
            if name == of and at >= step:
                monkeypatch.setattr(MetricLoggers, "write", write)
                signal.raise_signal(signal.SIGTERM)

        monkeypatch.setattr(MetricLoggers, "write", write_and_raise)

    return arm


@pytest.fixture
def slow_evaluation(monkeypatch):
    """Returns a function that makes the next evaluation last long."""
    from utils.run import evaluation_queue

    evaluate = evaluation_queue.Evaluator.evaluate

    def arm():
        def slowly(self, policy, *rest):
            monkeypatch.setattr(evaluation_queue.Evaluator, "evaluate", evaluate)

            def act(*inputs):
                time.sleep(0.1)
                return policy(*inputs)

            return evaluate(self, act, *rest)

        monkeypatch.setattr(evaluation_queue.Evaluator, "evaluate", slowly)

    return arm
