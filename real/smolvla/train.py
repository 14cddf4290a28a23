"""Fine-tunes SmolVLA's expert on demonstrations, then by OTQL on rollouts; the vision-language model is frozen.

    python -m real.smolvla.train --policy.path=lerobot/smolvla_base --demos=data/demos --output_dir=out/base
    python -m real.smolvla.train --policy.path=out/base/sft --demos=data/demos --rollouts=data/eval_1 --output_dir=out/1

Without --rollouts it fine-tunes (SFT) and writes <output_dir>/sft; with them it trains a fine-tuned policy by OTQL on
demonstrations and rollouts and writes <output_dir>/otql; with --sft_steps as well, both. These are SmolVLA directories
in LeRobot's format. Beside them: sft.csv and otql.csv, checkpoints, settings.json, and prefixes/, the frozen model's
outputs for all frames (--cache_dir shares them between runs). Rerun the same command to resume a killed run; it ends in
the same numbers.
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from lerobot.datasets.compute_stats import aggregate_stats
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK
from safetensors import safe_open

from real.command_line import Parser
from real.lerobot_dataset import read_recording
from real.smolvla.data import ACTION, STATE, Rows, read_rows, scales_at_rest
from real.smolvla.otql import Otql, Settings, Sft
from real.smolvla.policy_directory import add_lora, adopt, load_config, load_policy, load_processors, save_directory
from real.smolvla.prefixes import MODES, AllPrefixes, Encoder, Prefixes
from utils.errors import UserError
from utils.output.loggers import CsvLogger, ProgressBar
from utils.system.entry_point import run_main
from utils.system.files import atomic_write_bytes, read_json, write_json
from utils.system.locks import exclusive_lock
from utils.system.signals import Interrupted, PreemptionGuard

_OWN = ("output_dir", "device", "cache", "cache_dir", "save_interval", "log_interval")  # These do not change numbers.


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Reads the command line.

    Raises:
        UserError: it is invalid.
    """
    parser = Parser("python -m real.smolvla.train", __doc__)
    parser.add_argument("--policy.path", dest="policy", required=True, help="a SmolVLA: a folder, or a name on the hub")
    parser.add_argument("--demos", required=True, help="folders of demonstrations, LeRobotDatasets, a,b,…")
    parser.add_argument("--rollouts", default="", help="folders of rollouts, a,b,…")
    parser.add_argument("--labels", default="", help="files with the rollouts' success, a,b,…; default: their own")
    parser.add_argument("--output_dir", required=True, help="folder of all output")
    parser.add_argument("--cameras", default="", help="for SFT: cameras of the dataset that replace the policy's")
    parser.add_argument("--sft_steps", type=int, help="updates of SFT; default: 20000 without rollouts, else 0")
    parser.add_argument("--otql_steps", type=int, default=20_000, help="updates of OTQL")
    parser.add_argument("--lora", type=int, default=0, help="rank of LoRA on the expert's layers; 0: no LoRA")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, …")
    parser.add_argument("--cache", choices=MODES, default="disk", help="storage of the prefixes")
    parser.add_argument("--cache_dir", help="folder of prefixes on disk; default: <output_dir>/prefixes")
    parser.add_argument("--save_interval", type=int, default=1000, help="updates between checkpoints")
    parser.add_argument("--log_interval", type=int, default=100, help="updates between rows of the log")
    for field in dataclasses.fields(Settings):
        if field.type is bool:
            parser.add_argument(f"--{field.name}", action="store_true")
        else:
            kind = _widths if field.name == "critic_dims" else field.type
            parser.add_argument(f"--{field.name}", type=kind, default=field.default, help=f"default: {field.default}")
    args = parser.parse_args(argv)
    for name in ("demos", "rollouts", "labels"):
        setattr(args, name, [Path(part).expanduser() for part in getattr(args, name).split(",") if part])
    if args.sft_steps is None:
        args.sft_steps = 0 if args.rollouts else 20_000
    if not args.rollouts:
        args.otql_steps = 0
    least = {"otql_steps": 0, "sft_steps": 0, "lora": 0, "horizon": 0, "seed": 0, "alpha": 0, "lam": 0, "rho": 0}
    for name, value in vars(args).items():
        if isinstance(value, int | float) and not (math.isfinite(value) and value >= least.get(name, 0)):
            raise UserError(f"--{name}={value}: it must be at least {least.get(name, 0)}")
    for name in ("batch_size", "nfe", "num_qs", "best_of_n", "value_samples", "accumulate", "save_interval", "w_max"):
        if getattr(args, name) <= 0:
            raise UserError(f"--{name} must be above 0")
    if args.accumulate > args.batch_size:
        raise UserError(f"--accumulate={args.accumulate} parts of --batch_size={args.batch_size}; give fewer")
    return args


def _widths(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def decoder() -> str:
    """Returns LeRobot's video decoder: torchcodec, or pyav if torchcodec does not find FFmpeg's libraries."""
    try:
        import torchcodec.decoders  # noqa: F401
    except (ImportError, OSError, RuntimeError):
        return "pyav"
    return "torchcodec"


class Run:
    """A run of the program: the datasets, and the stages of training."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.root = args, Path(args.output_dir).expanduser()
        self.settings = Settings(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Settings)})
        for root in (*args.demos, *args.rollouts):
            read_recording(root, [STATE], ACTION)  # LeRobot would search the hub for missing files.
        self.datasets = [
            LeRobotDataset(f"local/{root.name}", root=root, video_backend=decoder())
            for root in (*args.demos, *args.rollouts)
        ]

    def check_settings(self) -> None:
        """Stores the settings, or compares them with those of the first start.

        Raises:
            UserError: they differ.
        """
        shown = {name: value for name, value in vars(self.args).items() if name not in _OWN}
        shown = json.loads(json.dumps(shown, default=lambda value: str(Path(value).absolute())))
        recorded = read_json(self.root / "settings.json", missing_ok=True)
        for name, value in shown.items():
            if recorded and recorded.get(name) != value:
                raise UserError(
                    f"{self.root} was started with {name} = {recorded.get(name)}, not {value}; use another --output_dir"
                )
        write_json(self.root / "settings.json", shown)

    def train(self) -> Path:
        """Runs the remaining stages; returns the directory of the last policy."""
        self.check_settings()
        path = self.args.policy
        for name, steps in (("sft", self.args.sft_steps), ("otql", self.args.otql_steps)):
            if steps:
                directory = self.root / name
                if not directory.exists():
                    self.stage(name, path, directory, steps)
                path = str(directory)
        return Path(path)

    def stage(self, name: str, path: str, directory: Path, steps: int) -> None:
        """Trains the policy at `path` for a number of updates and writes it to `directory`."""
        args, config = self.args, load_config(path, self.args.device)
        demos = self.datasets[: len(args.demos)]
        stats = None
        if name == "sft":
            stats = scales_at_rest(aggregate_stats([dataset.meta.stats for dataset in demos]), args.demos)
            adopt(config, demos[0], [camera for camera in args.cameras.split(",") if camera])
        self.check_features(config)
        policy, processors = load_policy(path, config), load_processors(path, config, stats)
        if args.lora:
            add_lora(policy, args.lora, self.settings.seed)
        rows, prefixes = self.read(policy, processors[0], name)
        if name == "sft":
            optimiser = torch.optim.SGD([torch.zeros(1)])
            schedule = config.get_scheduler_preset().build(optimiser, steps).lr_lambdas[0]
            learner = Sft(policy, rows, prefixes, self.settings, schedule)
        else:
            learner = Otql(policy, rows, prefixes, self.settings)
        if learner.horizon > config.chunk_size:
            raise UserError(f"--horizon={learner.horizon} is more than the policy's chunk of {config.chunk_size}")
        if not len(learner.starts):
            raise UserError(f"no window of {learner.horizon} steps fits in the episodes; give a smaller --horizon")
        self.loop(name, learner, steps)
        # The policy executes the actions that the critic was trained on.
        changes = {"num_steps": self.settings.nfe, "n_action_steps": learner.horizon}
        save_directory(policy, processors, directory, **(changes if name == "otql" else {}))
        self.checkpoint(name).unlink(missing_ok=True)

    def check_features(self, config: Any) -> None:
        """Checks that all datasets fit the policy.

        Raises:
            UserError: a camera is missing, or the state or action has another width.
        """
        for dataset in self.datasets:
            cameras = [key for key in config.image_features if "empty_camera" not in key]
            for key in (*cameras, STATE, ACTION):
                expected = config.output_features[key] if key == ACTION else config.input_features[key]
                found = dataset.meta.features.get(key)
                if found is None or (key not in cameras and tuple(found["shape"]) != tuple(expected.shape)):
                    has = ", ".join(dataset.meta.camera_keys) if key in cameras else found and list(found["shape"])
                    raise UserError(f"{dataset.root} does not fit the policy's {key} (it has {has or 'none'})")

    def read(self, policy: Any, preprocess: Any, name: str) -> tuple[Rows, AllPrefixes]:
        """Returns the rows of the stage's datasets, and their prefixes."""
        args = self.args
        used = self.datasets if name == "otql" else self.datasets[: len(args.demos)]

        def normalise(states: torch.Tensor, actions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            batch = preprocess({STATE: states, ACTION: actions, "task": [""] * len(states)})
            return batch[STATE].cpu(), batch[ACTION].cpu()

        rows = read_rows(args.demos, args.rollouts if name == "otql" else [], args.labels, normalise)
        tasks = sorted({str(task) for dataset in self.datasets for task in dataset.meta.tasks.index})
        width = policy.config.input_features[STATE].shape[0]
        tokens = preprocess({STATE: torch.zeros(len(tasks), width), "task": tasks})[OBS_LANGUAGE_ATTENTION_MASK]
        encoder = Encoder(policy, preprocess, int(tokens.sum(dim=1).max()), self.settings.bf16)
        cache = Path(args.cache_dir).expanduser() if args.cache_dir else self.root / "prefixes"
        return rows, AllPrefixes([Prefixes(encoder, each, args.cache, cache) for each in used], rows.frames)

    def checkpoint(self, name: str) -> Path:
        """Returns the path of a stage's checkpoint."""
        return self.root / f"{name}.checkpoint.safetensors"

    def loop(self, name: str, learner: Sft, steps: int) -> None:
        """Runs the updates, from the checkpoint if it exists.

        Raises:
            Interrupted: by a signal, after the checkpoint was written.
            UserError: the loss is not finite.
        """
        step, position = 0, 0
        if self.checkpoint(name).exists():
            with safe_open(self.checkpoint(name), "pt") as file:
                step, position = (int(file.metadata()[key]) for key in ("step", "position"))
                learner.load(nested((key, file.get_tensor(key)) for key in file.keys()))  # noqa: SIM118
        log = CsvLogger(self.root / f"{name}.csv", position)
        with PreemptionGuard() as guard, ProgressBar(steps, step, description=name) as bar:
            while step < steps:
                info = learner.update(step)
                step += 1
                logged = step % self.args.log_interval == 0 or step == steps
                numbers = {key: float(value) for key, value in info.items()} if logged else {}
                if logged:
                    log.log(step, numbers)
                    if not math.isfinite(numbers["flow/loss"]):
                        raise UserError(f"the loss is {numbers['flow/loss']} after {step} updates; lower --actor_lr")
                bar.update(1, {key: numbers[key] for key in ("flow/loss", "critic/loss") if key in numbers})
                if guard.received or step % self.args.save_interval == 0:
                    tensors = {key: value.detach().cpu().contiguous() for key, value in flat(learner.state())}
                    about = {"step": str(step), "position": str(log.position())}
                    atomic_write_bytes(self.checkpoint(name), safetensors.torch.save(tensors, about))
                if guard.received:
                    raise Interrupted(guard.received)
        log.close()


def flat(tree: dict[Any, Any], above: str = "") -> Iterable[tuple[str, torch.Tensor]]:
    """Yields the tensors of nested dictionaries with their joined keys."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{above}{key}|")
        else:
            yield f"{above}{key}", value


def nested(items: Iterable[tuple[str, torch.Tensor]]) -> dict[str, Any]:
    """Returns the nested dictionaries of `flat`'s items."""
    tree: dict[str, Any] = {}
    for key, value in items:
        *above, last = key.split("|")
        branch = tree
        for part in above:
            branch = branch.setdefault(part, {})
        branch[last] = value
    return tree


def main(argv: Sequence[str]) -> None:
    """Runs the command line."""
    run = Run(parse(argv[1:]))
    with exclusive_lock(run.root / ".lock"):
        print(f"trained: {run.train()}")


if __name__ == "__main__":
    run_main(main)
