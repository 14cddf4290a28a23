"""Directories as the export writes them. These tests run in real/.venv: JAX and torch side by side."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from random_agents import OBSERVATION_DIM

from real.export import write_directory
from real.lerobot_policy import Normalisation, policy_files
from real.policy_tensors import policy_tensors


@pytest.fixture(autouse=True, scope="session")
def few_threads():
    """Small networks gain nothing from threads."""
    torch.set_num_threads(1)


@pytest.fixture
def export(tmp_path) -> Callable[..., Path]:
    """Returns a function that writes an agent as a policy directory."""

    def write(
        agent: Any,
        features: dict[str, int] | None = None,
        normalisation: Normalisation | None = None,
        images: dict[str, list[int]] | None = None,
        **changes: Any,
    ) -> Path:
        fields, tensors = policy_tensors(agent)
        features = {"observation.state": OBSERVATION_DIM} if features is None else features
        files = policy_files(fields | changes, tensors, features, normalisation or Normalisation(), images)
        directory = tmp_path / f"policy{len(list(tmp_path.iterdir()))}"
        write_directory(directory, files)
        return directory

    return write


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """For lerobot-record in this process: no arguments, no keyboard, calibrations elsewhere than at home."""
    from lerobot.robots import robot
    from lerobot.scripts import lerobot_record
    from lerobot.teleoperators import teleoperator

    monkeypatch.setattr(sys, "argv", ["lerobot-record"])
    for module in (robot, teleoperator):
        monkeypatch.setattr(module, "HF_LEROBOT_CALIBRATION", tmp_path)
    monkeypatch.setattr(lerobot_record, "is_headless", lambda: True)
    events = {"exit_early": False, "rerecord_episode": False, "stop_recording": False}
    monkeypatch.setattr(lerobot_record, "init_keyboard_listener", lambda: (None, dict(events)))
