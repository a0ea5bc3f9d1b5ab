"""Activations that wait for the backward in the CPU's memory (`train.offload=activations`)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from posttrain.errors import UserError

SMALLEST = 2**16  # bytes that are worth a copy


class _Away(NamedTuple):
    """A copy in the CPU's memory, the device that it belongs to, and the event after which it is whole."""

    copy: Tensor
    device: torch.device
    event: Any


class ActivationsAway(saved_tensors_hooks):
    """Inside, what autograd keeps goes to the CPU's memory, beside the computing where that is on CUDA; the backward gets the
    same bits back. Weights stay where they are. Of layers that are recomputed it is their inputs that go.
    """

    def __init__(self, module: nn.Module) -> None:
        weights = {parameter.untyped_storage()._cdata for parameter in module.parameters()}

        def pack(tensor: Tensor) -> Tensor | _Away:
            if tensor.nbytes < SMALLEST or tensor.untyped_storage()._cdata in weights:
                return tensor
            return _sent(tensor)

        super().__init__(pack, _returned)


def check_offload(offload: str, device: torch.device) -> None:
    """Raises UserError for what means nothing on `device`."""
    if offload == "activations" and device.type == "cpu":
        raise UserError(
            "train.offload: without a GPU activations are in the CPU's memory already; say train.offload=none, and "
            "train.gradient_checkpointing=true where memory is short"
        )


def _sent(tensor: Tensor) -> _Away:
    if tensor.device.type != "cuda":
        return _Away(tensor.detach().clone(), tensor.device, None)
    side = _side(tensor.device)
    side.wait_stream(torch.cuda.current_stream(tensor.device))
    with torch.cuda.stream(side):
        copy = torch.empty_like(tensor, device="cpu", pin_memory=True)
        copy.copy_(tensor.detach(), non_blocking=True)
    tensor.record_stream(side)  # its memory is not given to others before it is read
    return _Away(copy, tensor.device, side.record_event())


def _returned(kept: Tensor | _Away) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    if kept.event is not None:
        torch.cuda.current_stream(kept.device).wait_event(kept.event)
    return kept.copy.to(kept.device, non_blocking=True)


_streams: dict[torch.device, Any] = {}


def _side(device: torch.device) -> Any:
    """The stream of copies, one a device."""
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]
