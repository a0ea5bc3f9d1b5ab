"""The words that configs are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from posttrain.errors import did_you_mean
from posttrain.registry import Registry


def listed(value: Any) -> Any:
    """One word where a list of words is asked for, or nothing."""
    return [value] if isinstance(value, str) else value or []


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


UNKNOWN_NAME = "unknown_name"  # of an error whose text says it all


@dataclass(frozen=True)
class OneOf:
    """A name of a registry's, which is asked when a config is checked: what is installed by then counts."""

    registry: Registry[Any]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._known, handler(source))

    def _known(self, value: str) -> str:
        names = self.registry.names()
        if value not in names:
            near = did_you_mean(value, names)
            raise PydanticCustomError(
                UNKNOWN_NAME,
                "there is no {kind} '{value}'{near} (there are: {names})",
                {"kind": self.registry.kind, "value": value, "near": near, "names": ", ".join(names)},
            )
        return value


Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]
