"""Pre- and postprocessing: normalisation with stored statistics; an exported directory contains both pipelines."""

from typing import Any, TypeAlias

import torch
from lerobot.processor import (
    AddBatchDimensionProcessorStep,
    DeviceProcessorStep,
    NormalizerProcessorStep,
    PolicyAction,
    PolicyProcessorPipeline,
    RenameObservationsProcessorStep,
    UnnormalizerProcessorStep,
)
from lerobot.processor.converters import policy_action_to_transition, transition_to_policy_action
from lerobot.utils.constants import POLICY_POSTPROCESSOR_DEFAULT_NAME, POLICY_PREPROCESSOR_DEFAULT_NAME

from lerobot_policy_otql.configuration_otql import OtqlConfig

Preprocessor: TypeAlias = PolicyProcessorPipeline[dict[str, Any], dict[str, Any]]
Postprocessor: TypeAlias = PolicyProcessorPipeline[PolicyAction, PolicyAction]


def make_otql_pre_post_processors(
    config: OtqlConfig, dataset_stats: dict[str, dict[str, torch.Tensor]] | None = None
) -> tuple[Preprocessor, Postprocessor]:
    """Makes both pipelines; real/export.py writes what their `save_pretrained` would.

    Args:
        config: its `normalization_mapping` is applied.
        dataset_stats: feature → statistic → [width]; features without statistics stay unchanged.
    """
    features = {**config.input_features, **config.output_features}
    norm_map = config.normalization_mapping
    before = [
        RenameObservationsProcessorStep(rename_map={}),
        AddBatchDimensionProcessorStep(),
        DeviceProcessorStep(device=config.device),
        NormalizerProcessorStep(features=features, norm_map=norm_map, stats=dataset_stats, device=config.device),
    ]
    after = [
        UnnormalizerProcessorStep(features=config.output_features, norm_map=norm_map, stats=dataset_stats),
        DeviceProcessorStep(device="cpu"),
    ]
    return (
        PolicyProcessorPipeline(steps=before, name=POLICY_PREPROCESSOR_DEFAULT_NAME),
        PolicyProcessorPipeline(
            steps=after,
            name=POLICY_POSTPROCESSOR_DEFAULT_NAME,
            to_transition=policy_action_to_transition,
            to_output=transition_to_policy_action,
        ),
    )
