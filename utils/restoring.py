"""An agent's state from a checkpoint, checked against the networks that its file defines now."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from flax.serialization import from_state_dict, to_state_dict

from utils.errors import UserError

SHOWN = 3  # misfits in a message


def restore(agent: Any, state: Mapping[str, Any], place: Any, file: str) -> Any:
    """Returns `agent` with what a checkpoint holds; settings that the checkpoint lacks stay as they are in `agent`.

    Args:
        agent: of the right structure; its leaves may be shapes alone. state: from a checkpoint.
        place: the run's directory. file: the agent's, or its module; both for the message.

    Raises:
        UserError: names the parameters that do not fit.
    """
    now = to_state_dict(agent)
    # Floats of the config, which the run's record is compared by.
    state = {**state, "hyper": {name: state["hyper"].get(name, value) for name, value in now["hyper"].items()}}
    for part in sorted(state.keys() | now.keys(), key=lambda name: (name != "params", name != "targets", name)):
        if misfits := list(_misfits(part, state, now)):
            more = f" and {len(misfits) - SHOWN} more" if len(misfits) > SHOWN else ""
            raise UserError(
                f"the checkpoint in {place} does not fit the agent: {'; '.join(misfits[:SHOWN])}{more}; "
                f"restore {file} as it was, or start another run (--run_group)"
            )
    return from_state_dict(agent, state)


def _misfits(key: str, was: Mapping[str, Any], now: Mapping[str, Any], above: str = "") -> Iterator[str]:
    """Says in what the entry `key` of two nested states differs."""
    name = f"{above}{key}"
    if key not in was:
        yield f"{name}: not in the checkpoint"
    elif key not in now:
        yield f"{name}: in the checkpoint only"
    elif isinstance(was[key], dict) and isinstance(now[key], dict):
        for part in sorted(was[key].keys() | now[key].keys()):
            yield from _misfits(part, was[key], now[key], f"{name}.")
    elif isinstance(was[key], dict) or isinstance(now[key], dict):
        yield f"{name}: of another structure"
    elif np.shape(was[key]) != np.shape(now[key]):
        yield f"{name}: {list(np.shape(was[key]))} in the checkpoint, {list(np.shape(now[key]))} now"
