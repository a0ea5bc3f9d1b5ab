"""Which chat template is meant: its text by a name or a file, and the hash by which runs know it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from posttrain.errors import UserError, did_you_mean, reading

CHATML = """\
{%- for message in messages -%}
{%- set thoughts = message['reasoning_content'] or message['thinking'] or message['reasoning'] or '' -%}
{%- if thoughts -%}{%- set thoughts = '<think>\\n' + thoughts.strip() + '\\n</think>\\n\\n' -%}{%- endif -%}
{{- '<|im_start|>' + message['role'] + '\\n' + thoughts + message['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def chat_template(name_or_path: str) -> str:
    """The text of a built-in template (chatml) or of a Jinja file."""
    if name_or_path == "chatml":
        return CHATML
    path = Path(name_or_path).expanduser()
    if not path.is_file():
        hint = did_you_mean(name_or_path, ["chatml"])
        raise UserError(f"model.chat_template: '{name_or_path}' is neither chatml nor a file{hint}")
    with reading(f"model.chat_template: {path} cannot be read", "give a text in UTF-8"):
        return path.read_text(encoding="utf-8")


def template_hash(tokenizer: Any) -> str | None:
    """SHA-256 of the template's text (of its sorted JSON where there are several by name); None without a template."""
    template = tokenizer.chat_template
    if not template:
        return None
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
