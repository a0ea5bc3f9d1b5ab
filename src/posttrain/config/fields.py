"""The words that configs are made of."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError
from pydantic_core.core_schema import no_info_after_validator_function

from posttrain.errors import did_you_mean
from posttrain.registry import Registry


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


class OneOf:
    """Of a field whose choices are the names in a registry, after some others: `Annotated[str, OneOf(DATA_FORMATS, "auto")]`.

    Looking for the names imports none of the entries.
    """

    def __init__(self, registry: Registry[Any], *others: str) -> None:
        self.registry, self.others = registry, others

    def choices(self) -> list[str]:
        """The other choices, then the registry's names."""
        return [*self.others, *self.registry.names()]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return no_info_after_validator_function(self._checked, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {**handler(schema), "enum": self.choices()}

    def _checked(self, name: str) -> str:
        if name in self.others or name in self.registry.names():
            return name
        known = self.choices()
        said = {"known": ", ".join(map(repr, known)), "near": did_you_mean(name, known)}
        raise PydanticCustomError("choice", "Input should be one of {known}{near}", said)
