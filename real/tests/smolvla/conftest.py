"""A tiny untrained SmolVLA and a dataset for it."""

from pathlib import Path

import pytest
from tiny_smolvla import write_dataset, write_tiny


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained policy's directory."""
    return write_tiny(tmp_path_factory.mktemp("smolvla"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "demos", (6, 5), tasks=("open it", "open"))
