"""Updates a second of agents side by side in one program, against one that is driven step by step from Python.

See `experiments.bench`. Every measurement is a process of its own (experiments/bench/updates.py), in turn.
"""

import tempfile
from pathlib import Path

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from experiments.bench.updates import OURS, Side, clean_environment, floor_share, make_states
from utils.output.plotting import STYLE, to_png

STEPWISE = "step by step"


def compare(
    agent: str, overrides: dict[str, str], lanes: list[int], rounds: int, seconds: float, precision: str
) -> tuple[str, bytes | None]:
    """Measures one agent with paper networks.

    Args:
        agent: name of a file in agents/. overrides: settings that replace the preset's, field → text.
        lanes: numbers of agents side by side. rounds, seconds, precision: as for `bench_updates.compare`.

    Returns:
        a table in Markdown, and a picture; no picture if a measurement failed.
    """
    environment, spec = clean_environment(precision), {"agent": agent, "settings": overrides}
    names = {STEPWISE: {"stepwise": True}} | {f"{n} side by side": {"lanes": n} for n in lanes}
    sides = [Side(name, OURS, environment, {agent: spec | own}) for name, own in names.items()]
    with tempfile.TemporaryDirectory() as directory:
        data = Path(directory) / "states.npz"
        np.savez(data, **make_states())
        for _ in range(rounds):
            for side in sides:
                side.measure(agent, data, seconds)
    measured = [side for side in sides if agent in side.results and agent not in side.failures]
    title = f"## Seeds side by side, {agent}"
    lines = [title, "", "| | updates/s, summed | over step by step | of the floor |", "|---|---|---|---|"]
    for side in measured:
        rate, share = side.rate(agent), floor_share(agent, side, side)
        ratio = f"**{rate / sides[0].rate(agent):.2f}**" if sides[0] in measured else ""
        lines.append(f"| {side.name} | {rate:.3g} | {ratio} | {share:.0%} |")
    lines += ["", f"Matrix products in {precision}. Updates/s are of this machine, and of no other:"]
    for side in measured[:1]:
        lines.append(f"- {', '.join(f'{k} {v}' for k, v in side.results[agent][0]['versions'].items())}")
    lines += [f"- {side.name}, failed: {side.failures[agent]}" for side in sides if agent in side.failures]
    if len(measured) < len(sides):
        return "\n".join(lines), None
    stepwise, *rest = (side.rate(agent) for side in sides)
    ratios = np.array(rest) / stepwise
    lines += [
        "",
        f"Beyond `--num_seeds={knee(lanes, ratios)}`, seeds side by side bring little over one after the other.",
    ]
    return "\n".join(lines), draw(lanes, ratios)


def draw(lanes: list[int], ratios: Float[np.ndarray, " lanes"]) -> bytes:
    """Summed updates/s over those step by step, against the number of agents side by side, as PNG."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(layout="constrained")
        axes = figure.add_subplot()
        axes.plot(lanes, ratios, marker="o", clip_on=False, zorder=3, label="measured")
        axes.plot(lanes, ratios[0] * np.array(lanes) / lanes[0], "--", color="#8c8c8c", label="if seeds were free")
        axes.set_xscale("log", base=2)
        axes.set_xticks(lanes, list(map(str, lanes)))
        axes.set_ylim(bottom=0)
        axes.set_xlabel("Agents side by side")
        axes.set_ylabel("Updates/s, over step by step")
        axes.legend()
        return to_png(figure)


def knee(lanes: list[int], ratios: Float[np.ndarray, " lanes"]) -> int:
    """The most lanes to which doubling them still brought half as much again."""
    best = lanes[0]
    for few, many, low, high in zip(lanes, lanes[1:], ratios, ratios[1:], strict=False):
        if high / low < 1 + 0.5 * (many / few - 1):
            break
        best = many
    return best
