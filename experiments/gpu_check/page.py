"""The report of `experiments.gpu_check`: targets, and tables in Markdown and CSV."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from experiments.gpu_check import training
from utils.output.tables import csv_text, markdown_table
from utils.system.files import atomic_write_text

AGENTS = ("otql", "fql")
STEPWISE = "step by step"
MILLION = 1_000_000


@dataclass
class Findings:
    """Measurements so far.

    Attributes:
        machine: one line. tests: last line of the tests, '' if they did not run.
        rates: (agent, program, seeds, command buffers for loops) → updates a second, summed over seeds.
        trace: of `trace_kernels`, empty without one. groups: of the runs. missing: lines on what was left out.
    """

    machine: str
    tests: str = ""
    rates: dict[tuple[str, str, int, bool], float] = field(default_factory=dict)
    trace: Mapping[str, Any] = field(default_factory=dict)
    groups: Mapping[str, training.GroupResult] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)


def ratio(rates: Mapping[tuple[str, str, int, bool], float], agent: str, seeds: int) -> float | None:
    """Returns the faster program's updates a second relative to the loop step by step; None without both."""
    base = rates.get((agent, STEPWISE, 1, False))
    own = [rate for (name, program, count, _), rate in rates.items() if (name, program, count) == (agent, "ot", seeds)]
    return max(own) / base if own and base else None


def coupling_share(rates: Mapping[tuple[str, str, int, bool], float], seeds: int) -> float | None:
    """Returns the coupling's share of OTQL's update: 1 − t(independent pairs) / t(plan); None without both."""
    plan, independent = (rates.get(("otql", program, seeds, False)) for program in ("ot", "independent"))
    return 1 - plan / independent if plan and independent else None


def million_minutes(groups: Mapping[str, training.GroupResult]) -> float | None:
    """Returns the minutes of a million updates of the eight runs of group `standard` at the measured speed."""
    result = groups.get("standard")
    if result is None or not result.timed:
        return None
    return MILLION * result.seconds / result.timed / 60


def targets(findings: Findings) -> list[tuple[str, str, str]]:
    """Returns (what, target, measured) of every target."""
    one, eight = (ratio(findings.rates, "otql", seeds) for seeds in (1, 8))
    share, minutes = coupling_share(findings.rates, 1), million_minutes(findings.groups)
    rows: list[tuple[str, str, float | None, float, str]] = [
        ("OTQL, one seed, relative to a loop step by step", "≥ 4", one, 4, "{:.2f}"),
        ("OTQL, eight seeds summed, relative to it", "≥ 12", eight, 12, "{:.2f}"),
        ("a million updates of eight runs with evaluations, minutes, extrapolated", "≤ 20", minutes, 20, "{:.1f}"),
        ("the coupling's share of an update, one seed", "≤ 15 %", share, 0.15, "{:.0%}"),
    ]

    def verdict(target: str, value: float | None, bound: float, text: str) -> str:
        if value is None:
            return "not measured"
        met = value >= bound if target.startswith("≥") else value <= bound
        return f"{text.format(value)}, {'met' if met else 'not met'}"

    return [(what, target, verdict(target, value, bound, text)) for what, target, value, bound, text in rows]


def speed_rows(findings: Findings) -> list[list[str]]:
    """Returns agent, program, seeds, command buffers, updates a second, and these relative to the loop step by step."""
    rows = []
    for (agent, program, seeds, buffers), rate in findings.rates.items():
        base = findings.rates.get((agent, STEPWISE, 1, False))
        kind = {"ot": "compiled", "independent": "compiled, independent pairs"}.get(program, program)
        relative = f"{rate / base:.2f}" if base else ""
        rows.append([agent, kind, str(seeds), "yes" if buffers else "no", f"{rate:.4g}", relative])
    return rows


SPEED = ("agent", "program", "seeds", "command_buffers_for_loops", "updates_per_second", "relative_to_step_by_step")
KERNELS = ("kernel", "launches_per_update", "microseconds_per_update", "share")


def kernel_rows(trace: Mapping[str, Any]) -> list[list[str]]:
    """Returns the kernels that take most time: name, launches and microseconds an update, share of all kernels."""
    total = trace["microseconds"]
    return [
        [one["name"], f"{one['launches']:.4g}", f"{one['microseconds']:.4g}", f"{one['microseconds'] / total:.3f}"]
        for one in trace["kernels"]
    ]


def run_table(rows: Sequence[Sequence[Any]]) -> str:
    """Returns success, mean over seeds, of every arm at each step, as a Markdown table."""
    steps = sorted({row[5] for row in rows})
    arms = list(dict.fromkeys((row[1], row[2], row[3]) for row in rows))
    body = []
    for arm in arms:
        own = [row for row in rows if (row[1], row[2], row[3]) == arm]
        at = {step: [row[7] for row in own if row[5] == step] for step in steps}
        body.append(
            [*map(str, arm), *(f"{np.mean(at[step]):.2f} ({len(at[step])})" if at[step] else "" for step in steps)]
        )
    return markdown_table(["source", "targets", "ε", *(f"{step:,} updates" for step in steps)], body)


def write(findings: Findings, out: Path, tiny: bool) -> None:
    """Writes the CSV files and report.md to the directory `out`, as far as there are results."""
    lines = ["# One GPU", "", findings.machine, ""]
    if tiny:
        lines += [
            "**`--tiny`: networks of a few units. The command works; its numbers mean nothing.**",
            "",
        ]
    lines += ["## Targets", "", markdown_table(["what", "target", "measured"], targets(findings)), ""]
    if findings.tests:
        lines += ["## Tests", "", f"`{findings.tests}`", ""]
    if findings.rates:
        rows = speed_rows(findings)
        atomic_write_text(out / "speed.csv", csv_text([SPEED, *rows]))
        names = [
            "agent",
            "program",
            "seeds",
            "command buffers for loops",
            "updates/s, summed",
            "relative to step by step",
        ]
        lines += ["## Updates a second", "", markdown_table(names, rows), ""]
        for seeds in (1, 8):
            if (share := coupling_share(findings.rates, seeds)) is not None:
                lines += [f"The coupling takes {share:.0%} of OTQL's update with {seeds} seed{'s' * (seeds > 1)}.", ""]
    if findings.trace:
        trace, rows = findings.trace, kernel_rows(findings.trace)
        atomic_write_text(out / "kernels.csv", csv_text([KERNELS, *rows]))
        lines += ["## Kernels of one OTQL update", ""]
        lines += [
            markdown_table(["kernel", "launches", "µs", "share"], [[f"`{row[0]}`", *row[1:]] for row in rows]),
            "",
        ]
        lines += [f"All: {trace['launches']:.0f} launches, {trace['microseconds']:.0f} µs of kernels in"]
        lines += [f"{trace['wall']:.0f} µs on the clock, with the profiler on.", ""]
    if findings.groups:
        evaluated = training.evaluations(out)
        atomic_write_text(out / "runs.csv", csv_text([training.HEADER, *evaluated]))
        lines += ["## Runs", ""]
        lines += [
            f"- group {name}: {own.runs} runs, {own.updates:,} updates each" for name, own in findings.groups.items()
        ]
        if evaluated:
            lines += ["", "Success, mean over seeds (how many):", "", run_table(evaluated)]
        lines += [""]
    if findings.missing:
        lines += ["## Left out", "", *(f"- {line}" for line in findings.missing), ""]
    atomic_write_text(out / "report.md", "\n".join(lines).rstrip() + "\n")
