"""A chat template is a program of its author's. It is rendered within limits on steps, text and time; a bomb is one line.

transformers renders in jinja2's sandbox, which keeps a template from Python, and not from looping or writing without end. Here
its loops, calls, filters, operators and literals are counted, each by what it makes, before it makes it where it could be much.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, lru_cache, wraps
from typing import Any

from jinja2 import Template, nodes
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from posttrain.errors import UserError

STEPS = 1_000_000  # loops' rounds and calls of one rendering; 10,000 messages take some 100,000
CHARACTERS = 32_000_000  # made on the way, all parts added up, and so many more for each character that is given:
EACH = 200
PART = 16  # of these is a value in a list or dict
SECONDS = 20.0  # of this thread's own
WIDTH = 100_000  # of a number that says how wide or how often
BITS = 100_000  # of a whole number
LEFT_OUT = ("center", "pprint", "random", "urlize", "wordwrap", "xmlattr")  # filters that no chat template has, and bombs need
# what hands values on; any other filter makes text of what it is given
HANDS_ON = frozenset(
    "length count list first last default d items dictsort map select reject selectattr rejectattr sort unique groupby batch "
    "slice reverse min max sum attr safe abs round".split()
)
_CONTAINERS = list | tuple | dict | set | frozenset
_TEXTS = str | bytes
_WIDE = re.compile(r"[%{][^a-zA-Z%{}]*(\d{6,}|\*)|\{[^{}]*\{")  # in a text that formats
_now = threading.local()


class TooMuch(UserError):
    """The template takes more than a rendering may."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"the chat template {what}: it would not end, or fill the memory; give model.chat_template=chatml or another"
        )


class _Budget:
    """What one rendering may still take."""

    def __init__(self, given: int) -> None:
        self.steps, self.characters = STEPS + given, CHARACTERS + EACH * given
        self.until = time.thread_time() + SECONDS

    def step(self) -> None:
        self.steps -= 1
        if self.steps < 0:
            raise TooMuch(f"takes more than {STEPS:,} steps")
        if self.steps % 64 == 0 and time.thread_time() > self.until:
            raise TooMuch(f"takes more than {SECONDS:.0f} seconds")

    def pay(self, size: int) -> None:
        self.characters -= size
        if self.characters < 0:
            raise TooMuch(f"makes more than {CHARACTERS:,} characters")

    def pay_for(self, value: Any, *, text: bool = False, indent: int = 0) -> None:
        """A value of any depth, values that stand in it twice counted twice. text: it is written, with all that is in it."""
        if isinstance(value, _TEXTS):
            self.pay(1 + len(value))
            return
        waiting = [(value, 0)]
        while waiting:
            each, depth = waiting.pop()
            self.pay(PART + indent * depth + (len(each) if text and isinstance(each, _TEXTS) else 0))
            if isinstance(each, dict):
                waiting += [(part, depth + 1) for pair in each.items() for part in pair]
            elif isinstance(each, _CONTAINERS):
                waiting += [(part, depth + 1) for part in each]


@contextmanager
def _spending(given: Any) -> Iterator[None]:
    """Inside, what is counted is counted for a rendering of `given`."""
    before = getattr(_now, "budget", None)
    _now.budget = counter = _Budget(0)
    counter.steps = counter.characters = most = 10**12
    counter.pay_for(given, text=True)
    _now.budget = _Budget(most - counter.characters)
    try:
        yield
    finally:
        _now.budget = before


@cache
def limit_templates() -> None:
    """From now on every chat template that transformers renders in this process is rendered within the limits."""
    from transformers.utils import chat_template_utils as theirs

    plain = theirs._compile_jinja_template

    @lru_cache
    def compiled(chat_template: str) -> Template:
        return _Sandbox.like(plain("").environment).from_string(chat_template)

    theirs._compile_jinja_template = compiled


class _Limited(Template):
    """A template whose renderings are counted."""

    def generate(self, *args: Any, **kwargs: Any) -> Iterator[str]:
        """As the base's."""
        with _spending(dict(*args, **kwargs)):
            yield from super().generate(*args, **kwargs)

    def render(self, *args: Any, **kwargs: Any) -> str:
        """As the base's."""
        return "".join(self.generate(*args, **kwargs))


class _Sandbox(ImmutableSandboxedEnvironment):
    template_class = _Limited
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    @classmethod
    def like(cls, theirs: Any) -> _Sandbox:
        """With the settings, extensions, filters and globals of transformers' own."""
        extensions = [type(extension) for extension in theirs.extensions.values()]
        found = cls(trim_blocks=theirs.trim_blocks, lstrip_blocks=theirs.lstrip_blocks, extensions=extensions, optimized=False)
        found.finalize = _written
        found.filters = {name: _guarded(name, call) for name, call in theirs.filters.items() if name not in LEFT_OUT}
        found.filters |= {"_steps": _steps, "_paid": _paid, "_joined": _joined}
        found.globals = {name: value for name, value in theirs.globals.items() if name != "lipsum"}
        found.concat = _joined
        return found

    def compile(self, source: Any, *args: Any, **kwargs: Any) -> Any:
        """As the base's, after all that makes something is wrapped into what counts."""
        with _spending(source):
            return super().compile(_Counting(self).visit(self.parse(source)), *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """As the base's."""
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * max(1, right) if operator == "**" else left.bit_length() + right.bit_length()
            if bits > BITS:
                raise TooMuch("makes a number without end")
            return super().call_binop(context, operator, left, right)
        if operator == "*":
            times, value = (left, right) if isinstance(left, int) else (right, left)
            if isinstance(times, int) and hasattr(value, "__len__"):
                _now.budget.pay(max(0, times) * len(value))
        elif operator == "%" and isinstance(left, _TEXTS):
            _check_format(left, right)
        return _paid(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """As the base's."""
        _now.budget.step()
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(__obj, LoopContext) and args:
            args = (_steps(args[0]), *args[1:])
        elif name in ("format", "format_map"):
            _check_format(getattr(getattr(__obj, "__wrapped__", None), "__self__", ""), [args, kwargs])
        elif isinstance(owner, str | bytes | int):
            args = _before_method(owner, name, args, kwargs)
        return _paid(super().call(__context, __obj, *args, **kwargs))


def _before_method(owner: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Of texts and numbers: what it will make is paid. Returns the arguments, an iterator among them as a list."""
    _check_widths((*args, *kwargs.values()))
    if name == "translate":
        raise TooMuch("translates characters into texts")
    if isinstance(owner, int):
        return args
    _now.budget.pay(len(owner))
    if name == "join" and args:
        args = (_listed(args[0]),)
        _now.budget.pay(len(owner) * len(args[0]))
        _now.budget.pay_for(args[0], text=True)
    elif name == "replace" and len(args) > 1 and all(isinstance(each, type(owner)) for each in args[:2]):
        _now.budget.pay(owner.count(args[0]) * len(args[1]))
    return args


def _before_filter(name: str, value: Any, args: list[Any]) -> Any:
    """The value, an iterator that is joined as a list; what the filter will make of it is paid."""
    if name in HANDS_ON:
        if name == "sum" and any(isinstance(each, _CONTAINERS) for each in args):
            raise TooMuch("adds up lists")
        _check_widths([each for each in args if name in ("batch", "slice")])
        return value
    _check_widths(args)
    if name == "join":
        value = _listed(value)
        _now.budget.pay(len(value) * (1 + sum(len(each) for each in args if isinstance(each, str))))
    widths = sum(each if isinstance(each, int) else len(each) for each in args if isinstance(each, int | str))
    if name == "format":
        _check_format(value, args)
    elif name == "replace" and len(args) > 1:
        _now.budget.pay(str(value).count(str(args[0])) * len(str(args[1])))
    elif name == "indent":
        _now.budget.pay(len(str(value)) * (1 + widths))
    _now.budget.pay_for(value, text=True, indent=widths if name == "tojson" else 0)
    return value


def _guarded(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that is counted. Where jinja hands it a context first, the value comes second."""
    place = int(hasattr(call, "jinja_pass_arg"))

    @wraps(call)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        _now.budget.step()
        value = _before_filter(name, args[place], [*args[place + 1 :], *kwargs.values()])
        return _paid(call(*args[:place], value, *args[place + 1 :], **kwargs))

    return guarded


def _steps(values: Iterable[Any]) -> Generator[Any]:
    step = _now.budget.step
    for each in values:
        step()
        yield each


def _paid(value: Any) -> Any:
    """The value, which has just been made, or is about to be written."""
    if isinstance(value, _TEXTS | _CONTAINERS):
        _now.budget.pay_for(value)
    return value


def _written(value: Any) -> Any:
    """The same for what stands between {{ and }}."""
    _now.budget.pay_for(value, text=True)
    return value


def _joined(parts: Iterable[Any]) -> str:
    parts = _listed(parts)
    _now.budget.pay_for(parts, text=True)
    return "".join(map(str, parts))


def _listed(values: Any) -> Any:
    return values if isinstance(values, _TEXTS | _CONTAINERS) else list(_steps(values))


def _check_widths(values: Iterable[Any]) -> None:
    if any(isinstance(each, int) and abs(each) > WIDTH for each in values):
        raise TooMuch(f"asks for a width above {WIDTH:,}")


def _check_format(pattern: Any, values: Any) -> None:
    if isinstance(pattern, bytes) or _WIDE.search(str(pattern)):
        raise TooMuch("formats with a width of its own making")
    _now.budget.pay_for(values, text=True)


class _Counting(NodeTransformer):
    """Loops count their rounds; joined texts, literals and slices are paid for."""

    def __init__(self, environment: _Sandbox) -> None:
        self.environment = environment

    def _by(self, name: str, node: Any) -> nodes.Filter:
        found = nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)
        found.set_environment(self.environment)
        return found

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = self._by("_steps", node.iter)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        return self._by("_joined", nodes.List(node.nodes, lineno=node.lineno))

    def _literal(self, node: Any) -> Any:
        parts = [part for pair in node.items for part in (pair.key, pair.value)] if isinstance(node, nodes.Dict) else node.items
        is_stored = getattr(node, "ctx", "load") != "load"
        self.generic_visit(node)
        return node if is_stored or all(isinstance(part, nodes.Const) for part in parts) else self._by("_paid", node)

    visit_List = visit_Tuple = visit_Dict = _literal

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        self.generic_visit(node)
        return self._by("_paid", node) if isinstance(node.arg, nodes.Slice) else node
