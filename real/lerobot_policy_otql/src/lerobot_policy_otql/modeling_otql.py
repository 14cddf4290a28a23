"""The LeRobot policy: a queue of actions from a sampler of chunks."""

import dataclasses
from collections import deque
from typing import Any, NoReturn

import torch
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.policies.rtc.modeling_rtc import RTCProcessor
from torch import Tensor

from lerobot_policy_otql.configuration_otql import OtqlConfig
from lerobot_policy_otql.encoders import Observation, as_pixels
from lerobot_policy_otql.networks import Guide, Sampler, Velocity

NOT_TRAINED_HERE = "OTQL policy: it is trained with main.py of the OTQL code and exported, not here"


class OtqlPolicy(PreTrainedPolicy):
    """Policy with the networks of OTQL or a baseline.

    Args:
        config: of an exported directory.
        kwargs: from LeRobot; the dataset's metadata are checked.

    Raises:
        ValueError: with one line, if the robot's action or observation does not fit the networks.
    """

    config_class = OtqlConfig
    name = "otql"

    def __init__(self, config: OtqlConfig, **kwargs: Any):
        super().__init__(config)
        features = getattr(kwargs.get("dataset_meta"), "features", {})
        for key, feature in config.input_features.items():
            found = tuple(features[key]["shape"]) if key in features else tuple(feature.shape)
            # Images may have any size.
            if key not in config.image_features and found != tuple(feature.shape):
                raise ValueError(f"OTQL policy: '{key}' has {found[0]} values, it was exported for {feature.shape[0]}")
        self.init_rtc_processor()
        self.model = Sampler(config).requires_grad_(False)
        if config.compile_model:
            self.model.compile(mode=config.compile_mode)
        self._queue: deque[Tensor] = deque()

    def supports_rtc(self) -> bool:
        """True if actions come from a flow, which LeRobot's real-time chunking guides."""
        return self.config.sampler == "flow"

    @classmethod
    def from_pretrained(cls, *args: Any, strict: bool = True, **kwargs: Any) -> "OtqlPolicy":
        """Loads a policy as LeRobot does, but missing parameters raise an error."""
        return super().from_pretrained(*args, strict=strict, **kwargs)

    def init_rtc_processor(self) -> None:
        """Applies `config.rtc_config`, which LeRobot's real-time chunking sets after loading.

        The guidance is capped at the number of Euler steps: more would overshoot the previous chunk.

        Raises:
            ValueError: with one line, if the settings are inconsistent.
        """
        self.config.validate_features()
        rtc, steps = self.config.rtc_config, self.config.flow_steps
        if rtc is not None:
            rtc = dataclasses.replace(rtc, max_guidance_weight=min(rtc.max_guidance_weight, steps))
        self.rtc_processor = RTCProcessor(rtc) if rtc is not None and rtc.enabled else None

    def reset(self) -> None:
        """Clears the action queue, and compiles the model if that is pending."""
        self._queue.clear()
        if self.config.compile_model and self.rtc_processor is None:
            # Compilation takes seconds, so it is done before the robot moves.
            device = next(self.parameters()).device
            widths = {key: feature.shape for key, feature in self.config.input_features.items()}
            self.predict_action_chunk({key: torch.zeros(1, *shape, device=device) for key, shape in widths.items()})

    def select_action(self, batch: dict[str, Tensor], noise: Tensor | None = None) -> Tensor:
        """Returns the next action of the current chunk, or of a new one after `n_action_steps` actions.

        Args:
            batch: see `predict_action_chunk`.
            noise: see `predict_action_chunk`.

        Returns:
            Normalised actions, [B, A].

        Raises:
            ValueError: real-time chunking is on, which requests whole chunks.
        """
        if self.rtc_processor is not None:
            raise ValueError("OTQL policy: rtc_config.enabled is for programs that ask for chunks; turn it off here")
        if not self._queue:
            chunk = self.predict_action_chunk(batch, noise=noise)
            self._queue.extend(chunk[:, : self.config.n_action_steps].unbind(dim=1))
        return self._queue.popleft()

    def predict_action_chunk(
        self,
        batch: dict[str, Tensor],
        noise: Tensor | None = None,
        inference_delay: int | None = None,
        prev_chunk_left_over: Tensor | None = None,
        execution_horizon: int | None = None,
    ) -> Tensor:
        """Returns the best of N chunks.

        Args:
            batch: preprocessed observation, [B, width] each, images [B, 3, H, W] in [0, 1], of any size.
            noise: standard normal [N, B, draws, d]; default: drawn.
            inference_delay, prev_chunk_left_over, execution_horizon: of real-time chunking, where it is on; steps,
                normalised actions [B, T, A] or [T, A], steps.

        Returns:
            normalised actions in [−1, 1], [B, H, A].
        """
        # LeRobot calls this in inference mode, whose tensors know no gradients; guidance needs some.
        with torch.inference_mode(False), torch.no_grad():
            observation, config = self._observe(batch), self.config
            if noise is None:
                shape = (config.best_of_n, len(observation.state), self.model.draws, self.model.action_dim)
                noise = torch.randn(shape, device=observation.state.device)
            if self.rtc_processor is not None:
                guide = self._join(prev_chunk_left_over, inference_delay or 0, execution_horizon)
                actions = self.model.forward(observation, noise, guide)  # Not compiled.
            else:
                actions = self.model(observation, noise)
            return actions.reshape(-1, config.chunk_size, config.action_dim)

    def _observe(self, batch: dict[str, Tensor]) -> Observation:
        """Returns the state vector [B, o] and the images in training format, uint8 [B, C, h, w, 3]."""
        inputs, cameras = self.config.input_features, self.config.image_features
        for key, feature in inputs.items():
            if key not in batch:
                raise ValueError(f"OTQL policy: the observation has no '{key}'; it needs {', '.join(inputs)}")
            if key in cameras and (batch[key].ndim != 4 or batch[key].shape[1] != 3):
                raise ValueError(f"OTQL policy: '{key}' has shape {list(batch[key].shape)}; it needs [B, 3, H, W]")
            if key not in cameras and batch[key].shape[-1] != feature.shape[0]:
                raise ValueError(f"OTQL policy: '{key}' has {batch[key].shape[-1]} values; it needs {feature.shape[0]}")
        states = [batch[key].float() for key in inputs if key not in cameras]
        images = [as_pixels(batch[key], *feature.shape[1:]) for key, feature in cameras.items()]
        # Without a state, its width is 0.
        state = torch.cat(states, dim=-1) if states else torch.zeros(len(images[0]), 0, device=images[0].device)
        return Observation(state, torch.stack(images, dim=1) if images else None)

    def _join(self, previous: Tensor | None, delay: int, execution_horizon: int | None) -> Guide:
        """Returns real-time chunking's guidance to the rest of the previous chunk; LeRobot's t runs from 1 to 0."""
        if previous is not None and previous.ndim == 2:
            previous = previous[None]
        processor: Any = self.rtc_processor

        def guide(velocity: Velocity, x: Tensor, t: float) -> Tensor:
            chunks = x.reshape(-1, self.config.chunk_size, self.config.action_dim)
            left = None if previous is None else previous.repeat(len(chunks) // len(previous), 1, 1)
            backwards = processor.denoise_step(
                chunks, left, delay, 1 - t, lambda y: -velocity(y.reshape(x.shape)).reshape(y.shape), execution_horizon
            )
            return -backwards.reshape(x.shape)

        return guide

    def get_optim_params(self) -> NoReturn:
        """Raises NotImplementedError, as the policy is not trained here."""
        raise NotImplementedError(NOT_TRAINED_HERE)

    def forward(self, batch: dict[str, Tensor]) -> NoReturn:
        """Raises NotImplementedError, as the policy is not trained here."""
        raise NotImplementedError(NOT_TRAINED_HERE)
