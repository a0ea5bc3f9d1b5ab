"""Log-probabilities of given tokens from hidden states, without the logits of a whole sequence ever in memory.

`token_logprobs` goes tile by tile and has a backward of its own; `plain_logprobs` is its plain reference.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig

# of a config: what logits are multiplied by (Cohere, Muse), divided by (Granite, Inkling), and capped at (Gemma, xLSTM, Griffin)
SCALES, DIVISORS = ("logit_scale", "output_multiplier"), ("logits_scaling", "logits_mup_width_multiplier")
SOFTCAP = re.compile(r"(final_|output_)?logits?_soft_?cap(ping)?")  # others are of attention's scores, gates and routers
WIDENED = 2**13  # words whose weights are in float32 at a time, for a comparison


def block(device: str) -> tuple[int, int]:
    """(positions, words) whose logits are in memory at a time: on a CPU what its caches hold, on a GPU what keeps it busy."""
    return (2**13, 2**14) if device == "cuda" else (2**10, 2**11)


def chunk_logits(device: str) -> int:
    """Logits in memory at a time."""
    rows, words = block(device)
    return rows * words


def head_bytes(weight: Tensor, tokens: int, device: str) -> float:
    """The most that `token_logprobs` and its backward hold at a time beside a head's weight [V, H] and its gradient: hidden
    states, a tile of logits in both precisions, what is carried from tile to tile. device: its kind, whatever the weight's is."""
    (vocabulary, width), itemsize, trained = weight.shape, weight.itemsize, weight.requires_grad
    rows, words = (min(most, there) for most, there in zip(block(device), (tokens, vocabulary), strict=True))
    whole, some = float(tokens * width), float(rows * width)
    tile = rows * words * (4.0 + itemsize * (itemsize < 4))
    held = 2 * itemsize * whole + 8.0 * tokens  # as the body gives them, those that count, and two numbers of each
    forward = itemsize * whole * (not trained) + (8 + itemsize) * some + tile
    backward = 4 * whole + itemsize * (vocabulary * width + some) + (4.0 + itemsize) * words * width + tile
    return held + (max(forward, backward) if trained else forward)


class Head(NamedTuple):
    """logits = softcap * tanh(scale * (W h + b) / softcap); without a softcap the tanh is left out."""

    weight: Tensor  # [V, H]
    bias: Tensor | None
    scale: float
    softcap: float | None

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, H] -> float32 [n, V]."""
        return self.shaped(linear(hidden, self.weight, self.bias).float())

    def exact(self, hidden: Tensor) -> Tensor:
        """As `logits`, of float32 [n, H] and with every product in float32; the weight is widened a tile at a time."""
        tiles = (tile for _, tile in self.tiles(WIDENED))
        parts = [linear(hidden, each.weight.float(), None if each.bias is None else each.bias.float()) for each in tiles]
        return self.shaped(torch.cat(parts, -1))

    def shaped(self, products: Tensor) -> Tensor:
        """Logits of W h + b."""
        scaled = products if self.scale == 1.0 else products * self.scale
        return scaled if self.softcap is None else self.softcap * torch.tanh(scaled / self.softcap)

    def slope(self, logits: Tensor) -> float | Tensor:
        """d logit / d (W h + b), a number for all where there is no softcap."""
        return self.scale if self.softcap is None else self.scale * (1 - (logits / self.softcap) ** 2)

    def tiles(self, words: int) -> Iterator[tuple[int, Head]]:
        """(first word, the head of the `words` words from it) up to the end of the vocabulary."""
        for start in range(0, len(self.weight), words):
            part = slice(start, start + words)
            yield start, self._replace(weight=self.weight[part], bias=None if self.bias is None else self.bias[part])

    @property
    def chunk(self) -> int:
        """Rows of logits to have at a time."""
        return max(1, chunk_logits(self.weight.device.type) // self.weight.shape[0])

    def at(self, temperature: float) -> Head:
        """The head whose logits are this one's over `temperature`."""
        return self._replace(scale=self.scale / temperature, softcap=self.softcap and self.softcap / temperature)


def head_of(output: nn.Linear, config: PretrainedConfig) -> Head:
    """A causal model's head as its config describes it, under the names that model families have for it."""
    scale = math.prod(getattr(config, name, None) or 1.0 for name in SCALES)
    scale /= math.prod(getattr(config, name, None) or 1.0 for name in DIVISORS)
    softcap = next((value for name, value in vars(config).items() if SOFTCAP.fullmatch(name) and value), None)
    return Head(output.weight, getattr(output, "bias", None), float(scale), softcap)


def token_logprobs(hidden: Tensor, target: Tensor, head: Head, rows: int | None = None, words: int | None = None) -> Tensor:
    """log p(target_i | hidden_i): [N, H], int64 [N] -> float32 [N].

    Logits exist for `rows` positions and `words` words at a time; their sum is carried from tile to tile (Milakov and Gimelshein
    2018, arXiv 1805.02867). With a frozen head the gradient is formed in the forward, so the backward needs no logits; with a
    trainable one the backward computes them again.
    """
    size = block(head.weight.device.type)
    return _Logprobs.apply(hidden, head.weight, head.bias, target, head, (rows or size[0], words or size[1]))


def plain_logprobs(hidden: Tensor, target: Tensor, head: Head) -> Tensor:
    """`token_logprobs` by log_softmax and gather, with autograd's own backward: the reference."""
    return _by_chunks(lambda logps, words: logps.gather(1, words[:, None])[:, 0], hidden, head, target)


def token_entropies(hidden: Tensor, head: Head) -> Tensor:
    """Entropy of the next token in nats: [N, H] -> float32 [N]."""
    return _by_chunks(lambda logps: -(logps.exp() * logps).sum(-1), hidden, head)


def token_spread(hidden: Tensor, target: Tensor, logps: Tensor, head: Head) -> Tensor:
    """[2, N]: the mean log-prob of all words, and log Z, the log of the sum of exp(logit). logps: of the targets [N].

    log Z is the target's logit less its log-prob, and the mean of logits that are linear is one product with the mean word: no
    logits are needed beside those of `token_logprobs`.
    """
    products = (hidden.float() * head.weight[target].float()).sum(-1)
    partition = head.shaped(products if head.bias is None else products + head.bias[target].float()) - logps
    if head.softcap is not None:
        return torch.stack([_by_chunks(lambda all_logps: all_logps.mean(-1), hidden, head), partition])
    mean = hidden.float() @ head.weight.mean(0, dtype=torch.float32)
    mean = mean if head.bias is None else mean + head.bias.float().mean()
    return torch.stack([head.shaped(mean) - partition, partition])


def _by_chunks(figure: Callable[..., Tensor], hidden: Tensor, head: Head, *others: Tensor) -> Tensor:
    """figure(log-probs of all words [n, V], `others`) of all rows, in chunks of n, each computed again in the backward."""

    def compute(hidden: Tensor, weight: Tensor, bias: Tensor | None, *others: Tensor) -> Tensor:
        return figure(head._replace(weight=weight, bias=bias).logits(hidden).log_softmax(-1), *others)

    options: Any = {"use_reentrant": False, "preserve_rng_state": False}
    pieces = zip(*(x.split(head.chunk) for x in (hidden, *others)), strict=True)
    found = [checkpoint(compute, some, head.weight, head.bias, *more, **options) for some, *more in pieces]
    return torch.cat(found)  # pyright: ignore


class _Logprobs(torch.autograd.Function):
    """Each log-prob depends on its own hidden state only, so with a frozen head the [N, H] numbers d logp_i / d h_i are the whole
    Jacobian."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, head: Head, size: tuple[int, int]
    ) -> Tensor:
        ctx.trains = any(ctx.needs_input_grad[1:3])
        pulled = ctx.needs_input_grad[0] and not ctx.trains
        own, logps = torch.empty(2, len(target), dtype=torch.float32, device=hidden.device)
        jacobian = torch.empty_like(hidden) if pulled else None
        for start in range(0, len(target), size[0]):
            rows = slice(start, start + size[0])
            own[rows], logps[rows], found = _forward(hidden[rows], target[rows], head, size[1], pulled)
            if jacobian is not None and found is not None:
                jacobian[rows] = found
            del found
        ctx.head, ctx.size = head, size
        ctx.save_for_backward(*((hidden, weight, bias, target, own - logps) if ctx.trains else (jacobian,)))
        return logps

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.trains:
            hidden, weight, bias, target, total = ctx.saved_tensors
            head = ctx.head._replace(weight=weight, bias=bias)
            return *_backward(grads[0], hidden, target, total, head, ctx.size), None, None, None
        (jacobian,) = ctx.saved_tensors
        return (grads[0][:, None] * jacobian).to(jacobian.dtype), None, None, None, None, None


def _forward(hidden: Tensor, target: Tensor, head: Head, words: int, pulled: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logit and log-prob of each target [n], and where it is asked for d logp / d hidden [n, H].

    The target itself is kept out of the sums: 1 - p, small where the model is sure, is then no difference of two big numbers.
    """
    weight = head.weight[target].float()
    products = (hidden.float() * weight).sum(-1, keepdim=True)
    own = head.shaped(products if head.bias is None else products + head.bias[target, None])
    top, others = own, torch.zeros_like(own)  # highest logit so far, and the sum of exp(logit - top)
    pull = torch.zeros_like(weight) if pulled else None
    for start, part in head.tiles(words):
        logits = part.logits(hidden)
        slope = part.slope(logits) if pulled else 0.0
        _add_to_own(logits, target - start, -torch.inf)
        higher = torch.maximum(top, logits.amax(-1, keepdim=True))
        shrink, top = (top - higher).exp_(), higher
        chances = logits.sub_(top).exp_()
        others = others * shrink + chances.sum(-1, keepdim=True)
        if pull is not None:
            pull.mul_(shrink).add_(chances.mul_(slope).to(part.weight.dtype) @ part.weight)
        del logits, chances, slope  # or they would be there while the next tile is made
    total = others + (own - top).exp_()
    if pull is not None:
        pull = weight.mul_(others * head.slope(own)).sub_(pull).div_(total)
    return own[:, 0], (own - top - total.log())[:, 0], pull


def _backward(
    grad: Tensor, hidden: Tensor, target: Tensor, total: Tensor, head: Head, size: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of hidden, W and b, from those of the log-probs [N]. total: log of the sum of exp(logit), [N]."""
    of_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    of_weight, of_bias = torch.empty_like(head.weight), None if head.bias is None else torch.empty_like(head.bias)
    for start, part in head.tiles(size[1]):
        at = slice(start, start + size[1])
        wide = torch.zeros(part.weight.shape, dtype=torch.float32, device=hidden.device)
        long = wide.new_zeros(len(wide))
        for first in range(0, len(target), size[0]):
            rows = slice(first, first + size[0])
            logits = part.logits(hidden[rows])
            slope = part.slope(logits)
            change = logits.sub_(total[rows, None]).exp_().neg_()
            _add_to_own(change, target[rows] - start, 1.0)
            change = change.mul_(grad[rows, None] * slope)
            long += change.sum(0)
            change = change.to(part.weight.dtype)
            of_hidden[rows] += change @ part.weight
            wide += change.T @ hidden[rows]
            del logits, change, slope  # or they would be there while the next tile is made
        of_weight[at] = wide
        if of_bias is not None:
            of_bias[at] = long
    return of_hidden.to(hidden.dtype), of_weight, of_bias


def _add_to_own(values: Tensor, at: Tensor, number: float) -> None:
    """values[i, at_i] += number, in the rows whose place lies in this tile; no GPU is asked which rows these are."""
    inside = (at >= 0) & (at < values.shape[1])
    numbers = torch.zeros_like(values[:, :1]).masked_fill_(inside[:, None], number)
    values.scatter_add_(1, at.clamp(0, values.shape[1] - 1)[:, None], numbers)
