"""Named streams of random numbers: no two draws of a run use the same bits.

JAX's keys form a tree in which `fold_in(key, i)` and `split(key)[i]` are the same child of a key, so two draws differ
only if their paths differ. A path begins with a run's seed and the name of a stream, followed by its counters:

    seed → TRAINING or POST_TRAINING → INITIALISATION → network
                                     → UPDATE → step → what a loss splits its key into
                                                     → AUGMENTATION
                                              → DISTILLATION → step → …
                                     → BATCH, EXPERIENCE → step
                                     → DISTILLATION → BATCH → step
    seed → ACTING → episode → step in it
    seed → EVALUATION_ACTING → step → episode → chunk

A key that serves several draws is split into as many parts first: no key is used twice.
"""

import enum
import functools

import jax
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray

NAMES = 2**31  # offset of the streams' numbers below a key; steps, episodes and parts of a split are smaller


class Stream(enum.IntEnum):
    """Streams, with their counters in brackets. Their numbers decide every result: a new stream gets a new number."""

    INITIALISATION = 1  # parameters of the networks (network)
    TRAINING = 2  # all updates of main.py
    POST_TRAINING = 3  # all updates of online_main.py, whose base can be a run of main.py with the same seed
    DISTILLATION = 4  # the updates before post-training, whose steps count from 0 as well
    UPDATE = 5  # an agent's updates (step)
    AUGMENTATION = 6  # shifts of images, in an update
    BATCH = 7  # rows of the dataset, or of dataset and experience together (step)
    EXPERIENCE = 8  # rows of the experience, where they are drawn separately (step)
    ACTING = 9  # actions in the training environment, the base policy's included (episode, step in it)
    RESET = 10  # initial states of the training environment (episode)
    EVALUATION_ACTING = 11  # actions in evaluations and videos (step, episode, chunk)
    EVALUATION_RESET = 12  # initial states in evaluations and videos (step; the evaluator adds the episode)
    STUDY = 13  # draws of experiments outside runs (number of the draw)


def stream_key(root: int | PRNGKeyArray, stream: Stream, *counters: int | Int[Array, ""]) -> PRNGKeyArray:
    """Returns the PRNG key of one draw, or of several that further counters tell apart.

    Args:
        root: a run's seed, or the parent key of the stream.
        stream: name of the stream.
        *counters: numbers in [0, 2³¹), traced or not.
    """
    key = jax.random.PRNGKey(root) if isinstance(root, int) else root
    return functools.reduce(jax.random.fold_in, (NAMES + stream, *counters), key)


def stream_seed(seed: int, stream: Stream, *counters: int) -> int:
    """Returns a 32-bit seed for generators that take no key, such as an environment's reset; see `stream_key`."""
    # A spawn key is never padded; as entropy, the counters (1,) and (1, 0) would give the same seed.
    sequence = np.random.SeedSequence((seed, int(stream)), spawn_key=counters)
    return int(sequence.generate_state(1)[0])
