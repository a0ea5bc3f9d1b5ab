"""Shell completion of config groups, their options, and keys."""

from __future__ import annotations

from hydra._internal.core_plugins.bash_completion import BashCompletion

from posttrain.config.compose import opened


def complete(stage: str, word: str) -> list[str]:
    """`+peft=ql` -> ["+peft=qlora"], `optim.l` -> ["optim.lr="]: what Hydra's own completion of this stage offers."""
    with opened(None) as hydra:
        return BashCompletion(hydra.config_loader)._query(stage, word)
