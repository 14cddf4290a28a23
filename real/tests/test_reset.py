"""Recordings on a real robot: a person at the terminal labels episodes and resets the scene."""

import builtins
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from lerobot.scripts import lerobot_record
from lerobot_teleoperator_otql_reset import OtqlResetConfig
from sessions import Arm, ArmConfig, fake_policy, labels_of, record

from real.import_rollouts import import_rollouts

pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What the person at the terminal answers, to be filled by the test; all of it must be asked for."""
    given: list[str] = []
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(builtins, "input", lambda question: given.pop(0))
    yield given
    assert not given


def test_person_resets_a_real_robot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: list[str]) -> None:
    answers += ["y", "", "perhaps", "r", "", "n", "", "y"]  # Episode 0, 1 (thrown away), 1, 2.
    policy = fake_policy(monkeypatch, 1)
    times = {"episode_time_s": 0.05, "num_episodes": 3, "fps": 100}
    record(tmp_path / "r", ArmConfig(), OtqlResetConfig(), policy, **times)
    assert [label["success"] for label in labels_of(tmp_path / "r")] == [True, False, True]
    assert Arm.sent.count(1.25) == 3  # Where it stood, at each of the three resets.
    line = import_rollouts([tmp_path / "r"], tmp_path / "a.npz")
    assert "3 episodes, 2 solved" in line


@pytest.mark.parametrize("when", ["episode", "reset"])
def test_label_is_of_the_try_that_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: list[str], when: str
) -> None:
    """Also if ← throws the first try of the last episode away, or of one whose second try Esc makes the last."""
    events = {"exit_early": False, "rerecord_episode": False, "stop_recording": False}
    monkeypatch.setattr(lerobot_record, "init_keyboard_listener", lambda: (None, events))
    policy, tries = fake_policy(monkeypatch, 1), []

    def press_back(*_: Any) -> torch.Tensor:
        """The first try's ← is pressed while it runs, or at the second question that follows; then comes Esc."""
        if when == "episode" and not tries:
            tries.append(events.update(rerecord_episode=True, exit_early=True))
        if when == "reset" and tries:
            events.update(stop_recording=True, exit_early=True)
        return torch.zeros(1, 1)

    def answer(_: str) -> str:
        if when == "reset" and answers == ["", "n"]:
            tries.append(events.update(rerecord_episode=True))
        return answers.pop(0)

    monkeypatch.setattr(builtins, "input", answer)
    monkeypatch.setattr(lerobot_record.make_policy(), "select_action", press_back)
    answers += ["", "n"] if when == "episode" else ["y", "", "n"]
    episodes = 1 if when == "episode" else 2
    times = {"episode_time_s": 0.03, "num_episodes": episodes, "fps": 100}
    record(tmp_path / "r", ArmConfig(), OtqlResetConfig(), policy, **times)
    assert [label["success"] for label in labels_of(tmp_path / "r")] == [False]


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, EOFError])
@pytest.mark.parametrize(
    ("given", "success"), [(["y", None], [True]), ([None, "n"], [False]), ([None, None], []), (["r", None], [])]
)
def test_interrupted_questions_end_the_recording(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: list, success: list[bool], interrupt: type[BaseException]
) -> None:
    """What is recorded is saved, what is answered kept; only what `r` throws away is lost."""
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    replies = iter([interrupt if answer is None else answer for answer in given])
    monkeypatch.setattr(builtins, "input", Mock(side_effect=replies))
    policy = fake_policy(monkeypatch, 1)
    record(tmp_path / "r", ArmConfig(), OtqlResetConfig(), policy, episode_time_s=0.03, fps=100)
    assert [label["success"] for label in labels_of(tmp_path / "r")] == success
    assert json.loads((tmp_path / "r/meta/info.json").read_text())["total_episodes"] == (given[0] != "r")
    assert next(replies, None) is None


def test_resets_longer_than_lerobots_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: list[str]) -> None:
    """End by it; a flag beside it would end the next episode before its first frame."""
    answers += ["y", "", "y", "", "y"]
    monkeypatch.setattr(builtins, "input", lambda _: time.sleep(0.03) or answers.pop(0))
    policy = fake_policy(monkeypatch, 1)
    times = {"episode_time_s": 0.05, "reset_time_s": 0.04, "num_episodes": 3, "fps": 100}
    record(tmp_path / "r", ArmConfig(), OtqlResetConfig(), policy, **times)
    assert len(labels_of(tmp_path / "r")) == 3 and Arm.sent.count(1.25) == 2


def test_reset_without_questions_on_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: list[str]
) -> None:
    answers += [""]
    policy = fake_policy(monkeypatch, 1)
    teleop = OtqlResetConfig(ask=False, hold={"joint.pos": -3.0})
    record(tmp_path / "r", ArmConfig(observed="angle"), teleop, policy, episode_time_s=0.05)
    assert -3.0 in Arm.sent and not (tmp_path / "r/labels.jsonl").exists()
