"""Command line of the toy study: Fig. 1 of the paper, and the effect of α and ε.

    python -m experiments.toy --output=exp/toy

Flows from eight Gaussians to conditional two moons a ~ π(a|c), tilted by an energy E that is 1 inside four circles and
0 outside, or the reverse: the target is π(a|c) e^{−λE}. wCOT-CFM (§3.1, by this project's coupling) against
energy-weighted flow matching (EWFM), which puts the same weights on independent pairs. Conditions are of two kinds:

    moon      c names one of the two moons: half of the data share a condition, as in Fig. 1
    rotation  c is the angle in [−45°, 45°] by which both moons are turned: no two samples share one, as with states

Written to --output:

    figure1.png  samples and paths of both methods with 100 and 2 Euler steps, condition `moon`
    nfe.png      wanted share, distance to the true tilted distribution, straightness over the number of Euler steps
    sweep.png    bias and straightness over α and ε, for both kinds of condition
    runs.csv     all metrics of every seed; means.csv: mean and 95 % t-interval over seeds

wanted_share is the share of samples of energy 0; distance the sliced 2-Wasserstein distance to true samples, averaged
over the two halves of the conditions; straightness the mean path length over the mean displacement, 1 if straight; gap
the root mean square distance to the 100-step sample from the same noise. The components of source, target and c have
about unit variance, like noise, actions and standardised states, so that α and ε mean the same as in an agent.

Finished trainings are kept in --output/trained: rerun the same command to resume, or add seeds by --num_seeds.
"""

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from jaxtyping import Array, Float, Int, PRNGKeyArray
from ott.tools.sliced import sliced_wasserstein

from experiments.toy import figures
from experiments.toy.figures import DIAGNOSTICS, METRICS, NFES, Job, Result
from utils.arrays import Info, Number, Scalar
from utils.coupling import sample_conditional, solve_plan, tilted_marginal
from utils.errors import UserError
from utils.flow import flow_matching_loss
from utils.networks import VectorField, output_of
from utils.output.loggers import ProgressBar
from utils.random_streams import Stream, stream_key
from utils.system.cli import parse
from utils.system.entry_point import run_main
from utils.system.files import atomic_write_bytes
from utils.system.signals import PreemptionGuard

FLAGS = flags.FlagValues()
flags.DEFINE_string("output", "exp/toy", "Directory of figures, tables and finished trainings.", flag_values=FLAGS)
flags.DEFINE_enum("pages", "all", ["all", "figure", "sweep"], "Figures to make.", flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "First seed.", lower_bound=0, flag_values=FLAGS)
flags.DEFINE_integer("num_seeds", 3, "Number of seeds of every setting.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("updates", 6_000, "Updates per flow of figure1.png.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("sweep_updates", 2_000, "Updates per flow of sweep.png.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("batch_size", 128, "Pairs per batch, m.", lower_bound=2, flag_values=FLAGS)
flags.DEFINE_float("lam", 5.0, "Temperature λ of the tilt.", lower_bound=0.0, flag_values=FLAGS)
flags.DEFINE_float("alpha", 3.0, "α of figure1.png and nfe.png.", lower_bound=0.0, flag_values=FLAGS)
flags.DEFINE_float("epsilon", 0.05, "ε of figure1.png and nfe.png.", lower_bound=1e-4, flag_values=FLAGS)
flags.DEFINE_list("alphas", "0,1,3,10", "α of sweep.png.", flag_values=FLAGS)
flags.DEFINE_list("epsilons", "0.05,0.5", "ε of sweep.png.", flag_values=FLAGS)
flags.DEFINE_integer("jobs", os.cpu_count(), "Trainings at a time.", lower_bound=1, flag_values=FLAGS)

CENTRES = 0.85 * np.array([[0.207, 0.457], [-1.207, 0.457], [-0.207, -0.457], [1.207, -0.457]], np.float32)
RADIUS = 0.36
NET = VectorField((128, 128, 128, 128), 2)
MAX_ITERATIONS, THRESHOLD = 50, 1e-2  # Sinkhorn
SAMPLES, DRAWN, SEGMENT = 4096, 1000, 200


class Problem(NamedTuple):
    """The target π(a|c) e^{−λE(a,c)}, as numbers that share one compiled program.

    Attributes:
        rotated: 1 if c is an angle, 0 if it names the moon.
        inside: 1 if E is 1 inside the circles, 0 if outside.
        lam: λ.
    """

    rotated: float | Scalar
    inside: float | Scalar
    lam: float | Scalar


def eight_gaussians(key: PRNGKeyArray, which: Int[Array, "*b"]) -> Float[Array, "*b 2"]:
    """Samples the source, eight narrow Gaussians on a ring with unit variance; `which` selects the Gaussians."""
    ring = jnp.stack([jnp.cos(which * jnp.pi / 4), jnp.sin(which * jnp.pi / 4)], axis=-1)
    return jnp.sqrt(2.0) * ring + 0.09 * jax.random.normal(key, ring.shape)


def two_moons(key: PRNGKeyArray, arc: Float[Array, " n"], moon: Float[Array, " n"]) -> Float[Array, "n 2"]:
    """Samples the two moons around the origin, at positions `arc` in [0, 1] of the moons ±1."""
    # The lower moon is the upper one turned by 180°.
    upper = jnp.stack([jnp.cos(jnp.pi * arc) - 0.5, jnp.sin(jnp.pi * arc) - 0.25], axis=-1)
    return 0.85 * (moon[:, None] * upper + 0.07 * jax.random.normal(key, upper.shape))


def turn(points: Float[Array, "*b 2"], angle: Float[Array, "*#b"]) -> Float[Array, "*b 2"]:
    """Rotates points by angles."""
    cos, sin, (x, y) = jnp.cos(angle), jnp.sin(angle), jnp.moveaxis(points, -1, 0)
    return jnp.stack([cos * x - sin * y, sin * x + cos * y], axis=-1)


def angles(conditions: Float[Array, "*b 1"], problem: Problem) -> Float[Array, "*b"]:
    """Returns the angles of the moons at conditions c, which have unit variance."""
    return problem.rotated * conditions[..., 0] * jnp.pi / (2 * jnp.sqrt(12.0))


def sample_data(
    key: PRNGKeyArray, size: int, problem: Problem
) -> tuple[Float[Array, "{size} 2"], Float[Array, "{size} 1"]]:
    """Samples conditions c and actions a ~ π(a|c); returns (actions, conditions)."""
    point_key, arc_key, moon_key, angle_key = jax.random.split(key, 4)
    moon = 2.0 * jax.random.bernoulli(moon_key, 0.5, (size,)) - 1
    points = two_moons(point_key, jax.random.uniform(arc_key, (size,)), moon)
    uniform = jax.random.uniform(angle_key, (size,), minval=-(3**0.5), maxval=3**0.5)
    conditions = jnp.where(problem.rotated > 0, uniform, moon)[:, None]
    return turn(points, angles(conditions, problem)), conditions


def energy(points: Float[Array, "*b 2"], problem: Problem) -> Float[Array, "*b"]:
    """Returns the energy E in {0, 1} of points that are not turned, or turned back."""
    distances = jnp.linalg.norm(points[..., None, :] - CENTRES, axis=-1)
    within = (distances < RADIUS).any(axis=-1)
    return jnp.where(problem.inside > 0, within, ~within).astype(jnp.float32)


def draw_pairs(
    key: PRNGKeyArray, problem: Problem, method: str, size: int, alpha: Number, epsilon: Number
) -> tuple[dict[str, Float[Array, "m ..."]], Info]:
    """Draws a batch of training pairs (z, a, c) with weights, and returns it with the coupling's diagnostics.

    wCOT: weight 1 on pairs drawn from the plan to the tilted marginal (paper Eqs. 2-5, source conditions i.i.d.);
    EWFM: weight m · p_j on independent pairs.
    """
    which_key, noise_key, data_key, source_key, pair_key = jax.random.split(key, 5)
    noise = eight_gaussians(noise_key, jax.random.randint(which_key, (size,), 0, 8))
    actions, conditions = sample_data(data_key, size, problem)
    advantages = -energy(turn(actions, -angles(conditions, problem)), problem)
    probs = tilted_marginal(advantages, jnp.ones(size), problem.lam, jnp.inf)
    if method == "ewfm":
        return {"noise": noise, "actions": actions, "conditions": conditions, "weights": size * probs}, {}
    source = jax.random.choice(source_key, size, (size,), p=probs)
    plan, diagnostics = solve_plan(
        noise,
        conditions[source],
        actions,
        conditions,
        probs,
        alpha=alpha,
        epsilon=epsilon,
        max_iterations=MAX_ITERATIONS,
        threshold=THRESHOLD,
    )
    index = sample_conditional(pair_key, plan)
    diagnostics["condition_match"] = jnp.mean(conditions[source] == conditions[index])
    pairs = {"noise": noise, "actions": actions[index], "conditions": conditions[index], "weights": jnp.ones(size)}
    return pairs, diagnostics


@partial(jax.jit, static_argnames=("method", "size"), donate_argnums=0)
def train_segment(
    carry: Any,
    key: PRNGKeyArray,
    problem: Problem,
    alpha: Scalar,
    epsilon: Scalar,
    first: Int[Array, ""],
    last: Int[Array, ""],
    total: Int[Array, ""],
    *,
    method: str,
    size: int,
) -> Any:
    """Does updates first … last − 1 of `total`: Adam on the flow-matching loss (Eq. 1) with cosine decay to 0.

    Args:
        carry: parameters, state of Adam, and sums of the diagnostics.
    """

    def update(step: Int[Array, ""], carry: Any) -> Any:
        params, state, sums = carry
        pair_key, time_key = jax.random.split(jax.random.fold_in(key, step))
        pairs, diagnostics = draw_pairs(pair_key, problem, method, size, alpha, epsilon)

        def loss(params: Any) -> Scalar:
            velocity = partial(output_of, NET, params, pairs["conditions"])
            return flow_matching_loss(velocity, time_key, pairs["noise"], pairs["actions"], pairs["weights"])

        directions, state = optax.scale_by_adam().update(jax.grad(loss)(params), state)
        rate = 3e-3 * 0.5 * (1 + jnp.cos(jnp.pi * step / total))
        params = jax.tree.map(lambda p, d: p - rate * d, params, directions)
        return params, state, {name: sums[name] + value for name, value in diagnostics.items()}

    return jax.lax.fori_loop(first, last, update, carry)


def train(job: Job, progress: Callable[[int], None]) -> tuple[Any, dict[str, float]]:
    """Trains one flow, and returns its parameters and mean diagnostics; calls `progress` with numbers of updates."""
    key = stream_key(job.seed, Stream.UPDATE)
    init_key = stream_key(job.seed, Stream.INITIALISATION)
    params = NET.init(init_key, jnp.zeros((1, 1)), jnp.zeros((1, 2)), jnp.zeros((1, 1)))
    sums = {name: jnp.zeros(()) for name in DIAGNOSTICS if job.method == "wcot"}
    carry, total = (params, optax.scale_by_adam().init(params), sums), job.updates
    for first in range(0, total, SEGMENT):
        last = min(first + SEGMENT, total)
        settings = (key, to_problem(job), job.alpha, job.epsilon, first, last, total)
        carry = jax.block_until_ready(train_segment(carry, *settings, method=job.method, size=FLAGS.batch_size))
        progress(last - first)
    return carry[0], {name: float(value) / total for name, value in carry[2].items()}


def to_problem(job: Job) -> Problem:
    """Returns a job's problem."""
    return Problem(float(job.condition == "rotation"), float(job.energy == "inside"), FLAGS.lam)


def euler_path(
    params: Any, conditions: Float[Array, "*b 1"], noise: Float[Array, "*b 2"], nfe: int
) -> Float[Array, " {nfe}+1 *b 2"]:
    """Returns all points on the paths of `utils.flow.euler`."""

    def step(x: Float[Array, "*b 2"], t: Scalar) -> tuple[Float[Array, "*b 2"], Float[Array, "*b 2"]]:
        x = x + output_of(NET, params, conditions, x, jnp.full((*x.shape[:-1], 1), t)) / nfe
        return x, x

    return jnp.concatenate([noise[None], jax.lax.scan(step, noise, jnp.arange(nfe) / nfe)[1]])


def true_samples(key: PRNGKeyArray, size: int, problem: Problem) -> Float[Array, "2 {size}//2 2"]:
    """Returns samples of π(a|c) e^{−λE} turned back, half of them at c < 0 and half at c > 0.

    They are evenly spaced quantiles of a dense weighted set along the moons, with hardly any sampling error.
    """
    pool, count = 8 * size, size // 2
    # Twice along the arc, to cover both moons if c is an angle.
    arc, second = (2 * jnp.arange(pool) / pool) % 1, jnp.arange(pool) >= pool // 2

    def half(key: PRNGKeyArray, sign: int) -> Float[Array, "n 2"]:
        points = two_moons(key, arc, jnp.where(problem.rotated > 0, 2.0 * second - 1, sign))
        cumulative = jnp.cumsum(jnp.exp(-problem.lam * energy(points, problem)))
        return points[jnp.searchsorted(cumulative, (jnp.arange(count) + 0.5) / count * cumulative[-1])]

    return jnp.stack([half(key, sign) for key, sign in zip(jax.random.split(key), (-1, 1), strict=True)])


def distance(x: Float[Array, "2 n 2"], y: Float[Array, "2 n 2"]) -> Scalar:
    """Returns the sliced 2-Wasserstein distance over 32 equally spaced directions, averaged over both halves."""
    angle = jnp.pi * jnp.arange(32) / 32
    directions = jnp.stack([jnp.cos(angle), jnp.sin(angle)])

    def squared(pair: tuple[Float[Array, "n 2"], Float[Array, "n 2"]]) -> Scalar:
        return sliced_wasserstein(pair[0], pair[1], proj_fn=lambda points, *_: points @ directions)[0]

    return jnp.sqrt(jax.lax.map(squared, (x, y))).mean()


@partial(jax.jit, static_argnames="size")
def evaluate(
    params: Any, key: PRNGKeyArray, problem: Problem, *, size: int = SAMPLES
) -> dict[str, Float[Array, "..."]]:
    """Returns metrics by NFE, each [len(NFES)], and paths with 2 and 100 steps, [points, 2, DRAWN / 2, 2]."""
    noise_key, true_key = jax.random.split(key)
    grid = (jnp.arange(size // 2) + 0.5) / (size // 2)
    half = jnp.where(problem.rotated > 0, 3**0.5 * grid, 1.0)[:, None]
    # Equally many noise samples from each Gaussian, so that metrics differ by flows and not by draws.
    conditions, noise = jnp.stack([-half, half]), eight_gaussians(noise_key, jnp.arange(size).reshape(2, -1) % 8)
    truth = true_samples(true_key, size, problem)
    paths = {nfe: euler_path(params, conditions, noise, nfe) for nfe in NFES}
    ends = jnp.stack([path[-1] for path in paths.values()])
    points = turn(ends, -angles(conditions, problem))
    length = jnp.stack([jnp.linalg.norm(jnp.diff(p, axis=0), axis=-1).sum(axis=0).mean() for p in paths.values()])
    metrics = {
        "wanted_share": 1 - energy(points, problem).mean(axis=(1, 2)),
        "distance": jax.lax.map(lambda x: distance(x, truth), points),
        "straightness": length / jnp.linalg.norm(ends - noise, axis=-1).mean(axis=(1, 2)),
        "gap": jnp.sqrt(jnp.sum((ends - ends[-1]) ** 2, axis=-1).mean(axis=(1, 2))),
    }
    # Every fifth of the 100 steps suffices for a figure.
    return metrics | {f"path_{n}": paths[n][:: max(n // 20, 1), :, : DRAWN // 2] for n in (2, NFES[-1])}


@partial(jax.jit, static_argnames="size")
def reference(key: PRNGKeyArray, problem: Problem, *, size: int = SAMPLES) -> dict[str, Float[Array, " NFEs"]]:
    """Returns the metrics of true samples; their distance, between two sets of them, is the least to expect."""
    first, second = (true_samples(k, size, problem) for k in jax.random.split(key))
    values = {"wanted_share": 1 - energy(first, problem).mean(), "distance": distance(first, second)}
    return {name: jnp.full(len(NFES), values.get(name, jnp.nan)) for name in METRICS}


def plan() -> dict[str, list[Job]]:
    """Returns the trainings of each page; in the sweep, the energy is 1 outside the circles."""
    seeds, updates = range(FLAGS.seed, FLAGS.seed + FLAGS.num_seeds), FLAGS.sweep_updates
    methods: list[tuple] = [("true",), ("ewfm", FLAGS.updates), ("wcot", FLAGS.updates, FLAGS.alpha, FLAGS.epsilon)]
    figure = product(("moon",), ("inside", "outside"), methods, seeds)
    grid: list[tuple] = [("wcot", updates, a, e) for a, e in product(numbers("alphas", 0.0), numbers("epsilons", 1e-4))]
    sweep = product(("moon", "rotation"), ("outside",), [("true",), ("ewfm", updates), *grid], seeds)
    pages = {"figure": figure, "sweep": sweep}
    return {
        page: [replace(Job(condition, energy, *method), seed=seed) for condition, energy, method, seed in settings]
        for page, settings in pages.items()
        if FLAGS.pages in ("all", page)
    }


def numbers(flag: str, least: float) -> list[float]:
    """Returns the numbers of a list flag, sorted, each once.

    Raises:
        UserError: the list is empty, or an item is not a number or less than `least`.
    """
    try:
        values = sorted({float(text) for text in getattr(FLAGS, flag)})
    except ValueError as error:
        default = ",".join(FLAGS[flag].default or ())
        raise UserError(f"--{flag}: {error}; give numbers as in --{flag}={default}") from error
    if not values or not all(least <= value < np.inf for value in values):
        raise UserError(f"--{flag} needs one or more numbers that are at least {least:g}, separated by commas")
    return values


def run_job(job: Job, directory: Path, progress: Callable[[int], None]) -> Result:
    """Trains and evaluates one flow, and saves the result in `directory`."""
    key = stream_key(job.seed, Stream.EVALUATION_ACTING)
    if job.method == "true":
        found: dict[str, Any] = reference(key, to_problem(job))
    else:
        params, diagnostics = train(job, progress)
        found = evaluate(params, key, to_problem(job)) | diagnostics
    result: dict[str, Any] = {name: np.asarray(value, np.float32) for name, value in found.items()}
    file = io.BytesIO()
    np.savez_compressed(file, **result)
    atomic_write_bytes(directory / file_name(job), file.getvalue())
    return result


def file_name(job: Job) -> str:
    """Returns the name of a training's file, with a hash of everything that its result depends on."""
    settings = [asdict(job), FLAGS.batch_size, FLAGS.lam, NET.hidden_dims, RADIUS, MAX_ITERATIONS, THRESHOLD, SAMPLES]
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]
    return f"{job.condition}_{job.energy}_{job.method}_a{job.alpha:g}_e{job.epsilon:g}_sd{job.seed}_{digest}.npz"


def load(path: Path) -> Result | None:
    """Loads a saved result; None if it is missing or damaged."""
    try:
        with np.load(path) as file:
            return dict(file)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None


def run_jobs(jobs: Sequence[Job], directory: Path) -> dict[Job, Result]:
    """Runs the jobs without a saved result in threads (XLA releases Python's lock), and returns all results."""
    kept = {job: load(directory / file_name(job)) for job in jobs}
    results = {job: result for job, result in kept.items() if result is not None}
    missing = [job for job in kept if job not in results]
    if results:
        print(f"{len(results)} of {len(kept)} trainings are already in {directory}")
    signals, lock = PreemptionGuard(), Lock()
    bar = ProgressBar(sum(job.updates for job in missing), description=f"{len(missing)} trainings")

    def progress(count: int) -> None:
        signals.check()
        with lock:
            bar.update(count)

    pool = ThreadPoolExecutor(FLAGS.jobs)
    try:
        futures = {pool.submit(run_job, job, directory, progress): job for job in missing}
        for future in as_completed(futures):
            results[futures[future]] = future.result()
    finally:
        pool.shutdown(cancel_futures=True)
        bar.close()
        signals.release()
    return {job: results[job] for job in jobs}


def main(argv: Sequence[str]) -> None:
    """Runs missing trainings, then writes tables and figures."""
    parse(argv, FLAGS)
    if not np.isfinite([FLAGS.lam, FLAGS.alpha, FLAGS.epsilon]).all():
        raise UserError("--lam, --alpha and --epsilon need finite numbers")
    output = Path(FLAGS.output).expanduser()
    planned = plan()
    results = run_jobs(list(dict.fromkeys(job for jobs in planned.values() for job in jobs)), output / "trained")
    pages = {name: {job: results[job] for job in jobs} for name, jobs in planned.items()}
    files: dict[str, str | bytes] = {
        "runs.csv": figures.runs_table(results),
        "means.csv": figures.means_table(results),
    }
    if "figure" in pages:
        files["figure1.png"] = figures.draw_samples(pages["figure"], CENTRES, RADIUS)
        files["nfe.png"] = figures.draw_nfe(pages["figure"])
        print(figures.metrics_table(pages["figure"]))
    if "sweep" in pages:
        files["sweep.png"] = figures.draw_sweep(pages["sweep"], (FLAGS.alpha, FLAGS.epsilon))
    for name, content in files.items():
        atomic_write_bytes(output / name, content.encode() if isinstance(content, str) else content)
    print(f"{output}: {', '.join(files)}")


if __name__ == "__main__":
    run_main(main)
