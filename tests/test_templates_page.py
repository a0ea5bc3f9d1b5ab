"""docs/templates.md says what the encoder does today."""

import pytest

from stock_templates import IS_THERE
from templates_page import PAGE, is_exact, page

ENDS = ("<end>",)


@pytest.mark.slow
@pytest.mark.skipif(not IS_THERE, reason="trl, which ships the stock templates, is not installed")
def test_the_page_is_up_to_date_and_60_templates_train_calls_exactly() -> None:
    text = page()
    assert PAGE.read_text(encoding="utf-8") == text
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ") and "exact" in line]
    assert sum(row[2].startswith("exact") for row in rows) >= 60
    assert sum(row[2] == "exact" for row in rows) >= 43


@pytest.mark.parametrize(
    ("runs", "exact"),
    [
        (["A<end>", "B<end>"], True),
        (["A<end>"], False),  # a turn is missing
        (["A<end>", "B"], False),  # an end is missing
        (["A<end>", "QUESTION B<end>"], False),  # somebody else's words
        (["A B<end>", "B<end>"], False),  # another turn's words
    ],
)
def test_what_exact_means(runs: list[str], exact: bool) -> None:
    assert is_exact(runs, [["A"], ["B"]], ENDS) is exact
