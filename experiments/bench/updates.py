"""Updates per second of every agent with paper networks, relative to the public QAM code; see `experiments.bench`.

Every measurement is a process of its own, alternately ours and theirs, on the same synthetic data, cores and matmul
precision. Run as a program, this file is our process: it runs the project's training loop (utils/run/update_loop.py).
The floor of an update is the time of its matrix products alone, at the measured rate of batched products of the
critics' shape. Both sides do the same products, so the floor bounds the ratio.
"""

import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from agents import AGENTS
from experiments.bench.public_updates import timed, versions
from utils import USER_XLA_FLAGS
from utils.data.batches import assemble, example_batch, gather, prepare
from utils.errors import UserError
from utils.output.tables import markdown_table
from utils.run.agent_config import resolve_config
from utils.run.agent_files import load_agent
from utils.run.update_loop import UPDATES_PER_CALL, UpdateLoop
from utils.system.files import ROOT
from utils.trees import tree_stack

DOMAIN, OBSERVATION_DIM, ACTION_DIM = "scene", 37, 5
OURS = [sys.executable, "-m", "experiments.bench.updates"]
PUBLIC_SCRIPT = ROOT / "experiments" / "bench" / "public_updates.py"
# Our agent → the public one, and its published settings on scene.
PUBLIC: dict[str, tuple[str, dict[str, Any]]] = {
    "fql": ("fql", {"alpha": 300.0}),
    "fawac": ("fawac", {"inv_temp": 6.4}),
    "qam": ("qam", {"inv_temp": 1.0}),
    "qam_f": ("qam", {"inv_temp": 1.0, "fql_alpha": 300.0}),
    "qam_e": ("qam", {"inv_temp": 1.0, "edit_scale": 0.1}),
    "fedit": ("fedit", {"edit_scale": 0.2}),
    "dsrl": ("dsrl", {"noise_scale": 0.4}),
    "ifql": ("ifql", {"kappa": 0.9}),
    "cgql": ("cgql", {"mode": "simple", "inv_temp": 10.0, "guidance_coef": 0.1}),
    "qsm": ("dcgql", {"actor_loss_type": "qsm", "inv_temp": 3.0, "alpha": 30.0, "clip_sampler_after": True}),
}
# On scene, QAM-E's scale is 0, which makes it QAM; this is another domain's.
OWN: dict[str, dict[str, Any]] = {"qam_e": {"edit_scale": 0.1}}
# Settings with the same name and meaning in the public code.
SHARED = (
    *("batch_size", "lr", "discount", "tau", "rho", "num_qs", "horizon_length", "flow_steps"),
    *("actor_hidden_dims", "value_hidden_dims"),
)


@dataclass
class Side:
    """One side of the comparison.

    Attributes:
        name: in the report.
        command: of a measurement, without the specification as its last argument.
        environment: of the process.
        specs: agent → specification of its measurement.
        results: agent → one measurement per round (see `timed`).
        failures: agent → message of its failure.
    """

    name: str
    command: list[str]
    environment: dict[str, str]
    specs: dict[str, dict[str, Any]]
    results: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def measure(self, agent: str, data: Path, seconds: float) -> None:
        """Measures one agent in a new process, unless it failed before."""
        if agent not in self.specs or agent in self.failures:
            return
        spec = self.specs[agent] | {"data": str(data), "seconds": seconds}
        try:
            result = run_json([*self.command, json.dumps(spec)], self.environment)
        except RuntimeError as error:
            self.failures[agent] = str(error)
            print(f"{agent}, {self.name}: {error}", file=sys.stderr)
            return
        self.results.setdefault(agent, []).append(result)
        print(f"{agent}, {self.name}: {result['rate']:.3g} over {result['updates']} updates", file=sys.stderr)

    def rate(self, agent: str) -> float:
        """Returns updates per second, the geometric mean over rounds; so a ratio of rates is a mean of ratios."""
        return geometric_mean([result["rate"] for result in self.results[agent]])


def measure_sides(sides: Sequence[Side], agents: Sequence[str], rounds: int, seconds: float) -> None:
    """Measures all agents on the same synthetic data, alternating between the sides."""
    with tempfile.TemporaryDirectory() as directory:
        data = Path(directory) / "states.npz"
        np.savez(data, **make_states())
        for _, name, side in itertools.product(range(rounds), agents, sides):
            side.measure(name, data, seconds)


def compare(
    agents: list[str],
    overrides: dict[str, str],
    public: str | None,
    public_python: str,
    rounds: int,
    seconds: float,
    precision: str,
    preset: str = "paper",
) -> tuple[str, bool]:
    """Measures the agents of both sides.

    Args:
        agents: names of files in agents/; empty for all.
        overrides: settings that replace the preset's, field → text.
        public: a checkout of github.com/ColinQiyangLi/qam, or None to measure our side alone.
        public_python: a Python that has the dependencies of that checkout.
        rounds: measurements per agent and side.
        seconds: approximate length of a measurement, without compilation.
        precision: of matrix products, a value of JAX_DEFAULT_MATMUL_PRECISION.
        preset: of our settings, and so of those that both sides share.

    Returns:
        a report in Markdown, and whether every measurement succeeded.

    Raises:
        UserError: an unknown agent or setting, or a checkout or Python that does not work.
    """
    agents = named_agents(agents)
    environment = clean_environment(precision)
    specs = {name: {"agent": name, "preset": preset, "settings": OWN.get(name, {}) | overrides} for name in agents}
    configs = {name: resolve(spec)[1] for name, spec in specs.items()}
    sides = [Side("ours", OURS, environment, specs)]
    if public is not None:
        sides.append(public_side(public, public_python, environment, configs))
    measure_sides(sides, agents, rounds, seconds)
    return report(agents, sides), not any(side.failures for side in sides)


def clean_environment(precision: str) -> dict[str, str]:
    """Returns the environment of a measurement, with the precision of matrix products."""
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return kept | {"JAX_DEFAULT_MATMUL_PRECISION": precision}


def named_agents(names: Sequence[str]) -> list[str]:
    """Returns the given agents, or all if none is given.

    Raises:
        UserError: an agent is unknown.
    """
    if unknown := [name for name in names if name not in AGENTS]:
        raise UserError(f"there is no agent file agents/{unknown[0]}.py; there are {', '.join(AGENTS)}")
    return list(names or AGENTS)


def resolve(spec: dict[str, Any]) -> tuple[ModuleType, Any]:
    """Returns the module and the config of one of our agents."""
    module = load_agent(f"agents/{spec['agent']}.py")
    return module, resolve_config(module, DOMAIN, spec.get("preset", "paper"), spec["settings"])[0]


def public_side(checkout: str, python: str, environment: dict[str, str], configs: dict[str, Any]) -> Side:
    """Returns the side of the public code, with those of our agents that it has and the settings that both share.

    Raises:
        UserError: `checkout` is not a checkout of the public code, or `python` cannot import it.
    """
    root = Path(checkout).expanduser().resolve()
    if not (root / "agents" / "__init__.py").is_file():
        raise UserError(f"--public={checkout} is not a checkout of github.com/ColinQiyangLi/qam: it has no agents/")
    environment = environment | {"PYTHONPATH": str(root), "XLA_FLAGS": USER_XLA_FLAGS}
    # Absolute, because the process has another working directory.
    command = [os.path.abspath(shutil.which(os.path.expanduser(python)) or python), str(PUBLIC_SCRIPT)]
    try:
        known = run_json(command, environment)["agents"]
    except RuntimeError as error:
        needs = "it needs jax 0.5.3, tensorflow-probability 0.25, distrax, flax, ml_collections and optax"
        raise UserError(f"--public_python={python} cannot import {root}/agents: {error}; {needs}") from error
    specs = {}
    for name, config in configs.items():
        theirs, settings = PUBLIC.get(name, (None, {}))
        if theirs in known:
            shared = {key: config[key] for key in SHARED if key in config}
            specs[name] = {"agent": theirs, "settings": {"action_chunking": True, **shared, **settings}}
    return Side("theirs", command, environment, specs)


def run_json(command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """Runs a program whose last line of output is JSON, and returns its content.

    Raises:
        RuntimeError: the program cannot be started or failed; the message is its last line on stderr.
    """
    try:
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, encoding="utf-8", check=False)
    except OSError as error:
        raise RuntimeError(error.strerror or str(error)) from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it wrote nothing to stderr"]
        raise RuntimeError(f"exit code {done.returncode}, {lines[-1].strip()}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def report(agents: list[str], sides: list[Side]) -> str:
    """Formats the measurements as a Markdown table that starts with the ratios."""
    rows, ratios, bounds, notes = [], {}, {}, []
    for name in agents:
        measured = [side for side in sides if name in side.results and name not in side.failures]
        shares = {side.name: floor_share(name, side, sides[0]) for side in measured if sides[0] in measured}
        ratio = spread = ""
        if len(measured) == 2:
            ratios[name], bounds[name] = measured[0].rate(name) / measured[1].rate(name), 1 / shares["theirs"]
            each = [a["rate"] / b["rate"] for a, b in zip(*(side.results[name] for side in measured), strict=True)]
            ratio, spread = f"**{ratios[name]:.2f}**", f"{min(each):.2f} to {max(each):.2f}"
        rates = [f"{side.rate(name):.3g}" if side in measured else "" for side in sides]
        floors = [f"{shares[side.name]:.0%}" if side.name in shares else "" for side in sides]
        losses = [f"{critic_loss(side.results[name][0]):.3g}" if side in measured else "" for side in sides]
        rows.append([name, *([ratio, spread] if len(sides) == 2 else []), *rates, *floors, *losses])
        notes += [f"{name}, {side.name}, failed: {side.failures[name]}" for side in sides if name in side.failures]
    names = [f"{what}, {side.name}" for what in ("updates/s", "of the floor", "critic loss") for side in sides]
    header = ["agent", *(["ratio", "over rounds"] if len(sides) == 2 else []), *names]
    lines = ["## Updates", ""]
    if ratios:
        least, mean, most = (
            min(ratios, key=lambda name: ratios[name]),
            *(geometric_mean([*r.values()]) for r in (ratios, bounds)),
        )
        lines += [f"Updates per second, relative to the public QAM code: **geometric mean {mean:.2f}**"]
        lines += [f"over {len(ratios)} agents, least {ratios[least]:.2f} ({least}); {most:.2f} at the floor.", ""]
    lines += [markdown_table(header, rows, rule="| --- "), ""]
    lines += ["Of the floor: the share of an update's time that its matrix products alone would take."]
    lines += ["Critic losses are those of the first few updates. Updates/s hold for this machine only:"]
    lines += [f"- {side.name}: {show_versions(next(iter(side.results.values()), []))}" for side in sides]
    return "\n".join(lines + [f"- {note}" for note in notes])


def show_versions(results: list[dict[str, Any]]) -> str:
    """Formats the versions of measurements; '' without any."""
    return ", ".join(f"{key} {value}" for key, value in results[0]["versions"].items()) if results else ""


def floor_share(agent: str, side: Side, ours: Side) -> float:
    """Returns the share of an update's time on `side` that its matrix products take at the rate of our side."""
    results = ours.results[agent]
    return side.rate(agent) * results[0]["gflop"] / geometric_mean([result["matmul_rate"] for result in results])


def critic_loss(measurement: dict[str, Any]) -> float:
    """Returns the TD loss under either side's name, NaN for an agent without critic."""
    losses = measurement["losses"]
    return losses.get("critic/loss", losses.get("critic/critic_loss", math.nan))


def geometric_mean(values: list[float]) -> float:
    """Returns the geometric mean of positive numbers."""
    return math.exp(sum(map(math.log, values)) / len(values))


def make_states(episodes: int = 100, length: int = 1001, seed: int = 0) -> dict[str, Any]:
    """Returns synthetic play data in rows of states (see utils/data/batches.py): smooth motion, 5 % of it solved."""
    rng = np.random.default_rng(seed)
    motion = rng.normal(size=(episodes, length, OBSERVATION_DIM)).cumsum(axis=1) / np.sqrt(length)
    solved = rng.random((episodes, length)) < 0.05
    terminals = np.zeros((episodes, length))
    terminals[:, -1] = 1
    arrays = {
        "observations": motion,
        "actions": rng.uniform(-1, 1, (episodes, length, ACTION_DIM)),
        "rewards": solved - 1.0,
        "masks": 1.0 - solved,
        "terminals": terminals,
    }
    return {key: leaf.reshape(-1, *leaf.shape[2:]).astype(np.float32) for key, leaf in arrays.items()}


def count_gflop(function: Callable[..., Any], *arguments: Any) -> float:
    """Returns the GFLOP of the matrix products in a call; a loop of unknown length counts as one iteration."""

    def count(jaxpr: Any) -> int:
        total = 0
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                contracted = equation.params["dimension_numbers"][0][0]
                shape = equation.invars[0].aval.shape
                total += 2 * equation.outvars[0].aval.size * math.prod(shape[i] for i in contracted)
            inner = jax.tree.leaves(equation.params, is_leaf=lambda value: hasattr(value, "jaxpr"))
            inner = [getattr(value, "jaxpr", value) for value in inner]
            total += equation.params.get("length", 1) * sum(count(value) for value in inner if hasattr(value, "eqns"))
        return total

    return count(jax.make_jaxpr(function)(*arguments).jaxpr) / 1e9


def measure_matmul(members: int, rows: int, width: int, calls: int = 20) -> float:
    """Returns the GFLOP/s of [members, rows, width] times [members, width, width] in the fastest call."""
    product = jax.jit(lambda x, w: jnp.einsum("kmi,kij->kmj", x, w))
    x, w = jnp.ones((members, rows, width)), jnp.ones((members, width, width))
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        jax.block_until_ready(product(x, w))
        seconds.append(time.perf_counter() - start)
    return 2 * members * rows * width**2 / min(seconds) / 1e9


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Trains `num_seeds` of our agents as main.py does, and returns the result of `timed` and the floor.

    The rate is the sum over seeds. With `stepwise`, one agent is driven as in the public code: one jitted update per
    Python step, on a batch sampled on the host.
    """
    agents, data = new_agents(spec)
    config = agents[0].cfg
    rows = jax.device_put(gather(data, data["starts"][: config.batch_size], config.horizon_length))
    batch = assemble(rows, config.discount, config.window_rule)
    floor = {
        "gflop": count_gflop(lambda agent: agent.update(batch), agents[0]),
        "matmul_rate": measure_matmul(config.num_qs, config.batch_size, config.value_hidden_dims[0]),
    }
    run = stepwise(agents[0], data) if spec.get("stepwise") else fused(tree_stack(agents), data)
    result = timed(run, spec["seconds"]) | floor | {"versions": versions()}
    return result | {"rate": result["rate"] * len(agents)}


def new_agents(spec: dict[str, Any]) -> tuple[list[Any], dict[str, np.ndarray]]:
    """Returns `num_seeds` agents of a specification, and the prepared data."""
    module, config = resolve(spec)
    with np.load(spec["data"]) as file:
        data = prepare(dict(file), terminates=False)
    create = jax.jit(partial(module.Agent.create, config=config))
    example = example_batch(data, config.horizon_length)
    return [create(jax.random.PRNGKey(i), example) for i in range(spec.get("num_seeds", 1))], data


def fused(agents: Any, data: dict[str, np.ndarray]) -> Callable[[int], dict[str, float]]:
    """Returns `run` for `timed`: the project's training loop."""
    trainer, step = UpdateLoop(jax.random.split(jax.random.PRNGKey(1), len(agents.step))), 0
    trainer.set_data(data)

    def run(count: int) -> dict[str, float]:
        nonlocal agents, step
        end = step + count
        while step < end:
            until = min(step + UPDATES_PER_CALL, end)
            agents, info = trainer.run(agents, step, until - step)
            step, info = until, jax.device_get(info)
        return {key: float(value[0]) for key, value in info.items() if "loss" in key}

    return run


def stepwise(agent: Any, data: dict[str, np.ndarray]) -> Callable[[int], dict[str, float]]:
    """Returns `run` for `timed`: one jitted update per Python step, on rows that NumPy picks."""
    rng, horizon, size = np.random.default_rng(0), agent.config.horizon_length, agent.config.batch_size

    @jax.jit
    def update(agent: Any, rows: Any) -> Any:
        return agent.update(assemble(rows, agent.hyper["discount"], agent.config.window_rule))

    def run(count: int) -> dict[str, float]:
        nonlocal agent
        for _ in range(count):
            starts = data["starts"][rng.integers(0, len(data["starts"]), size)]
            agent, info = update(agent, gather(data, starts, horizon))
        jax.block_until_ready(agent)
        return {key: float(value) for key, value in info.items() if "loss" in key}

    return run


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
