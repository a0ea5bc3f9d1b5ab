"""What is asked of a language model about a batch: the likelihood of tokens, and which of two answers is likelier."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from posttrain.batch import LossOutput, PackedBatch
from posttrain.data.collate import pack, pack_labelled, pack_pairs
from posttrain.losses.answers import labelled_likelihood
from posttrain.losses.reward import likelihood_preference
from posttrain.losses.tokens import answer_sums, token_loss
from posttrain.training.objective import Objective


def _tokens(module: nn.Module, batch: PackedBatch) -> LossOutput:
    logps = module(batch)
    found = token_loss(logps, batch.weight)
    if torch.is_grad_enabled():
        return found
    both = {"loss": -batch.weight * logps, "loss_count": batch.weight}
    return replace(found, rows={name: answer_sums(each, batch.sequence_id, batch.num_answers) for name, each in both.items()})


def _likelihood(module: nn.Module, batch: PackedBatch) -> LossOutput:
    logps = answer_sums(module(batch), batch.sequence_id, batch.num_answers)
    return likelihood_preference(logps, answer_lengths(batch))


def answer_lengths(batch: PackedBatch) -> torch.Tensor:
    """float32 [num_answers]: tokens of each answer that count."""
    return answer_sums(torch.ones_like(batch.weight), batch.sequence_id, batch.num_answers)


def _labelled(module: nn.Module, batch: PackedBatch) -> LossOutput:
    mean = (answer_sums(module(batch), batch.sequence_id, batch.num_answers) / answer_lengths(batch)).detach()
    return labelled_likelihood(mean, batch.extra["margin"] > 0)


TOKENS = Objective(pack, _tokens, perplexity=True)  # next token on the tokens that count: cpt and sft
LIKELIHOOD = Objective(pack_pairs, _likelihood)  # preference by likelihood a token: what `eval` asks of pairs
LABELLED = Objective(pack_labelled, _labelled)  # likelihood a token by label: what `eval` asks of labelled answers
