"""Words whose meaning hangs on others: the method, the data, and numbers that are counted otherwise here."""

from __future__ import annotations

from typing import Any, cast

from posttrain.commands.bring.tools import FACTORY
from posttrain.commands.bring.translation import Translation
from posttrain.errors import UserError

_METHODS = {"lora": "lora", "qlora": "qlora", "full": "", "freeze": "partial"}
_VARIANTS = {
    "use_dora": "dora",
    "peft_use_dora": "dora",
    "use_rslora": "rslora",
    "peft_use_rslora": "rslora",
    "pissa_init": "pissa",
    "loraplus_lr_ratio": "loraplus",
}
_SHAPES = {"alpaca": "alpaca", "sharegpt": "sharegpt", "completion": "text", "chat_template": "auto"}
_HERE = ("path", "split", "name", "data_files", "type", "ds_type", "id", "config", "field_messages", "field")
_CHANGES_NOTHING = {"ds_type": "the reader looks at the file"}


def read_method(found: Translation) -> None:
    """peft and quant, of the words for method, variant and bits."""
    words = [word for word in ("adapter", "finetuning_type", "use_peft") if found.has(word)]
    given = [found.take(word) for word in words]
    name = "" if not given or given[0] is False else "lora" if given[0] is True else str(given[0])
    if name and name not in _METHODS:
        raise UserError(f"{words[0]}: {name} has no like here; posttrain has lora, qlora, dora and others (docs/methods.md)")
    method = _METHODS.get(name, "")
    bits = 4 if found.take("load_in_4bit") or found.tree.get("quantization_bit") == 4 else 0
    bits = 8 if found.take("load_in_8bit") or found.take("quantization_bit") == 8 else bits
    said = ", ".join([*words, *(word for word in ("load_in_4bit", "load_in_8bit", "quantization_bit") if found.has(word))])
    variant = next((ours for word, ours in _VARIANTS.items() if found.has(word) and found.tree[word] is not False), "")
    found.read |= _VARIANTS.keys() - {"loraplus_lr_ratio"}
    if method in ("lora", "qlora"):
        quantized = 4 if method == "qlora" else bits
        found.put("peft", variant or ("qlora" if quantized == 4 else "lora"), said)
        if quantized and (variant or quantized == 8):
            found.put("quant", "int8" if quantized == 8 else "nf4", said)
        return
    if bits:
        found.note(said, bits, "weights that are trained in full are not quantized")
    if method:
        found.put("peft", method, said)
    for word in [word for word in found.tree if word.startswith(("lora_", "loraplus")) and found.has(word)]:
        if word != "lora_model_dir":
            found.read.add(word)
            found.note(word, found.tree[word], "there is no adapter in this config")


def read_data(found: Translation) -> None:
    """data.path and its companions; where the file names no data that we can find, data: file, which asks for a path."""
    sources = _sources(found)
    paths = [path for source in sources if (path := source.get("data_files") or source.get("path") or source.get("id"))]
    paths = [each for path in paths for each in (cast("list[str]", path) if isinstance(path, list) else [path])]
    if not paths:
        found.put("data", "file", "no data that can be found here: say data.path=...")
        return
    found.put("data.path", paths[0] if len(paths) == 1 else paths, "the data")
    for ours, theirs in (("data.split", ("split",)), ("data.subset", ("name", "config"))):
        values = {str(value) for source in sources for word in theirs if (value := source.get(word))}
        if len(values) == 1:
            found.put(ours, values.pop(), theirs[0])
        elif values:
            found.note(theirs[0], sorted(values), f"{ours} is one for all; a mixture (data=mix) has one each")
    kinds = {str(source["type"]) for source in sources if source.get("type")}
    if shape := _SHAPES.get(next(iter(kinds))) if len(kinds) == 1 else "":
        found.put("data.shape", shape, "type")
    elif kinds:
        found.note("type", sorted(kinds), "data.shape=auto looks at the columns; see posttrain preview")
    for source in sources:
        for ours, word in (("messages", "field_messages"), ("text", "field")):
            if source.get(word) and source[word] != ours:
                found.put(f"data.columns.{ours}", source[word], word)
        for word in source.keys() - set(_HERE):
            found.note(f"datasets.{word}", source[word], _CHANGES_NOTHING.get(word, "has no like here; see posttrain preview"))


def _sources(found: Translation) -> list[dict[str, Any]]:
    sources: list[Any] = []
    for word in ("datasets", "pretraining_dataset", "train_dataset", "dataset", "dataset_name"):
        value = found.take(word)
        sources += cast("list[Any]", value) if isinstance(value, list) else [value] if value else []
    if isinstance(mixture := found.take("dataset_mixture"), dict):
        sources += mixture.get("datasets") or []
        for word in mixture.keys() - {"datasets"}:
            found.note(
                f"dataset_mixture.{word}", mixture[word], "held-out rows are data.eval_share of the rows, or data.eval_path"
            )
    if isinstance(mixer := found.take("dataset_mixer"), dict):
        sources += [{"id": name, "weight": share} for name, share in mixer.items()]
    splits = [name for name in found.tree.get("dataset_splits") or [] if "train" in name]
    if len(splits) == 1:
        found.read.add("dataset_splits")
        found.put("data.split", splits[0], "dataset_splits")
    companions = {"split": found.take("dataset_train_split"), "name": found.take("dataset_config")}
    rows = [{"path": each, **companions} if isinstance(each, str) else dict(each) for each in sources]
    names = [row for row in rows if found.tool == FACTORY and not _is_place(str(row.get("path")))]
    for row in names:
        found.note("dataset", row["path"], "names of LLaMA-Factory's own dataset_info.json: say data.path=...")
    return [row for row in rows if row not in names]


def _is_place(text: str) -> bool:
    return "/" in text or text.endswith((".json", ".jsonl", ".csv", ".parquet", ".txt"))


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
    for word in ("lora_target", "lora_target_modules", "target_modules"):
        if (value := found.take(word)) is not None:
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
