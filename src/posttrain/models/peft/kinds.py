"""What an adapter's files are, by their adapter_config.json. What is not known here is neither merged nor added to another."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from posttrain.config.interfaces import METHODS, AdapterKind
from posttrain.errors import UserError
from posttrain.runs.artifact import WITHOUT_EFFECT

# of adapter_config.json: what makes a difference to what an adapter does where it has another value than these
PLAIN = {
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian"),
    "modules_to_save": (["score"], ["classifier", "score"]),
}
# of rows of the embedding and of the head that are trained beside an adapter (tokens.py): the setting, and the ends of names
ROWS, ROWS_END = "trainable_token_indices", ".token_adapter.trainable_tokens_delta"
HEAD = "score.weight"  # a reward model's, which a language model is merged without


def kind_of(config: dict[str, Any]) -> AdapterKind | None:
    """The kind of an adapter with this adapter_config.json; None for one that no method here leaves."""
    return next((kind for kind in _known() if kind.holds(config)), None)


def require_kind(config: dict[str, Any], field: str) -> AdapterKind:
    """As `kind_of`. Raises UserError, about `field`, for one that is not known."""
    kind = kind_of(config)
    if kind is None:
        merged = ", ".join(sorted(kind.name for kind in _known() if kind.merges))
        strange = f"its adapter is of peft's type {config.get('peft_type')}, which is not known here"
        raise UserError(f"{field}: {strange} (what can be merged: {merged})")
    return kind


def way_on(kind: AdapterKind, parent: dict[str, Any]) -> str:
    """What a stage can do with an adapter that it can neither lie on nor go on with as it was told."""
    if not leaves_the_base(parent):
        return "put it into its base by peft's merge_and_unload first"
    if not kind.objection(parent):
        return "say chain.mode=merge"
    names = [name for name, method in METHODS.all().items() if method.saves is kind and method.can_continue]
    return f"say chain.mode=continue with peft={names[0]}" if names else "start from the model that it was trained on"


def is_plain_sum(config: dict[str, Any]) -> bool:
    """Is it a sum B A and nothing besides, so that it can lie under another adapter, and be added to one?"""
    kind = kind_of(config)
    return kind is not None and kind.is_sum and not kind.objection(config)


def leaves_the_base(config: dict[str, Any]) -> bool:
    """Can others lie beside it? Some inits, biases and whole modules change the base itself."""
    return all(not config.get(key) or config[key] in plain for key, plain in PLAIN.items())


def odd_setting(config: dict[str, Any], understood: Collection[str]) -> str:
    """The first setting of an adapter_config.json that a merge which knows those of `understood` cannot be sure of; or ''."""
    known = {*understood, *WITHOUT_EFFECT, *PLAIN}
    odd = [key for key, value in config.items() if value and key not in known]
    odd += [key for key, plain in PLAIN.items() if config.get(key) and config[key] not in plain]
    return f"it has {odd[0]}={config[odd[0]]}, with which no merge is known" if odd else ""


def odd_tensor(tensors: Collection[str], ends: tuple[str, ...]) -> str:
    """The first tensor that is none of a layer's, whose names end so, and no reward model's head; or ''."""
    odd = [name for name in tensors if name != HEAD and not name.endswith(ends)]
    return f"no merge is known of its {odd[0]}" if odd else ""


def _known() -> list[AdapterKind]:
    return list({method.saves.name: method.saves for method in METHODS.all().values() if method.saves}.values())
