"""The words that configs are made of."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field


def listed(value: Any) -> Any:
    """One word where a list of words is asked for, or nothing."""
    return [value] if isinstance(value, str) else value or []


class Strict(BaseModel):
    """A section of a config: every key is known, and none changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]
