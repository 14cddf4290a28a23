"""Directories as the export writes them. These tests run in real/.venv: JAX and torch side by side."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from random_agents import OBSERVATION_DIM

from real.policy_directory import Normalisation, save_policy
from real.policy_tensors import policy_tensors

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests"))  # For tiny_runs.
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(autouse=True, scope="session")
def few_threads():
    """Small networks gain nothing from threads."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def homes(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Calibrations and datasets are not written at home."""
    monkeypatch.setenv("HF_LEROBOT_HOME", str(tmp_path_factory.getbasetemp() / "lerobot"))
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{Path(__file__).parent}")


@pytest.fixture(scope="session")
def pointmaze(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small dataset of the medium point maze."""
    from envs.collect import collect

    directory = tmp_path_factory.mktemp("pointmaze")
    return collect("pointmaze-medium-navigate-v0", episodes=3, max_steps=60, dataset_dir=directory, workers=1)


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
        directory = tmp_path / f"policy{len(list(tmp_path.iterdir()))}"
        save_policy(directory, fields | changes, tensors, features, normalisation or Normalisation(), images)
        return directory

    return write
