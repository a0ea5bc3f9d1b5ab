"""The config of direct preference optimisation."""

from __future__ import annotations

from posttrain.config.schema import DpoConfig, Guarded


class Dpo(Guarded):
    """Config of `posttrain dpo`."""

    dpo: DpoConfig
