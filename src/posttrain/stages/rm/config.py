"""The config of a reward model."""

from __future__ import annotations

from pydantic import model_validator

from posttrain.config.schema import LanguageStage, RmConfig


class Rm(LanguageStage):
    """Config of `posttrain rm`."""

    gives = frozenset({"rows", "quantized"})
    rm: RmConfig

    @model_validator(mode="after")
    def _writes_nothing(self) -> Rm:
        if self.eval.generate.prompts or self.eval.generate.metrics:
            raise ValueError("eval.generate: a reward model scores, and writes nothing; leave it out")
        if self.eval.tasks:
            raise ValueError("eval.tasks: a reward model scores, and answers no task; leave them out")
        return self
