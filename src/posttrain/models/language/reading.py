"""How a model reads a pack: the fastest way that is proved, when it is loaded, to equal each document alone.

packed    all documents in one row, a prompt once before all its answers
joined    all documents in one row, each with a prompt of its own: for layers that carry a state from token to token, and are
          told where documents begin (`cu_seq_lens_q`, `seq_idx`)
rows      one document a row, padded on the right, through the model's own attention
alone     one document at a time, which every causal model can do: for those that padding changes
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from posttrain.batch import Segment
from posttrain.errors import UserError, first_line, is_out_of_memory
from posttrain.models.kernels.attention import (
    ATTENTION,
    ON_CUDA,
    CannotCompute,
    attention_function,
    attention_windows,
    carries_state,
    ways_of_attention,
)
from posttrain.models.kernels.logprobs import Head
from posttrain.models.kernels.masks import Asked, DocumentMask
from posttrain.models.kernels.usable import obstacle as kernel_obstacle
from posttrain.models.language.precision import in_float32
from posttrain.tensors import first_not_finite

Way = Literal["packed", "joined", "rows", "alone"]
OWN: tuple[Way, ...] = ("rows", "alone")  # ways that keep the model's own attention
Packing = Literal["auto"] | bool

# Mean KL(alone || read) in nats a token that rounding alone may cause, in float32 (of weights in 8 bit, whose products are not).
# Another document in view costs far more.
TOLERATED_KL, TOLERATED_KL_8_BIT = 1e-6, 1e-2
STATE = "its layers carry a state from token to token"
IN_WORDS = {"joined": "documents end to end, no prompt shared", "rows": "one document a row", "alone": "one document at a time"}


@dataclass(frozen=True)
class Reading:
    """way: see above. attention: varlen | flex | documents | dense, or '' for the model's own. why: what kept the model from a
    faster one; '' where nothing did."""

    way: Way
    attention: str
    why: str = ""

    @property
    def line(self) -> str:
        """What people should hear of it; '' where all is as usual."""
        if not self.why:
            return ""
        if self.way == "packed":
            return f"attention is computed by {self.attention} (model.attention=auto): {self.why}"
        return f"the model reads {IN_WORDS[self.way]} (train.packing=auto): {self.why}"

    def record(self) -> dict[str, str]:
        """For a manifest."""
        return {"way": self.way, "attention": self.attention or "its own", "why": self.why}


class Reads(Protocol):
    """What is compared: a model that reads packs in the way that `reading` says. own_attention: what it was loaded with.
    plain_head: whether its head is a product alone, whatever its config says."""

    reading: Reading
    own_attention: str
    training: bool
    plain_head: bool

    @property
    def causal(self) -> PreTrainedModel: ...

    @property
    def head(self) -> Head: ...

    def hidden(self, positions: Tensor, mask: DocumentMask, **inputs: Any) -> Tensor: ...

    def train(self, mode: bool = True) -> Any: ...


def choose_reading(lm: Reads, attention: str, packing: Packing) -> Reading:
    """The first way that is exact. attention: as `model.attention`; packing: as `train.packing`.

    Sets the attention function of the model to that of the way. Raises UserError where what was asked for is not exact.
    Without weights, on the meta device, it is the first way in which the model runs: there is nothing to compare.
    """
    own, obstacles, kind = lm.own_attention, list[str](), type(lm.causal).__name__
    for way in _ways(lm, packing, attention):
        for how in ways_of_attention(attention, lm.causal.device) if way not in OWN else ("",):
            lm.reading = Reading(way, how, "; ".join(dict.fromkeys(obstacles[:1] if way in OWN else obstacles)))
            obstacle = (
                _known_obstacle(lm.causal, way, how) or _set_attention(lm.causal, ATTENTION.get(how, own)) or _difference(lm)
            )
            if not obstacle:
                return lm.reading
            obstacles.append(obstacle if way != "joined" else _of_state(obstacle, lm.causal.device))
            _set_attention(lm.causal, own)
    if packing is True:
        raise UserError(f"train.packing: {kind} cannot be packed: {obstacles[0]}; say train.packing=auto")
    if attention != "auto" and packing == "auto":
        raise UserError(f"model.attention: {kind} cannot be packed by {attention}: {obstacles[0]}; say model.attention=auto")
    raise UserError(f"model.name: {kind} cannot be trained here: {obstacles[-1]}")


def _of_state(obstacle: str, device: torch.device) -> str:
    """Of layers with a state that is the reason; and what would help on a GPU, where transformers names it."""
    return f"{STATE} ({obstacle})" if "Install" in obstacle and device.type == "cuda" else STATE


def _ways(lm: Reads, packing: Packing, attention: str) -> tuple[Way, ...]:
    """Who asks for an attention by name asks for packs."""
    joined: tuple[Way, ...] = ("joined",) if carries_state(lm.causal) else ()
    packed: tuple[Way, ...] = joined or ("packed",)
    if packing is False:
        return OWN
    return packed if packing is True or attention != "auto" else (*packed, *OWN)


def _set_attention(causal: PreTrainedModel, implementation: str) -> str:
    """'' or why the model does not take it."""
    if causal.config._attn_implementation == implementation:
        return ""
    try:
        causal.set_attn_implementation(implementation)
    except (ValueError, ImportError) as error:
        return f"its attention cannot be exchanged ({first_line(error)})"
    return ""


def _known_obstacle(causal: PreTrainedModel, way: Way, how: str) -> str:
    """What is known without running the model: '' or why it cannot be read so."""
    config = causal.config.get_text_config()
    if way in OWN:
        return ""
    if how in ON_CUDA and getattr(config, "attention_dropout", 0.0):
        return f"{how} has no attention dropout, which this model uses"
    if way == "joined" and causal.device.type == "meta":
        return STATE
    try:
        attention_windows(config)
    except ValueError as error:
        return str(error)
    return ""


class _Try(NamedTuple):
    """A short pack of random tokens, and the rows of it that are its three documents."""

    tokens: Tensor
    positions: Tensor
    mask: DocumentMask
    rows: list[Tensor]


def _try(vocabulary: int, device: torch.device) -> _Try:
    """A document of 9 tokens, and a prompt of 7 with answers of 6 and 4: in rows, of 13 with padding."""
    tokens = torch.randint(vocabulary, (1, 26), generator=torch.Generator().manual_seed(0), device="cpu").to(device)
    segments = (Segment(0, 9), Segment(9, 16), Segment(16, 22, 9, 16), Segment(22, 26, 9, 16))
    rows = [[*range(a, b), *range(c, d)] for a, b, c, d in ((0, 9, 9, 9), (9, 16, 16, 22), (9, 16, 22, 26))]
    positions = torch.tensor([[*range(9), *range(13), *range(7, 11)]], device=device)
    return _Try(tokens, positions, DocumentMask(segments, 26, device), [torch.tensor(row, device=device) for row in rows])


@torch.no_grad()
def _difference(lm: Reads) -> str:
    """'' where a pack of short random documents gives what each document alone gives, else what is different.

    Covers every layer and the head's scale and softcap, in float32. Leaves random numbers and training mode as they were.
    Raises UserError for a model that is not causal.
    """
    causal, was_training, kind = lm.causal, lm.training, type(lm.causal).__name__
    words: Any = causal.get_input_embeddings()
    config, implementation = causal.config.get_text_config(), str(causal.config._attn_implementation)
    pack, on_meta = _try(config.vocab_size, causal.device), causal.device.type == "meta"
    lm.train(False)
    try:
        with in_float32(causal) if not on_meta else torch.device("meta"):
            causal.set_attn_implementation(lm.own_attention)
            inputs = [pack.tokens[:, row] for row in pack.rows] if not on_meta else []
            alone = [causal(input_ids=each, use_cache=False).logits[0].double().log_softmax(-1) for each in inputs]
            # varlen and flex compute what dense does, but not in float32, or not without compiling; they are tried by themselves
            causal.set_attn_implementation(ATTENTION["dense"] if lm.reading.attention in ON_CUDA else implementation)
            hidden = lm.hidden(pack.positions, pack.mask, input_ids=pack.tokens)
    except CannotCompute as error:
        return str(error)
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError, AssertionError) as error:
        if is_out_of_memory(error):
            raise
        if "Install" in str(error):  # transformers' own sentence
            return first_line(error)
        if on_meta and (isinstance(error, RuntimeError) or lm.reading.way in OWN):
            return ""  # this device cannot do all that others can: loading will tell
        return f"{kind} does not run {'' if lm.reading.way in OWN else 'on a pack '}({first_line(error)})"
    finally:
        causal.set_attn_implementation(implementation)
        lm.train(was_training)
    if hidden.shape[-1] not in (widths := {config.hidden_size, words.weight.shape[-1]}):  # Reformer
        raise UserError(
            f"model.name: the last hidden states of {kind} are {hidden.shape[-1]} wide, not {max(widths)}: its layers are "
            "reversible, which is not trained here; give another model"
        )
    if lm.reading.way not in OWN and not pack.mask.asked:
        return "its attention is of its own kind, which knows no borders of documents"
    if lm.reading.way not in OWN and [each.window for each in pack.mask.asked] != attention_windows(config):
        return "its attention layers do not say what window they have"
    if on_meta:
        return ""
    if any(bool(each.isnan().any()) for each in alone):
        if broken := first_not_finite([*causal.named_parameters(), *causal.named_buffers()]):
            raise UserError(f"model.name: {broken} holds values that are not finite (NaN, infinity); give weights without")
        return "what it computes is not a number, though its weights are"
    tolerated = TOLERATED_KL_8_BIT if getattr(causal, "is_loaded_in_8bit", False) else TOLERATED_KL
    if not _kl(alone[1][:7], alone[2][:7]) <= tolerated:  # the prompt before two answers
        raise UserError(f"model.name: {kind} is not causal: what it says of a token depends on those after it; give one that is")
    found = dict[bool, float]()
    for lm.plain_head in (False, True):  # Aya Vision's config has its text model's scale, which its own head leaves out
        with torch.autocast(causal.device.type, enabled=False):
            read = lm.head.exact(hidden.float()).double().log_softmax(-1)
        if read.shape[-1] != alone[0].shape[-1]:
            return f"its head gives {alone[0].shape[-1]} logits, and has {read.shape[-1]} rows"
        found[lm.plain_head] = max(_kl(a, read[row]) for a, row in zip(alone, pack.rows, strict=True))
        if found[lm.plain_head] <= tolerated:
            break
    else:
        lm.plain_head = False
    kl = min(found.values())
    if not kl <= tolerated:
        return f"documents would see one another, or the head is computed otherwise (KL {kl:.1e} a token against each alone)"
    return _of_kernel(causal, lm.reading.attention, pack.mask.asked)


def _of_kernel(causal: PreTrainedModel, how: str, asked: Sequence[Asked]) -> str:
    """'' or why this kernel is not for what the model's layers have asked for."""
    if how not in ON_CUDA:
        return ""
    device = causal.device
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else causal.dtype
    return kernel_obstacle(how, asked, dtype, device, attention_function)


def _kl(p: Tensor, q: Tensor) -> float:
    """Mean KL(p || q), of log-probs [n, V]."""
    return float((p.exp() * (p - q)).sum(-1).mean())


def lengths_border(causal: PreTrainedModel) -> int | None:
    """Tokens from which on a document's length changes the table of rotary positions (longrope, dynamic NTK); None: it never
    does."""
    found = []
    config: Any = causal.config.get_text_config()
    parameters = getattr(config, "rope_parameters", None) or {}
    for each in (parameters, *(value for value in parameters.values() if isinstance(value, dict))):
        if each.get("rope_type") == "longrope":
            found.append(each.get("original_max_position_embeddings") or config.max_position_embeddings)
        elif "dynamic" in str(each.get("rope_type")):
            found.append(config.max_position_embeddings)
    return min(found, default=None)


def forget_lengths(causal: PreTrainedModel) -> None:
    """Rotary tables as they are before any long document: transformers lets a dynamic one only grow."""
    module: Any
    for module in causal.modules():
        for name in [n for n in vars(module) if n.endswith("max_seq_len_cached")]:
            prefix = name.removesuffix("max_seq_len_cached")
            original = getattr(module, f"{prefix}original_inv_freq", None)
            if isinstance(original, Tensor) and hasattr(module, "original_max_seq_len"):
                inverse = getattr(module, f"{prefix}inv_freq")
                module.register_buffer(f"{prefix}inv_freq", original.to(inverse.device, copy=True), persistent=False)
                setattr(module, name, module.original_max_seq_len)
