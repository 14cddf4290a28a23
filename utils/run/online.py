"""Online training: the lanes act in their environments, in worker processes, and are trained on what they meet."""

import math
import sys
from collections.abc import Generator
from typing import Any

import numpy as np

from utils.data.batches import Arrays
from utils.data.replay_buffer import ReplayBuffer
from utils.errors import UserError
from utils.observations import map_parts
from utils.random_streams import Stream, stream_key, stream_seed
from utils.rollout.env_runner import Chunk, EnvRunner, Outcome
from utils.rollout.evaluator import default_workers
from utils.rollout.policy import act
from utils.rollout.worker_pool import WorkerError, WorkerPool, converse, environment_failed
from utils.run.evaluation_queue import ACTIONS
from utils.run.program import Program
from utils.run.update_loop import UpdateLoop


class Online:
    """The online part of a program: an environment and a share of the replay buffer for each lane."""

    def __init__(self, program: Program, trainer: UpdateLoop, first_step: int):
        """Starts the environments, or finds the way back to where they were.

        Args:
            program: at step `first_step` or beyond. trainer: holds the dataset.
            first_step: the program's step at which the online part begins; it goes on to the program's end.
        """
        if not trainer.on_device:
            raise UserError("online training needs the dataset on the device; give --dataset_placement=device, or less")
        self.program, self.trainer, horizon = program, trainer, program.config.horizon_length
        width = program.agents.config.action_dim // horizon
        self.replay = ReplayBuffer(len(program.lanes), program.total - first_step, horizon, program.observation, width)
        saved = program.restored if program.restored and program.step > first_step else []
        if saved:  # What a signal saves until the explorers are back.
            program.extra = lambda index: {"explorer": saved[index]["explorer"]}
        workers = min(len(program.lanes), program.flags.eval_workers or default_workers())
        self.pool = WorkerPool(program.make_env, workers, name=program.task.name, timeout=program.flags.env_timeout)

        def restore(explorer: EnvRunner, index: int) -> Generator[Any, Any, EnvRunner]:
            explorer, same = yield from explorer.restore(saved[index]["explorer"])
            if not same:
                note = "its environment did not come back to the same state: the episode under way is cut off there"
                print(f"{program.lanes[index].spec.directory}: {note}", file=sys.stderr)
            return explorer

        dialogues = {}
        for index, run in enumerate(program.lanes):

            def seed_of(episode: int, seed: int = run.spec.seed) -> int:
                return stream_seed(seed, Stream.RESET, episode)

            explorer = EnvRunner(self.replay, index, seed_of, program.sparse)
            dialogues[index] = restore(explorer, index) if saved else explorer.begin()
        explorers = self._converse(dialogues)
        self.explorers = [explorers[index].commit() for index in range(len(program.lanes))]
        program.extra = lambda index: {"explorer": self.explorers[index].state()}

    def _converse(self, dialogues: dict[int, Generator[Any, Any, Any]]) -> dict[int, Any]:
        """Runs the lanes' dialogues with their environments, all at a time; nothing is changed if that fails."""
        try:
            return converse(self.pool, dialogues, self.program.signals.check)
        except WorkerError as error:
            self.pool.close()
            what, directory = (
                f"acting online from step {self.program.step} on failed",
                self.program.lanes[0].spec.directory,
            )
            raise environment_failed(error, what, directory) from error
        except BaseException:
            self.pool.close()
            raise

    def _acting(self, index: int, steps: int) -> Generator[Any, Any, tuple[EnvRunner, list[Outcome]] | None]:
        """The dialogue of `steps` environment steps of one lane; it returns None if actions are not finite."""
        program, horizon = self.program, self.program.config.horizon_length
        key = stream_key(program.lanes[index].spec.seed, Stream.ACTING)

        def policy(observation: Any, episode: int, step: int) -> Chunk:
            numbers = np.full(1, episode, np.int32), np.full(1, step, np.int32)
            chunk = np.asarray(act(program.actors, index, map_parts(np.stack, [observation]), key, *numbers))
            if not np.isfinite(chunk).all():
                raise FloatingPointError
            return chunk.reshape(horizon, -1)

        try:
            return (yield from self.explorers[index].act(steps, policy))
        except FloatingPointError:
            return None

    def _act(self, steps: int, until: int) -> None:
        """Every lane takes `steps` environment steps, up to the program's step `until`: all of them, or none does."""
        lanes = self.program.alive
        results = self._converse({index: self._acting(index, steps) for index in lanes})
        for index in lanes:
            if results[index] is None:
                self.program.diverge(index, ACTIONS)
                continue
            explorer, outcomes = results[index]
            self.explorers[index] = explorer.commit()
            for outcome in outcomes:
                self.program.lanes[index].log("online", until, outcome)
                if math.isnan(outcome["success"]):
                    self.program.evaluations.say_return_only()

    def train(self, start_training: int, utd_ratio: int, balanced: bool) -> None:
        """Acts and trains to the program's end: one chunk executed, then its updates, in turn.

        Args:
            start_training: environment steps without updates. utd_ratio: updates an environment step after them.
            balanced: half of each batch from the dataset, half from the lane's experience; else uniform over both.
        """
        program = self.program
        try:
            while program.step < program.total:
                program.visit()
                until = min(program.until(), program.step + program.config.horizon_length)
                steps, updates = until - program.step, 0
                info: Arrays = {}
                self._act(steps, until)
                learnt_from = min(steps, self.explorers[program.alive[0]].transitions - start_training)
                if learnt_from > 0 and self.replay.counts[program.alive].min() > 0:
                    updates = learnt_from * utd_ratio
                    program.agents, info = self.trainer.train_online(program.agents, self.replay, updates, balanced)
                program.advance(until, info, updates)
        finally:
            self.pool.close()
