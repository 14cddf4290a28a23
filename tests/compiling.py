"""How far XLA optimises in tests: little, but where they compute for longer than they compile."""

import contextlib
from collections.abc import Iterator

import jax

FLAG = "jax_disable_most_optimizations"


@contextlib.contextmanager
def optimised() -> Iterator[None]:
    """What is compiled within is optimised, less than in users' runs."""
    before = jax.config.read(FLAG)
    jax.config.update(FLAG, False)
    try:
        yield
    finally:
        jax.config.update(FLAG, before)
