"""Rewards as agents are trained on them: a task's own, scaled and shifted."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Affine:
    """The function r ↦ scale · r + shift of a number or an array.

    Attributes:
        scale: factor. shift: added after it.
    """

    scale: float = 1.0
    shift: float = 0.0

    def __call__(self, rewards: Any) -> Any:
        """Returns scale · rewards + shift; the rewards themselves, with the signs of their zeros, if that is r ↦ r."""
        return rewards if self == IDENTITY else self.scale * rewards + self.shift


IDENTITY = Affine()
