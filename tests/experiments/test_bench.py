"""The benchmarks: measurements of both sides, and their reports."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agents import AGENTS
from experiments.bench import command as bench
from experiments.bench import kernels as bench_kernels
from experiments.bench import public_updates
from experiments.bench import seeds as bench_seeds
from experiments.bench import updates as bench_updates
from utils.data import batches
from utils.errors import UserError
from utils.run.agent_config import resolve_config
from utils.run.agent_files import load_agent
from utils.system.cli import last_of_each
from utils.system.files import ROOT
from utils.trees import tree_stack

TINY = ("--agent.actor_hidden_dims=8", "--agent.value_hidden_dims=8", "--agent.num_qs=2", "--agent.batch_size=4")
# A stand-in for the public code: same calls, an update that checks what it is given and how it is called.
AGENT_FILES = """
import flax, jax, jax.numpy as jnp, ml_collections

def get_config():
    place = ml_collections.config_dict.placeholder
    return ml_collections.ConfigDict(dict(
        agent_name="fql", batch_size=256, horizon_length=place(int), discount=0.5, alpha=1.0,
        actor_hidden_dims=(512,), action_chunking=False))

class Agent(flax.struct.PyTreeNode):
    count: jax.Array
    config: dict = flax.struct.field(pytree_node=False)

    @classmethod
    def create(cls, seed, observation, action, config):
        assert observation.shape == (37,) and action.shape == (5,) and config["action_chunking"], config
        assert config["discount"] == 0.99 and config["actor_hidden_dims"] == (8,), config
        return cls(jnp.zeros(()), flax.core.FrozenDict(**config))

    @jax.jit
    def update(self, batch):
        assert batch["actions"].shape == (4, 5, 5), batch["actions"].shape
        return self.replace(count=self.count + 1), {"critic/critic_loss": self.count, "v": self.count}

agents = {"fql": Agent}
"""
DATASETS = """
class Dataset(dict):
    @classmethod
    def create(cls, **fields):
        return cls(fields)

    def sample(self, size):
        return {k: v[0] for k, v in self.items()}

    def sample_sequence(self, batch_size, sequence_length, discount):
        return {"actions": self["actions"][: batch_size * sequence_length].reshape(batch_size, sequence_length, -1)}
"""


@pytest.fixture
def checkout(tmp_path):
    """A directory laid out as the public code."""
    files = {"agents/__init__.py": AGENT_FILES, "agents/fql.py": "from agents import get_config\n"}
    for name, text in (files | {"utils/__init__.py": "", "utils/datasets.py": DATASETS}).items():
        path = tmp_path / "checkout" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "checkout"


@pytest.fixture
def cores():
    """Gives back the cores that a benchmark took from this process."""
    before = os.sched_getaffinity(0)
    yield before
    os.sched_setaffinity(0, before)


@pytest.fixture
def run_bench(tmp_path):
    """Runs the benchmark; its report goes to the test's directory."""

    def run(*flags, part="updates"):
        for name in bench.FLAGS:
            bench.FLAGS[name].unparse()
        bench.main(["bench", *last_of_each([f"--part={part}", f"--output={tmp_path}", *flags])])

    return run


def test_both_sides(checkout, capsys, cores, run_bench):
    run_bench(*TINY, "--agents=fql", f"--public={checkout}", "--rounds=2", "--seconds=0.01", "--cores=1")
    out, err = capsys.readouterr()
    (row,) = [row.split(" | ") for row in out.splitlines() if row.startswith("| fql ")]
    _, ratio, _, ours, theirs, share, their_share, _, loss = row
    shares = [float(text.strip("%")) for text in (share, their_share)]
    # The ratio is shown to two decimals, shares to whole percents.
    rounding = 1 + 0.006 * shares[1]
    assert shares[0] >= 0 and shares[0] == pytest.approx(shares[1] * float(ratio.strip("*")), abs=rounding)
    assert float(ratio.strip("*")) == pytest.approx(float(ours) / float(theirs), abs=0.01)
    # After the warm-up and as many updates again, one call each; the stand-in counts from zero.
    assert loss == f"{2 * public_updates.WARM_UP - 1} |"
    assert f"geometric mean {ratio.strip('*')}" in out and out.count("device 1 CPU cores") == 2
    assert [line.split(":")[0] for line in err.splitlines()] == ["fql, ours", "fql, theirs"] * 2 + ["report"]


def test_agents_that_they_lack_are_measured_alone(checkout):
    config, _, _ = resolve_config(load_agent("agents/fql.py"), "scene", "paper", {"num_qs": "2"})
    side = bench_updates.public_side(str(checkout), sys.executable, dict(os.environ), {"bc": config, "fql": config})
    assert list(side.specs) == ["fql"]
    settings = side.specs["fql"]["settings"]
    assert settings["num_qs"] == 2 and settings["alpha"] == 300.0 and settings["horizon_length"] == 5
    side.measure("bc", Path("nowhere"), 1.0)
    assert side.results == side.failures == {}


def test_failed_measurement_leaves_the_others(checkout, capsys, run_bench):
    with (checkout / "agents" / "fql.py").open("a") as file:
        file.write("raise ValueError('broken')\n")
    with pytest.raises(SystemExit, match="1"):
        run_bench(*TINY, "--agents=fql", f"--public={checkout}", "--rounds=1", "--seconds=0.01")
    out = capsys.readouterr().out
    assert "fql, theirs, failed: exit code 1, ValueError: broken" in out and "geometric" not in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--agents=fqll"], "there is no agent file agents/fqll.py; there are bc, "),
        (["--agent.num_q=2"], "agent fql has no setting 'num_q'"),
        (["--public=nowhere"], "--public=nowhere is not a checkout of github.com/ColinQiyangLi/qam: it has no agents/"),
        (["--public_python=/no/python"], "--public_python=/no/python cannot import"),
        (["--public_python=/bin/false"], "exit code 1, it wrote nothing to stderr; it needs jax 0.5.3"),
    ],
)
def test_mistakes(flags, message, checkout, run_bench):
    with pytest.raises(UserError) as error:
        run_bench("--agents=fql", f"--public={checkout}", *flags)
    assert message in str(error.value)


def test_python_without_jax_ends_in_one_line(checkout, tmp_path):
    (tmp_path / "jax.py").write_text("raise ModuleNotFoundError(\"No module named 'jax'\")\n")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path}:$PYTHONPATH exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    command = [sys.executable, "-m", "experiments.bench", "--part=updates", "--agents=fql"]
    command += [f"--public={checkout}", f"--public_python={python}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stdout == ""
    assert "No module named 'jax'; it needs jax 0.5.3" in done.stderr


def test_public_transitions_are_the_same_windows():
    states = bench_updates.make_states(episodes=2, length=6)
    rows, data = public_updates.transitions(states), batches.prepare(states, False)
    assert len(rows["rewards"]) == 10 and rows["terminals"].tolist() == [0, 0, 0, 0, 1] * 2
    windows = batches.gather(data, np.arange(3), 3)
    np.testing.assert_array_equal(rows["observations"][:3], windows["observations"])
    np.testing.assert_array_equal(rows["actions"][np.arange(3)[:, None] + np.arange(3)], windows["actions"])
    np.testing.assert_array_equal(rows["next_observations"][2:5], windows["next_observations"])
    # The second episode begins where the first one's final state was left out.
    np.testing.assert_array_equal(rows["observations"][5], states["observations"][6])
    np.testing.assert_array_equal(rows["next_observations"][4], states["observations"][5])


def test_timed_counts_by_speed(monkeypatch):
    calls = []
    monkeypatch.setattr(public_updates, "WARM_UP", 2)
    result = public_updates.timed(lambda count: calls.append(count) or {"loss": sum(calls)}, 1e-9)
    assert calls == [2, 2, 4] and result["updates"] == 4 and result["losses"] == {"loss": 4}


@pytest.mark.check
def test_report_means_are_geometric():
    versions = {"versions": {"jax": "0"}}
    floor = {"gflop": 10.0, "matmul_rate": 40.0}
    rounds = [{"rate": rate, "losses": {"critic/loss": 1.0}} | floor | versions for rate in (1.0, 4.0)]
    others = [{"rate": rate, "losses": {"critic/critic_loss": 2.0}} | versions for rate in (1.0, 1.0)]
    ours = bench_updates.Side("ours", [], {}, {}, {"a": rounds, "b": [rounds[0]] * 2})
    theirs = bench_updates.Side("theirs", [], {}, {}, {"a": others, "b": [others[0]] * 2})
    text = bench_updates.report(["a", "b"], [ours, theirs])
    assert "| a | **2.00** | 1.00 to 4.00 | 2 | 1 | 50% | 25% | 1 | 2 |" in text
    assert "geometric mean 1.41**\nover 2 agents, least 1.00 (b); 4.00 at the floor." in text


@pytest.mark.check
def test_matrix_products_are_counted():
    """Loops by their length, the backward pass twice, and nothing but products."""
    x, w = jnp.ones((4, 3)), jnp.ones((3, 3))

    def forward(w):
        return jax.lax.scan(lambda y, _: (jnp.tanh(y @ w), None), x, None, length=5)[0].sum()

    assert bench_updates.count_gflop(forward, w) == pytest.approx(5 * 2 * 4 * 3 * 3 / 1e9)
    assert bench_updates.count_gflop(jax.jit(jax.grad(forward)), w) == pytest.approx(3 * 5 * 2 * 4 * 3 * 3 / 1e9)
    batched = bench_updates.count_gflop(
        lambda a, b: jnp.einsum("kmi,kij->kmj", a, b), jnp.ones((7, 4, 3)), jnp.ones((7, 3, 2))
    )
    assert batched == pytest.approx(7 * 2 * 4 * 3 * 2 / 1e9)
    assert bench_updates.measure_matmul(2, 8, 16, calls=2) > 0


def test_every_public_agent_is_compared():
    """A renamed agent file would lose its comparison without a word."""
    assert set(bench_updates.PUBLIC) <= set(AGENTS)


def test_seeds_in_parallel(tmp_path, capsys, run_bench):
    run_bench("--agent=agents/fql.py", "--num_seeds=2,1", *TINY, "--rounds=1", "--seconds=0.01", part="seeds")
    out, err = capsys.readouterr()
    rows = {row.split(" | ")[0].strip("| "): row.split(" | ")[1:] for row in out.splitlines() if row.startswith("| ")}
    assert list(rows)[1:] == ["step by step", "1 in parallel", "2 in parallel"]
    assert rows["step by step"][1] == "**1.00**"
    rates = [float(rows[name][0]) for name in list(rows)[1:]]
    assert float(rows["2 in parallel"][1].strip("*")) == pytest.approx(rates[2] / rates[0], rel=0.02)
    assert "Beyond `--num_seeds=" in out and f"report: {tmp_path / 'bench.md'}" in err
    assert (tmp_path / "bench.md").read_text().strip() == out.strip() and "![](seeds_fql.png)" in out
    assert (tmp_path / "seeds_fql.png").read_bytes().startswith(b"\x89PNG")


def test_actions(capsys, run_bench):
    """The first agent is what the others are compared to."""
    run_bench("--env_name=OpenMicrowave-v0", "--agents=fql,qc", "--rounds=1", part="actions")
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [row[:3] for row in rows] == [["| fql", "1", "1"], ["| qc", "10", "32"]]
    ours, theirs = (float(row[3].strip(" |")) for row in rows)
    assert ours == 1 and theirs > 0


def test_starts(tmp_path, capsys, run_bench):
    rng, size = np.random.default_rng(0), 200
    data = {"observations": rng.normal(size=(size, 3)), "actions": rng.uniform(-1, 1, (size, 2))}
    np.savez(tmp_path / "own.npz", **data, rewards=-np.ones(size), terminals=np.zeros(size))
    task = ("--env_name=robot:own", f"--dataset={tmp_path / 'own.npz'}", "--lanes=1", "--agent=agents/fql.py", *TINY)
    run_bench(*task, part="starts")
    out = capsys.readouterr().out
    rows = {row[0]: float(row[1]) for row in re.findall(r"^\| (first|second|1) \| ([\d.]+) \|$", out, re.M)}
    # A process that imports JAX takes at least this long, and this much memory.
    assert min(rows["first"], rows["second"]) > 0.2 and 0.1 < rows["1"] < 20
    assert "own.npz, 199 transitions" in out
    with pytest.raises(UserError, match=r"main\.py failed: error: .*nothing\.npz"):
        run_bench(*task, "--dataset=nothing.npz", part="starts")


def test_stepwise_updates_are_those_of_the_loop():
    """The same rows give the same losses, whichever way the agent is driven."""
    _, config = bench_updates.resolve(
        {"agent": "fql", "settings": dict(flag.removeprefix("--agent.").split("=") for flag in TINY)}
    )
    data = batches.prepare(bench_updates.make_states(episodes=2, length=20), terminates=False)
    data["starts"] = data["starts"][:1]  # every batch is this window, whoever draws it
    module = load_agent("agents/fql.py")
    agent = module.Agent.create(jax.random.PRNGKey(0), batches.example_batch(data, config.horizon_length), config)
    loop = bench_updates.fused(tree_stack([agent]), data)(1)
    steps = bench_updates.stepwise(agent, data)(1)
    assert loop.keys() == steps.keys() and loop == pytest.approx(steps, rel=1e-4)


def test_knee():
    assert bench_seeds.knee([1, 2, 4, 8], np.array([1, 2, 3.9, 5])) == 4
    assert bench_seeds.knee([1, 2, 4], np.array([1, 1.1, 4])) == 1
    assert bench_seeds.knee([2, 3], np.array([1, 1.3])) == 3


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--num_seeds=0,1"], "whole numbers"),
        (["--lanes=a"], "whole numbers"),
        (["--agent=agents/none.py"], "agents/{bc,"),
    ],
)
def test_mistakes_about_seeds(flags, message):
    for name in bench.FLAGS:
        bench.FLAGS[name].unparse()
    with pytest.raises(UserError, match=message.replace("{", "[{]")):
        bench.main(["bench", "--part=seeds", *flags])


def test_every_agent_has_a_floor(tmp_path):
    """Agents whose update loops until it has converged, and those that index what they are given, included."""
    data = tmp_path / "states.npz"
    np.savez(data, **bench_updates.make_states(episodes=2, length=30))
    settings = dict(flag.removeprefix("--agent.").split("=") for flag in TINY)
    for agent in ("otql", "ewfm"):
        spec = {"agent": agent, "settings": settings, "data": data, "seconds": 0.01}
        result = bench_updates.measure(spec)
        assert result["gflop"] > 0 and result["matmul_rate"] > 0 and result["rate"] > 0


PROGRAM = """HloModule jit_train

%step.1 (p: f32[4]) -> f32[4] {
  %loop_add_fusion.2 = f32[4]{0} fusion(%p), kind=kLoop, calls=%f, metadata={op_name="jit(train)/while/add"}
  ROOT %copy.3 = f32[4]{0} copy(%loop_add_fusion.2)
}

%block.2 (p: f32[4]) -> f32[4] {
  ROOT %copy.4 = f32[4]{0} copy(%p)
}

%update.3 (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %get-tuple-element.1 = f32[4]{0} get-tuple-element(%p), index=1
  %gemm_fusion_dot.7 = f32[4]{0} fusion(%get-tuple-element.1), kind=kCustom, calls=%g
  %while.1 = f32[4]{0} while(%gemm_fusion_dot.7), body=%step.1, backend_config={"known_trip_count":{"n":"3"}}
  %loop_add_fusion.6 = f32[4]{0} fusion(%gemm_fusion_dot.7), kind=kLoop, calls=%f
  %while.2 = f32[4]{0} while(%while.1), condition=%c, body=%block.2, metadata={op_name="jit(train)/while"}
  %cublas-lt-matmul.8 = (f32[4]{0}, s8[64]{0}) custom-call(%while.2), custom_call_target="__cublas$lt$matmul"
  ROOT %tuple.9 = (s32[], f32[4]{0}) tuple(%c, %while.2)
}

ENTRY %main.4 (p: f32[4]) -> f32[4] {
  %copy.1 = f32[4]{0} copy(%p)
  ROOT %while.5 = (s32[], f32[4]{0}) while(%copy.1), condition=%c, body=%update.3
}
"""


@pytest.mark.check
def test_kernels_of_a_program_are_counted():
    """Two products, a sum, three rounds of two kernels, and one of a loop of unknown length; no tuple is one."""
    program = bench_kernels.Program(PROGRAM)
    assert program.update() == "update.3"
    assert program.total("update.3") == 2 + 1 + 3 * 2 + 1 and program.products("update.3") == 2


def test_kernels_need_a_compiler(run_bench, monkeypatch):
    monkeypatch.setattr(bench_kernels, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"install it with: pip install 'jax\[cuda13\]'"):
        run_bench("--agents=bc", part="kernels")


# Kernels of one update with the paper's networks; see docs/results/accelerators.md.
MOST = {"otql": 385, "fql": 293, "qam": 575, "bc": 49}


@pytest.mark.skipif(not bench_kernels.compiler_installed(), reason="JAX's CUDA compiler is not installed")
@pytest.mark.parametrize("name", MOST)
def test_updates_launch_few_kernels(name, run_bench, capsys):
    run_bench(f"--agents={name}", "--num_seeds=1", part="kernels")
    (row,) = [row.split(" | ") for row in capsys.readouterr().out.splitlines() if row.startswith(f"| {name} ")]
    assert 0 < int(row[2]) <= MOST[name]
