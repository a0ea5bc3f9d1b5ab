"""What rows are used for: the one thing that data code knows of a stage."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RowUse:
    name: str
    takes: tuple[str, ...]
    examples: str
    needs: str


_PAIRS = "prompt, chosen and rejected"
_CHATS = "messages, instruction and output, or prompt and completion"
_PROMPTS = "prompts: messages, instruction and output, prompt and completion, or prompt, chosen and rejected"
USES = {
    use.name: use
    for use in (
        RowUse("cpt", ("text",), "documents", "a text column"),
        RowUse("sft", ("messages", "prompt_completion", "text"), "conversations", _CHATS),
        RowUse("dpo", ("pairs",), "pairs", _PAIRS),
        RowUse("rm", ("pairs",), "scored_pairs", _PAIRS),
        RowUse("ppo", ("messages", "prompt_completion", "pairs"), "prompts", _PROMPTS),
    )
}
