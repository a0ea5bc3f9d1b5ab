"""Is an answer JSON of the wanted schema?"""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from typing import Any

from posttrain.errors import UserError

_BLOCK = re.compile(r"```(?:json)?\s*\n(.*?)```", re.DOTALL)


class JsonSchema:
    """1 for JSON that the schema takes, `valid` for other JSON, 0 for what is none, None where the row has no schema.

    Args:
        schema: for all rows; None: each row has its own in `column`.
        column: of the rows: an object, or its text.
        valid: what JSON is worth that the schema does not take.
    """

    def __init__(self, schema: dict[str, Any] | None = None, column: str = "schema", valid: float = 0.0) -> None:
        if find_spec("jsonschema") is None:
            raise UserError("reward.function: json_schema needs jsonschema; pip install 'posttrain[rewards]'")
        self.schema, self.column, self.valid = schema, column, valid

    def __call__(self, answers: list[str], **columns: list[Any]) -> list[float | None]:
        """A block between ``` marks is taken out of an answer first."""
        if self.schema is None and self.column not in columns:
            raise UserError(f"reward.options.json_schema: give its schema, or a column; '{self.column}' is none of the rows'")
        schemas = [self.schema] * len(answers) if self.schema is not None else columns[self.column]
        return [self._score(answer, schema) for answer, schema in zip(answers, schemas, strict=True)]

    def _score(self, answer: str, schema: Any) -> float | None:
        from jsonschema.validators import validator_for  # pyright: ignore

        if schema is None:
            return None
        schema = json.loads(schema) if isinstance(schema, str) else schema
        block = _BLOCK.search(answer)
        try:
            value = json.loads(block[1] if block else answer)
        except (ValueError, RecursionError):
            return 0.0
        return 1.0 if validator_for(schema)(schema).is_valid(value) else self.valid


REWARD = JsonSchema
