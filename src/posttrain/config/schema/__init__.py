"""Every config key there is, its type and its bounds: what a composed config is checked against."""

from posttrain.config.fields import Strict
from posttrain.config.schema.data import DataConfig, MixedSource, ReplayConfig, Source
from posttrain.config.schema.language import PpoConfig, RewardConfig
from posttrain.config.schema.stages import (
    STAGE_CONFIG,
    STAGES,
    Cpt,
    Dpo,
    Dreambooth,
    Guarded,
    LanguageStage,
    Ppo,
    Rm,
    Sft,
    Stage,
)
from posttrain.config.schema.training import TrainConfig

__all__ = [
    "STAGES",
    "STAGE_CONFIG",
    "Cpt",
    "DataConfig",
    "Dpo",
    "Dreambooth",
    "Guarded",
    "LanguageStage",
    "MixedSource",
    "Ppo",
    "PpoConfig",
    "ReplayConfig",
    "RewardConfig",
    "Rm",
    "Sft",
    "Source",
    "Stage",
    "Strict",
    "TrainConfig",
]
