import os
import re
import subprocess
import sys
from collections import Counter

import pytest

from posttrain.data.formats import recognise, to_canonical
from posttrain.data.sources.builtin.objects import entries
from posttrain.data.sources.builtin.questions import RANGES, answer
from posttrain.data.sources.builtin.sets import PARTS, builtin_rows
from posttrain.errors import UserError

SETS = [(name, part) for name, parts in PARTS.items() for part in parts]


NAMED = re.compile(r"^(?:Call it as )?`([^`(]+)")  # the object that an answer is about


def objects(name: str, part: str) -> set[str]:
    """Names of the objects that the answers of a set are about."""
    answers = [
        message["content"]
        for row in builtin_rows(name, part)
        for message in row.get("messages", [])[1:] + row.get("chosen", []) + row.get("rejected", [])
    ]
    return {found[1] for text in answers if (found := NAMED.match(text))}


@pytest.mark.parametrize(("name", "part"), SETS)
def test_rows_are_canonical_and_different(name: str, part: str) -> None:
    rows = builtin_rows(name, part)
    kind = recognise(rows[0])
    assert kind == {"reference": "text", "general": "text", "questions": "messages", "preferences": "pairs"}[name]
    assert all(to_canonical(row, kind, "row") == row for row in rows)
    assert len({str(row) for row in rows}) == len(rows)


def test_sizes() -> None:
    sizes = {key: len(builtin_rows(*key)) for key in SETS}
    assert sizes["questions", "train"] >= 1500 and sizes["questions", "eval"] >= 100
    assert sizes["preferences", "train"] >= 600 and sizes["preferences", "eval"] >= 64
    assert sizes["general", "eval"] == 40
    letters = {part: sum(len(row["text"]) for row in builtin_rows("reference", part)) for part in ("train", "eval")}
    assert letters["train"] > 200_000 and 0.04 < letters["eval"] / letters["train"] < 0.25


def test_the_same_in_another_process() -> None:
    code = f"from posttrain.data.sources.source import fingerprint; print([fingerprint('builtin:' + n) for n in {list(PARTS)}])"
    runs = []
    for seed in ("1", "2"):
        env = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        runs.append(subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True).stdout)
    assert runs[0] == runs[1] and len(runs[0].split()) == len(PARTS)


def test_no_paragraph_of_the_reference_is_in_both_parts() -> None:
    def paragraphs(part: str) -> list[str]:
        texts = [row["text"] for row in builtin_rows("reference", part)]
        return [" ".join(p.split()) for text in texts for p in text.split("\n\n") if len(" ".join(p.split())) >= 80]

    train, held_out = paragraphs("train"), paragraphs("eval")
    assert len(train) > 500 and len(held_out) > 50
    assert not set(train) & set(held_out)
    assert len(train) == len(set(train))


def test_no_object_is_in_two_parts() -> None:
    found = {key: objects(*key) for key in RANGES}
    assert all(len(names) > 80 for names in found.values())
    for one in found:
        for other in found:
            assert one == other or not found[one] & found[other], (one, other)


def test_entries_are_clean() -> None:
    found = entries()
    assert len({entry.name for entry in found}) == len({entry.does for entry in found}) == len(found)
    for entry in found:
        assert re.fullmatch(r"[a-z]+(s|is) .*\.", entry.does), entry
        assert "deprecated" not in entry.does.lower() and "->" not in entry.does
        assert entry.call is None or (
            entry.call.startswith(f"{entry.name}(") and "self" not in entry.call.split("(")[1].split(", ")
        )
        assert "/" not in (entry.call or "").replace("'/'", "")


def test_known_answers() -> None:
    by_name = {entry.name: entry for entry in entries()}
    assert answer(by_name["math.tan"], "call") == "Call it as `math.tan(x)`. It returns the tangent of x (measured in radians)."
    assert answer(by_name["list.append"], "what") == "`list.append` appends object to the end of the list."


def test_length_does_not_give_the_better_answer_away() -> None:
    for part in ("train", "eval"):
        rows = builtin_rows("preferences", part)
        longer = [len(r["chosen"][0]["content"]) > len(r["rejected"][0]["content"]) for r in rows]
        assert 0.3 < sum(longer) / len(rows) < 0.6


def test_answers_are_right_and_rejected_ones_wrong_or_padded() -> None:
    right = {answer(entry, form) for entry in entries() for form in ("what", "call", "which")}
    sold = set()  # right answers to another question
    rows = builtin_rows("preferences", "train")
    for row in rows:
        question, chosen, rejected = (row[key][0]["content"] for key in ("prompt", "chosen", "rejected"))
        assert chosen in right and rejected != chosen
        if question.startswith("Which ") and "take?" not in question and rejected in right:
            sold.add(question)
            assert question.split("` ")[-1].rstrip("?") not in rejected
    assert len(sold) > 100
    common = Counter(row["rejected"][0]["content"] for row in rows)
    assert max(common.values()) < 0.05 * len(rows)


def test_general_is_prose_for_evaluation_only() -> None:
    words = [len(row["text"].split()) for row in builtin_rows("general", "eval")]
    assert all(80 <= n <= 140 for n in words)
    assert not any("python" in row["text"].lower() for row in builtin_rows("general", "eval"))
    with pytest.raises(UserError, match="evaluation only"):
        builtin_rows("general", "train")


def test_unknown_names() -> None:
    with pytest.raises(UserError, match="did you mean 'questions'"):
        builtin_rows("question", "train")
    with pytest.raises(UserError, match="no part 'test'"):
        builtin_rows("questions", "test")
