"""What makes a run smaller: settings to try where memory is short."""

from __future__ import annotations

from posttrain.config.schema import LanguageStage, Stage


def memory_savers(cfg: Stage) -> list[str]:
    """Overrides that save memory, in the order one would try them."""
    train = cfg.train
    found: list[str] = []
    if train.gradient_checkpointing is not True:
        found.append("train.gradient_checkpointing=true")
    if train.batch_size > 1:  # the same run: losses are sums over the whole step
        found.append(f"train.batch_size=1 train.grad_accum={train.batch_size * train.grad_accum}")
    if cfg.peft.output == "model":
        found.append("peft=lora")
    if not cfg.quant.is_quantized:
        found.append("peft=qlora")
    if isinstance(cfg, LanguageStage) and cfg.train.offload != "layers" and cfg.peft.output == "adapter":
        found.append("train.offload=layers")
    if isinstance(cfg, LanguageStage):
        found.append(f"train.max_length={max(8, cfg.train.max_length // 2)}")
    if isinstance(cfg, LanguageStage) and not cfg.quant.is_quantized and cfg.peft.for_fsdp:
        found.append(f"train.fsdp=true train.processes={max(2, 2 * train.processes)}")
    return found
