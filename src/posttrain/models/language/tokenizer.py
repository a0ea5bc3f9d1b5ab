"""Tokenizers of transformers, without the models: quick to import."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoTokenizer

from posttrain.data.chat.encoder import Encoder
from posttrain.data.chat.loss_weights import PLAIN, Weighing
from posttrain.data.chat.options import ChatOptions
from posttrain.data.chat.template_text import chat_template as template_text
from posttrain.errors import UserError, reading
from posttrain.models.hub import ResolvedModel, resolve
from posttrain.models.trust import may_run_code
from posttrain.runs.files import write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATION = "generation_config.json"


def load_tokenizer(name: str, revision: str | None, code: str | None, chat_template: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer of `name`, its vocabulary as it is. chat_template: in place of its own, a built-in one's name (chatml) or a
    Jinja file. code: as `may_run_code` takes it.

    name: as for `load_causal`, or a directory with a tokenizer alone (a run's adapter).
    """
    template = template_text(chat_template) if chat_template else None
    directory = Path(name).expanduser()
    if (directory / "tokenizer_config.json").is_file():
        return _tokenizer(ResolvedModel(name, directory, None, "a directory"), code, template)
    return _tokenizer(resolve(name, revision, weights=False), code, template)


def make_encoder(
    tokenizer: PreTrainedTokenizerBase, source: str, revision: str | None, weighing: Weighing = PLAIN,
    options: ChatOptions | None = None, before: str | None = None,
) -> Encoder:  # fmt: skip
    """What turns rows into the tokens that the model of `source` learns, or is measured by: with the tokens at which it stops.

    Without those some templates cannot be encoded (GLM ends a turn by the next turn's header), and rows that a run has tokenised
    are not found in the cache again.

    Args:
        tokenizer: of load_tokenizer, with the chat template that is meant.
        source: where the base's generation_config is, as for `load_causal`.
        revision: of `source`.
        weighing: how much which trained tokens count.
        options: what of a conversation the chat template gets. None: as a format of rows alone has it.
        before: where the options do not say whether prompts that are texts are a user's turns: what rendered those of the run
            that the model is from (chat, none); None: they are, if the model stops where its chat template ends a turn.

    Raises UserError where the options ask for a chat template, and there is none.
    """
    stops = stop_tokens(source, revision, tokenizer)
    with reading(f"model.name: the tokenizer of {source} cannot be used", "give the files of one made by save_pretrained"):
        encoder = Encoder(tokenizer, stops, weighing, options)
    if options is None:
        return encoder
    if options.template and not tokenizer.chat_template:
        raise UserError("data.template: this tokenizer has no chat template; give model.chat_template=chatml or a Jinja file")
    if options.template is None:
        return encoder.templated(before == "chat" if before else encoder.of_chat_model)
    return encoder


def write_ends(folder: Path, ends: list[int], base: Path | None = None) -> None:
    """Have plain `generate()` stop at `ends`: they become the eos_token_id of the folder's generation_config.json.

    base: the directory whose settings of generation are kept; None: the folder's own.
    """
    found: dict[str, Any] = {}
    directory = base or folder
    if (directory / GENERATION).is_file():
        found = json.loads((directory / GENERATION).read_text(encoding="utf-8"))
    elif (directory / "config.json").is_file():
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        found = {key: config[key] for key in ("bos_token_id", "pad_token_id") if config.get(key) is not None}
    if ends:
        write_json(folder / GENERATION, found | {"eos_token_id": ends if len(ends) > 1 else ends[0]})


def stop_tokens(name: str, revision: str | None, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Texts of the tokens at which the model of `name` stops, as its generation_config says; often eos alone."""
    file = resolve(name, revision, weights=False).directory / GENERATION
    if not file.is_file():
        return []
    with reading(f"model.name: {file} cannot be read", "give one made by save_pretrained, or leave it out"):
        ids = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        return [str(tokenizer.decode([i])) for i in (ids if isinstance(ids, list) else [ids] if ids is not None else [])]


def _tokenizer(source: ResolvedModel, code: str | None, chat_template: str | None) -> PreTrainedTokenizerBase:
    with reading(f"model.name: no tokenizer can be loaded from {source.path}", "give the files of one made by save_pretrained"):
        try:
            tokenizer = AutoTokenizer.from_pretrained(source.directory, trust_remote_code=may_run_code(source.directory, code))
        except Exception:
            _check_config(source.directory, code)
            raise
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


def _check_config(directory: Path, code: str | None) -> None:
    """Raises UserError for a model's config that cannot be read: a tokenizer's loader asks it for a class, and meets it first."""
    from posttrain.models.language.architecture import config_of  # with the models

    if (directory / "config.json").is_file():
        config_of(directory, code)
