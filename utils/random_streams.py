"""Names everything that is drawn at random, so that no two draws of a run use the same bits.

JAX's keys form a tree: `fold_in(key, i)` and `split(key)[i]` are one and the same child of a key. Two draws therefore
differ only if their paths do. A path begins with a run's seed and the name of a stream, then what it counts:

    seed → TRAINING or POST_TRAINING → INITIALISATION → network
                                     → UPDATE → step → what a loss splits its key into
                                                     → AUGMENTATION
                                              → DISTILLATION → step → …
                                     → BATCH, EXPERIENCE → step
                                     → DISTILLATION → BATCH → step
    seed → ACTING → episode → step in it
    seed → EVALUATION_ACTING → step → episode → chunk

Where several draws share a key, it is split into as many parts first: no key is used twice.
"""

import enum
import functools

import jax
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray

NAMES = 2**31  # the first number of a name below a key; steps, episodes and parts of a split stay below it


class Stream(enum.IntEnum):
    """Streams, with their counters in brackets. Numbers are part of every result: a new name gets a new one."""

    INITIALISATION = 1  # parameters of the networks (network)
    TRAINING = 2  # all updates of main.py
    POST_TRAINING = 3  # all updates of online_main.py, whose base can be a run of main.py with the same seed
    DISTILLATION = 4  # the updates before those of post-training, which count their steps from 0 as well
    UPDATE = 5  # an agent's updates (step)
    AUGMENTATION = 6  # shifts of images, in an update
    BATCH = 7  # rows of the dataset, or of dataset and experience together (step)
    EXPERIENCE = 8  # rows of the experience, where they are drawn by themselves (step)
    ACTING = 9  # actions in the environment that is learnt from, the base's included (episode, step in it)
    RESET = 10  # that environment's initial states (episode)
    EVALUATION_ACTING = 11  # actions in evaluations and videos (step, episode, chunk)
    EVALUATION_RESET = 12  # their initial states (step; the evaluator adds the episode)
    STUDY = 13  # what experiments draw apart from runs (number of the draw)


def stream_key(root: int | PRNGKeyArray, stream: Stream, *counters: int | Int[Array, ""]) -> PRNGKeyArray:
    """Returns the PRNG key of one draw, or of many that further counters tell apart.

    Args:
        root: a run's seed, or the key that the stream stands below. stream: its name.
        counters: numbers in [0, 2³¹), traced or not.
    """
    key = jax.random.PRNGKey(root) if isinstance(root, int) else root
    return functools.reduce(jax.random.fold_in, (NAMES + stream, *counters), key)


def stream_seed(seed: int, stream: Stream, *counters: int) -> int:
    """Returns the 32-bit seed of what does not draw by keys, such as an environment's reset; arguments as above."""
    # A spawn key is never padded: without it, the counters (1,) and (1, 0) would give the same seed.
    sequence = np.random.SeedSequence((seed, int(stream)), spawn_key=counters)
    return int(sequence.generate_state(1)[0])
