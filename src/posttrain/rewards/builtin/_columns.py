"""What a reward says of a column that the rows do not have."""

from __future__ import annotations

from collections.abc import Collection

from posttrain.errors import UserError, did_you_mean

GIVEN = ("prompts", "completions", "references")  # what a reward is given beside the columns of the rows


def no_column(reward: str, column: str, given: Collection[str]) -> UserError:
    """given: the names of all that the reward was given."""
    have = [name for name in given if name not in GIVEN]
    near, told = did_you_mean(column, have), ", ".join(have) or "none"
    return UserError(f"reward.options.{reward}.column: '{column}' is no column of the rows{near}; their columns are {told}")
