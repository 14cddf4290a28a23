"""Online training: the lanes act in their environments and are trained on what they meet."""

import sys
from typing import Any

import numpy as np

from utils.errors import UserError
from utils.observations import map_parts
from utils.program import Program
from utils.random_streams import Stream, stream_key, stream_seed
from utils.replay import Explorer, Replay
from utils.training import Trainer, act


class Online:
    """The online part of a program: an environment and a share of the replay buffer for each lane."""

    def __init__(self, program: Program, trainer: Trainer, first_step: int):
        """Makes the environments, or finds the way back to where they were.

        Args:
            program: at step `first_step` or beyond. trainer: holds the dataset.
            first_step: the program's step at which the online part begins; it goes on to the program's end.
        """
        if not trainer.on_device:
            raise UserError("online training needs the dataset on the device; give --dataset_placement=device, or less")
        self.program, self.trainer, horizon = program, trainer, program.config.horizon_length
        width = program.agents.config.action_dim // horizon
        self.replay = Replay(len(program.lanes), program.total - first_step, horizon, program.observation, width)
        self.explorers = []
        for index, run in enumerate(program.lanes):
            saved = program.restored[index]["explorer"] if program.step > first_step else None

            def seed_of(episode: int, seed: int = run.spec.seed) -> int:
                return stream_seed(seed, Stream.RESET, episode)

            explorer = Explorer(program.make_env(), self.replay, index, seed_of, program.sparse)
            if saved and not explorer.restore(saved):
                note = "its environment did not come back to the same state: the episode under way is cut off there"
                print(f"{run.spec.directory}: {note}", file=sys.stderr)
            self.explorers.append(explorer)
        program.extra = lambda index: {"explorer": self.explorers[index].state()}

    def _act(self, index: int, steps: int, until: int) -> None:
        """One lane takes `steps` environment steps, up to the program's step `until`."""
        program, horizon = self.program, self.program.config.horizon_length
        key = stream_key(program.lanes[index].spec.seed, Stream.ACTING)

        def policy(observation: Any, episode: int, step: int) -> np.ndarray:
            numbers = np.full(1, episode, np.int32), np.full(1, step, np.int32)
            chunk = np.asarray(act(program.actors, index, map_parts(np.stack, [observation]), key, *numbers))
            return chunk.reshape(horizon, -1)

        for outcome in self.explorers[index].act(steps, policy):
            program.lanes[index].log("online", until, outcome)

    def train(self, start_training: int, utd_ratio: int, balanced: bool) -> None:
        """Acts and trains to the program's end: one chunk executed, then its updates, in turn.

        Args:
            start_training: environment steps without updates. utd_ratio: updates an environment step after them.
            balanced: half of each batch from the dataset, half from the lane's experience; else uniform over both.
        """
        program = self.program
        while program.step < program.total:
            program.visit()
            until = min(program.until(), program.step + program.config.horizon_length)
            steps, info, updates = until - program.step, {}, 0
            for index in range(len(self.explorers)):
                self._act(index, steps, until)
            learnt_from = min(steps, self.explorers[0].transitions - start_training)
            if learnt_from > 0 and self.replay.counts.min() > 0:
                updates = learnt_from * utd_ratio
                program.agents, info = self.trainer.train_online(program.agents, self.replay, updates, balanced)
            program.advance(until, info, updates)
