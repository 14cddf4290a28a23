"""A stand-in for wandb."""

import sys
from types import SimpleNamespace


class FakeRun:
    """A wandb run that keeps its rows and fails in the method named."""

    def __init__(self, fails: str, **arguments):
        self.fails, self.arguments, self.rows = fails, arguments, []
        self.check("init")

    def check(self, method: str):
        if method == self.fails:
            raise RuntimeError("network\nis down")

    def define_metric(self, *_, **__):
        self.check("define_metric")

    def log(self, values):
        self.check("log")
        self.rows.append(values)

    def finish(self):
        self.check("finish")


def fake_wandb(monkeypatch, fails: str = "") -> list[FakeRun]:
    """Puts the stand-in in wandb's place; returns the list of its runs."""
    runs = []

    def init(**arguments):
        runs.append(FakeRun(fails, **arguments))
        return runs[-1]

    fake = SimpleNamespace(init=init, setup=lambda _: None, Settings=lambda **settings: settings)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return runs
