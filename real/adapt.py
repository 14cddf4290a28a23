"""Adapts a policy on a robot in rounds (paper §4.3).

    python -m real.adapt --name=pick_cube --demos=DATASET --robot='…'

    base      trains a BC flow on the demonstrations and exports it
    round r   records --rollouts episodes of the newest policy on the robot; imports demonstrations and all rollouts so
              far; trains OTQL for --round_steps updates, from the base's flow or the round before; exports the policy
    end       after --total_rollouts episodes, and --final_rollouts of the last policy

Training needs no robot, and the robot no training: before each round of rollouts the program stops and prints the
command to run, otql-rollout; rerun the same command after that. With --unattended, for a simulated robot, the program
runs it itself. Finished steps are never repeated. In --robot, {round} becomes the number of the round.

Below <output_dir>/<name>: adaptation.json, the settings; demos.npz and round1.npz, …; runs/; policies/base,
policies/round1, …; rollouts/round1, …; eval.csv and adaptation.png, the success rate of each policy's rollouts
over updates.
"""

import json
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from envs.tasks import parse_task
from real.dataset import Recording, read_recording
from real.export import export
from real.import_rollouts import NORMS, import_rollouts
from real.labels import successes
from real.policy_tensors import policy_tensors
from utils.errors import UserError
from utils.observations import blank
from utils.output.intervals import wilson_interval
from utils.output.plotting import learning_curve
from utils.output.tables import csv_text, markdown_table
from utils.run.agent_config import resolve_config
from utils.run.agent_files import load_agent
from utils.run.config import RunConfig
from utils.run.directory import run_root
from utils.run.train import train
from utils.system.cli import define_flag, parse
from utils.system.entry_point import run_main
from utils.system.files import atomic_write_text, read_json, write_json
from utils.system.signals import run_program

FLAGS = flags.FlagValues()
for kind, name, default, text in (
    ("string", "name", "task", "Name of the task: letters, digits, '_', '-', '.'."),
    ("string", "task", None, "Task description that LeRobot records; default: the name."),
    ("string", "demos", None, "Folder of the demonstrations, a LeRobotDataset."),
    ("string", "output_dir", "exp/robot", "Folder of all output."),
    ("string", "robot", None, "LeRobot's flags for the robot, '--robot.type=… --robot.port=…'."),
    ("string", "rollout", "otql-rollout", "The program that records rollouts."),
    ("string", "rollout_flags", "", "Further flags for it, such as those of a teleoperator for resets."),
    ("bool", "unattended", False, "Run LeRobot's command instead of stopping; for a simulated robot."),
    ("list", "features", ["observation.state"], "Features of the observation: states and cameras."),
    ("string", "agent", "agents/otql.py", "Agent file; --agent.<field>=<value> changes one of its settings."),
    ("string", "preset", "paper", "Settings of the domain 'robot': paper (Tables 7, 8), cpu or none."),
    ("string", "device", "cpu", "Device that runs the policy on the robot's computer."),
):
    define_flag(FLAGS, kind, name, default, text)
for name, default, text, known in (
    ("state_norm", "mean_std", "Normalisation of states.", NORMS),
    (
        "action_norm",
        "min_max",
        "Normalisation of actions.",
        NORMS[1:],
    ),  # mean_std would clip at one deviation.
):
    define_flag(FLAGS, "enum", name, default, text, enum_values=list(known))
for name, number, text in (
    ("rollouts", 10, "Episodes per round."),
    ("total_rollouts", 50, "Episodes in total."),
    ("round_steps", 20_000, "Updates per round."),
    ("base_steps", 20_000, "Updates of the base."),
    ("max_steps", 150, "Frames per episode that count."),
    ("image_size", 64, "Side length of the images in training, in pixels."),
    ("fps", 30, "Frames per second of the recordings and the demonstrations."),
):
    define_flag(FLAGS, "integer", name, number, text, lower_bound=1)
define_flag(FLAGS, "integer", "episode_time_s", None, "Seconds per episode; default: as max_steps.", lower_bound=1)
define_flag(FLAGS, "integer", "final_rollouts", 0, "Episodes of the last policy, not used in training.", lower_bound=0)
define_flag(FLAGS, "integer", "seed", 0, "Seed of base and rounds.", lower_bound=0)

_GROWING = ("total_rollouts", "final_rollouts")
_LATE = "lower --episode_time_s and record that round again, or raise --max_steps with another --name"


class RolloutsNeeded(Exception):
    """Raised when rollouts must be recorded by a person; the message contains the command."""


def split_flags(flag: str) -> list[str]:
    """Splits the value of a flag into LeRobot's flags."""
    try:
        return shlex.split(FLAGS[flag].value)
    except ValueError as error:
        raise UserError(f"--{flag}={FLAGS[flag].value}: {error}") from error


def recorded(root: Path) -> int:
    """Returns the number of saved episodes of a recording."""
    return int(read_json(root / "meta" / "info.json", missing_ok=True).get("total_episodes", 0))


def rollout_command(policy: Path, root: Path, episodes: int, number: int) -> list[str]:
    """Returns the command that records the missing ones of `episodes` episodes of a policy."""
    done = recorded(root)
    seconds = FLAGS.episode_time_s or (FLAGS.max_steps - 0.5) / FLAGS.fps  # LeRobot ends an episode after the frame.
    command = [
        *split_flags("rollout"),
        *(word.replace("{round}", str(number)) for word in split_flags("robot")),
        *(f"--policy.path={policy}", f"--policy.device={FLAGS.device}", f"--fps={FLAGS.fps}"),
        *(f"--dataset.repo_id=local/rollout_{root.name}", f"--dataset.root={root}", "--dataset.no_stamp=true"),
        *(f"--dataset.single_task={FLAGS.task or FLAGS.name}", f"--dataset.num_episodes={episodes - done}"),
        *(f"--dataset.fps={FLAGS.fps}", f"--dataset.episode_time_s={seconds:.9g}"),
        *("--dataset.push_to_hub=false", "--play_sounds=false"),
        *split_flags("rollout_flags"),
    ]
    return [*command, "--resume=true"] if done else command


def collect_rollouts(policy: Path, root: Path, episodes: int, number: int) -> None:
    """Ensures that `episodes` episodes of a policy are recorded.

    Raises:
        RolloutsNeeded: episodes are missing, and a person has to record them.
        UserError: the recording cannot be resumed, or LeRobot failed.
    """
    if recorded(root) >= episodes:
        return
    if root.exists():
        check_broken(root)
    command = rollout_command(policy, root, episodes, number)
    if not FLAGS.unattended:
        missing = episodes - recorded(root)
        raise RolloutsNeeded(f"{missing} rollouts of {policy} have to be recorded:\n\n{shlex.join(command)}")
    run_program(command, FLAGS.rollout)
    if recorded(root) < episodes:
        raise UserError(f"{root} has {recorded(root)} of {episodes} episodes; rerun the same command to resume")


def check_broken(root: Path) -> None:
    """Checks that LeRobot can resume a recording.

    Raises:
        UserError: it was interrupted before its first episode or without closing its files; or it is still running.
    """
    try:
        if recorded(root):
            read_recording(root, list(FLAGS.features), "action")
            return
        reason = "it has no episode"
    except UserError as error:
        reason = str(error)
    raise UserError(f"{root} cannot be resumed ({reason}); if nothing records there, move it elsewhere to record anew")


def check_settings(demos: Recording, config: Any) -> None:
    """Checks the settings before anything is trained or recorded.

    Raises:
        UserError: they do not fit the demonstrations, each other, or the LeRobot policy.
    """
    parse_task(f"robot:{FLAGS.name}")
    for flag in ("robot", "rollout_flags"):
        split_flags(flag)
    if not split_flags("rollout"):
        raise UserError("--rollout is missing; see --help")
    if FLAGS.unattended and not shutil.which(split_flags("rollout")[0]):
        raise UserError(f"no program {split_flags('rollout')[0]} found; name it: --rollout=<bin>/otql-rollout")
    if not load_agent(FLAGS.agent).Agent.FLOWS:
        raise UserError(f"{FLAGS.agent} has no flow to warm-start from the base; see FLOWS in agents/base.py")
    if demos.fps != FLAGS.fps:
        raise UserError(f"{demos.root} has {demos.fps:g} frames a second; give --fps={demos.fps:g}")
    episode_success(demos, "raise it, or record at a lower rate", "success")
    policy_tensors(blank_agent(demos, config))


def blank_agent(demos: Recording, config: Any) -> Any:
    """Returns the agent with parameters of zeros, without initialising it."""
    images = (len(demos.cameras), FLAGS.image_size, FLAGS.image_size, 3) if demos.cameras else None
    example = {
        "observations": blank(1, len(demos.state_names), images),
        "actions": np.zeros((1, config.horizon_length * len(demos.action_names)), np.float32),
    }
    create = load_agent(FLAGS.agent).Agent.create
    shapes = jax.eval_shape(lambda: create(jax.random.PRNGKey(FLAGS.seed), example, config))
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


def episode_success(recording: Recording, advice: str, unlabelled: str = "error") -> list[bool]:
    """Returns the success of each episode of a recording; `unlabelled`: see `successes`.

    Raises:
        UserError: an episode succeeds after --max_steps, where the import no longer counts it; ends in `advice`.
    """
    counted = successes(recording, None, unlabelled)
    late = [number for number, (success, length) in enumerate(counted) if success and length > FLAGS.max_steps]
    if late:
        raise UserError(
            f"episode {late[0]} of {recording.root} succeeds after --max_steps={FLAGS.max_steps} frames, so it would "
            f"count as a failure: {advice}"
        )
    return [success for success, _ in counted]


def check_settings_unchanged(root: Path, settings: dict[str, Any]) -> None:
    """Writes the settings that determine the result, or compares them with those written before.

    Raises:
        UserError: a setting changed; those of _GROWING may grow.
    """
    settings = json.loads(json.dumps(settings))
    before = read_json(root / "adaptation.json", missing_ok=True) or settings  # Older directories have no such file.
    for name in sorted(before.keys() | settings.keys()):
        was, now = before.get(name), settings.get(name)
        grown = name in _GROWING and was is not None and now is not None and was < now
        if was != now and not grown:
            raise UserError(f"{root} was started with --{name}={was}, not {now}; use that, or another --name")
    total, final = before["total_rollouts"], root / "rollouts" / "final"
    if settings["total_rollouts"] > total and (total % settings["rollouts"] or final.exists()):
        reason = f"{final} exists" if final.exists() else "its last round is incomplete"
        raise UserError(f"{root} ends after --total_rollouts={total} ({reason}); use another --name for more")
    write_json(root / "adaptation.json", settings)


def train_and_export(
    root: Path, group: str, agent: str, data: Path, steps: int, features: str, **settings: Any
) -> tuple[Path, Path]:
    """Trains an agent and exports it, unless done; returns the directories of the run and the policy."""
    config = RunConfig(
        agent=agent,
        env_name=f"robot:{FLAGS.name}",
        dataset=str(data),
        preset=FLAGS.preset,
        seed=FLAGS.seed,
        offline_steps=steps,
        save_dir=str(root / "runs"),
        run_group=group,
        save_interval=5000,
        log_interval=1000,
        **settings,
    )
    run = run_root(config.save_dir, group, config.env_name) / Path(agent).stem / f"sd{FLAGS.seed}"
    policy = root / "policies" / group
    if not policy.exists():
        train(config)
        export(run, policy, features)
    return run, policy


def report(root: Path, evaluations: list[tuple[int, list[bool]]]) -> None:
    """Writes and prints the success rates of the policies.

    Args:
        root: folder of the adaptation.
        evaluations: number of updates and success of each episode, for each policy.
    """
    rows, lines = [], []
    for step, solved in evaluations:
        rate = sum(solved) / len(solved)
        low, high = wilson_interval(rate, len(solved))
        rows.append([step, len(solved), rate])
        lines.append([str(step), str(len(solved)), f"{rate:.2f} ({low:.2f} to {high:.2f})"])
    print(f"\n{markdown_table(['updates', 'rollouts', 'success'], lines)}")
    atomic_write_text(root / "eval.csv", csv_text([["step", "episodes", "success_rate"], *rows]))
    learning_curve(root, root / "adaptation.png", title=f"{FLAGS.name}: rollouts of each policy")


def adapt(root: Path, overrides: dict[str, str]) -> None:
    """Runs the steps that remain, up to the next recording by a person.

    Raises:
        RolloutsNeeded: rollouts have to be recorded.
        UserError: invalid data or settings, or the robot failed.
    """
    demos, features = Path(FLAGS.demos).expanduser(), list(FLAGS.features)
    config, _, _ = resolve_config(load_agent(FLAGS.agent), "robot", FLAGS.preset, overrides)
    shown = read_recording(demos, features, "action")
    exported = ",".join([*(f"{feature}:{size}" for feature, size in shown.widths.items()), *shown.cameras])
    check_settings(shown, config)
    names = ("agent", "preset", "seed", "base_steps", "round_steps", "rollouts", *_GROWING)
    settings = {"demos": str(demos.resolve())} | {name: FLAGS[name].value for name in names}
    check_settings_unchanged(root, settings | {f"agent.{field}": config[field] for field in overrides})
    data = root / "demos.npz"
    shared: dict[str, Any] = {"features": features, "max_steps": FLAGS.max_steps}
    shared |= {"image_size": FLAGS.image_size} if shown.cameras else {}
    norms: dict[str, Any] = {"state_norm": FLAGS.state_norm, "action_norm": FLAGS.action_norm}
    if not data.exists():
        print(import_rollouts([demos], data, **shared, **norms, unlabelled="success"), flush=True)
    before = read_json(data.with_suffix(".json"), missing_ok=True)
    for key, value in (shared | norms).items():
        if before.get(key) != value:
            raise UserError(f"{root} was started with {key} = {before.get(key)}, not {value}; use another --name")
    networks = {name: config[name] for name in ("actor_hidden_dims", *(["encoder"] if shown.cameras else []))}
    base: dict[str, Any] = {"horizon_length": config.horizon_length, "overrides": networks}
    run, policy = train_and_export(root, "base", "agents/bc.py", data, FLAGS.base_steps, exported, **base)
    step, evaluations, recordings = 0, [], []
    rounds = -(-FLAGS.total_rollouts // FLAGS.rollouts)
    for number in range(1, rounds + 1 + (FLAGS.final_rollouts > 0)):
        last = number > rounds
        episodes = min(FLAGS.rollouts, FLAGS.total_rollouts - FLAGS.rollouts * (number - 1))
        recording = root / "rollouts" / ("final" if last else f"round{number}")
        collect_rollouts(policy, recording, FLAGS.final_rollouts if last else episodes, number)
        evaluations.append((step, episode_success(read_recording(recording, features, "action"), _LATE)))
        report(root, evaluations)
        if last:
            break
        recordings.append(recording)
        data = root / f"round{number}.npz"
        if not data.exists():
            # Demonstrations may have no record of success; rollouts have, as `episode_success` checks.
            own = shared | {"unlabelled": "success", "stats": root / "demos.npz"}
            print(import_rollouts([demos, *recordings], data, **own), flush=True)
        own = {"start_from": str(run), "overrides": overrides}
        group = f"round{number}"
        run, policy = train_and_export(root, group, FLAGS.agent, data, FLAGS.round_steps, exported, **own)
        step += FLAGS.round_steps
    print(f"\nadapted: {policy} (figure: {root / 'adaptation.png'})")


def main(argv: Sequence[str]) -> None:
    """Runs the adaptation from where the last call stopped."""
    overrides = parse(argv, FLAGS)
    for flag in ("demos", "robot", "features"):
        if not FLAGS[flag].value:
            raise UserError(f"--{flag} is missing; see --help")
    root = (Path(FLAGS.output_dir).expanduser() / FLAGS.name).absolute()
    try:
        adapt(root, overrides)
    except RolloutsNeeded as step:
        print(f"\n{step}\n\nThen rerun the same command.")


if __name__ == "__main__":
    run_main(main)
