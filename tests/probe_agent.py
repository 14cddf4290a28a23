"""BC that logs what it is trained on, and always acts in one way, unlike its flow."""

from agents import base, bc

ACTION = 0.5


class Agent(bc.Agent):
    """See above."""

    def loss(self, params, batch, key):
        """BC's."""
        loss, info = super().loss(params, batch, key)
        return loss, info | {"batch/rewards": batch["rewards"].mean()}

    def sample_actions(self, observations, key):
        """Returns ACTION in every component."""
        return 0 * super().sample_actions(observations, key) + ACTION


get_config, PRESETS, CPU = base.get_config, base.presets({}), base.CPU
