"""Chat templates of strangers: a bomb ends at once and in one line; what is none is rendered as transformers renders it."""

import json
import resource
import time
from typing import Any

import pytest
from jinja2 import TemplateError
from transformers.utils import chat_template_utils

from posttrain.data.chat import sandbox
from posttrain.data.chat.rendering import Given, Renderer
from posttrain.data.chat.sandbox import TooMuch, limit_templates
from posttrain.errors import UserError
from posttrain.models.language.tokenizer import load_tokenizer
from stock_templates import FOLDER, IS_THERE, STOCK

R, S = "range(99999)", "messages[0].content"
BOMBS = {
    "loops in loops": f"{{% for a in {R} %}}{{% for b in {R} %}}{{% endfor %}}{{% endfor %}}",
    "loops that are filtered": f"{{% for a in {R} if a < 0 %}}{{% endfor %}}" * 40,
    "a recursive loop": "{% for x in [1, 1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
    "a recursive macro": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "a doubled text": f"{{% set ns = namespace(x={S}) %}}{{% for a in {R} %}}{{% set ns.x = ns.x ~ ns.x %}}{{% endfor %}}",
    "a sum of texts": f"{{% set ns = namespace(x={S}) %}}{{% for a in {R} %}}{{% set ns.x = ns.x + ns.x %}}{{% endfor %}}",
    "a captured text": "{% set ns = namespace(x='ab') %}{% for a in range(60) %}"
    "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}",
    "a text many times": "{{ 'a' * 10 ** 10 }}",
    "a list many times": "{{ [1] * 10000000000 }}",
    "a number": "{{ 10 ** (10 ** 9) }}",
    "a number that grows": "{% set ns = namespace(x=9) %}{% for a in range(90) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "a width": "{{ 'x'.center(10000000000) }}",
    "a width of %": "{{ '%10000000000d' % 1 }}",
    "a width of % from outside": "{{ '%*d' % (10000000000, 1) }}",
    "a width of the filter format": "{{ '%10000000000d'|format(1) }}",
    "a width of format": "{{ '{:>10000000000}'.format(1) }}",
    "a width of format from outside": "{{ '{:>{w}}'.format(1, w='10000000000') }}",
    "bytes of a number": "{{ (1).to_bytes(10000000000, 'big') }}",
    "what is replaced": "{% set a = 'a' * 100000 %}{{ a.replace('a', a) }}",
    "what is replaced by a filter": "{% set a = 'a' * 100000 %}{{ a|replace('a', a) }}",
    "what is joined": "{% set a = 'a' * 100000 %}{{ a.join(range(90000)|map('string')) }}",
    "what is joined by a filter": "{% set a = 'a' * 100000 %}{{ range(90000)|join(a) }}",
    "what is translated": "{% set a = 'a' * 100000 %}{{ a.translate({97: a}) }}",
    "what is indented": "{% set a = '\\n' * 1000000 %}{{ a|indent(90000, true, true) }}",
    "lists in lists": "{% set ns = namespace(x=[1]) %}{% for a in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
    "{{ ns.x }}",
    "dicts in dicts, as JSON": "{% set ns = namespace(x={}) %}{% for a in range(60) %}{% set ns.x = {1: ns.x, 2: ns.x} %}"
    "{% endfor %}{{ ns.x|tojson }}",
    "lists that are compared": "{% set ns = namespace(x=[1], y=[1]) %}{% for a in range(60) %}{% set ns.x = [ns.x, ns.x] %}"
    "{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.x == ns.y }}",
    "one long text many times": "{% set a = 'a' * 100000 %}{{ [a, a, a, a, a, a, a, a] * 100 }}",
    "slices that are kept": "{% set a = 'a' * 100000 %}{% set ns = namespace(x=[]) %}{% for i in range(500) %}"
    "{% set ns.x = ns.x + [a[1:]] %}{% endfor %}",
    "a filter over many": f"{{% set a = 'a' * 100000 %}}{{{{ {R}|map('upper')|list|length }}}}"
    f"{{% for i in {R} %}}{{{{ a|upper }}}}{{% endfor %}}",
    "indented JSON": "{{ messages|tojson(indent=10000000000) }}",
    "constants": "{{ ('a' * 1000000)|replace('a', 'b' * 1000000) }}",
    "lipsum": "{{ lipsum(1000000) }}",
    "a filter that is left out": "{{ 'x'|center(10000000000) }}",
}


@pytest.fixture
def renderer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A renderer of any template; the first rendering is not looked at."""
    tokenizer: Any = load_tokenizer("tiny", None, None, None)

    def make(template: str) -> Renderer:
        found = Renderer(tokenizer)
        monkeypatch.setattr(found, "_source", lambda given: template)
        return found

    return make


@pytest.mark.parametrize("template", BOMBS.values(), ids=BOMBS)
def test_a_bomb_is_one_line_at_once(template: str, renderer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tenth of the limits, to be quick: under 4 seconds on a busy machine, and 100 MB."""
    monkeypatch.setattr(sandbox, "STEPS", 20_000)
    monkeypatch.setattr(sandbox, "CHARACTERS", 3_200_000)
    made = renderer(template)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.thread_time()
    has_no_limit = template in (BOMBS["lipsum"], BOMBS["a filter that is left out"], BOMBS["a recursive loop"])
    with pytest.raises(UserError if has_no_limit else TooMuch) as found:
        made.render([{"role": "user", "content": "hello"}], Given())
    assert len(str(found.value).splitlines()) == 1 and str(found.value).startswith("the chat template ")
    assert time.thread_time() - began < 4
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB


def test_time_is_limited_too(renderer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "SECONDS", 0.05)
    with pytest.raises(TooMuch, match="takes more than 0 seconds"):
        renderer(BOMBS["loops in loops"]).render([], Given())


def test_the_limits_grow_with_what_is_given(renderer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A document of 2 million characters through a template that copies it 20 times; a loop over 20,000 messages."""
    monkeypatch.setattr(sandbox, "STEPS", 1000)
    monkeypatch.setattr(sandbox, "CHARACTERS", 1000)
    message = {"role": "user", "content": "x" * 2_000_000}
    copies = (
        "{% set ns = namespace(x='') %}{% for i in range(20) %}{% set ns.x = messages[0].content|trim %}{% endfor %}{{ ns.x }}"
    )
    assert len(renderer(copies).render([message], Given())[0]) == 2_000_000
    many = [{"role": "user", "content": "x"}] * 20_000
    loop = "{% for m in messages %}{{ m.content }}{% if loop.last %}{{ loop.length }}{% endif %}{% endfor %}"
    assert renderer(loop).render(many, Given())[0] == "x" * 20_000 + "20000"


def test_every_rendering_of_this_process_is_limited() -> None:
    limit_templates()
    tokenizer: Any = load_tokenizer("tiny", None, None, None)
    with pytest.raises(TooMuch):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], chat_template="{{ 'a' * 10 ** 10 }}", tokenize=False)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "<|im_start|>user\nx<|im_end|>\n"


CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"k": "v", "n": [1, {"a": None}]}}}
TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": " What? "},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nThe dog.", "reasoning_content": "hm"},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": '{"a": 1}', "name": "f", "tool_call_id": "c1"},
    {"role": "assistant", "content": "The fox."},
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {
    "k": {"type": "string", "enum": ["v", "w"]}, "n": {"type": ["array", "null"], "items": {"type": "integer"}}}}}}]  # fmt: skip
MIXED = """{%- set ns = namespace(n=0) -%}
{%- macro show(x, y=2) -%}<{{ x }}{{ y ~ '!' }}{{ caller() if caller }}>{%- endmacro -%}
{%- for m in messages if m.role != 'system' -%}{%- set ns.n = ns.n + loop.index0 -%}{{ loop.revindex }}{{ show(m.role) }}
{%- if loop.last %}{{ m['content'][1:3]|upper }}{% else %}{{ loop.nextitem.role }}{% endif %}{% continue %}x
{%- else -%}none{%- endfor -%}
{%- for k, v in {'a': 1, 'b': [ns.n, 2]}.items() recursive -%}{{ k }}={{ v }};{%- endfor -%}
{{ [1, 2] + [ns.n] }}{{ (1, ns.n) }}{{ 'a%s' % ns.n }}{{ 'b{}'.format(2) }}
{{ ['x', 'y']|join(',') }}{{ 3 ** 2 }}{{ 7 % 4 }}{{ missing }}
{{ messages|map(attribute='role')|unique|list }}{{ messages|selectattr('role', 'equalto', 'user')|list|length }}
{{ {'z': 'ä'}|tojson(indent=2) }}
{{ 'a-b'.split('-')|last }}{{ 'abc'|replace('b', 'x') }}{{ 'a\\nb'|indent(2) }}{{ [3, 1]|sort|first }}
{{ dict(a=1)|items|list }}{{ 5|string|length }}
{% call show('c') %}{% generation %}body{% endgeneration %}{% endcall %}{% set z %}zz{{ 1 }}{% endset %}
{{ z * 2 }}{% filter upper %}up{% endfilter %}"""
SHIPPED = STOCK[::3] if IS_THERE else []
SOURCES = {"mixed": MIXED} | {name: (FOLDER / f"{name}.jinja").read_text(encoding="utf-8") for name in SHIPPED}


@pytest.mark.parametrize("name", SOURCES)
def test_what_is_no_bomb_is_rendered_as_by_transformers(name: str) -> None:
    """Text, spans of generation and refusals, with and without tools; templates as models ship them."""
    source = SOURCES[name]
    plain = getattr(chat_template_utils, "_cached_compile_jinja_template")(source)  # noqa: B009 (private)
    limit_templates()
    ours = chat_template_utils._compile_jinja_template(source)
    assert type(ours.environment).__module__ == sandbox.__name__ != type(plain.environment).__module__
    shown = 0
    for talk in (TALK, TALK[1:4], [m | {"content": [{"type": "text", "text": m["content"]}]} for m in TALK[:4]]):
        for tools in (None, TOOLS):
            found = []
            for template in (plain, ours):
                try:
                    found.append(_rendered(template, json.loads(json.dumps(talk)), tools))
                except (TemplateError, TypeError) as error:
                    found.append(str(error))
            assert found[0] == found[1]
            shown += isinstance(found[0], tuple)
    assert shown


def _rendered(template: Any, messages: Any, tools: Any) -> tuple[str, Any]:
    return chat_template_utils._render_with_assistant_indices(
        template, messages, tools, None, True, bos_token="<s>", eos_token="</s>", enable_thinking=True
    )
