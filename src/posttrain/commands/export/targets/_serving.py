"""What Ollama and vLLM want beside the weights: a Modelfile, a command line, and an adapter of a form that they know."""

from __future__ import annotations

import json
import shlex
from typing import Any

from posttrain.console import say
from posttrain.data.chat.rendering import Given, Renderer
from posttrain.errors import UserError
from posttrain.models.peft.kinds import ROWS as OWN_ROWS
from posttrain.models.peft.merge import Adapter
from posttrain.runs.artifact import Artifact

# a turn, and what comes before an answer; in Python for `_shape`, in Go for Ollama
SHAPES = {
    "ChatML": ("<|im_start|>{role}\n{content}<|im_end|>\n", "<|im_start|>assistant\n"),
    "Llama 3": (
        "<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
}
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's --max-lora-rank takes


def modelfile(file: str, tokenizer: Any, ends: list[int]) -> str:
    """Ollama's: the file, the chat template where its shape is known, and a stop for each of `ends`."""
    lines = [f"FROM ./{file}"]
    shape, system = _shape(tokenizer)
    if shape:
        turn, answer = SHAPES[shape]
        go = turn.format(role="{{ .Role }}", content="{{ .Content }}")
        lines.append(
            f'TEMPLATE """{{{{- range .Messages }}}}{go}{{{{- end }}}}{answer}"""'.replace("\n{{- end }}", "\n{{ end }}")
        )
        if system:
            lines.append(f'SYSTEM """{system}"""')
    elif tokenizer.chat_template:
        say("the chat template has none of the shapes that are written for Ollama (ChatML, Llama 3): add a TEMPLATE by hand")
    else:
        say("the model has no chat template: Ollama gets its prompts as they are")
        lines.append('TEMPLATE "{{ .Prompt }}"')
    stops = [json.dumps(tokenizer.decode([i]), ensure_ascii=False) for i in ends]
    return "\n".join(lines + [f"PARAMETER stop {stop}" for stop in stops]) + "\n"


def _shape(tokenizer: Any) -> tuple[str | None, str]:
    """The name in SHAPES of what the chat template writes, and the system message that it adds by itself."""
    if not tokenizer.chat_template:
        return None, ""
    renderer = Renderer(tokenizer)
    try:
        talk = [{"role": r, "content": f"({i})"} for i, r in enumerate(("system", "user", "assistant", "user"))]
        whole, bare = (renderer.render(messages, Given(), prompt=True)[0] for messages in (talk, talk[1:]))
    except UserError:
        return None, ""
    begin = tokenizer.bos_token if tokenizer.bos_token and tokenizer("x").input_ids[:1] == [tokenizer.bos_token_id] else ""
    for name, (turn, answer) in SHAPES.items():
        written = ["".join(turn.format(**m) for m in messages) + answer for messages in (talk, talk[1:])]
        if whole.removeprefix(begin) != written[0] or not bare.endswith(written[1]):
            continue
        before, after = turn.format(role="system", content="\0").split("\0")
        added = bare.removeprefix(begin).removesuffix(written[1])
        if not added:
            return name, ""
        if added.startswith(before) and added.endswith(after) and '"""' not in added:
            return name, added.removeprefix(before).removesuffix(after)
    return None, ""


def serve_command(artifact: Artifact) -> str:
    """vLLM's, for what lies in the directory `adapter` or `model` beside it. Raises UserError for an adapter that it would not
    take, or would take for another."""
    if artifact.kind == "model":
        return "vllm serve ./model"
    config = artifact.adapter.whole
    if objection := _objection(config):
        way = Adapter(artifact.weights, "run").objection()
        out = f"and it cannot be merged ({way})" if way else "--to hf writes a model that it serves"
        raise UserError(f"run: vLLM serves no such adapter ({objection}); {out}")
    ranks = [config["r"], *(config.get("rank_pattern") or {}).values()]
    rank = next((r for r in RANKS if r >= max(ranks)), None)
    if rank is None:
        raise UserError(f"run: vLLM serves adapters of rank {RANKS[-1]} at most, and this one's is {max(ranks)}; give --to hf")
    held = artifact.quantization.get("method", "none")
    if held != "none":
        say(f"the base was in {held} during training, and vLLM holds it in full: answers may differ a little")
    name = (artifact.directory or artifact.weights).resolve().name
    revision = f" --revision {shlex.quote(artifact.base.revision)}" if artifact.base.revision else ""
    return (
        f"vllm serve {shlex.quote(artifact.source)}{revision} --tokenizer ./adapter --generation-config ./adapter --enable-lora "
        f"--max-lora-rank {rank} "
        f"--lora-modules {shlex.quote(name)}=./adapter"
    )


def _objection(config: dict[str, Any]) -> str:
    """Why vLLM would not take it, or not as it is; '' where nothing is in the way."""
    if config.get("peft_type") != "LORA":
        return f"it is {config.get('peft_type')}, no LoRA"
    if config.get("use_dora"):
        return "DoRA"
    if config.get("modules_to_save") or config.get(OWN_ROWS):
        return "it brings whole modules or tokens of its own"
    if config.get("bias", "none") != "none":
        return "it changes biases"
    if config.get("target_parameters"):
        return "it changes parameters that are no layers"
    if any(name in ("lm_head", "embed_tokens") for name in config.get("target_modules") or []):
        return "it changes the embedding or the head"
    scale = config["lora_alpha"] / config["r"]
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    scales = [alphas.get(k, config["lora_alpha"]) / ranks.get(k, config["r"]) for k in {**ranks, **alphas}]
    if config.get("use_rslora") and scales:
        return "rsLoRA with ranks of several sizes"
    return "layers of several scales, of which vLLM takes one" if any(abs(s / scale - 1) > 1e-6 for s in scales) else ""
