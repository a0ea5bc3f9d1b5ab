"""The words that configs are made of."""

from __future__ import annotations

import math
from typing import Annotated, Any, cast

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError
from pydantic_core.core_schema import no_info_after_validator_function, no_info_plain_validator_function

from posttrain.errors import did_you_mean
from posttrain.registry import Registry


def listed(value: Any) -> Any:
    """One word where a list of words is asked for, or nothing."""
    return [value] if isinstance(value, str) else value or []


class Strict(BaseModel):
    """A section of a config: every key is known, none changes, and every number is finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(gt=0)]
Dropout = Annotated[float, Field(ge=0, lt=1)]
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


class SumOf(OneOf):
    """Of a field that is a name in a registry, or several names with their weights, as `Annotated[Any, SumOf(LOSSES)]`."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return no_info_plain_validator_function(self._checked_sum)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        named = {"type": "string", "enum": self.choices()}
        return {"anyOf": [named, {"type": "object", "additionalProperties": {"type": "number"}}]}

    def _checked_sum(self, value: Any) -> Any:
        if not isinstance(value, str | dict) or not value:
            known = self.choices()
            said = {"such": f"{{{known[0]}: 0.8, {known[-1]}: 0.2}}"}
            raise PydanticCustomError("sum", "Input should be one name, or several with their weights, as {such}", said)
        if not isinstance(value, dict):
            return self._checked(str(cast("object", value)))
        weights = cast("dict[Any, Any]", value)
        for name, weight in weights.items():
            self._checked(str(name))
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
                raise PydanticCustomError("weight", "The weight of {name} should be a number > 0", {"name": name})
        return {str(name): float(weight) for name, weight in weights.items()}
