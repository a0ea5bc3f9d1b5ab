"""A stage's base as its files have it: are they whole, and what becomes of a format that keeps them in fewer bits."""

from __future__ import annotations

from posttrain.config.schema import LanguageStage
from posttrain.errors import UserError
from posttrain.models.checkpoints.use import Use, use_of
from posttrain.models.hub import BaseInfo, resolve
from posttrain.models.language.pretrained import check_whole
from posttrain.models.trust import pin_of
from posttrain.stages.language.init import InitSource


def use_of_base(cfg: LanguageStage, base: BaseInfo) -> Use:
    """What becomes of the base's own format."""
    return use_of(resolve(base.path, base.revision, weights=False).directory, cfg.quant, cfg.base_dtype)


def check_checkpoint(cfg: LanguageStage, start: InitSource, base: BaseInfo, weights: bool) -> None:
    """Raises UserError where the base cannot be trained as its checkpoint has it, and where weights are missing in it.

    weights: whether its files are there.
    """
    use = use_of_base(cfg, base)
    use.check(cfg.peft, cfg.train.fsdp)
    if use.kept and use.checkpoint.format and cfg.train.offload == "layers":
        raise UserError(
            f"train.offload: layers that are kept in {use.checkpoint.format.name} do not come and go; say quant=nf4 or "
            "quant=dequantize, or train.offload=none"
        )
    if weights:
        unexpected = "say" if cfg.model.ignore_unexpected else "refuse"
        check_whole(use.checkpoint.directory, start.name, pin_of(cfg.model), unexpected)
