"""What a config's `dpo.loss` means: the loss with its settings, the rows that it takes, and what is said of it first."""

from __future__ import annotations

from posttrain.data.row_use import RowUse
from posttrain.losses.preference import ChosenLoss, chosen_loss
from posttrain.stages.dpo.config import Dpo
from posttrain.stages.spec import spec_of

LABELLED = RowUse("dpo", ("prompt_completion", "messages", "pairs"), "labelled", "prompt, completion and label, or pairs")


def loss_of(cfg: Dpo) -> ChosenLoss:
    """The loss of a config. Raises UserError for what it does not have."""
    dpo = cfg.dpo
    return chosen_loss(dpo.loss, dpo.beta, dpo.label_smoothing, dpo.options)


def rows(cfg: Dpo) -> RowUse:
    """Pairs, or for a loss without rivals answers with labels."""
    usual = spec_of(cfg.stage).rows
    assert usual
    return LABELLED if loss_of(cfg).unpaired else usual


def lines(cfg: Dpo) -> list[str]:
    """What a run says of its loss before it begins."""
    return [loss_of(cfg).line()]
