"""What an export target says of itself, and what it is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from posttrain.errors import UserError, did_you_mean
from posttrain.registry import Registry
from posttrain.runs.artifact import Artifact

SPELLED = {"float16": "f16", "fp16": "f16", "half": "f16", "bfloat16": "bf16", "float32": "f32", "fp32": "f32"}


@dataclass(frozen=True)
class Request:
    """What is to be written. artifact: of a finished run. made: an empty directory for it. max_kl: nats a token that it may be
    from the live model."""

    artifact: Artifact
    made: Path
    dtype: str | None
    max_kl: float

    @property
    def run(self) -> Path:
        """The run's directory."""
        return Path(self.artifact.name)

    @property
    def name(self) -> str:
        """For files and people: the run's."""
        return self.run.resolve().name


@dataclass(frozen=True)
class Target:
    """about: what is written, in a line. dtypes: what --dtype may be. write: raises UserError for what can be refused before a
    weight is loaded. pictures: is it for results of diffusion models? instead: what to do where a dtype is not there; '' for
    nothing."""

    about: str
    dtypes: tuple[str, ...]
    write: Callable[[Request], None]
    pictures: bool = False
    instead: Callable[[str], str] = lambda dtype: ""

    def dtype_of(self, said: str | None) -> str | None:
        """As it calls it: Q8_0, float16 and fp16 are names too. Raises UserError for one that it does not have."""
        dtype = said and SPELLED.get(said.lower(), said.lower())
        if dtype is None or dtype in self.dtypes:
            return dtype
        there = f" (there are: {', '.join(self.dtypes)})" if self.dtypes else ", it takes none"
        instead = f"; {how}" if (how := self.instead(dtype)) else ""
        raise UserError(f"--dtype: there is no '{said}' here{did_you_mean(dtype, list(self.dtypes))}{there}{instead}")


TARGETS: Registry[Target] = Registry(
    "posttrain.commands.export.targets", "posttrain.export_targets", "TARGET", "export target", of=f"{__name__}:Target"
)  # fmt: skip
