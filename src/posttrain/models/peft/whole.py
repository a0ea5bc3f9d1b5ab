"""Is all of an adapter in its file, and all of the file in the model? peft loads what fits, and says nothing of the rest."""

from __future__ import annotations

import re
from collections.abc import Collection, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from posttrain.errors import UserError

SHOWN = 3
_HEADS = (".score.weight", ".classifier.weight")  # of reward models, which are read elsewhere
_FIX = "give the whole adapter, and the base it belongs to"
_MISFIT = re.compile(
    r"size mismatch for (\S+): copying a param with shape torch.Size\(\[(.*?)\]\) from checkpoint, the shape in current model is "
    r"torch.Size\(\[(.*?)\]\)"
)


@contextmanager
def fitting(adapter_dir: Path) -> Generator[None]:
    """Around a loading. Raises UserError for tensors of another shape."""
    try:
        yield
    except RuntimeError as error:
        if not (found := _MISFIT.findall(str(error))):
            raise
        shapes = [f"{name} is {_shape(there)}, not {_shape(here)}" for name, there, here in found]
        what = f"has {_count(shapes)} of another shape than the base asks for ({_some(shapes)})"
        raise UserError(f"the adapter in {adapter_dir} {what}; {_FIX}") from None


def check_whole(model: Any, name: str, tensors: Collection[str], adapter_dir: Path) -> None:
    """Raises UserError where the tensors that were loaded are not those of the model's adapter `name`.

    tensors: their names, as in memory. What peft writes of the base beside an adapter (a whole embedding) may be there.
    """
    from peft import get_peft_model_state_dict

    try:
        own = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    except KeyError:  # peft does not know what an adapter has beside another one's rows of tokens
        return
    wanted = {_plain(key): key for key in own}
    there = {_plain(key): key for key in tensors}
    begun = {key.rpartition(".")[0] for key in there}  # a layer of which nothing is there is not changed at all
    if lacking := sorted(wanted[key] for key in wanted.keys() - there.keys() if key.rpartition(".")[0] in begun):
        what = f"lacks {_count(lacking)}, which would be random numbers ({_some(lacking)})"
        raise UserError(f"the adapter in {adapter_dir} {what}; {_FIX}")
    base = {_plain(key) for key, _ in (*model.named_parameters(), *model.named_buffers())}
    odd = sorted(there[key] for key in there.keys() - wanted.keys() - base if not there[key].endswith(_HEADS))
    if odd:
        what = f"has {_count(odd)} that the base has no place for ({_some(odd)})"
        raise UserError(f"the adapter in {adapter_dir} {what}; {_FIX}")


def _plain(name: str) -> str:
    """Without what versions of peft write otherwise."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "").removesuffix(".weight")


def _shape(sizes: str) -> str:
    return sizes.replace(", ", "x") or "a number"


def _count(names: Collection[str]) -> str:
    return f"{len(names)} tensor{'s' * (len(names) != 1)}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
