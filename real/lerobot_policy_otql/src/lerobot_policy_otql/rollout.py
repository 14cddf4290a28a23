"""`otql-rollout`: lerobot-rollout with a strategy that records the success of each episode.

    otql-rollout --policy.path=POLICY --robot.type=… --dataset.repo_id=local/rollout_x --dataset.num_episodes=10 …

It takes lerobot-rollout's flags. LeRobot 0.6 has a fixed list of strategies, so its program is called with one more,
`--strategy.type=otql`, the default here: episodes and resets as in `episodic`, with other keys at the terminal.

    y, n       the episode succeeded, or failed: ends it, if it still runs, and saves it
    r          discards the episode, to repeat it
    Enter      the scene is reset: starts the next episode
    Esc, q     discards the episode and ends the recording; so does Ctrl-C

The dataset gets two columns more, which LeRobot's own tools keep: `next.success`, True in the last frame of a success,
and `next.reward`, 0 there and -1 in any other frame. A robot with an attribute `success` (None while an episode runs,
then True or False) and a method `reset(episode)` judges and resets itself, and nothing is asked.
"""

import inspect
import sys
import time
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from lerobot.datasets import VideoEncodingManager
from lerobot.rollout import (
    EpisodicStrategy,
    EpisodicStrategyConfig,
    RolloutContext,
    RolloutStrategyConfig,
    create_strategy,
)
from lerobot.scripts import lerobot_rollout
from lerobot.utils.import_utils import register_third_party_plugins
from lerobot.utils.keyboard_input import TerminalKeyListener

SUCCESS, REWARD = "next.success", "next.reward"
COLUMNS = {
    SUCCESS: {"dtype": "bool", "shape": (1,), "names": None},
    REWARD: {"dtype": "float32", "shape": (1,), "names": None},
}


def fail(message: str) -> NoReturn:
    """Ends the program with a one-line error and exit code 2, after invalid input."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


@RolloutStrategyConfig.register_subclass("otql")
@dataclass
class OtqlStrategyConfig(EpisodicStrategyConfig):
    """Settings of the strategy: those of `episodic`."""


class OtqlStrategy(EpisodicStrategy):
    """Episodes of a policy with labelled success; see the module's docstring."""

    def setup(self, ctx: RolloutContext) -> None:
        """Checks that policy, robot and dataset fit, and starts inference and the keys."""
        self._init_engine(ctx)
        self._robot: Any = ctx.hardware.robot_wrapper.inner
        self._dataset, self._judges = ctx.data.dataset, hasattr(self._robot, "success")
        self._events = {"exit_early": False}
        self._key = ""
        check_policy(ctx)
        add_columns(ctx.data.dataset)
        if self._judges:
            ctx.runtime.cfg.return_to_initial_position = False
        elif not sys.stdin.isatty():
            fail("success is asked for at the terminal, and there is none; run otql-rollout in a terminal")
        else:
            self._listener = TerminalKeyListener(self._press)
            self._listener.start()

    def run(self, ctx: RolloutContext) -> None:
        """Records the episodes; an unfinished one is discarded."""
        cfg, dataset = ctx.runtime.cfg, ctx.data.dataset
        with VideoEncodingManager(dataset):
            end = dataset.num_episodes + cfg.dataset.num_episodes
            while dataset.num_episodes < end and not self._stopped(ctx):
                self._key, self._events["exit_early"] = "", False  # Before keys are asked for.
                if self._judges:
                    self._robot.reset(dataset.num_episodes)
                else:
                    print(f"Episode {dataset.num_episodes}: y success, n failure, r repeat, q stop", flush=True)
                self._record(ctx)
                key = self._label(ctx)
                if key in ("y", "n") and dataset.has_pending_frames():
                    label(dataset.writer.episode_buffer, key == "y")
                    dataset.save_episode()
                else:
                    dataset.clear_episode_buffer()
                if key != "stop" and not self._judges and dataset.num_episodes < end:
                    self._reset_scene(ctx)

    def _press(self, key: str) -> None:
        """Takes a key of the terminal."""
        self._key = {"esc": "stop", "q": "stop"}.get(key, key)
        self._events["exit_early"] |= self._key in ("y", "n", "r", "stop")

    def _stopped(self, ctx: RolloutContext) -> bool:
        return self._key == "stop" or ctx.runtime.shutdown_event.is_set()

    def _record(self, ctx: RolloutContext) -> None:
        """Lets the policy act until its time is over, a key ends the episode, or the robot does."""
        cfg = ctx.runtime.cfg
        self._engine.reset()
        self._interpolator.reset()
        self._engine.resume()
        pace: dict[str, Any] = {"fps": cfg.fps}
        if "timer" in inspect.signature(self._policy_loop).parameters:  # LeRobot after 0.6.1.
            from lerobot.utils.cycle_timer import CycleTimer

            pace = {"timer": CycleTimer(cfg.fps, self._interpolator.multiplier)}
        self._policy_loop(
            ctx=ctx,
            robot=ctx.hardware.robot_wrapper,
            events=self._events,
            features=ctx.data.dataset_features,
            **pace,
            control_time_s=cfg.dataset.episode_time_s,
            dataset=self,
            single_task=cfg.dataset.single_task or cfg.task,
        )
        self._engine.pause()

    def add_frame(self, frame: dict[str, Any]) -> None:
        """Adds a frame of LeRobot's loop to the dataset, as not successful yet."""
        self._dataset.add_frame(frame | {SUCCESS: np.array([False]), REWARD: np.array([-1], np.float32)})
        self._events["exit_early"] |= self._judges and self._robot.success is not None

    def _label(self, ctx: RolloutContext) -> str:
        """Returns 'y', 'n', 'r' or 'stop'."""
        if self._judges:
            return "stop" if self._stopped(ctx) else "y" if self._robot.success else "n"
        if self._key not in ("y", "n", "r", "stop"):
            print("Success? y, n, r (repeat), q (stop)", flush=True)
        while self._key not in ("y", "n", "r", "stop") and not self._stopped(ctx):
            time.sleep(0.02)
        return "stop" if self._stopped(ctx) else self._key

    def _reset_scene(self, ctx: RolloutContext) -> None:
        """Moves the arm to its first position, or lets a teleoperator move it, until Enter."""
        cfg, hardware = ctx.runtime.cfg, ctx.hardware
        if hardware.teleop is None and self.config.reset_to_initial_position:
            # The name before and after LeRobot 0.6.1.
            move = getattr(self, "return_to_initial_position", None) or self._return_to_initial_position
            move(hardware, duration_s=1)
        self._key = ""
        print("Reset the scene, then press Enter", flush=True)
        while self._key != "enter" and not self._stopped(ctx):
            if hardware.teleop is None:
                time.sleep(0.02)
                continue
            seen = hardware.robot_wrapper.get_observation()
            action = ctx.processors.teleop_action_processor((hardware.teleop.get_action(), seen))
            hardware.robot_wrapper.send_action(ctx.processors.robot_action_processor((action, seen)))
            time.sleep(1 / cfg.fps)


def label(episode: dict[str, Any], success: bool) -> None:
    """Writes the success of an episode into its last frame, given the writer's buffer of its columns."""
    episode[SUCCESS][-1] = np.array([success])
    episode[REWARD][-1] = np.array([0 if success else -1], np.float32)


def add_columns(dataset: Any) -> None:
    """Adds the columns to a new dataset; a resumed one must have them."""
    missing = COLUMNS.keys() - dataset.features.keys()
    if missing and dataset.num_episodes:
        fail(f"{dataset.root} was recorded without success; give another --dataset.root, without --resume")
    if missing:
        dataset.features.update(COLUMNS)  # Written to info.json with the first episode.
        dataset.clear_episode_buffer()


def check_policy(ctx: RolloutContext) -> None:
    """Checks an exported policy's names and rate against the robot's and the dataset's, before it moves."""
    config, cfg = ctx.policy.policy.config, ctx.runtime.cfg
    names = ctx.data.dataset_features.get("observation.state", {}).get("names")
    if (known := getattr(config, "state_names", None)) and list(known) != list(names or []):
        fail(f"the policy was trained with the states {', '.join(known)}; the robot has {', '.join(names or ['none'])}")
    rates = {"--dataset.fps": cfg.dataset.fps}
    if not hasattr(ctx.hardware.robot_wrapper.inner, "success"):  # A simulation has no clock, and may run faster.
        rates["--fps"] = cfg.fps
    rates |= {"the policy's data": fps} if (fps := getattr(config, "fps", 0)) else {}
    if len(set(rates.values())) > 1:
        fail(f"frames a second differ: {', '.join(f'{name} has {rate:g}' for name, rate in rates.items())}")


def create(config: RolloutStrategyConfig) -> Any:
    """Returns the strategy of a configuration: this module's, or one of LeRobot's."""
    return OtqlStrategy(config) if isinstance(config, OtqlStrategyConfig) else create_strategy(config)


def main() -> None:
    """Runs lerobot-rollout with this strategy."""
    if not any(argument.startswith("--strategy.type") for argument in sys.argv):
        sys.argv.append("--strategy.type=otql")
    register_third_party_plugins()
    lerobot_rollout.create_strategy = create
    lerobot_rollout.rollout()


if __name__ == "__main__":
    main()
