"""docs/commands.md, losses.md and formats.md leave nothing out; that they are up to date is seen in test_api_pages.py."""

import typer

from posttrain.cli import app
from posttrain.config.choices import POLICY_LOSSES, PREFERENCE_LOSSES, TOKEN_LOSSES
from posttrain.config.schema.data import DATA_FORMATS
from reference_pages import cell, made


def test_nothing_is_left_out() -> None:
    texts = made()
    group: object = typer.main.get_command(app)
    assert all(f"### posttrain {name}\n" in texts["commands.md"] for name in getattr(group, "commands"))  # noqa: B009
    for registry in (TOKEN_LOSSES, PREFERENCE_LOSSES, POLICY_LOSSES):
        assert all(f"| `{name}` |" in texts["losses.md"] for name in registry.names())
    assert all(f"## {name}\n" in texts["formats.md"] for name in DATA_FORMATS.names())


def test_marks_of_markdown_are_written_out() -> None:
    assert cell("a | b * `c|d`\n  <e>") == "a \\| b \\* `c\\|d` \\<e>"
