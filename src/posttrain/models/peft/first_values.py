"""First values of a LoRA that are worked out before it is put on: from the run's own rows, or from what quantizing has lost.

Each is computed by peft's own code on the bare base, and written down by layer, so that every process and every start of a run
has the same ones. Where they are taken out of the base, that is done in one place (`put`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from posttrain.batch import PackedBatch
from posttrain.config.interfaces import Quantizer
from posttrain.console import say
from posttrain.errors import UserError
from posttrain.models.peft.attach import NEW
from posttrain.models.peft.export import lora_layers
from posttrain.models.peft.places import PREFIX

A, B = ".lora_A", ".lora_B"  # ends of names: behind a layer's, [rank, in] and [out, rank]
ONE = "layer"  # the layer of a model of one
MOST = 20  # times that eva reads all rows; a few are enough for directions that settle


class Given(NamedTuple):
    """What first values may be worked out from. batches: rows of the run. read: a batch through the base. loss: of a batch, a
    sum. original: a layer's name -> its weight [out, in] before it was quantized, or None. quantizer: of the base."""

    batches: list[PackedBatch]
    read: Callable[[PackedBatch], Any]
    loss: Callable[[PackedBatch], Tensor]
    original: Callable[[str], Tensor | None]
    quantizer: Quantizer


def eva(model: nn.Module, config: Any, given: Given) -> dict[str, Tensor]:
    """A of every layer, of the rank that it gets; a rank of 0 means no adapter. Raises UserError where there are too few tokens
    that count."""
    from peft import EvaConfig
    from peft.tuners.lora.eva import get_eva_state_dict

    config.eva_config = EvaConfig()
    most = max([config.r, *config.rank_pattern.values()])
    batches, needed = given.batches, round(most * config.eva_config.rho)
    enough = [batch for batch in batches if len(batch.logit_index) >= needed]
    if not enough:
        largest = max(len(batch.logit_index) for batch in batches)
        raise UserError(
            f"peft.init: eva looks for {needed} directions in every batch, twice the rank, and the largest of those it reads has "
            f"{largest} tokens that count; give a larger train.batch_size, or a smaller peft.r"
        )
    if left := len(batches) - len(enough):
        say(f"peft.init=eva: {left} of {len(batches)} batches have fewer than {needed} tokens that count, and are left out")
    turn = count()

    def forward(model: nn.Module, batch: PackedBatch) -> None:
        if next(turn) > MOST * len(enough):
            _settle(model)
        given.read(batch)

    found = get_eva_state_dict(
        model, enough, config, forward, lambda batch, _: batch, _inputs_that_count,
        gather_distributed_inputs=False, show_progress_bar=False,
    )  # fmt: skip
    if next(turn) > MOST * len(enough) + 1:
        say(f"peft.init=eva: not all directions have settled in {MOST} passes over the rows; they are taken as they are")
    return {f"{name}{A}": value for name, value in found.items()}


def _settle(model: nn.Module) -> None:
    """Have peft, which would read on for ever, take every layer's directions for settled after its next batch."""
    from peft.tuners.lora.eva import SVDHook

    for module in model.modules():
        for hook in module._forward_hooks.values():
            if isinstance(hook, SVDHook):
                hook.sim_thresh = -2.0


def _inputs_that_count(inputs: tuple[Tensor, ...], batch: PackedBatch, name: str) -> Tensor:
    """A layer's inputs [n, in] at the places that predict a token which counts; all of them where it does not read the pack."""
    rows = inputs[0].flatten(0, -2)
    return rows[batch.logit_index] if len(rows) == batch.size else rows


def corda(model: nn.Module, config: Any, given: Given) -> dict[str, Tensor]:
    """A and B of every layer, which are taken out of the base."""
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    config.corda_config = CordaConfig()

    def run() -> None:
        for batch in given.batches:
            given.read(batch)

    preprocess_corda(model, config, run)
    return _by_peft(model, config, "eigens", init_lora_weights="corda", corda_config=config.corda_config)


def lora_ga(model: nn.Module, config: Any, given: Given) -> dict[str, Tensor]:
    """As `corda`. The gradient is that of the mean loss over all batches, as training has it."""
    from peft import LoraGAConfig
    from peft.tuners.lora.loraga import preprocess_loraga

    config.lora_ga_config = LoraGAConfig()
    mean = len(given.batches) / sum(batch.loss_denominator for batch in given.batches)  # peft divides by how many there are

    def run() -> None:
        for batch in given.batches:
            (given.loss(batch) * mean).backward()

    with warnings.catch_warnings(action="ignore"):  # of layers whose inputs are no weights' doing
        preprocess_loraga(model, config, run)
    return _by_peft(model, config, "_peft_loraga_grad", init_lora_weights="lora_ga", lora_ga_config=config.lora_ga_config)


def loftq(model: nn.Module, config: Any, given: Given) -> dict[str, Tensor]:
    """A and B of every quantized layer: B A, as it is scaled, is the nearest of its rank to what quantizing has lost. peft's own
    function computes it on a GPU alone, and leaves the scale out."""
    from peft.utils.loftq_utils import _low_rank_decomposition

    found: dict[str, Tensor] = {}
    for name, layer in _targets(model, config):
        original = given.original(name) if given.quantizer.made(layer) else None
        if original is None:
            continue
        dequantized = given.quantizer.dequantized(layer).float()
        r, scale = _scaled(config, name)
        halves = _low_rank_decomposition(original.to(dequantized) - dequantized, r)
        found |= {f"{name}{A}": halves["R"] / scale**0.5, f"{name}{B}": halves["L"] / scale**0.5}
    return found


def _targets(model: nn.Module, config: Any) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora.model import LoraModel

    for name, module in model.named_modules():
        if LoraModel._check_target_module_exists(config, name):
            yield name, module


def _scaled(config: Any, name: str) -> tuple[int, float]:
    """A layer's rank, and what its B A is multiplied by."""
    r, alpha = _of(config.rank_pattern, name, config.r), _of(config.alpha_pattern, name, config.lora_alpha)
    return r, alpha / (r**0.5 if config.use_rslora else r)


def _of(pattern: dict[str, Any], name: str, otherwise: Any) -> Any:
    from peft.utils.other import get_pattern_key

    return pattern.get(get_pattern_key(list(pattern), name), otherwise)


def _by_peft(model: nn.Module, config: Any, prepared: str, **options: Any) -> dict[str, Tensor]:
    """What peft makes of each layer that has the attribute `prepared`, which it is rid of: on a model of that layer alone, for
    peft writes into it."""
    from peft import LoraConfig, get_peft_model

    found: dict[str, Tensor] = {}
    for name, module in list(model.named_modules()):
        if not hasattr(module, prepared):
            continue
        kept, weight = getattr(module, prepared), cast("Tensor", module.weight).detach()
        delattr(module, prepared)
        if isinstance(module, Conv1D):
            kept, weight = kept.T if isinstance(kept, Tensor) else kept, weight.T
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")  # of random numbers it would draw
        layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
        setattr(layer, prepared, kept)
        alone = nn.Module()
        alone.add_module(ONE, layer)
        r, alpha = _of(config.rank_pattern, name, config.r), _of(config.alpha_pattern, name, config.lora_alpha)
        one = LoraConfig(r=r, lora_alpha=alpha, use_rslora=config.use_rslora, target_modules=[ONE], **options)
        made: Any = get_peft_model(alone, one, adapter_name=NEW).get_base_model().get_submodule(ONE)  # pyright: ignore
        found |= {f"{name}{A}": made.lora_A[NEW].weight.detach(), f"{name}{B}": made.lora_B[NEW].weight.detach()}
    return found


@torch.no_grad()
def put(model: Any, values: dict[str, Tensor], writes_base: bool, dtype: torch.dtype) -> None:
    """First values into an adapter that has just been put on. Without a B it is zero, and ranks are those of the A. writes_base:
    what they add up to is taken out of the base. dtype: of the adapter."""
    layers = lora_layers(model)
    if missing := sorted(name for name in layers if f"{name}{A}" not in values):
        say(
            f"peft.init: {len(missing)} layers begin as by peft.init=default, for there are no values of them ({missing[0]}, ...)"
        )
    if not any(name.endswith(B) for name in values):
        _put_ranks(model, values)
        return
    for name, layer in layers.items():
        if name in missing:
            continue
        base = layer.get_base_layer()
        a, b = (values[f"{name}{half}"].to(layer.lora_A[NEW].weight.device, dtype).contiguous() for half in (A, B))
        layer.lora_A[NEW].weight.data, layer.lora_B[NEW].weight.data = a, b
        if writes_base:
            change = layer.scaling[NEW] * (b.float() @ a.float())
            base.weight.copy_(base.weight.float() - (change.T if isinstance(base, Conv1D) else change))


def _put_ranks(model: Any, values: dict[str, Tensor]) -> None:
    from peft import EvaConfig, initialize_lora_eva_weights

    config = model.peft_config[NEW]
    config.init_lora_weights, config.eva_config = "eva", EvaConfig()
    found = {f"{PREFIX}{name.removesuffix(A)}": value for name, value in values.items()}
    with warnings.catch_warnings(action="ignore"):  # of layers without values, which have been named
        initialize_lora_eva_weights(model, eva_state_dict=found, adapter_name=NEW)
