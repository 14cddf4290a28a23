"""The check of one GPU: a tiny one on a CPU, its time, its targets and its tables."""

import csv
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments.gpu_check import children, command, measure, page, training
from utils.errors import UserError
from utils.output.loggers import CsvLogger


def check(*flags):
    """Runs the command with defaults for flags not given."""
    for name in command.FLAGS:
        command.FLAGS[name].unparse()
    command.main(["gpu_check", *flags])


def table(path):
    """The rows of a CSV file, as dicts."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_tiny_check_on_a_cpu(tmp_path, capsys):
    """Every measurement in a process of its own, data collected, runs trained and evaluated."""
    check("--tiny", "--minutes=60", "--part=trace,speed,coupling,runs", "--seconds=0.02", f"--output={tmp_path}")
    report = (tmp_path / "report.md").read_text()
    assert report.strip() in capsys.readouterr().out and "## Left out" not in report and "not measured" not in report
    rows = {
        (row["program"], row["seeds"], row["command_buffers_for_loops"]): row for row in table(tmp_path / "speed.csv")
    }
    assert set(rows) == {
        *(("step by step", "1", "no"), ("compiled", "1", "no"), ("compiled", "8", "no")),
        *(("compiled", "1", "yes"), ("compiled", "8", "yes")),
        *(("compiled, independent pairs", "1", "no"), ("compiled, independent pairs", "8", "no")),
    }
    assert all(float(row["updates_per_second"]) > 0 for row in rows.values())
    kernels = table(tmp_path / "kernels.csv")
    shares = [float(row["share"]) for row in kernels]
    assert len(kernels) == 10 and shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 1.01
    runs = table(tmp_path / "runs.csv")
    assert [(row["epsilon"], row["step"]) for row in runs] == [
        (str(epsilon), str(step)) for epsilon in (0.1, 0.5, 2.0, 1000.0) for step in (60, 120)
    ]
    assert "- group standard: 4 runs, 120 updates each" in report


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), r"JAX finds no GPU here \(.*CPU.*\); install jax\[cuda12\] or jax\[cuda13\], or try --tiny"),
        (("--part=speeds",), "--part=speeds: give all, or some of tests, trace, speed, coupling, runs"),
        (("--part=",), "--part=: give all, or some of"),
        (("--dataset=nothing.npz",), "--dataset=nothing.npz: there is no such file"),
        (("--agent.lam=1",), "--agent.… cannot be set here"),
    ],
)
def test_mistakes(flags, message, tmp_path):
    with pytest.raises(UserError, match=message):
        check(*flags, f"--output={tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()


def test_what_the_time_does_not_suffice_for_is_listed(tmp_path, monkeypatch):
    """The budget is over before the first part; runs of an earlier command are not mixed with new ones."""
    monkeypatch.setattr(command, "find_machine", lambda _: "a machine")
    monkeypatch.setattr(children.Budget, "left", 0.0)
    data = tmp_path / "data.npz"
    data.touch()
    check("--tiny", f"--output={tmp_path / 'out'}", f"--dataset={data}")
    report = (tmp_path / "out" / "report.md").read_text()
    assert [f"- {part}: no time is left" in report for part in command.PARTS] == [True] * 5
    assert report.count("not measured") == 4
    (tmp_path / "out" / "runs").mkdir()
    with pytest.raises(UserError, match="has runs of an earlier command"):
        check("--tiny", f"--output={tmp_path / 'out'}")


def test_a_child_that_takes_too_long_is_ended_with_all_that_it_started(tmp_path, monkeypatch):
    monkeypatch.setattr(children, "GRACE", 0.2)
    script = "import signal, subprocess, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    script += "print(subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)"
    start = time.monotonic()
    with children.child([sys.executable, "-c", script], dict(os.environ), tmp_path / "log") as process:
        while not (tmp_path / "log").read_text().strip():
            time.sleep(0.05)
        assert not children.wait(process, 0.1)
    assert time.monotonic() - start < 20 and process.returncode == -9
    status = Path(f"/proc/{int((tmp_path / 'log').read_text())}/stat")
    while status.exists() and status.read_text().split()[2] != "Z":
        assert time.monotonic() - start < 20
        time.sleep(0.05)


def test_measurements_before_a_failure_are_kept(tmp_path, monkeypatch):
    script = tmp_path / "stand_in.py"
    script.write_text("import sys\nopen(sys.argv[1], 'w').write('{\"rate\": 2.0}\\n')\nsys.exit('broken')\n")
    monkeypatch.setattr(children, "MEASURE", "stand_in")
    environment = dict(os.environ) | {"PYTHONPATH": str(tmp_path)}
    results, problem = children.measurements([{}, {}], environment, 60, tmp_path / "log")
    assert results == [{"rate": 2.0}] and problem == "exit code 1: broken"


def test_groups_share_the_time_that_is_left(tmp_path, monkeypatch):
    """At least the least time of each; the last seconds are for saving."""
    given, clock = [], [280.0 + children.GRACE]

    def train(name, scale, data, overrides, environment, seconds, out):
        given.append((name, seconds))
        clock[0] -= seconds
        return training.GroupResult(10, 5, 1.0, 4, "" if name == "action" else "broken")

    monkeypatch.setattr(children.Budget, "left", property(lambda _: clock[0]))
    monkeypatch.setattr(training, "train_group", train)
    scale = training.Scale("task", 1, 1, ("standard", "action", "noise"), 100.0, ())
    results, missing = training.train_all(scale, [], [], {}, children.Budget(0), tmp_path)
    assert given == [("standard", 100.0), ("action", 100.0)] and list(results) == ["standard", "action"]
    assert missing == ["runs, group standard: broken", "runs, group noise: no time is left"]


RATES = {
    ("otql", page.STEPWISE, 1, False): 100.0,
    ("otql", "ot", 1, False): 390.0,
    ("otql", "ot", 1, True): 450.0,
    ("otql", "ot", 8, False): 1190.0,
    ("otql", "independent", 1, False): 520.0,
}


def test_targets():
    """The faster program counts; the coupling's share is 1 − t(independent) / t(plan); times are extrapolated."""
    found = page.Findings("a machine", rates=RATES)
    assert page.ratio(RATES, "otql", 1) == 4.5 and page.ratio(RATES, "fql", 1) is None
    assert page.coupling_share(RATES, 1) == pytest.approx(0.25) and page.coupling_share(RATES, 8) is None
    assert [row[2] for row in page.targets(found)] == ["4.50, met", "11.90, not met", "not measured", "25%, not met"]
    found.groups = {"standard": training.GroupResult(9000, 8000, 9.0, 8, "")}
    assert page.targets(found)[2][2] == "18.8, met"


def test_kernels_are_those_of_the_streams():
    """Of a GPU; its other lines repeat them. On a CPU, a loop's own event contains those of its operations."""
    event = lambda name, ns, **stats: SimpleNamespace(name=name, duration_ns=ns, stats=list(stats.items()))  # noqa: E731
    line = lambda name, *events: SimpleNamespace(name=name, events=events)  # noqa: E731
    plane = lambda name, *lines: SimpleNamespace(name=name, lines=lines)  # noqa: E731
    gpu = plane("/device:GPU:0", line("Stream #13(Compute)", event("gemm", 5.0)), line("XLA Ops", event("gemm", 5.0)))
    inside = (event("while.2", 9.0, hlo_op="while.2"), event("dot.1", 4.0, hlo_op="dot.1"), event("end: dot.1", 1.0))
    cpu = plane("/host:CPU", line("tf_XLAPjRtCpuClient/1", *inside), line("python", event("call", 50.0)))
    assert list(measure.kernel_events(SimpleNamespace(planes=[cpu, gpu]))) == [("gemm", 5.0)]
    assert list(measure.kernel_events(SimpleNamespace(planes=[cpu]))) == [("dot.1", 4.0)]


def test_evaluations_of_the_runs(tmp_path):
    """Sorted by group, ε and seed; the table has means over seeds of each arm and step."""
    for group, epsilon, seed, success in [("noise", 0.1, 0, 0.2), ("standard", 2.0, 1, 1.0), ("standard", 2.0, 0, 0.5)]:
        run = tmp_path / "runs" / group / f"{epsilon}-sd{seed}"
        run.mkdir(parents=True)
        config = {"source": group, "targets": "velocity", "epsilon": epsilon}
        (run / "flags.json").write_text(json.dumps({"config": config, "seed": seed}))
        logger = CsvLogger(run / "eval.csv")
        logger.log(10, {"episodes": 4, "return_mean": -1.0, "length_mean": 3.0, "success_rate": success})
        logger.close()
    rows = training.evaluations(tmp_path)
    assert [(row[0], row[4], row[7]) for row in rows] == [("standard", 0, 0.5), ("standard", 1, 1.0), ("noise", 0, 0.2)]
    assert page.run_table(rows).splitlines()[2:] == [
        "| standard | velocity | 2.0 | 0.75 (2) |",
        "| noise | velocity | 0.1 | 0.20 (1) |",
    ]
