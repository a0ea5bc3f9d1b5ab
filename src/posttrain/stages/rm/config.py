"""The config of a reward model."""

from __future__ import annotations

from posttrain.config.schema import LanguageStage, RmConfig


class Rm(LanguageStage):
    """Config of `posttrain rm`."""

    rm: RmConfig
