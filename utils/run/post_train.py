"""Online post-training of a pre-trained flow."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from envs import datasets
from envs.panda.demonstrate import NAMES, demonstrate
from envs.tasks import Task, parse_task
from utils.devices import pick_devices
from utils.errors import Diverged, UserError
from utils.output.loggers import ProgressBar
from utils.random_streams import Stream, stream_key
from utils.run.config import PostTrainConfig, RunConfig
from utils.run.dataset import Dataset, make_dataset, rewards_of
from utils.run.directory import run_root
from utils.run.loading import load_base
from utils.run.loop import OnCheckpoint
from utils.run.memory import check_memory, needed_memory
from utils.run.metrics import OnMetrics
from utils.run.phases import OnlinePhase, TrainState
from utils.run.runs import Runs
from utils.run.train import TrainResult, create_agents, env_maker, layout_of, restore_runs, run_phases, train
from utils.run.update_loop import NOT_FINITE, UPDATES_PER_CALL, UpdateLoop
from utils.system.jax_setup import matmul_precision
from utils.system.locks import exclusive_lock
from utils.system.signals import PreemptionGuard
from utils.trees import tree_stack


def post_train(
    config: PostTrainConfig, *, on_metrics: OnMetrics | None = None, on_checkpoint: OnCheckpoint | None = None
) -> TrainResult:
    """Post-trains a flow online in every run of a config; trains the flow first if it is not there; resumes.

    Arguments, result and errors are those of `train`.
    """
    config.validate()
    devices = pick_devices(config.devices)
    with Runs(config, parse_task(config.env_name)) as runs, ExitStack() as stack:
        stack.enter_context(matmul_precision(config.matmul_precision))
        result = TrainResult(tuple(run.path for run in runs.all))
        if not (runs.active or runs.unconfirmed):
            return result
        if not runs.module.Agent.FLOWS:
            raise UserError(f"{config.agent} has no flow that could start as the base's; see FLOWS in agents/base.py")
        dataset, path = load_demonstrations(config, runs)
        runs.check_dataset(dataset.record)  # Before a base is trained on it.
        observation, agent_config = dataset.observation(), runs.agent_config
        chunk_dim = dataset.at(0)["actions"].shape[1] * agent_config.horizon_length
        base_run = find_base(config, agent_config, path, dataset.card.units)
        base, dataset.record["base"] = load_base(base_run, agent_config, chunk_dim, observation)
        runs.confirm(dataset.record)
        if not runs.active:
            return result
        state, saved = restore_runs(runs, create_agents(runs, dataset), dataset)
        bases = tree_stack([base] * len(runs.active))
        updates = UpdateLoop(runs.keys(), "device", layout_of(runs, devices))
        updates.set_data(dataset.at(0))
        agents = state.agents
        if not saved:
            agents = agents.with_flow(bases.acting_flow, bases.targets.get("source"))
        state = TrainState(state.step, updates.place(agents))
        check_memory(needed_memory(updates, state.agents, config, config.total_steps, observation, 0), updates)
        if not saved:
            state = TrainState(0, distill(state.agents, updates, config.distill_steps, config.progress))
        guard = stack.enter_context(PreemptionGuard())
        make, steps = env_maker(config), config.rollout_steps
        own = saved if state.step > 0 else ()
        phase = OnlinePhase(runs, updates, make, observation, guard, 0, steps, own, bases)
        run_phases(runs, state, saved, [phase], dataset, guard, on_metrics, on_checkpoint)
        return result


def load_demonstrations(config: PostTrainConfig, runs: Runs) -> tuple[Dataset, Path]:
    """Loads the demonstrations, made first if need be, and prints their summary; returns them and their file."""
    path = find_demonstrations(config, runs.task)
    raw, _, info = datasets.load_dataset(
        runs.task, dataset_path=path, sparse=runs.sparse, with_val=False, actions=config.dataset_actions
    )
    horizon = runs.agent_config.horizon_length
    dataset = make_dataset(raw, info.card, path.name, runs.task, horizon, rewards_of(config))
    print(f"demonstrations: {info}")
    info.card.show()
    return dataset, path


def find_demonstrations(config: PostTrainConfig, task: Task) -> Path:
    """Returns the file of demonstrations, made if it does not exist.

    Raises:
        UserError: no expert can make them.
    """
    if task.kind == "minari":
        raise UserError(
            f"{task.name}: demonstrations of this program are a file; main.py --online_steps=… trains on Minari's "
            "dataset and then online"
        )
    if config.dataset:
        return Path(config.dataset).expanduser()
    if task.name not in NAMES:
        raise UserError(f"there is no scripted expert for {task.name}; give demonstrations by --dataset=<file.npz>")
    noise, directory = config.expert_noise, config.dataset_dir
    return demonstrate(task.name, episodes=config.demonstrations, expert_noise=noise, dataset_dir=directory)


def find_base(config: PostTrainConfig, agent_config: Any, demonstrations: Path, units: str) -> Path:
    """Returns the directory of the base's run, which is trained if it does not exist or has not finished.

    Args:
        config: of the command. agent_config: of the agent that starts from the base.
        demonstrations: their file. units: of its actions.
    """
    if config.base_checkpoint:
        return Path(config.base_checkpoint).expanduser()
    group, quarter = config.base_group or config.run_group, -(-config.base_steps // 4)
    directory = run_root(config.save_dir, group, config.env_name) / "bc" / f"sd{config.base_seed}"
    base = RunConfig(
        agent="agents/bc.py",
        env_name=config.env_name,
        dataset=str(demonstrations),
        dataset_actions=units,
        preset=config.preset,
        seed=config.base_seed,
        save_dir=config.save_dir,
        run_group=group,
        offline_steps=config.base_steps,
        eval_interval=quarter,
        eval_episodes=config.eval_episodes,
        eval_workers=config.eval_workers,
        save_interval=quarter,
        log_interval=-(-config.base_steps // 20),
        video_episodes=config.video_episodes,
        progress=config.progress,
        devices=config.devices,
        matmul_precision=config.matmul_precision,
        horizon_length=agent_config.horizon_length,
        overrides=flow_overrides(agent_config),
        command=config.command,
    )
    print("base: python main.py", " ".join(base.flag_list()), flush=True)
    with exclusive_lock(directory.with_name(f".{directory.name}.lock")):
        train(base)
    return directory


def flow_overrides(agent_config: Any) -> dict[str, Any]:
    """Returns the settings that a base must share with the agent that starts from its flow."""
    shortcut = agent_config.get("targets") == "shortcut"
    shared = {name: agent_config[name] for name in ("actor_hidden_dims", "encoder")}
    return shared | ({"targets": "shortcut"} if shortcut else {})


def distill(agents: Any, updates: UpdateLoop, num_updates: int, progress: bool = True) -> Any:
    """Returns stacked agents whose one-step policies, if they have any, are fitted to their flow.

    Raises:
        Diverged: losses or parameters are not finite.
    """
    names = agents.distilled
    if not names:
        return agents
    # Keys of their own: the updates that follow count from step 0, too.
    keys = jax.vmap(lambda key: stream_key(key, Stream.DISTILLATION))
    student = jax.tree.map(jnp.copy, agents)
    student, loop = student.replace(key=keys(student.key)), updates.with_keys(keys(updates.keys))
    with ProgressBar(num_updates, description="distillation", show=progress) as bar:
        for step in range(0, num_updates, UPDATES_PER_CALL):
            count = min(UPDATES_PER_CALL, num_updates - step)
            student, info = loop.run(student, step, count, "distill")
            if (info.pop(NOT_FINITE) > 0).any():
                raise Diverged("distilling the base has diverged; a smaller --agent.lr usually helps")
            bar.update(count, {name: float(values[0]) for name, values in info.items()})
    return agents.replace(params=agents.params | {name: student.params[name] for name in names})
