"""What an optimizer says of itself: all that configs, plans and runs ask of it, and never its name. Torch and libraries are
imported inside functions alone, for a config is checked without."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Size
    from torch.optim import Optimizer

Kept = Literal["adamw", "bitsandbytes"]  # whose moments a checkpoint has
Groups = list[dict[str, Any]]  # of parameters, as torch takes them, with weight_decay and lr_ratio


class Instead(NamedTuple):
    """Why plain AdamW takes an optimizer's place. why: in words. runs: could it do its work here all the same, for a run that has
    its moments?"""

    why: str
    runs: bool = False


@dataclass(frozen=True)
class Settings:
    """Of the whole optimizer. options: those of `optim.options`."""

    lr: float
    betas: tuple[float, float] | None
    eps: float | None
    options: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def given(self) -> dict[str, Any]:
        """Betas and eps where there are such, as torch's optimizers take them."""
        return {name: value for name, value in (("betas", self.betas), ("eps", self.eps)) if value is not None}


@dataclass(frozen=True)
class OptimizerKind:
    """One choice of `optim.name`.

    Args:
        make: of these groups and settings.
        numbers: (shape, is a hidden matrix) -> how many numbers are kept for a parameter of this shape.
        width: bytes of each of them; None: as the parameter's own.
        bytes_of: in place of both, where numbers are packed.
        package: what must be installed, by its name in Python; `posttrain[optimizers]` brings it.
        takes: which of `optim.betas` and `optim.eps` it has.
        options: what `optim.options` may say, with the type of each.
        schedules: those of `optim.schedule` that it goes with; none: all.
        keeps: what of its groups changes in training, and belongs to a checkpoint.
        whole_matrices: it turns the update of a whole weight matrix, which only training of the model's own weights has.
        one_rate: it has one rate for all parameters; finds_rate: which it finds, and `optim.lr` multiplies.
        averages: what it leaves is an average of the weights that it trains; it has `eval` and `train`.
        shards: with FSDP.
        moments: whose moments of AdamW it keeps, where another AdamW can take its place.
        instead: why plain AdamW takes its place, by (trained numbers, on CUDA, sharded); None where it does not.
    """

    make: Callable[[Groups, Settings], Optimizer]
    numbers: Callable[[Size, bool], int]
    width: int | None = None
    bytes_of: Callable[[Size], float] | None = None
    package: str = ""
    takes: tuple[str, ...] = ("betas", "eps")
    options: dict[str, type] = field(default_factory=dict[str, type])
    schedules: tuple[str, ...] = ()
    keeps: tuple[str, ...] = ()
    whole_matrices: bool = False
    one_rate: bool = False
    finds_rate: bool = False
    averages: bool = False
    shards: bool = False
    moments: Kept | None = None
    instead: Callable[[int, bool, bool], Instead | None] = lambda numbers, on_cuda, sharded: None

    def state_bytes(self, shape: Size, itemsize: int, is_matrix: bool) -> float:
        """What is kept for a parameter of this shape. itemsize: of its own numbers. is_matrix: as `hidden_matrices` has it."""
        if self.bytes_of:
            return self.bytes_of(shape)
        return float(self.numbers(shape, is_matrix) * (self.width or itemsize))
