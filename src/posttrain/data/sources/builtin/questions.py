"""Questions about the standard library with right answers, and pairs of a right and a poor answer."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache

from posttrain.data.rows import CanonicalRow, Message
from posttrain.data.sources.builtin.objects import Entry, entries, pick, place

# Ranges of the hash of an object's name: an object is in one part of one set, and in no other.
RANGES = {
    ("questions", "eval"): (0.0, 0.08),
    ("questions", "train"): (0.08, 0.66),
    ("preferences", "train"): (0.66, 0.91),
    ("preferences", "eval"): (0.91, 1.0),
}
_WHAT = (
    "What does `{name}` do?",
    "What does the {kind} `{name}` do in Python?",
    "Can you tell me what `{name}` does?",
    "Explain in a sentence or two what `{name}` does.",
    "I came across `{name}` in some Python code. What does it do?",
)
_WHAT_IS = (
    "What is `{name}`?",
    "What is `{name}` in Python?",
    "Can you explain the class `{name}`?",
    "I came across `{name}` in some Python code. What is it?",
)
_CALL = (
    "How do I call `{name}`?",
    "Which arguments does `{name}` take?",
    "How is `{name}` called, and what for?",
    "Show me how to call `{name}`.",
)
_OPENERS = (
    "Great question! There is quite a lot to say here, so let me start from the beginning.",
    "Well, before I answer, it is worth taking a step back and looking at the wider picture.",
    "That is something a lot of people ask themselves, and honestly it depends on how you look at it.",
    "So, you are asking about `{name}`. `{name}` is part of Python, and Python is a very popular programming language.",
    "Thank you for asking! I will do my best to help you with this interesting topic.",
    "Python has many functions, classes and modules, and each of them has a purpose of its own.",
    "Let me think about this. There are several things one could mention, and I will try to mention all of them.",
    "As you may know, the standard library is large, and it has grown over many years.",
)
_HEDGES = (
    "I think, although I am not completely sure, that `{name}` {does}",
    "Broadly speaking, and simplifying a little, one might say that `{name}` {does}",
    "It seems that, at least in most versions and under most circumstances, `{name}` {does}",
    "To put it one way, `{name}` {does} To put it another way, that is what it does.",
    "If I remember correctly, which I may not, `{name}` more or less {does}",
    "What happens, as far as anyone can tell in general, is that `{name}` {does}",
)
_PADDING = (
    "In other words, it does what was said above: `{name}` {does}",
    "This can be useful in many situations, such as when you need it, and less useful in some others.",
    "Of course there are other ways to look at it, and different programmers have different opinions.",
    "There are also other things in Python that do other things, but they are not what you asked about.",
    "It is important to note that it is important to understand what it does before you use it.",
    "To repeat the main point once more, because it matters: `{name}` {does}",
    "Some people use it every day, some people never use it, and both are perfectly fine.",
    "Programming is a journey, and learning a new name is always a step on the way.",
)
_CLOSERS = (
    "I hope this helps! Let me know if you would like me to go over it again.",
    "But do check this yourself, since I could be wrong about some or all of it.",
    "So that is, in short, a possible answer to your question, among others.",
    "Feel free to ask me anything else about this or about any other topic!",
    "All in all, it really depends on what you want to do and how you want to do it.",
    "And that, in a nutshell, more or less covers it, I would say.",
)
_EVASIONS = (
    "I am not sure. You could look it up in the documentation.",
    "That depends.",
    "It does what its name says.",
    "There are many things in Python, and this is one of them. I would suggest a search engine.",
    "Sorry, I cannot say much about that. Perhaps someone with more experience of Python can help you.",
    "It is hard to explain. The best way to find out is to try it and see what happens.",
    "I would rather not go into the details here, because they can differ from one version of Python to the next.",
    "Good question! Did you try to read the source code?",
    "You probably do not need to know this. Most programs work well without it, and there are other ways to do it.",
    "It is something you can use in Python programs. Whether you should use it is up to you.",
    "What a coincidence, I was wondering about that too. Let me know if you find out.",
    "People use it in different ways for different things, so there is no simple answer to give here.",
)
_WORDS = re.compile(r"[a-z]{3,}")


def question_rows(part: str) -> list[CanonicalRow]:
    """Questions and answers made from docstrings, as conversations; part: train or eval."""
    rows = []
    for entry in _entries_of("questions", part):
        forms = _forms(entry)
        extra = forms[1:] and pick(forms[1:], "second form", entry.name)
        rows += [(entry, forms[0])] + ([(entry, extra)] if extra else [])
    rows.sort(key=lambda row: place("order", row[0].name, row[1]))
    return [{"messages": [_user(entry, form), _assistant(answer(entry, form))]} for entry, form in rows]


def preference_rows(part: str) -> list[CanonicalRow]:
    """A right and a wrong or rambling answer to each question; part: train or eval."""
    pool = _entries_of("preferences", part)
    rows = [(entry, form) for entry in pool for form in _forms(entry)]
    rows.sort(key=lambda row: place("order", row[0].name, row[1]))
    return [
        {
            "prompt": [_user(entry, form)],
            "chosen": [_assistant(answer(entry, form))],
            "rejected": [_assistant(_poor_answer(entry, form, pool))],
        }
        for entry, form in rows
    ]


def _entries_of(name: str, part: str) -> list[Entry]:
    low, high = RANGES[name, part]
    return [entry for entry in entries() if low <= place(entry.name) < high]


def _forms(entry: Entry) -> list[str]:
    """The ways to ask about an object: what it does, how it is called, which object it is that does so."""
    own, does = entry.name.rpartition(".")[2].lower(), _first_sentence(entry.does)
    clear = entry.kind != "class" and own not in does.lower() and ". " not in does
    alone = _tellers()[_place_of(entry), does] == 1
    return ["what"] + ["call"] * (entry.call is not None) + ["which"] * (clear and alone)


@cache
def _tellers() -> Counter[tuple[str, str]]:
    """How many objects of a place do the same as far as their first sentence tells."""
    return Counter((_place_of(entry), _first_sentence(entry.does)) for entry in entries())


def _user(entry: Entry, form: str) -> Message:
    if form == "which":
        question = f"Which {_place_of(entry)} {_first_sentence(entry.does)}?"
    else:
        what = _WHAT_IS if entry.does.startswith("is ") else _WHAT
        question = pick(_CALL if form == "call" else what, form, entry.name).format(name=entry.name, kind=entry.kind)
    return {"role": "user", "content": question}


def _place_of(entry: Entry) -> str:
    if entry.kind == "method":
        return f"method of `{entry.name.rpartition('.')[0]}`"
    return "built-in function" if entry.module == "builtins" else f"function of the `{entry.module}` module"


def _first_sentence(text: str) -> str:
    return text.split(". It ")[0].rstrip(".")


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def answer(entry: Entry, form: str) -> str:
    """The right answer, short."""
    if form == "what":
        return f"`{entry.name}` {entry.does}"
    if form == "which":
        return f"`{entry.name}`. It {entry.does}"
    return f"Call it as `{entry.call}`. It {entry.does}"


def _poor_answer(entry: Entry, form: str, pool: list[Entry]) -> str:
    """Wrong, rambling or evasive, by hash; about half of them wrong."""
    draw = place("poor", form, entry.name)
    other = _mistaken_for(entry, form, pool) if draw < 0.55 else None
    if other:
        return f"`{entry.name}` {other.does}" if form == "what" else answer(other, form)
    if draw > 0.78:
        return pick(_EVASIONS, "evasion", form, entry.name)
    parts = [
        pick(_OPENERS, "opener", form, entry.name),
        pick(_HEDGES, "hedge", form, entry.name),
        pick(_PADDING, "padding", form, entry.name),
        pick(_CLOSERS, "closer", form, entry.name),
    ]
    shown = parts[place("opens", form, entry.name) < 0.4 :][: 2 + int(place("length", form, entry.name) * 3)]
    return " ".join(shown).format(name=entry.name, does=entry.does)


def _mistaken_for(entry: Entry, form: str, pool: list[Entry]) -> Entry | None:
    """Another object, of the same module if there is one, whose answer is about as long and says something else."""
    alike = [
        other
        for other in pool
        if other.kind == entry.kind
        and other.name != entry.name
        and other.does.startswith("is ") == entry.does.startswith("is ")
        and (form != "call" or other.call)
        and _overlap(entry.does, other.does) < 0.4
    ]
    near = [other for other in alike if other.module == entry.module]
    drawn = sorted(near or alike, key=lambda other: place("mistaken", entry.name, other.name))[:5]
    return min(drawn, key=lambda other: abs(len(answer(other, form)) - len(answer(entry, form))), default=None)


def _overlap(a: str, b: str) -> float:
    """Jaccard index of the words."""
    one, two = set(_WORDS.findall(a.lower())), set(_WORDS.findall(b.lower()))
    return len(one & two) / len(one | two)
