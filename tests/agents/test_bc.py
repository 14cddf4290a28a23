"""The BC flow: its loss, and what it leaves out."""

import jax
import numpy as np
import pytest
from numpy_networks import make_agent, make_batch, velocity

from agents import base, bc

BATCH = make_batch()


@pytest.mark.check
def test_loss_equals_numpy(monkeypatch):
    """Flow matching from fresh noise to the row's own action at its own observation; invalid and padded parts out."""
    agent, seen = make_agent(bc, BATCH), {}
    assert set(agent.params) == {"flow"}
    assert set(agent.targets) == {"flow"}
    real = base.flow_matching_loss

    def spy(field, key, noise, actions, weights):
        seen.update(noise=np.asarray(noise), actions=actions, weights=weights)

        def recorded(x, t):
            seen.update(x=np.asarray(x), t=np.asarray(t))
            return field(x, t)

        return real(recorded, key, noise, actions, weights)

    monkeypatch.setattr(base, "flow_matching_loss", spy)
    loss, info = agent.loss(agent.params, BATCH, jax.random.key(0))
    noise, actions, t = seen["noise"], np.asarray(BATCH["actions"]), seen["t"]
    np.testing.assert_allclose(seen["x"], t * actions + (1 - t) * noise, atol=1e-6)
    error = velocity(agent.params["flow"], BATCH["observations"], seen["x"], t) - (actions - noise)
    weights = np.asarray(BATCH["valid"])[:, None] * np.asarray(BATCH["action_mask"])
    np.testing.assert_allclose(loss, np.mean(weights * error**2), rtol=1e-4)
    assert info["flow/loss"] == loss


def test_noise_is_fresh_and_standard():
    """The noise is drawn anew for each key, N(0, I), independent of the interpolation time."""
    batch = make_batch(4000, 2)
    agent, seen = make_agent(bc, batch), []
    field = agent.apply

    class Spy(bc.Agent):
        def apply(self, name, observations, x, t, params=None):
            seen.append((np.asarray(x), np.asarray(t)))
            return field(name, observations, x, t, params=params)

    spy = Spy(**{k: getattr(agent, k) for k in agent.__dataclass_fields__})
    for seed in range(2):
        spy.loss(spy.params, batch, jax.random.key(seed))
    noises = [(x - t * np.asarray(batch["actions"])) / (1 - t) for x, t in seen]
    for noise, (_, t) in zip(noises, seen, strict=True):
        keep = t[:, 0] < 0.99
        assert abs(noise[keep].mean()) < 0.05
        assert abs(noise[keep].std() - 1) < 0.05
        assert abs(np.corrcoef(noise[keep, 0] ** 2, t[keep, 0])[0, 1]) < 0.06
    assert abs(np.corrcoef(noises[0].ravel(), noises[1].ravel())[0, 1]) < 0.05
