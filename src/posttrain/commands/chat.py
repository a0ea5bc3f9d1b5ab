"""`posttrain chat`: a conversation with a run's result, word by word as it speaks."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import TextStreamer

from posttrain.commands.words import runs_and_settings
from posttrain.console import printable, say
from posttrain.errors import UserError, did_you_mean
from posttrain.models.kernels.choice import for_inference, use_kernels
from posttrain.models.language.loading import LoadedModel, device_here, load_models, switch

HELP = "/reset forgets the conversation, /adapter NAME switches, /exit ends; Ctrl-C stops an answer"


class _Streamer(TextStreamer):
    """An answer as it comes; what it holds cannot steer the terminal."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """As the base's."""
        super().on_finalized_text(printable(text), stream_end)


@dataclass
class Conversation:
    """Messages so far, and how answers are drawn. temperature 0: the likeliest token."""

    live: LoadedModel
    temperature: float
    top_p: float
    max_new_tokens: int
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)
    _lost: set[str] = field(default_factory=set[str])

    def __post_init__(self) -> None:
        use_kernels(self.live.model, self.live.kernels)

    def answer(self, text: str, stream: bool = False) -> str:
        """The model's answer to `text`, which joins the conversation with it."""
        self.messages.append({"role": "user", "content": text})
        tokenizer, model = self.live.tokenizer, self.live.model
        prompt = torch.tensor([self.prompt()], device=model.device)
        drawn = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p}
        with torch.no_grad(), for_inference(model, self.live.kernels):
            out = model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=self.max_new_tokens,
                streamer=_Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None,
                eos_token_id=self.live.ends,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
                **(drawn if self.temperature else {"do_sample": False}),
            )
        said = tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True)
        self.messages.append({"role": "assistant", "content": said})
        return said

    def reset(self) -> None:
        """Forget all messages."""
        self.messages.clear()

    def prompt(self) -> list[int]:
        """The tokens after which the answer begins: rendered as the run's rows were, what is lost of them said once."""
        first = [{"role": "system", "content": self.system}] if self.system else []
        said = [*first, *self.messages]
        row = {"messages": said} if self.live.is_chat else {"prompt": "\n".join(message["content"] for message in said)}
        encoder = self.live.encoder
        encoder = encoder.reading_as(replace(encoder.options, template=self.live.is_chat, on_loss="warn"))
        ((tokens, _, lost),) = encoder.encode_prompts([(1, row)], str)
        for part in [each.name for each in lost if each.name not in self._lost]:
            say(f"{part}: not rendered by the chat template")
            self._lost.add(part)
        return tokens


def _greeting(live: LoadedModel) -> str:
    """What to say where the model is not spoken with as people expect; empty where it is."""
    if live.is_chat or live.words.get("data.template") == "none":
        return ""
    if not live.tokenizer.chat_template:
        return "this model has no chat template: it goes on with your text"
    whose = (
        "the rows of this run were" if live.artifact.is_run else "this model does not stop at its chat template's end of turn:"
    )
    return f"{whose} plain text, so it goes on with your text; data.template=chat speaks by the chat template"


def chat(
    words: list[str], system: str | None, prompt: str | None, temperature: float, top_p: float, max_new_tokens: int, seed: int
) -> None:
    """Talk with a run's result, or a bare model, until the input ends. prompt: answer this alone.

    words: runs of one base, which are switched between with /adapter NAME, and settings of `data` in place of the run's own.
    """
    runs, _, of_data = runs_and_settings(words)
    if not runs:
        raise UserError("give a run directory, or a model: posttrain chat RUN")
    torch.manual_seed(seed)
    live, names = load_models(runs, device_here(), of_data)
    conversation = Conversation(live, temperature, top_p, max_new_tokens, system)
    switch(live, names, names[0])
    if greeting := _greeting(live):
        say(greeting)
    if prompt is not None:
        conversation.answer(prompt, stream=True)
        return
    on_terminal = sys.stdin.isatty()
    if on_terminal:
        import readline  # noqa: F401 (gives input() a history)

        say(f"{', '.join(names)}: {HELP}")
    while (line := _read(on_terminal)) is not None:
        if line.startswith("/"):
            if line in ("/exit", "/quit"):
                return
            _command(line, conversation, names)
        elif line.strip():
            try:
                conversation.answer(line, stream=True)
            except KeyboardInterrupt:
                say("")


def _read(on_terminal: bool) -> str | None:
    try:
        return input("> " if on_terminal else "")
    except (EOFError, KeyboardInterrupt):
        return None


def _command(line: str, conversation: Conversation, names: list[str]) -> None:
    word, _, rest = line.partition(" ")
    try:
        if word == "/reset":
            conversation.reset()
            say("the conversation is forgotten")
        elif word == "/adapter":
            choose(conversation.live, names, rest.strip())
            say(f"{rest.strip()} speaks")
        else:
            say(HELP)
    except UserError as error:
        say(str(error))


def choose(live: Any, names: list[str], name: str) -> None:
    """`switch`, with a word where there is no such adapter. Raises UserError."""
    if name not in names:
        raise UserError(f"there is no adapter '{name}'{did_you_mean(name, names)} (there are: {', '.join(names)})")
    switch(live, names, name)
