"""Settings of SmolVLA trained by OTQL: SmolVLA's, and those of the paper's Tables 9 and 10 or our own."""

from dataclasses import dataclass, field

from lerobot.configs import PreTrainedConfig
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig


@PreTrainedConfig.register_subclass("smolvla_otql")
@dataclass
class SmolVLAOtqlConfig(SmolVLAConfig):
    """Settings, `--policy.<field>=<value>` of lerobot-train.

    The dataset needs `next.reward`, as otql-rollout records it or real/labels.py adds it.
    """

    num_steps: int = 3  # NFE
    n_action_steps: int = 10  # H, executed actions of a chunk, which the critic judges
    critic_lr: float = 3e-4
    discount: float = 0.99
    target_tau: float = 5e-3
    num_qs: int = 2
    rho: float = 0.0
    lam: float = 1.0
    w_max: float = 10.0
    best_of_n: int = 1
    # The paper is silent on these.
    critic_dims: list[int] = field(default_factory=lambda: [256] * 4)
    value_samples: int = 2  # k
    alpha: float = 0.3
    epsilon: float = 0.5
    max_iterations: int = 50
    threshold: float = 1e-2
    components: int = 8  # principal components of the pooled features in the conditions of the coupling

    def __post_init__(self) -> None:
        super().__post_init__()
        least = {"num_steps": 1, "n_action_steps": 1, "num_qs": 1, "best_of_n": 1, "value_samples": 1, "w_max": 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"--policy.{name}={getattr(self, name)}: it must be at least {value}")

    @property
    def observation_delta_indices(self) -> list[int]:
        """Returns the frames of an observation and of the one after the executed actions."""
        return [0, self.n_action_steps]

    @property
    def reward_delta_indices(self) -> list[int]:
        """Returns the frames of the executed actions."""
        return list(range(self.n_action_steps))

    def get_scheduler_preset(self) -> None:
        """Returns None: the learning rates are constant."""
