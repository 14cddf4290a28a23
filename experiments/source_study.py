"""Study of where a flow should start, on a problem whose answer is known.

    python -m experiments.source_study --output=exp/source_study

Actions a given a state s follow a mixture of three narrow normals whose centres and shares depend on s, every state is
in the data once, and the target is p(a|s) min(e^{A(a)}, 10) for a known advantage A. OTQL's own flow loss trains on it,
with A in place of the critic's; what differs between the arms is the coupling, the source and the targets. At held-out
states, by the number of Euler steps:

    distance   energy distance to the target over the target's own mean distance; 0 is perfect
    bias       root mean square error of the mean over the target's deviation
    reach      slope of the samples' mean over the target's, as both change from state to state; 1 is right
    spread     deviation over the target's
    tilt       gain of mean A over the data's, relative to the target's gain; 1 is right

and for the pairs that each arm trains on:

    skew       R² of the start on the state, relative to the source that acting starts from: of (x_0 − m(s)) / σ(s); it
               is 0 where training and acting start alike

Written to --output: source_study.csv, one row for each arm, number of steps and seed, and source_study.png.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import ml_collections
import numpy as np
from absl import flags
from jaxtyping import Array, Float, PRNGKeyArray
from matplotlib.figure import Figure

from agents import otql
from utils.arrays import Info, Scalar
from utils.coupling import couple, tilted_weights
from utils.data import batches
from utils.output.loggers import ProgressBar
from utils.output.plotting import STYLE, to_png
from utils.output.tables import cell, csv_text, markdown_table
from utils.random_streams import Stream, stream_key
from utils.run.update_loop import UpdateLoop
from utils.system.cli import parse
from utils.system.entry_point import run_main
from utils.system.files import atomic_write_bytes, atomic_write_text
from utils.trees import tree_slice, tree_stack

FLAGS = flags.FlagValues()
flags.DEFINE_integer("updates", 5_000, "Updates of each arm.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer(
    "num_seeds", 2, "Seeds of networks and pairs; the problem stays.", lower_bound=1, flag_values=FLAGS
)
flags.DEFINE_string("output", "exp/source_study", "Directory of table and figure.", flag_values=FLAGS)

STATE_DIM, ACTION_DIM, MODES, SIGMA, W_MAX = 4, 5, 3, 0.1, 10.0
ROWS, HELD_OUT, SAMPLES, PROPOSALS = 100_000, 256, 128, 4096
NFES = (1, 2, 3, 10)
INDEPENDENT = {"coupling": "independent"}
# Arm → its settings.
ARMS: dict[str, dict[str, Any]] = {
    "independent": INDEPENDENT,
    "plan, ε 0.5": {"epsilon": 0.5},
    "plan, ε 0.1": {"epsilon": 0.1},
    "plan, ε 0.1, source of noise": {"epsilon": 0.1, "source": "noise"},
    "source of actions": INDEPENDENT | {"source": "action"},
    "source of actions, plan, ε 0.1": {"epsilon": 0.1, "source": "action"},
    "shortcut": INDEPENDENT | {"targets": "shortcut"},
    "source of actions, shortcut": INDEPENDENT | {"source": "action", "targets": "shortcut"},
}
METRICS = ("distance", "bias", "reach", "spread", "tilt")
COLUMNS = ("arm", "seed", "nfe", *METRICS, "skew")


class Problem:
    """A mixture of normals, of known tilt.

    Attributes:
        direction: A(a) = a · direction, [d].
    """

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.direction: np.ndarray = rng.normal(size=ACTION_DIM)
        widths = (STATE_DIM, 32, MODES * (ACTION_DIM + 1))
        self._layers = [rng.normal(size=(n, m)) / np.sqrt(n) for n, m in itertools.pairwise(widths)]
        states = self.states(4096, seed)
        self.direction /= np.std(self.samples(states, 1, seed)[:, 0] @ self.direction)

    def states(self, count: int, seed: int) -> np.ndarray:
        """Returns states, [n, 4]."""
        return np.random.default_rng([seed, 1]).normal(size=(count, STATE_DIM))

    def samples(self, states: np.ndarray, count: int, seed: int) -> np.ndarray:
        """Returns actions of the data at each state, [n, count, d] in [−1, 1]."""
        rng = np.random.default_rng([seed, 2])
        outputs = np.tanh(2 * states @ self._layers[0]) @ self._layers[1]
        centres = 0.8 * np.tanh(1.5 * outputs[:, : MODES * ACTION_DIM].reshape(-1, MODES, ACTION_DIM))
        logits = 2 * outputs[:, None, MODES * ACTION_DIM :]
        mode = np.argmax(logits + rng.gumbel(size=(len(states), count, MODES)), axis=-1)  # Shares softmax(logits).
        actions = np.take_along_axis(centres, mode[..., None], axis=1)
        return np.clip(actions + SIGMA * rng.normal(size=actions.shape), -1, 1)

    def tilted(self, states: np.ndarray, count: int, seed: int) -> np.ndarray:
        """Returns samples of the target at each state, [n, count, d], chosen by weight among PROPOSALS of the data."""
        rng, chosen = np.random.default_rng([seed, 3]), []
        for i, state in enumerate(states):
            proposals = self.samples(state[None], PROPOSALS, seed + 7919 * i)[0]
            weights = np.minimum(np.exp(proposals @ self.direction), W_MAX)
            chosen.append(proposals[rng.choice(PROPOSALS, count, p=weights / weights.sum())])
        return np.stack(chosen)

    def dataset(self, seed: int) -> dict[str, np.ndarray]:
        """Returns the prepared dataset: two rows for each action, the state and the end; the reward is A."""
        states = self.states(ROWS, seed)
        actions = self.samples(states, 1, seed)[:, 0]
        rows = {"observations": states, "actions": actions, "rewards": actions @ self.direction}
        rows = {k: np.repeat(v, 2, axis=0).astype(np.float32) for k, v in rows.items()}
        ends = np.tile([0.0, 1.0], ROWS).astype(np.float32)
        return batches.prepare(rows | {"masks": np.zeros_like(ends), "terminals": ends}, True)


class KnownAdvantage(otql.Agent):
    """OTQL whose advantage is the batch's reward, so that the flow's target is exact; it has no critic."""

    @classmethod
    def networks(cls, config: Any, action_dim: int) -> dict[str, Any]:
        """Returns name → module of every network."""
        return cls.flow_networks(config, action_dim)

    def td_loss(
        self, params: dict[str, Any], batch: batches.Batch, next_value: Float[Array, " m"]
    ) -> tuple[Scalar, Float[Array, "1 m"], Info]:
        """Returns no loss, and A as the value of the batch's actions."""
        return jnp.zeros(()), batch["rewards"][None], {}

    def values(
        self, batch: batches.Batch, next_key: PRNGKeyArray, key: PRNGKeyArray
    ) -> tuple[Float[Array, " m"], Float[Array, " m"]]:
        """Returns the value 0 of every state: A is an advantage already."""
        return jnp.zeros_like(batch["rewards"]), jnp.zeros_like(batch["rewards"])


def train(
    settings: dict[str, Any], data: dict[str, Any], num_seeds: int, updates: int, description: str = "training"
) -> list[Any]:
    """Returns one trained agent for each seed."""
    config: ml_collections.ConfigDict = otql.get_config()
    config.update({"actor_hidden_dims": (128, 128, 128), "lr": 1e-3, "flow_tau": 0.005, "w_max": W_MAX, "lam": 1.0})
    config.update(settings)
    example = batches.example_batch(data, 1)
    keys = [stream_key(seed, Stream.STUDY, 0) for seed in range(num_seeds)]
    agents = tree_stack([KnownAdvantage.create(key, example, config) for key in keys])
    loop = UpdateLoop(jnp.stack([stream_key(seed, Stream.TRAINING) for seed in range(num_seeds)]))
    loop.set_data(data)
    with ProgressBar(updates, description=description) as bar:
        for step in range(0, updates, 500):
            count = min(500, updates - step)
            agents, info = loop.run(agents, step, count)
            bar.update(count, {"flow/loss": float(info["flow/loss"][0])})
    return [tree_slice(agents, i) for i in range(num_seeds)]


@jax.jit
def act(agent: Any, states: Float[Array, "k n o"], key: PRNGKeyArray) -> Float[Array, "k n d"]:
    """Returns actions of the policy, without best-of-N."""
    return agent.propose(states, key)


def mean_distance(x: np.ndarray, y: np.ndarray | None = None) -> np.ndarray:
    """Returns the mean of ‖x_i − y_j‖ at each state, [n]; of ‖x_i − x_j‖ with i ≠ j if there is no y."""
    other = x if y is None else y
    total = np.array([np.linalg.norm(a[:, None] - b[None], axis=-1).sum() for a, b in zip(x, other, strict=True)])
    return total / (x.shape[1] * (other.shape[1] - (y is None)))


def measure(samples: np.ndarray, target: np.ndarray, untilted: np.ndarray, direction: np.ndarray) -> dict[str, float]:
    """Returns METRICS of samples against the target's and the data's, all [n, k, d]."""
    own = mean_distance(target)
    distance = (2 * mean_distance(samples, target) - mean_distance(samples) - own) / own
    means, wanted = samples.mean(axis=1), target.mean(axis=1)
    deviation = np.sqrt(np.mean(target.var(axis=1)))
    centred = wanted - wanted.mean(axis=0)
    return {
        "distance": float(distance.mean()),
        "bias": float(np.sqrt(np.mean((means - wanted) ** 2)) / deviation),
        "reach": float(np.sum((means - means.mean(axis=0)) * centred) / np.sum(centred**2)),
        "spread": float(np.sqrt(np.mean(samples.var(axis=1))) / deviation),
        "tilt": float(((samples - untilted) @ direction).mean() / ((target - untilted) @ direction).mean()),
    }


def training_noise(agent: Any, data: dict[str, Any], rounds: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns where the flow starts in training, relative to where the policy starts, and the states."""
    config, noises, states = agent.cfg, [], []
    rng = np.random.default_rng(seed)

    @jax.jit
    def draw(key: PRNGKeyArray, observations: Any, actions: Any, rewards: Any) -> tuple[Array, Array]:
        weights = tilted_weights(rewards, jnp.ones(len(rewards)), config.lam, config.w_max)
        mean, deviation = agent.source(observations)
        if config.source == "action":  # Noise is drawn relative to the source.
            noise, index, _ = couple(key, (actions - mean) / deviation, agent.conditions(observations), weights, config)
            return noise, observations[index]
        noise, index, _ = couple(key, actions, agent.conditions(observations), weights, config)
        return (noise - mean[index]) / deviation[index], observations[index]

    for i in range(rounds):
        rows = 2 * rng.integers(ROWS, size=agent.config.batch_size)
        parts = (jnp.asarray(data[name][rows]) for name in ("observations", "actions", "rewards"))
        noise, observed = draw(stream_key(seed, Stream.STUDY, 1, i), *parts)
        noises.append(np.asarray(noise))
        states.append(np.asarray(observed))
    return np.concatenate(noises), np.concatenate(states)


def explained(noise: np.ndarray, states: np.ndarray) -> float:
    """Returns R² of noise on states: ridge regression on random Fourier features, scored on the other half."""
    rng = np.random.default_rng(0)
    phases = states @ rng.normal(scale=0.7, size=(states.shape[1], 200)) + rng.uniform(0, 2 * np.pi, 200)
    features = np.concatenate([np.ones((len(states), 1)), states, np.cos(phases)], axis=1)
    half = len(states) // 2
    gram = features[:half].T @ features[:half] + 10.0 * np.eye(features.shape[1])
    fitted = features[half:] @ np.linalg.solve(gram, features[:half].T @ noise[:half])
    return float(1 - np.mean((noise[half:] - fitted) ** 2) / np.mean((noise[half:] - noise[half:].mean(axis=0)) ** 2))


def evaluate(agent: Any, nfe: int, states: np.ndarray, *against: np.ndarray) -> dict[str, float]:
    """Returns METRICS of an agent's actions after `nfe` Euler steps, `against` the other arguments of `measure`."""
    config = ml_collections.FrozenConfigDict({**agent.config, "flow_steps": nfe})
    repeated = jnp.broadcast_to(jnp.asarray(states, jnp.float32), (SAMPLES, *states.shape))
    actions = act(agent.replace(config=config), repeated, stream_key(0, Stream.STUDY, 2, nfe))
    return measure(np.asarray(actions, np.float64).swapaxes(0, 1), *against)


def draw_figure(rows: list[dict[str, Any]]) -> Figure:
    """Draws the distance over the number of Euler steps, a line for each arm."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.subplots()
        for arm in dict.fromkeys(row["arm"] for row in rows):
            values = {nfe: [r["distance"] for r in rows if (r["arm"], r["nfe"]) == (arm, nfe)] for nfe in NFES}
            means = [float(np.mean(own)) for own in values.values()]
            (line,) = axes.plot(range(len(NFES)), means, marker="o", linestyle="-" if "source" in arm else "--")
            axes.annotate(arm, (len(NFES) - 1, means[-1]), (8, 0), textcoords="offset points", color=line.get_color())
        axes.set(xticks=range(len(NFES)), xticklabels=NFES, yscale="log", xlabel="Euler steps")
        axes.set(ylabel="distance to the target", xlim=(-0.2, len(NFES) + 0.9))
    return figure


def main(argv: Sequence[str]) -> None:
    """Trains every arm, and writes table and figure."""
    parse(argv, FLAGS)
    problem, output = Problem(), Path(FLAGS.output)
    data, states = problem.dataset(0), problem.states(HELD_OUT, 1)
    against = problem.tilted(states, SAMPLES, 1), problem.samples(states, SAMPLES, 2), problem.direction
    rows: list[dict[str, Any]] = []
    for arm, settings in ARMS.items():
        for seed, agent in enumerate(train(settings, data, FLAGS.num_seeds, FLAGS.updates, arm)):
            skew = explained(*training_noise(agent, data, 100, seed))
            for nfe in NFES:
                found = evaluate(agent, nfe, states, *against)
                rows.append({"arm": arm, "seed": seed, "nfe": nfe} | found | {"skew": skew})
    table = [[cell(row[name]) for name in COLUMNS] for row in rows]
    atomic_write_text(output / "source_study.csv", csv_text([COLUMNS, *table]))
    atomic_write_bytes(output / "source_study.png", to_png(draw_figure(rows)))
    print(markdown_table(COLUMNS, table))
    print(f"table and figure: {output / 'source_study.csv'}, {output / 'source_study.png'}")


if __name__ == "__main__":
    run_main(main)
