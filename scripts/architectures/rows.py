"""A few short rows, and what plain transformers says of a model on them: a row a forward, and nothing of posttrain's."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from architectures.tokens import END, WORDS, make_tokenizer, token_ids
from posttrain.models.language.decoder import before_head, decoder_of, last_hidden

ROWS, STEPS, LR = 8, 2, 1e-2
EPSILON = 1e-3  # of Adam: so large that rounding in a gradient near 0 does not become a step


def conversations() -> list[dict[str, Any]]:
    """Of different lengths, some longer than the models' windows of 16."""
    found = []
    for number in range(ROWS):
        words = WORDS[number:] + WORDS[:number]
        user = {"role": "user", "content": " ".join(words[: 2 + number % 3])}
        found.append({"messages": [user, {"role": "assistant", "content": " ".join(words[3 : 6 + 2 * number])}]})
    return found


def pairs() -> list[dict[str, Any]]:
    """A prompt, and two answers to it."""
    found = []
    for number, row in enumerate(conversations()):
        user, answer = row["messages"]
        other = {"role": "assistant", "content": " ".join(WORDS[5 : 7 + number])}
        found.append({"prompt": [user], "chosen": [answer], "rejected": [other]})
    return found


def write_rows(folder: Path) -> None:
    """rows.jsonl and pairs.jsonl."""
    for name, rows in (("rows", conversations()), ("pairs", pairs())):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@dataclass(frozen=True)
class Tokens:
    """One row. trained: which of them are learned, as the chat template marks them."""

    ids: Tensor
    trained: Tensor


def tokens(messages: list[dict[str, str]]) -> Tokens:
    """By the tokenizer's own template."""
    found = make_tokenizer().apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    return Tokens(torch.tensor([found["input_ids"]]), torch.tensor(found["assistant_masks"]).bool())


def answer_logprob(model: Any, row: Tokens) -> Tensor:
    """Sum of log p of the trained tokens."""
    logits = model(input_ids=row.ids, use_cache=False).logits[0, :-1].double()
    return logits.log_softmax(-1).gather(1, row.ids[0, 1:, None])[:, 0][row.trained[1:]].sum()


def learned_rows() -> list[Tokens]:
    """The conversations' tokens."""
    return [tokens(row["messages"]) for row in conversations()]


@torch.no_grad()
def plain_loss(model: Any) -> float:
    """Mean over all trained tokens of the conversations."""
    rows = learned_rows()
    return -sum(float(answer_logprob(model, row)) for row in rows) / sum(int(row.trained[1:].sum()) for row in rows)


@torch.no_grad()
def plain_chosen(model: Any) -> float:
    """Mean over the pairs of log p of the chosen answer."""
    found = [tokens([*pair["prompt"], *pair["chosen"]]) for pair in pairs()]
    return sum(float(answer_logprob(model, row)) for row in found) / len(found)


@torch.no_grad()
def plain_score(model: Any, head: Tensor) -> float:
    """Mean over the chosen answers of head times the last hidden state at the end of turn."""
    found, causal = [], model.get_base_model() if hasattr(model, "get_base_model") else model
    for pair in pairs():
        row = tokens([*pair["prompt"], *pair["chosen"]])
        end = int((row.ids[0] == token_ids()[END]).nonzero()[-1])
        hidden = last_hidden(decoder_of(causal)(input_ids=row.ids, use_cache=False), before_head(causal))
        found.append(float(head.double() @ hidden[0, end].double()))
    return sum(found) / len(found)


def plain_training(model: Any) -> list[tuple[float, float]]:
    """(loss, norm of the gradient) of full training's steps, all rows in each, by a loop of a few lines. `model` is trained."""
    rows = learned_rows()
    count = sum(int(row.trained[1:].sum()) for row in rows)
    parameters = [parameter.requires_grad_() for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LR, eps=EPSILON, weight_decay=0.0)
    found = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        losses = [-answer_logprob(model, row) / count for row in rows]
        for loss in losses:
            loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        found.append((sum(float(loss.detach()) for loss in losses), float(norm)))
    return found


@torch.no_grad()
def sees_later(model: Any) -> bool:
    """Does a token change what is predicted before it? Then nothing is predicted, and the model is no causal one."""
    row = torch.arange(64, 84)[None]
    other = row.clone()
    other[0, -1] = 90
    first, second = (model(input_ids=each, use_cache=False).logits[0, :-1] for each in (row, other))
    return not torch.allclose(first, second, atol=1e-4)
