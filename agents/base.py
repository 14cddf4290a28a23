"""Base class of all agents: critic ensemble and TD target, best-of-N, Polyak averaging and the optimiser.

An agent file adds its policy loss and its sampler. `agents/bc.py` is the smallest one.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, cast

import flax
import jax
import jax.numpy as jnp
import ml_collections
import optax
from jaxtyping import Array, Float, PRNGKeyArray

# Agent files outside the project use these as base.CPU and base.presets.
from agents.presets import CPU as CPU
from agents.presets import presets as presets
from utils.arrays import Info, Observations, Scalar
from utils.data.batches import Batch, check_fields
from utils.encoders import Encoder, augmented, encoded
from utils.flow import SMALLEST_STEP, euler, flow_matching_loss, shortcut_loss
from utils.networks import CriticEnsemble, GaussianSource, VectorField
from utils.observations import Observation, state_of
from utils.random_streams import Stream, stream_key

# A leaf of an agent: an array, of one run or stacked over several, or a placeholder of JAX's transformations.
Leaf = Array | Any


# Setting → default, meaning.
Settings = Mapping[str, tuple[Any, str]]
SETTINGS: Settings = {
    "batch_size": (256, "m, windows in a batch"),
    "lr": (3e-4, "learning rate of Adam, all networks"),
    "discount": (0.99, "γ, per environment step"),
    "tau": (0.005, "Polyak rate of the target networks"),
    "flow_tau": (1.0, "Polyak rate of the flow that acts; 1: the trained flow itself"),
    "rho": (0.5, "ρ, pessimism of the TD target, in deviations of the critics"),
    "num_qs": (10, "K, critics in the ensemble"),
    "horizon_length": (1, "H, actions in a chunk; also --horizon_length"),
    "actor_hidden_dims": ((512, 512, 512, 512), "widths of the hidden layers of flows and policies"),
    "value_hidden_dims": ((512, 512, 512, 512), "widths of the hidden layers of critics and values"),
    "flow_steps": (10, "NFE, Euler steps of the flow"),
    "best_of_n": (1, "N, candidates at acting and in the TD target"),
    "noise_scale": (1.0, "factor on the deviation of the noise that the policy starts from"),
    "window_rule": ("pad", "windows with a true termination: 'pad' keeps them, 'drop' does not"),
    "encoder": ("impala_small", "of camera images, if the data have any; see utils/encoders.py"),
    "augment": (True, "random shifts of the images, as in FQL"),
}
# Of agents whose flow can start from a learned source, and learn steps of several sizes.
FLOW_SETTINGS: Settings = {
    "source": ("standard", "start of the flow: 'standard', N(0, I), or 'action', a normal fitted to a state's actions"),
    "source_hidden_dims": ((128, 128), "widths of the hidden layers of a fitted source"),
    "targets": ("velocity", "of the flow: 'velocity' (Eq. 1), or 'shortcut': steps of 1, 1/2 and 1/4 beside it"),
}


def get_config(own: Settings | None = None) -> ml_collections.ConfigDict:
    """Returns the defaults of all agents, joined with those of one agent's own settings.

    Floats become traced leaves of the agent; all others are static.
    """
    return ml_collections.ConfigDict({name: default for name, (default, _) in {**SETTINGS, **(own or {})}.items()})


class Agent(flax.struct.PyTreeNode):
    """Base of all agents: pure methods over a pytree, so that agents can be vmapped, scanned and donated.

    Attributes:
        params: network name → parameters, all trained by one Adam. If observations have images, each network that
            takes them has its own encoder, under 'encoder'.
        targets: name in `params` → Polyak average.
        opt_state: state of the optimiser.
        key: PRNG key of all updates, constant over training.
        step: number of updates done, int32.
        hyper: float entries of the config, traced: one program serves every value.
        condition_stats: mean and standard deviation of the states, each [o].
        config: all other entries of the config, static.
    """

    params: dict[str, Any]
    targets: dict[str, Any]
    opt_state: Any
    key: Leaf
    step: Leaf
    hyper: dict[str, Leaf]
    condition_stats: tuple[Leaf, Leaf]
    config: ml_collections.FrozenConfigDict = flax.struct.field(pytree_node=False)

    # Network with a Polyak copy, if the agent has it → the setting that holds its rate.
    TARGETS = {"critic": "tau", "flow": "flow_tau", "source": "flow_tau"}
    # Networks that start from a pre-trained flow, if one is given. An annotation would make this a field.
    FLOWS = cast(tuple[str, ...], ("flow",))
    # Settings of SETTINGS that have no effect on this agent → why. A user who gives one gets an error.
    UNUSED = cast(Mapping[str, str], {})
    # Transforms gradients before they are scaled by lr.
    OPTIMISER = optax.scale_by_adam()

    @classmethod
    def networks(cls, config: Any, action_dim: int) -> dict[str, Any]:
        """Returns name → module of every network; `action_dim` is d, the width of a whole chunk."""
        return {
            "critic": CriticEnsemble(tuple(config.value_hidden_dims), config.num_qs),
            **cls.flow_networks(config, action_dim),
        }

    @classmethod
    def flow_networks(cls, config: Any, action_dim: int) -> dict[str, Any]:
        """Returns the flow and, if the settings name one, its learned source."""
        shortcut = config.get("targets") == "shortcut"
        networks: dict[str, Any] = {"flow": VectorField(tuple(config.actor_hidden_dims), action_dim, shortcut)}
        if config.get("source", "standard") != "standard":
            networks["source"] = GaussianSource(tuple(config.source_hidden_dims), action_dim)
        return networks

    @classmethod
    def create(cls, key: PRNGKeyArray | int, example_batch: Batch, config: ml_collections.ConfigDict) -> "Agent":
        """Initialises an agent.

        Args:
            key: PRNG key or seed, from which the keys of the initialisation and of the updates are derived.
            example_batch: a batch (utils/data/batches.py) of any size. Its observations should be representative:
                their mean and deviation standardise the conditions of the coupling.
            config: this agent's `get_config()`, with any changes.
        """
        check_fields(example_batch, ("observations", "actions"))
        if isinstance(key, int):
            key = jax.random.PRNGKey(key)
        if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            key = jax.random.key_data(key)
        observations, actions = jax.tree.map(jnp.asarray, (example_batch["observations"], example_batch["actions"]))
        config = ml_collections.ConfigDict(config)
        hyper = {k: jnp.asarray(v, jnp.float32) for k, v in config.items() if isinstance(v, float)}
        # Tree structures of two classes with equal fields compare equal; the name keeps jit from mixing them up.
        fixed = {"action_dim": actions.shape[-1], "algorithm": f"{cls.__module__}.{cls.__qualname__}"}
        static = ml_collections.FrozenConfigDict({k: v for k, v in config.items() if k not in hyper} | fixed)
        one = jax.tree.map(lambda x: x[:1], observations)
        inputs = {"observations": one, **dict.fromkeys(("actions", "x"), actions[:1])}
        inputs |= dict.fromkeys(("t", "h"), actions[:1, :1])
        params = {
            name: init_network(stream_key(key, Stream.INITIALISATION, i), module, inputs, static.encoder)
            for i, (name, module) in enumerate(cls.networks(static, static.action_dim).items())
        }
        states = state_of(observations)
        deviation = states.std(axis=0)
        return cls(
            params=params,
            # Copies: a buffer that occurs twice cannot be donated.
            targets=jax.tree.map(jnp.copy, {name: params[name] for name in cls.TARGETS if name in params}),
            opt_state=cls.OPTIMISER.init(params),
            key=stream_key(key, Stream.UPDATE),
            step=jnp.zeros((), jnp.int32),
            hyper=hyper,
            condition_stats=(states.mean(axis=0), jnp.where(deviation > 1e-6, deviation, 1.0)),
            config=static,
        )

    @property
    def cfg(self) -> SimpleNamespace:
        """Returns all settings, static and traced, as attributes."""
        return SimpleNamespace(**self.config, **self.hyper)

    @property
    def acting_flow(self) -> Any:
        """Returns the parameters of v̄, the flow that acts: the Polyak copy of the trained v (v if flow_tau is 1)."""
        return self.targets["flow"]

    def apply(self, name: str, *inputs: Any, params: Any = None) -> Any:
        """Evaluates the network `name` at `params`, by default the agent's own.

        Observations with images are encoded first. For repeated evaluations, encode them once with `encode`.
        """
        params = self.params[name] if params is None else params
        module = self.networks(self.config, self.config.action_dim)[name]
        return module.apply({"params": params}, *(self.encode(name, x, params) for x in inputs))

    def encode(self, name: str, observations: Any, params: Any = None) -> Array:
        """Returns the inputs of the network `name`: states joined with image features; anything else unchanged."""
        if not isinstance(observations, Observation):
            return observations
        params = self.params[name] if params is None else params
        return encoded(self.config.encoder, params["encoder"], observations)

    def update(self, batch: Batch) -> tuple["Agent", Info]:
        """Takes one gradient step on `loss` and one Polyak step; all randomness is a function of (key, step).

        Returns:
            the new agent, and scalars to log.
        """
        return self._update(batch, self.loss)

    def distill(self, batch: Batch) -> tuple["Agent", Info]:
        """Takes the same step as `update`, with the same keys, on `distill_loss`."""
        return self._update(batch, self.distill_loss)

    def _update(self, batch: Batch, loss: Callable[..., tuple[Scalar, Info]]) -> tuple["Agent", Info]:
        key = jax.random.fold_in(self.key, self.step)
        if self.config.augment and isinstance(batch["observations"], Observation):
            batch = augmented(batch, stream_key(key, Stream.AUGMENTATION))
        try:
            (_, info), grads = jax.value_and_grad(loss, has_aux=True)(self.params, batch, key)
        except KeyError:
            check_fields(batch)
            raise
        directions, opt_state = self.OPTIMISER.update(grads, self.opt_state)
        params = jax.tree.map(lambda p, u: p - self.hyper["lr"] * u, self.params, directions)
        targets = {
            name: optax.incremental_update(params[name], average, self.hyper[self.TARGETS[name]])
            for name, average in self.targets.items()
        }
        return self.replace(params=params, targets=targets, opt_state=opt_state, step=self.step + 1), info

    def with_flow(self, params: Any, source: Any = None) -> "Agent":
        """Returns the agent with a pre-trained flow's parameters in its own flows and their averages (θ ← θ̄).

        Likewise with those of the flow's source, if it has one; else the agent's own source begins at N(0, I).
        """
        flows = dict.fromkeys(self.FLOWS, params) | ({} if source is None else {"source": source})
        averages = {name: flow for name, flow in flows.items() if name in self.targets}
        # Copies: a buffer that occurs twice cannot be donated.
        copied = jax.tree.map(jnp.copy, {"params": self.params | flows, "targets": self.targets | averages})
        return self.replace(**copied)

    @property
    def distilled(self) -> tuple[str, ...]:
        """Returns the names of the networks that `distill` fits to a pre-trained flow before the agent first acts."""
        return ()

    def distill_loss(self, params: dict[str, Any], batch: Batch, key: PRNGKeyArray) -> tuple[Scalar, Info]:
        """Returns the loss of `distill` at `params`, and scalars to log."""
        raise NotImplementedError

    def loss(self, params: dict[str, Any], batch: Batch, key: PRNGKeyArray) -> tuple[Scalar, Info]:
        """Returns the sum of all losses at `params`, here TD and flow matching on the data, and scalars to log."""
        critic_key, flow_key = jax.random.split(key)
        critic_loss, _, info = self.critic_loss(params, batch, critic_key)
        flow_loss, flow_info = self.bc_loss(params, batch, flow_key)
        return critic_loss + flow_loss, info | flow_info

    def critic_loss(
        self, params: dict[str, Any], batch: Batch, key: PRNGKeyArray
    ) -> tuple[Scalar, Float[Array, " K m"], Info]:
        """Computes the TD loss of the ensemble (paper Eq. 10, with target networks, mask and γ^H).

        The mean over ensemble and batch of valid · (Q_k(s, a) − y)², y = R + γ^H · mask · V(s') with V from
        `next_value`.

        Returns:
            the loss, Q_k(s, a) at `params`, and scalars to log.
        """
        return self.td_loss(params, batch, self.next_value(batch["next_observations"], key))

    def td_loss(
        self, params: dict[str, Any], batch: Batch, next_value: Float[Array, " m"]
    ) -> tuple[Scalar, Float[Array, " K m"], Info]:
        """Computes the TD loss for given V(s'); see `critic_loss`."""
        cfg = self.cfg
        target = batch["rewards"] + cfg.discount**cfg.horizon_length * batch["masks"] * next_value
        qs = self.apply("critic", batch["observations"], batch["actions"], params=params["critic"])
        loss = jnp.mean(batch["valid"] * jnp.square(qs - jax.lax.stop_gradient(target)))
        return loss, qs, {"critic/loss": loss, "critic/q": qs.mean(), "critic/target_max": target.max()}

    def bc_loss(
        self,
        params: dict[str, Any],
        batch: Batch,
        key: PRNGKeyArray,
        name: str = "flow",
        row_weights: Float[Array, " m"] | float = 1.0,
    ) -> tuple[Scalar, Info]:
        """Returns the loss of the flow `name` on data and independent noise (paper Eq. 1), and scalars to log.

        A learned source is fitted with the same weights: those of the rows, [m], zero on invalid rows and padding.
        """
        observations, actions = batch["observations"], batch["actions"]
        weights = (row_weights * batch["valid"])[:, None] * batch["action_mask"]
        noise_key, time_key = jax.random.split(key)
        mean, deviation = self.source(observations)
        noise = mean + deviation * jax.random.normal(noise_key, actions.shape)
        loss = self.flow_loss(params, observations, time_key, noise, actions, weights, name)
        source_loss, info = self.source_loss(params, observations, actions, weights)
        return loss + source_loss, info | {f"{name}/loss": loss}

    def flow_loss(
        self,
        params: dict[str, Any],
        observations: Observations,
        key: PRNGKeyArray,
        noise: Float[Array, "m d"],
        actions: Float[Array, "m d"],
        weights: Float[Array, "m d"],
        name: str = "flow",
    ) -> Scalar:
        """Returns the loss of the flow `name` on given pairs (z, a), with a weight for each component.

        It is flow matching, or `shortcut_loss` where the setting `targets` says so.
        """

        def velocity(x: Float[Array, "m d"], *times: Float[Array, "m 1"]) -> Float[Array, "m d"]:
            return self.apply(name, observations, x, *times, params=params[name])

        def average(x: Float[Array, "n d"], *times: Float[Array, "n 1"]) -> Float[Array, "n d"]:
            seen = jax.tree.map(lambda part: part[: len(x)], observations)
            return self.apply(name, seen, x, *times, params=self.targets[name])

        if self.config.get("targets") == "shortcut":
            return shortcut_loss(velocity, average, key, noise, actions, weights)
        return flow_matching_loss(velocity, key, noise, actions, weights)

    def source(self, observations: Observations) -> tuple[Float[Array, "*b d"], Float[Array, "*b d"]]:
        """Returns mean and deviation of the policy's start: those of a learned source's average, or of N(0, I)."""
        if "source" in self.params:
            return self.apply("source", observations, params=self.targets["source"])
        return self.standard_source(observations)

    def standard_source(self, observations: Observations) -> tuple[Float[Array, "*b d"], Float[Array, "*b d"]]:
        """Returns mean and deviation of N(0, I)."""
        shape = (*observations.shape[:-1], self.config.action_dim)
        return jnp.zeros(shape), jnp.ones(shape)

    def source_loss(
        self,
        params: dict[str, Any],
        observations: Observations,
        samples: Float[Array, "m d"],
        weights: Float[Array, "m d"],
    ) -> tuple[Scalar | float, Info]:
        """Returns the mean of −weight · log N(sample; m(s), σ(s)²), and scalars to log; 0 without a learned source."""
        if "source" not in params:
            return 0.0, {}
        mean, deviation = self.apply("source", observations, params=params["source"])
        loss = -jnp.mean(weights * jax.scipy.stats.norm.logpdf(samples, mean, deviation))
        return loss, {"source/loss": loss, "source/std": deviation.mean()}

    def next_value(self, observations: Observations, key: PRNGKeyArray) -> Float[Array, "*b"]:
        """Returns the value that the TD target bootstraps from: `pessimistic_q` at the actions of `sample_actions`."""
        return self.pessimistic_q(observations, self.sample_actions(observations, key))

    def pessimistic_q(self, observations: Observations, actions: Float[Array, "*b d"]) -> Float[Array, "*b"]:
        """Returns mean_k Q̄_k(s, a) − ρ std_k Q̄_k(s, a) of the target critics, with the population deviation."""
        return self.pessimistic(self.apply("critic", observations, actions, params=self.targets["critic"]))

    def pessimistic(self, qs: Float[Array, " K *b"]) -> Float[Array, "*b"]:
        """Returns mean − ρ std over an ensemble."""
        return qs.mean(axis=0) - self.hyper["rho"] * qs.std(axis=0)

    def flow_actions(
        self, observations: Observations, noise: Float[Array, "*b d"], params: Any = None
    ) -> Float[Array, "*b d"]:
        """Returns Euler samples of v̄, the flow that acts, clipped to [−1, 1]."""
        params = self.acting_flow if params is None else params
        observations = self.encode("flow", observations, params)
        shortcut, steps = self.config.get("targets") == "shortcut", self.config.flow_steps
        h = (jnp.full((*noise.shape[:-1], 1), max(1 / steps, SMALLEST_STEP)),) if shortcut else ()
        actions = euler(lambda x, t: self.apply("flow", observations, x, t, *h, params=params), noise, steps)
        return jnp.clip(actions, -1.0, 1.0)

    @property
    def nfe(self) -> int:
        """Returns the number of network evaluations for one candidate action, that of a learned source not counted."""
        return self.config.flow_steps

    def start_noise(self, observations: Observations, key: PRNGKeyArray) -> Float[Array, "*b d"]:
        """Draws noise from `source`, its deviation times `noise_scale`, for the policy to start from."""
        mean, deviation = self.source(observations)
        return mean + self.hyper["noise_scale"] * deviation * jax.random.normal(key, deviation.shape)

    def propose(self, observations: Observations, key: PRNGKeyArray) -> Float[Array, "*b d"]:
        """Samples one action for each observation, before best-of-N, in [−1, 1]."""
        return self.flow_actions(observations, self.start_noise(observations, key))

    def candidates(
        self, observations: Observations, key: PRNGKeyArray, n: int
    ) -> tuple[Float[Array, " {n} *b o"] | Observation, Float[Array, " {n} *b d"]]:
        """Returns n proposals for each observation: repeated observations, and actions."""
        observations = self.broadcast(observations, n)
        return observations, self.propose(observations, key)

    @staticmethod
    def broadcast(observations: Observations, n: int) -> Float[Array, " {n} *b o"] | Observation:
        """Returns observations with n repeated states; images are not repeated."""
        states = jnp.broadcast_to(state_of(observations), (n, *observations.shape))
        return observations._replace(state=states) if isinstance(observations, Observation) else states

    def rank(self, qs: Float[Array, " K *b"]) -> Float[Array, "*b"]:
        """Returns the score that best-of-N maximises: the mean of the online critics' values."""
        return qs.mean(axis=0)

    def sample_actions(self, observations: Observations, key: PRNGKeyArray) -> Float[Array, "*b d"]:
        """Returns action chunks in [−1, 1]: the best of N proposals by the online critics."""
        observations, actions = self.candidates(observations, key, self.config.best_of_n)
        if self.config.best_of_n == 1:
            return actions[0]
        return self.best(actions, self.apply("critic", observations, actions))

    def best(self, actions: Float[Array, "N *b d"], qs: Float[Array, " K N *b"]) -> Float[Array, "*b d"]:
        """Returns the action of highest `rank` among N."""
        return jnp.take_along_axis(actions, self.rank(qs).argmax(axis=0)[None, ..., None], axis=0)[0]


def init_network(key: PRNGKeyArray, module: Any, inputs: dict[str, Any], encoder: str) -> dict[str, Any]:
    """Initialises a network on those of `inputs` that its __call__ names, and its encoder if there are images."""
    own = {k: v for k, v in inputs.items() if k in inspect.signature(module.__call__).parameters}
    if not isinstance(own.get("observations"), Observation):
        return module.init(key, **own)["params"]
    encoder_key, key = jax.random.split(key)
    encoder_params = Encoder(encoder).init(encoder_key, own["observations"].images)["params"]
    seen = jax.eval_shape(functools.partial(encoded, encoder), encoder_params, own["observations"])
    own["observations"] = jnp.zeros(seen.shape)
    return {"encoder": encoder_params, **module.init(key, **own)["params"]}
