"""Tokens that a run adds or trains: their ids, and their rows of the embedding and of the head.

A new row begins as the mean of the rows of the tokens that its text was spelt with before (its pieces), in the embedding and in a
head that is not tied to it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from tokenizers import AddedToken
from torch import nn

from posttrain.errors import UserError
from posttrain.models.language.architecture import model_class
from posttrain.models.language.decoder import decoder_of

SPECIAL = r"<\|.+\|>"  # texts that decoding leaves out, as it does all special tokens
SHOWN = 5


class NewToken(NamedTuple):
    """pieces: ids whose mean its row begins as; none where the row is there already, and stays as it is at the start."""

    text: str
    id: int
    pieces: tuple[int, ...]


def add_tokens(tokenizer: Any, texts: Sequence[str], rows: int) -> list[NewToken]:
    """Put `texts` into the tokenizer, where they are not. rows: of the embedding.

    Raises UserError for a text without pieces, and where the tokenizer has other tokens without a row.
    """
    known = tokenizer.get_vocab()
    if beyond := sorted((i, token) for token, i in known.items() if i >= rows and token not in texts):
        names = ", ".join(token for _, token in beyond[:SHOWN]) + (", ..." if len(beyond) > SHOWN else "")
        raise UserError(
            f"model.name: the tokenizer has {len(beyond):,} tokens more than the embedding's {rows:,} rows ({names}); add rows "
            "for them by model.add_tokens=[...], or give the model's own tokenizer"
        )
    pieces = {text: _pieces(tokenizer, text) for text in texts if known.get(text, rows) >= rows}
    for text in texts:
        if text not in known:
            special = bool(re.fullmatch(SPECIAL, text))
            tokenizer.add_tokens([AddedToken(text, normalized=False, special=special)], special_tokens=special)
    return [NewToken(text, tokenizer.convert_tokens_to_ids(text), pieces.get(text, ())) for text in texts]


def _pieces(tokenizer: Any, text: str) -> tuple[int, ...]:
    """The ids that spell a text where it is no token itself."""
    if text not in tokenizer.get_vocab():
        found = tokenizer.encode(text, add_special_tokens=False)
    else:  # the tokenizer has it, so only the model within can spell it
        backend = tokenizer.backend_tokenizer
        plain = backend.normalizer.normalize_str(text) if backend.normalizer else text
        words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(plain)] if backend.pre_tokenizer else [plain]
        found = [piece.id for word in words for piece in backend.model.tokenize(word)]
    if not found:
        raise UserError(f"model.add_tokens: '{text}' is spelt with no token of the tokenizer, so that its row has no start")
    return tuple(found)


def give_rows(model: Any, tokens: Sequence[NewToken]) -> None:
    """Rows of the embedding, and of the head, for all of `tokens`; it becomes larger only where there are too few. Keeps in
    `model.trained_tokens` which are to be trained."""
    if not tokens:
        return
    make_room(model, max(token.id for token in tokens) + 1)
    for layer in embedding_and_head(model):
        start_rows(layer.weight, tokens)
        if getattr(layer, "bias", None) is not None:
            start_rows(layer.bias, tokens)
    model.trained_tokens = sorted({*trained_tokens(model), *(token.id for token in tokens)})


@torch.no_grad()
def start_rows(tensor: torch.Tensor, tokens: Sequence[NewToken]) -> None:
    """The mean of its pieces' in place of every new row. tensor: [rows, H], or a bias [rows]."""
    means = [(token.id, tensor[list(token.pieces)].float().mean(0)) for token in tokens if token.pieces]
    for row, mean in means:
        tensor[row] = mean.to(tensor.dtype)


def make_room(model: Any, size: int) -> None:
    """An embedding, and a head, of at least `size` rows."""
    check_embeddings(model)
    rows = model.get_input_embeddings().weight.shape[0]
    if size > rows:
        model.resize_token_embeddings(size, mean_resizing=False)


def check_embeddings(model: Any) -> None:
    """Raises UserError for a model whose layers have embeddings of their own."""
    words: Any = model.get_input_embeddings()
    sizes = (words.weight.shape[0], getattr(model.config.get_text_config(), "vocab_size_per_layer_input", None))
    others = [m for m in decoder_of(model).modules() if isinstance(m, nn.Embedding) and m is not words]
    if any(other.num_embeddings in sizes for other in others):
        raise UserError(
            f"model.add_tokens: {type(model).__name__} has an embedding for its layers too, which would lack the tokens"
        )


def embedding_and_head(model: Any) -> list[Any]:
    """The input embedding, and the head where it has a weight of its own."""
    words, output = model.get_input_embeddings(), model.get_output_embeddings()
    return [words] if output is None or output.weight is words.weight else [words, output]


def trained_tokens(model: Any) -> list[int]:
    """Ids of the tokens whose rows are trained beside an adapter."""
    return getattr(model, "trained_tokens", [])


def embedding_rows(config: Any, wanted: int | None, code: str | None = None) -> int:
    """Rows of the embedding of a model with this config of transformers', which may be more than its vocabulary. wanted: with so
    many there is no need to look closer; None: it is to have more, and UserError where it cannot."""
    said = getattr(config.get_text_config(), "vocab_size", None) or 0
    if wanted is not None and said >= wanted:
        return said
    with torch.device("meta"):
        model = model_class(config).from_config(config, trust_remote_code=code is not None)
    if wanted is None:
        check_embeddings(model)
    return model.get_input_embeddings().weight.shape[0]


def line_of(tokens: Sequence[NewToken], rows: int) -> str:
    """What becomes of the tokens, for the user. rows: of the embedding, before."""
    counts = {
        "new rows": sum(bool(token.pieces) and token.id >= rows for token in tokens),
        "rows that no token had": sum(bool(token.pieces) and token.id < rows for token in tokens),
        "rows that are trained from where they are": sum(not token.pieces for token in tokens),
    }
    return "model.add_tokens, in the embedding: " + ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)
