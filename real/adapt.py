"""Adapts a policy on a robot in rounds (paper §4.3).

    python -m real.adapt --name=pick_cube --demos=DATASET --robot='…'

    base      a BC flow is trained on the demonstrations, and exported
    round r   the newest policy acts for --rollouts episodes on the robot; demonstrations and all rollouts so far are
              imported; OTQL trains for --round_steps updates, from the base's flow and then from where it was; export
    end       once there are --total_rollouts episodes, and --final_rollouts of the last policy

Training needs no robot, and the robot no training: before each round of rollouts the program stops and prints the
LeRobot command to run; start the same command again when that is done. With --unattended, for a simulated robot, it
runs the command itself. What is finished is never done again. In --robot, {round} becomes the number of the round.

Below <output_dir>/<name>: adaptation.json, the settings; demos.npz and round1.npz, …; runs/; policies/base,
policies/round1, …; rollouts/eval_round1, …; eval.csv and adaptation.png, the success of each policy's rollouts over
updates.
"""

import json
import shlex
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from envs.npz import read_json, write_json
from envs.tasks import parse_task
from real.episode_labels import LABELS, successes
from real.import_rollouts import NORMS, import_rollouts
from real.lerobot_dataset import Recording, read_recording
from real.policy_tensors import acting_part
from utils.errors import UserError
from utils.observations import blank
from utils.output.intervals import wilson_interval
from utils.output.plotting import learning_curve
from utils.run.agent_config import resolve_config
from utils.run.agent_files import load_agent
from utils.run.directory import run_root
from utils.system.cli import define_flag, parse
from utils.system.entry_point import run_main
from utils.system.files import ROOT, atomic_write_text
from utils.system.signals import run_program

FLAGS = flags.FlagValues()
for kind, name, default, text in (
    ("string", "name", "task", "Of the task: letters, digits, '_', '-', '.'."),
    ("string", "task", None, "What LeRobot records as the task; default: the name."),
    ("string", "demos", None, "Folder of the demonstrations, a LeRobotDataset."),
    ("string", "output_dir", "exp/robot", "Where everything goes."),
    ("string", "robot", None, "LeRobot's flags of the robot, '--robot.type=… --robot.port=…'."),
    ("string", "teleop", "--teleop.type=otql_reset", "LeRobot's flags of what waits for the scene's reset."),
    ("string", "record", "lerobot-record", "LeRobot's program."),
    ("string", "record_flags", "", "More flags for it."),
    ("bool", "unattended", False, "Run LeRobot's command here instead of stopping, for a simulated robot."),
    ("list", "features", ["observation.state"], "What makes up the observation: states and cameras."),
    ("string", "agent", "agents/otql.py", "Agent file; --agent.<field>=<value> changes a setting of it."),
    ("string", "preset", "paper", "Settings of the domain 'robot': paper (Tables 7, 8), cpu or none."),
    ("string", "device", "cpu", "On which the robot's computer runs the policy."),
):
    define_flag(FLAGS, kind, name, default, text)
for name, default, text, known in (
    ("state_norm", "mean_std", "Of the demonstrations' states, kept for all that follows.", NORMS),
    ("action_norm", "min_max", "Of the demonstrations' actions.", NORMS[1:]),  # mean_std would clip at one deviation.
):
    define_flag(FLAGS, "enum", name, default, text, enum_values=list(known))
for name, number, text in (
    ("rollouts", 10, "Episodes a round."),
    ("total_rollouts", 50, "Episodes in all."),
    ("round_steps", 20_000, "Updates a round."),
    ("base_steps", 20_000, "Updates of the base."),
    ("max_steps", 150, "Frames of an episode that count."),
    ("image_size", 64, "Side of the cameras' images as they are trained on, in pixels."),
    ("fps", 30, "Of the recordings, the demonstrations' own."),
):
    define_flag(FLAGS, "integer", name, number, text, lower_bound=1)
define_flag(FLAGS, "integer", "episode_time_s", None, "Limit on an episode; default: max_steps' time.", lower_bound=1)
define_flag(FLAGS, "integer", "final_rollouts", 0, "Episodes of the last policy, not trained on.", lower_bound=0)
define_flag(FLAGS, "integer", "seed", 0, "Of base and rounds.", lower_bound=0)

_GROWING = ("total_rollouts", "final_rollouts")
_LATE = f"give --episode_time_s less, and change {LABELS} there; or more --max_steps with another --name"


class Waiting(Exception):
    """The next step is a person's: the command to run."""


def words(flag: str) -> list[str]:
    """The flags for LeRobot in one of ours."""
    try:
        return shlex.split(FLAGS[flag].value)
    except ValueError as error:
        raise UserError(f"--{flag}={FLAGS[flag].value}: {error}") from error


def recorded(root: Path) -> int:
    """Saved episodes of a recording."""
    return int((read_json(root / "meta" / "info.json") or {}).get("total_episodes", 0))


def record_command(policy: Path, root: Path, episodes: int, number: int) -> list[str]:
    """LeRobot's command that records what is missing of `episodes` episodes of a policy."""
    done = recorded(root)
    seconds = FLAGS.episode_time_s or (FLAGS.max_steps - 0.5) / FLAGS.fps  # LeRobot ends an episode after the frame.
    command = [
        *words("record"),
        *(word.replace("{round}", str(number)) for word in words("robot")),
        *words("teleop"),
        *(f"--policy.path={policy}", f"--policy.device={FLAGS.device}"),
        *(f"--dataset.repo_id=local/{root.name}", f"--dataset.root={root}"),
        *(f"--dataset.single_task={FLAGS.task or FLAGS.name}", f"--dataset.num_episodes={episodes - done}"),
        *(f"--dataset.fps={FLAGS.fps}", f"--dataset.episode_time_s={seconds:.9g}"),
        *("--dataset.push_to_hub=false", "--play_sounds=false"),
        *words("record_flags"),
    ]
    return [*command, "--resume=true"] if done else command


def roll_out(policy: Path, root: Path, episodes: int, number: int) -> None:
    """Sees to it that there are `episodes` recorded episodes of a policy.

    Raises:
        Waiting: they are not there, and a person has to record them.
    """
    if recorded(root) >= episodes:
        return
    if root.exists():
        check_broken(root)
    command = record_command(policy, root, episodes, number)
    if not FLAGS.unattended:
        raise Waiting(f"{episodes - recorded(root)} rollouts of {policy} are to be recorded:\n\n{shlex.join(command)}")
    # At SIGINT LeRobot closes its files, at SIGTERM it does not.
    run_program(command, FLAGS.record, end=signal.SIGINT)
    if recorded(root) < episodes:
        raise UserError(f"{root} has {recorded(root)} of {episodes} episodes; start the same command again to go on")


def check_broken(root: Path) -> None:
    """Refuses to go on with a recording that LeRobot cannot go on with.

    Raises:
        UserError: it was broken off, before its first episode or without its files being closed; or it is under way.
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
    """Refuses what would else be noticed when a policy is trained, or a person has recorded rollouts.

    Raises:
        UserError: the settings do not fit the demonstrations, or each other, or the LeRobot policy.
    """
    parse_task(f"robot:{FLAGS.name}")
    for flag in ("robot", "teleop", "record_flags"):
        words(flag)
    if not words("record"):
        raise UserError("give --record; --help says what it is")
    if FLAGS.unattended and not shutil.which(words("record")[0]):
        raise UserError(f"there is no program {words('record')[0]}; name LeRobot's with --record=<bin>/lerobot-record")
    if not load_agent(FLAGS.agent).Agent.FLOWS:
        raise UserError(f"{FLAGS.agent} has no flow that could start as the base's; see FLOWS in agents/base.py")
    if demos.fps != FLAGS.fps:
        raise UserError(f"{demos.root} has {demos.fps:g} frames a second; give --fps={demos.fps:g}")
    outcomes(demos, "give more, or record at a lower rate")
    acting_part(blank_agent(demos, config))


def blank_agent(demos: Recording, config: Any) -> Any:
    """The agent with parameters of zeros, which take no time."""
    images = (len(demos.cameras), FLAGS.image_size, FLAGS.image_size, 3) if demos.cameras else None
    example = {
        "observations": blank(1, len(demos.state_names), images),
        "actions": np.zeros((1, config.horizon_length * len(demos.action_names)), np.float32),
    }
    create = load_agent(FLAGS.agent).Agent.create
    shapes = jax.eval_shape(lambda: create(jax.random.PRNGKey(FLAGS.seed), example, config))
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


def outcomes(recording: Recording, advice: str) -> list[bool]:
    """Success of each episode of a recording.

    Raises:
        UserError: one succeeds only where the import counts it no more; says so, with `advice`.
    """
    counted = successes(recording, None)
    late = [number for number, (success, length) in enumerate(counted) if success and length > FLAGS.max_steps]
    if late:
        raise UserError(
            f"episode {late[0]} of {recording.root} succeeds after --max_steps={FLAGS.max_steps} frames, so it would "
            f"count as a failure: {advice}"
        )
    return [success for success, _ in counted]


def check_begun(root: Path, settings: dict[str, Any]) -> None:
    """Writes `settings`, what shapes the result, and refuses to go on with others; those of _GROWING may grow.

    Raises:
        UserError: a setting is not that of the first start.
    """
    settings = json.loads(json.dumps(settings))
    before = read_json(root / "adaptation.json") or settings  # Older directories have no such file.
    for name in sorted(before.keys() | settings.keys()):
        was, now = before.get(name), settings.get(name)
        grown = name in _GROWING and was is not None and now is not None and was < now
        if was != now and not grown:
            raise UserError(f"{root} was begun with --{name}={was}, not {now}; give that, or use another --name")
    total, final = before["total_rollouts"], root / "rollouts" / "eval_final"
    if settings["total_rollouts"] > total and (total % settings["rollouts"] or final.exists()):
        reason = f"{final} is of that policy" if final.exists() else "its last round is a part of one"
        raise UserError(f"{root} was to end after --total_rollouts={total} ({reason}); use another --name for more")
    write_json(root / "adaptation.json", settings)


def label_demonstrations(root: Path) -> None:
    """Demonstrations that say nothing of success are successes."""
    info = read_json(root / "meta" / "info.json") or {}
    if (root / LABELS).exists() or {"next.success", "next.reward"} & set(info.get("features", {})):
        return
    lines = [json.dumps({"episode_index": index, "success": True}) for index in range(recorded(root))]
    atomic_write_text(root / LABELS, "".join(f"{line}\n" for line in lines))
    print(f"{root}: all {len(lines)} demonstrations count as successes; change {LABELS} there if some are not")


def train(
    root: Path, group: str, agent: str, data: Path, steps: int, features: str, extra: Sequence[str]
) -> tuple[Path, Path]:
    """Trains an agent and exports it, as far as that is not done; returns the run's directory and the policy's."""
    run = run_root(root / "runs", group, f"robot:{FLAGS.name}") / Path(agent).stem / f"sd{FLAGS.seed}"
    policy = root / "policies" / group
    if not policy.exists():
        training = [
            *(sys.executable, str(ROOT / "main.py"), f"--agent={agent}", f"--env_name=robot:{FLAGS.name}"),
            *(f"--dataset={data}", f"--preset={FLAGS.preset}", f"--seed={FLAGS.seed}", f"--offline_steps={steps}"),
            *(f"--save_dir={root / 'runs'}", f"--run_group={group}", "--save_interval=5000", "--log_interval=1000"),
        ]
        run_program([*training, *extra], "main.py")
        export = [sys.executable, "-m", "real.export", str(run), str(policy), f"--features={features}"]
        run_program(export, "real.export")
    return run, policy


def report(root: Path, evaluations: list[tuple[int, list[bool]]]) -> None:
    """Writes and prints the success of each policy's rollouts; `evaluations`: updates, and success by episode."""
    rows = ["step,episodes,success_rate"]
    print("\n| updates | rollouts | success |\n|---|---|---|")
    for step, solved in evaluations:
        rate = sum(solved) / len(solved)
        low, high = wilson_interval(rate, len(solved))
        rows.append(f"{step},{len(solved)},{rate}")
        print(f"| {step} | {len(solved)} | {rate:.2f} ({low:.2f} to {high:.2f}) |")
    atomic_write_text(root / "eval.csv", "\n".join(rows) + "\n")
    learning_curve(root, root / "adaptation.png", title=f"{FLAGS.name}: rollouts of each policy")


def adapt(root: Path, overrides: dict[str, str]) -> None:
    """Does what is still to be done, up to the next step of a person's.

    Raises:
        Waiting: rollouts are to be recorded. UserError: something is wrong with the data, the robot or a setting.
    """
    demos, features = Path(FLAGS.demos).expanduser(), list(FLAGS.features)
    config, _, _ = resolve_config(load_agent(FLAGS.agent), "robot", FLAGS.preset, overrides)
    shown = read_recording(demos, features, "action")
    exported = ",".join([*(f"{feature}:{size}" for feature, size in shown.widths.items()), *shown.cameras])
    label_demonstrations(demos)
    check_settings(shown, config)
    names = ("agent", "preset", "seed", "base_steps", "round_steps", "rollouts", *_GROWING)
    begun = {"demos": str(demos.resolve())} | {name: FLAGS[name].value for name in names}
    check_begun(root, begun | {f"agent.{field}": config[field] for field in overrides})
    data = root / "demos.npz"
    shared = {"features": features, "max_steps": FLAGS.max_steps}
    shared |= {"image_size": FLAGS.image_size} if shown.cameras else {}
    norms = {"state_norm": FLAGS.state_norm, "action_norm": FLAGS.action_norm}
    if not data.exists():
        print(import_rollouts([demos], data, **shared, **norms), flush=True)
    before = read_json(data.with_suffix(".json")) or {}
    for key, value in (shared | norms).items():
        if before.get(key) != value:
            raise UserError(f"{root} was begun with {key} = {before.get(key)}, not {value}; use another --name")
    dims = ",".join(map(str, config.actor_hidden_dims))
    base: tuple[str, ...] = (f"--horizon_length={config.horizon_length}", f"--agent.actor_hidden_dims={dims}")
    base += (f"--agent.encoder={config.encoder}",) if shown.cameras else ()
    run, policy = train(root, "base", "agents/bc.py", data, FLAGS.base_steps, exported, base)
    step, evaluations, recordings = 0, [], []
    own = tuple(f"--agent.{field}={value}" for field, value in overrides.items())
    rounds = -(-FLAGS.total_rollouts // FLAGS.rollouts)
    for number in range(1, rounds + 1 + (FLAGS.final_rollouts > 0)):
        last = number > rounds
        episodes = min(FLAGS.rollouts, FLAGS.total_rollouts - FLAGS.rollouts * (number - 1))
        recording = root / "rollouts" / ("eval_final" if last else f"eval_round{number}")
        roll_out(policy, recording, FLAGS.final_rollouts if last else episodes, number)
        evaluations.append((step, outcomes(read_recording(recording, features, "action"), _LATE)))
        report(root, evaluations)
        if last:
            break
        recordings.append(recording)
        data = root / f"round{number}.npz"
        if not data.exists():
            print(import_rollouts([demos, *recordings], data, **shared, stats=root / "demos.npz"), flush=True)
        extra = (f"--start_from={run}", *own)
        run, policy = train(root, f"round{number}", FLAGS.agent, data, FLAGS.round_steps, exported, extra)
        step += FLAGS.round_steps
    print(f"\nadapted: {policy} (figure: {root / 'adaptation.png'})")


def main(argv: Sequence[str]) -> None:
    """Goes on from where the last call stopped."""
    overrides = parse(argv, FLAGS)
    for flag in ("demos", "robot", "features"):
        if not FLAGS[flag].value:
            raise UserError(f"give --{flag}; --help says what it is")
    root = (Path(FLAGS.output_dir).expanduser() / FLAGS.name).absolute()
    try:
        adapt(root, overrides)
    except Waiting as step:
        print(f"\n{step}\n\nThen start this program again with the same flags.")


if __name__ == "__main__":
    run_main(main)
