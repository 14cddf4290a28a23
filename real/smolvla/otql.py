"""Updates of SmolVLA's expert by supervised fine-tuning and by OTQL.

OTQL, on a batch of m windows {(s_j, a_j, R_j, s'_j)} (the paper's Algorithm 1, see agents/otql.py):

    critic      a'_j ← best of N Euler samples of v_θ at s'_j;  TD step on Q_φ
    advantage   A_j ← Q_φ(s_j, a_j) − V̂(s_j),  V̂(s_j) = mean of Q_φ(s_j, â) over Euler samples â of v_θ at s_j
    marginal    p_j ∝ min(exp(λ A_j), w_max)
    coupling    z_i ~ N(0, I), c̄_i ~ Categorical(p) over the c_j;  Γ* ← entropic OT between (z, αc̄; 1/m) and (a, αc; p)
    flow        (z_i, a_j, s_j) ~ Γ*;  step on ‖v_θ(s_j, t z_i + (1−t) a_j, t) − (z_i − a_j)‖²

The inputs of Q_φ are the state, the frozen model's pooled features and the H executed actions; the flow generates whole
chunks. All randomness of an update is a function of (seed, step), so that a resumed run gives the same numbers.
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy, pad_vector
from torch import Tensor

from real.smolvla.critic import Critic, pessimistic, track
from real.smolvla.data import Rows
from real.smolvla.expert import Prefix, matching_error, sample, sample_times, with_state
from real.smolvla.prefixes import AllPrefixes
from real.smolvla.torch_coupling import couple, tilted_marginal

Info = dict[str, Tensor]


@dataclass(frozen=True)
class Settings:
    """Settings of the updates: Tables 9 and 10, and below the line those that the paper does not state."""

    batch_size: int = 64
    actor_lr: float = 1e-4
    critic_lr: float = 3e-4
    discount: float = 0.99
    tau: float = 5e-3
    num_qs: int = 2
    rho: float = 0.0
    lam: float = 1.0
    w_max: float = 10.0
    best_of_n: int = 1
    nfe: int = 3
    # ---
    horizon: int = 0  # H, executed actions of a chunk; 0: the policy's n_action_steps
    critic_dims: tuple[int, ...] = (256, 256, 256, 256)
    value_samples: int = 2  # k
    alpha: float = 0.3
    epsilon: float = 0.5
    max_iterations: int = 50
    threshold: float = 1e-2
    components: int = 8  # principal components of the pooled features in the conditions of the coupling
    accumulate: int = 1  # number of parts of a batch, for gradient accumulation
    bf16: bool = False
    seed: int = 0


def generator(seed: int, step: int) -> torch.Generator:
    """Returns the random generator of one update, on the CPU for every device."""
    word = np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(word >> np.uint64(1)))


class Sft:
    """Flow matching on demonstrations.

    Args:
        policy: SmolVLA; parameters that require a gradient are trained.
        rows: the data.
        prefixes: of the rows.
        settings: of the updates.
        learning_rate: schedule, update → factor on the rate.
    """

    def __init__(
        self,
        policy: SmolVLAPolicy,
        rows: Rows,
        prefixes: AllPrefixes,
        settings: Settings,
        learning_rate: Callable[[int], float] = lambda step: 1.0,
    ):
        self.policy, self.rows, self.prefixes, self.settings = policy, rows, prefixes, settings
        self.device, config = torch.device(policy.config.device), policy.config
        self.horizon, self.chunk = settings.horizon or config.n_action_steps, config.chunk_size
        self.states = pad_vector(rows.states, config.max_state_dim).to(self.device)
        self.parameters = {name: each for name, each in policy.named_parameters() if each.requires_grad}
        self.learning_rate = learning_rate
        self.optimiser = torch.optim.AdamW(
            self.parameters.values(),
            **{"betas": config.optimizer_betas, "eps": config.optimizer_eps},
            weight_decay=config.optimizer_weight_decay,
        )

    @functools.cached_property
    def starts(self) -> Tensor:
        """Returns the rows at which windows can start."""
        return torch.nonzero(self.rows.demonstrated)[:, 0]

    def update(self, step: int) -> Info:
        """Runs one update."""
        random = generator(self.settings.seed, step)
        start, window = self.draw(random)
        noise, times = self.noise(random), self.times(random)
        return self.flow_step(step, self.observe(start), start, noise, times, window)

    def draw(self, random: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Draws a batch: the first rows of windows, on the CPU, and the windows."""
        start = self.starts[torch.randint(len(self.starts), (self.settings.batch_size,), generator=random)]
        window = self.rows.windows(start, self.horizon, self.chunk, self.settings.discount)
        return start, {name: values.to(self.device) for name, values in window.items()}

    def observe(self, rows: Tensor) -> Prefix:
        """Returns the prefixes of rows on the device, without their states."""
        return self.prefixes.rows(rows.cpu()).to(self.device)

    def noise(self, random: torch.Generator) -> Tensor:
        """Draws noise [m, chunk, max_action_dim], also for padded components, as SmolVLA does."""
        shape = self.settings.batch_size, self.chunk, self.policy.config.max_action_dim
        return torch.randn(shape, generator=random).to(self.device)

    def times(self, random: torch.Generator) -> Tensor:
        """Draws flow times as SmolVLA does, [m]."""
        return sample_times(self.settings.batch_size, random).to(self.device)

    def autocast(self) -> Any:
        """Returns a context that computes in bfloat16 if `settings.bf16`."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.bf16)

    def parts(self) -> list[slice]:
        """Returns the slices of a batch's `accumulate` parts."""
        edges = np.linspace(0, self.settings.batch_size, self.settings.accumulate + 1).astype(int)
        return [slice(start, end) for start, end in itertools.pairwise(edges)]

    def flow_step(
        self, step: int, prefix: Prefix, start: Tensor, noise: Tensor, times: Tensor, window: dict[str, Tensor]
    ) -> Info:
        """Runs one step of AdamW on the flow-matching loss of pairs: the mean over all components, 0 for padded ones.

        Args:
            step: number of the update.
            prefix: of the pairs' observations, without their states.
            start: rows of the observations.
            noise: z.
            times: t.
            window: `actions` and `action_mask` of the pairs.
        """
        actions, mask, loss = window["actions"], window["action_mask"], torch.zeros((), device=self.device)
        self.optimiser.zero_grad()
        for part in self.parts():
            with self.autocast():
                own = with_state(self.policy, prefix[part], self.states[start[part]])
                error = matching_error(self.policy, own, noise[part], actions[part], times[part], mask[part])
            share = error.float().sum() / actions.numel()
            share.backward()
            loss += share.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.policy.config.optimizer_grad_clip_norm)
        for group in self.optimiser.param_groups:
            group["lr"] = self.settings.actor_lr * self.learning_rate(step)
        self.optimiser.step()
        return {"flow/loss": loss, "flow/grad_norm": norm}

    def state(self) -> dict[str, Any]:
        """Returns the tensors of a checkpoint, in nested dictionaries; see `load`."""
        return {"policy": self.parameters, "actor": self.optimiser.state_dict()["state"]}

    def load(self, state: dict[str, Any]) -> None:
        """Restores the tensors from `state`."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state["policy"][name])
        _load_optimiser(self.optimiser, state["actor"])


class Otql(Sft):
    """OTQL on demonstrations and rollouts."""

    def __init__(self, policy: SmolVLAPolicy, rows: Rows, prefixes: AllPrefixes, settings: Settings):
        super().__init__(policy, rows, prefixes, settings)
        pooled = prefixes.pooled.float()
        self.observations = torch.cat([rows.states, standardised(pooled)], dim=1).to(self.device)
        condition = torch.cat([rows.states, principal_components(pooled, settings.components)], dim=1)
        self.conditions = standardised(condition).to(self.device)
        width = self.horizon * rows.actions.shape[1]
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)
            sizes = self.observations.shape[1], width, settings.critic_dims, settings.num_qs
            self.critic, self.target = Critic(*sizes).to(self.device), Critic(*sizes).to(self.device)
        self.target.load_state_dict(self.critic.state_dict())
        self.critic_optimiser = torch.optim.Adam(self.critic.parameters(), lr=settings.critic_lr)

    @functools.cached_property
    def starts(self) -> Tensor:
        """Returns the rows with a valid window."""
        return self.rows.starts(self.horizon)

    def update(self, step: int) -> Info:
        """Runs one update of critics and expert, both from the parameters before it (Algorithm 1)."""
        cfg, random = self.settings, generator(self.settings.seed, step)
        start, window = self.draw(random)
        prefix = self.observe(start)

        with torch.no_grad():
            following = self.acting(self.observe(window["next"]), window["next"])
            next_value = self.next_value(following, self.observations[window["next"]], random)
            target = window["rewards"] + cfg.discount**self.horizon * window["masks"] * next_value
        qs = self.critic(self.observations[start], self.executed(window["actions"]))
        critic_loss = (qs - target).square().mean()

        value = self.value(self.acting(prefix, start), self.observations[start], random)
        advantages = qs.detach().mean(dim=0) - value
        probs = tilted_marginal(advantages, torch.ones_like(advantages), cfg.lam, cfg.w_max)
        noise = self.noise(random)
        index, diagnostics = couple(
            self.flat(noise),
            self.flat(window["actions"]),
            self.conditions[start],
            probs,
            random,
            window["action_mask"].repeat_interleave(self.rows.actions.shape[1], dim=1),
            **{name: getattr(cfg, name) for name in ("alpha", "epsilon", "max_iterations", "threshold")},
        )
        pairs = {name: window[name][index] for name in ("actions", "action_mask")}
        info = self.flow_step(step, prefix[index], start[index.cpu()], noise, self.times(random), pairs)

        self.critic_optimiser.zero_grad()
        critic_loss.backward()
        self.critic_optimiser.step()
        track(self.target, self.critic, cfg.tau)
        info |= {f"coupling/{name}": number for name, number in diagnostics.items()}
        info |= {"critic/loss": critic_loss.detach(), "critic/q": qs.detach().mean(), "critic/target_max": target.max()}
        return info | {"advantage/mean": advantages.mean(), "advantage/std": advantages.std()}

    def flat(self, chunks: Tensor) -> Tensor:
        """Flattens the action components of [m, chunk, ≥ A] to [m, d]."""
        return chunks[..., : self.rows.actions.shape[1]].flatten(1)

    def executed(self, chunks: Tensor) -> Tensor:
        """Flattens the H executed actions of [m, chunk, ≥ A] to [m, H · A]."""
        return self.flat(chunks[:, : self.horizon])

    @torch.no_grad()
    def acting(self, prefix: Prefix, rows: Tensor) -> Prefix:
        """Returns prefixes with their states, for sampling."""
        with self.autocast():
            return with_state(self.policy, prefix, self.states[rows])

    @torch.no_grad()
    def propose(self, prefix: Prefix, random: torch.Generator) -> Tensor:
        """Samples the policy once for each observation; returns the executed actions [m, H · A]."""
        noise = self.noise(random)
        with self.autocast():
            chunks = [sample(self.policy, prefix[part], noise[part], self.settings.nfe) for part in self.parts()]
        return self.executed(torch.cat(chunks).float())

    @torch.no_grad()
    def next_value(self, prefix: Prefix, observations: Tensor, random: torch.Generator) -> Tensor:
        """Returns the bootstrap value [m] of the TD target: target critics at the online critic's best of N samples."""
        candidates = torch.stack([self.propose(prefix, random) for _ in range(self.settings.best_of_n)])
        ranks = torch.stack([self.critic(observations, actions).mean(dim=0) for actions in candidates])
        best = candidates[ranks.argmax(dim=0), torch.arange(len(observations), device=self.device)]
        return pessimistic(self.target(observations, best), self.settings.rho)

    @torch.no_grad()
    def value(self, prefix: Prefix, observations: Tensor, random: torch.Generator) -> Tensor:
        """Returns V̂(s) [m], the mean over k samples of the ensemble mean of Q_φ(s, â) (§3.2)."""
        samples = range(self.settings.value_samples)
        values = [self.critic(observations, self.propose(prefix, random)).mean(dim=0) for _ in samples]
        return torch.stack(values).mean(dim=0)

    def state(self) -> dict[str, Any]:
        """Returns the tensors of a checkpoint."""
        own = {"critic": self.critic.state_dict(), "target": self.target.state_dict()}
        return super().state() | own | {"critic_optimiser": self.critic_optimiser.state_dict()["state"]}

    def load(self, state: dict[str, Any]) -> None:
        """Restores the tensors from `state`."""
        super().load(state)
        self.critic.load_state_dict(state["critic"])
        self.target.load_state_dict(state["target"])
        _load_optimiser(self.critic_optimiser, state["critic_optimiser"])


def standardised(values: Tensor) -> Tensor:
    """Standardises columns to mean 0 and deviation 1; constant ones become 0."""
    deviation = values.std(dim=0, correction=0)
    return (values - values.mean(dim=0)) / torch.where(deviation > 1e-6, deviation, torch.ones_like(deviation))


def principal_components(values: Tensor, count: int) -> Tensor:
    """Returns the first `count` principal components of the standardised columns: [N, f] → [N, count]."""
    values = standardised(values)
    _, vectors = torch.linalg.eigh((values.T @ values).double())
    return values @ vectors[:, -min(count, len(vectors)) :].flip(1).float()


def _load_optimiser(optimiser: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Restores an optimiser's `state_dict()['state']` whose keys are strings."""
    groups = optimiser.state_dict()["param_groups"]
    optimiser.load_state_dict({"state": {int(key): value for key, value in state.items()}, "param_groups": groups})
