"""The critic ensemble Q_k(s, a) on states, pooled features of the frozen model, and the executed part of a chunk."""

import itertools

import torch
from torch import Tensor, nn


class Critic(nn.Module):
    """Ensemble of K networks of Linear → GELU → LayerNorm, as the critics of agents/.

    Args:
        observation_dim: width of the observation.
        action_dim: d, width of the executed part of a chunk.
        hidden_dims: widths of the hidden layers.
        num_qs: K.
    """

    def __init__(self, observation_dim: int, action_dim: int, hidden_dims: tuple[int, ...], num_qs: int):
        super().__init__()
        widths = [observation_dim + action_dim, *hidden_dims]
        self.members = nn.ModuleList(
            nn.Sequential(
                *(
                    layer
                    for before, after in itertools.pairwise(widths)
                    for layer in (nn.Linear(before, after), nn.GELU(), nn.LayerNorm(after))
                ),
                nn.Linear(widths[-1], 1),
            )
            for _ in range(num_qs)
        )

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Returns Q_k(s, a): [m, o], [m, d] → [K, m]."""
        inputs = torch.cat([observations, actions], dim=-1)
        return torch.stack([member(inputs)[:, 0] for member in self.members])


def pessimistic(qs: Tensor, rho: float) -> Tensor:
    """Returns mean − ρ · population deviation over the ensemble: [K, m] → [m]."""
    return qs.mean(dim=0) - rho * qs.std(dim=0, correction=0)


@torch.no_grad()
def track(target: nn.Module, source: nn.Module, tau: float) -> None:
    """Moves a target network's parameters by the share `tau` towards the source's."""
    for average, parameter in zip(target.parameters(), source.parameters(), strict=True):
        average.lerp_(parameter, tau)
