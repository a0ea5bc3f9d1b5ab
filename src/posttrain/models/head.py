"""Log-probabilities of given tokens from hidden states, without the logits of a whole sequence ever in memory."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig


def chunk_logits(device: str) -> int:
    """Logits in memory at a time: on a GPU enough rows that reading the head's weight for them is not what takes the time."""
    return 2**27 if device == "cuda" else 2**22


class Head(NamedTuple):
    """logits = softcap * tanh(scale * (W h + b) / softcap); without a softcap the tanh is left out."""

    weight: Tensor  # [V, H]
    bias: Tensor | None
    scale: float
    softcap: float | None

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, H] -> float32 [n, V]."""
        logits = linear(hidden, self.weight, self.bias).float()
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    @property
    def chunk(self) -> int:
        """Rows of logits to have at a time."""
        return max(1, chunk_logits(self.weight.device.type) // self.weight.shape[0])

    def at(self, temperature: float) -> Head:
        """The head whose logits are this one's over `temperature`."""
        return self._replace(scale=self.scale / temperature, softcap=self.softcap and self.softcap / temperature)


def head_of(output: nn.Linear, config: PretrainedConfig) -> Head:
    """A causal model's head as its config describes it: scale as Cohere or Granite write it, softcap as Gemma."""
    scale = getattr(config, "logit_scale", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    return Head(output.weight, getattr(output, "bias", None), float(scale), getattr(config, "final_logit_softcapping", None))


def token_logprobs(hidden: Tensor, target: Tensor, head: Head, chunk: int | None = None) -> Tensor:
    """log p(target_i | hidden_i): [N, H], int64 [N] -> float32 [N].

    At most `chunk` rows of logits exist at a time. With a frozen head their gradient is formed in the forward, so the
    backward needs no logits; with a trainable one each chunk is computed again in the backward.
    """
    chunk = chunk or head.chunk
    trains = head.weight.requires_grad or (head.bias is not None and head.bias.requires_grad)
    if not (trains and torch.is_grad_enabled()):
        return _FrozenHead.apply(hidden, target, head, chunk)
    pieces = zip(hidden.split(chunk), target.split(chunk), strict=True)
    return torch.cat([_checkpointed(h, t, head) for h, t in pieces])


def _checkpointed(hidden: Tensor, target: Tensor, head: Head) -> Tensor:
    def compute(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        logits = head._replace(weight=weight, bias=bias).logits(hidden)
        return _gather(logits, target) - logits.logsumexp(-1)

    logp = checkpoint(compute, hidden, head.weight, head.bias, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(logp, Tensor)
    return logp


def token_entropies(hidden: Tensor, head: Head) -> Tensor:
    """Entropy of the next token in nats: [N, H] -> float32 [N]. In chunks, each computed again in the backward."""

    def compute(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        logps = head._replace(weight=weight, bias=bias).logits(hidden).log_softmax(-1)
        return -(logps.exp() * logps).sum(-1)

    pieces = hidden.split(head.chunk)
    found = [checkpoint(compute, h, head.weight, head.bias, use_reentrant=False, preserve_rng_state=False) for h in pieces]
    return torch.cat(found)  # pyright: ignore


def _gather(logits: Tensor, target: Tensor) -> Tensor:
    return logits.gather(1, target[:, None])[:, 0]


class _FrozenHead(torch.autograd.Function):
    """Each log-prob depends on its own hidden state only, so [N, H] numbers d logp_i / d h_i are the whole Jacobian."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, target: Tensor, head: Head, chunk: int) -> Tensor:
        logps = torch.empty(len(target), dtype=torch.float32, device=hidden.device)
        jacobian = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(target), chunk):
            rows = slice(start, start + chunk)
            logits = head.logits(hidden[rows])
            total = logits.logsumexp(-1, keepdim=True)
            logps[rows] = _gather(logits, target[rows]) - total[:, 0]
            if jacobian is not None:
                jacobian[rows] = _jacobian(logits, total, target[rows], head)
        ctx.save_for_backward(jacobian)
        return logps

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (jacobian,) = ctx.saved_tensors
        return (grads[0][:, None] * jacobian).to(jacobian.dtype), None, None, None


def _jacobian(logits: Tensor, total: Tensor, target: Tensor, head: Head) -> Tensor:
    """(onehot - softmax) through the softcap, the scale and W: [n, H]. Uses up `logits`."""
    slope = None if head.softcap is None else head.scale * (1 - (logits / head.softcap) ** 2)
    change = logits.sub_(total).exp_().neg_()
    change.scatter_add_(1, target[:, None], torch.ones_like(change[:, :1]))
    change = change.mul_(head.scale if slope is None else slope)
    return change.to(head.weight.dtype) @ head.weight
