"""Evaluation of runs: any checkpoint, with other settings of acting, and videos.

    python -m experiments.evaluate RUN… --nfe=1,2,3,10 --best_of_n=1,5

A RUN is the directory of a run, finished or in training, a directory above several, or a quoted pattern of these.

Without flags, this repeats the evaluation that training made at the newest checkpoint, to the same numbers: initial
states and noise are functions of the run's seed and the checkpoint's step. --step chooses another checkpoint, --seed
other initial states and noise. (In post-training, the rows up to the end of the base's rollouts are those of the base.)

--agent.<field>=a,b,c evaluates with other values of a setting that changes how the agent acts, but not its networks:
flow_steps, best_of_n and noise_scale, guidance_coef and inv_temp of CGQL, edit_scale of FEdit and QAM-E,
sampler of QSM. Of several settings, all combinations are evaluated.

Prints a table and appends a row for each combination to <run>/evaluations.csv. No other file of a run is changed, so
that it may be in training. Videos are <run>/videos/evaluate_step<step>_<settings>_seed<seed>.mp4.
"""

import csv
import functools
import glob
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from absl import flags

from envs.minari_store import normalized_score, reference_scores
from envs.tasks import make_env, parse_task
from experiments.report.evaluations import FILE, KEYS, RESULTS, SCORE
from experiments.report.runs import find_runs, show
from utils.errors import UserError
from utils.observations import blank
from utils.output.animation import FORMATS
from utils.output.intervals import wilson_interval
from utils.output.loggers import ProgressBar
from utils.output.tables import csv_text, markdown_table
from utils.rollout.evaluate import evaluation_errors, record_video
from utils.rollout.evaluator import Evaluator
from utils.rollout.policy import agent_policy, decision_seconds
from utils.rollout.video import VideoUnavailable
from utils.rollout.worker_pool import DEFAULT_TIMEOUT
from utils.run.acting_settings import acting_settings, with_settings
from utils.run.evaluation_queue import success_reported
from utils.run.loading import load_run
from utils.system.cli import parse_arguments
from utils.system.entry_point import run_main
from utils.system.files import disk_errors
from utils.system.rendering import set_rendering_backend
from utils.trees import tree_stack

FLAGS = flags.FlagValues()
flags.DEFINE_integer("episodes", None, "Episodes; default: as in training.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_list("nfe", None, "Network evaluations per candidate action, such as 1,2,3,10.", flag_values=FLAGS)
flags.DEFINE_list("best_of_n", None, "Candidate actions, such as 1,5.", flag_values=FLAGS)
flags.DEFINE_integer(
    "seed",
    None,
    "Seed; default: the run's, which repeats the evaluation in training.",
    lower_bound=0,
    upper_bound=2**31,
    flag_values=FLAGS,
)
flags.DEFINE_integer("step", None, "Step of the checkpoint; default: the newest.", lower_bound=0, flag_values=FLAGS)
flags.DEFINE_integer(
    "num_workers", None, "Processes that step environments; default: as in training.", lower_bound=1, flag_values=FLAGS
)
flags.DEFINE_bool("video", False, "Record the first episode.", flag_values=FLAGS)
flags.DEFINE_integer(
    "video_episodes",
    0,
    "Record this many episodes in a grid; their borders turn green for success and red for failure.",
    lower_bound=0,
    flag_values=FLAGS,
)
flags.DEFINE_alias("video_grid", "video_episodes", flag_values=FLAGS)
flags.DEFINE_integer("video_frame_skip", 3, "Environment steps a frame.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_enum(
    "video_format",
    "mp4",
    ["mp4", *FORMATS],
    "gif, webp: beside each mp4 also a file that loops, of at most 2 MB.",
    flag_values=FLAGS,
)


@dataclass(frozen=True)
class Evaluation:
    """A run's agent with settings to act with.

    Attributes:
        directory: of the run. flags_json: its settings. step: of the checkpoint.
        agent: with the settings. acting: names of all settings that change how it acts.
        changed: those that the command line gives.
    """

    directory: Path
    flags_json: dict[str, Any]
    step: int
    agent: Any
    acting: tuple[str, ...]
    changed: tuple[str, ...]

    @property
    def seed(self) -> int:
        """Seed of initial states and noise."""
        return self.flags_json["seed"] if FLAGS.seed is None else FLAGS.seed

    @property
    def episodes(self) -> int:
        """Number of episodes."""
        return FLAGS.episodes or self.flags_json["flags"].get("eval_episodes") or 50

    @property
    def settings(self) -> dict[str, Any]:
        """The acting settings."""
        values = {**self.agent.config, **self.agent.hyper}
        return {name: float(values[name]) if name in self.agent.hyper else values[name] for name in self.acting}

    @property
    def observation(self) -> Any:
        """An observation of zeros, [1, o]."""
        return blank(1, self.flags_json["observation_dim"], self.flags_json.get("image_shape"))

    @property
    def workers(self) -> dict[str, Any]:
        """Everything that the worker processes depend on."""
        own = self.flags_json["flags"]
        return {
            "env_name": self.flags_json["env_name"],
            "max_episode_steps": own.get("max_episode_steps"),
            "num_workers": FLAGS.num_workers or own.get("eval_workers"),
            "timeout": own.get("env_timeout", DEFAULT_TIMEOUT),
            "horizon": self.agent.config.horizon_length,
        }

    def env_maker(self) -> Callable[..., gymnasium.Env]:
        """Returns a picklable function that makes the run's environment."""
        workers = self.workers
        return functools.partial(make_env, workers["env_name"], max_episode_steps=workers["max_episode_steps"])

    def video_path(self) -> Path:
        """Returns the file of the mp4."""
        short = {"flow_steps": f"nfe{self.agent.nfe}", "best_of_n": f"n{self.agent.config.best_of_n}"}
        parts = [f"evaluate_step{self.step}"]
        parts += [short.get(name, f"{name}{show(self.settings[name])}") for name in self.changed]
        return self.directory / "videos" / f"{'_'.join([*parts, f'seed{self.seed}'])}.mp4"


def main(argv: Sequence[str]) -> None:
    """Evaluates each run with each combination of settings."""
    given = [argument for argument in argv[1:] if argument.startswith("--agent.")]
    patterns = parse_arguments([argument for argument in argv if argument not in given], FLAGS)
    if not patterns:
        raise UserError("name at least one run: python -m experiments.evaluate exp/…/sd0")
    evaluations = plan(expand(patterns), read_grid(given))
    videos = FLAGS.video_episodes or int(FLAGS.video or FLAGS.video_format != "mp4")
    rows, recorded = [], []
    with ProgressBar(sum(own.episodes for own in evaluations), description="evaluation", unit=" episodes") as bar:
        for workers, group in itertools.groupby(evaluations, lambda own: own.workers):
            members = list(group)
            limits = {name: workers[name] for name in ("num_workers", "timeout")}
            with Evaluator(members[0].env_maker(), workers["horizon"], name=workers["env_name"], **limits) as evaluator:
                for own in members:
                    rows.append(evaluate(own, evaluator, lambda *_: bar.update(1)))
                    append_row(own, rows[-1])
                    recorded += record(own, videos) if videos else []
    print(table(evaluations, rows))
    for path in recorded:
        print(f"video: {path}")


def expand(patterns: Iterable[str]) -> list[Path]:
    """Returns the directories that patterns name.

    Raises:
        UserError: a pattern names none.
    """
    directories = []
    for pattern in patterns:
        path = Path(pattern).expanduser()
        found = [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if Path(name).is_dir()]
        if not found and glob.has_magic(pattern) and not path.exists():
            raise UserError(f"no directory matches {pattern}; give directories of runs, such as exp/debug")
        directories += [path] if path.exists() or not found else found
    return directories


def read_grid(arguments: Iterable[str]) -> dict[str, list[str]]:
    """Returns the values of each setting that the command line gives; those of --nfe under 'nfe'.

    Args:
        arguments: of the form --agent.<field>=a,b,c.

    Raises:
        UserError: a setting has no values, or is given twice.
    """
    grid: dict[str, list[str]] = {
        name: FLAGS[name].value or [""] for name in ("nfe", "best_of_n") if FLAGS[name].value is not None
    }
    for argument in arguments:
        field, _, text = argument.removeprefix("--agent.").partition("=")
        if field in grid or (field == "flow_steps" and "nfe" in grid):
            raise UserError(f"{argument} gives a setting for the second time; give all its values in one flag")
        grid[field] = text.split(",")
    for field, values in grid.items():
        if not all(values):
            raise UserError(f"{flag_of(field)}: a value is missing; write values such as 1,2,5")
    return {field: list(dict.fromkeys(values)) for field, values in grid.items()}


def flag_of(name: str) -> str:
    """Returns the flag of an entry of the grid."""
    return f"--{name}" if name in ("nfe", "best_of_n") else f"--agent.{name}"


def plan(directories: Sequence[Path], grid: Mapping[str, list[str]]) -> list[Evaluation]:
    """Loads the agents of all runs and returns what is to be evaluated, before any work.

    Runs that cannot be evaluated are named on stderr.

    Raises:
        UserError: no run can be evaluated, or a setting does not fit an agent.
    """
    found, unusable = find_runs(directories)
    known: dict[Any, tuple[str, ...]] = {}
    evaluations: list[Evaluation] = []
    for run in found:
        try:
            loaded = load(run.directory)
        except UserError as error:
            unusable.append(str(error))
            continue
        agent, settings, _ = loaded
        width, image_shape = settings["observation_dim"], settings.get("image_shape")
        key = agent.config, width, tuple(image_shape or ())
        if key not in known:
            names = acting_settings(agent, settings["config"], blank(1, width, image_shape))
            first = [name for name in ("flow_steps", "best_of_n") if name in names]
            known[key] = (*first, *(name for name in names if name not in first))
        evaluations += combinations(run.directory, loaded, known[key], grid)
    if not evaluations:
        raise UserError(unusable[0])
    for line in unusable:
        print(f"left out: {line}", file=sys.stderr)
    if any(parse_task(own.flags_json["env_name"]).rendered for own in evaluations):
        set_rendering_backend()
    return evaluations


def load(directory: Path) -> tuple[Any, dict[str, Any], int]:
    """Returns a run's agent, without its optimiser's state, its settings, and the step of its checkpoint.

    Raises:
        UserError: it has no simulation or no such checkpoint, or its evaluations.csv has other columns.
    """
    agent, settings, step = load_run(directory, FLAGS.step)
    if parse_task(settings["env_name"]).kind == "robot":
        raise UserError(
            f"{directory} is a run of {settings['env_name']}, which has no simulation; evaluate on the robot"
        )
    return agent.replace(opt_state=()), settings, step


def combinations(
    directory: Path, loaded: tuple[Any, dict[str, Any], int], acting: tuple[str, ...], grid: Mapping[str, list[str]]
) -> list[Evaluation]:
    """Returns the evaluations of one run.

    Raises:
        UserError: a setting does not change how the agent acts, or a value does not fit.
    """
    agent, settings, step = loaded
    fields = {name: "flow_steps" if name == "nfe" else name for name in grid}
    for name, field in fields.items():
        if field not in acting:
            allowed = f"of its settings, only {', '.join(acting)} can be changed after training"
            raise UserError(f"{flag_of(name)} does not fit {directory}, a run of {settings['agent']}; {allowed}")
    evaluations = []
    for values in itertools.product(*grid.values()):
        given = dict(zip(fields.values(), values, strict=True))
        if "nfe" in grid:
            given["flow_steps"] = flow_steps(agent, given["flow_steps"])
        own = with_settings(agent, given)
        evaluations.append(Evaluation(directory, settings, step, own, acting, tuple(fields.values())))
    check_columns(evaluations[0])
    return evaluations


def flow_steps(agent: Any, nfe: str) -> str:
    """Returns the steps of the flow that give an agent's candidates this number of network evaluations.

    Raises:
        UserError: there are none.
    """
    beside = agent.nfe - agent.config.flow_steps  # Of an actor besides the flow.
    if not nfe.isdecimal() or int(nfe) <= beside:
        raise UserError(f"--nfe={nfe}: it must be a whole number, at least {beside + 1}")
    return str(int(nfe) - beside)


def evaluate(own: Evaluation, evaluator: Evaluator, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Returns the row of an evaluation."""
    policy, reset_seed = agent_policy(own.agent, seed=own.seed, step=own.step)
    with evaluation_errors(f"the evaluation of {own.directory}"):
        result: Mapping[str, Any] = evaluator.evaluate(policy, own.episodes, reset_seed, progress)
    rate = result.get("success_rate")
    if rate is None and success_reported(own.directory):
        rate = 0.0  # Environments may report success in solved episodes alone.
    low, high = (None, None) if rate is None else wilson_interval(rate, own.episodes)
    seconds = float(np.median(decision_seconds(tree_stack([own.agent]), own.observation)))
    reference = reference_scores(own.flags_json["env_name"])
    return {
        "step": own.step,
        "seed": own.seed,
        "episodes": own.episodes,
        **own.settings,
        "success_rate": rate,
        "low": low,
        "high": high,
        "return_mean": result["return_mean"],
        "length_mean": result["length_mean"],
        "milliseconds_per_action": 1000 * seconds / own.agent.config.horizon_length,
    } | ({SCORE: normalized_score(reference, result["return_mean"])} if reference else {})


def columns(own: Evaluation) -> list[str]:
    """Returns the columns of a run's evaluations.csv."""
    scored = [SCORE] * bool(reference_scores(own.flags_json["env_name"]))
    return [*KEYS, *own.acting, *RESULTS, *scored]


def check_columns(own: Evaluation) -> None:
    """Checks that rows can be appended to a run's evaluations.csv.

    Raises:
        UserError: the file has other columns, or cannot be read.
    """
    path = own.directory / FILE
    with disk_errors(path):
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    if text and next(csv.reader([text.splitlines()[0]])) != columns(own):
        raise UserError(f"{path} has other columns than this version writes; move it elsewhere")


def append_row(own: Evaluation, row: Mapping[str, Any]) -> None:
    """Appends a row to a run's evaluations.csv in one write, with a header if the file is new.

    Raises:
        UserError: the file cannot be written.
    """
    path = own.directory / FILE
    with disk_errors(path), open(path, "ab", buffering=0) as file:
        header = [] if file.tell() else [columns(own)]
        file.write(csv_text([*header, [row[name] for name in columns(own)]]).encode())


def record(own: Evaluation, episodes: int) -> list[Path]:
    """Records an evaluation's first episodes; returns the files, none if nothing can be rendered."""
    path = own.video_path()
    paths = [path] if FLAGS.video_format == "mp4" else [path, path.with_suffix(f".{FLAGS.video_format}")]
    size = parse_task(own.flags_json["env_name"]).video_size
    options: dict[str, Any] = {"size": size, "frame_skip": FLAGS.video_frame_skip}
    options |= {"seed": own.seed, "step": own.step, "env_timeout": own.workers["timeout"]}
    try:
        record_video(own.agent, own.env_maker(), paths, episodes, **options)
    except VideoUnavailable as reason:
        print(f"no video: {reason}", file=sys.stderr)
        return []
    return paths


def table(evaluations: Sequence[Evaluation], rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the rows as a Markdown table."""
    more = sorted({name for own in evaluations for name in own.changed} - {"flow_steps", "best_of_n"})
    header = ["run", "step", "NFE", "N", *more, "success", "return", "length", "ms a decision"]
    cells = []
    for own, row in zip(evaluations, rows, strict=True):
        success = "–"
        if row["success_rate"] is not None:
            success = f"{row['success_rate']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
        milliseconds = row["milliseconds_per_action"] * own.agent.config.horizon_length
        score = f" (score {row[SCORE]:.3f})" if SCORE in row else ""
        numbers = f"{row['return_mean']:.4g}{score}", f"{row['length_mean']:.1f}", f"{milliseconds:.2f}"
        varied = [show(own.settings.get(name)) for name in more]
        shown = os.path.relpath(own.directory) if own.directory.is_relative_to(Path.cwd()) else str(own.directory)
        nfe, candidates = str(own.agent.nfe), str(own.agent.config.best_of_n)
        cells.append([shown, str(own.step), nfe, candidates, *varied, success, *numbers])
    return markdown_table(header, cells)


if __name__ == "__main__":
    run_main(main)
