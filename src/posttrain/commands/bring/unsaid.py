"""What the other tool does where its file says nothing, and we do otherwise: said, where it cannot be written as a setting."""

from __future__ import annotations

from typing import Any

from posttrain.commands.bring.tools import AXOLOTL, FACTORY, TRL
from posttrain.commands.bring.translation import Translation

_HELD_OUT = {AXOLOTL: "val_set_size", FACTORY: "val_size", TRL: "eval_dataset"}
_LENGTHS = ("max_length", "max_seq_length", "max_seq_len")


def say_unsaid(found: Translation, tree: dict[str, Any]) -> None:
    """tree: the file's own words, without what the tool does by default."""
    if not {"data.eval_share", "data.eval_rows", "data.eval_path"} & found.settings.keys():
        why = f"{found.tool} holds no rows out; here some are (data.eval_share), and not trained on: data.eval_rows=0 for none"
        found.unsaid.append((_HELD_OUT[found.tool], why))
    if found.tool == AXOLOTL and found.stage != "ppo" and not tree.get("excess_length_strategy"):
        why = "Axolotl drops rows that are longer than sequence_len; here they are cut to train.max_length, and counted"
        found.unsaid.append(("excess_length_strategy", why))
    if found.tool == TRL and found.stage == "sft" and not tree.get("assistant_only_loss"):
        _say_whose(found, tree)
    if word := next((each for each in _LENGTHS if each in tree and tree[each] is None), ""):
        found.unsaid.append((word, "null there is no limit; here train.max_length is one: raise it above your longest row"))


def _say_whose(found: Translation, tree: dict[str, Any]) -> None:
    if "data.train_on" not in found.settings:
        why = "TRL learns all tokens of messages where it is not true; here the assistant's alone: data.train_on=all for all"
    elif tree.get("completion_only_loss") is None:
        why = "of rows that are prompt and completion TRL learns the completion alone; for those say data.train_on=assistant"
    else:
        return
    found.unsaid.append(("assistant_only_loss", why))
