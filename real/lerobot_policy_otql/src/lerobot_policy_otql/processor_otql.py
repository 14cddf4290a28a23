"""Pre- and postprocessing: normalisation with stored statistics; an exported directory contains both pipelines."""

from typing import Any, TypeAlias

import torch
from lerobot.processor import (
    PolicyAction,
    PolicyProcessorPipeline,
    make_default_policy_processor_steps,
    make_policy_processor_pipelines,
)

from lerobot_policy_otql.configuration_otql import OtqlConfig

Preprocessor: TypeAlias = PolicyProcessorPipeline[dict[str, Any], dict[str, Any]]
Postprocessor: TypeAlias = PolicyProcessorPipeline[PolicyAction, PolicyAction]


def make_otql_pre_post_processors(
    config: OtqlConfig, dataset_stats: dict[str, dict[str, torch.Tensor]] | None = None
) -> tuple[Preprocessor, Postprocessor]:
    """Makes both pipelines.

    Args:
        config: its `normalization_mapping` is applied.
        dataset_stats: feature → statistic → [width]; features without statistics stay unchanged.
    """
    steps = make_default_policy_processor_steps(config, dataset_stats)
    before = [steps.rename_observations, steps.add_batch_dim, steps.to_device, steps.normalize]
    return make_policy_processor_pipelines(before, [steps.unnormalize, steps.to_cpu])
