"""Rows of the embedding and of the head that are trained beside an adapter, as peft's `trainable_token_indices`.

In memory a finished run's rows are written into the base, from where the new adapter trains them on; in files they are peft's
own, so that plain peft puts them over any base that is large enough.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from posttrain.errors import RunError, UserError
from posttrain.models.language.new_tokens import embedding_and_head, make_room, trained_tokens
from posttrain.models.peft.kinds import ROWS as KEY
from posttrain.models.peft.kinds import ROWS_END as SUFFIX

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."


class Rows(dict[str, tuple[list[int], Tensor]]):
    """Layer of the base (the embedding, and a head that is not tied to it) -> ids, and their rows [ids, H]."""

    @classmethod
    def of(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> Rows:
        """config: an adapter_config.json. tensors: of its file, with peft's prefix or without."""
        plain = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
        layers = _by_layer(config.get(KEY) or {}, plain)
        return cls({layer: (list(ids), plain[layer + SUFFIX]) for layer, ids in layers.items()})


def size_of(adapter_dir: Path) -> int:
    """Rows that an embedding must have for a saved adapter; 0 where it asks for none."""
    asked = json.loads((adapter_dir / CONFIG).read_text(encoding="utf-8")).get(KEY) or {}
    return max((max(ids) + 1 for ids in (asked.values() if isinstance(asked, dict) else [asked])), default=0)


def _by_layer(asked: dict[str, list[int]] | list[int], tensors: Iterable[str]) -> dict[str, list[int]]:
    """What peft is asked to train: ids by layer, or ids alone, which are of the layers whose rows lie in the file."""
    if isinstance(asked, dict):
        return asked
    return {name.removesuffix(SUFFIX): asked for name in tensors if name.endswith(SUFFIX)}


def rows_of(adapter_dir: Path) -> Rows:
    """Those of a saved adapter; none for most."""
    config = json.loads((adapter_dir / CONFIG).read_text(encoding="utf-8"))
    return Rows.of(config, load_file(adapter_dir / WEIGHTS)) if config.get(KEY) else Rows()


@torch.no_grad()
def inherit(model: Any, adapter_dir: Path) -> None:
    """A finished run's rows in the base in memory, to be trained on."""
    rows = rows_of(adapter_dir)
    if not rows:
        return
    make_room(model, size_of(adapter_dir))
    for layer, (ids, values) in rows.items():
        weight: Any = model.get_submodule(layer).weight
        weight[ids] = values.to(weight)
    model.trained_tokens = sorted({*trained_tokens(model), *(i for ids, _ in rows.values() for i in ids)})


def settings(model: Any) -> dict[str, list[int]] | None:
    """What peft is told to train of a base's rows. Raises UserError for a head that peft would compute without its bias."""
    ids = trained_tokens(model)
    if not ids:
        return None
    layers = embedding_and_head(model)
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise UserError(f"model.add_tokens: the head of {type(model).__name__} has a bias, which peft leaves out; use peft=none")
    names = {id(module): name for name, module in model.named_modules()}
    return {names[id(layer)]: ids for layer in layers}


def check_tied(model: Any) -> None:
    """Raises UserError where peft has put rows over the embedding, and not over a head that shares its weight."""
    base = model.get_base_model()
    if not hasattr(base, "get_input_embeddings"):  # a denoiser has no tokens
        return
    words, output = base.get_input_embeddings(), base.get_output_embeddings()
    if hasattr(words, "token_adapter") and output is not None and not hasattr(output, "token_adapter"):
        raise UserError(f"model.add_tokens: peft does not see that the head of {type(base).__name__} is tied; use peft=none")


def write_rows(model: Any, adapter: str, out_dir: Path) -> None:
    """Add the trained rows to the files of a LoRA that is written without them."""
    from posttrain.tensors import whole

    layers = getattr(model.peft_config[adapter], KEY, None)
    if not layers:
        return
    base = model.get_base_model()
    deltas = {layer: base.get_submodule(layer).token_adapter.trainable_tokens_delta[adapter] for layer in layers}
    rows = {f"{PREFIX}{layer}{SUFFIX}": whole(delta).float().contiguous() for layer, delta in deltas.items()}
    save_file(load_file(out_dir / WEIGHTS) | rows, out_dir / WEIGHTS, metadata={"format": "pt"})
    _change(out_dir, {KEY: layers})


def drop_layer(layer: str, config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An adapter without rows of one layer."""
    if not config.get(KEY):
        return config, tensors
    kept = {name: tensor for name, tensor in tensors.items() if name != f"{PREFIX}{layer}{SUFFIX}"}
    layers = _by_layer(config[KEY], (name.removeprefix(PREFIX) for name in tensors))
    return config | {KEY: {name: ids for name, ids in layers.items() if name != layer}}, kept


def merge_rows(directory: Path, rows: Rows) -> None:
    """Put rows into the files of a model that lies in `directory`, with as many as they need. Raises RunError where a layer is
    not in the files."""
    files = sorted(directory.glob("*.safetensors"))
    for layer, (ids, values) in rows.items():
        end = f".{layer.rpartition('.')[2]}.weight"
        found = [old for file in files for old in _tensors(file, lambda name, _, end=end: f".{name}".endswith(end)).values()]
        if len(found) != 1:
            raise RunError(f"the base's files have {len(found)} weights that may be {layer}, whose rows were trained")
        old, size = found[0], max(len(found[0]), max(ids) + 1)
        new = torch.cat([old, old.new_zeros(size - len(old), old.shape[1])])
        new[ids] = values.to(new)
        for file in files:  # a head that is tied may lie there too
            alike = _tensors(file, lambda _, shape, old=old: shape == list(old.shape))
            if same := [name for name, tensor in alike.items() if torch.equal(tensor, old)]:
                save_file(load_file(file) | {name: new.clone() for name in same}, file, metadata={"format": "pt"})
        _grow(directory / "config.json", len(old), size)


def _tensors(file: Path, wanted: Callable[[str, list[int]], bool]) -> dict[str, Tensor]:
    """Those of a file whose name and shape are wanted."""
    with safe_open(file, framework="pt") as shard:
        names = [name for name in shard.keys() if wanted(name, shard.get_slice(name).get_shape())]  # noqa: SIM118
        return {name: shard.get_tensor(name) for name in names}


def _grow(file: Path, rows: int, size: int) -> None:
    """A model's config.json with a vocabulary of `size`, where it was smaller."""
    config = json.loads(file.read_text(encoding="utf-8"))
    for part in (config, config.get("text_config")):
        if part and part.get("vocab_size", size) < size > rows:
            part["vocab_size"] = size
    file.write_text(json.dumps(config, indent=2), encoding="utf-8")


def without_rows(model: Any, config: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's tensors for a model whose base has its rows in memory; its config, of peft's, is changed. Where the model
    has rows over them, peft looks for such of every adapter: it finds empty ones, and leaves them."""
    setattr(config, KEY, None)
    over = {f"{name}{SUFFIX}": torch.empty(0) for name, module in model.named_modules() if hasattr(module, "token_adapter")}
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(SUFFIX)} | over


def _change(out_dir: Path, settings: dict[str, Any]) -> None:
    file = out_dir / CONFIG
    changed = json.loads(file.read_text(encoding="utf-8")) | settings
    file.write_text(json.dumps(changed, indent=2, sort_keys=True), encoding="utf-8")
