"""The training program: killed runs, what it writes, on the robot, mistakes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import lerobot_robot_otql_sim
import numpy as np
import pytest
import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.factory import make_policy, make_pre_post_processors
from lerobot.utils.control_utils import predict_action
from lerobot_robot_otql_sim.robot import ARM
from safetensors.torch import load_file
from tiny_smolvla import ACTION_DIM, CAMERAS, CHUNK, SIDE, STATE_DIM, write_dataset

from real.smolvla import train
from real.smolvla.otql import Sft
from real.smolvla.tiny_model import make_config, write_policy, write_vlm
from utils.errors import UserError
from utils.output.loggers import read_csv
from utils.system.entry_point import run_main
from utils.system.rendering import rendering_backend

REPOSITORY = Path(train.__file__).parents[2]

SMALL = (
    "--batch_size=8",
    "--save_interval=2",
    "--log_interval=1",
    "--horizon=2",
    "--critic_dims=16,16",
    "--device=cpu",
)


def run(*flags: object) -> None:
    train.Run(train.parse([*SMALL, *map(str, flags)])).train()


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_dataset(tmp_path_factory.mktemp("data") / "rollouts", (6, 7), seed=1)
    labels = ({"episode_index": i, "success": i == 0} for i in range(2))
    (root / "labels.jsonl").write_text("".join(json.dumps(label) + "\n" for label in labels))
    return root


class Killed(BaseException):
    """Stands for SIGKILL: nothing that comes after is done."""


def test_a_killed_run_goes_on_to_the_same_numbers(
    path: Path, dataset: Path, rollouts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = (f"--policy.path={path}", f"--demos={dataset}", f"--rollouts={rollouts}", "--sft_steps=5", "--otql_steps=5")
    cache = f"--cache_dir={tmp_path / 'cache'}"
    run(*flags, cache, f"--output_dir={tmp_path / 'whole'}")
    update, killed = Sft.flow_step, iter([3, 3])  # In SFT and in OTQL, after the checkpoint of 2 updates.
    at = next(killed)

    def die(self: Sft, step: int, *inputs: object) -> object:
        nonlocal at
        if step == at:
            at = next(killed, None)
            raise Killed
        return update(self, step, *inputs)

    monkeypatch.setattr(Sft, "flow_step", die)
    for _ in range(2):
        with pytest.raises(Killed):
            run(*flags, cache, f"--output_dir={tmp_path / 'killed'}")
    run(*flags, cache, f"--output_dir={tmp_path / 'killed'}")
    for name in ("sft", "otql"):
        whole, broken = (tmp_path / one / name for one in ("whole", "killed"))
        assert (whole.with_suffix(".csv")).read_text() == (broken.with_suffix(".csv")).read_text()
        assert (whole / "model.safetensors").read_bytes() == (broken / "model.safetensors").read_bytes()
    assert read_csv(tmp_path / "whole/otql.csv")["step"].tolist() == [1, 2, 3, 4, 5]
    assert not list((tmp_path / "killed").glob("*checkpoint*"))
    assert len(list((tmp_path / "cache").iterdir())) == 2  # OTQL took what SFT had made of the demonstrations.
    with pytest.raises(UserError, match="started with lam"):
        run(*flags, cache, f"--output_dir={tmp_path / 'killed'}", "--lam=2")


@pytest.mark.parametrize("lora", [0, 2])
def test_the_directory_is_a_smolvla_that_lerobot_loads_and_acts_with(
    path: Path, dataset: Path, rollouts: Path, tmp_path: Path, lora: int
) -> None:
    run(
        *(f"--policy.path={path}", f"--demos={dataset}", f"--rollouts={rollouts}", "--sft_steps=2", "--otql_steps=2"),
        *(f"--output_dir={tmp_path}", f"--lora={lora}", "--cache=memory", "--actor_lr=1e-2"),
    )
    before, after = (load_file(directory / "model.safetensors") for directory in (path, tmp_path / "otql"))
    assert {name: each.shape for name, each in before.items()} == {name: each.shape for name, each in after.items()}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("lm_expert.layers.0.self_attn.q_proj" in name for name in changed)
    assert any("state_proj" in name for name in changed)
    assert not any(".vlm." in name for name in changed)
    theirs, ours = (json.loads((directory / "config.json").read_text()) for directory in (path, tmp_path / "otql"))
    assert {name for name in theirs if theirs[name] != ours[name]} <= {"num_steps", "n_action_steps", "input_features"}
    assert (ours["num_steps"], ours["n_action_steps"]) == (3, 2)
    # As lerobot-record does.
    meta = LeRobotDataset("local/it", root=dataset).meta
    config = PreTrainedConfig.from_pretrained(tmp_path / "otql")
    config.pretrained_path = tmp_path / "otql"
    policy = make_policy(config, ds_meta=meta)
    processors = make_pre_post_processors(config, config.pretrained_path)
    images = {f"observation.images.{name}": np.zeros((SIDE, SIDE, 3), np.uint8) for name in ("front", "wrist")}
    state = {"observation.state": np.zeros(STATE_DIM, np.float32)}
    action = predict_action(images | state, policy, torch.device("cpu"), *processors, False, "open it")
    assert action.shape == (1, ACTION_DIM)
    assert torch.isfinite(action).all()
    # Normalised by the demonstrations' numbers.
    stats = load_file(next((tmp_path / "otql").glob("policy_postprocessor*.safetensors")))
    torch.testing.assert_close(stats["action.mean"], torch.tensor(meta.stats["action"]["mean"]).float())


@pytest.mark.slow
def test_acts_through_lerobot_record_on_the_robot_with_cameras(tmp_path: Path) -> None:
    if rendering_backend() is None:
        pytest.skip("MuJoCo cannot render here")
    write_vlm(tmp_path / "vlm")
    sizes = {"chunk_size": CHUNK, "n_action_steps": CHUNK, "num_steps": 3}
    config = make_config(tmp_path / "vlm", list(CAMERAS), len(ARM), 4, **sizes)
    write_policy(tmp_path / "policy", config)
    command = [
        *(sys.executable, "-m", "lerobot.scripts.lerobot_record", "--robot.type=otql_sim", "--robot.image_size=32"),
        *("--robot.max_steps=6", f"--policy.path={tmp_path / 'policy'}", "--dataset.repo_id=local/eval_it"),
        *(f"--dataset.root={tmp_path / 'data'}", "--dataset.single_task=open it", "--dataset.num_episodes=2"),
        *("--dataset.fps=100", "--dataset.push_to_hub=false", "--play_sounds=false", "--dataset.vcodec=h264"),
    ]
    plugin = str(Path(lerobot_robot_otql_sim.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": f"{REPOSITORY}:{plugin}", "HF_LEROBOT_HOME": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-2000:]
    frames = LeRobotDataset("local/eval_it", root=tmp_path / "data", video_backend=train.decoder())
    assert len(frames) == 12
    assert frames[0]["observation.state"].shape == (len(ARM),)
    views = [frames[0][f"observation.images.{name}"] for name in CAMERAS]
    assert all(view.shape == (3, 32, 32) and view.std() > 0.02 for view in views)
    assert not torch.allclose(*views, atol=0.1)
    # Two chunks of different actions, as the policy gives them for what was recorded.
    assert frames[0]["action"].shape == (4,)
    assert not torch.equal(frames[0]["action"], frames[CHUNK]["action"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--batch_size=many",), "batch_size"),
        (("--nfe=0",), "nfe"),
        (("--policy.path=nowhere/at/all",), "no policy"),
        (("--demos=nowhere",), "no LeRobotDataset"),
        (("--rollouts={demos}", "--labels=a,b"), "give one for each"),
        (("--cameras=top",), "no camera observation.images.top"),
        (("--sft_steps=1", "--chunk"), "unrecognized"),
        (("--rollouts={demos}", "--horizon=6"), "chunk of 4"),
    ],
)
def test_a_mistake_ends_in_one_line(
    path: Path,
    dataset: Path,
    tmp_path: Path,
    flags: tuple[str, ...],
    words: str,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = (f"--policy.path={path}", f"--demos={dataset}", f"--output_dir={tmp_path}", "--cache=none", *SMALL)
    (dataset / "labels.jsonl").write_text(
        "".join(json.dumps({"episode_index": i, "success": False}) + "\n" for i in range(2))
    )
    monkeypatch.setattr(sys, "argv", ["train", *given, *(flag.format(demos=dataset) for flag in flags)])
    try:
        with pytest.raises(SystemExit) as end:
            run_main(train.main)
    finally:
        (dataset / "labels.jsonl").unlink()
    assert end.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert words in lines[0]
