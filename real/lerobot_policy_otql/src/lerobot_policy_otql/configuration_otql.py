"""Settings of the policy, stored in `config.json` of an exported directory."""

from dataclasses import dataclass, field

from lerobot.configs import FeatureType, NormalizationMode, PreTrainedConfig
from lerobot.policies.rtc.configuration_rtc import RTCConfig

FORMAT_VERSION = 1  # of exported directories
INPUTS = (FeatureType.STATE, FeatureType.ENV, FeatureType.VISUAL)
SAMPLERS = ("flow", "one_step", "estimate", "ddpm")


@PreTrainedConfig.register_subclass("otql")
@dataclass
class OtqlConfig(PreTrainedConfig):
    """Settings written by the export; some can be changed on the command line (`--policy.<field>=<value>`).

    The state is the concatenation of the state features of `input_features` in their order; the cameras are the image
    features in theirs, each with its shape [3, h, w] in training, whatever the size of the robot's images. Can be
    changed: device, n_action_steps, best_of_n (above 1 only with critics), flow_steps (of a flow), compile_model and
    compile_mode, rtc_config.
    """

    format_version: int = FORMAT_VERSION
    action_dim: int = 1  # A; as the action of the dataset or environment
    chunk_size: int = 1  # H, actions per chunk
    n_action_steps: int = 1  # executed actions of a chunk

    # 'flow': Euler steps; 'one_step': one pass; 'estimate' and 'ddpm': a diffusion policy's reverse process.
    sampler: str = "flow"
    flow_steps: int = 10  # NFE of a flow, steps of a diffusion
    actor_hidden_dims: list[int] = field(default_factory=list)
    step_input: bool = False  # whether the flow gets the size of the step
    source: bool = False  # whether a flow starts from a normal that depends on the observation, not from N(0, I)
    source_hidden_dims: list[int] = field(default_factory=list)
    noise_scale: float = 1.0  # factor of the deviation of the start
    time_dim: int = 0  # Fourier features of a diffusion's time
    latent_scale: float = 0.0  # above 0: bound on start points, drawn by a latent policy
    # If any: hidden layers of a policy that chooses the start on the sphere of radius √d, without noise.
    sphere_hidden_dims: list[int] = field(default_factory=list)
    standardised: bool = False  # whether the actor gets the state standardised by the training data
    edit_scale: float = 0.0  # above 0: bound on the edits of an edit policy
    guidance_coef: float = 0.0  # above 0: weight of the guidance by the critics' gradient ...
    inv_temp: float = 0.0  # ... and factor of that gradient
    best_of_n: int = 1  # N, candidates
    rank: str = "mean"  # statistic of the critics that ranks candidates: 'mean' or 'min'
    num_qs: int = 0  # number of exported critics
    value_hidden_dims: list[int] = field(default_factory=list)

    # Image encoder, if any: side of a patch, widths of the stacks, residual blocks per stack, features.
    encoder_patch: int = 1
    encoder_widths: list[int] = field(default_factory=list)
    encoder_blocks: int = 0
    encoder_features: int = 0

    normalization_mapping: dict[str, NormalizationMode] = field(
        default_factory=lambda: dict.fromkeys(("STATE", "ENV", "ACTION"), NormalizationMode.IDENTITY)
    )
    compile_model: bool = False  # use torch.compile, in the first reset()
    compile_mode: str = "default"
    rtc_config: RTCConfig | None = None  # real-time chunking, through `predict_action_chunk`

    # Of the training data, for what is checked before a robot moves: names of states and actions in their order, frames
    # per second (0: unknown), and the type of the robot, in whose units states and actions are.
    state_names: list[str] = field(default_factory=list)
    action_feature_names: list[str] | None = None
    fps: float = 0.0
    robot_type: str | None = None
    push_to_hub: bool = False

    def validate_features(self) -> None:
        """Checks settings and features; called by the policy, as LeRobot swallows errors raised while parsing a file.

        Raises:
            ValueError: with one line, if they are inconsistent.
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
        """Returns None: only the current observation is used."""

    @property
    def action_delta_indices(self) -> list[int]:
        """Returns the indices of the actions of a chunk."""
        return list(range(self.chunk_size))

    @property
    def reward_delta_indices(self) -> None:
        """Returns None: rewards are not used."""

    def get_optimizer_preset(self) -> None:
        """Raises NotImplementedError, as the policy is not trained here."""
        raise NotImplementedError("OTQL policy: it is trained with main.py of the OTQL code and exported, not here")

    def get_scheduler_preset(self) -> None:
        """Returns None, as the policy is not trained here."""
