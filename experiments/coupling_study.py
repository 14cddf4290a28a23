"""Study of how coupling settings trade bias against straightness, on real data and without a critic.

    python -m experiments.coupling_study --env_name=scene-play-singletask-task1-v0 --output=docs/coupling.csv

Trains one flow for each setting of the coupling on windows of the dataset, with known weights exp(λ A) for a synthetic
advantage A(s, a), the standardised first component of the chunk. Then scores it on the validation episodes by the
energy score E‖X − a‖ − ½ E‖X − X'‖ under the same weights. The score is proper: the true tilted conditional
π(a|s) e^{λA} minimises it. An excess over the unbiased coupling at many steps is bias, a gain at few steps is
straightness. Existing rows of the table are kept: rerun the same command to resume, or add rows by --seed=1.
"""

import csv
import itertools
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import flags
from jaxtyping import Array, Float, Int, PRNGKeyArray

from envs.datasets import DEFAULT_DATASET_DIR, load_dataset
from envs.tasks import parse_task
from utils.arrays import Info, Scalar
from utils.coupling import couple, tilted_marginal, tilted_weights
from utils.data.batches import assemble, gather, prepare, sample_starts
from utils.errors import UserError
from utils.flow import euler, flow_matching_loss
from utils.networks import VectorField, output_of
from utils.output.loggers import ProgressBar
from utils.output.tables import cell, csv_text
from utils.random_streams import Stream, stream_key
from utils.system.cli import parse
from utils.system.entry_point import run_main
from utils.system.files import atomic_write_text

FLAGS = flags.FlagValues()
flags.DEFINE_string("env_name", "scene-play-singletask-task1-v0", "Task whose dataset is used.", flag_values=FLAGS)
flags.DEFINE_string("dataset_dir", DEFAULT_DATASET_DIR, "Directory of datasets.", flag_values=FLAGS)
flags.DEFINE_integer("horizon_length", 5, "Actions in a chunk.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("updates", 6_000, "Updates per setting.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_float("lam", 1.0, "Temperature λ of the tilt.", flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "Seed of network and training.", lower_bound=0, flag_values=FLAGS)
flags.DEFINE_string("output", "docs/coupling.csv", "Table to write or extend.", flag_values=FLAGS)

NFES = (1, 2, 3, 10, 50)
SETTINGS: list[dict[str, Any]] = [
    {"coupling": "independent"},
    *({"alpha": 0.3, "epsilon": e} for e in (0.5, 0.3, 0.2, 0.1, 0.02, 1.0)),
    *({"alpha": a, "epsilon": 0.5} for a in (0.0, 1.0, 3.0)),
    *({"alpha": a, "epsilon": 0.1} for a in (0.0, 1.0, 3.0)),
    *(
        {"alpha": a, "epsilon": 0.5, "source_conditions": v}
        for a, v in itertools.product((0.3, 1.0), ("systematic", "resampled", "weighted"))
    ),
]
DEFAULTS = {"coupling": "ot", "source_conditions": "iid", "alpha": 0.0, "epsilon": 0.1}


def train(setting: dict[str, Any], data: dict[str, Any], scale: Any, net: VectorField) -> tuple[Any, dict]:
    """Trains a flow with the coupling of `setting`, and returns its parameters and the mean diagnostics."""
    config = SimpleNamespace(**setting, max_iterations=100, threshold=1e-2)
    example = assemble(gather(data, data["starts"][:2], FLAGS.horizon_length), 1.0, "drop")
    inputs = (example["observations"], example["actions"], example["actions"][:, :1])
    params = net.init(stream_key(FLAGS.seed, Stream.INITIALISATION), *inputs)
    optimiser = optax.adam(1e-3)

    def loss_fn(params: Any, key: PRNGKeyArray) -> tuple[Scalar, Info]:
        rows, pair, time = jax.random.split(key, 3)
        start = data["starts"][sample_starts(rows, 0, 256, len(data["starts"]))]
        batch = assemble(gather(data, start, FLAGS.horizon_length), 1.0, "drop")
        tilt = tilted_weights(advantage(batch["actions"], scale), batch["valid"], FLAGS.lam, jnp.inf)
        conditions = (batch["observations"] - scale["mean"]) / scale["std"]
        noise, index, diagnostics = couple(pair, batch["actions"], conditions, tilt, config)
        velocity = partial(output_of, net, params, batch["observations"][index])
        return flow_matching_loss(velocity, time, noise, batch["actions"][index], jnp.ones(256)), diagnostics

    @jax.jit
    def segment(carry: Any, steps: Int[Array, " u"]) -> Any:
        def update(carry: Any, step: Int[Array, ""]) -> Any:
            params, state = carry
            key = stream_key(FLAGS.seed, Stream.UPDATE, step)
            (_, diagnostics), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, key)
            updates, state = optimiser.update(grads, state)
            return (optax.apply_updates(params, updates), state), diagnostics

        return jax.lax.scan(update, carry, steps)

    carry, bar = (params, optimiser.init(params)), ProgressBar(FLAGS.updates, description=str(setting))
    for first in range(0, FLAGS.updates, 500):
        carry, diagnostics = segment(carry, first + jnp.arange(min(500, FLAGS.updates - first)))
        bar.update(len(next(iter(diagnostics.values()))))
    bar.close()
    return carry[0], jax.tree.map(lambda x: float(x.mean()), diagnostics)


def advantage(actions: Float[Array, "m d"], scale: dict[str, Any]) -> Float[Array, " m"]:
    """Returns the synthetic advantage, the chunk's standardised first component."""
    return (actions[:, 0] - scale["action_mean"]) / scale["action_std"]


@partial(jax.jit, static_argnums=(0, 4))
def energy_score(net: VectorField, params: Any, batch: dict, weights: Float[Array, " m"], nfe: int) -> Scalar:
    """Returns the weighted mean of E‖X − a‖ − ½ E‖X − X'‖ over a batch, from 32 samples X per state."""
    observations = jnp.broadcast_to(batch["observations"], (32, *batch["observations"].shape))
    noise = jax.random.normal(stream_key(0, Stream.STUDY, 7), (32, *batch["actions"].shape))
    samples = euler(lambda x, t: output_of(net, params, observations, x, t), noise, nfe)
    to_data = jnp.linalg.norm(samples - batch["actions"], axis=-1).mean(0)
    between = jax.vmap(lambda x: jnp.linalg.norm(samples - x, axis=-1).sum(0))(samples).sum(0) / (32 * 31)
    return jnp.sum(weights * (to_data - between / 2))


def main(argv: Sequence[str]) -> None:
    """Trains and scores every setting, and writes the table."""
    parse(argv, FLAGS)
    horizon = FLAGS.horizon_length
    raw, raw_val, info = load_dataset(parse_task(FLAGS.env_name), dataset_dir=FLAGS.dataset_dir)
    if raw_val is None:
        raise UserError(f"{FLAGS.env_name} has no validation set in {FLAGS.dataset_dir}; collect or download it first")
    data, val = jax.device_put(prepare(raw, False)), prepare(raw_val, False)
    first = raw["actions"][:, 0]
    scale = {"mean": raw["observations"].mean(0), "std": raw["observations"].std(0) + 1e-6}
    scale |= {"action_mean": first.mean(), "action_std": first.std()}
    held_out = assemble(gather(val, val["starts"][::20], horizon), 1.0, "drop")
    weights = tilted_marginal(advantage(held_out["actions"], scale), held_out["valid"], FLAGS.lam, jnp.inf)
    net = VectorField((128, 128, 128), held_out["actions"].shape[1])
    path = Path(FLAGS.output)
    rows: list[dict[str, str]] = (
        list(csv.DictReader(path.read_text(encoding="utf-8").splitlines())) if path.exists() else []
    )
    print(f"{info}; scored on {len(weights)} held-out windows")
    for own in SETTINGS:
        setting = {"seed": FLAGS.seed} | DEFAULTS | own
        if any(all(row[k] == cell(v) for k, v in setting.items()) for row in rows):
            continue
        params, diagnostics = train(setting, data, scale, net)
        scores = {f"nfe_{n}": float(energy_score(net, params, held_out, weights, n)) for n in NFES}
        rows.append({k: cell(v) for k, v in (setting | scores | diagnostics).items()})
        print(rows[-1], flush=True)
        longest: dict[str, str] = max(rows, key=len)
        columns = list(longest)
        atomic_write_text(path, csv_text([columns, *([row.get(name, "") for name in columns] for row in rows)]))


if __name__ == "__main__":
    run_main(main)
