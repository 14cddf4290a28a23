"""Settings of the policy; `config.json` of an exported directory holds them."""

from dataclasses import dataclass, field

from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.types import FeatureType, NormalizationMode
from lerobot.policies.rtc.configuration_rtc import RTCConfig

FORMAT_VERSION = 1  # of an exported directory; real/export.py has the same
INPUTS = (FeatureType.STATE, FeatureType.ENV, FeatureType.VISUAL)
SAMPLERS = ("flow", "one_step", "estimate", "ddpm")


@PreTrainedConfig.register_subclass("otql")
@dataclass
class OtqlConfig(PreTrainedConfig):
    """What is written by the export, and what may be changed on the command line (`--policy.<field>=<value>`).

    The state is the concatenation of those of `input_features` that are none of images, in their order; the cameras
    are the others in theirs, each with the shape [3, h, w] that it was trained on, whatever the robot's size is. May be
    changed: device, n_action_steps, best_of_n (up from 1 only where there are critics), flow_steps (of a flow),
    compile_model and compile_mode, rtc_config.
    """

    format_version: int = FORMAT_VERSION
    action_dim: int = 1  # A; the dataset's or environment's action must have it too
    chunk_size: int = 1  # H, actions predicted at once
    n_action_steps: int = 1  # of them, actions executed before the policy is asked again

    # 'flow': Euler steps; 'one_step': one pass; 'estimate' and 'ddpm': a diffusion policy's reverse process.
    sampler: str = "flow"
    flow_steps: int = 10  # NFE of a flow, steps of a diffusion
    actor_hidden_dims: list[int] = field(default_factory=list)
    time_dim: int = 0  # Fourier features of a diffusion's time
    latent_scale: float = 0.0  # above 0: bound on start points, which a policy of their own draws
    edit_scale: float = 0.0  # above 0: bound on the edits that a policy of their own makes
    guidance_coef: float = 0.0  # above 0: the critics' gradient bends the flow ...
    inv_temp: float = 0.0  # ... with this factor
    best_of_n: int = 1  # N, candidates
    rank: str = "mean"  # of the critics, by which the best is chosen: 'mean' or 'min'
    num_qs: int = 0  # critics that were exported
    value_hidden_dims: list[int] = field(default_factory=list)

    # Of the images, where there are some: side of a patch, widths of the stacks, residual blocks in each, features.
    encoder_patch: int = 1
    encoder_widths: list[int] = field(default_factory=list)
    encoder_blocks: int = 0
    encoder_features: int = 0

    normalization_mapping: dict[str, NormalizationMode] = field(
        default_factory=lambda: dict.fromkeys(("STATE", "ENV", "ACTION"), NormalizationMode.IDENTITY)
    )
    compile_model: bool = False  # with torch.compile; the first reset() takes as long as that does
    compile_mode: str = "default"
    rtc_config: RTCConfig | None = None  # real-time chunking, through `predict_action_chunk`

    def validate_features(self) -> None:
        """Checks settings and features. The policy calls it: what is raised while a file is parsed, LeRobot swallows.

        Raises:
            ValueError: something does not fit; one line says what.
        """
        inputs, shape = self.input_features or {}, self.action_feature.shape if self.action_feature else None
        rtc = self.rtc_config is not None and self.rtc_config.enabled
        problems = {
            f"format {self.format_version} is not {FORMAT_VERSION}, which this package reads; export the run again": (
                self.format_version != FORMAT_VERSION
            ),
            f"inputs must be state vectors and images, not {', '.join(inputs) or 'none'}": (
                not inputs or any(f.type not in INPUTS for f in inputs.values())
            ),
            f"inputs {', '.join(inputs)} do not fit: images need an encoder, which needs images": (
                bool(self.encoder_widths) != any(f.type == FeatureType.VISUAL for f in inputs.values())
            ),
            f"it acts in {self.action_dim} dimensions, the robot in {shape}": tuple(shape or ()) != (self.action_dim,),
            f"n_obs_steps = {self.n_obs_steps} must be 1": self.n_obs_steps != 1,
            f"n_action_steps = {self.n_action_steps} must be 1 to {self.chunk_size}, the chunk": (
                not 1 <= self.n_action_steps <= self.chunk_size
            ),
            f"sampler = {self.sampler} is none of {', '.join(SAMPLERS)}": self.sampler not in SAMPLERS,
            f"rank = {self.rank} is neither mean nor min": self.rank not in ("mean", "min"),
            f"best_of_n = {self.best_of_n} and flow_steps = {self.flow_steps} must be at least 1": (
                min(self.best_of_n, self.flow_steps) < 1
            ),
            f"best_of_n = {self.best_of_n} needs critics, and none were exported": self.best_of_n > 1 > self.num_qs,
            "real-time chunking (rtc_config.enabled) needs a flow, and this policy's actions come from none": (
                rtc and self.sampler != "flow"
            ),
        }
        for problem, met in problems.items():
            if met:
                raise ValueError(f"OTQL policy: {problem}")

    @property
    def observation_delta_indices(self) -> None:
        """Only the present observation is used."""

    @property
    def action_delta_indices(self) -> list[int]:
        """The actions of a chunk."""
        return list(range(self.chunk_size))

    @property
    def reward_delta_indices(self) -> None:
        """Rewards are not used."""

    def get_optimizer_preset(self) -> None:
        """There is none.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("OTQL policy: it is trained with main.py of the OTQL code and exported, not here")

    def get_scheduler_preset(self) -> None:
        """There is none."""
