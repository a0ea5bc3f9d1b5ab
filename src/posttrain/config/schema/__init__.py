"""Every config key there is, its type and its bounds: what a composed config is checked against."""

from posttrain.config.schema.basic import Strict
from posttrain.config.schema.data import DataConfig, MixedSource, ReplayConfig, Source
from posttrain.config.schema.language import PpoConfig, RewardConfig
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
    Partial,
    Prefix,
    Prompt,
    Ptuning,
    Targeted,
    Vera,
)
from posttrain.config.schema.stages import STAGE_CONFIG, Cpt, Dpo, Dreambooth, Guarded, LanguageStage, Ppo, Rm, Sft, Stage
from posttrain.config.schema.training import TrainConfig

__all__ = [
    "STAGE_CONFIG",
    "AdaLora",
    "Adapted",
    "Bottleneck",
    "Cpt",
    "DataConfig",
    "Dora",
    "Dpo",
    "Dreambooth",
    "Full",
    "Guarded",
    "Head",
    "LanguageStage",
    "Lora",
    "LoraPlus",
    "Method",
    "MixedSource",
    "Partial",
    "Ppo",
    "PpoConfig",
    "Prefix",
    "Prompt",
    "Ptuning",
    "ReplayConfig",
    "RewardConfig",
    "Rm",
    "Sft",
    "Source",
    "Stage",
    "Strict",
    "Targeted",
    "TrainConfig",
    "Vera",
]
