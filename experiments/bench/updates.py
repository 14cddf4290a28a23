"""Updates a second of every agent with paper networks, beside the public QAM code's: see `experiments.bench`.

Every measurement is a process of its own, ours and theirs in turn, on the same made-up data, cores and matmul
precision. Ours runs the project's training loop (utils/run/update_loop.py); as a program, this file is that process.
The floor of an update is the time of its matrix products alone, at the rate of batched products of the critics' shape
in the same process: both sides do the same products, so it bounds the ratio.
"""

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
from utils.run.agent_config import resolve_config
from utils.run.agent_files import load_agent
from utils.run.update_loop import UPDATES_PER_CALL, UpdateLoop
from utils.system.files import ROOT
from utils.trees import tree_stack

DOMAIN, OBSERVATION_DIM, ACTION_DIM = "scene", 37, 5
OURS = [sys.executable, "-m", "experiments.bench.updates"]
PUBLIC_SCRIPT = ROOT / "experiments" / "bench" / "public_updates.py"
# Our agent → the public one, and the settings that its authors give it on scene.
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
# On scene, QAM-E's scale is 0, which is plain QAM: another domain's stands in for it.
OWN: dict[str, dict[str, Any]] = {"qam_e": {"edit_scale": 0.1}}
# Settings that the public code has under the same name and with the same meaning.
SHARED = (
    *("batch_size", "lr", "discount", "tau", "rho", "num_qs", "horizon_length", "flow_steps"),
    *("actor_hidden_dims", "value_hidden_dims"),
)


@dataclass
class Side:
    """One side of the comparison.

    Attributes:
        command: starts a measurement, given its specification as a last argument. environment: of the process.
        specs: agent → what to measure.
        results: agent → measurements, one a round (see `timed`). failures: agent → why it could not be measured.
    """

    name: str
    command: list[str]
    environment: dict[str, str]
    specs: dict[str, dict[str, Any]]
    results: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def measure(self, agent: str, data: Path, seconds: float) -> None:
        """Measures one agent in a fresh process, unless it failed before."""
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
        """Updates a second: the geometric mean over the rounds, so that a ratio of rates is the mean of ratios."""
        return geometric_mean([result["rate"] for result in self.results[agent]])


def compare(
    agents: list[str],
    overrides: dict[str, str],
    public: str | None,
    public_python: str,
    rounds: int,
    seconds: float,
    precision: str,
) -> tuple[str, bool]:
    """Measures the agents, ours and theirs in turn.

    Args:
        agents: names of files in agents/; none: all there are.
        overrides: settings that replace the preset's, field → text.
        public: a checkout of github.com/ColinQiyangLi/qam, or None: ours alone.
        public_python: a Python that has what that checkout needs.
        rounds: measurements of each. seconds: about what each measurement lasts, besides compilation.
        precision: of matrix products, a value of JAX_DEFAULT_MATMUL_PRECISION.

    Returns:
        a report in Markdown, and whether every measurement succeeded.

    Raises:
        UserError: an unknown agent or setting, or a checkout or Python that does not work.
    """
    agents = named_agents(agents)
    environment = clean_environment(precision)
    specs = {name: {"agent": name, "settings": OWN.get(name, {}) | overrides} for name in agents}
    configs = {name: resolve(spec)[1] for name, spec in specs.items()}
    sides = [Side("ours", OURS, environment, specs)]
    if public is not None:
        sides.append(public_side(public, public_python, environment, configs))
    with tempfile.TemporaryDirectory() as directory:
        data = Path(directory) / "states.npz"
        np.savez(data, **make_states())
        for _ in range(rounds):
            for name in agents:
                for side in sides:
                    side.measure(name, data, seconds)
    return report(agents, sides), not any(side.failures for side in sides)


def clean_environment(precision: str) -> dict[str, str]:
    """The environment of a measurement, with the precision of matrix products."""
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return kept | {"JAX_DEFAULT_MATMUL_PRECISION": precision}


def named_agents(names: Sequence[str]) -> list[str]:
    """The agents of these names, or all.

    Raises:
        UserError: there is no such agent.
    """
    if unknown := [name for name in names if name not in AGENTS]:
        raise UserError(f"there is no agent file agents/{unknown[0]}.py; there are {', '.join(AGENTS)}")
    return list(names or AGENTS)


def resolve(spec: dict[str, Any]) -> tuple[ModuleType, Any]:
    """The module and the settings of one of our agents."""
    module = load_agent(f"agents/{spec['agent']}.py")
    return module, resolve_config(module, DOMAIN, "paper", spec["settings"])[0]


def public_side(checkout: str, python: str, environment: dict[str, str], configs: dict[str, Any]) -> Side:
    """Their side, for those agents of ours that they have, with the settings of `configs` that both share.

    Raises:
        UserError: `checkout` is none, or `python` cannot import it.
    """
    root = Path(checkout).expanduser().resolve()
    if not (root / "agents" / "__init__.py").is_file():
        raise UserError(f"--public={checkout} is no checkout of github.com/ColinQiyangLi/qam: it has no agents/")
    environment = environment | {"PYTHONPATH": str(root), "XLA_FLAGS": USER_XLA_FLAGS}
    # A relative path is one from where the user stands.
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
    """Runs a program that ends by printing a line of JSON, and returns that.

    Raises:
        RuntimeError: it cannot be started or failed; the last line that it wrote to stderr.
    """
    try:
        done = subprocess.run(
            command,
            env=environment,
            cwd=ROOT,
            capture_output=True,
            encoding="utf-8",
            check=False,
        )
    except OSError as error:
        raise RuntimeError(error.strerror or str(error)) from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it wrote nothing to stderr"]
        raise RuntimeError(f"exit code {done.returncode}, {lines[-1].strip()}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def report(agents: list[str], sides: list[Side]) -> str:
    """The measurements as a Markdown table with the ratios first."""
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
        lines += [f"Updates a second, ours over the public QAM code's: **geometric mean {mean:.2f}**"]
        lines += [f"over {len(ratios)} agents, least {ratios[least]:.2f} ({least}); {most:.2f} at the floor.", ""]
    lines += [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]
    lines += ["", "Of the floor: the share of an update's time that its matrix products would take by themselves."]
    lines += ["Critic losses are those of the first few updates. Updates/s are of this machine, and of no other:"]
    for side in sides:
        found: dict[str, Any] = next((results[0]["versions"] for results in side.results.values()), {})
        lines.append(f"- {side.name}: {', '.join(f'{key} {value}' for key, value in found.items())}")
    return "\n".join(lines + [f"- {note}" for note in notes])


def floor_share(agent: str, side: Side, ours: Side) -> float:
    """Which share of an update's time on `side` its matrix products take at the rate measured on our side."""
    results = ours.results[agent]
    return side.rate(agent) * results[0]["gflop"] / geometric_mean([result["matmul_rate"] for result in results])


def critic_loss(measurement: dict[str, Any]) -> float:
    """The TD loss under either side's name for it, NaN for an agent without critic."""
    losses = measurement["losses"]
    return losses.get("critic/loss", losses.get("critic/critic_loss", math.nan))


def geometric_mean(values: list[float]) -> float:
    """The geometric mean of positive numbers."""
    return math.exp(sum(map(math.log, values)) / len(values))


def make_states(episodes: int = 100, length: int = 1001, seed: int = 0) -> dict[str, Any]:
    """Made-up play data, one row a state as utils/data/batches.py has it: smooth motion, a twentieth of it solved."""
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
    """10⁹ floating-point operations of the matrix products in a call; a loop of unknown length counts as one round."""

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
    """10⁹ floating-point operations a second of [members, rows, width] times [members, width, width]: the best call."""
    product = jax.jit(lambda x, w: jnp.einsum("kmi,kij->kmj", x, w))
    x, w = jnp.ones((members, rows, width)), jnp.ones((members, width, width))
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        jax.block_until_ready(product(x, w))
        seconds.append(time.perf_counter() - start)
    return 2 * members * rows * width**2 / min(seconds) / 1e9


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Trains `lanes` agents of ours on the data, in the segments that main.py trains in; returns what `timed` does.

    The rate is the sum over lanes. With `stepwise`, the agent is driven the public way instead: one jitted update a
    Python step, its batch sampled on the host.
    """
    module, config = resolve(spec)
    with np.load(spec["data"]) as file:
        data = prepare(dict(file), terminates=False)
    create = jax.jit(partial(module.Agent.create, config=config))
    example = example_batch(data, config.horizon_length)
    lanes = [create(jax.random.PRNGKey(i), example) for i in range(spec.get("lanes", 1))]
    rows = jax.device_put(gather(data, data["starts"][: config.batch_size], config.horizon_length))
    batch = assemble(rows, config.discount, config.window_rule)
    floor = {
        "gflop": count_gflop(lambda agent: agent.update(batch), lanes[0]),
        "matmul_rate": measure_matmul(config.num_qs, config.batch_size, config.value_hidden_dims[0]),
    }
    run = stepwise(lanes[0], data) if spec.get("stepwise") else fused(tree_stack(lanes), data)
    result = timed(run, spec["seconds"]) | floor | {"versions": versions()}
    return result | {"rate": result["rate"] * len(lanes)}


def fused(agents: Any, data: dict[str, np.ndarray]) -> Callable[[int], dict[str, float]]:
    """`run` for `timed`: the project's training loop."""
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
    """`run` for `timed`: one jitted update a Python step, on rows that NumPy picks."""
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
