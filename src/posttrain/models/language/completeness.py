"""Are all weights of a model in its files, and is all that is in the files in the model?"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from posttrain.console import say
from posttrain.errors import UserError

HEAD = "score.weight"  # of a reward model, which a language model has no place for: it is read elsewhere
SHOWN = 3


@dataclass(frozen=True)
class Gaps:
    """Tensors, by the model's names: missing in the files; unexpected in them; mismatched, with the shapes there and here."""

    missing: list[str]
    unexpected: list[str]
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]]

    @classmethod
    def of(cls, model: Any, info: dict[str, Any], is_scorer: bool) -> Gaps:
        """info: of transformers' `output_loading_info`, which knows of tied weights and of what a class leaves out.

        is_scorer: the files are a whole reward model's, whose language head is never used. Layers that predict further tokens,
        which config.json counts apart, are no part of the model.
        """
        missing, unexpected = set(info["missing_keys"]), set(info["unexpected_keys"])
        if is_scorer:
            unexpected.discard(HEAD)
            head = model.get_output_embeddings()
            missing = {name for name in missing if model.get_submodule(name.rpartition(".")[0]) is not head}
        mismatched = [(name, tuple(there), tuple(here)) for name, there, here in info["mismatched_keys"]]
        further = _further_layers(model.config)
        return cls(sorted(missing), sorted(n for n in unexpected if not further(n)), sorted(mismatched))

    def check(self, name: str, unexpected: Literal["refuse", "say"]) -> None:
        """Raises UserError, about the model of `name`, where something is missing or has another shape.

        unexpected: what becomes of tensors that the model has no place for.
        """
        if self.mismatched:
            shapes = [f"{n} is {_shape(there)}, not {_shape(here)}" for n, there, here in self.mismatched]
            raise UserError(
                f"model.name: '{name}' has {_count(shapes)} of another shape than its config.json says ({_some(shapes)}); "
                "give the config.json that belongs to the weights"
            )
        if self.missing:
            raise UserError(
                f"model.name: '{name}' lacks {_count(self.missing)}, which would be random numbers ({_some(self.missing)}); give "
                "the whole checkpoint, with the config.json that belongs to it"
            )
        if self.unexpected:
            what = f"{_count(self.unexpected)} that the model has no place for ({_some(self.unexpected)})"
            if unexpected == "refuse":
                raise UserError(
                    f"model.name: '{name}' holds {what}; give the config.json that belongs to the weights, or leave them out by "
                    "model.ignore_unexpected=true"
                )
            say(f"left out of {name}: {what}")


def _further_layers(config: Any) -> Any:
    """Does a name lie in a layer beyond the model's own that config.json counts, such as DeepSeek's for the token after next?"""
    text = config.get_text_config()
    own, further = getattr(text, "num_hidden_layers", 0), getattr(text, "num_nextn_predict_layers", 0) or 0

    def is_further(name: str) -> bool:
        found = re.search(r"\blayers\.(\d+)\.", name)
        return bool(found) and own <= int(found[1]) < own + further

    return is_further


def _count(names: list[str]) -> str:
    return f"{len(names):,} tensor{'s' if len(names) > 1 else ''}"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _shape(sizes: Iterable[int]) -> str:
    return "x".join(map(str, sizes)) or "a number"
