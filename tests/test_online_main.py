"""Online post-training: the base, what every agent starts from, and what it learns."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import optimised
from fork_env import RIGHT, write_demonstrations
from tiny_runs import assert_same_run, assert_same_tree, call, refused, run_dirs, run_main

import online_main
from envs.tasks import parse_task
from utils.data.batches import example_batch, prepare
from utils.output.loggers import read_csv
from utils.run import checkpoints, post_train
from utils.run.agent_config import resolve_config
from utils.run.agent_files import load_agent
from utils.run.config import PostTrainConfig
from utils.run.flags import parse_flags
from utils.run.loading import load_run
from utils.run.update_loop import UpdateLoop
from utils.trees import tree_slice, tree_stack

FORK = "gym:fork_env:Fork-v0"
NETWORKS = ("--agent.actor_hidden_dims=(64,64)", "--agent.value_hidden_dims=(64,64)", "--agent.num_qs=2")
LEARNING = (
    *(
        *NETWORKS,
        "--agent.rho=0",
        "--agent.batch_size=128",
        "--agent.lr=1e-3",
        "--agent.tau=0.02",
        "--horizon_length=2",
    ),
    *("--rollout_steps=200", "--online_steps=600", "--utd_ratio=4", "--base_steps=1500", "--distill_steps=1500"),
    *("--eval_interval=0", "--eval_episodes=150", "--eval_workers=1", "--log_interval=200", "--save_interval=0"),
)
SHORT = (
    *("--agent.actor_hidden_dims=(8,8)", "--agent.value_hidden_dims=(8,8)", "--agent.num_qs=2"),
    *("--agent.batch_size=8", "--horizon_length=2", "--rollout_steps=20", "--online_steps=20", "--utd_ratio=1"),
    *("--base_steps=5", "--distill_steps=5", "--eval_interval=10", "--eval_episodes=2", "--eval_workers=1"),
    *("--log_interval=10", "--save_interval=20"),
)
FQL = ("--agent=agents/fql.py", "--num_seeds=2")
QAM = ("--agent=agents/qam.py",)


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """Lets the base's program, a process of its own, find the environment."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory):
    return write_demonstrations(tmp_path_factory.mktemp("fork") / "fork.npz")


@pytest.fixture(scope="module")
def base(demonstrations, tmp_path_factory):
    """The base of all learning runs: a BC flow, made by the first command that needs one."""
    save_dir = tmp_path_factory.mktemp("base")
    flags = ("--agent=agents/bc.py", f"--env_name={FORK}", f"--dataset={demonstrations}", "--offline_steps=1500")
    flags += ("--seed=3",)  # Seed 0 draws a base that seldom takes the right way with few flow steps.
    shared = [flag for flag in LEARNING if not flag.startswith(("--rollout", "--online", "--utd", "--base", "--dist"))]
    run_main(*flags, *(flag for flag in shared if "value_hidden" not in flag), f"--save_dir={save_dir}")
    return run_dirs(save_dir)[0]


@pytest.fixture
def fork(demonstrations, tmp_path):
    return f"--env_name={FORK}", f"--dataset={demonstrations}", f"--save_dir={tmp_path}"


def run_online(*flags):
    return run_main(*flags, program=online_main)


@pytest.mark.parametrize(
    ("agent", "own"),
    [("otql", ("--agent.lam=1.5", "--agent.flow_steps=3")), ("fql", ("--agent.alpha=3",)), ("ewfm", ())],
)
def test_better_way_is_learnt(agent, own, base, fork, tmp_path):
    """From a base that takes the right way in three of ten episodes, every agent comes to take it."""
    with optimised():
        run_online(*fork, *LEARNING, *own, f"--agent=agents/{agent}.py", f"--base_checkpoint={base}")
    evaluation = read_csv(run_dirs(tmp_path)[0] / "eval.csv")
    start, end = evaluation["success_rate"]
    assert evaluation["step"].tolist() == [200, 800]
    # Before the first update: as good as the base, at whatever NFE the agent has, and no better.
    assert abs(start - RIGHT) < 0.17
    assert end > 0.9


@pytest.fixture(scope="module")
def short(demonstrations, tmp_path_factory):
    """Where runs of FQL (two seeds) and QAM with a base of their own ended, and what they printed."""
    save_dir = tmp_path_factory.mktemp("short")
    flags = (*SHORT, f"--env_name={FORK}", f"--dataset={demonstrations}", f"--save_dir={save_dir}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        outputs = [run_online(*flags, *own).out for own in (FQL, QAM)]
    return save_dir, outputs


def test_base_is_trained_once_and_shared(short):
    """The base's run stands beside the agents', and they begin with its averaged flow and its rollouts."""
    save_dir, outputs = short
    assert all("base: " in out for out in outputs)
    assert [f"{one.parent.name}/{one.name}" for one in run_dirs(save_dir)] == [
        "bc/sd0",
        "fql/sd0",
        "fql/sd1",
        "qam/sd0",
    ]
    directories = {directory.parent.name: directory for directory in run_dirs(save_dir) if directory.name == "sd0"}
    assert read_csv(directories["bc"] / "train.csv")["step"].tolist() == [1, 2, 3, 4, 5]
    rows = {}
    for name in ("fql", "qam"):
        steps = read_csv(directories[name] / "eval.csv")["step"].tolist()
        assert steps == [10, 20, 30, 40]
        state = checkpoints.load(checkpoints.path_of(directories[name] / "checkpoints", 20))
        base_state = checkpoints.load_latest(directories["bc"] / "checkpoints")[1]
        flow = base_state["agent"]["targets"]["flow"]
        for network in ("flow", "slow") if name == "qam" else ("flow",):
            assert_same_tree(state["agent"]["params"][network], flow)
            assert_same_tree(state["agent"]["targets"][network], flow)
        assert state["agent"]["step"] == 0
        rows[name] = state["explorer"]["rows"]
    assert_same_tree(rows["fql"], rows["qam"])


def test_a_shortcut_agent_gets_a_shortcut_base(fork, tmp_path):
    """The base that an agent trains for itself learns the same steps, and the agent's source begins at N(0, I)."""
    flags = (*SHORT, *fork, "--agent.targets=shortcut", "--agent.source=action", "--agent.lr=1e-30")
    run_online(*flags, "--agent=agents/otql.py")
    base, own = sorted(run_dirs(tmp_path))
    assert (base.parent.name, own.parent.name) == ("bc", "otql")
    states = [checkpoints.load_latest(directory / "checkpoints")[1]["agent"] for directory in (base, own)]
    assert_same_tree(states[0]["targets"]["flow"], states[1]["targets"]["flow"])
    assert "source" not in states[0]["params"] and "source" in states[1]["params"]
    agent = load_run(own)[0]
    mean, deviation = agent.source(jnp.ones((3, load_run(own)[1]["observation_dim"])))
    np.testing.assert_allclose(mean, 0, atol=1e-6)
    np.testing.assert_allclose(deviation, 1, rtol=1e-5)


def test_one_step_policy_is_distilled_from_the_base(base, demonstrations):
    """Distilling brings μ(s, z) to the base's samples from the same noise, and touches nothing else."""
    module = load_agent("agents/fql.py")
    flow, settings, _ = load_run(base)
    values = {key: settings["config"][key] for key in ("actor_hidden_dims", "horizon_length", "lr", "flow_steps")}
    config, _, _ = resolve_config(module, "gym", "none", values | {"value_hidden_dims": (8,), "num_qs": 2})
    with np.load(demonstrations) as file:
        data = prepare(dict(file), True)
    agent = module.Agent.create(jax.random.PRNGKey(0), example_batch(data, config.horizon_length), config)
    agents = tree_stack([agent.with_flow(flow.targets["flow"])])
    trainer = UpdateLoop(jax.random.PRNGKey(1)[None], "device")
    trainer.set_data(data)
    with optimised():
        distilled = post_train.distill(agents, trainer, 1500)
    noise = jax.random.normal(jax.random.PRNGKey(2), (200, 4))
    observations = jnp.tile(data["observations"][:1], (200, 1))

    def error(agents):
        agent = tree_slice(agents, 0)
        errors = agent.apply("one_step", observations, noise) - agent.flow_actions(observations, noise)
        return float(np.square(errors).mean())

    assert error(distilled) < 0.05 * error(agents)
    same = {name: params for name, params in distilled.params.items() if name != "one_step"}
    assert_same_tree(jax.device_get(same), jax.device_get({name: agents.params[name] for name in same}))
    assert_same_tree(jax.device_get(distilled.targets), jax.device_get(agents.targets))
    assert type(distilled) is type(agents) and distilled.config == agents.config


@pytest.mark.parametrize(("at", "of", "extra"), [(10, "eval", ""), (30, "eval", ""), (12, "online", "--eval_overlap")])
def test_resumes_exactly(at, of, extra, short, fork, tmp_path, interrupt_at, slow_evaluation):
    """Interrupted while the base acts or while the agent learns, the run ends in the same agent, rows and buffer.

    Also if an evaluation of the base is owed. The base is trained again, or that of the other run.
    """
    unbroken = [directory for directory in run_dirs(short[0]) if directory.parent.name != "qam"]
    broken = (*fork, *SHORT, *FQL, *([extra] if extra else []))
    if at == 30:
        broken += (f"--base_checkpoint={unbroken.pop(0)}",)
    interrupt_at(at, of=of)
    if extra:
        slow_evaluation()
    assert call(*broken, program=online_main).code == 143
    runs_of_fql = [directory for directory in run_dirs(tmp_path) if directory.parent.name == "fql"]
    owing = [checkpoints.load_latest(directory / "checkpoints")[1].get("owed") for directory in runs_of_fql]
    assert [bool(owed) for owed in owing] == [bool(extra)] * 2
    run_online(*broken)
    pairs = list(zip(unbroken, run_dirs(tmp_path), strict=True))
    for one, other in pairs:
        assert (one.parent.name, one.name) == (other.parent.name, other.name)
        assert_same_run(one, other)
    for one, other in pairs[-2:]:
        states = [checkpoints.load_latest(d / "checkpoints")[1]["explorer"] for d in (one, other)]
        assert_same_tree(*({"explorer": state["rows"]} for state in states))
        assert states[0]["transitions"] == states[1]["transitions"] == 40
        assert (one / "online.csv").read_bytes() == (other / "online.csv").read_bytes()


@pytest.mark.check
def test_demonstrators_are_as_asked(monkeypatch):
    seen = []
    monkeypatch.setattr(post_train, "demonstrate", lambda name, **asked: seen.append((name, asked)) or Path("made"))
    flags = ("--env_name=OpenMicrowave-v0", "--dataset=", "--demonstrations=4", "--tremor=3", "--dataset_dir=there")
    config = parse_flags(["online_main", *flags], PostTrainConfig)
    assert post_train.find_demonstrations(config, parse_task("OpenMicrowave-v0")) == Path("made")
    assert seen == [("OpenMicrowave-v0", {"episodes": 4, "expert_noise": 3.0, "dataset_dir": "there"})]


def test_refusals(fork, base, tmp_path):
    """What cannot be done ends in one line."""

    def line(*flags):
        return refused(*flags, program=online_main)

    assert "no flow that could start as the base" in line(*fork, *SHORT, "--agent=agents/qsm.py")
    other = (*fork, *SHORT, "--agent=agents/otql.py", f"--base_checkpoint={base}")
    assert "actor_hidden_dims = (64, 64), the agent (8, 8)" in line(*other)
    assert "horizon_length = 2, the agent 4" in line(*other, "--horizon_length=4", "--agent.actor_hidden_dims=(64,64)")
    assert "not the directory of a run" in line(*fork, *SHORT, f"--base_checkpoint={tmp_path}")
    assert "--demonstrations and --expert_noise: --dataset names a file" in line(
        *fork, *SHORT, "--demonstrations=3", "--tremor=2"
    )
    assert "give demonstrations by --dataset" in line(f"--env_name={FORK}", f"--save_dir={tmp_path}", *SHORT)


def test_a_finished_run_is_of_its_demonstrations_base_and_flags(short, demonstrations, tmp_path):
    shutil.copytree(short[0], tmp_path, dirs_exist_ok=True)
    flags = (*SHORT, *QAM, f"--save_dir={tmp_path}", f"--env_name={FORK}")
    again = run_online(*flags, f"--dataset={demonstrations.parent / '..' / demonstrations.parent.name / 'fork.npz'}")
    assert again.out.startswith("finished before: ")
    own = (*flags, f"--dataset={demonstrations}")
    for change, text in {
        "--rollout_steps=10": "rollout_steps = 20, not 10",
        "--utd_ratio=2": "utd_ratio = 1, not 2",
        "--base_steps=6": "base_steps = 5, not 6",
        "--base_seed=1": "base_seed = 0, not 1",
        "--nobalanced_sampling": "balanced_sampling = True, not False",
    }.items():
        online = "--online_steps=30" if change.startswith("--rollout") else "--online_steps=20"
        assert text in refused(*own, change, online, program=online_main)
    assert "there is no file gone.npz" in refused(*flags, "--dataset=gone.npz", program=online_main)
    with np.load(demonstrations) as file:
        np.savez(tmp_path / "other.npz", **{k: file[k] + (k == "observations") for k in file.files})
    assert "dataset.checksum" in refused(*flags, f"--dataset={tmp_path / 'other.npz'}", program=online_main)
    base = next(directory for directory in run_dirs(tmp_path) if directory.parent.name == "bc")
    assert "finished before" in run_online(*own, f"--base_checkpoint={base}").out
