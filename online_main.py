"""Post-trains a pre-trained flow online.

    python online_main.py --agent=agents/otql.py --env_name=OpenMicrowave-v0

    base        a BC flow of the demonstrations, trained here first, or that of --base_checkpoint (the run of any agent
                with a flow); the agent's flow starts from its averaged parameters
    rollouts    --rollout_steps of the base itself: the same for every agent of a seed
    online      --online_steps with --utd_ratio updates each, half of every batch from the demonstrations

An agent that acts by a one-step policy distils it from the base first. Evaluations before the end of the rollouts are
of the base; one at their end is of its flow as the agent acts by it.
"""

import copy
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
from absl import flags

from envs import datasets as env_datasets
from envs.action_units import UNITS
from envs.panda.demonstrate import NAMES, demonstrate
from envs.tasks import Task, make_env, parse_task
from utils.data.batches import describe, first_observation, prepare
from utils.errors import Diverged, UserError
from utils.output.loggers import ProgressBar
from utils.random_streams import Stream, stream_key
from utils.run.directory import run_root
from utils.run.loading import load_base
from utils.run.online import Online
from utils.run.program import Program, define_flag, define_flags
from utils.run.update_loop import NOT_FINITE, UPDATES_PER_CALL, UpdateLoop
from utils.system.cli import parse
from utils.system.entry_point import run_main
from utils.system.files import ROOT
from utils.system.locks import exclusive_lock
from utils.system.signals import run_program
from utils.trees import tree_stack

FLAGS = flags.FlagValues()
define_flags(FLAGS, env_name="OpenMicrowave-v0", log=500, evaluate=1_000, save=1_000)
_flag = functools.partial(define_flag, FLAGS)
_flag("integer", "rollout_steps", 2_000, "Environment steps of the base.", lower_bound=0)
_flag("integer", "online_steps", 8_000, "Environment steps after them.", lower_bound=1)
_flag("integer", "utd_ratio", 10, "Updates an environment step.", lower_bound=1)
_flag("bool", "balanced_sampling", True, "Half of a batch from the demonstrations; else uniform over all.")
_flag("string", "dataset", None, "An .npz file of demonstrations; default: made by the scripted expert.")
_flag("enum", "dataset_actions", "auto", "Units of its actions; scaled: to [-1, 1].", enum_values=list(UNITS))
_flag("integer", "demonstrations", 30, "How many to make.", lower_bound=1)
_flag("float", "tremor", 1.0, "How unsteady the hand is that makes them; 1: a practised person's.", lower_bound=0.0)
_flag("string", "dataset_dir", env_datasets.DEFAULT_DATASET_DIR, "Where they go.")
_flag("string", "base_checkpoint", None, "Directory of the run whose flow is the base; default: trained here.")
_flag("string", "base_group", None, "Run group of the base that is trained here; default: this run's.")
_flag("integer", "base_steps", 20_000, "Updates of the base.", lower_bound=1)
_flag("integer", "base_seed", 0, "Seed of the base, which all agents and seeds share.", lower_bound=0)
_flag("integer", "distill_steps", 10_000, "Updates of a one-step policy before it acts.", lower_bound=1)


def find_demonstrations(task: Task) -> Path:
    """The file of demonstrations, made if need be."""
    if FLAGS.dataset:
        if unused := [f"--{name}" for name in ("demonstrations", "tremor") if FLAGS[name].present]:
            raise UserError(f"{' and '.join(unused)}: nothing is made where --dataset names a file; leave out either")
        return Path(FLAGS.dataset).expanduser()
    if task.name not in NAMES:
        raise UserError(f"there is no scripted expert for {task.name}; give demonstrations by --dataset=<file.npz>")
    return demonstrate(
        task.name, episodes=FLAGS.demonstrations, expert_noise=FLAGS.tremor, dataset_dir=FLAGS.dataset_dir
    )


def find_base(program: Program, demonstrations: Path, units: str) -> Path:
    """The directory of the base's run, which is trained if it is not there or not finished; `units`: of the actions."""
    if FLAGS.base_checkpoint:
        return Path(FLAGS.base_checkpoint).expanduser()
    config, group = program.config, FLAGS.base_group or FLAGS.run_group
    directory = run_root(FLAGS.save_dir, group, FLAGS.env_name) / "bc" / f"sd{FLAGS.base_seed}"
    command = [
        *(sys.executable, str(ROOT / "main.py"), "--agent=agents/bc.py", f"--env_name={FLAGS.env_name}"),
        *(f"--dataset={demonstrations}", f"--dataset_actions={units}"),
        *(f"--preset={FLAGS.preset}", f"--seed={FLAGS.base_seed}"),
        *(f"--save_dir={FLAGS.save_dir}", f"--run_group={group}", f"--offline_steps={FLAGS.base_steps}"),
        *(f"--eval_interval={-(-FLAGS.base_steps // 4)}", f"--eval_episodes={FLAGS.eval_episodes}"),
        *(f"--save_interval={-(-FLAGS.base_steps // 4)}", f"--horizon_length={config.horizon_length}"),
        *(f"--log_interval={-(-FLAGS.base_steps // 20)}", f"--video_episodes={FLAGS.video_episodes}"),
        *(
            f"--agent.actor_hidden_dims={','.join(map(str, config.actor_hidden_dims))}",
            f"--agent.encoder={config.encoder}",
        ),
        *([f"--eval_workers={FLAGS.eval_workers}"] if FLAGS.eval_workers else []),
    ]
    print("base:", " ".join(command[1:]), flush=True)
    with exclusive_lock(directory.with_name(f".{directory.name}.lock")):
        run_program(command, "main.py, for the base,")
    return directory


def distil(agents: Any, trainer: UpdateLoop, num_updates: int) -> Any:
    """Fits the agents' one-step policies, if they have such, to their flow."""
    names = agents.distilled
    if not names:
        return agents
    kind: Any = type(agents)

    class Distilling(kind):
        """The agent with another loss."""

        loss = kind.distill_loss

    # Jit's cache tells classes apart by what is in the static config.
    config = ml_collections.FrozenConfigDict({**agents.config, "algorithm": f"{agents.config.algorithm}, distilling"})
    copied = jax.tree.map(jax.numpy.copy, agents)
    # Keys of their own: the updates that follow count from step 0, too.
    distilling = jax.vmap(lambda key: stream_key(key, Stream.DISTILLATION))
    copied, trainer = copied.replace(key=distilling(copied.key)), copy.copy(trainer)
    trainer.keys = distilling(trainer.keys)
    student = Distilling(**{name: getattr(copied, name) for name in kind.__dataclass_fields__} | {"config": config})
    with ProgressBar(num_updates, description="distillation") as bar:
        for step in range(0, num_updates, UPDATES_PER_CALL):
            student, info = trainer.train(student, step, min(UPDATES_PER_CALL, num_updates - step))
            if (info.pop(NOT_FINITE) > 0).any():
                raise Diverged("distilling the base has diverged; a smaller --agent.lr usually helps")
            bar.update(min(UPDATES_PER_CALL, num_updates - step), {key: float(value[0]) for key, value in info.items()})
    return agents.replace(params=agents.params | {name: student.params[name] for name in names})


def main(argv: Sequence[str]) -> None:
    """Prepares the base, post-trains, evaluates and records; resumes what was begun before."""
    overrides = parse(argv, FLAGS)
    task = parse_task(FLAGS.env_name)
    ends = FLAGS.rollout_steps, FLAGS.rollout_steps + FLAGS.online_steps
    program = Program(FLAGS, task, overrides, ends, logs=("online",), stream=Stream.POST_TRAINING)
    if not (program.lanes or program.unconfirmed):
        return
    if not program.module.Agent.FLOWS:
        raise UserError(f"{FLAGS.agent} has no flow that a base could take the place of; see FLOWS in agents/base.py")
    path = find_demonstrations(task)
    raw, _, info = env_datasets.load_dataset(
        task, dataset_path=path, sparse=program.sparse, with_val=False, actions=FLAGS.dataset_actions
    )
    env_datasets.check_horizon(raw, program.config.horizon_length)
    data = prepare(raw, terminates=task.terminates)
    print(f"demonstrations: {info}")
    info.card.show()
    observation, chunk_dim = first_observation(data), data["actions"].shape[1] * program.config.horizon_length
    dataset = describe(data, path.name)
    program.check(dataset)  # Before a base is trained on them.
    base, origin = load_base(find_base(program, path, info.card.units), program.config, chunk_dim, observation)
    dataset["base"] = origin
    program.confirm(dataset)
    if not program.lanes:
        return
    agents = program.new_agents(data)
    make = functools.partial(make_env, FLAGS.env_name)
    program.start(agents, dataset, observation, make, info.card.record())
    program.base, program.base_steps = tree_stack([base] * len(program.lanes)), FLAGS.rollout_steps
    trainer = UpdateLoop(program.batch_keys(), "device")
    trainer.set_data(data)
    if not program.restored:
        program.agents = distil(program.agents.with_flow(program.base.acting_flow), trainer, FLAGS.distill_steps)
    with program:
        Online(program, trainer, 0).train(FLAGS.rollout_steps, FLAGS.utd_ratio, FLAGS.balanced_sampling)
        program.visit()
        program.finish()


if __name__ == "__main__":
    run_main(main)
