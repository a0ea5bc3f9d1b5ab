"""Every config key there is, its type and its bounds: what a composed config is checked against."""

from posttrain.config.fields import Rate, Strict
from posttrain.config.schema.data import DataConfig, MixedSource, ReplayConfig, SourceConfig
from posttrain.config.schema.images import DreamboothConfig, DriftConfig, ImageData, PriorConfig, SampleConfig
from posttrain.config.schema.language import DpoConfig, PpoConfig, RewardConfig, RmConfig, RolloutConfig, SftConfig
from posttrain.config.schema.stages import Conversational, Guarded, LanguageStage, Stage
from posttrain.config.schema.training import TrackConfig, TrainConfig

__all__ = [
    "Conversational",
    "DataConfig",
    "DpoConfig",
    "DreamboothConfig",
    "DriftConfig",
    "Guarded",
    "ImageData",
    "LanguageStage",
    "MixedSource",
    "PpoConfig",
    "PriorConfig",
    "Rate",
    "ReplayConfig",
    "RewardConfig",
    "RmConfig",
    "RolloutConfig",
    "SampleConfig",
    "SftConfig",
    "SourceConfig",
    "Stage",
    "Strict",
    "TrackConfig",
    "TrainConfig",
]
