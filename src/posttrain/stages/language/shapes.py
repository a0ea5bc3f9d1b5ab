"""What a model without weights can refuse: asked before the data is read, by runs and by plans alike."""

from __future__ import annotations

from pathlib import Path

import torch

from posttrain.config.schema import LanguageStage
from posttrain.errors import UserError
from posttrain.models.language.activations import model_of_shapes
from posttrain.models.language.architecture import config_of, require_causal
from posttrain.models.language.packed_lm import PackedLM
from posttrain.models.language.routers import router_coefficient
from posttrain.models.trust import pin_of


def check_shapes(cfg: LanguageStage, directory: Path) -> None:
    """Raises UserError for a base that is not causal, for targets that match nothing, and for a way of attention or packing or
    a loss of routers that is asked for and cannot be had. directory: the base's."""
    config = config_of(directory, pin_of(cfg.model))
    require_causal(config, cfg.model.name)
    try:
        model = model_of_shapes(config, getattr(torch, cfg.base_dtype), cfg.peft)
        with torch.device("meta"):
            lm = PackedLM(model, cfg.model.attention, "reference", cfg.train.packing)
        router_coefficient(lm.causal, cfg.train.router_aux_loss)
    except UserError:
        raise
    except Exception:  # what does not run without values: then loading it will tell
        return
