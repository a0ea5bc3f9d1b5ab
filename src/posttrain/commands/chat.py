"""`posttrain chat`: a conversation with a run's result, word by word as it speaks."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TextStreamer

from posttrain.console import say
from posttrain.errors import UserError, did_you_mean
from posttrain.models.kernels.choice import for_inference, use_kernels
from posttrain.models.language.loading import LoadedModel, device_here, load_models, switch

HELP = "/reset forgets the conversation, /adapter NAME switches, /exit ends; Ctrl-C stops an answer"


@dataclass
class Conversation:
    """Messages so far, and how answers are drawn. temperature 0: the likeliest token."""

    live: LoadedModel
    temperature: float
    top_p: float
    max_new_tokens: int
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        use_kernels(self.live.model, self.live.kernels)

    def answer(self, text: str, stream: bool = False) -> str:
        """The model's answer to `text`, which joins the conversation with it."""
        self.messages.append({"role": "user", "content": text})
        tokenizer, model = self.live.tokenizer, self.live.model
        inputs = tokenizer(self._prompt(), return_tensors="pt", add_special_tokens=False).to(model.device)
        drawn = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p}
        with torch.no_grad(), for_inference(model, self.live.kernels):
            out = model.generate(
                **inputs,
                max_new_tokens=self.max_new_tokens,
                streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None,
                eos_token_id=self.live.ends,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
                **(drawn if self.temperature else {"do_sample": False}),
            )
        said = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        self.messages.append({"role": "assistant", "content": said})
        return said

    def reset(self) -> None:
        """Forget all messages."""
        self.messages.clear()

    def _prompt(self) -> str:
        first = [{"role": "system", "content": self.system}] if self.system else []
        if not self.live.tokenizer.chat_template:
            return "\n".join(message["content"] for message in (*first, *self.messages))
        return self.live.tokenizer.apply_chat_template([*first, *self.messages], tokenize=False, add_generation_prompt=True)


def chat(
    runs: list[str], system: str | None, prompt: str | None, temperature: float, top_p: float, max_new_tokens: int, seed: int
) -> None:
    """Talk with a run's result, or a bare model, until the input ends. prompt: answer this alone.

    Several runs of one base are switched between with /adapter NAME.
    """
    torch.manual_seed(seed)
    live, names = load_models(runs, device_here())
    conversation = Conversation(live, temperature, top_p, max_new_tokens, system)
    switch(live, names, names[0])
    if not live.tokenizer.chat_template:
        say("this model has no chat template: it goes on with your text")
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
