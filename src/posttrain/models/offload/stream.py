"""Layers that come just before they compute, forward and in the backward's recomputation, and go when the next one comes."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from posttrain.errors import RunError
from posttrain.models.language.precision import IS_STREAMED
from posttrain.models.offload.products import keep_no_codes
from posttrain.models.offload.store import Streamed


class LayerStream:
    """Has one layer's weights on the device, and on CUDA the next one's on their way.

    All layers must be recomputed in the backward: only then does nothing else hold on to their weights. `start` comes when all
    adapters are on, `recompute` once the model has been told to recompute.
    """

    def __init__(self, layers: Sequence[Streamed], device: torch.device) -> None:
        self.layers, self.device = layers, device
        self.here: int | None = None
        self._coming: dict[int, tuple[Tensor, Any]] = {}
        self._side: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pinned: list[Tensor] = []

    def start(self) -> Self:
        """Let go of all layers, and have each come when it is called; returns itself."""
        if self._side is not None:
            self._pinned = [layer.flat.mapped().pin_memory() for layer in self.layers]
        for i, layer in enumerate(self.layers):
            module: Any = layer.module
            keep_no_codes(module)
            self._let_go(i)
            module.register_forward_pre_hook(self._before(i))
            setattr(module, IS_STREAMED, True)
            for parameter in module.parameters():  # an adapter lies where its layer has been
                parameter.data = parameter.data.to(self.device)
        gc.collect()  # what was looked at while adapters were put on
        return self

    def recompute(self) -> None:
        """Have each layer come for its recomputation too."""
        for i, layer in enumerate(self.layers):
            module: Any = layer.module
            module._gradient_checkpointing_func = self._recomputing(i, module._gradient_checkpointing_func)

    @property
    def place(self) -> str:
        """Where layers are while they are not here."""
        return "the CPU's memory" if self._pinned else str(self.layers[0].flat.path.parent)

    @property
    def bytes(self) -> int:
        """Of all layers' files."""
        return sum(layer.flat.size for layer in self.layers)

    def bring(self, i: int) -> None:
        """Make layer `i` the one that is here."""
        if i == self.here:
            return
        flat, event = self._coming.pop(i, None) or self._fetch(i)
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)
            flat.record_stream(torch.cuda.current_stream(self.device))
        before, self.here = self.here, i
        if before is not None:
            self._let_go(before)
        layer = self.layers[i]
        for name, ask in layer.tensors.items():
            ask().data = layer.flat.places[name].of(flat)
        del flat
        self._prefetch(i - 1 if before is not None and before > i else i + 1)

    def _fetch(self, i: int) -> tuple[Tensor, Any]:
        """All bytes of a layer, and on CUDA the event after which they are there."""
        if self._side is None:
            return self.layers[i].flat.mapped(), None
        with torch.cuda.stream(self._side):
            return self._pinned[i].to(self.device, non_blocking=True), self._side.record_event()

    def _prefetch(self, i: int) -> None:
        self._coming.clear()
        if not 0 <= i < len(self.layers):
            return
        if self._side is not None:
            self._coming[i] = self._fetch(i)
        elif hasattr(os, "posix_fadvise"):  # the system reads ahead; nothing of it is this process's memory yet
            file = os.open(self.layers[i].flat.path, os.O_RDONLY)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_WILLNEED)
            os.close(file)

    def _let_go(self, i: int) -> None:
        """Leave shapes, and values that make every product NaN, should anybody multiply with them."""
        for ask in self.layers[i].tensors.values():
            tensor = ask()
            nothing = torch.nan if tensor.dtype.is_floating_point else 0
            tensor.data = torch.full((), nothing, dtype=tensor.dtype, device=self.device).expand(tensor.shape)

    def _before(self, i: int) -> Callable[..., None]:
        def bring(module: Any, _: Any) -> None:
            if torch.is_grad_enabled() and not (module.training and module.gradient_checkpointing):
                raise RunError("train.offload=layers: a gradient is asked for of layers that are not recomputed")
            self.bring(i)

        return bring

    def _recomputing(self, i: int, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        def run(forward: Callable[..., Any], *args: Any) -> Any:
            def brought(*given: Any) -> Any:
                self.bring(i)
                return forward(*given)

            return checkpoint(brought, *args)

        return run
