"""Causal language models of transformers: loading them, and running packs of documents through them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from posttrain.batch import PackedBatch, Segment
from posttrain.config.choices import Kernels
from posttrain.errors import UserError
from posttrain.models.kernels.attention import ATTENTION, sliding_windows
from posttrain.models.kernels.choice import use_kernels
from posttrain.models.kernels.logprobs import Head, head_of, plain_logprobs, token_logprobs
from posttrain.models.kernels.masks import DocumentMask
from posttrain.models.language.tokenizer import first_line
from posttrain.models.peft import soft_prompts as prompts
from posttrain.models.peft.export import export_adapter
from posttrain.tensors import whole

if TYPE_CHECKING:
    from peft import PeftModel

# Mean KL(plain || packed) in nats a token that rounding alone may cause. Another document in view costs far more.
TOLERATED_KL = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-2}


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trained, total) parameters; a 4-bit weight counts the parameters that it stands for, a shared one counts once."""
    trained = total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        size = state.shape.numel() if state is not None else parameter.numel()
        total += size
        trained += size if parameter.requires_grad else 0
    return trained, total


class PackedLM(nn.Module):
    """A causal model, with adapters or without, that reads packs.

    attention: documents | flex | dense. kernels: as `model.kernels`; `report` says what became of that. Raises UserError for a
    model that documents would leak through.
    """

    def __init__(self, model: nn.Module, attention: str, kernels: Kernels = "auto") -> None:
        super().__init__()
        self.model = model
        self.prompt_kind = prompts.virtual_of(model)
        self.report = use_kernels(model, kernels)
        if self.causal.device.type != "meta":  # without weights there is nothing to compare
            check_packing(self, attention)
        self.causal.set_attn_implementation(ATTENTION[attention])

    @property
    def num_layers(self) -> int:
        """Layers of the language model."""
        return self.causal.config.get_text_config().num_hidden_layers

    @property
    def layers(self) -> list[GradientCheckpointingLayer]:
        """The layers that can be recomputed."""
        return [module for module in self.causal.modules() if isinstance(module, GradientCheckpointingLayer)]

    def recompute(self, layers: int) -> None:
        """Keep of the first `layers` layers their inputs alone; the backward computes the rest of them again."""
        causal = self.causal  # renamed in transformers 5.2x
        enable = getattr(causal, "activation_checkpointing_enable", causal.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
        for layer in self.layers[layers:]:
            layer.gradient_checkpointing = False

    @contextmanager
    def without_prompt(self) -> Iterator[None]:
        """Inside, a prompt method's virtual tokens are left out: what the stage was given. All other methods start as that."""
        kind, self.prompt_kind = self.prompt_kind, ""
        try:
            yield
        finally:
            self.prompt_kind = kind

    @property
    def causal(self) -> PreTrainedModel:
        """The model of transformers, whose linear layers may carry adapters."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model  # pyright: ignore

    @property
    def _no_split_modules(self) -> list[str]:
        """The layers that FSDP keeps whole, by the name under which accelerate asks for them."""
        return list(self.causal._no_split_modules or [])

    def save(self, out_dir: Path, is_writer: bool) -> None:
        """Write the model as `save_pretrained` does. Every process must call it; one of them writes."""
        copies: dict[int, Tensor] = {}  # a tied weight stays one
        causal = self.causal
        state = {n: copies.setdefault(id(p), whole(p)) for n, p in causal.state_dict(keep_vars=True).items()}
        if is_writer:
            causal.save_pretrained(out_dir, state_dict=state)

    def save_adapter(self, out_dir: Path, base_path: str, is_writer: bool) -> None:
        """Write the adapter as `export_adapter` does. Every process must call it; one of them writes."""
        export_adapter(cast("PeftModel", self.model), out_dir, base_path, is_writer)

    @property
    def head(self) -> Head:
        """The output head with its scale and softcap."""
        output: Any = self.causal.get_output_embeddings()
        return head_of(output, self.causal.config.get_text_config())

    def hidden(self, positions: Tensor, mask: DocumentMask, cache: Cache | None = None, **inputs: Tensor) -> Tensor:
        """Last hidden states [T, H] of one pack. cache: an empty one, to put its keys and values into. inputs: input_ids
        int64 [1, T], or inputs_embeds [1, T, H]."""
        # any 4-D mask keeps transformers from making one of its own; ours travels beside it
        none = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=positions.device)
        output = self.causal.get_decoder()(
            **inputs, attention_mask=none, position_ids=positions, document_mask=mask,
            past_key_values=cache, use_cache=cache is not None,
        )  # fmt: skip
        return output.last_hidden_state[0]

    def forward(self, batch: PackedBatch, temperature: float = 1.0) -> Tensor:
        """log p(target | all that its source sees), of the softmax of logits / temperature: float32 [N]."""
        hidden, source = self.read(batch, batch.logit_index)
        return self.logprobs(hidden[source], batch.target, temperature)

    def logprobs(self, hidden: Tensor, target: Tensor, temperature: float) -> Tensor:
        """[N, H], int64 [N] -> float32 [N]."""
        compute = token_logprobs if self.report.kernels == "auto" else plain_logprobs
        return compute(hidden, target, self.head.at(temperature))

    def read(self, batch: PackedBatch, places: Tensor) -> tuple[Tensor, Tensor]:
        """Last hidden states [T', H], and where in them `places` of the pack stand: virtual tokens move them."""
        device, model, kind = batch.tokens.device, self.model, self.prompt_kind
        if kind == "prompt":
            virtual = prompts.soft_prompt(model)
            layout = prompts.insert_virtual(batch.segments, batch.positions, len(virtual))
            embeddings = self.causal.get_input_embeddings()(batch.tokens)[0]
            mask = DocumentMask(layout.segments, layout.positions.shape[1], device)
            inputs = prompts.embed(layout, embeddings, virtual)
            return self.hidden(layout.positions, mask, inputs_embeds=inputs), layout.token[places]
        memory = prompts.layer_prefixes(model) if kind == "prefix" else ()
        mask = DocumentMask(batch.segments, batch.size, device, memory)
        return self.hidden(batch.positions + mask.size, mask, input_ids=batch.tokens), places


@torch.no_grad()
def check_packing(lm: PackedLM, attention: str) -> None:
    """Compare a pack of short random documents with each document alone; UserError where one could see another.

    Covers every layer and the head's scale and softcap. Leaves random numbers and training mode as they were.
    """
    causal, was_training = lm.causal, lm.training
    config = causal.config.get_text_config()
    windows = sliding_windows(config)
    if attention == "flex" and getattr(config, "attention_dropout", 0.0):
        raise UserError("model.attention: flex has no attention dropout, which this model uses; use documents")
    tokens = torch.randint(config.vocab_size, (1, 27), generator=torch.Generator().manual_seed(0)).to(causal.device)
    segments = (Segment(0, 9), Segment(9, 16), Segment(16, 22, 9, 16), Segment(22, 27, 9, 16))
    rows = [torch.tensor([*range(a, b), *range(c, d)]) for a, b, c, d in ((0, 9, 9, 9), (9, 16, 16, 22), (9, 16, 22, 27))]
    positions = torch.tensor([[*range(9), *range(13), *range(7, 12)]], device=causal.device)
    mask = DocumentMask(segments, 27, causal.device)
    lm.eval()
    alone = [causal(input_ids=tokens[:, row], use_cache=False).logits[0].double().log_softmax(-1) for row in rows]
    try:
        # flex computes what dense does, but compiles for a while
        causal.set_attn_implementation(ATTENTION["dense" if attention == "flex" else attention])
        packed = lm.head.logits(lm.hidden(positions, mask, input_ids=tokens)).double().log_softmax(-1)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"model.name: {type(causal).__name__} cannot be packed ({first_line(error)})") from error
    finally:
        lm.train(was_training)
    kl = max(float((a.exp() * (a - packed[row])).sum(-1).mean()) for a, row in zip(alone, rows, strict=True))
    rounds = torch.bfloat16 if getattr(causal, "is_quantized", False) else causal.dtype
    if mask.windows != windows or not kl <= TOLERATED_KL[rounds]:
        raise UserError(
            f"model.name: in a pack, documents would see one another in {type(causal).__name__} "
            f"(KL {kl:.1e} a token against each alone); use a model of plain attention"
        )
