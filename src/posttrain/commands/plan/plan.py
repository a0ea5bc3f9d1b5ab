"""`posttrain plan`: what a run will cost in memory and time, here or on a card of the table, before anything is loaded."""

from __future__ import annotations

import math
import re
from typing import Any

import torch

from posttrain.commands.plan.images import image_plan
from posttrain.commands.plan.memory import Counted, count
from posttrain.commands.plan.need import Need, micro_batch_seconds
from posttrain.commands.plan.rows import Rows, rows_of
from posttrain.config.compose import compose_run
from posttrain.config.memory_savers import memory_savers
from posttrain.config.stages import typed_config
from posttrain.devices.device import CONTEXT, OF_A_CPU, OF_BYTES, OF_PRODUCTS, Device
from posttrain.errors import UserError
from posttrain.models.checkpoints.use import use_of
from posttrain.models.hub import resolve
from posttrain.models.kernels.attention import ways_of_attention
from posttrain.models.trust import pin_of
from posttrain.stages.language.init import InitSource
from posttrain.stages.language.plan import Extra
from posttrain.stages.precision import autocast_of, settled
from posttrain.stages.spec import StageSpec, spec_of
from posttrain.tensors import numbers_in

SHARDED = ("weights", "adapters", "frozen adapter", "gradients", "optimizer")
LATER = ("gradients", "optimizer")  # what training adds to what is loaded


def make_plan(stage: str, words: list[str], memory: int | None = None, device: Device | None = None) -> dict[str, Any]:
    """Memory by part, per device, whether it fits, what would make it fit, steps, tokens and time; ready for JSON.

    device: whose rules are followed; None: this machine's. memory: bytes to fit in; None: the device's. Raises UserError as the
    run itself would.
    """
    device = device or Device.here()
    device = device.with_memory(memory) if memory else device
    plan = _plan(stage, words, device)
    plan |= {"capacity_bytes": round(device.capacity), "device": device.name, "kind": device.kind}
    plan["changes"] = [] if plan["fits"] else _changes(stage, words, device)
    return plan


def on_devices(words: list[str], count: int | None) -> list[str]:
    """The run's words with `train.processes` as `--devices` has it. Raises UserError where the words say something else."""
    said = [word for word in words if word.lstrip("+").startswith("train.processes=")]
    if count is None:
        return words
    if said and said[-1].split("=")[1] != str(count):
        raise UserError(f"--devices: {count}, and {said[-1]}; leave one of them out")
    return [*words, f"train.processes={count}"]


def _plan(stage: str, words: list[str], device: Device) -> dict[str, Any]:
    cfg, spec = typed_config(compose_run(stage, words)), spec_of(stage)
    cfg, line = settled(cfg, device)
    plan = _image_plan(cfg, device) if spec.reads == "images" else _language_plan(cfg, spec, device)
    plan["assumptions"] = _assumptions(cfg, device, plan["seconds"], [*([line] if line else []), *plan["assumptions"]])
    return plan


def _image_plan(cfg: Any, device: Device) -> dict[str, Any]:
    plan, rates = image_plan(cfg, device), device.rates(cfg.base_dtype)
    return plan | {"seconds": round(rates.seconds([(plan["flops"], 0.0)]), 1) if rates else None}


def _language_plan(cfg: Any, spec: StageSpec, device: Device) -> dict[str, Any]:
    from posttrain.models.language.architecture import config_of

    rows = rows_of(cfg, spec, device)
    tokens = min(cfg.train.batch_size * rows.longest, rows.largest_batch)
    directory = resolve(rows.start.source, cfg.model.revision, weights=False).directory
    model = config_of(directory, pin_of(cfg.model))
    use = use_of(directory, cfg.quant, cfg.base_dtype)
    held = cfg.model_copy(update={"quant": use.layers})  # a checkpoint's own format takes what its layers take
    found = count(held, device, model, tokens, cfg.train.batch_size, _frozen_bytes(rows.start), use.held_bytes())
    extra = spec.plan_of().extra(cfg, rows.units, found.parts, model, rows.base)
    memory = _of_one(cfg, device, found) | extra.memory
    need = _need(cfg, device, found, memory, tokens)
    layers = need.recomputed(tokens)
    memory |= {"logits": need.head(tokens), "activations": need.of_layers(tokens).most(layers)}
    return {
        "stage": cfg.stage,
        "model": cfg.model.name,
        "method": cfg.peft.name,
        "quant": cfg.quant.name,
        "dtype": cfg.base_dtype,
        "autocast": autocast_of(cfg, device),
        "optimizer": found.optimizer,
        "attention": ways_of_attention(cfg.model.attention, torch.device(device.kind)),  # the first that the model lets
        "checkpoint": use.lines(),
        "devices": cfg.train.processes,
        "total_parameters": found.total_parameters + extra.total + _frozen_numbers(rows.start),
        "trained_parameters": found.trained_parameters + extra.trained,
        "memory": {part: round(size) for part, size in memory.items() if size},
        "memory_with_recomputation": round(need.total(tokens, found.layers)),
        "memory_without_recomputation": round(need.total(tokens, found.layers if cfg.train.offload != "none" else 0)),
        "layers": found.layers,
        "layers_recomputed": layers,
        "total_bytes": round(need.total(tokens, layers)),
        "fits": need.fits(tokens),
        "micro_batch_tokens": tokens,
        "longest_unit": rows.longest,
        "largest_batch_size": need.most(rows.longest) // rows.longest,
        "largest_unit": need.most() // cfg.train.batch_size,
        "steps": rows.steps,
        "tokens": round(rows.tokens),
        "tokens_are": rows.tokens_are,
        **_time(cfg, device, found, layers / found.layers, rows, tokens, extra),
        "assumptions": [line for line in (found.kept.reading, found.note, cfg.peft.plan_note, *extra.notes) if line],
    }


def _of_one(cfg: Any, device: Device, found: Counted) -> dict[str, float]:
    """Bytes by part of one device, of which several have a share each with FSDP."""
    if not cfg.train.fsdp:
        return found.parts
    half = 0.5 if autocast_of(cfg, device) == "bf16" else 1.0  # gathered in bfloat16, of float32
    shared = {part: size / cfg.train.processes if part in SHARDED else size for part, size in found.parts.items()}
    return shared | {"gathered layers": half * found.gathered * (cfg.train.processes > 1)}


def _need(cfg: Any, device: Device, found: Counted, memory: dict[str, float], tokens: int) -> Need:
    """With `train.offload` all layers are recomputed, and where it is activations that go, their inputs are away too."""
    a_layer = found.layers * tokens
    return Need(
        lying=sum(size for part, size in memory.items() if part not in LATER),
        later=sum(memory[part] for part in LATER),
        kept=found.kept.whole / a_layer,
        inputs=0.0 if cfg.train.offload == "activations" else found.inputs,
        narrow=(found.kept.whole if cfg.train.offload == "layers" else found.kept.narrow) / a_layer,
        layers=found.layers,
        head=found.head,
        asked=True if cfg.train.offload != "none" else cfg.train.gradient_checkpointing,
        capacity=device.capacity,
    )


def _time(
    cfg: Any, device: Device, found: Counted, recomputed: float, rows: Rows, tokens: int, extra: Extra
) -> dict[str, float | None]:
    """Of the whole run, of an optimizer step, and tokens a second of all devices; None where no rate is known."""
    formats = ("bfloat16", "tf32") if autocast_of(cfg, device) == "bf16" else (cfg.base_dtype, cfg.base_dtype)
    body, head = (device.rates(each) for each in formats)
    if not body or not head:
        return dict.fromkeys(("seconds", "seconds_a_step", "tokens_per_second"))
    a_token = micro_batch_seconds(found.kept, recomputed, found.quantized, body, head) / tokens
    own = _of_one(cfg, device, found)
    trained = (
        3 * own["gradients"] + 2 * own["optimizer"]
    )  # weights are as large as their gradients; all but these are written too
    seconds = a_token * extra.passes * rows.tokens / cfg.train.processes + rows.steps * trained / body.bytes
    return {
        "seconds": round(seconds, 1),
        "seconds_a_step": round(seconds / max(1, rows.steps), 4),
        "tokens_per_second": round(rows.tokens / seconds, 1) if seconds else None,
    }


def _frozen_bytes(start: InitSource) -> float:
    """Bytes of the adapter that will lie under a new one."""
    return float((start.adapter / "adapter_model.safetensors").stat().st_size) if start.adapter and start.mode == "stack" else 0.0


def _frozen_numbers(start: InitSource) -> int:
    """Parameters of the adapter that will lie under a new one."""
    return numbers_in(start.adapter) if start.adapter and start.mode == "stack" else 0


def _changes(stage: str, words: list[str], device: Device) -> list[dict[str, Any]]:
    """The first three single changes, in the order one would try them, with which the run fits; else several together."""
    tries, fitting = memory_savers(typed_config(compose_run(stage, words))), []
    for change in tries:
        plan = _plan_or_none(stage, [*words, *change.split()], device)
        if plan and plan["fits"]:
            fitting.append({"override": change, "total_bytes": plan["total_bytes"], "fits": True})
        if len(fitting) == 3:
            break
    return fitting or _together(stage, words, tries, device)


def _together(stage: str, words: list[str], tries: list[str], device: Device) -> list[dict[str, Any]]:
    """One change after another, each kept if it goes with the ones before and output something, until the run fits."""
    kept: list[str] = []
    best: dict[str, Any] = {"total_bytes": math.inf, "fits": False}
    for change in tries:
        plan = _plan_or_none(stage, [*words, *kept, *change.split()], device)
        if plan and plan["total_bytes"] < best["total_bytes"] and not best["fits"]:
            best, kept = plan, [*kept, *change.split()]
    return [{"override": " ".join(kept), "total_bytes": best["total_bytes"], "fits": best["fits"]}] if kept else []


def _plan_or_none(stage: str, words: list[str], device: Device) -> dict[str, Any] | None:
    """None where the settings do not go together."""
    try:
        return _plan(stage, words, device)
    except UserError:
        return None


def parse_memory(text: str | None) -> int | None:
    """`48GB`, `23.5GiB` or a number of bytes. Raises UserError."""
    if text is None:
        return None
    found = re.fullmatch(r"\s*([0-9.]+)\s*(B|[KMGT]i?B)?\s*", text, flags=re.IGNORECASE)
    if not found:
        raise UserError(f"--memory: '{text}' is no size; write 48GB or 24GiB")
    unit = (found[2] or "B").upper()
    return int(float(found[1]) * (1024 if "I" in unit else 1000) ** "BKMGT".index(unit[0]))


def _assumptions(cfg: Any, device: Device, seconds: float | None, notes: list[str]) -> list[str]:
    said = ["the largest micro-batch decides on memory"]
    if device.kind == "cuda":
        said[0] += f"; {CONTEXT / 2**30:g} GiB of the card is left to CUDA and the allocator"
    said += notes
    if seconds is None:
        said.append("no rates are known of this card, so no time is given")
    elif device.kind != "cuda":
        said.append(f"time is an estimate from a measured product of matrices, of which a run reaches {OF_A_CPU:.0%}")
    elif card := device.card:
        said.append(
            f"time: products at {OF_PRODUCTS:.0%} of {card.half:,.0f} TFLOP/s (float32: {card.single:g}) and all else at "
            f"{OF_BYTES:.0%} of {card.bandwidth:,} GB/s ({card.source}, from memory): assumed shares, not measured ones"
        )
    if cfg.train.processes > 1:
        said.append("what the devices send each other is not in the time")
    if device.kind == "cpu":
        said.append("these are the rules of a CPU: plan ... --device 4090 plans for a card")
    return said
