"""Every config key there is, its type and its bounds: what a composed config is checked against."""

from posttrain.config.schema.basic import Rate, Strict
from posttrain.config.schema.data import DataConfig, MixedSource, ReplayConfig, SourceConfig
from posttrain.config.schema.images import DreamboothConfig, DriftConfig, ImageData, PriorConfig, SampleConfig
from posttrain.config.schema.language import DpoConfig, PpoConfig, RewardConfig, RmConfig, RolloutConfig
from posttrain.config.schema.model import (
    AdaLora,
    Adapted,
    Bottleneck,
    Dora,
    Full,
    Head,
    Lora,
    LoraPlus,
    Method,
    Nf4,
    Partial,
    Prefix,
    Prompt,
    Ptuning,
    Targeted,
    Vera,
)
from posttrain.config.schema.stages import Conversational, Guarded, LanguageStage, Stage
from posttrain.config.schema.training import TrainConfig

__all__ = [
    "AdaLora",
    "Adapted",
    "Bottleneck",
    "Conversational",
    "DataConfig",
    "Dora",
    "DpoConfig",
    "DreamboothConfig",
    "DriftConfig",
    "Full",
    "Guarded",
    "Head",
    "ImageData",
    "LanguageStage",
    "Lora",
    "LoraPlus",
    "Method",
    "MixedSource",
    "Nf4",
    "Partial",
    "PpoConfig",
    "Prefix",
    "PriorConfig",
    "Prompt",
    "Ptuning",
    "Rate",
    "ReplayConfig",
    "RewardConfig",
    "RmConfig",
    "RolloutConfig",
    "SampleConfig",
    "SourceConfig",
    "Stage",
    "Strict",
    "Targeted",
    "TrainConfig",
    "Vera",
]
