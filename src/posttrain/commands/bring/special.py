"""Words whose meaning hangs on others: the method, and numbers that are counted otherwise here."""

from __future__ import annotations

from typing import Any, cast

from posttrain.commands.bring.translation import Translation
from posttrain.errors import UserError

_METHODS = {"lora": "lora", "qlora": "lora", "oft": "oft", "full": "", "freeze": "partial"}
_VARIANTS = {
    "use_dora": "dora",
    "peft_use_dora": "dora",
    "use_rslora": "rslora",
    "peft_use_rslora": "rslora",
    "pissa_init": "pissa",
    "loraplus_lr_ratio": "loraplus",
}


def read_method(found: Translation) -> None:
    """peft and quant, of the words for method, variant and bits."""
    words = [word for word in ("adapter", "finetuning_type", "use_peft") if found.has(word)]
    given = [found.take(word) for word in words]
    name = "" if not given or given[0] is False else "lora" if given[0] is True else str(given[0])
    if name and name not in _METHODS:
        raise UserError(f"{words[0]}: {name} has no like here; posttrain has lora, qlora, dora and others (docs/methods.md)")
    of_lora = _METHODS.get(name) == "lora"
    bits = 4 if found.take("load_in_4bit") or found.tree.get("quantization_bit") == 4 else 0
    bits = 8 if found.take("load_in_8bit") or found.take("quantization_bit") == 8 else bits
    bits = 4 if name == "qlora" else bits
    said = ", ".join([*words, *(word for word in ("load_in_4bit", "load_in_8bit", "quantization_bit") if found.has(word))])
    variant = next((ours for word, ours in _VARIANTS.items() if found.has(word) and found.tree[word] is not False), "")
    found.read |= _VARIANTS.keys() - {"loraplus_lr_ratio"}
    method = (variant or ("qlora" if bits == 4 else "lora")) if of_lora else _METHODS.get(name, "")
    if method:
        found.put("peft", method, said)
    if bits and method in ("", "partial"):
        found.note(said, bits, "weights that are trained in full are not quantized")
    elif bits and method != "qlora":
        found.put("quant", "int8" if bits == 8 else "nf4", said)
    for word in [] if of_lora else [word for word in found.tree if word.startswith(("lora_", "loraplus")) and found.has(word)]:
        if word != "lora_model_dir":
            found.read.add(word)
            found.note(word, found.tree[word], "there is no LoRA in this config")


def read_template(found: Translation) -> None:
    """A chat template that is written out, as a word of its own or in place of a name."""
    for word in ("chat_template_jinja", "chat_template"):
        if isinstance(text := found.tree.get(word), str) and "{%" in text and not found.template:
            found.template = str(found.take(word))
    if found.template and found.tree.get("chat_template") == "jinja":
        found.take("chat_template")


def read_numbers(found: Translation) -> None:
    """Warm-up, betas, held-out rows, targets and trackers."""
    if found.has("warmup_steps"):
        steps = float(found.take("warmup_steps"))
        key, value = ("optim.warmup_ratio", steps) if 0 < steps < 1 else ("optim.warmup_steps", int(steps))
        found.put(key, value, "warmup_steps")
        if found.has("warmup_ratio"):
            found.note("warmup_ratio", found.take("warmup_ratio"), "warmup_steps comes first")
    if found.has("adam_beta1") or found.has("adam_beta2"):
        betas = [found.take("adam_beta1") or 0.9, found.take("adam_beta2") or 0.999]
        found.put("optim.betas", betas, "adam_beta1, adam_beta2")
    for word in ("val_set_size", "val_size"):
        if (value := found.take(word)) is not None:
            found.put("data.eval_share" if value < 1 else "data.eval_rows", value, word)
    _read_schedule(found)
    if found.take("lora_target_linear"):  # beside it a list of layers adds none
        found.put("peft.targets", "all-linear", "lora_target_linear")
    for word in ("lora_target", "lora_target_modules", "target_modules", "oft_target"):
        if word not in found.read and (value := found.take(word)) is not None:
            names = value.split(",") if isinstance(value, str) and "," in value and "(" not in value else value
            found.put("peft.targets", "all-linear" if value in ("all", "all-linear", ["all-linear"]) else names, word)
    if found.has("max_steps") and found.tree["max_steps"] < 1:
        found.take("max_steps")
    for word, tracker in (("wandb_project", "wandb"), ("trackio_project_name", "trackio")):
        if found.has(word):
            found.put("tracker", tracker, word)
    if isinstance(trackers := found.tree.get("report_to"), list):
        for other in cast("list[Any]", trackers)[1:]:
            found.note("report_to", other, "tracker is one")
        found.tree["report_to"] = trackers[0] if trackers else None
    for word in ("save_steps", "eval_steps", "logging_steps"):
        if isinstance(value := found.tree.get(word), float) and not value.is_integer():
            found.note(word, found.take(word), "a share of the steps; ours counts steps")


def _read_schedule(found: Translation) -> None:
    """Where the rate ends: a rate here, a share of the rate there."""
    given = found.tree.get("lr_scheduler_kwargs")
    given = cast("dict[str, Any]", given) if isinstance(given, dict) else {}
    share = found.take("cosine_min_lr_ratio") or given.get("min_lr_rate")
    if given.keys() <= {"min_lr", "min_lr_rate"}:
        found.take("lr_scheduler_kwargs")
    if given.get("min_lr"):
        found.put("optim.min_lr", given["min_lr"], "lr_scheduler_kwargs")
    elif share and found.has("learning_rate"):
        found.put("optim.min_lr", float(f"{float(share) * float(found.tree['learning_rate']):.6g}"), "a share of learning_rate")
