"""The router's auxiliary loss beside a stage's own, and how evenly experts are taken."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from posttrain.batch import LossOutput, PackedBatch
from posttrain.errors import UserError
from posttrain.losses.router import router_balance
from posttrain.models.language.packed_lm import PackedLM
from posttrain.models.language.routers import experts_a_token
from posttrain.training.objective import LossFunction


def with_balance(loss: LossFunction[PackedBatch], lm: PackedLM, coefficient: float) -> LossFunction[PackedBatch]:
    """`loss` of a mixture of experts, with coefficient * balance * batch.loss_denominator added; itself for other models.

    So a step's loss is that of transformers, mean + coefficient * balance. Each micro-batch has a balance of its own, and a step
    of several has their mean, weighted by what counts: the one part of a loss where 8 micro-batches of one are not one of 8.
    All tokens of a pack count, a shared prompt once. lm: the model in `module`, which may be wrapped.
    """
    top_k = experts_a_token(lm.causal)
    if not top_k:
        return loss

    def balanced(module: nn.Module, batch: PackedBatch) -> LossOutput:
        with lm.routed() as packs:
            output = loss(module, batch)
        layers = [logits for pack in packs for logits in pack]
        if not layers and coefficient:
            raise UserError("train.router_aux_loss: no layer of this model has a router; say train.router_aux_loss=0")
        if not layers:
            return output
        balance, load = router_balance(layers, top_k)
        count = batch.loss_denominator
        metrics = {**output.metrics, "router_load": (load * count, count)}
        if not coefficient:
            return replace(output, metrics=metrics)
        metrics["router_aux"] = (balance.detach() * count, count)
        return replace(output, total=output.total + coefficient * count * balance, metrics=metrics)

    return balanced
