"""A table of what each test file costs: pytest --costs, with or without xdist.

Seconds of the wall and of processors (this process, and children that ended), seconds in which XLA compiled in this
process and how often it did, and the most memory that a test process had held by then (MB).
"""

import resource
import sys
import time
from collections import Counter, defaultdict

import pytest

COLUMNS = ("seconds", "processor", "children", "compiling", "compilations", "memory")


class Costs:
    """A plugin that measures in the processes that run tests, and prints where they report to."""

    def __init__(self):
        self.files = defaultdict(Counter)
        self.before = Counter()
        self.compiled = Counter()
        self.listening = False

    def _listen(self) -> None:
        """Counts compilations once JAX is there, and what is read from its persistent cache."""
        if self.listening or "jax" not in sys.modules:
            return
        from jax import monitoring

        def count(event: str, seconds: float, **_: object) -> None:
            if event == "/jax/core/compile/backend_compile_duration":
                self.compiled.update(compiling=seconds, compilations=1)

        monitoring.register_event_duration_secs_listener(count)
        self.listening = True

    def _now(self) -> Counter:
        own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
        times = {"processor": own.ru_utime + own.ru_stime, "children": children.ru_utime + children.ru_stime}
        return Counter({"seconds": time.monotonic(), **times, **self.compiled})

    def pytest_runtest_logstart(self) -> None:
        """Notes what was spent so far."""
        self._listen()
        self.before = self._now()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        """Adds what the test cost to its last report."""
        report = yield
        self._listen()
        if call.when == "teardown":
            now = self._now()
            cost = {name: now[name] - self.before[name] for name in COLUMNS[:-1]}
            cost["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            report.user_properties.append(("costs", cost))
        return report

    def pytest_runtest_logreport(self, report) -> None:
        """Adds them up."""
        if report.when == "teardown":
            cost = dict(report.user_properties).get("costs", {})
            file = self.files[report.nodeid.split("::")[0]]
            memory = max(file["memory"], cost.get("memory", 0))
            file.update(cost)
            file["memory"] = memory

    def pytest_terminal_summary(self, terminalreporter) -> None:
        """Prints the table, dearest first."""
        rows = sorted(self.files.items(), key=lambda row: -row[1]["processor"] - row[1]["children"])
        total = Counter()
        for _, cost in rows:
            total.update({name: cost[name] for name in COLUMNS[:-1]})
            total["memory"] = max(total["memory"], cost["memory"])
        terminalreporter.section("costs")
        terminalreporter.line("".join(f"{name:>13}" for name in COLUMNS))
        for name, cost in [*rows, ("total", total)]:
            terminalreporter.line("".join(f"{cost[column]:13.1f}" for column in COLUMNS) + f"  {name}")
