"""Agent files: their import, and checks before any training, so that a fault names its file and line."""

import difflib
import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import ml_collections

from agents import AGENTS
from utils.errors import UserError, failure, place, traceback_note
from utils.system.files import ROOT, find_modules_in

NEEDED = ("batch_size", "discount", "horizon_length", "window_rule")  # settings that training itself uses
METHODS = ("create", "update", "sample_actions")


_versions: dict[str, tuple[str, int, int]] = {}  # name of a module → its file as it was imported


def import_file(file: Path, name: str, what: str) -> ModuleType:
    """Imports a Python file as the module `name`; the project's own under their names.

    A file that has not changed since is not imported again, so that what was compiled for its classes is used again.

    Raises:
        UserError: `what` does not import.
    """
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise UserError(f"{what} does not import: its name must end in .py")
    try:
        if name.startswith("agents."):
            return importlib.import_module(name)
        find_modules_in(file.resolve().parent)
        status = file.stat()
        version = (str(file.resolve()), status.st_mtime_ns, status.st_size)
        if _versions.get(name) == version and name in sys.modules:
            return sys.modules[name]
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        _versions[name] = version
    except (Exception, SystemExit) as error:  # Whatever a user's file may raise.
        where = "" if isinstance(error, SyntaxError) else f" ({place(error)})"
        reason = " ".join(f"{type(error).__name__}: {error}{where}".split())
        raise UserError(f"{what} does not import: {reason}{traceback_note(error)}") from error
    return module


def check_module(module: ModuleType, path: str) -> None:
    """Checks that an agent file defines `Agent`, `get_config()` and `PRESETS`.

    Raises:
        UserError: names what is missing or of another type.
    """
    missing = [name for name in ("Agent", "get_config", "PRESETS") if not hasattr(module, name)]
    if missing:
        raise UserError(f"agent file {path} does not define {', '.join(missing)}; see agents/bc.py for what is needed")
    lacking = [name for name in METHODS if not callable(getattr(module.Agent, name, None))]
    if lacking or not isinstance(module.Agent, type):
        raise UserError(f"Agent in agent file {path} is no class with {', '.join(METHODS)}; see agents/base.py")
    what, expected = f"get_config() of agent file {path}", "it has to return an ml_collections.ConfigDict"
    try:
        config = module.get_config()
    except Exception as error:
        raise failure(error, what, expected, module.get_config) from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise failure(TypeError(f"it returned a {type(config).__name__}"), what, expected, module.get_config)
    if absent := [name for name in NEEDED if name not in config]:
        raise UserError(f"{what} lacks the setting '{absent[0]}'; begin with agents.base.get_config()")
    tables = {"PRESETS": module.PRESETS, "CPU": getattr(module, "CPU", {})}
    if isinstance(module.PRESETS, Mapping):
        tables |= {f"PRESETS['{domain}']": settings for domain, settings in module.PRESETS.items()}
    for name, table in tables.items():
        if not isinstance(table, Mapping):
            kind = "domain → settings" if name == "PRESETS" else "setting → value"
            raise UserError(f"{name} in agent file {path} is a {type(table).__name__}; it must be a dict, {kind}")


def check_agent(module: ModuleType, config: Any, example: dict[str, Any], path: str) -> None:
    """Checks what the methods of a user's agent take and return, by tracing them; skips the project's own.

    Args:
        module: from `load_agent`. config: of the agent. example: a batch, as `Agent.create` gets it.
        path: the agent file, for the message.

    Raises:
        UserError: a method raises, or returns something else than training and evaluation need.
    """
    if module.__name__.startswith("agents."):
        return
    batch = {name: jax.tree.map(lambda x: _shape(2, *x.shape[1:], like=x), value) for name, value in example.items()}
    batch["next_observations"] = batch["observations"]
    one = jax.tree.map(lambda x: _shape(*x.shape[1:], like=x), batch["observations"])
    key, kind, told = jax.random.PRNGKey(0), module.Agent, functools.partial(_traced, path)
    agent = told(kind.create, "a new Agent", _is_agent, functools.partial(kind.create, config=config), key, example)
    if hasattr(kind, "loss"):
        asked = "a scalar and a dict of scalars"
        told(kind.loss, asked, _is_loss, lambda a, *rest: a.loss(a.params, *rest), agent, batch, key)
    asked = "the agent, its arrays of the same names, shapes and types, and a dict of scalars"
    told(kind.update, asked, lambda result: _is_update(result, agent), kind.update, agent, batch)
    width = agent.config.action_dim
    asked = f"actions [{width}] for one observation"
    told(kind.sample_actions, asked, lambda x: _is_array(x, (width,)), kind.sample_actions, agent, one, key)


def _shape(*shape: int, like: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, like.dtype)


def _traced(
    path: str,
    method: Callable[..., Any],
    asked: str,
    fits: Callable[[Any], bool],
    function: Callable[..., Any],
    *inputs: Any,
) -> Any:
    """Traces a call of a method of a user's agent; returns the shapes of its result if they fit."""
    what, expected = f"{method.__name__}() of agent file {path}", f"it has to return {asked}"
    try:
        result = jax.eval_shape(function, *inputs)
    except UserError:
        raise
    except Exception as error:
        raise failure(error, what, expected, method) from error
    if not fits(result):
        raise failure(TypeError(f"it returned {_shown(result)}"), what, expected, method)
    return result


def _is_agent(result: Any) -> bool:
    names = ("params", "targets", "opt_state", "key", "step", "hyper", "config")
    return all(hasattr(result, name) for name in names)


def _is_array(result: Any, shape: tuple[int, ...]) -> bool:
    return getattr(result, "shape", None) == shape


def _is_loss(result: Any) -> bool:
    return isinstance(result, tuple) and len(result) == 2 and _is_array(result[0], ()) and _is_info(result[1])


def _is_info(info: Any) -> bool:
    return isinstance(info, dict) and all(_is_array(value, ()) for value in info.values())


def _is_update(result: Any, agent: Any) -> bool:
    return isinstance(result, tuple) and len(result) == 2 and _same(result[0], agent) and _is_info(result[1])


def _same(tree: Any, other: Any) -> bool:
    """True if two trees have one structure, and their leaves one shape and type."""
    kinds = lambda x: [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(x)]  # noqa: E731
    structures: list[Any] = [jax.tree.structure(x) for x in (tree, other)]
    return structures[0] == structures[1] and kinds(tree) == kinds(other)


def _shown(result: Any) -> str:
    """Formats a result, its arrays as shapes."""
    if isinstance(result, tuple):
        return f"({', '.join(map(_shown, result))})"
    if isinstance(result, dict):
        return f"{{{', '.join(f'{key!r}: {_shown(value)}' for key, value in list(result.items())[:5])}}}"
    return str(list(result.shape)) if hasattr(result, "shape") else type(result).__name__


def load_agent(path: str) -> ModuleType:
    """Imports an agent file, inside or outside agents/.

    The file defines `Agent`, `get_config()` and `PRESETS` (domain → settings); `CPU` (settings of --preset=cpu) may be
    left out.

    Raises:
        UserError: there is no such file, it does not import, or it lacks one of these.
    """
    file = Path(path).expanduser()
    file = file if file.exists() else ROOT / path
    if not file.is_file():
        raise UserError(f"there is no agent file {path}{_similar(Path(path))}")
    own = file.resolve().parent == ROOT / "agents"
    module = import_file(file, f"{'agents.' if own else 'agent_'}{file.stem}", f"agent file {path}")
    check_module(module, path)
    return module


def _similar(path: Path) -> str:
    """Returns a suggestion of agent files for a path that does not exist."""
    names = [f"agents/{name}.py" for name in AGENTS]
    near = {Path(name).stem: name for name in [*map(str, path.parent.glob("*.py")), *names]}
    if found := difflib.get_close_matches(path.stem, near, n=1):
        return f"; did you mean {near[found[0]]}?"
    return f"; use one of {', '.join(names)}, or the path of your own"


def agent_module(module: ModuleType) -> str:
    """Returns the name that identifies an agent's module: the project's own by module name, others by file."""
    if module.__name__.startswith("agents."):
        return module.__name__
    assert module.__file__ is not None  # `load_agent` imports files alone.
    return os.path.realpath(module.__file__)
