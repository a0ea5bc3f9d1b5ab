"""What a model without weights can refuse: asked before the data is read, by runs and by plans alike."""

from __future__ import annotations

from pathlib import Path

import torch

from posttrain.config.interfaces import Method
from posttrain.config.schema import LanguageStage
from posttrain.errors import UserError
from posttrain.models.language.activations import model_of_shapes
from posttrain.models.language.architecture import config_of, require_causal
from posttrain.models.language.packed_lm import PackedLM
from posttrain.models.language.reading import IN_WORDS
from posttrain.models.language.routers import router_coefficient
from posttrain.models.trust import pin_of
from posttrain.stages.spec import spec_of
from posttrain.training.optimizer import group_rates


def check_shapes(cfg: LanguageStage, directory: Path, trains_rows: bool = False) -> None:
    """Raises UserError for a base that is not causal, for targets and groups of rates that match nothing, and for a way of
    attention or packing or a loss of routers that is asked for and cannot be had. directory: the base's. trains_rows: are there
    rows of the embedding to be trained, which are not seen here?"""
    config = config_of(directory, pin_of(cfg.model))
    require_causal(config, cfg.model.name)
    try:
        model = model_of_shapes(config, getattr(torch, cfg.base_dtype), cfg.peft)
        with torch.device("meta"):
            lm = PackedLM(model, cfg.model.attention, "reference", cfg.train.packing)
        router_coefficient(lm.causal, cfg.train.router_aux_loss)
        check_packs(lm, cfg.peft)
        if cfg.optim.lr_groups and not trains_rows:
            with torch.device("meta"):
                seen = spec_of(cfg.stage).plan_of().trained_module(cfg, lm)
            group_rates(seen, cfg.peft.rate_of, 1.0, cfg.optim.lr_groups)
    except UserError:
        raise
    except Exception:  # what does not run without values: then loading it will tell
        return


def check_packs(lm: PackedLM, method: Method) -> None:
    """Raises UserError where first values are read from packs (`peft.init`), and the model reads none."""
    if method.reads in ("rows", "loss") and lm.reading.way != "packed":
        how = IN_WORDS[lm.reading.way]
        raise UserError(
            f"peft.init: what is trained by {method.named} begins by packs, and the model reads {how}; say peft.init=default"
        )
