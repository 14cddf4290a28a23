"""Parameters that do not fit a checkpoint are named."""

import flax
import numpy as np
import pytest

from utils.errors import UserError
from utils.run.loading import restore_agent


class State(flax.struct.PyTreeNode):
    """As an agent."""

    params: dict
    hyper: dict
    opt_state: tuple = ()


def agent(widths, **hyper):
    return State({name: {"kernel": np.zeros((2, width))} for name, width in widths.items()}, hyper)


SAVED = {"params": {"flow": {"kernel": np.ones((2, 3))}}, "hyper": {"lr": 0.5, "gone": 1.0}, "opt_state": {}}


@pytest.mark.check
def test_restores_and_keeps_new_settings():
    restored = restore_agent(agent({"flow": 3}, lr=0.1, new=2.0), SAVED, "exp/run", "own.py")
    assert restored.hyper == {"lr": 0.5, "new": 2.0} and (restored.params["flow"]["kernel"] == 1).all()


@pytest.mark.check
@pytest.mark.parametrize(
    "widths,misfit",
    [
        ({"flow": 3, "value": 1}, r"params\.value: not in the checkpoint"),
        ({"other": 3}, r"params\.flow: in the checkpoint only; params\.other: not in the checkpoint"),
        ({"flow": 4}, r"params\.flow\.kernel: \[2, 3\] in the checkpoint, \[2, 4\] now"),
        ({"flow": 3, "a": 1, "b": 1, "c": 1, "d": 1}, "and 1 more"),
    ],
)
def test_names_what_does_not_fit(widths, misfit):
    with pytest.raises(UserError, match=rf"in exp/run does not fit the agent: .*{misfit}.*; restore own\.py"):
        restore_agent(agent(widths, lr=0.1), SAVED, "exp/run", "own.py")
