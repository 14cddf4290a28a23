"""Updates per second of agents trained in parallel in one program, relative to one agent driven from Python.

See `experiments.bench`. Every measurement is a process of its own (experiments/bench/updates.py).
"""

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from experiments.bench.updates import OURS, Side, clean_environment, floor_share, measure_sides, show_versions
from utils.output.plotting import STYLE, to_png
from utils.output.tables import markdown_table

STEPWISE = "step by step"


def compare(
    agent: str, overrides: dict[str, str], counts: list[int], rounds: int, seconds: float, precision: str
) -> tuple[str, bytes | None]:
    """Measures one agent with paper networks.

    Args:
        agent: name of a file in agents/.
        overrides: settings that replace the preset's, field → text.
        counts: numbers of seeds in parallel.
        rounds, seconds, precision: see `experiments.bench.updates.compare`.

    Returns:
        a table in Markdown, and a PNG, which is None if a measurement failed.
    """
    environment, spec = clean_environment(precision), {"agent": agent, "settings": overrides}
    names = {STEPWISE: {"stepwise": True}} | {f"{n} in parallel": {"num_seeds": n} for n in counts}
    sides = [Side(name, OURS, environment, {agent: spec | own}) for name, own in names.items()]
    measure_sides(sides, [agent], rounds, seconds)
    measured = [side for side in sides if agent in side.results and agent not in side.failures]
    rows = []
    for side in measured:
        rate, share = side.rate(agent), floor_share(agent, side, side)
        ratio = f"**{rate / sides[0].rate(agent):.2f}**" if sides[0] in measured else ""
        rows.append([side.name, f"{rate:.3g}", ratio, f"{share:.0%}"])
    header = ["seeds", "updates/s, summed", "relative to step by step", "of the floor"]
    lines = [f"## Seeds in parallel, {agent}", "", markdown_table(header, rows)]
    lines += ["", f"Matrix products in {precision}. Updates/s hold for this machine only:"]
    lines += [f"- {show_versions(side.results[agent])}" for side in measured[:1]]
    lines += [f"- {side.name}, failed: {side.failures[agent]}" for side in sides if agent in side.failures]
    if len(measured) < len(sides):
        return "\n".join(lines), None
    stepwise, *rest = (side.rate(agent) for side in sides)
    ratios = np.array(rest) / stepwise
    advice = (
        f"Beyond `--num_seeds={knee(counts, ratios)}`, seeds in parallel are hardly faster than one after the other."
    )
    return "\n".join([*lines, "", advice]), draw(counts, ratios)


def draw(counts: list[int], ratios: Float[np.ndarray, " counts"]) -> bytes:
    """Draws summed updates/s relative to those step by step over the number of seeds in parallel, as PNG."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(layout="constrained")
        axes = figure.add_subplot()
        axes.plot(counts, ratios, marker="o", clip_on=False, zorder=3, label="measured")
        axes.plot(counts, ratios[0] * np.array(counts) / counts[0], "--", color="#8c8c8c", label="linear scaling")
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, list(map(str, counts)))
        axes.set_ylim(bottom=0)
        axes.set_xlabel("Seeds in parallel")
        axes.set_ylabel("Updates/s, relative to step by step")
        axes.legend()
        return to_png(figure)


def knee(counts: list[int], ratios: Float[np.ndarray, " counts"]) -> int:
    """Returns the largest number of seeds up to which doubling it made updates at least 1.5 times as fast."""
    best = counts[0]
    for few, many, low, high in zip(counts, counts[1:], ratios, ratios[1:], strict=False):
        if high / low < 1 + 0.5 * (many / few - 1):
            break
        best = many
    return best
