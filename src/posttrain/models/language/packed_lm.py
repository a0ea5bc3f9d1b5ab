"""Causal language models of transformers: loading them, and running packs of documents through them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.distributed import is_initialized
from transformers import Cache, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from posttrain.batch import PackedBatch
from posttrain.config.choices import Kernels
from posttrain.errors import UserError
from posttrain.models.kernels.choice import use_kernels
from posttrain.models.kernels.logprobs import Head, head_of, plain_logprobs, token_logprobs, token_spread
from posttrain.models.kernels.masks import DocumentMask
from posttrain.models.kernels.tiles import TILE, go_in_tiles
from posttrain.models.language.decoder import before_head, cache_names, decoder_of, last_hidden, narrowed
from posttrain.models.language.neftune import check_noise, noisy
from posttrain.models.language.reading import OWN, Packing, choose_reading, forget_lengths, lengths_border
from posttrain.models.offload.activations import ActivationsAway
from posttrain.models.peft import soft_prompts as prompts
from posttrain.models.peft.export import export_adapter
from posttrain.tensors import all_whole

if TYPE_CHECKING:
    from peft import PeftModel


class PackedLM(nn.Module):
    """A causal model, with adapters or without, that reads packs.

    attention: as `model.attention`. packing: as `train.packing`; `reading` says in which way packs are read. kernels: as
    `model.kernels`; `report` says what became of that. Raises UserError for a model that documents would leak through.
    """

    def __init__(self, model: nn.Module, attention: str = "auto", kernels: Kernels = "auto", packing: Packing = "auto") -> None:
        super().__init__()
        self.model = model
        if self.causal.get_output_embeddings() is None:
            raise UserError(
                f"model.name: {type(self.causal).__name__} does not say where its head is; give its language model alone"
            )
        self.before_head = [*before_head(self.causal), partial(narrowed, self.causal)]
        self.prompt_kind = prompts.virtual_of(model)
        self.report = use_kernels(model, kernels)
        self.own_attention = str(self.causal.config._attn_implementation)
        self.plain_head = False  # does it leave out what its config says of its head? (models/language/reading.py finds out)
        self.border = lengths_border(self.causal)
        self.routers: list[tuple[Tensor, ...]] | None = None  # their logits of each pack, while somebody listens
        self.cache_keyword: str | None = None  # found out by the first answers that are written (growing.py)
        self.replays: bool | None = None  # likewise (replayed.py)
        self.sends_away = False  # activations (`train.offload`)
        self.reading = choose_reading(self, attention, packing)
        if self.prompt_kind == "prefix" and self.reading.way != "packed":
            raise UserError(f"peft.method: prefix tuning needs packs, and {self.reading.line}; use peft=lora")

    @property
    def num_layers(self) -> int:
        """Layers of the language model."""
        return self.causal.config.get_text_config().num_hidden_layers

    @property
    def layers(self) -> list[GradientCheckpointingLayer]:
        """The layers that can be recomputed."""
        return [module for module in self.causal.modules() if isinstance(module, GradientCheckpointingLayer)]

    def recompute(self, layers: int, tile: int | None = TILE) -> None:
        """Keep of the first `layers` layers their inputs alone; the backward computes the rest of them again, what can of it in
        tiles of so many tokens (models/kernels/tiles.py)."""
        causal = self.causal  # renamed in transformers 5.2x
        enable = getattr(causal, "activation_checkpointing_enable", causal.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
        for number, layer in enumerate(self.layers):
            layer.gradient_checkpointing = number < layers
            go_in_tiles(layer, tile if number < layers else None)

    @contextmanager
    def without_prompt(self) -> Iterator[None]:
        """Inside, a prompt method's virtual tokens are left out: what the stage was given. All other methods start as that."""
        kind, self.prompt_kind = self.prompt_kind, ""
        try:
            yield
        finally:
            self.prompt_kind = kind

    @contextmanager
    def routed(self) -> Iterator[list[tuple[Tensor, ...]]]:
        """Inside, every pack that is read adds its routers' logits: a tensor [T', experts] a router, tokens as in `hidden`."""
        self.routers = found = []
        try:
            yield found
        finally:
            self.routers = None

    @property
    def causal(self) -> PreTrainedModel:
        """The model of transformers, whose linear layers may carry adapters."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model  # pyright: ignore

    @property
    def units(self) -> list[nn.Module]:
        """The layers that FSDP gathers one at a time."""
        names = set(self.causal._no_split_modules or [])
        return [module for module in self.causal.modules() if type(module).__name__ in names] or list(self.layers)

    def save(self, out_dir: Path, is_writer: bool) -> None:
        """Write the model as `save_pretrained` does. Every process must call it; one of them writes, and holds the weights."""
        causal = self.causal
        state = all_whole(causal.state_dict(keep_vars=True), keep=is_writer)
        if is_writer:
            causal.save_pretrained(out_dir, state_dict=state)

    def save_adapter(self, out_dir: Path, base_path: str, is_writer: bool) -> None:
        """Write the adapter as `export_adapter` does. Every process must call it; one of them writes."""
        export_adapter(cast("PeftModel", self.model), out_dir, base_path, is_writer)

    @property
    def head(self) -> Head:
        """The output head with its scale and softcap."""
        output: Any = self.causal.get_output_embeddings()
        found = head_of(output, self.causal.config.get_text_config())
        return found._replace(scale=1.0, softcap=None) if self.plain_head else found

    def hidden(self, positions: Tensor, mask: DocumentMask, cache: Cache | None = None, **inputs: Any) -> Tensor:
        """Last hidden states [T, H] of one pack. cache: an empty one, to put its keys and values into. inputs: input_ids
        int64 [1, T], or inputs_embeds [1, T, H]."""
        away = self.sends_away and torch.is_grad_enabled()
        with ActivationsAway(self.model) if away else nullcontext():
            hidden, *routers = self._read_by(positions, mask, inputs, cache)
        if self.routers is not None:
            self.routers.append(tuple(routers))
        return hidden

    def _read_by(
        self, positions: Tensor, mask: DocumentMask, inputs: dict[str, Tensor], cache: Cache | None
    ) -> tuple[Tensor, ...]:
        """As `reading` says."""
        if self.reading.way == "joined":
            return self._joined(positions, mask, inputs)
        if self.reading.way in OWN or self._beyond_border(mask):
            return self._rows(mask, inputs)
        kept: dict[str, Any] = {} if cache is None else {cache_names(decoder_of(self.causal))[0]: cache}
        return self._packed(positions, mask, inputs, **kept, use_cache=cache is not None)

    def _run(self, **inputs: Any) -> tuple[Tensor, ...]:
        """Hidden states [tokens, H] of all rows, then the logits [tokens, experts] of each router that is listened to."""
        if self.routers is None:
            return (last_hidden(decoder_of(self.causal)(**inputs), self.before_head).flatten(0, 1),)
        output = decoder_of(self.causal)(**inputs, output_router_logits=True)
        return last_hidden(output, self.before_head).flatten(0, 1), *(logits.flatten(0, -2) for logits in output.router_logits)

    def _packed(self, positions: Tensor, mask: DocumentMask, inputs: dict[str, Tensor], **options: Any) -> tuple[Tensor, ...]:
        # any 4-D mask keeps transformers from making one of its own; ours travels beside it
        none = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=positions.device)
        return self._run(**inputs, attention_mask=none, position_ids=positions, document_mask=mask, **options)

    def _joined(self, positions: Tensor, mask: DocumentMask, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        layout, segments = mask.end_to_end
        places = layout.rows[0].places
        laid = DocumentMask(segments, places.shape[1], mask.device)
        laid.asked = mask.asked
        given = {name: value[:, places[0]] for name, value in inputs.items()}
        found = self._packed(positions[:, places[0]], laid, given, use_cache=False, **laid.borders)
        return tuple(each[layout.home] for each in found)

    def _rows(self, mask: DocumentMask, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        beyond, alone = (0, True) if self.reading.way == "alone" else (self.border, False)
        layout = mask.rows(beyond, at_once=is_initialized() and not alone)  # with FSDP all processes run as many forwards
        found = []
        for places, real, padded in layout.rows:
            if self.border:
                forget_lengths(self.causal)
            given = {name: value[0][places] for name, value in inputs.items()}
            options = {"attention_mask": real} if padded else {}
            run = self._run_on_meta if real.is_meta else self._run
            found.append(run(**given, **options, use_cache=False))
        if self.border:
            forget_lengths(self.causal)
        return tuple(torch.cat(parts)[layout.home] for parts in zip(*found, strict=True))

    def _run_on_meta(self, **options: Any) -> tuple[Tensor, ...]:
        """As `_run`, for a plan: transformers may not ask for values there, so it is given a mask of one value, or the mask as it
        is where the model cannot have that."""
        try:
            return self._run(**options | {"attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device="meta")})
        except ValueError:
            return self._run(**options)

    def _beyond_border(self, mask: DocumentMask) -> bool:
        """Is a document so long that it would change the rotary table of all others?"""
        longest = max(s.stop - s.start + s.prefix_stop - s.prefix_start for s in mask.segments)
        return self.border is not None and longest + mask.size > self.border

    def forward(self, batch: PackedBatch, temperature: float = 1.0, spread: bool = False, noise: float = 0.0) -> Tensor:
        """log p(target | all that its source sees), of the softmax of logits / temperature: float32 [N].

        spread: [3, N], with the two rows of `token_spread` below. noise: NEFTune's alpha.
        """
        hidden, source = self.read(batch, batch.logit_index, noise)
        found = self.logprobs(hidden[source], batch.target, temperature)
        if not spread:
            return found
        return torch.cat([found[None], token_spread(hidden[source], batch.target, found, self.head.at(temperature))])

    def logprobs(self, hidden: Tensor, target: Tensor, temperature: float) -> Tensor:
        """[N, H], int64 [N] -> float32 [N]."""
        compute = token_logprobs if self.report.kernels == "auto" else plain_logprobs
        return compute(hidden, target, self.head.at(temperature))

    def read(self, batch: PackedBatch, places: Tensor, noise: float = 0.0) -> tuple[Tensor, Tensor]:
        """Last hidden states [T', H], and where in them `places` of the pack stand: virtual tokens move them. noise: NEFTune's
        alpha."""
        device, model, kind = batch.tokens.device, self.model, self.prompt_kind
        if kind == "prompt":
            virtual = prompts.soft_prompt(model)
            layout = prompts.insert_virtual(batch.segments, batch.positions, len(virtual))
            embeddings = self._embedded(batch, noise)
            mask = DocumentMask(layout.segments, layout.positions.shape[1], device)
            embedded = prompts.embed(layout, embeddings, virtual)
            return self.hidden(layout.positions, mask, inputs_embeds=embedded), layout.token[places]
        memory = prompts.layer_prefixes(model) if kind == "prefix" else ()
        mask = DocumentMask(batch.segments, batch.size, device, memory)
        inputs: dict[str, Any] = {"inputs_embeds": self._embedded(batch, noise)[None]} if noise else {"input_ids": batch.tokens}
        return self.hidden(batch.positions + mask.size, mask, **inputs), places

    def _embedded(self, batch: PackedBatch, noise: float) -> Tensor:
        if noise:
            check_noise(self.causal)
        return noisy(self.causal.get_input_embeddings()(batch.tokens)[0], batch.segments, noise)
