"""Public functions, methods and classes of the standard library, each with a sentence that says what it does."""

from __future__ import annotations

import importlib
import inspect
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from posttrain.data.sources.hashing import fraction

# Modules that import without side effects on any platform and have docstrings that say something.
MODULES = """
argparse array asyncio base64 binascii bisect builtins bz2 calendar cmath codecs collections collections.abc
concurrent.futures configparser contextlib copy csv dataclasses datetime decimal difflib dis email.message
email.utils enum filecmp fileinput fnmatch fractions functools gc getpass glob graphlib gzip hashlib heapq
hmac html html.parser http.client http.cookies inspect io ipaddress itertools json keyword linecache locale
logging lzma math mimetypes numbers operator os os.path pathlib pickle pkgutil platform plistlib pprint queue
quopri random re sched secrets selectors shelve shlex shutil signal smtplib socket socketserver sqlite3
statistics string struct subprocess sysconfig tarfile tempfile textwrap threading time timeit tokenize
traceback tracemalloc types typing unicodedata unittest unittest.mock urllib.parse urllib.request
urllib.robotparser uuid warnings wave weakref xml.dom.minidom xml.etree.ElementTree zipfile zlib zoneinfo
"""
_VERB_LIST = """
abort accept acquire add adjust allow analyse analyze append apply arrange assert assign assume attach attempt
bind block break build calculate call cancel capture cast change check choose clean clear clone close collect
combine compare compile compress compute concatenate configure connect construct convert copy count create
deactivate debug decode decompress decorate decrease decrement define delete deserialize detach detect
determine disable disassemble discard discover display divide do download dump emit empty enable encode end
enter enumerate escape evaluate examine exchange execute exit expand export extend extract fail feed fetch
fill filter finalize find finish flush force forget format free generate get give group handle hash identify
import increase increment indicate initialize insert inspect instantiate interpret invert invoke issue iterate
join kill leave let limit link list listen load locate lock log look lower make map mark match measure merge
modify move multiply normalize notify obtain open order override pack parse pass patch pause perform pickle
pop post predict prepare prevent print process produce provide push put query quote raise randomize read
rearrange rebuild receive recognize record recreate reduce refresh register release reload remove rename
render reorder repeat replace replicate report represent request require reserve reset resize resolve restore
resume retrieve return reverse rewind rotate round run save scan schedule search seek select send serialize
serve set shift show shuffle shut simulate skip sleep sort specify split start stop store strip submit
subtract suspend swap switch symlink synchronize take terminate test toggle trace transform translate treat
truncate try turn undo unescape unlink unlock unpack unquote unregister unset update upgrade upload use
validate verify wait walk warn wrap write yield
"""
VERBS = frozenset(_VERB_LIST.split())
_ROLE = re.compile(r":[a-z:]+:`[~!]?([^`]+)`")
_QUOTED = re.compile(r"``([^`]+)``")
_EMPHASIS = re.compile(r"\*(\w+)\*")
_HEADER = re.compile(r"[\w.]+(\(.*\))( *-> *.+| *=> *.+)?$")  # the call that old docstrings begin with
_SECOND_VERB = re.compile(
    r"(\b(?:and|or|then)|,) (" + "|".join(sorted(VERBS - {"set", "list", "order"})) + r"|set(?= (?:a|an|the)\b))\b(?=[^-,])"
)
_MAKES = {
    "create",
    "return",
    "make",
    "wrap",
    "implement",
    "provide",
    "support",
    "define",
}  # what a class may be said to do
_SENTENCE_END = re.compile(r"(?<=[a-z0-9)\]`'\"])\.\s+(?=[A-Z`])")
_UNCLEAR = re.compile(
    r"deprecated|helper|internal|obsolete|stub|not implemented|docstring|overrid|subclass|TODO|XXX|\bsee\b|signature|"
    r">>>|->|==|--|!|\\|\bthis (method|function|class) is\b|default implementation|^return self|^raises (?:an? )?[A-Z]",
    re.IGNORECASE,
)
_LONGEST, _SHORTEST = 260, 28  # letters of an answer's sentences


@dataclass(frozen=True)
class Entry:
    """`does` completes the sentence "NAME ..."; call is None where no signature is known."""

    module: str
    name: str
    kind: str  # function, method or class
    call: str | None
    does: str


def place(*words: str) -> float:
    """A number in [0, 1) from a hash of the words, the same on every machine."""
    return fraction("\0".join(words).encode())


def pick(options: list[Any] | tuple[Any, ...], *words: str) -> Any:
    """One of the options, always the same for the same words."""
    return options[int(place(*words) * len(options))]


@cache
def entries() -> tuple[Entry, ...]:
    """All entries, no two of them with the same name or saying the same, in an order drawn by hash."""
    found: dict[str, Entry] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in MODULES.split():
            for name, kind, thing in _public(module):
                does = _sentence(thing.__doc__, kind)
                if does:
                    found.setdefault(does.lower(), Entry(module, name, kind, _call(name, kind, thing), does))
    return tuple(sorted(found.values(), key=lambda entry: place(entry.name)))


def _public(module: str) -> Iterator[tuple[str, str, Any]]:
    """(name as it is written in code, kind, object) of what `module` itself defines."""
    members = vars(importlib.import_module(module))
    before = "" if module == "builtins" else f"{module}."
    for name, thing in sorted(members.items()):
        if name.startswith("_") or not _belongs(thing, module):
            continue
        if inspect.isclass(thing):
            yield f"{before}{name}", "class", thing
            for own, member in sorted(vars(thing).items()):
                method = member.__func__ if isinstance(member, classmethod | staticmethod) else member
                if not own.startswith("_") and inspect.isroutine(method):
                    yield f"{before}{name}.{own}", "method", getattr(thing, own)
        elif inspect.isroutine(thing):
            yield f"{before}{name}", "function", thing


def _belongs(thing: Any, module: str) -> bool:
    home = getattr(thing, "__module__", None) or module
    if home == "builtins":
        return module == "builtins" or inspect.isbuiltin(thing)
    private = home.startswith("_") and home[1:] == module.split(".")[0]
    return home == module or private or home.startswith((f"{module}.", "posix", "nt", "genericpath"))


def _sentence(doc: object, kind: str) -> str | None:
    """The first paragraph of a docstring as the rest of a sentence that begins with the object's name."""
    if not isinstance(doc, str):
        return None
    lines = inspect.cleandoc(doc).split("\n")
    if _HEADER.match(lines[0]):
        lines = "\n".join(lines[1:]).strip().split("\n")
    paragraph = " ".join("\n".join(lines).split("\n\n")[0].split())
    paragraph = _EMPHASIS.sub(r"\1", _QUOTED.sub(r"`\1`", _ROLE.sub(r"`\1`", paragraph))).replace(" - ", ", ")
    sentences = _SENTENCE_END.split(paragraph.rstrip(". "))
    text = _told(sentences[0], kind)
    if text is None:
        return None
    for sentence in sentences[1:]:
        more = _told(sentence, "method")
        if more is None or len(text) + len(more) > _LONGEST:
            break
        text += f". It {more}"
    whole = f"{text}."
    clear = whole.isascii() and not _UNCLEAR.search(whole) and whole.count("(") == whole.count(")")
    return whole if clear and _SHORTEST <= len(whole) <= _LONGEST and not whole.endswith((":.", ",.")) else None


def _told(sentence: str, kind: str) -> str | None:
    """'Return the x and close it' -> 'returns the x and closes it'; a noun, of a class, -> 'is a noun'; else None."""
    first, _, rest = sentence.partition(" ")
    word = first.lower()
    if not rest or not first[0].isupper():
        return None
    if word in VERBS and (kind != "class" or word in _MAKES):
        return f"{_third(word)} {_SECOND_VERB.sub(lambda m: f'{m[1]} {_third(m[2])}', rest)}"
    if word.endswith("s") and {word[:-1], word[:-2], word[:-3] + "y"} & VERBS:
        return f"{word} {rest}"
    if word == "true" and rest.startswith("if "):
        return f"returns True {rest}"
    return _noun(sentence) if kind == "class" else None


def _noun(sentence: str) -> str | None:
    articles = {
        "a": "",
        "an": "",
        "the": "",
        "base class": "the ",
        "abstract base class": "an ",
        "exception raised": "the ",
    }
    start = next((a for a in articles if sentence.lower().startswith(f"{a} ")), None)
    if start is None or re.search(r" (is|was|were|has|can|cannot|could|should|must) ", sentence):
        return None
    return f"is {articles[start]}{sentence[0].lower()}{sentence[1:]}"


def _third(verb: str) -> str:
    if verb.endswith(("s", "x", "ch", "sh", "do", "go")):
        return f"{verb}es"
    return f"{verb[:-1]}ies" if verb.endswith("y") and verb[-2] not in "aeiou" else f"{verb}s"


def _call(name: str, kind: str, thing: Any) -> str | None:
    """'shutil.move(src, dst)': with names and defaults but no types; None if unknown, long or empty of meaning."""
    try:
        parameters = list(inspect.signature(thing).parameters.values())
    except (ValueError, TypeError):
        return None
    if kind == "method" and parameters and parameters[0].name == "self":
        parameters = parameters[1:]
    names = {p.name for p in parameters}
    plain = [p.replace(annotation=p.empty) for p in parameters if not p.name.startswith("_")]
    shown = str(inspect.Signature(plain)).replace("(/, ", "(").replace(", /", "").replace("(/)", "()")
    local = any(isinstance(p.default, str) and "/" in p.default for p in plain)  # a path of this machine
    only_rest = bool(names) and names <= {"args", "kwargs", "kwds", "kw"}
    vague = local or only_rest or "<" in shown or "object at" in shown or len(shown) > 90
    return None if vague else f"{name}{shown}"
