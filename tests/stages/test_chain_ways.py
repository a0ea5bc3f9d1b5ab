"""Which peft method can go on in which chain.mode, before anything loads; docs/chaining.md and docs/methods.md say the same."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from posttrain.config.compose import compose_run, validate
from posttrain.config.interfaces import METHODS
from posttrain.errors import UserError
from posttrain.stages.language.init import chain_mode

MERGE, ALONE = "say chain.mode=merge", "start from the model that it was trained on"
SUMS = ("lora", "rslora", "loraplus")
OTHERS = ("dora", "vera", "shira", "miss", "oft", "gralora", "hira", "lokr", "loha", "ia3", "c3a")
# by chain.mode what becomes of a method's own adapter, or how the refusal ends
WAYS: dict[str, dict[str, str]] = {
    **{name: {"auto": "stack", "merge": "merge", "stack": "stack", "continue": "continue"} for name in SUMS},
    **{name: {"auto": "merge", "merge": "merge", "stack": MERGE, "continue": "continue"} for name in OTHERS},
    "pissa": {"auto": "stack", "merge": "merge", "stack": "stack", "continue": MERGE},
    "adalora": {"auto": "merge", "merge": "merge", "stack": MERGE, "continue": MERGE},
    "ptuning": dict.fromkeys(("auto", "merge", "stack", "continue"), ALONE),
    **{
        name: {**dict.fromkeys(("auto", "merge", "stack"), f"say chain.mode=continue with peft={name}"), "continue": "continue"}
        for name in ("adapter", "prefix", "prompt")
    },
}  # fmt: skip
INITS = {
    "default": "stack", "pissa": "stack", "olora": "stack", "eva": MERGE, "corda": MERGE, "lora_ga": MERGE,
}  # fmt: skip


def ways(modes: Iterable[str], parent: str, *words: str) -> dict[str, str]:
    """By chain.mode what becomes of a method's adapter, or how the refusal of it ends."""
    method, found = METHODS.get(parent), dict[str, str]()
    config = {"peft_type": method.saves.peft_type, "use_dora": parent == "dora"} if method.saves else {}
    cfg: Any = validate(compose_run("sft", ["model=tiny", *words]))
    for mode in modes:
        try:
            found[mode] = chain_mode(cfg.model_copy(update={"chain": cfg.chain.model_copy(update={"mode": mode})}), config)
        except UserError as error:
            found[mode] = str(error).rpartition("; ")[2]
    return found


def test_every_method_is_in_the_table() -> None:
    assert set(WAYS) == {name for name, method in METHODS.all().items() if method.saves} - {"qlora"}


@pytest.mark.parametrize("name", WAYS)
def test_what_becomes_of_an_adapter_under_the_same_method(name: str) -> None:
    assert ways(WAYS[name], name, f"+peft={name}") == WAYS[name]


@pytest.mark.parametrize("name", INITS)
def test_starts_that_read_what_the_bare_base_computes_are_merged_first(name: str) -> None:
    own = {"stack": "stack", MERGE: "merge"}[INITS[name]]
    going_on = "continue" if name == "default" else MERGE
    expected = {"auto": own, "merge": "merge", "stack": INITS[name], "continue": going_on}
    assert ways(expected, "lora", "+peft=lora", f"peft.init={name}") == expected
