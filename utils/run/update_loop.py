"""The fused training loop: many updates a call, for the agents of several runs, stacked along a run axis."""

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Shaped, UInt32

from utils.data.batches import Arrays, assemble, gather, sample_starts
from utils.data.replay_buffer import ReplayBuffer
from utils.devices import Layout
from utils.random_streams import Stream
from utils.trees import pack, tree_slice, unpack

NOT_FINITE = "not_finite"  # entry of a call's infos, greater than 0 if a loss or parameter is NaN or infinite
UPDATES_PER_CALL = 100  # updates a call: signals, progress and logging wait at most this long
CAPPED_SHARE = 0.05  # of the couplings; where more do not converge, a run warns
HOST_BLOCK = 10  # updates whose batches are gathered at once when the data stay on the host
UPDATE = "update"  # the method of an agent that training calls


def _over_runs(function: Callable[..., Any], *stacked: Any) -> Any:
    """Maps `function` over the run axis of one device.

    On a CPU one run after the other: a batch axis makes its matrix products slower, and so each run gets, bit for bit,
    the numbers that it gets alone.
    """
    if len(jax.tree.leaves(stacked)[0]) == 1:
        return jax.tree.map(lambda leaf: leaf[None], function(*tree_slice(stacked, 0)))
    if jax.default_backend() == "cpu":
        return jax.lax.map(lambda inputs: function(*inputs), stacked)
    return jax.vmap(function)(*stacked)


def _repeat(number: Int[Array, ""], body: Callable[[Any, Any], Any], first: Any) -> Any:
    """Returns `jax.lax.fori_loop(0, number, body, first)`; on a GPU, small arrays of the carry are one in the loop."""
    if jax.default_backend() == "cpu":
        return jax.lax.fori_loop(0, number, body, first)
    # Each of the small arrays that an update changes would be a kernel of its own.
    packed = jax.lax.fori_loop(0, number, lambda i, own: pack(body(i, unpack(own, first))), pack(first))
    return unpack(packed, first)


def _updates(
    agent: Any,
    num_updates: Int[Array, ""],
    rows_at: Callable[[Any, Int[Array, ""]], Arrays],
    layout: Layout,
    method: str = UPDATE,
) -> tuple[Any, Arrays]:
    """Runs `num_updates` (traced, so one program serves any length) updates of one agent.

    Args:
        rows_at: (index of the update, the agent's step) → gathered windows [m, ...].
        layout: of the agents. method: of the agent, called with each batch.

    Returns:
        the agent, and its infos averaged over the updates, with NOT_FINITE among them.
    """

    def update(i: Int[Array, ""], agent: Any) -> tuple[Any, Arrays]:
        batch = assemble(layout.split(rows_at(i, agent.step)), agent.hyper["discount"], agent.config.window_rule)
        return getattr(agent, method)(batch)

    names = sorted(jax.eval_shape(update, 0, agent)[1])

    def body(i: Int[Array, ""], carry: tuple[Any, Any]) -> tuple[Any, Any]:
        agent, info = update(i, carry[0])
        return agent, carry[1] + jnp.stack([info[name] for name in names])

    agent, sums = _repeat(num_updates, body, (agent, jnp.zeros(len(names))))
    total = dict(zip(names, sums, strict=True))
    finite = jnp.stack([jnp.isfinite(value) for name, value in total.items() if name.endswith("loss")] or [True]).all()
    # Parameters that are not finite show in the next losses; reading all of them pays only after many updates.
    finite &= jax.lax.cond(num_updates >= UPDATES_PER_CALL, all_finite, lambda _: jnp.array(True), agent)
    return agent, jax.tree.map(lambda leaf: leaf / num_updates, total) | {NOT_FINITE: 1.0 - finite}


def _inexact(tree: Any) -> list[tuple[str, Any]]:
    """Returns path and array of every leaf of real numbers."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in leaves
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]


@jax.jit
def all_finite(tree: Any) -> Bool[Array, ""]:
    """True if all arrays of a tree are free of NaN and infinity."""
    return jnp.stack([jnp.isfinite(leaf).all() for _, leaf in _inexact(tree)] or [True]).all()


def not_finite(info: Arrays, agent: Any) -> str:
    """Returns the names of the losses, else of the first parameters, that are not finite; '' if there are none.

    Args:
        info: of one agent, on the host. agent: one agent.
    """
    losses = [name for name, value in info.items() if name.endswith("loss") and not np.isfinite(value)]
    return ", ".join(losses or [name for name, leaf in _inexact(agent) if not np.isfinite(leaf).all()][:1])


@partial(jax.jit, donate_argnums=0, static_argnums=(4, 5))
def _train_on_device(
    agents: Any,
    data: Arrays,
    keys: UInt32[Array, "L 2"],
    num_updates: Int[Array, ""],
    layout: Layout,
    method: str = UPDATE,
) -> Any:
    def own(shared: tuple[Arrays, Any], agents: Any, keys: UInt32[Array, "L 2"]) -> Any:
        data, num_updates = shared

        def one(agent: Any, key: UInt32[Array, "2"]) -> Any:
            def rows_at(_: Any, step: Int[Array, ""]) -> Arrays:
                positions = sample_starts(key, step, agent.config.batch_size, len(data["starts"]))
                return gather(data, data["starts"][positions], agent.config.horizon_length)

            return _updates(agent, num_updates, rows_at, layout, method)

        return _over_runs(one, agents, keys)

    return layout.over_runs(own, (data, num_updates), agents, keys)


@partial(jax.jit, donate_argnums=0, static_argnums=(6, 7))
def _train_online(
    agents: Any,
    data: Arrays,
    replay: Arrays,
    counts: Int[Array, " L"],
    keys: UInt32[Array, "L 2"],
    num_updates: Int[Array, ""],
    layout: Layout,
    balanced: bool,
) -> Any:
    own = partial(_own_online, layout, balanced)
    return layout.over_runs(own, (data, num_updates), agents, replay, counts, keys)


def _own_online(
    layout: Layout,
    balanced: bool,
    shared: tuple[Arrays, Any],
    agents: Any,
    replay: Arrays,
    counts: Int[Array, " L"],
    keys: UInt32[Array, "L 2"],
) -> Any:
    """Runs the online updates of one device's runs; `shared`: the dataset, and the number of updates."""
    data, num_updates = shared
    size, horizon, offline = agents.config.batch_size, agents.config.horizon_length, len(data["starts"])
    # All runs' rows in one array, so that a run reads its own in place.
    runs, length = replay["terminals"].shape
    experience = {name: leaf.reshape(runs * length, *leaf.shape[2:]) for name, leaf in replay.items()}

    def one(agent: Any, key: UInt32[Array, "2"], index: Int[Array, ""], count: Int[Array, ""]) -> Any:
        def rows_at(_: Any, step: Int[Array, ""]) -> Arrays:
            """The rows of a batch: half from each, or uniform over both together."""
            if balanced:
                positions = sample_starts(key, step, size // 2, offline)
                own_positions = sample_starts(key, step, size - size // 2, count, Stream.EXPERIENCE)
            else:
                own_positions = sample_starts(key, step, size, offline + count) - offline
                positions = jnp.minimum(own_positions + offline, offline - 1)
            own_starts = experience["starts"][index * length + jnp.maximum(own_positions, 0)]
            rows = gather(data, data["starts"][positions], horizon)
            own_rows = gather(experience, index * length + own_starts, horizon)
            if balanced:
                return jax.tree.map(lambda *parts: jnp.concatenate(parts), rows, own_rows)

            def choose(a: Shaped[Array, " m *s"], b: Shaped[Array, " m *s"]) -> Shaped[Array, " m *s"]:
                return jnp.where((own_positions < 0).reshape(-1, *[1] * (a.ndim - 1)), a, b)

            return jax.tree.map(choose, rows, own_rows)

        return _updates(agent, num_updates, rows_at, layout)

    return _over_runs(one, agents, keys, jnp.arange(runs), counts)


@partial(jax.jit, donate_argnums=0, static_argnums=(3, 4))
def _train_on_rows(agents: Any, rows: Arrays, num_updates: Int[Array, ""], layout: Layout, method: str = UPDATE) -> Any:
    """Runs updates on gathered rows [updates, runs, m, ...]."""
    by_run = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), rows)

    def own(num_updates: Any, agents: Any, by_run: Arrays) -> Any:
        def one(agent: Any, rows: Arrays) -> Any:
            return _updates(agent, num_updates, lambda i, _: tree_slice(rows, i), layout, method)

        return _over_runs(one, agents, by_run)

    return layout.over_runs(own, num_updates, agents, by_run)


@partial(jax.jit, static_argnums=2)
def _positions(
    keys: UInt32[Array, "L 2"], steps: Int[Array, " u"], batch_size: int, count: Int[Array, ""]
) -> Int[Array, "u L m"]:
    """Returns positions in `starts` for several updates of all runs."""
    of_runs = jax.vmap(sample_starts, (0, None, None, None))
    return jax.vmap(of_runs, (None, 0, None, None))(keys, steps, batch_size, count)


class UpdateLoop:
    """Updates stacked agents on a dataset on the device or, where it does not fit, on the host.

    Both give the same numbers: the rows of a batch are a function of (key, step), and the same code assembles it. From
    the host, batches are gathered while the device works on earlier ones.

    Args:
        keys: PRNG keys of batch sampling, one a run.
        placement: 'device', 'host', or 'auto': on the device if the data fill less than half of its free memory.
        layout: of the agents; by default all on JAX's default device.
    """

    def __init__(self, keys: UInt32[Array | np.ndarray, "L 2"], placement: str = "auto", layout: Layout | None = None):
        self.layout = layout or Layout(len(keys))
        self.keys, self.placement = self.layout.stacked(jnp.asarray(keys)), placement

    def with_keys(self, keys: UInt32[Array | np.ndarray, "L 2"]) -> "UpdateLoop":
        """Returns a loop over the same dataset that draws batches with other keys."""
        loop = copy.copy(self)
        loop.keys = loop.layout.stacked(jnp.asarray(keys))
        return loop

    def set_data(self, data: dict[str, np.ndarray]) -> None:
        """Sets the dataset: the arrays of `utils.data.batches.prepare`."""
        self.on_device = self.placement == "device" or (self.placement == "auto" and fits_on_device(data, self.layout))
        self.data = self.layout.shared(data) if self.on_device else data

    def compile(self, agents: Any) -> int:
        """Compiles the program of `run` for these agents, without an update.

        Returns:
            the bytes that it takes on each device beside its inputs; 0 if they are not known.
        """
        if self.on_device:
            program = _train_on_device.lower(agents, self.data, self.keys, 1, self.layout, UPDATE)
        else:
            program = _train_on_rows.lower(agents, self._rows(agents.config, 0), 1, self.layout, UPDATE)
        figure = program.compile().memory_analysis()
        if figure is None:
            return 0
        outputs = figure.output_size_in_bytes - figure.alias_size_in_bytes  # The donated agents are written in place.
        return figure.temp_size_in_bytes + outputs + figure.generated_code_size_in_bytes

    def place(self, agents: Any) -> Any:
        """Returns stacked agents on the devices that train them."""
        return self.layout.stacked(agents)

    def run(self, agents: Any, step: int, num_updates: int, method: str = UPDATE) -> tuple[Any, Arrays]:
        """Runs updates step … step + num_updates − 1. The agents handed in are donated: use the returned ones.

        Args:
            agents: stacked. step: of the first update. num_updates: how many.
            method: of the agent: 'update', or 'distill'.

        Returns:
            the agents, and their infos, each [runs], averaged over the updates.
        """
        if self.on_device:
            return _train_on_device(agents, self.data, self.keys, num_updates, self.layout, method)
        infos = []
        for first in range(step, step + num_updates, HOST_BLOCK):
            count = min(HOST_BLOCK, step + num_updates - first)
            agents, info = _train_on_rows(agents, self._rows(agents.config, first), count, self.layout, method)
            infos.append(jax.tree.map(lambda leaf, n=count: leaf * n / num_updates, info))
        return agents, jax.tree.map(lambda *leaves: sum(leaves), *infos)

    def run_online(self, agents: Any, replay: ReplayBuffer, num_updates: int, balanced: bool) -> tuple[Any, Arrays]:
        """Runs updates on the dataset and each run's experience; otherwise as `run`.

        Args:
            replay: the runs' experience; with `balanced`, each run has some.
            balanced: half of each batch from the dataset and half from the experience; else uniform over both.
        """
        arguments = self.data, replay.arrays, self.layout.stacked(jnp.asarray(replay.counts)), self.keys
        return _train_online(agents, *arguments, num_updates, self.layout, balanced)

    def _rows(self, config: Any, first: int) -> Arrays:
        """Gathers the rows of HOST_BLOCK updates from update `first` on, each [updates, runs, m, ...]."""
        steps = first + np.arange(HOST_BLOCK)
        positions = _positions(self.keys, steps, config.batch_size, len(self.data["starts"]))
        rows = gather(self.data, self.data["starts"][np.asarray(positions)], config.horizon_length)
        return self.layout.rows(rows)


def fits_on_device(data: dict[str, np.ndarray], layout: Layout) -> bool:
    """True if the arrays fill less than half of the device's free memory (a CPU's memory is the host's)."""
    stats = layout.first.memory_stats() or {}
    free = stats.get("bytes_limit", np.inf) - stats.get("bytes_in_use", 0)
    return sum(leaf.nbytes for leaf in data.values()) < free / 2


def capped_warning(info: Mapping[str, float]) -> str | None:
    """Returns a warning if too many solves stopped at their cap; `info`: averages of what an agent logs."""
    share = info.get("coupling/capped", 0.0)
    if share <= CAPPED_SHARE:
        return None
    error = info.get("coupling/marginal_error", float("nan"))
    return (
        f"{share:.0%} of the couplings stopped at their cap with the target marginal not met (mean error {error:.3g}), "
        "so the weights have less effect; raise --agent.max_iterations or --agent.epsilon, or lower --agent.alpha"
    )
