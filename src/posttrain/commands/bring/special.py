"""Words whose meaning hangs on others: the method, what it is put on, and a chat template."""

from __future__ import annotations

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
    if not words and "r" in found.tree:  # as get_peft_model has it
        words, given = ["r"], [True]
    name = "" if not given or given[0] is False else "lora" if given[0] is True else str(given[0])
    if name and name not in _METHODS:
        raise UserError(f"{words[0]}: {name} has no like here; posttrain has lora, qlora, dora and others (docs/methods.md)")
    of_lora = _METHODS.get(name) == "lora"
    bits = 4 if found.take("load_in_4bit") or found.tree.get("quantization_bit") == 4 else 0
    bits = 8 if found.take("load_in_8bit") or found.take("quantization_bit") == 8 else bits
    bits = 4 if name == "qlora" else bits
    said = ", ".join([*words, *(word for word in ("load_in_4bit", "load_in_8bit", "quantization_bit") if found.has(word))])
    variant = _variant(found) if of_lora else ""
    method = (variant or ("qlora" if bits == 4 else "lora")) if of_lora else _METHODS.get(name, "")
    if method:
        found.put("peft", method, said)
    _read_targets(found)
    if of_lora and "peft.targets" not in found.settings:
        found.put("peft.targets", ["q_proj", "v_proj"], "peft's own choice for Llama, Mistral, Qwen, Gemma")
    if bits and method in ("", "partial"):
        found.note(said, bits, "weights that are trained in full are not quantized")
    elif bits and method != "qlora":
        found.put("quant", "int8" if bits == 8 else "nf4", said)
    for word in [] if of_lora else [word for word in found.tree if word.startswith(("lora_", "loraplus")) and found.has(word)]:
        if word != "lora_model_dir":
            found.read.add(word)
            found.note(word, found.tree[word], "there is no LoRA in this config")


def _variant(found: Translation) -> str:
    """The one form of LoRA that is taken; others that are asked for beside it are noted."""
    asked = [word for word in _VARIANTS if found.has(word) and found.take(word) is not False]
    if not asked:
        return ""
    for other in asked[1:]:
        if _VARIANTS[other] != _VARIANTS[asked[0]]:
            why = f"peft={_VARIANTS[asked[0]]} comes from {asked[0]}; one form is taken, no other with it"
            same = "; its scale is that of peft.alpha times the root of peft.r" if _VARIANTS[other] == "rslora" else ""
            found.note(other, found.tree[other], why + same)
    found.read -= {asked[0]} & {"loraplus_lr_ratio"}  # its number is read still
    return _VARIANTS[asked[0]]


def _read_targets(found: Translation) -> None:
    if found.take("lora_target_linear"):  # beside it a list of layers adds none
        found.put("peft.targets", "all-linear", "lora_target_linear")
    for word in ("lora_target", "lora_target_modules", "target_modules", "oft_target"):
        if word not in found.read and (value := found.take(word)) is not None:
            names = value.split(",") if isinstance(value, str) and "," in value and "(" not in value else value
            found.put("peft.targets", "all-linear" if value in ("all", "all-linear", ["all-linear"]) else names, word)


def read_template(found: Translation) -> None:
    """A chat template that is written out, as a word of its own or in place of a name."""
    for word in ("chat_template_jinja", "chat_template"):
        if isinstance(text := found.tree.get(word), str) and "{%" in text and not found.template:
            found.template = str(found.take(word))
    if found.template and found.tree.get("chat_template") == "jinja":
        found.take("chat_template")
